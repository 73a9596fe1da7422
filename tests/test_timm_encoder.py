"""Networks of timm as encoders. timm's networks `test_*` are small."""

import copy
import sys

import pytest
import timm
import torch
from hub import hub, program  # noqa: F401
from near import assert_near
from ranks import on_ranks
from safetensors.torch import save, save_file
from test_activation_checkpoint import step
from test_fuse_bn import randomize_norms
from test_models import NUM_CLASS, network
from test_sync_bn import assert_equal_training
from timm.layers import BatchNormAct2d
from torch import nn
from training import check_layer_wise_learning_rates

from mit_semseg import build
from mit_semseg.cli.export import ExportError, export
from mit_semseg.config import load_config
from mit_semseg.engine import MaskedNLLLoss, RunFolder, Trainer, World
from mit_semseg.engine.distributed import parallelize
from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, enable_activation_checkpointing, to_batchnorm
from mit_semseg.lib.utils import UserError
from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.encoders.timm_encoder import SynchronizedBatchNormAct2d
from mit_semseg.models.fuse_bn import fuse_batchnorm
from mit_semseg.models.layers import NORMS
from mit_semseg.models.weight_files import WeightsError

ONE_SIZE = ("test_coatnet", "test_maxvit", "test_vit_relpos")  # not supported
ALL = [
    *(name for name in timm.list_models("test_*") if name not in ONE_SIZE),
    *("convnext_tiny", "swin_tiny_patch4_window7_224", "mobilenetv4_conv_small", "resnet18d", "regnety_004"),
]
SMALL = ("test_efficientnet", "test_vit")  # the others run with -m long
PLAIN_OR_LONG = [pytest.param(name, marks=[pytest.mark.long] * (name not in SMALL)) for name in ALL]
CPU = torch.device("cpu")


def make(name, **options):
    torch.manual_seed(0)
    return ModelBuilder.build_encoder(f"timm:{name}", pretrained=False, **options)


def image(encoder, *sides):
    """Return a random image whose sides are odd multiples of the encoder's divisor."""
    divisor = encoder.size_divisor
    return torch.randn(1, 3, *(divisor * (side // divisor | 1) for side in sides))


@pytest.mark.parametrize("name", PLAIN_OR_LONG)
def test_every_decoder_trains_and_infers(name):
    encoder = make(name)
    for decoder in DECODERS:
        module = network(encoder, decoder).train()
        loss, _ = module({"img_data": image(encoder, 33, 49), "seg_label": torch.randint(-1, NUM_CLASS, (1, 5, 5))})
        loss.backward()
        assert torch.isfinite(loss)
        # DistributedDataParallel needs a gradient for every parameter.
        assert [key for key, p in module.named_parameters() if p.grad is None] == [], decoder
        module.zero_grad()
        with torch.no_grad():
            scores = module.eval()({"img_data": image(encoder, 57, 41)}, segSize=(57, 41))
        assert scores.shape == (1, NUM_CLASS, 57, 41)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_efficientnet"])
def test_maps_are_those_of_timm_with_its_own_normalization(name):
    encoder, pixels = make(name).eval(), torch.rand(2, 3, 64, 96)

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    config = encoder.network.pretrained_cfg
    with torch.no_grad():
        maps = encoder(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), return_feature_maps=True)
        expected = encoder.network(normalized(config["mean"], config["std"]))[-4:]
    for ours, theirs in zip(maps, expected, strict=True):
        assert_near(ours, theirs.permute(0, 3, 1, 2) if name == "test_mambaout" else theirs)
    assert encoder.out_channels == tuple(x.shape[1] for x in maps)
    assert encoder.output_stride == 64 // maps[-1].shape[2]


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_output_stride(name, stride):
    encoder = make(name, output_stride=stride).eval()
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 64, 96))[0].shape[2:] == (64 // stride, 96 // stride)
    assert encoder.output_stride == stride


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnext_tinny", {}, "timm:convnext_tinny.*convnext_tiny"),
        ("convnext_tiny.in99k", {}, "convnext_tiny.in99k.*in12k_ft_in1k"),
        ("test_maxvit", {}, "timm:test_maxvit"),
        ("test_vit", {"output_stride": 8}, "MODEL.output_stride 8.*16"),
        ("test_mambaout", {"output_stride": 8}, "MODEL.output_stride 8.*32"),
        ("test_resnet", {"norm_layer": NORMS["inplace"]}, "MODEL.norm inplace"),
    ],
)
def test_unsupported_networks_and_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mit_semseg.models.encoders.timm_encoder")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm.*\[timm\]"):
        make("test_resnet")


