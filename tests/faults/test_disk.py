"""On a full or read-only disk, the error names the file, the old file is kept, and the run can be resumed."""

import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import here, same, small, weights
from scenes import tiny_module, write_data_set
from test_video import write_clip

from mit_semseg import Segmenter
from mit_semseg.dataset import class_table
from mit_semseg.engine.checkpoint import RunFolder, read_resume, save_atomic
from mit_semseg.lib.utils import WriteError, atomic_write
from mit_semseg.predict.video import segment_video


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of 1 MiB in memory (tmpfs); yield its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def save_text(text, path):
    with atomic_write(path) as partial:
        partial.write_text(text)


@pytest.mark.parametrize(("save", "content"), [(save_atomic, torch.zeros(10**6)), (save_text, "x" * 2 * 10**6)])
def test_full_disk_keeps_the_old_file(disk, save, content):
    path = disk / "file"
    path.write_text("before")
    with pytest.raises(WriteError, match=rf"^{path} cannot be written: No space left on device"):
        save(content, path)
    assert path.read_text() == "before"
    assert [p.name for p in disk.iterdir()] == ["file"]


def test_file_names_up_to_the_limit_of_the_file_system(tmp_path):
    save_text("new", tmp_path / (255 // 3 * "景"))
    with pytest.raises(WriteError, match="cannot be written: File name too long"):
        save_text("new", tmp_path / (256 * "x"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def options_for(root, folder, **changes):
    return small(root, folder, TRAIN__epoch_iters=4, TRAIN__checkpoint_iters=2, TRAIN__resume="auto", **changes)


def test_training_stops_on_a_full_disk_and_resumes(root, disk, tmp_path):
    """The disk (30 MiB) has space for one checkpoint (18 MiB), but not for two."""
    remount(disk, "size=30m")
    folder = disk / "run"
    done = here("train.py", options_for(root, folder), code=2)
    assert "resume.pth cannot be written: No space left on device" in done.stderr
    assert not list(folder.glob("*.partial"))
    assert read_resume(RunFolder(folder).resume)["step"] == 2

    remount(disk, "size=400m")
    assert "at step 2 of 8" in here("train.py", options_for(root, folder)).stdout
    here("train.py", options_for(root, tmp_path / "whole"))
    assert same(weights(folder), weights(tmp_path / "whole"))


def test_training_continues_without_tensorboard_on_a_full_disk(root, disk, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(disk)
    (disk / "filler").write_bytes(bytes(2**20 - 8192))
    done = here("train.py", options_for(root, tmp_path / "run", TRAIN__logger="tensorboard", TRAIN__eval_epoch=1))
    assert done.stdout.count("TensorBoard failed") == 1
    assert "training is complete" in done.stdout


def test_truncated_video_is_removed_on_a_full_disk(disk, tmp_path):
    """OpenCV reports no error on a full disk, but `segment_video` must raise one."""
    clip = write_clip(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 256, (60, 120, 160, 3), np.uint8))
    remount(disk, "size=200k")
    options = SimpleNamespace(imgSizes=(40,), imgMaxSize=100, padding_constant=8)
    segmenter = Segmenter(tiny_module(), class_table("", 3), options)
    with pytest.raises(WriteError, match=r"out\.mp4"):
        segment_video(segmenter, str(clip), disk / "out.mp4")
    assert not list(disk.iterdir())


def test_read_only_disk_disables_tensorboard_and_fails_results(root, disk, tmp_path):
    remount(disk, "ro")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tensorboard", "result"):
        (run / name).symlink_to(disk)
    changes = options_for(root, run, TRAIN__logger="tensorboard")
    done = here("train.py", changes)
    assert done.stdout.count("TensorBoard failed") == 1
    assert (run / "encoder_epoch_2.pth").is_file()
    images = {"--imgs": root / "val" / "images", "TEST.result": disk}
    commands = ("eval.py", {}, run / "result"), ("test.py", images, disk), ("train.py", {"DIR": disk / "run"}, disk)
    for script, arguments, folder in commands:
        errors = here(script, changes, arguments, code=2).stderr
        assert re.search(rf"error: .*{folder}.*Read-only file system", errors), errors


def test_results_that_do_not_fit_on_the_disk_are_named(root, disk, tmp_path):
    changes = options_for(root, tmp_path / "run")
    here("train.py", changes)
    (disk / "filler").write_bytes(bytes(2**20 - 4096))
    (tmp_path / "run" / "result").symlink_to(disk)
    done = here("eval.py", changes, code=2)
    assert "cannot be written: No space left on device" in done.stderr
    assert "Mean IoU" in done.stdout  # the scores are printed before files are written
    assert not list(disk.rglob("*.partial"))
