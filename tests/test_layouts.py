"""Training, evaluation and test.py read Cityscapes and PASCAL VOC in their official folders."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import here
from scenes import options
from shared_data import shared

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.classes import IGNORE, class_table
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import load_records

# Cityscapes label ID -> train ID; all other label IDs are ignored.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def write_cityscapes(root, split, names, size=(96, 48), seed=0):
    """Write images and labels in the official layout; each of the 3 x 6 blocks of a label has one label ID."""
    rng = np.random.default_rng(seed)
    for name in names:
        folder = split + "/" + name.split("_")[0]
        for kind_folder in ("leftImg8bit", "gtFine"):
            (root / kind_folder / folder).mkdir(parents=True, exist_ok=True)
        raw = rng.choice([7, 11, 23, 26, 4], (3, 6)).astype(np.uint8)
        label = np.asarray(Image.fromarray(raw).resize(size, Image.Resampling.NEAREST))
        pixels = label[..., None] * np.array([7, 3, 5]) + rng.integers(0, 20, (*label.shape, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"leftImg8bit/{folder}/{name}_leftImg8bit.png")
        for kind in ("labelIds", "instanceIds"):  # instanceIds files are not labels
            Image.fromarray(label).save(root / f"gtFine/{folder}/{name}_gtFine_{kind}.png")


NAMES = ["aachen_000000_000019", "aachen_000001_000019", "bonn_000000_000019"]


@pytest.fixture
def cityscapes(tmp_path):
    write_cityscapes(tmp_path, "train", NAMES)
    write_cityscapes(tmp_path, "val", ["ulm_000000_000019", "ulm_000001_000019"], seed=1)
    return tmp_path


def test_cityscapes_class_table_reads_label_ids_and_train_ids():
    table = class_table("cityscapes", 19)
    ids = {raw: int(table.index[raw]) for raw in (*range(34), 255)}
    assert ids == {raw: TRAIN_IDS.get(raw, IGNORE) for raw in ids}
    assert np.array_equal(table.decode(np.arange(19)), sorted(TRAIN_IDS))
    train_ids = table.for_file("x/aachen_gtFine_labelTrainIds.png")
    assert [int(train_ids.index[i]) for i in (*range(19), 255)] == [*range(19), IGNORE]
    assert train_ids.names == table.names
    assert table.for_file("x/aachen_gtFine_labelIds.png") is table


def test_cityscapes_folders_pair_up(cityscapes):
    records = load_records("leftImg8bit/train", cityscapes)
    stems = [f"train/{name.split('_')[0]}/{name}" for name in NAMES]
    assert [record["fpath_img"] for record in records] == [f"leftImg8bit/{stem}_leftImg8bit.png" for stem in stems]
    assert [record["fpath_segm"] for record in records] == [f"gtFine/{stem}_gtFine_labelIds.png" for stem in stems]
    assert len(load_records(".", cityscapes)) == 5  # images of all splits


def test_cityscapes_files_without_partner_or_suffix_are_named(cityscapes):
    (cityscapes / f"gtFine/train/bonn/{NAMES[2]}_gtFine_labelIds.png").unlink()
    Image.new("RGB", (96, 48)).save(cityscapes / "leftImg8bit/train/bonn/extra.png")
    with pytest.raises(ListError, match=r"2 .*extra\.png .*_leftImg8bit.*bonn_000000_000019_gtFine_labelIds\.\*"):
        load_records("leftImg8bit/train", cityscapes)


def test_real_cityscapes_sample():
    root = shared("data/cityscapes_sample")
    opt = options(classes="cityscapes", num_class=19)
    (record,) = load_records("leftImg8bit/val", root)
    train_ids = {**record, "fpath_segm": record["fpath_segm"].replace("labelIds", "labelTrainIds")}
    first, second = (ValDataset(root, [r], opt)[0]["seg_label"] for r in (record, train_ids))
    # The two label files were downsampled separately, so a few pixels at class borders differ.
    both = (first >= 0) & (second >= 0)
    assert both.float().mean() > 0.8
    assert (first == second)[both].float().mean() > 0.995


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


def test_pascal_voc_labels(tmp_path):
    opt = options(classes="pascal_voc", num_class=21, label_format="palette")
    dataset = ValDataset(write_voc(tmp_path), "ImageSets/Segmentation/train.txt", opt)
    assert [r["fpath_img"] for r in dataset.records] == ["JPEGImages/2007_000032.jpg", "JPEGImages/2007_000063.jpg"]
    assert set(dataset[1]["seg_label"].unique().tolist()) == {-1, 0, 15}
    assert dataset.table.names[15] == "person"
    assert dataset.table.colors[15].tolist() == [192, 128, 128]
    assert TrainDataset(tmp_path, "ImageSets/Segmentation/train.txt", opt)[0]["img_data"].shape[0] == 1


def test_missing_files_of_a_voc_list_are_named(tmp_path):
    missing = write_voc(tmp_path) / "JPEGImages/2007_000063.jpg"
    missing.unlink()
    with pytest.raises(ListError, match=r"train\.txt .*JPEGImages/2007_000063\.jpg"):
        load_records("ImageSets/Segmentation/train.txt", tmp_path)
    problems = []
    assert len(load_records("ImageSets/Segmentation/train.txt", tmp_path, problems)) == 1
    assert problems == [f"{missing} is missing"]


def test_voc_lists_may_have_paths_and_any_extension(tmp_path):
    (write_voc(tmp_path) / "JPEGImages/2007_000039.jpg").rename(tmp_path / "JPEGImages/2007_000039.JPG")
    lines = "2007_000039 1\n/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000039.png\n"
    (tmp_path / "ImageSets/aug.txt").write_text(lines)
    label = "SegmentationClass/2007_000039.png"
    assert load_records("ImageSets/aug.txt", tmp_path) == [
        {"fpath_img": "JPEGImages/2007_000039.JPG", "fpath_segm": label},
        {"fpath_img": "JPEGImages/2007_000032.jpg", "fpath_segm": label},
    ]


SMALL_RUN = {
    "MODEL.pretrained": False,
    "MODEL.arch_encoder": "mobilenetv2dilated",
    "DATASET.crop_size": 49,
    "DATASET.imgSizes": "[48]",
    "TRAIN.batch_size_per_gpu": 1,
    "TRAIN.num_epoch": 1,
    "TRAIN.epoch_iters": 1,
    "TRAIN.workers": 0,
    "TRAIN.eval_epoch": 1,
    "VAL.checkpoint": "epoch_1.pth",
    "TEST.checkpoint": "epoch_1.pth",
}


@pytest.mark.long
@pytest.mark.parametrize("config", ["cityscapes-resnet101-pspnet", "cityscapes-resnet101-deeplabv3"])
def test_cityscapes_config_trains_evaluates_and_writes_label_ids(config, cityscapes, tmp_path):
    options = {"--cfg": f"config/{config}.yaml", "--gpu": "cpu", **SMALL_RUN}
    options |= {"DATASET.root_dataset": cityscapes, "DIR": tmp_path / "run", "TEST.result": tmp_path / "result"}
    here("train.py", options)
    here("eval.py", options)
    result = json.loads((tmp_path / "run/result/results.json").read_text())
    assert result["images"] == 2
    assert [entry["class"] for entry in result["iou_per_class"]][:2] == ["road", "sidewalk"]
    here("test.py", "--imgs", cityscapes / "leftImg8bit/val", "--labels", "--no-panel", options)
    files = sorted((tmp_path / "result").rglob("*.png"))
    assert [f.name for f in files] == [f"ulm_00000{i}_000019_leftImg8bit_label.png" for i in (0, 1)]
    label = Image.open(files[0])
    assert (label.mode, label.size) == ("L", (96, 48))
    assert set(np.unique(np.asarray(label))) <= set(TRAIN_IDS)
