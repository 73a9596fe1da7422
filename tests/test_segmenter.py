"""Inputs, results, devices and published networks of `Segmenter`."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here

from mit_semseg import Segmenter
from mit_semseg.cli.devices import auto_device
from mit_semseg.config import load_config
from mit_semseg.dataset import class_table
from mit_semseg.dataset.image_io import ImageFileError
from mit_semseg.lib.utils import UserError
from mit_semseg.models import ModelBuilder
from mit_semseg.models.pretrained import published_options
from mit_semseg.predict.images import UnsupportedImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
NAMES = ("tree", "road", "sky")
PUBLISHED_NAME = "ade20k-resnet18dilated-c1_deepsup"


def write_weights(folder, encoder, decoder, suffix, num_class, seed=0):
    torch.manual_seed(seed)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=num_class, in_channels=enc.out_channels)
    folder.mkdir(parents=True, exist_ok=True)
    for part, module in (("encoder", enc), ("decoder", dec)):
        torch.save(module.state_dict(), folder / f"{part}_{suffix}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    write_weights(folder / "run", "resnet18dilated", "c1", "epoch_1.pth", 3)
    (folder / "own.yaml").write_text(
        f"DIR: {folder}/run\n"
        "DATASET: {num_class: 3, classes: [tree, road, sky], imgSizes: [40, 56]}\n"
        "MODEL: {arch_encoder: resnet18dilated, arch_decoder: c1}\n"
        "TEST: {checkpoint: epoch_1.pth}\n"
    )
    Image.fromarray(PIXELS).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def segmenter(folder):
    return Segmenter.from_config(folder / "own.yaml", device="cpu")


def test_all_input_types_give_the_same_result(segmenter, folder):
    path = folder / "image.png"
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    inputs = [path, str(path), path.read_bytes(), Image.open(path), PIXELS, tensor, tensor.double() / 255]
    results = segmenter(inputs)
    assert results[0].label_map.shape == (45, 60)
    assert results[0].label_map.dtype == np.int64
    assert len(np.unique(results[0].label_map)) > 1
    for result in results:
        assert np.array_equal(result.image, PIXELS)
        assert np.array_equal(result.label_map, results[0].label_map)
    assert [result.path for result in results[:3]] == [str(path), str(path), "image_2"]
    assert np.array_equal(segmenter(PIXELS[..., 0]).image, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_orientation_and_transparency_are_applied_to_bytes_and_pil_images(segmenter):
    image, data = Image.fromarray(PIXELS), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(data, "PNG", exif=exif)
    assert segmenter(data.getvalue()).image.shape == (60, 45, 3)
    assert segmenter(Image.open(data)).image.shape == (60, 45, 3)
    assert (segmenter(Image.new("RGBA", (40, 40), (9, 9, 9, 0))).image == 255).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jpg", r"missing\.jpg"),
        ("https://example.org/a.jpg", "https://example.org"),
        (b"not an image", r"12 bytes"),
        (PIXELS.astype(np.float32), "float32"),
        (PIXELS[..., :2], r"\(45, 60, 2\)"),
        (PIXELS[:0], r"\(0, 60, 3\)"),
        (torch.zeros(45, 60, 3), r"\(45, 60, 3\)"),
        (torch.full((3, 8, 8), 2.0), r"2\.\.2"),
        (None, "NoneType"),
    ],
)
def test_unsupported_input_is_an_error(segmenter, source, message):
    with pytest.raises((UnsupportedImageError, ImageFileError), match=message):
        segmenter(source)


def test_segmenter_and_test_py_give_the_same_result(segmenter, folder):
    options = {
        "--imgs": folder / "image.png",
        "--cfg": folder / "own.yaml",
        "--gpu": "cpu",
        "TEST.result": folder / "out",
    }
    here("test.py", "--index", "--json", options)
    result = segmenter(folder / "image.png")
    assert np.array_equal(np.asarray(Image.open(folder / "out" / "image_index.png")), result.label_map)
    assert json.loads((folder / "out" / "image.json").read_text()) == result.as_dict()


def test_result_has_classes_overlay_panel_and_files(segmenter, tmp_path):
    result = segmenter(PIXELS)
    assert {entry["index"]: entry["class"] for entry in result.classes}.items() <= dict(enumerate(NAMES)).items()
    assert np.array_equal(np.asarray(result.overlay(0, legend=False)), PIXELS)
    assert np.array_equal(np.asarray(result.overlay(1, legend=False)), segmenter.table.colors[result.label_map])
    assert result.overlay().width > 60
    assert result.panel().size == (60 + 6 + 60, 45)
    with pytest.raises(ValueError, match="alpha"):
        result.overlay(1.5)
    suffixes = [".png", "_overlay.png", "_index.png", ".json"]
    written = result.save(tmp_path / "new", suffixes)
    assert sorted(written) == sorted(tmp_path.glob("new/*")) == sorted(tmp_path / f"new/image{s}" for s in suffixes)


@pytest.mark.parametrize("suffixes", [["_labels.png"], [".jpg"], ".png"])
def test_unknown_suffixes_are_refused(segmenter, tmp_path, suffixes):
    with pytest.raises(ValueError, match=r"_label\.png"):
        segmenter(PIXELS).save(tmp_path, suffixes)
    assert not list(tmp_path.iterdir())


def test_saving_overwrites_only_results(segmenter, tmp_path):
    paths = [tmp_path / name / "1.png" for name in ("x", "y")]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (30, 20), "red").save(path)
    before = paths[0].read_bytes()
    result = segmenter(paths[0])
    with pytest.raises(UserError, match=r"1\.png"):
        result.save(tmp_path / "x")
    assert paths[0].read_bytes() == before
    assert result.save(tmp_path / "out") == result.save(tmp_path / "out") == [tmp_path / "out" / "1.png"]
    written = {path for result in segmenter(paths) for path in result.save(tmp_path / "out")}
    assert len(written) == 2
    assert all(path.is_file() for path in written)


@pytest.mark.parametrize("opts", [[], ["INFERENCE.window_size", "32", "INFERENCE.flip", "True"]])
def test_probabilities_are_those_of_the_label_map(folder, opts):
    segmenter = Segmenter.from_config(folder / "own.yaml", opts=opts, device="cpu")
    result = segmenter(PIXELS)
    classes, probabilities = result.probabilities(top=3)
    assert np.array_equal(classes[0], result.label_map)
    item = segmenter._preprocess(Image.fromarray(PIXELS))
    expected = segmenter._predictor.probabilities(item["img_data"], (45, 60)).numpy()
    np.testing.assert_allclose(np.take_along_axis(expected, classes, 0), probabilities, atol=1e-5)
    with pytest.raises(ValueError, match="top"):
        result.probabilities(4)
    assert len(result.probabilities()[0]) == 3


def test_concurrent_calls_give_the_same_results(segmenter):
    images = [np.roll(PIXELS, shift, axis=1) for shift in range(6)]
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(segmenter, images))
    for image, result in zip(images, results, strict=True):
        assert np.array_equal(result.label_map, segmenter(image).label_map)


def test_published_network_is_downloaded_once(site, monkeypatch):
    folder = site.folder / "model" / "pytorch" / PUBLISHED_NAME
    write_weights(folder, "resnet18dilated", "c1_deepsup", "epoch_20.pth", 150)
    small = ["DATASET.imgSizes", "40"]
    result = Segmenter.from_pretrained(PUBLISHED_NAME, device="cpu", opts=small)(PIXELS)
    assert result.table.names == class_table().names
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    cached = Segmenter.from_pretrained(PUBLISHED_NAME, device="cpu", opts=small)(PIXELS)
    assert np.array_equal(cached.label_map, result.label_map)
    with pytest.raises(UserError, match=r"'resnet'.*ade20k-"):
        Segmenter.from_pretrained("resnet")


@pytest.mark.parametrize("name", Segmenter.names())
def test_published_options_equal_the_recipe(name):
    recipe = load_config(f"config/{name.removesuffix('-c1') if 'hrnet' in name else name}.yaml")
    published = load_config(None, published_options(name))
    for section, keys in {
        "MODEL": ("arch_encoder", "arch_decoder"),
        "DATASET": ("padding_constant", "segm_downsampling_rate", "imgSizes", "imgMaxSize", "num_class"),
        "TEST": ("checkpoint",),
    }.items():
        assert [published[section][key] for key in keys] == [recipe[section][key] for key in keys]


def test_unknown_or_missing_device_is_named():
    for name in ("gpu", "cuda:7"):
        with pytest.raises(UserError, match=f"'{name}'.* cpu"):
            auto_device(name)
