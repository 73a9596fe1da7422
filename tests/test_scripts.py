"""The scripts as a user runs them: from lists and folders to checkpoints, figures and pictures."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, SMALL, here, in_process, script, words
from scenes import options, tiny_module, write_data_set, write_pairs

from mit_semseg.dataset import ValDataset
from mit_semseg.dataset.records import load_records
from mit_semseg.dataset.samplers import shards
from mit_semseg.evaluation import evaluate, label_map, multi_scale_scores


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set and a run on it; returns the options."""
    folder = tmp_path_factory.mktemp("trained")
    write_data_set(folder)
    changes = {**SMALL, "DATASET.root_dataset": folder, "DIR": folder / "run"}
    done = script("train.py", "--gpus", "cpu", *words(changes))
    assert done.returncode == 0, done.stderr
    return changes


# Evaluation


def test_eval_prints_and_writes_the_same_figures(trained, tmp_path):
    done = script("eval.py", "--gpu", "cpu", *words({**trained, "VAL.visualize": True, "VAL.batch_size": 2}))
    assert done.returncode == 0, done.stderr
    folder = Path(trained["DIR"]) / "result"
    result = json.loads((folder / "results.json").read_text())
    assert result["images"] == 3
    assert f"Mean IoU (over all 3 classes): {result['mean_iou']:.4f}" in done.stdout
    assert f"Pixel accuracy: {result['pixel_accuracy'] * 100:.2f} %" in done.stdout
    assert [entry["class"] for entry in result["iou_per_class"]] == ["class 1", "class 2", "class 3"]
    assert result["overall_score"] == pytest.approx((result["mean_iou"] + result["pixel_accuracy"]) / 2)
    with Image.open(folder / "val" / "images" / "01.png") as drawn:
        assert drawn.size == (3 * 40 + 2 * 6, 56)


def without_times(result):
    return {key: value for key, value in result.items() if "second" not in key}


@pytest.mark.parametrize("gpus", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.long), "cpu,cpu,cpu,cpu"])
def test_shared_out_evaluation_gives_the_same_counts(trained, gpus):
    """Three pictures on one, two and four processes: every picture once, the figures of eval.py."""
    path = Path(trained["DIR"]) / "result" / "results.json"
    assert here("eval.py", "--gpu", "cpu", *words(trained)).returncode == 0
    alone = json.loads(path.read_text())
    done = script("eval_multipro.py", "--gpus", gpus, *words(trained))
    assert done.returncode == 0, done.stderr
    assert without_times(json.loads(path.read_text())) == without_times(alone)


def test_shares_cover_the_list_exactly_once():
    for count in range(12):
        for parts in range(1, 6):
            assert [i for part in shards(count, parts) for i in part] == list(range(count))


def test_a_failing_or_killed_process_ends_the_evaluation(trained, monkeypatch):
    missing = here("eval_multipro.py", "--gpus", "cpu,cpu", *words({**trained, "VAL.checkpoint": "epoch_9.pth"}))
    assert missing.returncode == 2
    assert "no checkpoint" in missing.stderr
    # A process that dies while it starts: the spawned interpreter runs this in place of its site customization.
    folder = Path(trained["DIR"]) / "killer"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\nif '--multiprocessing-fork' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {"PYTHONPATH": f"{folder}:{ROOT}"}
    killed = script("eval_multipro.py", "--gpus", "cpu,cpu", *words(trained), env=env)
    assert killed.returncode == 2
    assert "worker process" in killed.stderr
    assert "had done 0 of them, was killed by SIGKILL" in killed.stderr
    assert "Traceback" not in killed.stderr


def test_evaluation_is_brute_force_over_the_pictures(tmp_path):
    """Mean over scales of the softmax at the picture's size, arg-max, counted pixel by pixel."""
    write_pairs(tmp_path, [(50, 40), (40, 56)], seed=3)
    dataset, module = ValDataset(tmp_path, ".", options()), tiny_module().eval()
    hits = total = 0
    for i in range(len(dataset)):
        item = dataset[i]
        size = item["img_ori"].shape[:2]
        with torch.no_grad():
            scores = [module({"img_data": x}, segSize=size).double() for x in item["img_data"]]
        mean = torch.stack(scores).mean(0)[0]
        torch.testing.assert_close(
            multi_scale_scores(module, item["img_data"], size).double(), mean, rtol=1e-5, atol=1e-6
        )
        prediction, label = label_map(module, item), item["seg_label"][0].numpy()
        assert np.array_equal(prediction, mean.argmax(0).numpy())
        hits += ((prediction == label) & (label >= 0)).sum()
        total += (label >= 0).sum()
    module.train()
    figures = [evaluate(module, dataset, batch_size=n).summary for n in (1, 2)]
    assert module.training
    assert [f.pixel_accuracy for f in figures] == [hits / total] * 2
    assert all(np.array_equal(f.iou, figures[0].iou) for f in figures)


def test_a_damaged_checkpoint_is_named_and_another_offered(trained, tmp_path):
    shutil.copytree(trained["DIR"], tmp_path / "run")
    damaged = tmp_path / "run" / "decoder_epoch_2.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    done = here("eval.py", "--gpu", "cpu", *words({**trained, "DIR": tmp_path / "run"}))
    assert done.returncode == 2
    assert re.search(r"decoder_epoch_2\.pth .*damaged.*; epoch_1\.pth in .*run can be read", done.stderr), done.stderr


