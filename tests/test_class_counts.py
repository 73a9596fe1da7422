"""Counting the pixels of every class, sampling by class, and class weights."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from runs import here, small, words
from scenes import options, write_data_set, write_pairs

from mit_semseg import build
from mit_semseg.config import ConfigError, load_config
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.class_counts import class_counts
from mit_semseg.dataset.image_io import ImageFileError
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.samplers import class_probabilities, draw_by_class
from mit_semseg.engine import RunFolder
from mit_semseg.engine.losses import balanced_class_weights
from mit_semseg.lib.utils import cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path):
    return ValDataset(write_data_set(tmp_path / "data"), "train", options())


def cached_files():
    return sorted((cache_dir() / "class_counts").glob("*"))


def test_counts_equal_a_direct_count_and_are_cached(dataset):
    labels = [np.asarray(Image.open(dataset.path(record, "fpath_segm"))) for record in dataset.records]
    expected = [[int((label == value).sum()) for value in (1, 2, 3)] for label in labels]
    assert class_counts(dataset).tolist() == expected
    (file,) = cached_files()
    np.save(file, np.full((4, 3), 7))
    assert (class_counts(dataset) == 7).all()


def test_changed_label_or_class_table_is_counted_again(dataset, tmp_path):
    first = class_counts(dataset)
    path = dataset.path(dataset.records[0], "fpath_segm")
    Image.fromarray(np.full((40, 60), 2, np.uint8)).save(path)
    assert class_counts(dataset)[0].tolist() == [0, 2400, 0]
    named = ValDataset(tmp_path / "data", "train", options(classes=("a", "b", "c"), ignore_values=(1,), num_class=3))
    assert not np.array_equal(class_counts(named)[1:], first[1:])
    assert len(cached_files()) == 3


def test_unusable_label_is_named_or_has_no_pixels(dataset):
    path = dataset.path(dataset.records[2], "fpath_segm")
    path.write_bytes(b"damaged")
    with pytest.raises(ImageFileError, match=path.name):
        class_counts(dataset)
    counts = class_counts(dataset.with_skipping())
    assert not counts[2].any()
    assert counts[[0, 1, 3]].any(axis=1).all()
    del dataset.records[2]["fpath_segm"]
    with pytest.raises(ListError, match="fpath_segm"):
        class_counts(dataset)
    assert np.array_equal(class_counts(dataset.with_skipping()), counts)


COUNTS = arrays(np.int64, (7, 4), elements=st.integers(0, 1000)).filter(np.any)


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.floats(0.001, 10))
def test_class_probabilities_equal_their_definition(counts, temperature):
    got = class_probabilities(counts, temperature)
    pixels = counts.sum(0)
    exponents = [np.longdouble(1 - p / pixels.sum()) / temperature for p in pixels]
    total = sum(np.exp(e - max(exponents)) for e, p in zip(exponents, pixels, strict=True) if p)
    expected = [np.exp(e - max(exponents)) / total if p else 0 for e, p in zip(exponents, pixels, strict=True)]
    np.testing.assert_allclose(got, np.array(expected, float), rtol=1e-9, atol=1e-300)


@settings(max_examples=50, deadline=None)
@given(COUNTS)
def test_balanced_class_weights_equal_their_definition(counts):
    pixels = counts.sum(0)
    expected = [math.sqrt(pixels.sum() / p) if p else 1 for p in pixels.tolist()]
    assert balanced_class_weights(counts) == pytest.approx(expected, rel=1e-12)


def test_automatic_class_weights_are_those_of_the_training_set(dataset, tmp_path):
    cfg = load_config(None, words(small(tmp_path / "data", tmp_path / "run", TRAIN__class_weights="auto"))[2:])
    module = build.build_module(cfg, torch.device("cpu"), dataset=build.build_data(cfg)[0])
    assert module.crit.weight.tolist() == pytest.approx(balanced_class_weights(class_counts(dataset)))
    folder = RunFolder(cfg.DIR)
    folder.folder.mkdir()
    folder.save_weights(module, "epoch_1.pth")
    shutil.rmtree(tmp_path / "data")  # evaluation does not count the pixels of the training set
    assert build.build_module(cfg, torch.device("cpu"), checkpoint="epoch_1.pth").crit.weight is None


@pytest.mark.parametrize("value", ["balanced", "(1,2)"])
def test_invalid_class_weights_are_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"TRAIN\.class_weights.*3"):
        load_config(None, words(small(tmp_path, tmp_path, TRAIN__class_weights=value))[2:])


def test_images_are_drawn_by_the_classes_they_contain():
    """Class 2 is in record 0 only; records 1 to 9 have class 0; class 1 is absent."""
    counts = np.zeros((10, 3), np.int64)
    counts[1:, 0], counts[0, 2] = 1000, 10
    draws = draw_by_class(counts > 0, np.array([0.25, 0, 0.75]), np.random.default_rng(0))
    assert len(draws) == 10
    rng = np.random.default_rng(1)
    draws = np.concatenate([draw_by_class(counts > 0, np.array([0.25, 0, 0.75]), rng) for _ in range(1000)])
    frequency = np.bincount(draws, minlength=10) / len(draws)
    np.testing.assert_allclose(frequency, [0.75, *[0.25 / 9] * 9], atol=0.015)


def test_sampled_batches_depend_only_on_seed_and_index(tmp_path):
    """Images 2 and 3 alone have the rare class. Orientations are not mixed, and any batch can be computed first."""
    root = write_pairs(tmp_path / "data" / "train", [(60, 40), (40, 60)], values=(1, 2)).parent
    for index, (width, height) in enumerate([(60, 40), (40, 60)], start=2):
        label = np.ones((height, width), np.uint8)
        label[:2, :2] = 3
        Image.fromarray(label).save(root / "train" / "annotations" / f"{index:02d}.png")
        Image.new("RGB", (width, height)).save(root / "train" / "images" / f"{index:02d}.png")
    opt = options(class_sampling=0.05)
    batches = [TrainDataset(root, "train", opt, 2).order[i] for i in range(200)]
    other = TrainDataset(root, "train", opt, 2)
    assert [other.order[i] for i in reversed(range(200))] == batches[::-1]
    assert all(len({record % 2 for record in batch}) == 1 for batch in batches)
    rare = np.mean([record in (2, 3) for batch in batches for record in batch])
    assert rare > 0.9


def test_labels_without_classes_are_sampled_like_others(tmp_path):
    root = write_pairs(tmp_path / "data" / "train", [(60, 40), (40, 60)], values=(0,)).parent
    assert len(TrainDataset(root, "train", options(class_sampling=0.01), 1)[0]["info"]) == 1
    here("train.py", small(root, tmp_path / "run", TRAIN__class_weights="auto", DATASET__list_val="train"))
