"""Variation of training pictures: what moves with the picture moves with the label, and nothing else changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import options, write_pairs

from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.augment import Augmentation, blurred, draw_crop, largest_share, recolor
from mit_semseg.dataset.classes import IGNORE
from mit_semseg.dataset.transforms import CAFFE_MEAN, normalize


def rng(seed=0):
    return np.random.default_rng(seed)


def coded(height, width):
    """A picture whose colour says where each pixel is, and a label that says the same."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)
    return Image.fromarray(pixels), rows * 1000 + columns


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 2**32))
def test_a_crop_takes_the_same_region_of_both(height, width, size, seed):
    image, label = coded(height, width)
    image, label = Augmentation(crop=size)(image, label, rng(seed))
    assert label.shape == (min(height, size[0]), min(width, size[1])) == image.size[::-1]
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(pixels[..., 0] * 1000 + pixels[..., 1], label)


def test_crops_reach_every_corner():
    _, label = coded(12, 20)
    corners = {draw_crop(label, (10, 10), rng(seed))[:2] for seed in range(400)}
    assert corners == {(left, top) for left in range(11) for top in range(3)}


def test_class_balanced_crops_avoid_what_one_class_fills():
    label = np.zeros((60, 60), np.int64)
    label[:, 30:] = 1
    label[:20] = IGNORE
    free = [largest_share(cut(label, draw_crop(label, (20, 20), rng(i)))) for i in range(200)]
    balanced = [largest_share(cut(label, draw_crop(label, (20, 20), rng(i), 0.75))) for i in range(200)]
    assert np.mean(np.array(free) >= 0.75) > 0.4
    assert np.mean(np.array(balanced) >= 0.75) < 0.15  # a quarter of the places will do, ten are tried
    assert largest_share(np.full((3, 3), IGNORE)) == 1


def cut(label, box):
    left, top, right, bottom = box
    return label[top:bottom, left:right]


def test_draws_repeat_with_the_seed():
    image = Image.fromarray(rng().integers(0, 256, (40, 50, 3), dtype=np.uint8))
    label = rng().integers(0, 3, (40, 50))
    vary = Augmentation(crop=(20, 30), max_ratio=0.5, jitter=0.5, blur=2.0)
    results = [vary(image, label, rng(seed)) for seed in (1, 1, 2)]
    pixels = [np.asarray(picture) for picture, _ in results]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    picture, same_label = Augmentation()(image, label, rng())
    assert picture is image
    assert same_label is label


def test_colours_and_blur_leave_the_label_and_the_size():
    image = Image.fromarray(rng().integers(0, 256, (30, 41, 3), dtype=np.uint8))
    label = rng().integers(0, 3, (30, 41))
    picture, same_label = Augmentation(jitter=1.0, blur=5.0)(image, label, rng(3))
    assert picture.size == image.size
    assert picture.mode == "RGB"
    assert same_label is label
    assert not np.array_equal(np.asarray(picture), np.asarray(image))


def test_recolor():
    image = Image.new("RGB", (4, 4), (100, 50, 200))
    assert np.array_equal(np.asarray(recolor(image, 1, 1, 1, 0)), np.asarray(image))
    assert recolor(image, 0.5, 1, 1, 0).getpixel((0, 0)) == (50, 25, 100)
    grey = recolor(image, 1, 1, 0, 0).getpixel((0, 0))
    assert max(grey) - min(grey) <= 1


def test_blur_is_a_gaussian():
    """Of a bright dot remains a bell of that standard deviation, and the sum of the light."""
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[18:23, 18:23] = 255
    result = np.asarray(blurred(Image.fromarray(pixels), 3.0), float)[..., 0]
    place = np.arange(41) - 20
    variance = (result.sum(0) * place**2).sum() / result.sum()
    assert variance == pytest.approx(3.0**2 * 0.97 + 2.0, rel=0.1)  # cut off at three deviations; the dot's own is 2
    assert result.sum() == pytest.approx(25 * 255, rel=0.05)
    for size in ((1, 1), (2, 30), (3, 3)):  # smaller than the kernel
        assert blurred(Image.new("RGB", size), 8.0).size == size


def test_caffe_normalization():
    image = Image.new("RGB", (2, 3), (10, 20, 30))
    expected = torch.tensor([30.0, 20.0, 10.0]) - torch.tensor(CAFFE_MEAN)
    torch.testing.assert_close(normalize(image, "caffe"), expected.view(3, 1, 1).expand(3, 3, 2))
    with pytest.raises(ValueError, match="normalization 'bgr': choose one of imagenet, caffe"):
        normalize(image, "bgr")


@pytest.fixture
def data(tmp_path):
    write_pairs(tmp_path / "train", [(60, 40), (30, 70), (20, 20), (90, 90)])
    return tmp_path


def test_batches_of_crops(data):
    """One size whatever the pictures; what the pictures do not fill is mean colour and ignored."""
    changes = {"random_scale": (0.5, 1.5), "crop_size": 49, "segm_downsampling_rate": 1}
    dataset = TrainDataset(data, "train", options(**changes), batch_per_gpu=3, seed=1)
    padded = 0
    for index in range(8):
        batch = dataset[index]
        assert batch["img_data"].shape == (3, 3, 49, 49)
        assert batch["seg_label"].shape == (3, 49, 49)
        empty = (batch["img_data"] == 0).all(1)
        assert (batch["seg_label"][empty] == IGNORE).all()
        padded += int(empty.any())
        again = dataset[index]
        assert torch.equal(batch["img_data"], again["img_data"])
    assert padded
    upright = {record["height"] > record["width"] for record in dataset.records}
    assert upright == {True, False}  # and yet they share batches
    mixed = [{dataset.records[i]["height"] > dataset.records[i]["width"] for i in dataset.order[n]} for n in range(8)]
    assert any(len(kinds) == 2 for kinds in mixed)


@pytest.mark.parametrize("rate", [1, 4, 8])
def test_the_label_of_a_crop_is_rounded_up(data, rate):
    dataset = TrainDataset(data, "train", options(crop_size=(33, 49), segm_downsampling_rate=rate), batch_per_gpu=1)
    assert dataset[0]["seg_label"].shape == (1, -(-33 // rate), -(-49 // rate))


def test_random_scale_is_of_the_pictures_own_size(data):
    dataset = TrainDataset(data, "train", options(random_scale=(0.5, 0.5), padding_constant=8), batch_per_gpu=1)
    sizes = {tuple(dataset[i]["img_data"].shape[-2:]) for i in range(12)}
    assert sizes == {(24, 32), (40, 16), (16, 16), (48, 48)}


def test_options_of_old_callers_vary_nothing(data):
    values = vars(options())
    old = SimpleNamespace(**{k: v for k, v in values.items() if k not in ("normalization", "crop_size")})
    dataset = TrainDataset(data, "train", old, batch_per_gpu=1)
    assert dataset.augmentation == Augmentation()
    assert dataset[0]["img_data"].shape[1] == 3
