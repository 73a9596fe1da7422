"""The scripts read lists and folders, and write checkpoints, metrics and label maps."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, assert_same_results, here, in_process, results, script, small
from safetensors.torch import save_file
from scenes import options, tiny_module, write_data_set, write_pairs

from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset, class_table
from mit_semseg.dataset.records import load_records, write_odgt
from mit_semseg.engine import RunFolder
from mit_semseg.evaluation import Predictor, evaluate
from mit_semseg.evaluation.evaluator import LoadOptions
from mit_semseg.lib.utils import UserError
from mit_semseg.predict.network_file import write_network


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a network; return the options of the run."""
    folder = write_data_set(tmp_path_factory.mktemp("trained"))
    options = small(folder, folder / "run")
    here("train.py", options)
    return options


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.PNG", "day/a.jpg", "day/a.png", "day/c.webp"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 40), "olive").save(path, format={"jpg": "JPEG", "webp": "WEBP"}.get(name[-3:], "PNG"))
    return folder


def test_eval_prints_and_writes_the_same_scores(trained):
    done = script("eval.py", {**trained, "VAL.visualize": True, "VAL.batch_size": 2})
    folder = Path(trained["DIR"]) / "result"
    result = json.loads((folder / "results.json").read_text())
    assert result["images"] == 3
    assert f"Mean IoU (over all 3 classes): {result['mean_iou']:.4f}" in done.stdout
    assert f"Pixel accuracy: {result['pixel_accuracy'] * 100:.2f} %" in done.stdout
    assert [entry["class"] for entry in result["iou_per_class"]] == ["class 1", "class 2", "class 3"]
    assert result["overall_score"] == pytest.approx((result["mean_iou"] + result["pixel_accuracy"]) / 2)
    with Image.open(folder / "val" / "images" / "01.png") as panel:
        assert panel.size == (3 * 40 + 2 * 6, 56)


def test_eval_ranks_labels_and_draws_the_doubtful_ones(trained):
    folder = Path(trained["DIR"]) / "result"
    here("eval.py", trained)
    result = json.loads((folder / "results.json").read_text())
    qualities = [row["label_quality"] for row in result["per_image"]]
    assert len(qualities) == 3
    assert qualities == sorted(qualities)
    assert 0 <= qualities[0] <= qualities[-1] <= 1
    with Image.open(folder / "doubtful" / "1.png") as panel:  # image, label, prediction, doubtful pixels
        width, height = Image.open(Path(trained["DATASET.root_dataset"], result["per_image"][0]["image"])).size
        assert panel.size == (4 * width + 3 * 6, height)
    assert "doubtful/3.png" in (folder / "report.html").read_text()


def test_temperature_is_fitted_saved_and_used(trained, photos, tmp_path):
    run = Path(trained["DIR"])
    here("eval.py", trained)
    before = json.loads((run / "result" / "results.json").read_text())
    segment(trained, tmp_path / "before", photos / "a.jpg", "--confidence", "--index")
    done = here("eval.py", "--fit-temperature", {**trained, "--gpu": "cpu"})
    fitted = json.loads((run / "temperature_epoch_2.json").read_text())
    assert f"{fitted['temperature']:.3f}" in done.stdout
    assert fitted["nll"][1] <= fitted["nll"][0]
    after = json.loads((run / "result" / "results.json").read_text())
    assert after["expected_calibration_error"] != before["expected_calibration_error"]
    segment(trained, tmp_path / "after", photos / "a.jpg", "--confidence")
    first, second = (np.asarray(Image.open(tmp_path / name / "a_confidence.png")) for name in ("before", "after"))
    assert not np.array_equal(first, second)
    one_scale = {**trained, "DATASET.imgSizes": 48}
    segment(one_scale, tmp_path / "after", photos / "a.jpg", "--index")
    (run / "temperature_epoch_2.json").unlink()
    segment(one_scale, tmp_path / "before", photos / "a.jpg", "--index")
    first, second = (np.asarray(Image.open(tmp_path / name / "a_index.png")) for name in ("before", "after"))
    assert np.array_equal(first, second)


