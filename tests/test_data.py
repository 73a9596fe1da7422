"""Lists, class tables, files of every kind, batches and their order."""

import json
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import options, write_pairs
from scipy.io import loadmat
from torch.utils.data import DataLoader

from mit_semseg.dataset import TestDataset, TrainDataset, ValDataset, class_table, imresize
from mit_semseg.dataset.classes import ClassTableError, distinct_colors
from mit_semseg.dataset.datasets import images_to_device
from mit_semseg.dataset.image_io import ImageFileError, image_size, read_image, read_label
from mit_semseg.dataset.layouts import ListError, find_images
from mit_semseg.dataset.records import load_records, write_odgt
from mit_semseg.dataset.samplers import BatchNumbers, OrientationBatches
from mit_semseg.dataset.transforms import downsample_label, imresize_fast, normalize, pad_batch, scale_for
from mit_semseg.evaluation.evaluator import read_items
from mit_semseg.lib.utils import UserError

SIZES = [(60, 40), (40, 60), (52, 44), (30, 70), (64, 64), (33, 47), (80, 41)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), SIZES)


# Lists


def test_folder_and_odgt_give_the_same_records(root, tmp_path):
    records = load_records(".", root)
    assert [(r["width"], r["height"]) for r in records] == SIZES
    assert records[0]["fpath_img"] == "images/00.png"
    write_odgt(records, tmp_path / "list.odgt")
    assert load_records(tmp_path / "list.odgt", root) == records
    assert load_records("images", root) == records  # a path with a part images, whose twin is annotations
    assert load_records(records, root) == records


def test_official_ade20k_layout(tmp_path):
    for split in ("training", "validation"):
        source = write_pairs(tmp_path / split, [(20, 30)])
        for part in ("images", "annotations"):
            (tmp_path / "ADE" / part).mkdir(parents=True, exist_ok=True)
            (source / part).rename(tmp_path / "ADE" / part / split)
    (record,) = load_records("ADE/images/validation", tmp_path)
    assert record["fpath_segm"] == "ADE/annotations/validation/00.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"fpath_img": "a"}\n{bad\n', "line 2: no JSON object"),
        ("3\n", "line 1: expected a JSON object, found int"),
        ('{"width": 3}\n', "line 1: no fpath_img"),
        ("\n\n", "is empty"),
    ],
)
def test_broken_lists_are_named_by_line(tmp_path, text, message):
    (tmp_path / "x.odgt").write_text(text)
    with pytest.raises(ListError, match=message):
        load_records(tmp_path / "x.odgt")


def test_blank_lines_and_windows_line_ends(tmp_path):
    (tmp_path / "x.odgt").write_bytes(b'{"fpath_img": "a"}\r\n\r\n{"fpath_img": "b"}\r\n')
    assert len(load_records(tmp_path / "x.odgt")) == 2


def test_files_without_a_partner_are_counted_and_named(tmp_path):
    folder = write_pairs(tmp_path / "d", SIZES[:3])
    (folder / "annotations" / "01.png").unlink()
    (folder / "annotations" / "zz.png").write_bytes(b"")
    twin = write_pairs(tmp_path / "twin", SIZES[:1])
    (twin / "images" / "00.jpg").write_bytes(b"")
    with pytest.raises(ListError, match=r"00\.jpg and .*00\.png have the same stem"):
        load_records(twin)
    with pytest.raises(ListError, match=r"2 files do not pair up: .*01\.png has no partner.*zz\.png has no partner"):
        load_records(folder)
    with pytest.raises(ListError, match=r"download_ade20k\.sh.*DATASET\.list_train"):
        load_records("nowhere.odgt", tmp_path)


def test_every_case_and_type_of_picture_is_found(tmp_path):
    for name in ("a.JPG", "b.png", "sub/c.Tiff", "d.webp", ".hidden.png", "note.txt", "movie.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [
        "a.JPG",
        "b.png",
        "d.webp",
        "sub/c.Tiff",
    ]


