"""Network files, and networks on a local copy of the Hugging Face hub."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub import hub, program  # noqa: F401
from PIL import Image
from runs import ROOT, here
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scenes import options, tiny_module
from test_segmenter import PIXELS, folder, segmenter, write_weights  # noqa: F401

from mit_semseg import Segmenter
from mit_semseg.build import build_module
from mit_semseg.config import load_config
from mit_semseg.engine import RunFolder
from mit_semseg.lib.utils import UserError
from mit_semseg.predict.hub import model_card, read_results
from mit_semseg.predict.network_file import read_network


@pytest.fixture(scope="module")
def path(segmenter, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("network") / "a.safetensors"
    segmenter.save(path)
    return path


def test_loaded_network_gives_the_same_results(segmenter, path, tmp_path):  # noqa: F811
    loaded = Segmenter.from_file(path, device="cpu")
    expected, actual = segmenter(PIXELS), loaded(PIXELS)
    assert np.array_equal(actual.label_map, expected.label_map)
    assert actual.classes == expected.classes
    assert np.array_equal(loaded.table.raw, segmenter.table.raw)
    loaded.save(tmp_path / "again.safetensors")
    first, second = load_file(path), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_metadata(path, folder):  # noqa: F811
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["tree", "road", "sky"]
    assert json.loads(metadata["mean"]) == pytest.approx([123.675, 116.28, 103.53])
    options = json.loads(metadata["options"])
    assert options["MODEL.arch_encoder"] == "resnet18dilated"
    assert options["TRAIN.optim"] == "SGD"
    assert str(folder) not in str(metadata)  # paths stay private


def test_file_works_in_another_process_without_other_files(path, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    code = "import offline; offline.forbid()\nfrom mit_semseg import Segmenter\n"
    code += f"print(len(Segmenter.from_file({str(path)!r}, device='cpu')('image.png').classes))"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_options_replace_those_in_the_file(path):
    result = Segmenter.from_file(path, device="cpu", opts=["DATASET.imgSizes", "40"])
    assert result._options.imgSizes == 40 or tuple(result._options.imgSizes) == (40,)


@pytest.mark.parametrize("fault", ["missing", "damaged", "other format", "missing tensor"])
def test_unusable_file_is_named(path, tmp_path, fault):
    bad = tmp_path / "bad.safetensors"
    if fault == "damaged":
        bad.write_bytes(path.read_bytes()[:1000])
    elif fault == "other format":
        save_file({"a": torch.zeros(1)}, bad)
    elif fault == "missing tensor":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        del tensors["encoder.conv1.weight"]
        save_file(tensors, bad, metadata)
    with pytest.raises(UserError, match=r"bad\.safetensors") as error:
        Segmenter.from_file(bad)
    assert "\n" not in str(error.value)


def save_and_load(run, encoder, *more):
    """Save a network of the folder `run` to a file, compare the results of the loaded network, and return its options.

    If the folder has no weights, random weights are written first.
    """
    opts = ["DATASET.num_class", "3", "MODEL.arch_encoder", encoder, "MODEL.arch_decoder", "c1"]
    opts += ["DIR", str(run), "DATASET.imgSizes", "40", *more]
    if not list(run.glob("*_epoch_1.pth")):
        module = build_module(load_config(None, opts), torch.device("cpu"), resumed=True)
        RunFolder(run).save_weights(module, "epoch_1.pth")
    own = Segmenter.from_config(None, "epoch_1.pth", opts, device="cpu")
    own.save(run / "a.safetensors")
    loaded = Segmenter.from_file(run / "a.safetensors", device="cpu")
    assert np.array_equal(own(PIXELS).label_map, loaded(PIXELS).label_map)
    return opts


def test_network_with_in_place_norms(tmp_path):
    """In-place norms are recognized by the version numbers of the layers, which the file stores."""
    opts = save_and_load(tmp_path, "resnet18dilated", "MODEL.norm", "inplace")
    expected = Segmenter.from_config(None, "epoch_1.pth", opts, device="cpu")(PIXELS)
    loaded = Segmenter.from_config(None, str(tmp_path / "a.safetensors"), opts, device="cpu")
    assert np.array_equal(loaded(PIXELS).label_map, expected.label_map)
    with pytest.raises(UserError, match=r"a\.safetensors.*MODEL\.norm"):
        Segmenter.from_file(tmp_path / "a.safetensors", device="cpu", opts=["MODEL.norm", "sync"])


def test_version_1_network(tmp_path):
    """With weights of version 1.0, the encoder `resnet34` is `resnet34_v1`."""
    write_weights(tmp_path, "resnet34_v1", "c1", "epoch_1.pth", 3)
    save_and_load(tmp_path, "resnet34")


def test_network_of_timm(tmp_path):
    """The file also initializes the encoder of another network."""
    opts = save_and_load(tmp_path, "timm:test_efficientnet")
    module = build_module(load_config(None, opts), torch.device("cpu"), checkpoint="epoch_1.pth")
    opts += ["MODEL.weights_encoder", str(tmp_path / "a.safetensors")]
    again = build_module(load_config(None, opts), torch.device("cpu"))
    for key, value in module.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], value), key


def test_export_and_evaluation_of_a_network_file(folder, tmp_path):  # noqa: F811
    out = tmp_path / "network.safetensors"
    here("mit_semseg.export", "--cfg", folder / "own.yaml", "--format", "safetensors", "--out", out)
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    words = ["--cfg", folder / "own.yaml", "--imgs", tmp_path / "image.png", "--gpu", "cpu", "--index"]
    for name, checkpoint in (("a", "epoch_1.pth"), ("b", out)):
        here("test.py", *words, "TEST.checkpoint", checkpoint, "TEST.result", tmp_path / name)
    first, second = (np.asarray(Image.open(tmp_path / name / "image_index.png")) for name in "ab")
    assert np.array_equal(first, second)
    here("mit_semseg.export", "--cfg", folder / "own.yaml", "--format", "safetensors", "--int8", code=2)


def test_temperature_names_and_ignored_value_are_kept(tmp_path):
    opts = ["MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "DATASET.num_class", 3, "DIR", str(tmp_path)]
    opts += ["DATASET.classes", "[a,b,c]", "DATASET.ignore_values", "[255]", "MODEL.pretrained", False]
    module = build_module(load_config(None, opts), torch.device("cpu"))
    RunFolder(tmp_path).save_weights(module, "epoch_1.pth")
    (tmp_path / "temperature_epoch_1.json").write_text('{"temperature": 2.5}')
    path = tmp_path / "a.safetensors"
    Segmenter.from_cfg(load_config(None, opts), "epoch_1.pth", torch.device("cpu")).save(path)
    module, _, table = read_network(path)
    assert (module.temperature, table.ignored_value, module.decoder.class_names) == (2.5, 255, ("a", "b", "c"))
    assert build_module(load_config(None, opts), torch.device("cpu"), checkpoint=str(path)).temperature == 2.5
    other = path.rename(tmp_path / "a.pth")  # the format does not depend on the name
    result = Segmenter.from_file(other, device="cpu")(PIXELS)
    assert np.array_equal(result.label_values(1.0), np.full(PIXELS.shape[:2], 255))


def test_segmenter_of_a_module_cannot_be_saved(segmenter, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="configuration"):
        Segmenter(tiny_module(), segmenter.table, options()).save(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="USER/NAME"):
        segmenter.push_to_hub("hf:name")


# Hugging Face hub


@pytest.mark.long
def test_network_travels_over_the_hub(hub, path, tmp_path):  # noqa: F811
    address, files = hub
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    upload = f"""
segmenter = Segmenter.from_file({str(path)!r}, device="cpu")
print(segmenter.push_to_hub("user/net", example="image.png", token="hf_secret"))
print(segmenter("image.png").label_map.sum())
"""
    done = program(upload, address, tmp_path)
    assert done.returncode == 0, done.stderr
    link, expected = done.stdout.split()
    assert link == f"{address}/user/net"
    assert sorted(files) == ["README.md", "example.png", "model.safetensors"]
    assert "hf:user/net" in files["README.md"].decode()
    download = 'print(Segmenter.from_pretrained("hf:user/net", device="cpu")("image.png").label_map.sum())'
    done = program(download, address, tmp_path)
    assert done.stdout.split() == [expected], done.stderr


def test_failed_download_is_one_sentence(hub, tmp_path):  # noqa: F811
    code = """