def test_fitted_temperature_does_not_depend_on_the_number_of_workers(trained):
    path, values = Path(trained["DIR"]) / "temperature_epoch_2.json", []
    for devices in ("cpu", "cpu,cpu"):
        here("eval_multipro.py", "--fit-temperature", {**trained, "--gpu": devices})
        values.append(json.loads(path.read_text())["temperature"])
        path.unlink()
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_temperature_errors_name_the_option_or_the_file(trained):
    path = Path(trained["DIR"]) / "temperature_epoch_2.json"
    done = here("eval.py", "--fit-temperature", {**trained, "INFERENCE.window_size": 32}, code=2)
    assert "INFERENCE.window_size" in done.stderr
    for text in ("", "{}", '{"temperature": -1}', '{"temperature": "x"}', "[1]"):
        path.write_text(text)
        assert str(path) in here("eval.py", trained, code=2).stderr
    path.unlink()


def test_new_weights_discard_the_temperature(tmp_path):
    folder = RunFolder(tmp_path)
    for suffix in ("best.pth", "epoch_1.pth"):
        folder.temperature_path(suffix).write_text('{"temperature": 2.5}')
    folder.save_weights(tiny_module(), "best.pth")
    assert (folder.read_temperature("best.pth"), folder.read_temperature("epoch_1.pth")) == (1, 2.5)
    folder.remove_run()
    assert folder.read_temperature("epoch_1.pth") == 1
    (tmp_path / "temperature_net.json").write_text('{"temperature": 3}')
    assert folder.read_temperature(str(tmp_path / "net.pth")) == 3


def test_temperature_belongs_to_the_loaded_file(tmp_path, monkeypatch):
    """The temperature of a network file is in its folder, and that of encoder and decoder files is in DIR."""
    monkeypatch.chdir(tmp_path)
    folder, cfg = RunFolder("run"), load_config(None, ["DATASET.num_class", 3])
    module = tiny_module()
    module.temperature = 2.0
    write_network(module, cfg, class_table("", 3), "net.safetensors")
    assert folder.read_temperature("net.safetensors") == 2
    path = folder.temperature_path("net.safetensors")
    assert path == Path("temperature_net.json")
    path.write_text('{"temperature": 5}')
    assert folder.read_temperature("net.safetensors") == 5
    folder.folder.mkdir()
    folder.remove_run()
    assert folder.read_temperature("net.safetensors") == 5
    write_network(module, cfg, class_table("", 3), "net.safetensors")
    assert folder.read_temperature("net.safetensors") == 2
    for part in ("encoder", "decoder"):
        save_file(getattr(module, part).state_dict(), folder.path(part, "net.safetensors"))
    assert folder.read_temperature("net.safetensors") == 1


def test_number_of_workers_does_not_change_the_scores(trained):
    """Evaluate three images in one process and in four processes."""
    path = Path(trained["DIR"]) / "result" / "results.json"

    here("eval.py", trained)
    expected = results(path)
    for devices in ("cpu", "cpu,cpu,cpu,cpu"):
        here("eval_multipro.py", {**trained, "--gpu": devices})
        assert_same_results(results(path), expected)


def test_failed_or_killed_worker_ends_the_evaluation(trained):
    options = {**trained, "--gpu": "cpu,cpu"}
    assert "epoch_9.pth" in here("eval_multipro.py", {**options, "VAL.checkpoint": "epoch_9.pth"}, code=2).stderr
    # Python imports sitecustomize.py when it starts; this file kills the worker.
    folder = Path(trained["DIR"]) / "killer"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys\nif '--multiprocessing-fork' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = script("eval_multipro.py", options, env={"PYTHONPATH": f"{folder}:{ROOT}"}, code=2)
    assert "worker process on cpu" in killed.stderr


