"""An unusable file stops a run with an error that names the file, or is skipped and reported."""

import json
from types import SimpleNamespace

import pytest
import torch
from damage import write_unusable, write_unusual
from runs import SMALL, here, same, small, weights
from scenes import options, write_data_set

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.image_io import ImageFileError
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import add_sizes, load_records


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write valid datasets to train/ and val/, the lists unusable.odgt and unusual.odgt, and their union mixed.odgt."""
    folder = write_data_set(tmp_path_factory.mktemp("data"))
    unusable, unusual = write_unusable(folder), write_unusual(folder)
    lists = [folder / f"{name}.odgt" for name in ("unusable", "unusual")]
    (folder / "mixed.odgt").write_text("\n".join(path.read_text() for path in lists))
    return SimpleNamespace(folder=folder, unusable=unusable, unusual=unusual)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    here("train.py", small(data.folder, folder, TRAIN__epoch_iters=1))
    return folder


def test_doctor_reports_every_unusable_and_unusual_file(data):
    opts = {**SMALL, "DATASET.root_dataset": data.folder, "DATASET.list_train": "mixed.odgt"}
    done = here("mit_semseg.dataset.doctor", opts, code=1)
    unusable = [line for line in done.stdout.splitlines() if line.startswith("  UNUSABLE")]
    assert len(unusable) == len(data.unusable)
    for name in data.unusable:
        assert sum(name in line for line in unusable) == 1, name
    notes = "\n".join(line for line in done.stdout.splitlines() if "note:" in line)
    for name in data.unusual:
        has_no_note = any(word in name for word in ("exif_1", "späße", "nnn", "label_of"))
        assert (name in notes) != has_no_note, name
    assert "checksum" in notes


@pytest.mark.parametrize("kind", [TrainDataset, ValDataset])
def test_every_unusable_file_raises_an_error_with_its_name(data, kind):
    lines = (data.folder / "unusable.odgt").read_text().split("\n")
    for number, (line, name) in enumerate(zip(lines, data.unusable, strict=True), start=1):
        (data.folder / "one.odgt").write_text("\n" * (number - 1) + line)
        with pytest.raises((ImageFileError, ListError)) as caught:
            kind(data.folder, "one.odgt", options(imgSizes=(40,)))[0]
        assert name in str(caught.value)


def test_evaluation_skips_and_reports_without_changing_the_metrics(data, trained):
    results = {}
    skip = {"DATASET.list_val": "mixed.odgt", "DATASET.on_error": "skip"}
    for name, script, changes, code in (
        ("unusual", "eval.py", {"DATASET.list_val": "unusual.odgt"}, 0),
        ("two processes", "eval_multipro.py", {"--gpu": "cpu,cpu", **skip}, 1),
        ("mixed", "eval.py", {**skip, "VAL.visualize": True}, 1),
    ):
        here(script, small(data.folder, trained, **changes), code=code)
        results[name] = json.loads((trained / "result" / "results.json").read_text())
    for name in ("mixed", "two processes"):
        assert results[name]["images"] == results["unusual"]["images"] == len(data.unusual)
        assert len(results[name]["skipped"]) == len(data.unusable)
        assert results[name]["iou_per_class"] == results["unusual"]["iou_per_class"]
    assert sorted(results["mixed"]["skipped"]) == sorted(results["two processes"]["skipped"])
    assert f"{len(data.unusable)} images skipped" in (trained / "result" / "report.html").read_text()
    panels = [path for path in (trained / "result").rglob("*.png") if path.stem not in ("confusion", "calibration")]
    doubtful = [path for path in panels if path.parent.name == "doubtful"]
    assert len(panels) - len(doubtful) == len(data.unusual)
    assert 0 < len(doubtful) <= len(data.unusual)


def test_training_skips_and_reports_and_remembers_after_resume(data, tmp_path):
    changes = {"DATASET.list_train": "mixed.odgt", "DATASET.list_val": "mixed.odgt", "DATASET.on_error": "skip"}
    changes |= {"TRAIN.epoch_iters": 12, "TRAIN.num_epoch": 1, "TRAIN.eval_epoch": 1}
    summary = f"{len(data.unusable)} unusable images or list entries skipped"
    done = here("train.py", small(data.folder, tmp_path / "a", **changes), code=1)
    names = done.stdout.partition(summary)[2]
    assert all(name in names for name in data.unusable)
    done = here("train.py", small(data.folder, tmp_path / "a", **changes, TRAIN__resume="auto"), code=1)
    assert summary in done.stdout
    # The images that replace unusable ones do not depend on the number of workers.
    changes |= {"TRAIN.eval_epoch": 0, "TRAIN.workers": 2}
    here("train.py", small(data.folder, tmp_path / "b", **changes), code=1)
    assert same(*(weights(tmp_path / name, "epoch_1.pth") for name in "ab"))


def test_replacement_has_the_same_orientation_and_leaves_the_other_images_unchanged(data):
    records = add_sizes(load_records("train", data.folder), data.folder)
    records.append(records[1])
    valid = TrainDataset(data.folder, records, options(), 2)
    records[4] = {**records[4], "fpath_img": "gone.png"}
    dataset = TrainDataset(data.folder, records, options(on_error="skip"), 2)
    replaced = [index for index in range(40) if 4 in dataset.order[index]]
    assert replaced
    for index in range(40):
        batch, expected = dataset[index], valid[index]
        assert len(set(batch["skipped"])) == int(index in replaced)
        assert all("gone.png" in message for message in batch["skipped"])
        assert "gone.png" not in batch["info"]
        for i, record in enumerate(dataset.order[index]):
            upright = batch["img_data"].size(2) > batch["img_data"].size(3)
            assert upright == (records[record]["height"] > records[record]["width"])
            if record != 4:
                height, width = (min(b["img_data"].size(d) for b in (batch, expected)) for d in (2, 3))
                image, other = (b["img_data"][i, :, :height, :width] for b in (batch, expected))
                assert torch.equal(image, other)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_list_without_any_usable_image_is_an_error(data, trained, tmp_path, script):
    (data.folder / "none.odgt").write_text((data.folder / "unusable.odgt").read_text().partition("\n")[0])
    (trained / "result" / "results.json").unlink(missing_ok=True)
    folder = tmp_path if script == "train.py" else trained
    lists = {"DATASET.list_train": "none.odgt", "DATASET.list_val": "none.odgt", "DATASET.on_error": "skip"}
    assert "truncated.jpg" in here(script, small(data.folder, folder, **lists), code=2).stderr
    assert not (folder / "result" / "results.json").exists()
