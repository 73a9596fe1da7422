"""Weights: strict loading and its report, untrusted files, downloads from a local server, the ways out when offline."""

import os
import pickle
import random
import sys
import zipfile

import numpy as np
import pytest
import torch
from near import assert_near
from PIL import Image
from runs import ROOT, here
from scenes import TinyEncoder, tiny_module
from shared_data import shared
from torch import nn

from mit_semseg.engine import RunFolder
from mit_semseg.models import ModelBuilder, pretrained
from mit_semseg.models.pretrained import download_published
from mit_semseg.models.weight_files import WeightsError, read_checkpoint, read_state_dict
from mit_semseg.models.weights import load_weights


@pytest.fixture
def encoder_file(tmp_path):
    torch.save(TinyEncoder().state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def altered(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def test_report_of_a_legacy_file(encoder_file):
    def legacy(state):
        for key in [k for k in state if k.endswith("running_mean")]:
            stem = key.removesuffix("running_mean")
            state.update({f"{stem}_tmp_running_mean": torch.zeros(8), f"{stem}_tmp_running_var": torch.zeros(8)})
            state[f"{stem}_running_iter"] = torch.ones(1)
            del state[f"{stem}num_batches_tracked"]

    encoder = TinyEncoder()
    report = load_weights(encoder, altered(encoder_file, legacy), what="encoder tiny")
    assert (len(report.legacy), len(report.missing), len(report.loaded)) == (9, 3, 15)
    assert "encoder tiny: loaded 15 entries" in str(report)
    assert "9 legacy batch-norm buffers not needed" in str(report)
    state = torch.load(encoder_file, weights_only=True)
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items() if k in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=torch.ones(1)), "unknown to the model: extra"),
        (lambda s: s.pop("deep.0.weight"), r"missing in the file: deep\.0\.weight"),
        (
            lambda s: s.update({"deep.0.weight": torch.ones(2, 2)}),
            r"other shape: deep\.0\.weight is \(2, 2\), the model's",
        ),
        (lambda s: s.pop("deep.1.running_mean"), r"missing in the file: deep\.1\.running_mean"),
    ],
)
def test_anything_else_is_an_error_and_changes_nothing(encoder_file, change, message):
    encoder = TinyEncoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_weights(encoder, altered(encoder_file, change))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_file_saved_on_a_gpu_loads_without_one(encoder_file, tmp_path):
    """The file's own tag for the device of every tensor is rewritten to cuda:0."""
    moved = tmp_path / "gpu.pth"
    with zipfile.ZipFile(encoder_file) as old, zipfile.ZipFile(moved, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, content)
    encoder = TinyEncoder()
    load_weights(encoder, moved)
    expected = torch.load(encoder_file, weights_only=True)
    assert all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "module.module.", "_orig_mod.module."]
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_wrappers_of_other_tools_are_understood(tmp_path, prefix, wrapper):
    """Of data parallel and compiled models, and with NumPy's numbers beside the weights."""
    encoder, other = TinyEncoder(), TinyEncoder()
    state = {f"{prefix}{k}": v for k, v in encoder.state_dict().items()}
    beside = {"epoch": 3, "best": np.float64(0.5), "seen": np.int64(7), "flag": np.bool_(True)}
    torch.save({wrapper: state, **beside} if wrapper else state, tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))


