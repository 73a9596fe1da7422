"""Other programs can still import and use the names of version 2."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, script
from torch import nn

from mit_semseg.dataset import BaseDataset, img_transform, round2nearest_multiple
from mit_semseg.lib.nn import UserScatteredDataParallel, async_copy_to, patch_replication_callback
from mit_semseg.lib.utils import as_numpy, mark_volatile
from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule, mobilenet, models, resnet
from mit_semseg.models.utils import load_url
from mit_semseg.utils import AverageMeter, process_range, setup_logger, unique

NORMS = "SynchronizedBatchNorm1d SynchronizedBatchNorm2d SynchronizedBatchNorm3d"
DATA_PARALLEL = "UserScatteredDataParallel DictGatherDataParallel user_scattered_collate async_copy_to"
REPLICATION = "DataParallelWithCallback patch_replication_callback"
NAMES = {
    "config": "cfg",
    "config.defaults": "_C",
    "dataset": "TrainDataset ValDataset TestDataset BaseDataset imresize img_transform round2nearest_multiple",
    "lib.nn": f"{NORMS} {DATA_PARALLEL} {REPLICATION}",
    "lib.nn.modules": f"{NORMS} {REPLICATION}",
    "lib.nn.modules.batchnorm": NORMS,
    "lib.nn.modules.replicate": REPLICATION,
    "lib.nn.parallel": DATA_PARALLEL,
    "lib.nn.parallel.data_parallel": DATA_PARALLEL,
    "lib.utils": "as_numpy mark_volatile",
    "lib.utils.th": "as_numpy mark_volatile",
    "models": "ModelBuilder SegmentationModule",
    "models.hrnet": "HRNetV2 HighResolutionModule hrnetv2",
    "models.mobilenet": "MobileNetV2 mobilenetv2",
    "models.models": "C1 C1DeepSup PPM PPMDeepsup UPerNet ModelBuilder SegmentationModule SegmentationModuleBase "
    "MobileNetV2Dilated Resnet ResnetDilated",
    "models.resnet": "ResNet resnet18 resnet50 resnet101",
    "models.resnext": "ResNeXt resnext101",
    "models.utils": "load_url",
    "utils": "AverageMeter accuracy colorEncode find_recursive intersectionAndUnion parse_devices process_range "
    "setup_logger unique",
}

# A script like those in notebooks and blog posts; it segments images with saved weights.
THIRD_PARTY = """
import csv, os, sys
import numpy as np, torch, scipy.io
from mit_semseg.config import cfg
from mit_semseg.dataset import TestDataset
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.utils import colorEncode, find_recursive
from mit_semseg.lib.nn import user_scattered_collate, async_copy_to
from mit_semseg.lib.utils import as_numpy

colors = scipy.io.loadmat(os.path.join(sys.argv[1], "data/color150.mat"))["colors"]
with open(os.path.join(sys.argv[1], "data/object150_info.csv")) as f:
    names = {int(row["Idx"]): row["Name"].split(";")[0] for row in csv.DictReader(f)}

cfg = cfg.clone()
cfg.merge_from_file(os.path.join(sys.argv[1], "config/ade20k-resnet18dilated-ppm_deepsup.yaml"))
cfg.merge_from_list(["DATASET.imgSizes", "(64, 96)"])
cfg.list_test = [{"fpath_img": p} for p in find_recursive(sys.argv[2], ext=".jpg")]
cfg.MODEL.arch_encoder = cfg.MODEL.arch_encoder.lower()

net_encoder = ModelBuilder.build_encoder(arch=cfg.MODEL.arch_encoder, fc_dim=512, weights="encoder.pth")
net_decoder = ModelBuilder.build_decoder(
    arch=cfg.MODEL.arch_decoder, fc_dim=512, num_class=cfg.DATASET.num_class, weights="decoder.pth", use_softmax=True)
segmentation_module = SegmentationModule(net_encoder, net_decoder, torch.nn.NLLLoss(ignore_index=-1))
segmentation_module.eval()

