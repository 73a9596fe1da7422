"""Lists, class tables, image decoding, transforms, batches, and the order of batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import options, write_pairs
from scipy.io import loadmat
from torch.utils.data import DataLoader
from training import CPU, make_trainer

from mit_semseg.dataset import TestDataset, TrainDataset, ValDataset, class_table, imresize
from mit_semseg.dataset.classes import ClassTableError, distinct_colors
from mit_semseg.dataset.image_io import ImageFileError, read_image, read_label
from mit_semseg.dataset.layouts import ListError, find_images
from mit_semseg.dataset.records import add_sizes, load_records, write_odgt
from mit_semseg.dataset.samplers import OrientationBatches, shards
from mit_semseg.dataset.transforms import downsample_label, images_to_device, imresize_fast, normalize, pad_batch
from mit_semseg.engine import World

SIZES = [(60, 40), (40, 60), (52, 44), (30, 70), (64, 64), (33, 47), (80, 41)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), SIZES)


def test_folder_and_odgt_give_the_same_records(root, tmp_path):
    records = load_records(".", root)
    assert records[0] == {"fpath_img": "images/00.png", "fpath_segm": "annotations/00.png"}
    assert load_records("images", root) == load_records(records, root) == records
    sized = add_sizes(records, root)
    assert [(record["width"], record["height"]) for record in sized] == SIZES
    write_odgt(sized, tmp_path / "list.odgt")
    assert load_records(tmp_path / "list.odgt", root) == sized


def test_ade20k_folders_pair_up(tmp_path):
    source = write_pairs(tmp_path, [(20, 30)])
    for part in ("images", "annotations"):
        (tmp_path / "ADE" / part).mkdir(parents=True)
        (source / part).rename(tmp_path / "ADE" / part / "validation")
    (record,) = load_records("ADE/images/validation", tmp_path)
    assert record["fpath_segm"] == "ADE/annotations/validation/00.png"


def test_invalid_lists_name_file_and_line(tmp_path):
    for text, message in (
        ('{"fpath_img": "a"}\n{bad\n', "line 2: .*JSON"),
        ('{"width": 3}', "1: fpath_img"),
        ("\n", "empty"),
    ):
        (tmp_path / "x.odgt").write_text(text)
        with pytest.raises(ListError, match=rf"x\.odgt.*{message}"):
            load_records(tmp_path / "x.odgt")


def test_lists_with_paths_blank_lines_and_windows_line_ends(tmp_path):
    (tmp_path / "x.odgt").write_bytes(b'{"fpath_img": "a"}\r\n\r\nb.png c.png\r\n')
    assert load_records(tmp_path / "x.odgt") == [{"fpath_img": "a"}, {"fpath_img": "b.png", "fpath_segm": "c.png"}]
    with pytest.raises(ImageFileError, match=r"00\.png: .*Windows"):
        TestDataset([{"fpath_img": "train\\images\\00.png"}], options())[0]


def test_files_without_a_partner_are_named(tmp_path):
    folder = write_pairs(tmp_path / "d", SIZES[:3])
    (folder / "annotations" / "01.png").rename(folder / "annotations" / "zz.png")
    with pytest.raises(ListError, match=r"2 .*images/01\.png .*annotations/zz\.png"):
        load_records(folder)
    problems = []
    assert len(load_records(folder, problems=problems)) == len(problems) == 2
    (folder / "images" / "00.jpg").write_bytes(b"")
    with pytest.raises(ListError, match=r"00\.jpg and .*00\.png"):
        load_records(folder)
    with pytest.raises(ListError, match=r"nowhere\.odgt .*DATASET\.list_train"):
        load_records("nowhere.odgt", tmp_path)


def test_images_of_all_formats_are_found_in_any_case(tmp_path):
    for name in ("a.JPG", "b.png", "sub/c.Tiff", "d.webp", ".hidden.png", "note.txt", "movie.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    def found():
        return [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]

    assert found() == ["a.JPG", "b.png", "d.webp", "sub/c.Tiff"]
    for link, target in (("self", "."), ("sub/up", ".."), ("twin", "sub")):
        (tmp_path / link).symlink_to(target)
    assert found() == ["a.JPG", "b.png", "d.webp", "sub/c.Tiff", "twin/c.Tiff"]


def test_names_in_composed_and_decomposed_unicode_pair_up(tmp_path):
    """macOS stores an accented letter in a file name as two characters (decomposed, NFD)."""
    write_pairs(tmp_path, SIZES[:1])
    (tmp_path / "images" / "00.png").rename(tmp_path / "images" / "\u00e9.png")
    (tmp_path / "annotations" / "00.png").rename(tmp_path / "annotations" / "e\u0301.png")
    (record,) = load_records(tmp_path)
    assert Path(record["fpath_segm"]).is_file()


def test_paths_outside_the_root_are_absolute(tmp_path):
    folder = write_pairs(tmp_path / "real" / "train", SIZES[:1])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for source, expected in ((folder, str(folder / "images/00.png")), ("train", "train/images/00.png")):
        (record,) = load_records(source, tmp_path / "link")
        assert record["fpath_img"] == expected


def test_ade20k_table_agrees_with_the_files_of_version_2(request):
    table, data = class_table("ade20k"), request.config.rootpath / "data"
    assert np.array_equal(loadmat(data / "color150.mat")["colors"], table.colors)
    rows = (data / "object150_info.csv").read_text().splitlines()[1:]
    assert [row.rsplit(",", 1)[-1] for row in rows] == list(table.names)
    assert table.encode(np.array([0, 1, 150, 151])).tolist() == [-1, 0, 149, -2]
    assert class_table(str(data / "object150_info.csv")).names == table.names


def test_class_tables_from_number_names_and_csv(tmp_path):
    assert class_table("", 3).encode(np.arange(5)).tolist() == [-1, 0, 1, 2, -2]
    listed = class_table(["sky", "road"], 2, ignore_values=(0, 255))
    assert listed.encode(np.array([0, 1, 2, 3, 255])).tolist() == [-1, 0, 1, -2, -1]
    (tmp_path / "t.csv").write_text("raw,name,color\n7,road,#804080\n8,walk,\n9,road,\n0,,\n255,,\n")
    table = class_table(str(tmp_path / "t.csv"), 2)
    assert table.names == ("road", "walk")
    assert table.colors[0].tolist() == [128, 64, 128]
    assert table.encode(np.array([7, 8, 9, 0, 255, 1])).tolist() == [0, 1, 0, -1, -1, -2]
    assert table.describe_raw_values() == "7-9, ignored 0, 255"


def test_invalid_class_tables_name_file_and_line(tmp_path):
    for text, message in (
        ("a,b\n", "raw,name"),
        ("raw,name\n70000,road\n", "line 2: .*70000"),
        ("raw,name\n1,road\n1,walk\n", "line 3: .*'road' and 'walk'"),
        ("raw,name,color\n1,road,red\n", "line 2: .*'red'"),
        ('raw,name\n1,"road\n side"\n', r"DATASET\.num_class is 2"),
        ("raw,name\n1,wall, brick\n", "line 2: .*quotes"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ClassTableError, match=rf"t\.csv.*{message}"):
            class_table(str(tmp_path / "t.csv"), 2)
    (tmp_path / "t.csv").write_text("raw,name\n1,wall,\n2,floor,\n")  # with trailing commas
    assert class_table(str(tmp_path / "t.csv"), 2).names == ("wall", "floor")
    for names, message in ((["a", " "], r"DATASET\.ignore_values"), (["a", " a"], r"DATASET\.classes")):
        with pytest.raises(ClassTableError, match=message):
            class_table(names, 2)


@pytest.mark.parametrize(("count", "minimum"), [(40, 60), (150, 38), (2000, 1)])
def test_default_colors_differ_from_each_other_and_from_black(count, minimum):
    colors = np.vstack([distinct_colors(count).astype(int), [(0, 0, 0)]])
    distances = np.linalg.norm(colors[:, None] - colors, axis=2) + 1000 * np.eye(count + 1)
    assert distances.min() >= minimum


def save(path, image, **kwargs):
    image.save(path, **kwargs)
    return path


def test_all_image_modes_are_read_as_rgb(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
    gray, clear, solid = rgb.convert("L"), rgb.convert("RGBA"), rgb.convert("RGBA")
    clear.putalpha(0)
    gray_16 = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    gray_rgb, white = np.repeat(np.asarray(gray)[..., None], 3, axis=2), np.full((6, 9, 3), 255)
    for image, expected in ((rgb, rgb), (gray, gray_rgb), (gray_16, gray_rgb), (clear, white), (solid, rgb)):
        assert np.array_equal(np.asarray(read_image(save(tmp_path / "a.png", image))), np.asarray(expected))
    red, *others = read_image(save(tmp_path / "c.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))).getpixel((4, 4))
    assert red > 230
    assert max(others) < 40


def test_16_bit_labels_become_classes(tmp_path):
    values = np.arange(0, 1200, dtype=np.uint16).reshape(30, 40)
    assert read_label(save(tmp_path / "b.tiff", Image.fromarray(values % 256))).mode == "L"
    folder = write_pairs(tmp_path / "d", [(40, 30)])
    Image.fromarray(values).save(folder / "annotations" / "00.png")
    item = ValDataset(folder, ".", options(num_class=1199))[0]
    assert np.array_equal(item["seg_label"][0].numpy(), values.astype(np.int64) - 1)
    batch = TrainDataset(folder, ".", options(num_class=1199, segm_downsampling_rate=1, imgSizes=(30,)))[0]
    assert set(batch["seg_label"].unique().tolist()) == set(range(-1, 1199))


@pytest.mark.parametrize("size", [(450, 300), (90, 61), (601, 400)])
def test_fast_resize_differs_from_pillow_by_at_most_one_level(size):
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(300), np.arange(400)) % 256
    pixels = np.stack([ramp, 255 - ramp, 255 * (ramp > 99)], axis=2)
    pixels[100:200] = rng.integers(0, 256, (100, 400, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    exact, fast = (np.asarray(resize(image, size)).astype(int) for resize in (imresize, imresize_fast))
    assert fast.shape == exact.shape
    assert np.abs(fast - exact).max() <= 1
    assert (fast != exact).mean() < 0.01


def test_imagenet_normalization():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    expected = (pixels.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(Image.fromarray(pixels)).numpy(), expected.transpose(2, 0, 1), atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_label_downsampling_is_pillows_nearest(height, width, rate):
    label = np.random.default_rng(height * 41 + width).integers(0, 9, (height, width)).astype(np.int64)
    padded = np.zeros((-(-height // rate) * rate, -(-width // rate) * rate), np.uint8)
    padded[:height, :width] = label + 1
    size = padded.shape[1] // rate, padded.shape[0] // rate
    small = Image.fromarray(padded).resize(size, Image.Resampling.NEAREST)
    assert np.array_equal(downsample_label(label, rate), np.asarray(small).astype(int) - 1)


def test_padding_is_ignored():
    images = [torch.ones(3, 10, 20), torch.ones(3, 16, 9)]
    labels = [np.ones((10, 20), np.int64), np.ones((16, 9), np.int64)]
    batch = pad_batch(images, labels, 8, 4)
    assert batch["img_data"].shape == (2, 3, 16, 24)
    assert batch["seg_label"].shape == (2, 4, 6)
    # Downsampling uses rows 2, 6, 10, ...; the first image has rows 0 to 9.
    assert batch["seg_label"][0].tolist() == [[1] * 5 + [-1]] * 2 + [[-1] * 6] * 2
    assert batch["img_data"][0, :, 10:].abs().sum() == 0


def test_evaluation_item(root):
    item = ValDataset(root, ".", options())[3]
    assert item["img_ori"].shape == (70, 30, 3)
    assert item["seg_label"].shape == (1, 70, 30)
    # Sizes are width x height. 40x93 is rounded to 40x96. imgMaxSize limits 56x131 to 51x120, rounded to 56x120.
    assert [tuple(x.shape) for x in item["img_data"]] == [(1, 3, 96, 40), (1, 3, 120, 56)]
    test = TestDataset([{"fpath_img": str(root / "images/03.png")}], options(), max_sample=-1)[0]
    assert sorted(test) == ["img_data", "img_ori", "info"]
    assert all(torch.equal(a, b) for a, b in zip(item["img_data"], test["img_data"], strict=True))


@pytest.mark.parametrize(("normalization", "crop"), [("imagenet", 0), ("caffe", (32, 40))])
def test_uint8_items_are_bit_identical_after_normalization(root, normalization, crop):
    opt = options(normalization=normalization, crop_size=crop)
    for dataset in (TrainDataset(root, ".", opt, batch_per_gpu=3), ValDataset(root, ".", opt)):
        for index in range(3):
            expected, item = dataset[index], dataset.as_uint8()[index]
            images, scales = images_to_device(item, "cpu"), expected["img_data"]
            pairs = zip(images, scales, strict=True) if isinstance(images, list) else [(images, scales)]
            assert all(torch.equal(a, b) for a, b in pairs)
            assert torch.equal(item["seg_label"], expected["seg_label"])
            assert item["info"] == expected["info"]
            assert item["img_data"][0].dtype == torch.uint8
        assert not dataset.uint8


def test_flips_happen_half_of_the_time_and_can_be_switched_off(tmp_path):
    folder = write_pairs(tmp_path / "d", [(40, 40)])
    left = np.zeros((40, 40), np.uint8)
    left[:, :20] = 1
    Image.fromarray(left).save(folder / "annotations" / "00.png")
    for flag, low, high in ((False, 0, 0), (True, 70, 130)):
        dataset = TrainDataset(folder, ".", options(imgSizes=(40,), random_flip=flag))
        assert low <= sum(int(dataset[i]["seg_label"][0, 0, 0] == -1) for i in range(200)) <= high


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_every_pass_uses_every_record_once(upright, batch_size, seed):
    order, passes = OrientationBatches(upright, batch_size, seed), 3 * batch_size
    for i in range(len(upright) * passes // batch_size - 2 * batch_size):
        assert len({upright[record] for record in order[i]}) == 1
        assert len(order[i]) == batch_size
    # Each pass over the records of one orientation uses every record once. A batch can contain parts of two passes.
    for orientation in (True, False):
        members = {i for i, u in enumerate(upright) if u == orientation}
        stream = [r for i in range(len(upright) * 2) for r in order[i] if upright[r] == orientation]
        for start in range(0, len(stream) - len(members) + 1, max(1, len(members))):
            assert set(stream[start : start + len(members)]) == members


def test_devices_and_shards_partition_batches_and_records(root, tmp_path):
    dataset = TrainDataset(root, ".", options())

    def indices(step, **ranks):
        trainer = make_trainer(tmp_path, world=World(**ranks), num_epoch=1, epoch_iters=4)
        trainer.step = step
        return list(trainer.make_loader(dataset).sampler)

    assert indices(1) == [1, 2, 3]
    assert [indices(0, rank=rank, size=2) for rank in (0, 1)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # Batch indices of two ranks with two devices each, resumed after two steps.
    ranks = [indices(2, rank=rank, size=2, devices=[CPU, CPU]) for rank in (0, 1)]
    assert ranks == [[8, 9, 12, 13], [10, 11, 14, 15]]
    assert shards(7, 3) == [range(2), range(2, 4), range(4, 7)]


def test_batches_are_identical_for_any_number_of_workers_and_after_a_restart(root):
    def batches(start, num_workers):
        dataset = TrainDataset(root, ".", options(), batch_per_gpu=2, seed=7)
        return list(DataLoader(dataset, None, sampler=range(start, 12), num_workers=num_workers))

    reference = batches(0, 0)
    for start, workers in ((0, 1), (5, 2)):
        for expected, batch in zip(reference[start:], batches(start, workers), strict=True):
            assert batch["info"] == expected["info"]
            assert torch.equal(batch["img_data"], expected["img_data"])
            assert torch.equal(batch["seg_label"], expected["seg_label"])
    assert len({tuple(batch["info"]) for batch in reference}) > 3
