"""A data set in which everything is wrong once: every fault is named, stops the run or is left out and counted."""

import json
import resource

import pytest
import torch
from damage import write_unusable, write_unusual
from PIL import Image
from runs import SMALL, here, same, weights, words
from scenes import options, tiny_module, write_data_set, write_pairs

from mit_semseg.config import OPTIONS
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.image_io import ImageFileError, ImageLimits, read_image
from mit_semseg.dataset.layouts import ListError
from mit_semseg.evaluation import evaluate

SKIP = {"DATASET_on_error": "skip"}


class Damaged:
    """A folder with sound pictures (train, val), and what is wrong with those of the lists beside them."""

    def __init__(self, folder):
        self.folder = write_data_set(folder)
        self.faults, self.oddities = write_unusable(folder), write_unusual(folder)
        lists = [folder / f"{name}.odgt" for name in ("unusable", "unusual")]
        (folder / "mixed.odgt").write_text("\n".join(path.read_text() for path in lists))

    def options(self, **changes):
        return {
            **SMALL,
            "DATASET.root_dataset": self.folder,
            **{key.replace("_", ".", 1): v for key, v in changes.items()},
        }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Damaged(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert here("train.py", "--gpu", "cpu", *words(data.options(DIR=folder, TRAIN_epoch_iters=1))).returncode == 0
    return folder


def test_the_doctor_names_each(data):
    done = here("mit_semseg.dataset.doctor", *words(data.options(DATASET_list_train="mixed.odgt")))
    assert done.returncode == 1
    unusable = [line for line in done.stdout.splitlines() if line.startswith("  UNUSABLE")]
    assert len(unusable) == len(data.faults)
    for fault in data.faults:
        assert sum(fault in line for line in unusable) == 1, fault
    notes = "\n".join(line for line in done.stdout.splitlines() if "note:" in line)
    for name in data.oddities:
        plain = any(word in name for word in ("exif_1", "späße", "nnn", "label_of"))  # nothing is unusual about these
        assert (name in notes) != plain, name
    assert "checksum" in notes
    print(f"{len(data.faults)} kinds of damage, {len(data.oddities)} of oddity")


@pytest.mark.parametrize("kind", [TrainDataset, ValDataset])
def test_each_stops_with_its_name(data, kind):
    lines = (data.folder / "unusable.odgt").read_text().split("\n")
    for number, (line, fault) in enumerate(zip(lines, data.faults, strict=True), start=1):
        (data.folder / "one.odgt").write_text("\n" * (number - 1) + line)
        with pytest.raises((ImageFileError, ListError)) as caught:
            kind(data.folder, "one.odgt", options(imgSizes=(40,)))[0]
        assert fault in str(caught.value)


def test_what_only_looks_odd_is_used(data):
    dataset = ValDataset(data.folder, "unusual.odgt", options(imgSizes=(40,)))
    result = evaluate(tiny_module(), dataset, workers=0)
    assert result.images == len(dataset) == len(data.oddities)
    assert torch.tensor([score.accuracy for score in result.scores]).isfinite().all()


def test_evaluation_leaves_out_and_counts(data, trained):
    """The figures are those of the usable pictures alone, and everything else is counted, whoever does the work."""
    figures = {}
    for name, script, gpus, changes in (
        ("alone", "eval.py", "cpu", {"DATASET_list_val": "unusual.odgt"}),
        ("mixed", "eval.py", "cpu", {"DATASET_list_val": "mixed.odgt", **SKIP, "VAL_visualize": True}),
        ("shared", "eval_multipro.py", "cpu,cpu", {"DATASET_list_val": "mixed.odgt", **SKIP}),
    ):
        done = here(script, "--gpu", gpus, *words(data.options(DIR=trained, **changes)))
        assert done.returncode == (0 if name == "alone" else 1), done.stderr
        figures[name] = json.loads((trained / "result" / "results.json").read_text())
    for name in ("mixed", "shared"):
        assert figures[name]["images"] == figures["alone"]["images"] == len(data.oddities)
        assert len(figures[name]["skipped"]) == len(data.faults)
        assert figures[name]["iou_per_class"] == figures["alone"]["iou_per_class"]
    assert sorted(figures["mixed"]["skipped"]) == sorted(figures["shared"]["skipped"])
    assert f"{len(data.faults)} left out" in (trained / "result" / "report.html").read_text()
    panels = [path for path in (trained / "result").rglob("*.png") if path.name != "confusion.png"]
    assert len(panels) == len(data.oddities)


def test_training_leaves_out_and_counts(data, tmp_path):
    changes = {**SKIP, "DATASET_list_train": "mixed.odgt", "DATASET_list_val": "mixed.odgt", "TRAIN_eval_epoch": 1}
    changes |= {"TRAIN_epoch_iters": 12, "TRAIN_num_epoch": 1, "TRAIN_checkpoint_iters": 4}
    done = here("train.py", "--gpu", "cpu", *words(data.options(**changes, DIR=tmp_path / "a")))
    assert done.returncode == 1, done.stderr
    logged, _, told = done.stdout.partition(f"{len(data.faults)} left out in this run:")
    assert logged.count("left out: ") == len(data.faults)
    assert all(fault in told for fault in data.faults)
    # A run that is continued neither forgets nor repeats them.
    done = here("train.py", "--gpu", "cpu", *words(data.options(**changes, DIR=tmp_path / "a", TRAIN_resume="auto")))
    assert done.returncode == 1
    assert f"{len(data.faults)} left out in this run:" in done.stdout
    # What comes in the place of a picture does not depend on who reads it.
    changes |= {"TRAIN_eval_epoch": 0, "TRAIN_workers": 2}
    assert here("train.py", "--gpu", "cpu", *words(data.options(**changes, DIR=tmp_path / "b"))).returncode == 1
    assert same(*(weights(tmp_path / name, "epoch_1.pth") for name in "ab"))


def test_what_takes_a_picture_s_place_is_of_its_orientation(data):
    """The other pictures of the batch are what they would have been."""
    sizes = [(60, 40), (40, 60), (52, 44), (44, 64), (40, 60)]
    names = [f"{i:02d}.png" for i in (0, 1, 2, 3, 1)]
    records = [
        {"fpath_img": f"train/images/{name}", "fpath_segm": f"train/annotations/{name}", "width": w, "height": h}
        for name, (w, h) in zip(names, sizes, strict=True)
    ]
    sound = TrainDataset(data.folder, records, options(), 2)
    dataset = TrainDataset(
        data.folder, [*records[:4], {**records[4], "fpath_img": "gone.png"}], options(on_error="skip"), 2
    )
    replaced = [number for number in range(40) if 4 in dataset.order[number]]
    gone = {f"{data.folder}/gone.png: no such file"}
    assert replaced
    for number in range(40):
        batch, expected = dataset[number], sound[number]
        assert set(batch["skipped"]) == (gone if number in replaced else set())
        assert "gone.png" not in batch["info"]
        for i, record in enumerate(dataset.order[number]):
            upright = batch["img_data"].size(2) > batch["img_data"].size(3)
            assert upright == (records[record]["height"] > records[record]["width"])
            if record != 4:
                height, width = (min(b["img_data"].size(d) for b in (batch, expected)) for d in (2, 3))
                assert torch.equal(
                    batch["img_data"][i, :, :height, :width], expected["img_data"][i, :, :height, :width]
                )


def test_the_only_picture_of_its_orientation_is_replaced_by_another(tmp_path):
    write_pairs(tmp_path / "train", [(60, 40)] * 3 + [(40, 60)])
    (tmp_path / "train" / "images" / "03.png").write_bytes(b"")
    dataset = TrainDataset(tmp_path, "train", options(on_error="skip"), 1)
    for number in range(8):
        assert dataset[number]["info"] != ["train/images/03.png"]
    with pytest.raises(ImageFileError, match=r"03\.png"):
        [TrainDataset(tmp_path, "train", options(), 1)[number] for number in range(8)]


@pytest.mark.parametrize("skip", [True, False])
def test_folders_in_which_nothing_pairs_up(tmp_path, skip):
    write_pairs(tmp_path / "train", [(60, 40)] * 2)
    for path in (tmp_path / "train" / "annotations").iterdir():
        path.rename(path.with_stem(f"{path.stem}_label"))
    with pytest.raises(ListError, match=r"(no|4) files (do not )?pair up: .*00\.png has no partner"):
        TrainDataset(tmp_path, "train", options(on_error="skip" if skip else "stop"))


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_nothing_usable_is_said(data, trained, tmp_path, name):
    lines = (data.folder / "unusable.odgt").read_text().split("\n")
    (data.folder / "nothing.odgt").write_text(
        "\n".join(line for line in lines if "truncated" in line or "page" in line)
    )
    (trained / "result" / "results.json").unlink(missing_ok=True)
    changes = {**SKIP, "DATASET_list_train": "nothing.odgt", "DATASET_list_val": "nothing.odgt"}
    folder = tmp_path if name == "train.py" else trained
    done = here(name, "--gpu", "cpu", *words(data.options(**changes, DIR=folder)))
    assert done.returncode == 2
    assert {
        "train.py": "cannot be used, DATASET.on_error skip finds none to go on with; the last: ",
        "eval.py": "none of the 2 pictures can be used; the first: ",
    }[name] in done.stderr
    assert not (folder / "result" / "results.json").exists()


def test_limits_of_pixels_and_bytes(data):
    path = data.folder / "train" / "images" / "00.png"  # 60 x 40
    size = path.stat().st_size
    assert read_image(path, limits=ImageLimits(pixels=2400, bytes=size)).size == (60, 40)
    with pytest.raises(ImageFileError, match=r"00\.png: 60x40 .*DATASET\.max_pixels allows 2399"):
        read_image(path, limits=ImageLimits(pixels=2399))
    with pytest.raises(ImageFileError, match=rf"00\.png: .*DATASET\.max_bytes allows {size - 1}"):
        read_image(path, limits=ImageLimits(bytes=size - 1))


def test_sizes_are_read_within_the_limits_of_the_options(data):
    """Where a list names none: the limits are those that were asked for, not the reader's own."""
    record = {"fpath_img": "images/00.png", "fpath_segm": "annotations/00.png"}
    with pytest.raises(ImageFileError, match=r"DATASET\.max_bytes allows 20"):
        TrainDataset(data.folder / "train", [record], options(max_bytes=20), 1)


def test_the_limits_are_pillow_s_and_the_options_are_the_readers():
    """The same numbers stand in three places, which do not import each other."""
    assert OPTIONS["DATASET.max_pixels"].default == OPTIONS["DATASET.max_pixels"].high == ImageLimits().pixels
    assert OPTIONS["DATASET.max_bytes"].default == ImageLimits().bytes
    assert ImageLimits().pixels == 2 * Image.MAX_IMAGE_PIXELS


def test_a_bomb_takes_no_memory(data):
    """Its 900 million pixels are refused by its header."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        with pytest.raises(ImageFileError, match=r"bomb\.png: more than 178956970 pixels"):
            read_image(data.folder / "broken" / "images" / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