# Segmenting pictures


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.PNG", "day/a.jpg", "day/a.png", "day/c.webp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), "olive").save(path, format={"jpg": "JPEG", "webp": "WEBP"}.get(name[-3:], "PNG"))
    return folder


def segment(trained, result, imgs, *flags, run=here):
    return run("test.py", "--imgs", imgs, "--gpu", "cpu", *flags, *words({**trained, "TEST.result": result}))


def test_a_folder_keeps_its_structure_and_no_result_is_lost(trained, photos, tmp_path):
    done = segment(trained, tmp_path / "out", photos, "--overlay", "--index", "--json", run=script)
    assert done.returncode == 0, done.stderr
    stems = ["a", "b", "day/a.jpg", "day/a.png", "day/c"]
    expected = {f"{stem}{end}" for stem in stems for end in (".png", "_overlay.png", "_index.png", ".json")}
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == expected
    content = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (content["width"], content["height"]) == (50, 40)
    shares = [entry["share"] for entry in content["classes"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    index = np.asarray(Image.open(tmp_path / "out" / "a_index.png"))
    assert index.shape == (40, 50)
    assert {entry["index"] for entry in content["classes"]} == set(np.unique(index).tolist())
    first = content["classes"][0]
    assert f"{first['class']}: {first['share'] * 100:.2f} %" in done.stdout
    assert "5 of 5 pictures segmented" in done.stdout


def test_an_unreadable_picture_is_reported_and_the_others_are_done(trained, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    done = segment(trained, tmp_path / "out", photos)
    assert done.returncode == 1
    assert "5 of 6 pictures segmented" in done.stdout
    assert "not segmented: " in done.stdout
    assert "broken.jpg" in done.stdout
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5


def test_globs_single_files_and_results_inside_the_folder(trained, photos, tmp_path):
    done = segment(trained, tmp_path / "one", photos / "day" / "*.jpg")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "one").rglob("*.png")] == ["a.png"]
    for imgs in (photos, photos / "**" / "*.*"):  # the results of earlier runs are no input
        for result in (photos / "results", photos):
            done = segment(trained, result, imgs, "--overlay", "--index")
            assert "5 of 5 pictures" in done.stdout, done.stderr
    assert "30 results of earlier runs left out" in done.stdout


def test_names_that_are_no_text(trained, tmp_path):
    """As of an old archive: they are shown, and kept in JSON files as they are."""
    folder = tmp_path / "data"
    write_pairs(folder, [(40, 50)] * 2)
    name = os.fsdecode(b"M\xfcller.png")
    for kind in ("images", "annotations"):
        (folder / kind / "00.png").rename(folder / kind / name)
    done = segment(trained, tmp_path / "out", folder / "images", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / os.fsdecode(b"M\xfcller.json")).read_text())
    assert told["image"] == str(folder / "images" / name)
    done = here("mit_semseg.cli.fetch", "list", folder, "--root", folder, "--to", tmp_path / "list.odgt")
    assert done.returncode == 0, done.stderr
    assert {Path(record["fpath_img"]).name for record in load_records(tmp_path / "list.odgt")} == {name, "01.png"}
    changes = {"DATASET.root_dataset": folder, "DATASET.list_val": tmp_path / "list.odgt", "VAL.visualize": True}
    done = script("eval.py", "--gpu", "cpu", *words({**trained, **changes}), env={"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    page = (Path(trained["DIR"]) / "result" / "report.html").read_text()
    assert 'src="images/M%FCller.png"' in page
    assert "images/M\\udcfcller.png: mean IoU" in page


@pytest.mark.parametrize(
    ("imgs", "message"),
    [("nowhere.jpg", "no such file or folder"), ("*.nothing", "no pictures there"), (".", "written over")],
)
def test_wrong_inputs_are_answered_in_a_sentence(trained, photos, imgs, message):
    (photos / "z.png").write_bytes((photos / "b.PNG").read_bytes())
    done = segment(trained, photos, photos if imgs == "." else photos / imgs)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# Mistakes on the command line


@pytest.mark.parametrize("name", ["train.py", "eval.py", "test.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TRAIN.lr_encodr", "1"], "did you mean TRAIN.lr_encoder?"),
        (["--cfg", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
    ],
)
def test_mistakes_have_no_traceback(name, arguments, message):
    extra = ["--imgs", "x"] if name == "test.py" else []
    done = here(name, *extra, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_devices(trained, monkeypatch):
    from mit_semseg.lib.utils import UserError

    for given, message in (
        ("cpu,0", "give GPUs, or cpu once or several times, but not both"),
        ("99", "gpu99 was asked for, but this machine has"),
        ("x", "x"),
    ):
        with pytest.raises(UserError, match=message):
            in_process("train", monkeypatch, "--gpus", given, *words({**trained, "TRAIN.resume": "restart"}))


@pytest.mark.parametrize("name", ["train.py", "eval.py", "eval_multipro.py", "test.py"])
def test_help_shows_examples(name):
    done = here(name, "--help")
    assert done.returncode == 0
    assert done.stdout.count(f"python {name} ") >= 3


TOOLS = ("demo", "export", "cli.fetch", "dataset.doctor", "dataset.synthetic")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_a_tool_says_how_it_is_called(tool):
    """Under its own name, and every value under a name of its kind."""
    done = script(f"mit_semseg.{tool}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m mit_semseg.{tool} [-h]")
    for option, value in re.findall(r"^ +--([a-z0-9-]+) ([A-Z_]+)", done.stdout, re.MULTILINE):
        assert value != option.replace("-", "_").upper() or option in ("device", "gpus")