def test_a_compiled_part_of_a_network(tmp_path):
    encoder, other = TinyEncoder(), TinyEncoder()
    compiled = {key.replace("stem.", "stem._orig_mod."): value for key, value in encoder.state_dict().items()}
    torch.save(compiled, tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))
    torch.save({**compiled, **encoder.state_dict()}, tmp_path / "twice.pth")
    with pytest.raises(WeightsError, match=r"twice\.pth .* differ in prefixes"):
        load_weights(other, tmp_path / "twice.pth")


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    encoder, other = TinyEncoder(), TinyEncoder()
    safetensors.save_file(encoder.state_dict(), tmp_path / "a.safetensors")
    load_weights(other, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:50])
    with pytest.raises(WeightsError, match=r"b\.safetensors cannot be read"):
        load_weights(other, tmp_path / "b.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(WeightsError, match=r"a\.safetensors.*pip install safetensors"):
        load_weights(other, tmp_path / "a.safetensors")


def test_a_history_with_numbers_of_numpy(tmp_path):
    """As programs wrote them that kept the means of NumPy."""
    files, module = RunFolder(tmp_path), tiny_module()
    files.save_weights(module, "epoch_2.pth")
    numbers = {
        "epoch": [np.float64(0.5), 1.0],
        "loss": [np.float32(2.0), 1.5],
        "acc": [np.float64(0.25), np.float16(0.5)],
    }
    val = {"epoch": [np.int64(1), 2], "mean_iou": [], "acc": []}
    torch.save({"train": numbers, "val": val}, tmp_path / "history_epoch_2.pth")
    history = files.load_epoch(module, 2)
    assert history["train"] == {"epoch": [0.5, 1.0], "loss": [2.0, 1.5], "acc": [0.25, 0.5]}
    assert history["val"]["epoch"] == [1, 2]
    assert {type(x) for part in history.values() for points in part.values() for x in points} == {float, int}


def test_a_published_recipe_downloads_its_weights(site, tmp_path, monkeypatch):
    """Into DIR, by test.py and eval.py alike; the classes of another recipe are none of them."""
    folder, _ = site
    name = "ade20k-mobilenetv2dilated-c1_deepsup"
    source = folder / "model" / "pytorch" / name
    source.mkdir(parents=True)
    monkeypatch.setattr("mit_semseg.models.pretrained.SHA256", {})
    encoder = ModelBuilder.build_encoder("mobilenetv2dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1_deepsup", fc_dim=320)
    for part, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module.state_dict(), source / f"{part}_epoch_20.pth")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "a.png")
    words = ["--cfg", ROOT / "config" / f"{name}.yaml", "--gpu", "cpu", "DATASET.imgSizes", "(40,)"]
    given = [*words, "TEST.result", tmp_path / "out", "DIR", tmp_path / name]
    done = here("test.py", "--imgs", tmp_path / "a.png", *given)
    assert done.returncode == 0, done.stderr
    assert f"downloading the published model {name} to {tmp_path / name}" in done.stdout
    assert (tmp_path / name / "decoder_epoch_20.pth").is_file()
    assert "downloading" not in here("test.py", "--imgs", tmp_path / "a.png", *given).stdout
    done = here("test.py", "--imgs", tmp_path / "a.png", *given[:-1], tmp_path / "own")
    assert done.returncode == 2
    assert "encoder_epoch_20.pth" in done.stderr
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    (tmp_path / name / "decoder_epoch_20.pth").unlink()
    (tmp_path / name / "encoder_epoch_20.pth").unlink()
    done = here("test.py", "--imgs", tmp_path / "a.png", *given)
    assert done.returncode == 2
    for way in ("MIT_SEMSEG_MIRROR", "encoder_epoch_20.pth", str(tmp_path / name)):
        assert way in done.stderr


def test_another_number_of_classes(tmp_path):
    torch.save(tiny_module(5).decoder.state_dict(), tmp_path / "d.pth")
    decoder = tiny_module(3, seed=1).decoder
    head = decoder.conv_last.weight.clone()
    with pytest.raises(WeightsError, match=r"another number of classes.*MODEL\.reset_classifier True"):
        load_weights(decoder, tmp_path / "d.pth")
    report = load_weights(decoder, tmp_path / "d.pth", reset_classifier=True)
    expected = [f"conv_last{branch}.{leaf}" for branch in ("", "_deepsup") for leaf in ("weight", "bias")]
    assert report.skipped == expected
    assert torch.equal(decoder.conv_last.weight, head)
    assert torch.equal(decoder.cbr[0].weight, torch.load(tmp_path / "d.pth", weights_only=True)["cbr.0.weight"])


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/mit_semseg_must_not_exist",)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    torch.save({"x": _Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(WeightsError, match=rf"{name} was refused"):
            read_checkpoint(tmp_path / name)
    assert not os.path.exists("/tmp/mit_semseg_must_not_exist")


@pytest.mark.parametrize("content", [b"", b"broken", b"PK\x03\x04rest", b"<html>", b"\x80\x02}q"])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_checkpoint(tmp_path / "x.pth")


