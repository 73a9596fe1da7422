"""Splits of one list into a training set and a validation set (DATASET.val_fraction)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import options, write_pairs

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.doctor import sequence_warning
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import sequences_of, split_records

NAMES = st.lists(st.from_regex(r"\A[ab]{1,2}/[xy]{0,2}[0-9]{1,3}z?\.png\Z"), min_size=2, max_size=60, unique=True)


def records_of(names):
    return [{"fpath_img": name} for name in names]


@given(names=NAMES, fraction=st.floats(0.01, 0.9), seed=st.integers(0, 3), groups=st.booleans())
def test_split_is_a_partition_with_the_wanted_size(names, fraction, seed, groups):
    records = records_of(names)
    sequences = dict(zip(names, (name for name, _ in sequences_of(names)), strict=True))
    if groups and len(set(sequences.values())) < 2:
        with pytest.raises(ListError, match=r"DATASET\.val_groups"):
            split_records(records, fraction, seed=seed, groups=groups)
        return
    training, validation = split_records(records, fraction, seed=seed, groups=groups)
    assert training
    assert validation
    assert sorted(map(records.index, training + validation)) == list(range(len(records)))
    if groups:
        parts = [{sequences[record["fpath_img"]] for record in part} for part in (training, validation)]
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


@pytest.mark.parametrize(
    ("names", "sequences"),
    [
        (
            ["a/0016E5_08131.jpg", "a/0016E5_8.png", "b/scene.png"],
            [("a/0016E5_#", 8131), ("a/0016E5_#", 8), (None, -1)],
        ),
        (["a/x1_left.png", "a/x2_left.png"], [("a/x#", 1), ("a/x#", 2)]),
        (["x_000019_leftImg8bit.png", "x_000020_leftImg8bit.png"], [("x_#", 19), ("x_#", 20)]),
        (["000000_10.png", "000001_10.png"], [("#", 0), ("#", 1)]),
        (["100.png", "200.png", "1300.png"], [("#", 100), ("#", 200), ("#", 1300)]),
        (["v1/7.png", "v2/7.png"], [("v1/#", 7), ("v2/#", 7)]),
    ],
)
def test_sequences_are_the_names_before_the_last_number(names, sequences):
    expected = [(name or path, number) for path, (name, number) in zip(names, sequences, strict=True)]
    assert sequences_of(names) == expected


def test_split_does_not_depend_on_the_folder_of_absolute_paths():
    names = [f"drive/{i}.png" for i in range(30)]
    parts = []
    for folder in ("/data", "/mnt/scratch/data"):
        validation = split_records(records_of([f"{folder}/{name}" for name in names]), 0.3)[1]
        parts.append([record["fpath_img"].removeprefix(folder) for record in validation])
    assert parts[0] == parts[1]


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


@pytest.mark.parametrize("suffix", ["", "_leftImg8bit"])
@pytest.mark.parametrize("video", [True, False])
def test_doctor_warns_if_validation_images_are_neighbors_of_training_images(video, suffix):
    frames = thumbnails(np.random.default_rng(0), 60, video=video)
    frames = {name.replace(".png", f"{suffix}.png"): frame for name, frame in frames.items()}
    validation = {name: frames.pop(name) for name in list(frames)[::5]}
    warning = sequence_warning(frames, validation)
    assert ("DATASET.val_groups" in warning) == video


def test_doctor_does_not_warn_about_another_sequence():
    rng = np.random.default_rng(0)
    first, second = thumbnails(rng, 30), thumbnails(rng, 30)
    assert sequence_warning(first, {name.replace("video", "other"): x for name, x in second.items()}) == ""


def test_doctor_compares_nothing_if_one_list_is_unusable():
    frames = thumbnails(np.random.default_rng(0), 3)
    assert sequence_warning({}, frames) == sequence_warning(frames, {}) == ""
