"""A full or read-only disk: the error names the file, the old file is kept, and the run can be resumed."""

import re
import subprocess
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from runs import SMALL, here, same, weights, words
from scenes import tiny_module, write_data_set

from mit_semseg import Segmenter
from mit_semseg.dataset import class_table
from mit_semseg.engine.checkpoint import RunFolder, read_resume, save_atomic
from mit_semseg.lib.utils import WriteError, atomic_write
from mit_semseg.predict.video import segment_video

SIZE = 30  # MiB; resume.pth takes 18


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder)
    return folder


class Disk:
    """A disk in memory (tmpfs)."""

    def __init__(self, folder):
        self.folder = folder

    def mount(self, options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder], capture_output=True)
        if done.returncode:
            pytest.skip("needs permission to mount a tmpfs")

    def change(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)
    disk.mount("size=1m")
    yield disk
    subprocess.run(["umount", "--lazy", folder], check=True)


def save_text(text, path):
    with atomic_write(path) as partial:
        partial.write_text(text)


@pytest.mark.parametrize(("save", "content"), [(save_atomic, torch.zeros(10**6)), (save_text, "x" * 2 * 10**6)])
def test_full_disk_keeps_the_old_file(disk, save, content):
    path = disk.folder / "file"
    path.write_text("before")
    with pytest.raises(WriteError, match=rf"^{path} cannot be written: No space left on device"):
        save(content, path)
    assert path.read_text() == "before"
    assert [p.name for p in disk.folder.iterdir()] == ["file"]


@pytest.mark.parametrize("length", [240, 255, 256])
def test_file_names_up_to_the_limit_of_the_file_system(tmp_path, length):
    path = tmp_path / (length // 3 * "景" + length % 3 * "x")
    if length > 255:
        with pytest.raises(WriteError, match="cannot be written: File name too long"):
            save_text("new", path)
    else:
        save_text("new", path)
        assert path.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == (length <= 255)


def options_for(root, folder, **changes):
    return {
        **SMALL, "DATASET.root_dataset": root, "DIR": folder, "TRAIN.epoch_iters": 4, "TRAIN.checkpoint_iters": 2,
        "TRAIN.resume": "auto", **changes,
    }  # fmt: skip


def test_training_stops_on_a_full_disk_and_resumes(root, disk, tmp_path):
    """The disk has space for one checkpoint, but not for a second next to it."""
    disk.change(f"size={SIZE}m")
    folder = disk.folder / "run"
    done = here("train.py", "--gpu", "cpu", *words(options_for(root, folder)))
    assert done.returncode == 2
    assert "resume.pth cannot be written: No space left on device" in done.stderr
    assert not list(folder.glob("*.partial"))
    assert read_resume(RunFolder(folder).resume)["step"] == 2

    disk.change("size=400m")
    done = here("train.py", "--gpu", "cpu", *words(options_for(root, folder)))
    assert done.returncode == 0, done.stderr
    assert "at step 2 of 8" in done.stdout
    assert here("train.py", "--gpu", "cpu", *words(options_for(root, tmp_path / "whole"))).returncode == 0
    assert same(weights(folder), weights(tmp_path / "whole"))


def test_training_continues_without_tensorboard_on_a_full_disk(root, disk, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(disk.folder)
    (disk.folder / "filler").write_bytes(bytes(2**20 - 8192))
    changes = options_for(root, tmp_path / "run", **{"TRAIN.tensorboard": True, "TRAIN.eval_epoch": 1})
    done = here("train.py", "--gpu", "cpu", *words(changes))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TensorBoard events cannot be written") == 1
    assert "training is complete" in done.stdout


def test_truncated_video_is_removed_on_a_full_disk(disk, tmp_path):
    """OpenCV reports no error."""
    clip, rng = tmp_path / "clip.mp4", np.random.default_rng(0)
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 120))
    for _ in range(60):
        writer.write(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    writer.release()
    disk.change("size=200k")
    options = SimpleNamespace(imgSizes=(40,), imgMaxSize=100, padding_constant=8)
    segmenter = Segmenter(tiny_module(), class_table("", 3), options)
    with pytest.raises(WriteError, match=r"out\.mp4"):
        segment_video(segmenter, str(clip), disk.folder / "out.mp4", alpha=0.1, progress=False)
    assert not list(disk.folder.iterdir())


def test_read_only_folder_is_named(root, disk, tmp_path):
    disk.change("ro")
    for script, changes in (
        ("train.py", options_for(root, disk.folder / "run")),
        ("train.py", options_for(root, disk.folder)),
    ):
        done = here(script, "--gpu", "cpu", *words(changes))
        assert done.returncode == 2
        assert str(disk.folder) in done.stderr
        assert "Read-only file system" in done.stderr
        assert "Traceback" not in done.stderr


def test_read_only_disk_disables_tensorboard_and_fails_results(root, disk, tmp_path):
    disk.change("ro")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tensorboard", "result"):
        (run / name).symlink_to(disk.folder)
    changes = options_for(root, run, **{"TRAIN.num_epoch": 2, "TRAIN.tensorboard": True})
    done = here("train.py", "--gpu", "cpu", *words(changes))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TensorBoard events cannot be written") == 1
    assert (run / "encoder_epoch_2.pth").is_file()
    images = ("--imgs", root / "val" / "images", "TEST.result", disk.folder)
    for script, arguments, folder in (("eval.py", (), run / "result"), ("test.py", images, disk.folder)):
        done = here(script, "--gpu", "cpu", *words(changes), *arguments)
        assert done.returncode == 2
        assert re.search(rf"error: {folder}/.* cannot be written: Read-only file system", done.stderr), done.stderr
        assert "Traceback" not in done.stderr


def test_results_that_do_not_fit_on_the_disk_are_named(root, disk, tmp_path):
    changes = options_for(root, tmp_path / "run", **{"TRAIN.num_epoch": 2})
    assert here("train.py", "--gpu", "cpu", *words(changes)).returncode == 0
    (disk.folder / "filler").write_bytes(bytes(2**20 - 4096))
    (tmp_path / "run" / "result").symlink_to(disk.folder)
    done = here("eval.py", "--gpu", "cpu", *words(changes))
    assert done.returncode == 2
    assert "cannot be written: No space left on device" in done.stderr
    assert "Mean IoU" in done.stdout  # the scores are printed first
    done = here(
        "test.py", "--gpu", "cpu", "--imgs", root / "val" / "images", *words(changes), "TEST.result", disk.folder
    )
    assert done.returncode == 2
    assert "cannot be written: No space left on device" in done.stderr
    assert not list(disk.folder.rglob("*.partial"))