def test_names_that_are_none(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth holds no state dict .* but keys 0"):
        read_state_dict(tmp_path / "x.pth")


def test_no_flipped_bit_goes_unnoticed(encoder_file):
    """Wherever it is in the file: it is refused, or what is read is what was saved."""
    content, rng = encoder_file.read_bytes(), random.Random(0)
    saved = read_checkpoint(encoder_file)
    refused = 0
    for _ in range(300):
        place = rng.randrange(len(content))
        flipped = content[place] ^ 1 << rng.randrange(8)
        encoder_file.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        try:
            read = read_checkpoint(encoder_file)
        except WeightsError:
            refused += 1
        else:
            assert read.keys() == saved.keys()
            assert all(torch.equal(value, saved[key]) for key, value in read.items())
    assert refused > 50


def test_what_is_no_state_dict_says_what_it_is(tmp_path):
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"no state dict .* but list"):
        load_weights(TinyEncoder(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"no checkpoint .*b\.pth; there is a\.pth"):
        load_weights(TinyEncoder(), tmp_path / "b.pth")


def test_the_real_published_decoder():
    path = shared("data/published/ade20k-mobilenetv2dilated-c1_deepsup/decoder_epoch_20.pth")
    decoder = ModelBuilder.build_decoder("c1_deepsup", fc_dim=320, num_class=150)
    report = load_weights(decoder, path, what="decoder c1_deepsup")
    assert len(report.legacy) == 6
    assert len(report.loaded) == 16
    assert [report.surplus, report.skipped, report.missing] == [[], [], []]


def test_a_compressed_checkpoint_is_not_unpacked(encoder_file, tmp_path):
    with (
        zipfile.ZipFile(encoder_file) as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(WeightsError, match=r"b\.pth was refused: it is compressed"):
        read_checkpoint(tmp_path / "b.pth")


# Downloads


def test_imagenet_base_from_the_mirror_then_from_the_cache(site, tmp_path):
    folder, _ = site
    source = ModelBuilder.build_encoder("resnet18", pretrained=False)
    state = {**source.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    (folder / "model" / "pretrained_resnet").mkdir()
    torch.save(state, folder / "model" / "pretrained_resnet" / "resnet18-imagenet.pth")
    encoder = ModelBuilder.build_encoder("resnet18dilated", weights="")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), source.parameters(), strict=True))
    cached = tmp_path / "cache" / "resnet18-imagenet.pth"
    assert cached.is_file()
    (folder / "model" / "pretrained_resnet" / "resnet18-imagenet.pth").unlink()
    ModelBuilder.build_encoder("resnet18")  # from the cache
    report = pretrained.load_imagenet_weights(encoder, "resnet18dilated")
    assert report.surplus == ["fc.weight", "fc.bias"]


def test_vgg_base_is_the_convolutional_form_of_torchvisions():
    """A fully connected layer over 7x7 maps is a 7x7 convolution; convolutions keep their order."""
    theirs = {f"features.{i}.weight": torch.full((1,), float(i)) for i in (0, 2, 5, 24)}
    theirs |= {"classifier.0.weight": torch.randn(2, 512 * 49), "classifier.0.bias": torch.randn(2)}
    theirs |= {"classifier.3.weight": torch.randn(3, 4096), "classifier.3.bias": torch.randn(3)}
    theirs |= {"classifier.6.weight": torch.randn(1, 1), "classifier.6.bias": torch.randn(1)}
    own = ["features.0.weight", "features.2.weight", "features.5.weight", "features.23.weight", "conv6.weight"]
    ours = pretrained.convert_torchvision_vgg(theirs, own)
    assert [ours[key].item() for key in own[:4]] == [0, 2, 5, 24]
    x = torch.randn(1, 512, 7, 7)
    convolved = nn.functional.conv2d(x, ours["conv6.weight"], ours["conv6.bias"]).flatten()
    connected = nn.functional.linear(x.flatten(), theirs["classifier.0.weight"], theirs["classifier.0.bias"])
    assert_near(convolved, connected)
    assert ours["conv7.weight"].shape == (3, 4096, 1, 1)


def test_offline_names_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        ModelBuilder.build_encoder("resnet50dilated", weights="")
    for way in ("MODEL.weights_encoder", "MODEL.pretrained False", "pretrained=False", "MIT_SEMSEG_MIRROR"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="no ImageNet base was published for resnet34dilated"):
        ModelBuilder.build_encoder("resnet34dilated")
    assert isinstance(ModelBuilder.build_encoder("resnet18", pretrained=False), nn.Module)


def test_published_pair(site, monkeypatch, tmp_path):
    folder, _ = site
    name = "ade20k-resnet50-upernet"
    (folder / "model" / "pytorch" / name).mkdir(parents=True)
    for part in ("encoder", "decoder"):
        torch.save({part: torch.ones(1)}, folder / "model" / "pytorch" / name / f"{part}_epoch_30.pth")
    encoder, decoder = download_published(name)
    assert encoder == tmp_path / "cache" / name / "encoder_epoch_30.pth"
    assert decoder.is_file()
    with pytest.raises(WeightsError, match=r"no published model 'ade20k-x'; there are ade20k-mobilenetv2dilated"):
        download_published("ade20k-x")


def test_a_file_with_another_hash_is_not_kept(site, tmp_path):
    folder, _ = site
    name = "ade20k-resnet18dilated-ppm_deepsup"
    (folder / "model" / "pytorch" / name).mkdir(parents=True)
    (folder / "model" / "pytorch" / name / "encoder_epoch_20.pth").write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"expected adcdcbf7530e.*MIT_SEMSEG_MIRROR"):
        download_published(name, tmp_path / "ckpt")
    assert list((tmp_path / "ckpt").iterdir()) == []