dataset_test = TestDataset(cfg.list_test, cfg.DATASET, max_sample=-1)
loader = torch.utils.data.DataLoader(dataset_test, batch_size=1, collate_fn=user_scattered_collate)
for batch_data in loader:
    batch_data = batch_data[0]
    size = (batch_data["img_ori"].shape[0], batch_data["img_ori"].shape[1])
    scores = torch.zeros(1, cfg.DATASET.num_class, *size)
    for img in batch_data["img_data"]:
        feed_dict = batch_data.copy()
        feed_dict["img_data"] = img
        del feed_dict["img_ori"], feed_dict["info"]
        feed_dict = async_copy_to(feed_dict, "cpu")
        with torch.no_grad():
            scores = scores + segmentation_module(feed_dict, segSize=size) / len(batch_data["img_data"])
    _, pred = torch.max(scores, dim=1)
    pred = as_numpy(pred.squeeze(0).cpu())
    picture = colorEncode(np.int32(pred), colors).astype(np.uint8)
    print(batch_data["info"].split("/")[-1], picture.shape, names[int(pred[0, 0]) + 1] != "",
          len(net_encoder(img, return_feature_maps=True)), net_decoder.conv_last[-1].out_channels)
"""


@pytest.mark.parametrize("module", NAMES)
def test_old_names_can_be_imported(module):
    for name in NAMES[module].split():
        assert hasattr(importlib.import_module(f"mit_semseg.{module}"), name), name


def test_models_can_be_built_from_their_classes():
    encoder = models.ResnetDilated(resnet.__dict__["resnet18"](pretrained=False), dilate_scale=8)
    upernet = models.UPerNet(5, 512, fpn_inplanes=(64, 128, 256, 512), fpn_dim=64)
    decoders = models.C1(num_class=5, fc_dim=512), models.C1DeepSup(5, 512), models.PPM(5, 512), upernet
    for decoder in (*decoders, models.PPMDeepsup(5, 512, False)):
        module = SegmentationModule(encoder, decoder, nn.NLLLoss(ignore_index=-1), 0.4).eval()
        assert isinstance(module, models.SegmentationModuleBase)
        assert module({"img_data": torch.randn(1, 3, 64, 64)}, segSize=(64, 64)).shape == (1, 5, 64, 64)
    assert len(models.Resnet(resnet.resnet50())(torch.zeros(1, 3, 64, 64), return_feature_maps=True)) == 4


def test_load_url_reads_a_downloaded_file(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "there.pth")
    state = load_url("http://127.0.0.1:9/there.pth", model_dir=str(tmp_path), map_location="cpu")
    assert state["weight"].tolist() == [1, 1]


def test_weights_init_and_pixel_acc():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).apply(ModelBuilder.weights_init)
    torch.testing.assert_close(net[1].bias.data, torch.full((8,), 1e-4))
    module = SegmentationModule(net, net, None)
    assert module.pixel_acc(torch.eye(3).view(1, 3, 3, 1), torch.tensor([[[0], [1], [0]]])).item() > 0.6


def test_utilities():
    meter = AverageMeter()
    meter.add(1.0)
    meter.add(4.0, 2)
    assert (meter.average(), meter.value()) == (3, 4)
    assert list(process_range("gpu", ("0", "2"))) == ["gpu0", "gpu1", "gpu2"]
    results = unique(np.array([[3, 1], [3, 3]]), return_inverse=True, return_counts=True)
    assert [values.tolist() for values in results] == [[1, 3], [1, 0, 1, 1], [1, 3]]


def test_base_dataset_can_be_subclassed():
    class Own(BaseDataset):
        def __getitem__(self, index):
            assert self.list_sample[index]["fpath_img"].endswith("jpg")
            image = Image.new("RGB", (self.imgMaxSize, self.imgSizes[0]), "red")
            return self.img_transform(image), self.segm_transform(Image.new("L", image.size, 1))

    options = SimpleNamespace(imgSizes=(30, 40), imgMaxSize=50, padding_constant=8)
    data = Own([{"fpath_img": f"{i}.jpg"} for i in range(5)], options, max_sample=4)
    image, label = data[0]
    assert data.num_sample == 4
    assert torch.equal(image, img_transform(np.array(Image.new("RGB", (50, 30), "red"))))
    assert torch.equal(label, torch.zeros(30, 50, dtype=torch.int64))
    assert data.round2nearest_multiple(33, data.padding_constant) == round2nearest_multiple(33, 8) == 40


@pytest.mark.parametrize("scale", [8, 16])
def test_dilated_network_equals_one_built_dilated(scale):
    x = torch.randn(1, 3, 80, 64, dtype=torch.float64)
    for build, wrap in ((resnet.resnet50, models.ResnetDilated), (mobilenet.mobilenetv2, models.MobileNetV2Dilated)):
        plain, dilated = build().double().eval(), build(output_stride=scale).double().eval()
        dilated.load_state_dict(plain.state_dict())
        with torch.no_grad():
            own, expected = (net(x, return_feature_maps=True) for net in (wrap(plain, scale), dilated))
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["hrnetv2", "mobilenetv2dilated", "resnet18dilated"])
def test_encoders_can_be_traced_symbolically(name, training):
    encoder = ModelBuilder.build_encoder(name, pretrained=False, output_stride=8).train(training)
    traced = torch.fx.symbolic_trace(encoder, concrete_args={"return_feature_maps": True})
    for size in ((32, 64), (64, 32)):
        with torch.no_grad():
            x = torch.randn(2, 3, *size)
            pairs = zip(traced(x, True), encoder(x, return_feature_maps=True), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_can_be_traced_symbolically(name):
    class Resized(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = ModelBuilder.build_decoder(name, num_class=5, in_channels=(8, 16, 32, 64))

        def forward(self, features):
            return self.decoder(features, segSize=(64, 48))

    module = Resized().eval()
    traced, generator = torch.fx.symbolic_trace(module), torch.Generator().manual_seed(0)
    shapes = zip((8, 16, 32, 64), (32, 16, 8, 8), (24, 12, 6, 6), strict=True)
    features = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    torch.testing.assert_close(traced(features), module(features))


def test_c1_can_be_scripted(tmp_path):
    decoder = ModelBuilder.build_decoder("c1", fc_dim=32, num_class=5).eval()
    scripted = torch.jit.script(decoder)
    features = [torch.randn(1, 16, 12, 10), torch.randn(1, 32, 6, 5)]
    scripted.save(tmp_path / "decoder.pt")
    with torch.no_grad():
        for size in (None, (48, 40)):
            for network in (scripted, torch.jit.load(tmp_path / "decoder.pt")):
                torch.testing.assert_close(network(features, size), decoder(features, segSize=size))


def test_third_party_script(tmp_path):
    torch.save(ModelBuilder.build_encoder("resnet18dilated", pretrained=False).state_dict(), tmp_path / "encoder.pth")
    decoder = ModelBuilder.build_decoder("ppm_deepsup", fc_dim=512, num_class=150)
    torch.save(decoder.state_dict(), tmp_path / "decoder.pth")
    (tmp_path / "photos").mkdir()
    for name, size in (("a.jpg", (50, 40)), ("b.JPG", (40, 60))):
        Image.new("RGB", size, "green").save(tmp_path / "photos" / name, format="JPEG")
    (tmp_path / "script.py").write_text(THIRD_PARTY)
    done = script(str(tmp_path / "script.py"), ROOT, "photos", cwd=tmp_path)
    assert done.stdout.splitlines() == ["a.jpg (40, 50, 3) True 4 150", "b.JPG (60, 40, 3) True 4 150"]


def test_training_interface_of_the_original():
    encoder = ModelBuilder.build_encoder(arch="resnet18dilated", fc_dim=512, pretrained=False)
    decoder = ModelBuilder.build_decoder(arch="c1_deepsup", fc_dim=512, num_class=4)
    module = SegmentationModule(encoder, decoder, nn.NLLLoss(ignore_index=-1), 0.4)
    dp = UserScatteredDataParallel(module, device_ids=[0] if torch.cuda.is_available() else None)
    patch_replication_callback(dp)
    loss, acc = dp([{"img_data": torch.randn(2, 3, 40, 40), "seg_label": torch.randint(-1, 4, (2, 5, 5))}])
    loss.mean().backward()
    assert 0 <= acc.item() <= 1
    assert decoder.cbr[0].weight.grad is not None


def test_logger_writes_a_file(tmp_path):
    setup_logger(distributed_rank=0, filename=str(tmp_path / "log.txt")).info("one line")
    assert (tmp_path / "log.txt").read_text().endswith("one line\n")
    setup_logger(filename=None)


def test_as_numpy_and_copies_keep_the_structure():
    nested = {"a": torch.ones(2, requires_grad=True), "b": [torch.zeros(1), 3], "c": (torch.ones(1), "text")}
    assert as_numpy(nested)["a"].tolist() == [1, 1]
    assert as_numpy(nested)["b"][1] == 3
    assert repr(async_copy_to(nested, "cpu")) == repr(nested)
    assert not mark_volatile(nested)["a"].requires_grad


def test_wrong_inputs_of_data_parallel_are_rejected():
    module = UserScatteredDataParallel(nn.Identity())
    for wrong in (torch.ones(1), [], [{"a": 1}] * 99):
        with pytest.raises(ValueError, match="one list with 1 to"):
            module(wrong)
    with pytest.raises(TypeError, match=r"nn\.DataParallel"):
        patch_replication_callback(nn.Identity())