def test_image_sizes_are_checked():
    opts = ["MODEL.arch_encoder", "timm:test_vit3", "MODEL.arch_decoder", "c1", "MODEL.pretrained", "False"]
    for key, wrong in (("DATASET.padding_constant", "8"), ("INFERENCE.window_size", "40"), ("DATASET.crop_size", "40")):
        good = ["DATASET.padding_constant", "16"]
        with pytest.raises(UserError, match=rf"{key} {wrong}.*timm:test_vit3.*16"):
            build.build_module(load_config(None, [*opts, *good, key, wrong]), CPU)
    build.build_module(load_config(None, [*opts, *good]), CPU)


# Batch norms


def test_norm_with_activation_equals_the_whole_batch():
    """Replicas have the outputs and gradients of timm's layer for the whole batch."""
    plain = BatchNormAct2d(3, act_layer=nn.SiLU).double()
    synchronized = copy.deepcopy(plain)
    synchronized.__class__, synchronized.clamp_variance = SynchronizedBatchNormAct2d, False
    assert_equal_training(synchronized, plain, [1, 2], (4, 5))


@pytest.mark.parametrize(("norm", "expected"), [("sync", True), ("batch", False)])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_norms_are_synchronized_if_asked(name, norm, expected):
    encoder = make(name, norm_layer=NORMS[norm])
    norms = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert {isinstance(layer, SynchronizedBatchNorm2d) for layer in norms} == {expected}
    kinds = [type(layer) for layer in norms]
    assert [type(layer) for layer in to_batchnorm(encoder).modules() if isinstance(layer, nn.BatchNorm2d)] == [
        {SynchronizedBatchNorm2d: nn.BatchNorm2d, SynchronizedBatchNormAct2d: BatchNormAct2d}.get(kind, kind)
        for kind in kinds
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("mobilenetv4_conv_small", "test_resnet", "resnet18d", "test_efficientnet", "regnety_002", "test_byobnet"),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("densenet121", "vgg11_bn", "hrnet_w18_small", "xception41", "repvit_m0_9", "test_nfnet")
        ),
    ],
)
def test_fusion_does_not_change_outputs(name):
    encoder = randomize_norms(make(name)).float()
    fused, x = fuse_batchnorm(encoder), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for actual, expected in zip(fused(x, True), encoder(x, True), strict=True):
            assert_near(actual, expected)


# Weights


@pytest.mark.parametrize("name", ["test_resnet", "test_vit3"])
def test_file_of_timm_is_loaded(name, tmp_path):
    """The classifier in the file is ignored."""
    torch.manual_seed(5)
    source = timm.create_model(name)
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    encoder, expected = make(name, weights=str(tmp_path / "timm.safetensors")), source.state_dict()
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(value, expected[key.removeprefix("model.")]), key
    torch.save(encoder.state_dict(), tmp_path / "own.pth")
    again = make(name, weights=str(tmp_path / "own.pth"))
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("name", "other"), [("test_resnet", "test_convnext"), ("test_resnet", "resnet18"), ("resnet18", "resnet34")]
)
def test_file_of_another_network_is_refused(name, other, tmp_path):
    """ResNet-34 has all layers of ResNet-18."""
    torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=rf"other\.pth.*timm:{name}"):
        make(name, weights=str(tmp_path / "other.pth"))


def test_normalization_is_part_of_the_weights(tmp_path):
    encoder = make("test_vit3")
    encoder.mean = (0.1, 0.2, 0.3)
    torch.save(encoder.state_dict(), tmp_path / "own.pth")
    assert make("test_vit3", weights=str(tmp_path / "own.pth")).mean == (0.1, 0.2, 0.3)


def test_failed_download_names_the_options(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: 1 / 0)
    with pytest.raises(WeightsError, match=r"timm:test_resnet.*division.*MODEL\.weights_encoder.*MODEL\.pretrained"):
        ModelBuilder.build_encoder("timm:test_resnet")


