"""Splits of one list into a training set and a validation set (DATASET.val_fraction)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import options, write_pairs

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.doctor import sequence_warning
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import sequence_of, split_records

NAMES = st.lists(st.from_regex(r"\A[ab]{1,2}/[xy]{0,2}[0-9]{1,3}z?\.png\Z"), min_size=2, max_size=60, unique=True)


def records_of(names):
    return [{"fpath_img": name} for name in names]


@given(names=NAMES, fraction=st.floats(0.01, 0.9), seed=st.integers(0, 3), groups=st.booleans())
def test_split_is_a_partition_with_the_wanted_size(names, fraction, seed, groups):
    records = records_of(names)
    sequences = {sequence_of(name)[0] for name in names}
    if groups and len(sequences) < 2:
        with pytest.raises(ListError, match=r"DATASET\.val_groups"):
            split_records(records, fraction, seed=seed, groups=groups)
        return
    training, validation = split_records(records, fraction, seed=seed, groups=groups)
    assert training
    assert validation
    assert sorted(map(records.index, training + validation)) == list(range(len(records)))
    if groups:
        parts = [{sequence_of(record["fpath_img"])[0] for record in part} for part in (training, validation)]
        assert not parts[0] & parts[1]
    else:
        assert abs(len(validation) - fraction * len(records)) <= 1
    again = split_records(records[::-1], fraction, seed=seed, groups=groups)
    assert [r["fpath_img"] for r in again[1]][::-1] == [r["fpath_img"] for r in validation]


def test_added_images_keep_most_images_in_their_set():
    names = [f"{i}.png" for i in range(1000)]
    before = {r["fpath_img"] for r in split_records(records_of(names[:900]), 0.2)[1]}
    after = {r["fpath_img"] for r in split_records(records_of(names), 0.2)[1]}
    assert len(before - after) < 30
    assert before != {r["fpath_img"] for r in split_records(records_of(names[:900]), 0.2, seed=1)[1]}


def test_groups_nearest_to_the_wanted_size_are_chosen():
    names = [f"{drive}_{i}.png" for drive, count in (("a", 62), ("b", 101), ("c", 204)) for i in range(count)]
    for seed in range(5):
        validation = split_records(records_of(names), 0.2, seed=seed, groups=True)[1]
        assert len(validation) in (62, 101)


def test_sequences_are_the_names_before_the_last_number():
    assert sequence_of("a/0016E5_08131.jpg") == sequence_of("a/0016E5_8.png")[:1] + (8131,)
    assert sequence_of("a/x1_left.png") == ("a/x#", 1)
    assert sequence_of("a/scene.png") == ("a/scene.png", -1)


def test_datasets_use_disjoint_parts(tmp_path):
    write_pairs(tmp_path / "all", [(60, 40)] * 10)
    opt = options(val_fraction=0.3, val_groups=False, val_seed=0)
    training, validation = (kind(tmp_path, "all", opt).records for kind in (TrainDataset, ValDataset))
    names = [{record["fpath_img"] for record in part} for part in (training, validation)]
    assert [len(part) for part in names] == [7, 3]
    assert not names[0] & names[1]


def thumbnails(rng, length, *, video=True):
    """Return the frames of a video, which change slowly, or independent images."""
    image, frames = rng.uniform(0, 255, (16, 16)), {}
    for i in range(length):
        image = image + rng.normal(0, 2, image.shape) if video else rng.uniform(0, 255, image.shape)
        frames[f"images/video_{i:04d}.png"] = image.astype(np.float32)
    return frames


@pytest.mark.parametrize("video", [True, False])
def test_doctor_warns_if_validation_images_are_neighbors_of_training_images(video):
    frames = thumbnails(np.random.default_rng(0), 60, video=video)
    validation = {name: frames.pop(name) for name in list(frames)[::5]}
    warning = sequence_warning(frames, validation)
    assert ("DATASET.val_groups" in warning) == video


def test_doctor_does_not_warn_about_another_sequence():
    rng = np.random.default_rng(0)
    first, second = thumbnails(rng, 30), thumbnails(rng, 30)
    assert sequence_warning(first, {name.replace("video", "other"): x for name, x in second.items()}) == ""