def test_a_damaged_header_does_not_stop_the_listing(tmp_path):
    folder = write_pairs(tmp_path / "d", SIZES[:2])
    whole = (folder / "images" / "00.png").read_bytes()
    (folder / "images" / "00.png").write_bytes(whole[:20])
    records = load_records(folder)
    assert ["width" in record for record in records] == [False, True]
    (folder / "images" / "00.png").write_bytes(whole[:-200])  # the header is whole
    assert image_size(folder / "images" / "00.png") == SIZES[0]


def test_default_colors_differ():
    """By a minimum distance in RGB, also from black (ignored pixels)."""
    for count, least in ((40, 60), (150, 38), (600, 20)):
        colors = np.vstack([distinct_colors(count).astype(int), [(0, 0, 0)]])
        distances = np.linalg.norm(colors[:, None] - colors, axis=2) + 1000 * np.eye(count + 1)
        assert distances.min() >= least
    assert len(np.unique(class_table("", 5000).colors, axis=0)) == 5000
    assert len(distinct_colors(70_000)) == 70_000


def test_names_in_either_form_of_unicode_pair_up(tmp_path):
    """Disks and archives of macOS take letters with accents apart."""
    folder, stem = tmp_path / "d", "Stra\u00dfe \u00e9"
    for part, form, ending in (("images", "NFC", "jpg"), ("annotations", "NFD", "png")):
        (folder / part).mkdir(parents=True)
        Image.new("L", (8, 6)).save(folder / part / f"{unicodedata.normalize(form, stem)}.{ending}")
    (record,) = load_records(folder)
    assert record["fpath_img"] != record["fpath_segm"]
    assert (tmp_path / record["fpath_segm"]).is_file()


def test_lists_of_other_tools(tmp_path):
    write_pairs(tmp_path / "train", SIZES[:2])
    lines = "train/images/00.png train/annotations/00.png\n\ntrain/images/01.png\ttrain/annotations/01.png"
    (tmp_path / "pairs.txt").write_text(lines)
    dataset = ValDataset(tmp_path, tmp_path / "pairs.txt", options())
    assert [item["info"] for item in (dataset[0], dataset[1])] == ["train/images/00.png", "train/images/01.png"]
    record = {"fpath_img": "train\\images\\00.png", "fpath_segm": "train\\annotations\\00.png"}
    (tmp_path / "windows.odgt").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"no such file; the list contains Windows paths"):
        ValDataset(tmp_path, tmp_path / "windows.odgt", options())[0]
    (tmp_path / "array.json").write_text(json.dumps([record, record]))
    with pytest.raises(ListError, match=r"array\.json is a JSON array; .*jq"):
        load_records(tmp_path / "array.json")


@pytest.mark.parametrize("name", ["road\u2028side", "road\nside", "road\r\n side", "road side"])
def test_line_breaks_in_names_of_classes(tmp_path, name):
    (tmp_path / "t.csv").write_bytes(f'raw,name\n0,"{name}"\n1,car\n'.encode())
    assert class_table(str(tmp_path / "t.csv"), 2).names == ("road side", "car")


def test_a_folder_outside_the_root_is_absolute(tmp_path):
    write_pairs(tmp_path / "real" / "deep" / "train", SIZES[:1])
    other = write_pairs(tmp_path / "other", SIZES[:1])
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (record,) = load_records(other, tmp_path / "link")
    assert record["fpath_img"] == str(other / "images" / "00.png")
    (record,) = load_records("train", tmp_path / "link")
    assert record["fpath_img"] == "train/images/00.png"


# Class tables


def test_ade20k_table_agrees_with_the_files_for_older_scripts(request):
    table, data = class_table("ade20k"), request.config.rootpath / "data"
    assert np.array_equal(loadmat(data / "color150.mat")["colors"], table.colors)
    rows = (data / "object150_info.csv").read_text().splitlines()[1:]
    assert [row.rsplit(",", 1)[-1] for row in rows] == list(table.names)
    assert table.encode(np.array([0, 1, 150, 151])).tolist() == [-1, 0, 149, -2]


