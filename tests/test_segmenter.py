"""The few-line interface: every kind of picture, what a result can do, and what is said of anything else."""

import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here

import mit_semseg
from mit_semseg import Segmenter
from mit_semseg.cli.devices import auto_device, pick_devices
from mit_semseg.dataset import class_table
from mit_semseg.dataset.image_io import ImageFileError
from mit_semseg.evaluation import multi_scale_scores
from mit_semseg.lib.utils import UserError
from mit_semseg.models import ModelBuilder
from mit_semseg.predict.images import UnsupportedImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
NAMES = ("tree", "road", "sky")
NAME = "ade20k-resnet18dilated-c1_deepsup"


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
    Image.fromarray(PIXELS).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def segmenter(folder):
    return Segmenter.from_config(folder / "own.yaml", device="cpu")


def test_every_kind_of_picture_is_the_same_picture(segmenter, folder):
    path = folder / "picture.png"
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    kinds = [path, str(path), path.read_bytes(), Image.open(path), PIXELS, tensor, tensor.double() / 255]
    results = segmenter(kinds)
    assert results[0].label_map.shape == (45, 60)
    assert results[0].label_map.dtype == np.int64
    assert len(np.unique(results[0].label_map)) > 1
    for result in results:
        assert np.array_equal(result.image, PIXELS)
        assert np.array_equal(result.label_map, results[0].label_map)
    assert [result.path for result in results[:3]] == [str(path), str(path), "picture_2"]
    assert np.array_equal(segmenter(PIXELS[..., 0]).image, np.repeat(PIXELS[..., :1], 3, axis=2))


def test_it_is_what_test_py_writes(segmenter, folder):
    done = here("test.py", "--imgs", folder / "picture.png", "--cfg", folder / "own.yaml", "--index", "--json",
                "--gpu", "cpu", "TEST.result", folder / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = segmenter(folder / "picture.png")
    assert np.array_equal(np.asarray(Image.open(folder / "out" / "picture_index.png")), result.label_map)
    assert json.loads((folder / "out" / "picture.json").read_text()) == result.as_dict()


def test_what_a_result_can_do(segmenter, tmp_path):
    result = segmenter(PIXELS)
    assert {entry["index"]: entry["class"] for entry in result.classes}.items() <= dict(enumerate(NAMES)).items()
    shares = [entry["share"] for entry in result.classes]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert np.array_equal(np.asarray(result.overlay(0, legend=False)), PIXELS)
    colors = np.asarray(result.overlay(1, legend=False))
    assert np.array_equal(colors, segmenter.table.colors[result.label_map])
    assert result.overlay().width > 60
    assert result.panel().size == (60 + 6 + 60, 45)
    with pytest.raises(ValueError, match=r"alpha 1\.5: give the weight"):
        result.overlay(1.5)
    written = result.save(tmp_path / "new", [".png", "_overlay.png", "_index.png", ".json"])
    assert [p.name for p in written] == ["picture.png", "picture_overlay.png", "picture_index.png", "picture.json"]
    assert all(p.is_file() for p in written)


def test_a_result_takes_the_place_of_nothing_but_results(segmenter, folder, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20), "red").save(tmp_path / name / "1.png")
    before = (tmp_path / "x" / "1.png").read_bytes()
    results = segmenter([tmp_path / "x" / "1.png", tmp_path / "y" / "1.png"])
    with pytest.raises(UserError, match=r"would be written over .*1\.png, which is no result"):
        segmenter(tmp_path / "x" / "1.png").save(tmp_path / "x")
    assert (tmp_path / "x" / "1.png").read_bytes() == before
    written = [path for result in results for path in result.save(tmp_path / "out")]
    assert len(set(written)) == 2
    assert all(path.is_file() for path in written)
    alone = segmenter([tmp_path / "x" / "1.png"])[0]
    assert alone.save(tmp_path / "out") == alone.save(tmp_path / "out") == [tmp_path / "out" / "1.png"]


