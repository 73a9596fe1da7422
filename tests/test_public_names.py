"""The names that other people's code imports, used the way they use them."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT
from torch import nn

import mit_semseg.utils
from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    DictGatherDataParallel,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    UserScatteredDataParallel,
    async_copy_to,
    patch_replication_callback,
    user_scattered_collate,
)
from mit_semseg.lib.utils import as_numpy

# A script as it stands in notebooks and blog posts: own pictures through a trained pair.
THIRD_PARTY = """
import csv, os, sys
import numpy as np, torch, scipy.io
from torch import nn
from mit_semseg.config import cfg
from mit_semseg.dataset import TestDataset, ValDataset, TrainDataset, imresize
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.utils import AverageMeter, colorEncode, accuracy, intersectionAndUnion, parse_devices
from mit_semseg.utils import setup_logger, find_recursive
from mit_semseg.lib.nn import user_scattered_collate, async_copy_to
from mit_semseg.lib.utils import as_numpy

colors = scipy.io.loadmat(os.path.join(sys.argv[1], "data/color150.mat"))["colors"]
names = {}
with open(os.path.join(sys.argv[1], "data/object150_info.csv")) as f:
    reader = csv.reader(f)
    next(reader)
    for row in reader:
        names[int(row[0])] = row[5].split(";")[0]

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
    print(batch_data["info"].split("/")[-1], picture.shape, names[int(pred[0, 0]) + 1] != "")
    features = net_encoder(img, return_feature_maps=True)
    print(len(features), net_decoder.cbr_deepsup is not None, tuple(net_decoder.conv_last[-1].weight.shape))
"""


def test_third_party_script(tmp_path):
    from mit_semseg.models import ModelBuilder

    torch.save(ModelBuilder.build_encoder("resnet18dilated", pretrained=False).state_dict(), tmp_path / "encoder.pth")
    decoder = ModelBuilder.build_decoder("ppm_deepsup", fc_dim=512, num_class=150)
    torch.save(decoder.state_dict(), tmp_path / "decoder.pth")
    (tmp_path / "photos").mkdir()
    for name, size in (("a.jpg", (50, 40)), ("b.JPG", (40, 60))):
        Image.new("RGB", size, "green").save(tmp_path / "photos" / name, format="JPEG")
    (tmp_path / "script.py").write_text(textwrap.dedent(THIRD_PARTY))
    command = [sys.executable, "script.py", str(ROOT), "photos"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a.jpg (40, 50, 3) True",
        "4 True (150, 512, 1, 1)",
        "b.JPG (60, 40, 3) True",
        "4 True (150, 512, 1, 1)",
    ]


def test_training_interface_of_the_original():
    from mit_semseg.models import ModelBuilder, SegmentationModule

    encoder = ModelBuilder.build_encoder(arch="resnet18dilated", fc_dim=512, pretrained=False)
    decoder = ModelBuilder.build_decoder(arch="c1_deepsup", fc_dim=512, num_class=4)
    module = SegmentationModule(encoder, decoder, nn.NLLLoss(ignore_index=-1), 0.4)
    dp = UserScatteredDataParallel(module, device_ids=[0] if torch.cuda.is_available() else None)
    patch_replication_callback(dp)
    loss, acc = dp([{"img_data": torch.randn(2, 3, 40, 40), "seg_label": torch.randint(-1, 4, (2, 5, 5))}])
    loss.mean().backward()
    assert 0 <= acc.item() <= 1
    assert decoder.cbr[0].weight.grad is not None


def test_old_utilities(tmp_path):
    for name in mit_semseg.utils.__all__:
        assert getattr(mit_semseg.utils, name)
    logger = mit_semseg.utils.setup_logger(distributed_rank=0, filename=str(tmp_path / "log.txt"))
    logger.info("one line")
    assert (tmp_path / "log.txt").read_text().endswith("one line\n")
    mit_semseg.utils.setup_logger(filename=None)
    (tmp_path / "a.JPG").write_bytes(b"")
    assert mit_semseg.utils.find_recursive(str(tmp_path)) == [str(tmp_path / "a.JPG")]


def test_as_numpy_and_copies_keep_the_structure():
    nested = {"a": torch.ones(2, requires_grad=True), "b": [torch.zeros(1), 3], "c": (torch.ones(1), "text")}
    plain = as_numpy({key: nested[key] for key in "ab"})
    assert isinstance(plain["a"], np.ndarray)
    assert plain["b"][1] == 3
    copy = async_copy_to(nested, "cpu")
    assert copy["c"][1] == "text"
    assert isinstance(copy["c"], tuple)
    assert user_scattered_collate([1, 2]) == [1, 2]


def test_data_parallel_says_what_it_takes():
    module = UserScatteredDataParallel(nn.Identity())
    for wrong in (torch.ones(1), [], [{"a": 1}] * 99):
        with pytest.raises(ValueError, match="one list with 1 to"):
            module(wrong)
    with pytest.raises(TypeError, match=r"nn\.DataParallel"):
        patch_replication_callback(nn.Identity())
    assert issubclass(UserScatteredDataParallel, DictGatherDataParallel)
    assert issubclass(DictGatherDataParallel, DataParallelWithCallback)
    gathered = DictGatherDataParallel(nn.Identity())({"x": torch.ones(2)})
    assert torch.equal(gathered["x"], torch.ones(2))


@pytest.mark.parametrize("kind", [SynchronizedBatchNorm1d, SynchronizedBatchNorm2d, SynchronizedBatchNorm3d])
def test_state_dict_is_batch_norms(kind):
    plain = getattr(nn, kind.__name__.removeprefix("Synchronized"))(4)
    assert list(kind(4).state_dict()) == list(plain.state_dict())
    with pytest.raises(ValueError, match="expected"):
        kind(4)(torch.ones(1))