@pytest.mark.long
def test_pretrained_weights_come_from_the_hub(hub, tmp_path):  # noqa: F811
    address, files = hub
    torch.manual_seed(5)
    source = timm.create_model("test_resnet").state_dict()
    files["model.safetensors"] = save(source)
    code = """
import logging
from mit_semseg.models import ModelBuilder
logging.basicConfig(level=logging.INFO, format="%(message)s")
encoder = ModelBuilder.build_encoder("timm:test_resnet")
print(encoder.network.layer4[0].conv1.weight.sum().item())
"""
    done = program(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(source["layer4.0.conv1.weight"].sum().item())
    assert "encoder timm:test_resnet: weights test_resnet.r160_in1k of timm" in done.stderr


# Training and export


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext", "test_vit3", "test_mambaout"])
def test_activation_checkpointing_keeps_less_memory_for_the_same_step(name):
    encoder = make(name)
    module = network(encoder, "c1").train()
    batch = {"img_data": torch.randn(2, 3, 64, 64), "seg_label": torch.randint(-1, NUM_CLASS, (2, 8, 8))}
    checkpointed = copy.deepcopy(module)
    assert enable_activation_checkpointing(checkpointed.encoder) > 2
    (loss, bytes_kept, expected), (other_loss, fewer_bytes, tensors) = step(module, batch), step(checkpointed, batch)
    assert torch.equal(other_loss, loss)
    assert [key for key, value in expected.items() if not torch.equal(tensors[key], value)] == []
    assert fewer_bytes < 0.9 * bytes_kept


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet", "resnet18d"])
def test_layer_wise_learning_rates_decrease_toward_the_image(name):
    check_layer_wise_learning_rates(ModelBuilder.build_encoder(f"timm:{name}", pretrained=False))


def test_frozen_encoder_and_fixed_norms(tmp_path):
    opts = ["MODEL.arch_encoder", "timm:test_efficientnet", "MODEL.arch_decoder", "c1", "MODEL.pretrained", "False"]
    for option, value in (("TRAIN.lr_encoder", "0"), ("TRAIN.fix_bn", "True")):
        cfg = load_config(None, [*opts, option, value])
        module = build.build_module(cfg, CPU)
        optimizer, training = build.build_training(cfg, module, 1, 1)
        Trainer(module, optimizer, RunFolder(tmp_path), training).prepare_model()
        before = {key: value.clone() for key, value in module.encoder.state_dict().items()}
        batch = {"img_data": torch.randn(2, 3, 64, 64), "seg_label": torch.randint(0, 150, (2, 8, 8))}
        module(batch)[0].backward()
        optimizer.step()
        changed = {key for key, value in module.encoder.state_dict().items() if not torch.equal(before[key], value)}
        norms = {key for key in before if ".bn" in key or key == "_extra_state"}
        assert norms
        assert changed == (set() if option == "TRAIN.lr_encoder" else set(before) - norms)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("test_convnext", "onnx"), ("resnet18d", "onnx"), ("test_vit3", "onnx"), ("test_vit3", "torch_export")),
        *(
            ("mobilenetv4_conv_small", "onnx"),
            ("mobilenetv4_conv_small", "torch_export"),
            ("test_efficientnet", "onnx"),
        ),
        *(("test_efficientnet", "torch_export"), ("resnet18d", "torch_export")),
    ],
)
def test_export(name, kind, tmp_path):
    module = randomize_norms(network(make(name), "c1")).float()
    assert export(module, tmp_path / "file", kind=kind, metadata={}) < 1e-4


@pytest.mark.long
def test_file_that_does_not_support_small_images_is_refused(tmp_path):
    """The program of ConvNeXt supports images of at least 64x64 pixels only."""
    module = randomize_norms(network(make("test_convnext"), "c1")).float()
    with pytest.raises(ExportError, match=r"network\.pt2.*--format"):
        export(module, tmp_path / "network.pt2", kind="torch_export", metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_stem_with_parallel_convolutions(name):
    """All convolutions of the image get its channels, and stay in float32."""
    encoder = ModelBuilder.build_encoder(f"timm:{name}", pretrained=False, in_channels=5)
    decoder = ModelBuilder.build_decoder("c1", num_class=3, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, None)
    images = torch.randn(1, 5, 64, 64)
    outputs = []
    for precision in ("fp32", "bf16"):
        network = Predictor(module.eval(), "cpu", InferenceOptions(precision=precision)).network
        with torch.no_grad():
            outputs.append(network.logits({"img_data": images}).float())
    torch.testing.assert_close(outputs[1], outputs[0], atol=0.1 * outputs[0].abs().max().item(), rtol=0)


def test_network_without_stages_is_named():
    encoder = ModelBuilder.build_encoder("timm:poolformer_s12", pretrained=False)
    with pytest.raises(UserError, match=r"TRAIN\.lr_decay.*poolformer_s12"):
        encoder.stage_of("network.stem.conv.weight")


def train_hrnet(rank, world_size):
    torch.set_num_threads(1)
    encoder = ModelBuilder.build_encoder("timm:hrnet_w18_small", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=3, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss()).train()
    model = parallelize(module, World(rank, world_size, rank, world_size))
    feed = {"img_data": torch.randn(2, 3, 64, 64), "seg_label": torch.zeros(2, 2, 2, dtype=torch.long)}
    for _ in range(2):
        model(feed)[0].backward()
    return module.decoder.conv_last.weight.grad.abs().sum().item()


@pytest.mark.long
def test_unused_parameters_on_several_ranks(tmp_path):
    first, second = on_ranks(2, tmp_path, train_hrnet, 2)
    assert first == second > 0
