"""Cityscapes and PASCAL VOC from their official folders: lists, labels, and the recipes from training to the server."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here, same, weights, words
from scenes import options
from shared_data import shared

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.classes import IGNORE, class_table
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import load_records

# Cityscapes' train ids of its labelIds; every other one is ignored.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def write_cityscapes(root, split, names, *, kind="labelIds", size=(96, 48), seed=0):
    """Pictures and labels in the official layout; coarse blocks of classes with their own colours."""
    rng = np.random.default_rng(seed)
    for name in names:
        folder = split + "/" + name.split("_")[0]
        for kind_folder in ("leftImg8bit", "gtFine"):
            (root / kind_folder / folder).mkdir(parents=True, exist_ok=True)
        raw = rng.choice([7, 11, 23, 26, 4], (3, 6)).astype(np.uint8)
        label = np.asarray(Image.fromarray(raw).resize(size, Image.Resampling.NEAREST))
        pixels = label[..., None] * np.array([7, 3, 5]) + rng.integers(0, 20, (*label.shape, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"leftImg8bit/{folder}/{name}_leftImg8bit.png")
        if kind == "labelTrainIds":
            label = np.vectorize(lambda v: TRAIN_IDS.get(v, 255))(label).astype(np.uint8)
        Image.fromarray(label).save(root / f"gtFine/{folder}/{name}_gtFine_{kind}.png")
        Image.fromarray(label).save(root / f"gtFine/{folder}/{name}_gtFine_instanceIds.png")  # belongs to others


NAMES = ["aachen_000000_000019", "aachen_000001_000019", "bonn_000000_000019"]


@pytest.fixture
def cityscapes(tmp_path):
    write_cityscapes(tmp_path, "train", NAMES)
    write_cityscapes(tmp_path, "val", ["ulm_000000_000019", "ulm_000001_000019"], seed=1)
    return tmp_path


def test_the_class_table_of_cityscapes():
    table = class_table("cityscapes", 19)
    ids = {raw: int(table.index[raw]) for raw in (*range(34), 255)}
    assert ids == {raw: TRAIN_IDS.get(raw, IGNORE) for raw in ids}
    assert np.array_equal(table.decode(np.arange(19)), sorted(TRAIN_IDS))
    train_ids = table.of_file("x/aachen_gtFine_labelTrainIds.png")
    assert [int(train_ids.index[i]) for i in (*range(19), 255)] == [*range(19), IGNORE]
    assert train_ids.names == table.names
    assert table.of_file("x/aachen_gtFine_labelIds.png") is table


def test_official_folders_pair_up(cityscapes):
    records = load_records("leftImg8bit/train", cityscapes)
    assert [r["fpath_img"] for r in records] == [
        f"leftImg8bit/train/{n.split('_')[0]}/{n}_leftImg8bit.png" for n in NAMES
    ]
    assert {r["fpath_segm"] for r in records} == {
        f"gtFine/train/{n.split('_')[0]}/{n}_gtFine_labelIds.png" for n in NAMES
    }
    assert len(load_records(".", cityscapes)) == 5  # all splits


def test_a_picture_without_label_is_named(cityscapes):
    (cityscapes / f"gtFine/train/bonn/{NAMES[2]}_gtFine_labelIds.png").unlink()
    with pytest.raises(
        ListError, match=r"1 files do not pair up: .*no partner .*bonn_000000_000019_gtFine_labelIds\.\*"
    ):
        load_records("leftImg8bit/train", cityscapes)


def test_a_picture_of_another_name_is_named(cityscapes):
    folder = cityscapes / "leftImg8bit/train/bonn"
    Image.new("RGB", (96, 48)).save(folder / "extra.png")
    with pytest.raises(ListError, match=r"extra\.png does not end with _leftImg8bit"):
        load_records("leftImg8bit/train", cityscapes)


def test_label_ids_and_train_ids_give_the_same_classes(cityscapes):
    opt = options(classes="cityscapes", num_class=19)
    by_label_ids = ValDataset(cityscapes, "leftImg8bit/train", opt)[0]["seg_label"]
    shutil.rmtree(cityscapes / "gtFine")
    write_cityscapes(cityscapes, "train", NAMES, kind="labelTrainIds")
    by_train_ids = ValDataset(cityscapes, "leftImg8bit/train", opt)[0]["seg_label"]
    assert torch.equal(by_label_ids, by_train_ids)
    assert set(by_label_ids.unique().tolist()) <= {-1, 0, 2, 10, 13}


def test_the_real_sample():
    root = shared("data/cityscapes_sample")
    opt = options(classes="cityscapes", num_class=19)
    (record,) = load_records("leftImg8bit/val", root)
    assert record["fpath_segm"].endswith("_gtFine_labelIds.png")
    other = {**record, "fpath_segm": record["fpath_segm"].replace("labelIds", "labelTrainIds")}
    ours, theirs = (ValDataset(root, [r], opt)[0]["seg_label"] for r in (record, other))
    # The two files were reduced in size one by one, so a few pixels at the borders of classes differ.
    both = (ours >= 0) & (theirs >= 0)
    assert both.float().mean() > 0.8
    assert (ours == theirs)[both].float().mean() > 0.995


def write_voc(root):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    palette = class_table("pascal_voc", 21).colors
    for i, name in enumerate(("2007_000032", "2007_000039", "2007_000063")):
        label = np.full((30, 40), 0, np.uint8)
        label[5:20, 5:20], label[4, 5:20] = 1 + 7 * i, 255
        segm = Image.fromarray(label)
        segm.putpalette([int(v) for color in palette for v in color])
        segm.save(root / f"SegmentationClass/{name}.png")
        Image.fromarray(palette[np.where(label == 255, 0, label)]).save(root / f"JPEGImages/{name}.jpg")
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000032\r\n2007_000063\n\n")
    return root


def test_pascal_voc(tmp_path):
    write_voc(tmp_path)
    opt = options(classes="pascal_voc", num_class=21, palette_labels=True)
    dataset = ValDataset(tmp_path, "ImageSets/Segmentation/train.txt", opt)
    assert [r["fpath_img"] for r in dataset.records] == ["JPEGImages/2007_000032.jpg", "JPEGImages/2007_000063.jpg"]
    assert set(dataset[1]["seg_label"].unique().tolist()) == {-1, 0, 15}
    assert dataset.table.names[15] == "person"
    assert dataset.table.colors[15].tolist() == [192, 128, 128]
    assert TrainDataset(tmp_path, "ImageSets/Segmentation/train.txt", opt)[0]["img_data"].shape[0] == 1
    (tmp_path / "JPEGImages/2007_000063.jpg").unlink()
    with pytest.raises(ListError, match=r"train\.txt: 1 files are missing: .*JPEGImages/2007_000063\.jpg"):
        load_records("ImageSets/Segmentation/train.txt", tmp_path)
    problems = []
    assert len(load_records("ImageSets/Segmentation/train.txt", tmp_path, problems)) == 1
    assert problems == [f"{tmp_path / 'JPEGImages/2007_000063.jpg'} is missing"]
    (tmp_path / "ImageSets/gone.txt").write_text("2007_000001\n2007_000002\n")
    with pytest.raises(ListError, match=r"gone\.txt: all files are missing: .*JPEGImages/2007_000001\.jpg"):
        load_records("ImageSets/gone.txt", tmp_path, [])
    # Other extensions, and the lists of the augmented set, which name both files.
    (tmp_path / "JPEGImages/2007_000039.jpg").rename(tmp_path / "JPEGImages/2007_000039.JPG")
    (tmp_path / "ImageSets/aug.txt").write_text(
        "2007_000039 1\n/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000039.png\n"
    )
    assert [(r["fpath_img"], r["fpath_segm"]) for r in load_records("ImageSets/aug.txt", tmp_path)] == [
        ("JPEGImages/2007_000039.JPG", "SegmentationClass/2007_000039.png"),
        ("JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000039.png"),
    ]


def test_other_lists_may_end_with_txt_and_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "names.txt").write_text('{"fpath_img": "a.jpg"}\r\n', encoding="utf-8-sig")
    assert load_records("names.txt", tmp_path) == load_records(tmp_path / "names.txt") == [{"fpath_img": "a.jpg"}]


REDUCED = {
    "MODEL.pretrained": False,
    "MODEL.arch_encoder": "mobilenetv2dilated",
    "DATASET.crop_size": 49,
    "DATASET.imgSizes": "[48]",
    "INFERENCE.window_size": (33, 64),
    "INFERENCE.flip": True,
    "TRAIN.batch_size_per_gpu": 1,
    "TRAIN.num_epoch": 2,
    "TRAIN.epoch_iters": 1,
    "TRAIN.workers": 0,
    "TRAIN.eval_epoch": 2,
    "VAL.num_val": 1,
    "VAL.checkpoint": "epoch_2.pth",
    "TEST.checkpoint": "epoch_2.pth",
}


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["cityscapes-resnet101-pspnet", "cityscapes-resnet101-deeplabv3"])
def test_recipe_from_training_to_the_server(recipe, cityscapes, tmp_path):
    """Trains, resumes, evaluates through windows, and writes labelIds under names the server knows."""
    given = ["--cfg", f"config/{recipe}.yaml", "--gpu", "cpu"]
    opts = {**REDUCED, "DATASET.root_dataset": cityscapes, "DIR": tmp_path / "run"}
    first = here("train.py", *given, *words({**opts, "TRAIN.num_epoch": 1, "TRAIN.eval_epoch": 1}))
    assert first.returncode == 0, first.stderr
    second = here("train.py", *given, *words({**opts, "TRAIN.resume": "auto"}))
    assert second.returncode == 0, second.stderr
    assert "continuing" in second.stdout
    assert not same(weights(tmp_path / "run", "epoch_1.pth"), weights(tmp_path / "run", "epoch_2.pth"))

    evaluated = here("eval.py", *given, *words(opts))
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((tmp_path / "run/result/results.json").read_text())
    assert result["images"] == 2
    assert [entry["class"] for entry in result["iou_per_class"]][:2] == ["road", "sidewalk"]

    pictures = cityscapes / "leftImg8bit/val"
    opts["TEST.result"] = tmp_path / "server"
    segmented = here("test.py", "--imgs", pictures, "--labels", "--no-panel", *given, *words(opts))
    assert segmented.returncode == 0, segmented.stderr
    files = sorted(p for p in (tmp_path / "server").rglob("*") if p.is_file())
    assert [f.name for f in files] == [f"ulm_00000{i}_000019_leftImg8bit_label.png" for i in (0, 1)]
    label = Image.open(files[0])
    assert (label.mode, label.size) == ("L", (96, 48))
    assert set(np.unique(np.asarray(label))) <= set(TRAIN_IDS)