def test_evaluation_equals_brute_force(tmp_path):
    """The brute force averages the softmax over scales at image size, takes the argmax, and counts pixels."""
    write_pairs(tmp_path, [(50, 40), (40, 56)], seed=3)
    dataset, module = ValDataset(tmp_path, ".", options()), tiny_module().eval()
    predictor = Predictor(module)
    hits = total = 0
    for i in range(len(dataset)):
        item = dataset[i]
        size = item["img_ori"].shape[:2]
        with torch.no_grad():
            scores = [module({"img_data": x}, segSize=size).double() for x in item["img_data"]]
        mean = torch.stack(scores).mean(0)[0]
        ours = predictor.probabilities(item["img_data"], size).double()
        torch.testing.assert_close(ours, mean, rtol=1e-5, atol=1e-6)
        prediction, label = predictor.label_map(item).numpy(), item["seg_label"][0].numpy()
        assert np.array_equal(prediction, mean.argmax(0).numpy())
        hits += ((prediction == label) & (label >= 0)).sum()
        total += (label >= 0).sum()
    module.train()
    results = [evaluate(Predictor(module), dataset, loading=LoadOptions(batch_size=n)).summary for n in (1, 2)]
    assert module.training
    assert [s.pixel_accuracy for s in results] == [hits / total] * 2
    assert np.array_equal(results[0].iou, results[1].iou)


def test_damaged_checkpoint_is_named_together_with_a_readable_one(trained, tmp_path):
    shutil.copytree(trained["DIR"], tmp_path / "run")
    damaged = tmp_path / "run" / "decoder_epoch_2.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    errors = here("eval.py", {**trained, "DIR": tmp_path / "run"}, code=2).stderr
    assert re.search(r"decoder_epoch_2\.pth.* damaged.*epoch_1\.pth", errors), errors


# test.py


def segment(trained, result, imgs, *arguments, run=here, **options):
    return run("test.py", "--imgs", imgs, {**trained, "TEST.result": result}, *arguments, **options)


def test_folder_keeps_its_structure_and_no_result_is_overwritten(trained, photos, tmp_path):
    done = segment(trained, tmp_path / "out", photos, "--overlay", "--index", "--json", run=script)
    stems = ["a", "b", "day/a.jpg", "day/a.png", "day/c"]
    expected = {f"{stem}{suffix}" for stem in stems for suffix in (".png", "_overlay.png", "_index.png", ".json")}
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")} == expected
    content = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (content["width"], content["height"]) == (50, 40)
    fractions = [entry["fraction"] for entry in content["classes"]]
    assert fractions == sorted(fractions, reverse=True)
    assert sum(fractions) == pytest.approx(1)
    index = np.asarray(Image.open(tmp_path / "out" / "a_index.png"))
    assert index.shape == (40, 50)
    assert {entry["index"] for entry in content["classes"]} == set(np.unique(index).tolist())
    first = content["classes"][0]
    assert f"{first['class']}: {first['fraction'] * 100:.2f} %" in done.stdout
    assert "5 of 5 images segmented" in done.stdout


def test_confidence_and_minimum_confidence(trained, photos, tmp_path):
    arguments = "--confidence", "--labels", "--no-panel"
    segment(trained, tmp_path, photos / "a.jpg", *arguments)
    assert 0 not in np.asarray(Image.open(tmp_path / "a_label.png"))
    limit = (int(np.median(Image.open(tmp_path / "a_confidence.png"))) + 0.5) / 255
    segment(trained, tmp_path, photos / "a.jpg", *arguments, "--min-confidence", limit)
    confidence = np.asarray(Image.open(tmp_path / "a_confidence.png"))
    labels = np.asarray(Image.open(tmp_path / "a_label.png"))
    assert confidence.shape == labels.shape == (40, 50)
    assert confidence.min() >= 255 // 3
    certain = confidence > limit * 255
    assert np.array_equal(labels == 0, ~certain)  # 0 is the ignored value
    assert 0 < certain.sum() < certain.size
    with Image.open(tmp_path / "a_confidence_color.png") as picture:
        assert picture.height == 40
        assert picture.width > 50


