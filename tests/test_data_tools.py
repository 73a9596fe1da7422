"""The dataset doctor, the synthetic scenes, and the shell scripts that download ADE20K and run the demo."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, here
from scenes import write_pairs

from mit_semseg.dataset import class_table
from mit_semseg.dataset.doctor import group_by_cause
from mit_semseg.dataset.synthetic import CLASSES, make_scene, write_dataset
from mit_semseg.models import ModelBuilder


@pytest.mark.parametrize("words", [["new", "--size", "0x0"], ["new", "--size", "x"], ["file"], ["file/below"]])
def test_wrong_arguments_of_synthetic_write_nothing(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert "error: " in here("mit_semseg.dataset.synthetic", *words, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_report_and_exit_codes(tmp_path):
    folder = write_pairs(tmp_path / "train", [(40, 30)] * 5 + [(30, 40)], values=(1, 2))
    (folder / "images" / "00.png").write_bytes(b"not an image")
    changes = {"DATASET.root_dataset": tmp_path, "DATASET.list_train": "train", "DATASET.list_val": "train"}
    done = here("mit_semseg.dataset.doctor", {**changes, "DATASET.num_class": 3}, code=1)
    for part in (
        "train: 6 images, 1 problems",
        "width 30..40, height 30..40",
        "1 portrait, 4 land",
        "pixels (1): class 3",
    ):
        assert part in done.stdout
    assert "images/00.png" in done.stdout.partition("UNUSABLE")[2]
    clean = write_pairs(tmp_path / "clean", [(40, 30)], values=(1, 2, 3))
    changes |= {"DATASET.list_train": clean, "DATASET.list_val": clean}
    for list_val, code in ((clean, 0), ("none", 2)):
        here("mit_semseg.dataset.doctor", {**changes, "DATASET.list_val": list_val}, code=code)


def test_doctor_groups_problems_by_cause():
    problems = [f"a b/{i}.png: the label has size {i}x9, but its image 40x30" for i in range(60)]
    problems += [f"images/{i}.png has no partner annotations/{i}.*" for i in range(2)]
    lines = group_by_cause(problems)
    assert lines[:3] + lines[4:] == problems[:3] + problems[60:]
    assert "57" in lines[3]


def test_synthetic_scenes_are_deterministic_and_show_every_class(tmp_path):
    write_dataset(tmp_path, train=6, val=3, size=(64, 48))
    table = class_table(str(tmp_path / "classes.csv"), len(CLASSES))
    assert table.names == CLASSES
    first, again = ([x.tobytes() for x in make_scene((0, 1, 0), 64, 48)] for _ in range(2))
    assert first == again
    seen = set()
    for path in (tmp_path / "training" / "annotations").iterdir():
        raw = np.asarray(Image.open(path))
        assert (table.encode(raw) >= -1).all()
        seen |= set(np.unique(raw).tolist())
    assert seen == set(range(8))


@pytest.mark.long
def test_download_script_unpacks_and_writes_lists_with_sizes(site, tmp_path):
    folder, address = site
    for split in ("training", "validation"):
        write_pairs(tmp_path / split, [(20, 30), (30, 20)])
    with zipfile.ZipFile(folder / "ade.zip", "w") as archive:
        for split in ("training", "validation"):
            for path in (tmp_path / split).rglob("*.png"):
                archive.write(path, f"ADEChallengeData2016/{path.parent.name}/{split}/{path.name}")
    copy = tmp_path / "checkout"
    copy.mkdir()
    (copy / "mit_semseg").symlink_to(ROOT / "mit_semseg")
    (copy / "download_ade20k.sh").write_text((ROOT / "download_ade20k.sh").read_text())
    done = bash(copy, "download_ade20k.sh", ADE20K_ADDRESS=f"{address}/ade.zip")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (copy / "data" / "training.odgt").read_text().splitlines()]
    assert lines[0]["fpath_segm"] == "ADEChallengeData2016/annotations/training/00.png"
    assert (lines[0]["width"], lines[0]["height"]) == (20, 30)
    names = sorted(path.name for path in (copy / "data").iterdir())
    assert names == ["ADEChallengeData2016", "training.odgt", "validation.odgt"]
    done = bash(copy, "download_ade20k.sh", ADE20K_ADDRESS="http://127.0.0.1:9/x.zip")  # a second download would fail
    assert done.returncode == 0, done.stderr
    for site.resumes in (True, False):
        shutil.rmtree(copy / "data" / "ADEChallengeData2016")
        (copy / "data" / "ADEChallengeData2016.zip").write_bytes((folder / "ade.zip").read_bytes()[:100])
        done = bash(copy, "download_ade20k.sh", ADE20K_ADDRESS=f"{address}/ade.zip")
        assert done.returncode == 0, done.stderr
        assert site.requests[-1][1] == ("bytes=100-" if site.resumes else None)


def bash(folder, name, **env):
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(["bash", name], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_both_download_scripts_are_identical():
    assert (ROOT / "download_ADE20K.sh").read_bytes() == (ROOT / "download_ade20k.sh").read_bytes()


@pytest.mark.long
def test_demo_script_uses_the_published_model_if_the_server_is_reachable(site, tmp_path):
    """A local server provides an image, and random weights with the shapes of the published ones."""
    folder, _ = site
    name = "ade20k-resnet50dilated-ppm_deepsup"
    (folder / "model" / "pytorch" / name).mkdir(parents=True)
    encoder = ModelBuilder.build_encoder("resnet50dilated", pretrained=False)
    for part, module in (("encoder", encoder), ("decoder", ModelBuilder.build_decoder("ppm_deepsup", fc_dim=2048))):
        torch.save(module.state_dict(), folder / "model" / "pytorch" / name / f"{part}_epoch_20.pth")
    images = folder / "data" / "ADEChallengeData2016" / "images" / "validation"
    images.mkdir(parents=True)
    Image.new("RGB", (256, 8), "teal").save(images / "ADE_val_00001519.jpg")  # imgMaxSize makes every scale small
    copy = tmp_path / "checkout"
    copy.mkdir()
    for part in ("mit_semseg", "config", "train.py", "eval.py", "test.py"):
        (copy / part).symlink_to(ROOT / part)
    (copy / "demo_test.sh").write_text((ROOT / "demo_test.sh").read_text())
    done = bash(copy, "demo_test.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo_result/ADE_val_00001519.png" in done.stdout
    assert (copy / "demo_result" / "ADE_val_00001519.png").is_file()