@pytest.mark.parametrize("view", [{}, {"INFERENCE.window_size": "32", "INFERENCE.flip": "True"}])
def test_probabilities(folder, view):
    opts = [word for pair in view.items() for word in pair]
    segmenter = Segmenter.from_config(folder / "own.yaml", opts=opts, device="cpu")
    result = segmenter(PIXELS)
    classes, probabilities = result.probabilities(top=3)
    assert classes.shape == probabilities.shape == (3, 45, 60)
    assert np.array_equal(classes[0], result.label_map)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    item = segmenter._item(PIXELS)
    expected = multi_scale_scores(segmenter._network, item["img_data"], (45, 60), view=segmenter._view)
    np.testing.assert_allclose(np.take_along_axis(expected.numpy(), classes, 0), probabilities, atol=1e-5)
    with pytest.raises(ValueError, match="top 4: give 1 to 3"):
        result.probabilities(4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.jpg", r"nowhere\.jpg: no such file"),
        ("https://example.org/a.jpg", "addresses are not fetched"),
        (b"no picture", r"picture \(10 bytes\): no readable image \(unknown format\)"),
        (PIXELS.astype(np.float32), r"an array \(45, 60, 3\) of float32 is no picture"),
        (PIXELS[..., :2], r"an array \(45, 60, 2\) of uint8 is no picture"),
        (PIXELS[:0], "is no picture"),
        (torch.zeros(45, 60, 3), r"a tensor \(45, 60, 3\) of torch.float32 is no picture"),
        (torch.full((3, 8, 8), 2.0), "values from 2 to 2: pictures of floating point have 0 to 1"),
        (17, "int is no picture"),
        (None, "NoneType is no picture"),
    ],
)
def test_anything_else_is_refused(segmenter, given, message):
    with pytest.raises((UnsupportedImageError, ImageFileError), match=message):
        segmenter(given)


def test_pictures_are_read_as_files_are(segmenter):
    """Transparency on white, EXIF orientation, grey."""
    turned, data = Image.fromarray(PIXELS), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(data, "PNG", exif=exif)
    assert segmenter(data.getvalue()).image.shape == (60, 45, 3)
    assert segmenter(Image.open(data)).image.shape == (60, 45, 3)
    clear = Image.new("RGBA", (40, 40), (9, 9, 9, 0))
    assert (segmenter(clear).image == 255).all()


def test_threads_get_their_own_results(segmenter):
    pictures = [np.roll(PIXELS, shift, axis=1) for shift in range(6)]
    expected, results = [segmenter(p).label_map for p in pictures], [None] * 6

    def work(number):
        results[number] = segmenter(pictures[number]).label_map

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_published_networks_by_name(tmp_path, monkeypatch):
    """From a mirror, here a folder; the second time from the cache."""
    write_weights(tmp_path / "mirror" / "pytorch" / NAME, "resnet18dilated", "c1_deepsup", "epoch_20.pth", 150)
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", (tmp_path / "mirror").as_uri())
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "cache"))
    small = ["DATASET.imgSizes", "40"]
    result = Segmenter.from_pretrained(NAME, device="cpu", opts=small)(PIXELS)
    assert result.table.names == class_table().names
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", (tmp_path / "gone").as_uri())
    again = Segmenter.from_pretrained(NAME, device="cpu", opts=small)(PIXELS)
    assert np.array_equal(again.label_map, result.label_map)
    with pytest.raises(UserError, match="there is no published model 'resnet'; there are ade20k-"):
        Segmenter.from_pretrained("resnet")
    assert NAME in Segmenter.names()


def test_the_published_options_are_those_of_the_recipes():
    from mit_semseg.config import load_config
    from mit_semseg.models.pretrained import published_options

    for name in Segmenter.names():
        recipe, ours = (
            load_config(f"config/{name.removesuffix('-c1') if 'hrnet' in name else name}.yaml"),
            load_config(None, published_options(name)),
        )
        for section, keys in {
            "MODEL": ("arch_encoder", "arch_decoder"),
            "DATASET": ("padding_constant", "segm_downsampling_rate", "imgSizes", "imgMaxSize", "num_class"),
            "TEST": ("checkpoint",),
        }.items():
            assert [ours[section][key] for key in keys] == [recipe[section][key] for key in keys], name


def test_devices(monkeypatch):
    assert auto_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'gpu': give auto, cpu"):
        auto_device("gpu")
    with pytest.raises(UserError, match="device 'cuda:7' is not there: this machine has cpu"):
        auto_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert auto_device() == torch.device("cuda:0")
    assert auto_device("cuda:1") == torch.device("cuda", 1)
    assert pick_devices("cuda:1") == [torch.device("cuda", 1)]
    assert pick_devices("auto") == pick_devices(None) == [torch.device("cuda", 0)]


def test_the_package_offers_it_lazily():
    assert mit_semseg.Segmenter is Segmenter
    with pytest.raises(AttributeError, match="no attribute 'segmenter'"):
        _ = mit_semseg.segmenter