def test_minimum_confidence_errors_name_the_option(trained, photos, tmp_path):
    names = {**trained, "DATASET.classes": "[a,b,c]"}  # no label value is ignored
    for changed, arguments, name in (
        (trained, ["--min-confidence", 0.5], "--labels"),
        (trained, ["--labels", "--min-confidence", 1.5], "--min-confidence"),
        (names, ["--labels", "--min-confidence", 0.5], "DATASET.ignore_values"),
    ):
        assert name in segment(changed, tmp_path, photos / "a.jpg", *arguments, code=2).stderr


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_unreadable_image_is_skipped_and_reported(trained, photos, tmp_path, devices):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    done = segment(trained, tmp_path / "out", photos, "--gpu", devices, code=1)
    assert "5 of 6 images segmented" in done.stdout
    assert re.search(r"skipped: .*broken\.jpg", done.stdout)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5


def test_results_of_earlier_runs_are_no_input(trained, photos, tmp_path):
    segment(trained, tmp_path / "one", photos / "day" / "*.jpg")
    assert [p.name for p in (tmp_path / "one").rglob("*.png")] == ["a.png"]
    for imgs in (photos, photos / "**" / "*.*"):
        for result in (photos / "results", photos):
            done = segment(trained, result, imgs, "--overlay", "--index")
            assert "5 of 5 images segmented" in done.stdout, done.stderr


def test_file_names_that_are_not_valid_text(trained, tmp_path):
    """Names that are not UTF-8 are escaped in the report, and unchanged in JSON files and lists."""
    folder = tmp_path / "data"
    write_pairs(folder, [(40, 50)] * 2)
    name = os.fsdecode(b"M\xfcller.png")
    for kind in ("images", "annotations"):
        (folder / kind / "00.png").rename(folder / kind / name)
    segment(trained, tmp_path / "out", folder / "images", "--json")
    content = json.loads((tmp_path / "out" / os.fsdecode(b"M\xfcller.json")).read_text())
    assert content["image"] == str(folder / "images" / name)
    write_odgt(load_records(folder, folder), tmp_path / "list.odgt")
    assert {Path(record["fpath_img"]).name for record in load_records(tmp_path / "list.odgt")} == {name, "01.png"}
    changes = {"DATASET.root_dataset": folder, "DATASET.list_val": tmp_path / "list.odgt", "VAL.visualize": True}
    script("eval.py", {**trained, **changes}, env={"PYTHONIOENCODING": "utf-8"})
    page = (Path(trained["DIR"]) / "result" / "report.html").read_text()
    assert 'src="images/M%FCller.png"' in page
    assert "images/M\\udcfcller.png: mean IoU" in page


@pytest.mark.parametrize(("imgs", "message"), [("nowhere.jpg", "nowhere.jpg"), ("*.x", "*.x"), (".", "z.png")])
def test_wrong_input_gives_one_sentence(trained, photos, imgs, message):
    """The input is a missing file, a pattern without matches, or a file that an output would overwrite."""
    (photos / "z.png").write_bytes((photos / "b.PNG").read_bytes())
    errors = segment(trained, photos, photos if imgs == "." else photos / imgs, code=2).stderr
    assert errors.startswith("error: ")
    assert message in errors


@pytest.mark.parametrize("name", ["train.py", "eval.py", "test.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["TRAIN.lr_encodr", "1"], "TRAIN.lr_encoder"), (["--cfg", "nowhere.yaml"], "nowhere.yaml")],
)
def test_wrong_options_give_no_traceback(name, arguments, message):
    extra = ["--imgs", "x"] if name == "test.py" else []
    assert message in here(name, *extra, *arguments, code=2).stderr


@pytest.mark.parametrize("devices", ["cpu,0", "99", "x"])
def test_unknown_devices_are_refused(devices):
    with pytest.raises(UserError, match=devices):
        in_process("train.py", "--gpu", devices)


@pytest.mark.parametrize("name", ["train.py", "eval.py", "eval_multipro.py", "test.py"])
def test_help_of_a_script_has_examples(name):
    assert here(name, "--help").stdout.count(f"python {name} ") >= 3


@pytest.mark.parametrize("tool", ["demo", "export", "dataset.doctor", "dataset.synthetic"])
def test_help_of_a_tool_shows_how_to_call_it(tool):
    assert script(f"mit_semseg.{tool}", "--help").stdout.startswith(f"usage: python -m mit_semseg.{tool} [-h]")