def test_tables_by_number_list_and_file(tmp_path):
    assert class_table("", 3).encode(np.arange(5)).tolist() == [-1, 0, 1, 2, -2]
    listed = class_table(["sky", "road"], 2, ignore_values=(0, 255))
    assert listed.encode(np.array([0, 1, 2, 3, 255])).tolist() == [-1, 0, 1, -2, -1]
    (tmp_path / "t.csv").write_text("raw,name,color\n7,road,#804080\n8,walk,\n9,road,\n0,,\n255,,\n")
    table = class_table(str(tmp_path / "t.csv"), 2)
    assert table.names == ("road", "walk")
    assert table.colors[0].tolist() == [128, 64, 128]
    assert table.encode(np.array([7, 8, 9, 0, 255, 1])).tolist() == [0, 1, 0, -1, -1, -2]
    assert table.raw_values() == "7-9, ignored 0, 255"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "needs columns raw,name"),
        ("raw,name\nx,road\n", "line 2: raw value 'x'"),
        ("raw,name\n1,road\n1,walk\n", "line 3: raw value 1 stands there twice"),
        ("raw,name\n70000,road\n", "outside 0 to 65535"),
        ("raw,name,color\n1,road,red\n", "not of the form #rrggbb"),
        ("raw,name\n1,\n", "names no class"),
        ("raw,name\n1,road\n", "has 1 classes, but DATASET.num_class is 2"),
    ],
)
def test_broken_tables(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ClassTableError, match=message):
        class_table(str(tmp_path / "t.csv"), 2)


def test_generated_colours_differ():
    colors = class_table("", 60).colors
    assert len({tuple(c) for c in colors}) == 60


# Files


def save(path, image, **kwargs):
    image.save(path, **kwargs)
    return path


