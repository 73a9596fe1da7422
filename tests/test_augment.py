"""Data augmentation crops image and label alike; color changes and blur do not change the label."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import options, write_pairs

from mit_semseg.dataset import TrainDataset, class_table
from mit_semseg.dataset.augment import (
    Augmentation,
    adjust_colors,
    gaussian_blur,
    largest_class_fraction,
    mix_classes,
    random_crop,
)
from mit_semseg.dataset.classes import IGNORE
from mit_semseg.dataset.records import add_sizes
from mit_semseg.dataset.transforms import CAFFE_MEAN, normalize


def rng(seed=0):
    return np.random.default_rng(seed)


def unchanged(label):
    return label


def random_image(height, width):
    return Image.fromarray(rng().integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 2**32))
def test_image_and_label_get_the_same_crop(height, width, size, seed):
    rows, columns = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8))
    image, label = Augmentation(crop=size)(image, rows * 1000 + columns, unchanged, rng(seed))
    assert label.shape == (min(height, size[0]), min(width, size[1])) == image.size[::-1]
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(pixels[..., 0] * 1000 + pixels[..., 1], label)


def test_crops_reach_every_position():
    positions = {random_crop(np.zeros((12, 20)), unchanged, (10, 10), rng(seed))[0][:2] for seed in range(400)}
    assert positions == {(left, top) for left in range(11) for top in range(3)}


def test_balanced_crops_avoid_a_dominant_class():
    raw = np.full((60, 60), 1)
    raw[:, 30:] = 2
    raw[:20] = 0
    encode = class_table("", 2).encode

    def dominated(max_ratio):
        crops = [random_crop(raw, encode, (20, 20), rng(i), max_ratio)[1] for i in range(200)]
        return np.mean([largest_class_fraction(crop) >= 0.75 for crop in crops])

    assert dominated(1.0) > 0.4
    assert dominated(0.75) < 0.15  # a quarter of the crops are balanced, and ten crops are tried
    assert largest_class_fraction(np.full((3, 3), IGNORE)) == 1


def test_augmentation_depends_on_the_seed_alone():
    image, label = random_image(40, 50), rng().integers(0, 3, (40, 50))
    augmentation = Augmentation(crop=(20, 30), max_ratio=0.5, jitter=0.5, blur=2.0)
    first, same, other = (np.asarray(augmentation(image, label, unchanged, rng(seed))[0]) for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert Augmentation()(image, label, unchanged, rng())[0] is image
    assert Augmentation(jitter=1.0, blur=5.0)(image, label, unchanged, rng(3))[1] is label


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 2**32))
def test_class_mix_pastes_half_of_the_classes_of_the_previous_image(sizes, seed):
    labels = [rng(i).integers(IGNORE, 5, size) for i, size in enumerate(sizes)]
    images = [torch.from_numpy(np.stack([label, np.full_like(label, i)])) for i, label in enumerate(labels)]
    copies = [image.clone() for image in images], [label.copy() for label in labels]
    mixed_images, mixed_labels = mix_classes(images, labels, 1.0, rng(seed))
    assert all(torch.equal(a, b) for a, b in zip(images, copies[0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(labels, copies[1], strict=True))
    for i, (image, label) in enumerate(zip(mixed_images, mixed_labels, strict=True)):
        source = np.full((9, 9), IGNORE)
        source[: sizes[i - 1][0], : sizes[i - 1][1]] = labels[i - 1]
        source = source[: sizes[i][0], : sizes[i][1]]
        pasted = image[1].numpy() != i
        assert np.array_equal(image[0], label)  # image and label have the same pasted pixels
        assert np.array_equal(label, np.where(pasted, source, labels[i]))
        if len(sizes) > 1:
            chosen, present = set(source[pasted]), set(labels[i - 1].flat) - {IGNORE}
            assert len(chosen) <= (len(present) + 1) // 2
            assert not chosen & set(source[~pasted])
            assert IGNORE not in chosen


def test_class_mix_changes_images_with_the_given_probability():
    images, labels = list(torch.arange(200.0).view(200, 1, 1, 1)), [np.zeros((1, 1), int)] * 200
    mixed, _ = mix_classes(images, labels, 0.25, rng())
    assert 30 < sum(not torch.equal(a, b) for a, b in zip(images, mixed, strict=True)) < 70


def test_color_factors():
    image = Image.new("RGB", (4, 4), (100, 50, 200))
    assert np.array_equal(np.asarray(adjust_colors(image, 1, 1, 1, 0)), np.asarray(image))
    assert adjust_colors(image, 0.5, 1, 1, 0).getpixel((0, 0)) == (50, 25, 100)
    gray = adjust_colors(image, 1, 1, 0, 0).getpixel((0, 0))
    assert max(gray) - min(gray) <= 1


def test_blur_has_the_standard_deviation_of_the_gaussian():
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[18:23, 18:23] = 255
    result = np.asarray(gaussian_blur(Image.fromarray(pixels), 3.0), float)[..., 0]
    position = np.arange(41) - 20
    variance = (result.sum(0) * position**2).sum() / result.sum()
    # Truncation reduces the variance of the kernel to 97 %; the square of 5 x 5 pixels has variance 2.
    assert variance == pytest.approx(3.0**2 * 0.97 + 2.0, rel=0.1)
    assert result.sum() == pytest.approx(25 * 255, rel=0.05)
    for size in ((1, 1), (2, 30), (3, 3)):  # images smaller than the kernel
        assert gaussian_blur(Image.new("RGB", size), 8.0).size == size


def test_caffe_normalization():
    image = Image.new("RGB", (2, 3), (10, 20, 30))
    expected = torch.tensor([30.0, 20.0, 10.0]) - torch.tensor(CAFFE_MEAN)
    torch.testing.assert_close(normalize(image, "caffe"), expected.view(3, 1, 1).expand(3, 3, 2))
    with pytest.raises(ValueError, match="'bgr'"):
        normalize(image, "bgr")


@pytest.fixture
def data(tmp_path):
    write_pairs(tmp_path / "train", [(60, 40), (30, 70), (20, 20), (90, 90)])
    return tmp_path


def test_crops_have_one_size_and_mix_orientations(data):
    opt = options(random_scale=(0.5, 1.5), crop_size=49, segm_downsampling_rate=1)
    dataset = TrainDataset(data, "train", opt, batch_per_gpu=3, seed=1)
    upright = [record["height"] > record["width"] for record in add_sizes(dataset.records, data)]
    padded = 0
    for index in range(8):
        batch = dataset[index]
        assert batch["img_data"].shape == (3, 3, 49, 49)
        assert batch["seg_label"].shape == (3, 49, 49)
        padding = (batch["img_data"] == 0).all(1)
        assert (batch["seg_label"][padding] == IGNORE).all()
        padded += int(padding.any())
        assert torch.equal(batch["img_data"], dataset[index]["img_data"])
    assert padded
    assert any(len({upright[i] for i in dataset.order[index]}) == 2 for index in range(8))


def test_random_scale_is_relative_to_the_original_size(data):
    dataset = TrainDataset(data, "train", options(random_scale=(0.5, 0.5), padding_constant=8), batch_per_gpu=1)
    sizes = {tuple(dataset[i]["img_data"].shape[-2:]) for i in range(12)}
    assert sizes == {(24, 32), (40, 16), (16, 16), (48, 48)}


def test_batches_with_class_mix_depend_on_seed_and_index_alone(data):
    opt = options(crop_size=40, segm_downsampling_rate=1)
    plain, mixed, again = (
        TrainDataset(data, "train", opt, batch_per_gpu=3, seed=1)
        for opt in (opt, *[options(**vars(opt), class_mix=0.5)] * 2)
    )
    changed = 0
    for index in (5, 0, 3):
        batch = mixed[index]
        assert all(torch.equal(batch[key], again[index][key]) for key in ("img_data", "seg_label"))
        assert batch["info"] == plain[index]["info"]
        changed += int((batch["seg_label"] != plain[index]["seg_label"]).any((1, 2)).sum())
    assert 1 <= changed <= 8
