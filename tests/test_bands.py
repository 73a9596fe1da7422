"""Images with 1, 4 or 13 channels, in 16 bits or floating point (DATASET.channels, mean, std)."""

import json

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from runs import here, small
from scenes import options
from test_raster import write_tiff
from torch import nn

from mit_semseg import Segmenter
from mit_semseg.build import build_module
from mit_semseg.config import load_config
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.bands import Bands
from mit_semseg.dataset.image_io import ImageFileError
from mit_semseg.engine import RunFolder
from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import set_input_channels

KINDS = {1: np.uint16, 4: np.uint8, 13: np.float32}
SCALE = {1: 10_000, 4: 200, 13: 1.0}


def write_band_data(folder, channels):
    """Write train/ and val/ with four and three TIFF images whose channels depend on the class of a pixel."""
    rng = np.random.default_rng(channels)
    means = rng.uniform(0.2, 0.8, (4, channels))
    for name, count in (("train", 4), ("val", 3)):
        for kind in ("images", "annotations"):
            (folder / name / kind).mkdir(parents=True)
        for i in range(count):
            label = rng.integers(0, 4, (6, 8)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
            pixels = (means[label] + rng.normal(0, 0.05, (*label.shape, channels))).clip(0) * SCALE[channels]
            write_tiff(folder / name / "images" / f"{i}.tif", pixels.astype(KINDS[channels]), tiled=False, geo=False)
            Image.fromarray(label).save(folder / name / "annotations" / f"{i}.png")
    return folder


def band_options(channels, **changes):
    mean, std = (0.5 * SCALE[channels],) * channels, (0.25 * SCALE[channels],) * channels
    return {"DATASET.channels": channels, "DATASET.mean": list(mean), "DATASET.std": list(std), **changes}


@pytest.fixture(params=KINDS, ids=lambda channels: f"{channels} channels")
def trained(request, tmp_path):
    """Train a network; return the number of channels, the data folder, and the options of the run."""
    channels, root = request.param, write_band_data(tmp_path / "data", request.param)
    run = small(root, tmp_path / "run", TRAIN__num_epoch=1, TRAIN__eval_epoch=1) | band_options(channels)
    run |= {"VAL.checkpoint": "epoch_1.pth", "TEST.checkpoint": "epoch_1.pth", "TEST.result": tmp_path / "out"}
    here("train.py", run)
    return channels, root, run


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_every_command_works(trained, tmp_path):
    channels, root, run = trained
    weight = next(
        x for x in torch.load(f"{run['DIR']}/encoder_epoch_1.pth", weights_only=True).values() if x.dim() == 4
    )
    assert weight.shape[1] == channels
    here("eval.py", {**run, "VAL.visualize": True})
    assert json.loads((tmp_path / "run/result/results.json").read_text())["images"] == 3
    here("test.py", "--imgs", root / "val/images", "--index", "--overlay", run)
    index = np.asarray(Image.open(tmp_path / "out/1_index.png"))
    settings = {key: value for key, value in run.items() if "." in key or key == "DIR"}
    doctor = here("mit_semseg.dataset.doctor", "--cfg", "config/quickstart.yaml", {**settings, "DATASET.classes": ""})
    assert "all files can be used" in doctor.stdout
    words = [word for pair in settings.items() for word in pair]
    here(
        "mit_semseg.export",
        "--cfg",
        "config/quickstart.yaml",
        "--format",
        "safetensors",
        "--out",
        tmp_path / "n.safetensors",
        *words,
        "DATASET.classes",
        "",
    )
    net = Segmenter.from_file(tmp_path / "n.safetensors", device="cpu")
    result = net(root / "val/images/1.tif")
    assert np.array_equal(result.label_map, index)
    with rasterio.open(root / "val/images/1.tif") as image:
        pixels = np.moveaxis(image.read(), 0, -1)
    again = net(pixels)
    assert np.array_equal(again.label_map, index)
    classes, probabilities = again.probabilities(1)
    assert np.array_equal(classes[0], index)
    assert np.array_equal(probabilities[0], again.confidence)


@pytest.mark.long
@pytest.mark.parametrize("channels", KINDS)
def test_network_is_exported(tmp_path, channels):
    root = write_band_data(tmp_path / "data", channels)
    run = small(root, tmp_path / "run", TRAIN__num_epoch=1) | band_options(channels) | {"DATASET.classes": ""}
    here("train.py", run)
    words = [word for key, value in run.items() if "." in key or key == "DIR" for word in (key, value)]
    out = tmp_path / "n.onnx"
    here("mit_semseg.export", "--cfg", "config/quickstart.yaml", "--out", out, *words, "TEST.checkpoint", "epoch_1.pth")
    import onnxruntime

    shape = onnxruntime.InferenceSession(str(out)).get_inputs()[0].shape
    assert shape[1] == channels


def test_normalization_and_resizing_equal_a_direct_computation(tmp_path):
    root = write_band_data(tmp_path, 4)
    opt = options(imgSizes=(60,), mean=(1.0, 2, 3, 4), std=(10.0, 20, 30, 40))
    item = ValDataset(root, "val", opt)[0]
    with rasterio.open(root / "val/images/0.tif") as image:
        pixels = image.read().astype(np.float64)
    expected = (pixels - np.reshape([1, 2, 3, 4], (4, 1, 1))) / np.reshape([10, 20, 30, 40], (4, 1, 1))
    assert item["img_data"][0].shape == (1, 4, 64, 80)  # rounded up to multiples of 8
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(expected)[None], (64, 80), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(item["img_data"][0].double(), resized, atol=1e-4, rtol=1e-4)


def test_training_batches_are_flipped_and_cropped_like_their_labels(tmp_path):
    root = write_band_data(tmp_path, 13)
    opt = options(mean=(0.5,) * 13, std=(0.25,) * 13, crop_size=(32, 40), random_scale=(0.8, 1.2))
    opt.segm_downsampling_rate = 1
    dataset = TrainDataset(root, "train", opt, 4)
    batch = dataset.as_uint8()[0]
    assert batch["img_data"].shape == (4, 13, 32, 40)
    assert "normalization" not in batch
    images, labels = batch["img_data"].permute(0, 2, 3, 1), batch["seg_label"]
    means = torch.stack([images[labels == i].mean(0) for i in range(3)])
    distance = (images[..., None, :] - means).norm(dim=-1)
    accuracy = (distance.argmin(-1) == labels)[labels >= 0].float().mean()
    assert accuracy > 0.9  # misplaced labels would have an accuracy of about 1 / 3


def test_missing_values_become_the_mean():
    image = Bands((1.0,), (2.0,)).from_array(np.array([[np.nan, 5.0]], np.float32), "a")
    assert image.to_tensor().tolist() == [[[0.0, 2.0]]]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("name", ["mobilenetv2dilated", "resnet18", "hrnetv2", "vgg16_dilated8", "efficientnet_lite0"])
def test_first_convolution_of_inflated_encoders(name, channels):
    encoder = ModelBuilder.build_encoder(name, pretrained=False)
    rgb = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d)).weight.clone()
    assert set_input_channels(encoder, channels) is encoder
    conv = next(m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    gray = torch.rand(1, 1, 16, 16)
    outputs = [nn.functional.conv2d(gray.expand(-1, w.shape[1], -1, -1), w) for w in (conv.weight, rgb)]
    if channels in (1, 3):  # otherwise, R, G and B do not occur equally often
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    expected = rgb.sum(1, keepdim=True) if channels == 1 else rgb[:, [i % 3 for i in range(channels)]] * 3 / channels
    torch.testing.assert_close(conv.weight, expected)
    assert encoder(torch.rand(1, channels, 64, 64))[-1].isfinite().all()


def test_pixels_without_data_become_the_mean(tmp_path):
    pixels = np.full((40, 48, 2), 7.0, np.float32)
    pixels[:10] = -9999
    write_tiff(tmp_path / "a.tif", pixels, tiled=False, geo=False, nodata=-9999)
    tensor = Bands((5.0, 5.0), (2.0, 2.0)).read(tmp_path / "a.tif").to_tensor()
    assert tensor[:, :10].eq(0).all()
    assert tensor[:, 10:].eq(1).all()


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "timm:test_convnext", "timm:test_vit"])
def test_networks_of_timm_are_saved_and_loaded(tmp_path, name):
    opts = ["MODEL.arch_encoder", name, "MODEL.arch_decoder", "c1", "MODEL.pretrained", False, "DATASET.num_class", 3]
    opts += ["DIR", str(tmp_path), "DATASET.padding_constant", 16, "DATASET.segm_downsampling_rate", 16]
    opts += [word for pair in band_options(4).items() for word in pair]
    module = build_module(load_config(None, opts), torch.device("cpu"))
    RunFolder(tmp_path).save_weights(module, "epoch_1.pth")
    segmenter = Segmenter.from_cfg(load_config(None, opts), "epoch_1.pth", torch.device("cpu"))
    segmenter.save(tmp_path / "a.safetensors")
    image = np.random.default_rng(0).integers(0, 200, (48, 64, 4), np.uint8)
    again = Segmenter.from_file(tmp_path / "a.safetensors", device="cpu")
    assert np.array_equal(segmenter(image).label_map, again(image).label_map)


