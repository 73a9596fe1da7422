"""Experiment trackers (TRAIN.logger) in their offline modes."""

import json
import sqlite3
import sys

import pytest
from runs import in_process, script, small
from scenes import write_data_set
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mit_semseg.lib.utils import UserError

NAMES = {"train/loss", "train/lr_encoder", "val/loss", "val/mean_iou", "val_iou/a", "val_iou/b"}
STEPS = [3, 6]  # of the validations


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def train(root, folder, name, epochs, *, code=0, **environment):
    changes = {"TRAIN.logger": name, "TRAIN.num_epoch": epochs, "TRAIN.eval_epoch": 1, "TRAIN.resume": "auto"}
    changes |= {"DATASET.classes": "[a,b;beta,c]", "DATASET.ignore_values": "[0]"}
    return script("train.py", {**small(root, folder), **changes}, env=environment, code=code)


def train_twice(root, folder, name, **environment):
    """Train for an epoch; resume for another epoch, which continues the run of the tracker."""
    for epochs in (1, 2):
        done = train(root, folder, name, epochs, **environment)
        assert "failed" not in done.stdout
    assert "at step 3 of 6" in done.stdout


def test_tensorboard(root, tmp_path):
    train_twice(root, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert [event.step for event in events.Scalars("val/mean_iou")] == STEPS
    assert set(events.Tags()["images"]) == {"val/0", "val/1", "val/2"}
    assert b"TRAIN.epoch_iters: 3" in events.Tensors("options/text_summary")[0].tensor_proto.string_val[0]


def test_mlflow(root, tmp_path):
    store = tmp_path / "store"
    environment = {"MLFLOW_TRACKING_URI": f"file:{store}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    train_twice(root, tmp_path / "run", "mlflow", **environment)
    (run,) = (path.parent for path in store.glob("*/*/metrics"))
    assert json.loads((tmp_path / "run" / "logger_run.json").read_text()) == {"mlflow": run.name}
    metrics = {
        path.relative_to(run / "metrics").as_posix(): path for path in (run / "metrics").rglob("*") if path.is_file()
    }
    assert set(metrics) >= NAMES
    lines = metrics["val/mean_iou"].read_text().splitlines()
    assert [int(line.split()[2]) for line in lines] == STEPS
    assert (run / "params" / "TRAIN.epoch_iters").read_text() == "3"
    assert len(list(run.rglob("*.png"))) >= 6


def test_trackio(root, tmp_path):
    train_twice(root, tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    (path,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, *_ in rows}) == 1
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert set().union(*(metrics for _, metrics in values)) >= NAMES
    assert sorted(step for step, metrics in values if "val/mean_iou" in metrics) == STEPS
    assert list((tmp_path / "store" / "media").rglob("*.png"))


def test_wandb_offline(root, tmp_path):
    train_twice(root, tmp_path, "wandb", WANDB_MODE="offline")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    identifier = json.loads((tmp_path / "logger_run.json").read_text())["wandb"]
    assert [path.name for path in files] == [f"run-{identifier}.wandb"] * 2
    content = b"".join(path.read_bytes() for path in files)
    for name in ("val/mean_iou", "val_iou/b", "lr_encoder", "TRAIN.epoch_iters"):
        assert name.encode() in content
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png"))


def test_new_run_does_not_continue_the_tracked_run(root, tmp_path):
    runs = []
    for _ in range(2):
        script(
            "train.py",
            {**small(root, tmp_path / "run", TRAIN__num_epoch=1), "TRAIN.logger": "trackio", "TRAIN.resume": "restart"},
            env={"TRACKIO_DIR": str(tmp_path / "store")},
        )
        runs.append(json.loads((tmp_path / "run" / "logger_run.json").read_text())["trackio"])
    assert runs[0] != runs[1]


def test_run_continues_after_another_tracker(root, tmp_path):
    path, environment = tmp_path / "run" / "logger_run.json", {"TRACKIO_DIR": str(tmp_path / "trackio")}
    environment |= {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true"}
    runs = []
    for epochs, name in enumerate(("trackio", "mlflow", "trackio"), start=1):
        train(root, tmp_path / "run", name, epochs, **environment)
        runs.append(json.loads(path.read_text()))
    assert set(runs[2]) == {"trackio", "mlflow"}
    assert runs[2] == runs[1] == runs[0] | runs[1]


def test_training_continues_if_a_tracker_fails(root, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = train(root, tmp_path / "run", "mlflow", 1, MLFLOW_TRACKING_URI=f"file:{blocked}/store")
    assert done.stdout.count("MLflow failed") == 1
    assert "training is complete" in done.stdout


def test_crash_before_the_first_checkpoint_starts_another_run(root, tmp_path):
    environment = {"TRACKIO_DIR": str(tmp_path / "store")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logger_run.json").write_text('{"trackio": "earlier"}')
    train(root, tmp_path / "run", "trackio", 1, **environment)
    assert json.loads((tmp_path / "run" / "logger_run.json").read_text())["trackio"] != "earlier"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_missing_package_is_named(root, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"TRAIN.logger {name}.*install"):
        in_process("train.py", small(root, tmp_path, TRAIN__logger=name))