for name in ("hf:user/other", "hf:no name"):
    try:
        Segmenter.from_pretrained(name)
    except UserError as error:
        print(error)
"""
    lines = program(code, hub[0], tmp_path).stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["hf:user/other", "hf:no name"]


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"\[hub\]"):
        Segmenter.from_pretrained("hf:user/net")


def test_model_card_has_the_metrics_of_the_checkpoint(segmenter, tmp_path):  # noqa: F811
    classes = [{"class": name, "iou": 0.5, "present": name != "sky"} for name in segmenter.table.labels]
    results = {"mean_iou": 0.31, "pixel_accuracy": 0.71, "images": 20, "iou_per_class": classes}
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "results.json").write_text(json.dumps(results | {"checkpoint": "epoch_2.pth"}))
    assert read_results(tmp_path, "epoch_1.pth") is None
    weights = tmp_path / "decoder_epoch_2.pth"
    weights.write_bytes(b"")
    os.utime(weights, ns=(0, 2**62))
    assert read_results(tmp_path, "epoch_2.pth") is None  # the weights were replaced after the evaluation
    os.utime(weights, ns=(0, 0))
    arguments = "user/net", "resnet18dilated + c1", segmenter.table
    assert "tree, road, sky" in model_card(*arguments, None, with_example=False)
    card = model_card(*arguments, read_results(tmp_path, "epoch_2.pth"), with_example=True)
    assert re.findall(r"\| (.+) \| ([\d.]+) \|", card) == [
        *(("mean IoU", "31.00"), ("pixel accuracy", "71.00"), ("IoU of tree", "50.00"), ("IoU of road", "50.00"))
    ]
    assert "(example.png)" in card