def test_wrong_numbers_of_channels_and_options_are_errors(tmp_path):
    root = write_band_data(tmp_path, 4)
    with pytest.raises(ImageFileError, match=r"0\.tif.*DATASET\.channels"):
        ValDataset(root, "val", options(mean=(1.0,) * 5, std=(1.0,) * 5))[0]
    for changes, name in (
        ({"DATASET.channels": 4}, "DATASET.mean"),
        ({"DATASET.channels": 4, "DATASET.mean": "[1,2,3,4]"}, "DATASET.std"),
        (band_options(4, **{"DATASET.color_jitter": 0.1}), "DATASET.color_jitter"),
        (band_options(4, **{"DATASET.normalization": "caffe"}), "DATASET.normalization"),
    ):
        assert name in here("train.py", {**small(root, tmp_path / "run"), **changes}, code=2).stderr


def test_resumed_run_and_initial_weights(tmp_path):
    """RGB weights initialize a network with four channels; its own weights are loaded unchanged."""
    root = write_band_data(tmp_path / "data", 4)
    rgb = ModelBuilder.build_encoder("mobilenetv2dilated", pretrained=False)
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    run = small(root, tmp_path / "run", TRAIN__num_epoch=1, MODEL__weights_encoder=tmp_path / "rgb.pth") | band_options(
        4
    )
    run |= {"TRAIN.lr_encoder": 1e-9, "TRAIN.lr_decoder": 0.01}
    here("train.py", run)
    first = next(iter(torch.load(tmp_path / "run/encoder_epoch_1.pth", weights_only=True).values()))
    weight = next(iter(rgb.state_dict().values()))
    torch.testing.assert_close(first, weight[:, [0, 1, 2, 0]] * 0.75, rtol=1e-3, atol=1e-5)
    again = {**run, "DIR": tmp_path / "again", "MODEL.weights_encoder": tmp_path / "run/encoder_epoch_1.pth"}
    here("train.py", again)
    second = next(iter(torch.load(tmp_path / "again/encoder_epoch_1.pth", weights_only=True).values()))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)
    here("train.py", {**run, "TRAIN.resume": "auto", "TRAIN.num_epoch": 2})
