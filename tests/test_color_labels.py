"""Labels whose colors are the classes (DATASET.label_format colors)."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here, small
from scenes import options, write_data_set

from mit_semseg.build import build_module
from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset, class_table
from mit_semseg.dataset.classes import ClassTableError
from mit_semseg.dataset.image_io import ImageFileError
from mit_semseg.predict.network_file import read_network, write_network

COLORS = {0: "#000000", 1: "#ff0000", 2: "#00ff10", 3: "#0120ff"}
CSV = "name,color\n,#000000\nred,#ff0000\ngreen,#00ff10\nblue,#0120ff\n"


def rgb(raw):
    """Return the colors (H, W, 3) of raw values (H, W)."""
    return np.array([list(bytes.fromhex(COLORS[value][1:])) for value in range(4)], np.uint8)[raw]


@pytest.fixture
def data(tmp_path):
    """Write a dataset in which labels/ has colors and annotations/ has gray values; return its folder."""
    write_data_set(tmp_path / "gray")
    write_data_set(tmp_path / "colors")
    for path in (tmp_path / "colors").rglob("annotations/*.png"):
        Image.fromarray(rgb(np.asarray(Image.open(path)))).save(path)
    (tmp_path / "classes.csv").write_text(CSV)
    return tmp_path


def color_options(data, **changes):
    return options(label_format="colors", classes=str(data / "classes.csv"), **changes)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_give_the_classes_of_gray_labels(data, mode):
    for path in (data / "colors").rglob("annotations/*.png"):
        image = Image.open(path)
        (image.quantize(4, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)).save(path)
    expected = ValDataset(data / "gray", "val", options())
    dataset = ValDataset(data / "colors", "val", color_options(data))
    for i in range(len(expected)):
        assert np.array_equal(dataset[i]["seg_label"], expected[i]["seg_label"])


def test_unknown_colors_are_named_with_count_and_nearest_class(data):
    path = data / "colors/val/annotations/01.png"
    pixels = np.array(Image.open(path))
    pixels[:2, :5] = 250, 3, 0
    pixels[3, :4] = 0, 200, 0
    Image.fromarray(pixels).save(path)
    with pytest.raises(ImageFileError, match=r"01\.png.*#fa0300 \(10 pixels.*red\), #00c800 \(4 pixels.*green\)"):
        ValDataset(data / "colors", "val", color_options(data))[1]


def test_label_that_was_a_jpeg_is_refused(data):
    path = data / "colors/val/annotations/01.png"
    Image.open(path).save(data / "damaged.jpg", quality=80)
    Image.open(data / "damaged.jpg").save(path)
    with pytest.raises(ImageFileError, match=r"01\.png.*JPEG"):
        ValDataset(data / "colors", "val", color_options(data))[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raw,name\n0,a\n1,b\n2,c\n", "color"),
        ("name,color\na,#ff0000\nb,\nc,#00ff00\n", "b"),
        ("name,color\na,#ff0000\nb,#0000ff\nc,#ff0000\n", "#ff0000"),
    ],
)
def test_table_without_unique_colors_is_an_error(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ClassTableError, match=message):
        class_table(str(tmp_path / "t.csv"), 3, label_format="colors")


def test_classes_with_several_values_and_colors_are_written_in_their_color(tmp_path):
    text = "raw,name,color\n0,,#000000\n1,a,#ff0000\n2,a,#ff0000\n3,b,\n4,b,#00ff00\n"
    (tmp_path / "t.csv").write_text(text)
    table = class_table(str(tmp_path / "t.csv"), 2, label_format="colors")
    expected = [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]]
    assert table.decode(np.array([[0, 1, -1]])).tolist() == expected


def test_network_file_keeps_the_colors_of_labels(tmp_path):
    (tmp_path / "t.csv").write_text("name,color\n,#000000\na,#ff0000\nb,#00ff00\n")
    words = ["DATASET.label_format", "colors", "DATASET.classes", tmp_path / "t.csv", "DATASET.num_class", 2]
    words += ["MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "MODEL.pretrained", "False"]
    cfg = load_config(None, [str(word) for word in words])
    table = class_table(str(tmp_path / "t.csv"), 2, label_format="colors")
    write_network(build_module(cfg, torch.device("cpu")), cfg, table, tmp_path / "a.safetensors")
    stored = read_network(tmp_path / "a.safetensors")[2]
    indices = np.array([[0, 1, -1]])
    assert np.array_equal(stored.decode(indices), table.decode(indices))
    assert stored.decode(indices).shape == (1, 3, 3)


def test_class_has_precedence_over_ignored_values_of_its_color():
    table = class_table("cityscapes", 19, label_format="colors")  # license plates (ignored) have the color of cars
    blue = np.array([[142 * 65536]])
    assert table.encode(table.values_of_colors(blue)).item() == table.names.index("car")


def test_color_dataset_trains_and_writes_pseudo_labels_to_train_on(data, tmp_path):
    changes = {"DATASET.label_format": "colors", "DATASET.classes": data / "classes.csv"}
    run = {**small(data / "colors", tmp_path / "run", TRAIN__num_epoch=1), **changes}
    run |= {"VAL.checkpoint": "epoch_1.pth", "TEST.checkpoint": "epoch_1.pth", "TEST.result": tmp_path / "out"}
    here("train.py", {**run, "TRAIN.class_weights": "auto"})
    here("eval.py", run)
    here("test.py", "--imgs", data / "colors/val/images", "--labels", "--no-panel", "--min-confidence", 0.36, run)
    for path in (tmp_path / "out").glob("*_label.png"):
        path.rename(data / "colors/val/annotations" / path.name.replace("_label", ""))
    report = here(
        "mit_semseg.dataset.doctor", "--cfg", "config/quickstart.yaml", {k: v for k, v in run.items() if "." in k}
    )
    assert "all files can be used" in report.stdout
    assert "#00ff10" in report.stdout