def test_pictures_of_every_kind(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    grey = rgb.convert("L")
    expected_grey = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(read_image(save(tmp_path / "a.png", rgb))), np.asarray(rgb))
    assert np.array_equal(np.asarray(read_image(save(tmp_path / "g.png", grey))), expected_grey)
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(read_image(save(tmp_path / "w.png", wide))), expected_grey)
    clear = rgb.convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(read_image(save(tmp_path / "t.png", clear))).min() == 255
    solid = rgb.convert("RGBA")
    assert np.array_equal(np.asarray(read_image(save(tmp_path / "s.png", solid))), np.asarray(rgb))
    plain = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(read_image(save(tmp_path / "c.jpg", plain)))[4, 4]
    assert red[0] > 230
    assert red[1:].max() < 40
    with pytest.raises(ImageFileError, match=r"f\.tiff: floating point"):
        read_image(save(tmp_path / "f.tiff", Image.fromarray(np.ones((3, 3), np.float32))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """A picture whose top row is white as it is seen, stored in each of the eight ways."""
    seen = np.zeros((16, 24, 3), np.uint8)
    seen[:8], seen[:, :8, 0] = 255, 200
    flip_x, flip_y, turn_90, turn_180, turn_270, transpose, _ = Image.Transpose
    # what a camera does to the picture before it stores it, so that each orientation undoes it
    inverse = {2: flip_x, 3: turn_180, 4: flip_y, 5: transpose, 6: turn_90, 7: Image.Transpose.TRANSVERSE, 8: turn_270}
    stored = Image.fromarray(seen)
    if orientation > 1:
        stored = stored.transpose(inverse[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "e.png", stored, exif=exif)
    assert image_size(path) == (24, 16)
    assert np.array_equal(np.asarray(read_image(path)), seen)


def test_damaged_files_are_named(tmp_path):
    whole = save(tmp_path / "a.jpg", Image.new("RGB", (64, 64), "red"))
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    for name in ("cut.jpg", "empty.png", "page.jpg", "absent.jpg"):
        with pytest.raises(ImageFileError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("P", "DATASET.palette_labels True"),
        ("RGB", "RGB"),
        ("F", "astype"),
        ("RGBA", "RGB"),
    ],
)
def test_labels_of_other_kinds_say_what_to_do(tmp_path, mode, message):
    label = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    path = save(tmp_path / "label.tiff", label.convert(mode))
    with pytest.raises(ImageFileError, match=rf"label\.tiff: .*{message}"):
        read_label(path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_labels_of_few_bits_keep_their_values(tmp_path, bits):
    """Pillow spreads them over 0 to 255."""
    values = (np.arange(4 * 8).reshape(4, 8) % 2**bits).astype(np.uint8)
    packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(4, -1), axis=-1)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", 8, 4, bits, 0, 0, 0, 0)
    path = tmp_path / "a.png"
    with path.open("wb") as out:
        out.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            out.write(struct.pack(">I", len(content)) + kind + content)
            out.write(struct.pack(">I", zlib.crc32(kind + content)))
    assert np.array_equal(np.asarray(read_label(path)), values)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_labels_of_16_bits(tmp_path, suffix):
    """More classes than 8 bits can tell apart."""
    values = np.arange(0, 1200, dtype=np.uint16).reshape(30, 40)
    label = read_label(save(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert np.array_equal(np.asarray(label), values)
    assert read_label(save(tmp_path / f"b.{suffix}", Image.fromarray(values % 256))).mode == "L"
    folder = write_pairs(tmp_path / "d", [(40, 30)])
    Image.fromarray(values).save(folder / "annotations" / "00.png")
    item = ValDataset(folder, ".", options(num_class=1199))[0]
    assert np.array_equal(item["seg_label"][0].numpy(), values.astype(np.int64) - 1)
    with pytest.raises(ImageFileError, match=r"label values 1000, 1001, .* are not in the class table"):
        ValDataset(folder, ".", options(num_class=999))[0]
    batch = TrainDataset(folder, ".", options(num_class=1199, segm_downsampling_rate=1, imgSizes=(30,)))[0]
    assert set(batch["seg_label"].unique().tolist()) == set(range(-1, 1199))


def test_palette_labels_by_their_indices(tmp_path):
    label = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    label.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 9, 9, 9])
    path = save(tmp_path / "p.png", label)
    assert np.asarray(read_label(path, palette=True)).tolist() == [[0, 1], [2, 3]]


def test_label_of_other_size_or_value(tmp_path):
    folder = write_pairs(tmp_path / "d", [(20, 30), (20, 30)])
    Image.new("L", (21, 30)).save(folder / "annotations" / "00.png")
    Image.new("L", (20, 30), 77).save(folder / "annotations" / "01.png")
    dataset = ValDataset(folder, ".", options())
    with pytest.raises(ImageFileError, match=r"00\.png: the label is 21x30.*20x30"):
        dataset[0]
    with pytest.raises(ImageFileError, match=r"01\.png: label values 77 are not in the class table \(1-3, ignored 0\)"):
        dataset[1]


# Numbers


def test_resize_is_pillows():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    for name, kind in (("nearest", 0), ("bilinear", 2), ("bicubic", 3)):
        assert np.array_equal(np.asarray(imresize(image, (13, 9), name)), np.asarray(image.resize((13, 9), kind)))
    with pytest.raises(ValueError, match="choose one of nearest, bilinear, bicubic"):
        imresize(image, (3, 3), "area")


def test_normalization():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    expected = (pixels.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(Image.fromarray(pixels)).numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_label_sampling_is_pillows_nearest(height, width, rate):
    label = np.random.default_rng(height * 41 + width).integers(0, 9, (height, width)).astype(np.int64)
    full = np.zeros((-(-height // rate) * rate, -(-width // rate) * rate), np.uint8)
    full[:height, :width] = label + 1  # 0 pads
    small = Image.fromarray(full).resize((full.shape[1] // rate, full.shape[0] // rate), Image.Resampling.NEAREST)
    assert np.array_equal(downsample_label(label, rate), np.asarray(small).astype(int) - 1)


def test_padding_is_ignored():
    images = [torch.ones(3, 10, 20), torch.ones(3, 16, 9)]
    labels = [np.ones((10, 20), np.int64), np.ones((16, 9), np.int64)]
    batch = pad_batch(images, labels, 8, 4)
    assert batch["img_data"].shape == (2, 3, 16, 24)
    assert batch["seg_label"].shape == (2, 4, 6)
    # every fourth pixel from the second on; ten rows reach to pixel 9, so samples 2, 6 are labelled
    assert batch["seg_label"][0].tolist() == [[1] * 5 + [-1]] * 2 + [[-1] * 6] * 2
    assert batch["img_data"][0, :, 10:].abs().sum() == 0


def test_scale_is_bounded_by_the_longest_side():
    assert scale_for(100, 200, 50, 1000) == 0.5
    assert scale_for(100, 2000, 100, 1000) == 0.5


def test_evaluation_item(root):
    item = ValDataset(root, ".", options())[3]
    assert item["img_ori"].shape == (70, 30, 3)
    assert item["seg_label"].shape == (1, 70, 30)
    # 30x70 with short side 40: 40 x 93 -> 96; with 56: limited by 120 / 70 to 51 x 120 -> 56 x 120
    assert [tuple(x.shape) for x in item["img_data"]] == [(1, 3, 96, 40), (1, 3, 120, 56)]
    test = TestDataset([{"fpath_img": str(root / "images/03.png")}], options(), max_sample=-1)[0]
    assert sorted(test) == ["img_data", "img_ori", "info"]
    assert all(torch.equal(a, b) for a, b in zip(item["img_data"], test["img_data"], strict=True))


# Order


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_every_pass_takes_every_record_once(upright, batch_size, seed):
    plan, passes = OrientationBatches(upright, batch_size, seed), 3 * batch_size
    for i in range(len(upright) * passes // batch_size - 2 * batch_size):
        assert len({upright[r] for r in plan[i]}) == 1
        assert len(plan[i]) == batch_size
    # Per bucket the stream of records is a sequence of permutations of it, carried over from pass to pass.
    for kind in (True, False):
        members = {i for i, u in enumerate(upright) if u == kind}
        stream = [r for i in range(len(upright) * 2) for r in plan[i] if upright[r] == kind]
        for start in range(0, len(stream) - len(members) + 1, max(1, len(members))):
            assert set(stream[start : start + len(members)]) == members


def test_batches_depend_on_seed_and_number_alone():
    upright = [i % 3 == 0 for i in range(20)]
    forward = [OrientationBatches(upright, 2, 5)[i] for i in range(40)]
    plan = OrientationBatches(upright, 2, 5)
    assert [plan[i] for i in reversed(range(40))][::-1] == forward
    assert [OrientationBatches(upright, 2, 6)[i] for i in range(40)] != forward
    assert list(BatchNumbers(3, 6)) == [3, 4, 5]
    shares = [list(BatchNumbers(0, 4, first, 1, 2)) for first in (0, 1)]
    assert shares == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # Two processes with two devices each, continued after the first round.
    shares = [list(BatchNumbers(1, 3, first, 2, 4)) for first in (0, 2)]
    assert shares == [[4, 5, 8, 9], [6, 7, 10, 11]]
    assert len(BatchNumbers(1, 3, 2, 2, 4)) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_for_any_number_of_workers_and_after_a_restart(root, workers):
    def batches(start, count):
        dataset = TrainDataset(root, ".", options(), batch_per_gpu=2, seed=7)
        loader = DataLoader(dataset, batch_size=None, sampler=BatchNumbers(start, 12), num_workers=count)
        return list(loader)

    reference = batches(0, 0)
    for first, start in ((reference, 0), (reference[5:], 5)):
        for a, b in zip(first, batches(start, workers), strict=True):
            assert a["info"] == b["info"]
            assert torch.equal(a["img_data"], b["img_data"])
            assert torch.equal(a["seg_label"], b["seg_label"])
    assert len({tuple(batch["info"]) for batch in reference}) > 3


def test_flips_happen_half_of_the_time_and_can_be_switched_off(tmp_path):
    folder = write_pairs(tmp_path / "d", [(40, 40)])
    left = np.zeros((40, 40), np.uint8)
    left[:, :20] = 1
    Image.fromarray(left).save(folder / "annotations" / "00.png")
    counts = {}
    for flag in (True, False):
        dataset = TrainDataset(folder, ".", options(imgSizes=(40,), random_flip=flag))
        counts[flag] = sum(int(dataset[i]["seg_label"][0, 0, 0] == -1) for i in range(200))
    assert counts[False] == 0
    assert 70 < counts[True] < 130


def test_sizes_are_read_from_the_pictures_when_the_list_has_none(root, tmp_path):
    records = [{k: r[k] for k in ("fpath_img", "fpath_segm")} for r in load_records(".", root)]
    (tmp_path / "x.odgt").write_text("\n".join(map(json.dumps, records)))
    dataset = TrainDataset(root, tmp_path / "x.odgt", options())
    assert dataset.order.upright.tolist() == [h > w for w, h in SIZES]


def test_padding_must_be_a_multiple_of_the_rate(root):
    with pytest.raises(ValueError, match="padding_constant 8 is no multiple of segm_downsampling_rate 3"):
        TrainDataset(root, ".", options(segm_downsampling_rate=3))


# Bytes until the device, and the fast resize


@pytest.mark.parametrize("size", [(450, 300), (90, 61), (333, 250), (601, 400)])
def test_the_fast_resize_is_within_a_grey_level(size):
    """Of Pillow's, on a picture with edges, gradients and noise."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(300), np.arange(400)) % 256
    pixels = np.stack([ramp, 255 - ramp, 255 * (ramp > 99)], axis=2)
    pixels[100:200] = rng.integers(0, 256, (100, 400, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    exact, fast = (np.asarray(f(image, size)).astype(int) for f in (imresize, imresize_fast))
    assert fast.shape == exact.shape
    assert np.abs(fast - exact).max() <= 1
    assert (fast != exact).mean() < 0.01


@pytest.mark.parametrize("kind", ["imagenet", "caffe"])
@pytest.mark.parametrize("crop", [0, (32, 40)])
def test_training_bytes_become_the_same_numbers(tmp_path, kind, crop):
    write_pairs(tmp_path, [(60, 40), (52, 44), (61, 47)])
    dataset = TrainDataset(tmp_path, ".", options(normalization=kind, crop_size=crop), batch_per_gpu=3)
    for index in range(3):
        floats, raw = dataset[index], dataset.as_uint8()[index]
        assert raw["img_data"].dtype == torch.uint8
        assert torch.equal(images_to_device(raw, "cpu"), floats["img_data"])
        assert torch.equal(raw["seg_label"], floats["seg_label"])
        assert raw["info"] == floats["info"]
    assert not dataset.as_bytes


def test_evaluation_bytes_become_the_same_numbers(tmp_path):
    write_pairs(tmp_path, [(60, 40), (52, 44)])
    dataset = ValDataset(tmp_path, ".", options())
    for floats, item in zip(dataset, read_items(dataset, device="cpu", workers=1), strict=True):
        assert item["img_ori"].dtype == np.uint8
        assert np.array_equal(item["img_ori"], floats["img_ori"])
        assert all(torch.equal(a, b) for a, b in zip(item["img_data"], floats["img_data"], strict=True))
