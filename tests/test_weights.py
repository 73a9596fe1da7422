"""Reading of checkpoint files and strict loading of weights."""

import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scenes import TinyEncoder, tiny_module
from shared_data import shared

from mit_semseg.build import build_module
from mit_semseg.config import load_config
from mit_semseg.dataset import class_table
from mit_semseg.engine import RunFolder
from mit_semseg.models import DECODERS, ModelBuilder
from mit_semseg.models.weight_files import WeightsError, read_checkpoint, read_state_dict
from mit_semseg.models.weights import equal_names, load_weights, saved_class_names
from mit_semseg.predict.network_file import write_network


@pytest.fixture
def encoder_file(tmp_path):
    torch.save(TinyEncoder().state_dict(), tmp_path / "encoder.pth")
    return tmp_path / "encoder.pth"


def modify(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def assert_loads(path, expected):
    encoder = TinyEncoder()
    load_weights(encoder, path)
    assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())


def test_legacy_buffers_are_ignored_and_reported(encoder_file):
    def add_legacy(state):
        for key in [k for k in state if k.endswith("running_mean")]:
            stem = key.removesuffix("running_mean")
            state |= {f"{stem}_tmp_running_mean": torch.zeros(8), f"{stem}_tmp_running_var": torch.zeros(8)}
            state[f"{stem}_running_iter"] = torch.ones(1)
            del state[f"{stem}num_batches_tracked"]

    encoder = TinyEncoder()
    report = load_weights(encoder, modify(encoder_file, add_legacy))
    counts = {kind: len(names) for kind, names in report.items()}
    assert counts == {"loaded": 15, "legacy": 9, "missing": 3, "skipped": 0}
    state = torch.load(encoder_file, weights_only=True)
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items() if k in state)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda s: s.update(extra=torch.ones(1)), "extra"),
        (lambda s: s.pop("deep.1.running_mean"), r"deep\.1\.running_mean"),
        (lambda s: s.update({"deep.0.weight": torch.ones(2, 2)}), r"deep\.0\.weight is \(2, 2\), expected \(16, 8"),
    ],
)
def test_mismatch_is_an_error_and_changes_nothing(encoder_file, change, key):
    encoder = TinyEncoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"encoder\.pth.*{key}"):
        load_weights(encoder, modify(encoder_file, change))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_different_number_of_classes_needs_reset_classifier(tmp_path):
    torch.save(tiny_module(5).decoder.state_dict(), tmp_path / "d.pth")
    decoder = tiny_module(3, seed=1).decoder
    classifier = decoder.conv_last.weight.clone()
    with pytest.raises(WeightsError, match=r"MODEL\.reset_classifier True"):
        load_weights(decoder, tmp_path / "d.pth")
    report = load_weights(decoder, tmp_path / "d.pth", reset_classifier=True)  # the names are unknown
    assert report["skipped"] == [f"conv_last{head}.{leaf}" for head in ("", "_deepsup") for leaf in ("weight", "bias")]
    assert torch.equal(decoder.conv_last.weight, classifier)
    assert torch.equal(decoder.cbr[0].weight, torch.load(tmp_path / "d.pth", weights_only=True)["cbr.0.weight"])


@pytest.mark.parametrize("old_count", [3, 4])
@pytest.mark.parametrize("given", [False, True])
def test_reset_classifier_keeps_the_rows_of_equal_names(tmp_path, old_count, given):
    old_names, names = ["wall", "building;edifice", "sky", "tree"][:old_count], ["Sky", "edifice", "river"]
    old, new = tiny_module(old_count).decoder, tiny_module(3, seed=1).decoder
    if not given:
        old.class_names = old_names
    new.class_names, random = names, {key: value.clone() for key, value in new.state_dict().items()}
    torch.save(old.state_dict(), tmp_path / "d.pth")
    load_weights(new, tmp_path / "d.pth", reset_classifier=True, old_classes=old_names if given else ["x"] * old_count)
    for name, value in new.state_dict().items():
        loaded = old.state_dict()[name]
        if name.startswith("conv_last"):
            assert torch.equal(value, torch.stack([loaded[2], loaded[1], random[name][2]]))
        else:
            assert torch.equal(value, loaded)


@pytest.mark.parametrize("name", DECODERS)
def test_reset_classifier_changes_only_the_classifier_of_every_decoder(tmp_path, name):
    def build(count, names, **options):
        channels = (8, 16, 32, 64)
        return ModelBuilder.build_decoder(name, num_class=count, in_channels=channels, class_names=names, **options)

    old = build(4, ["wall", "sky", "tree", "car"])
    torch.save(old.state_dict(), tmp_path / "d.pth")
    new = build(2, ["tree", "river"], weights=str(tmp_path / "d.pth"), reset_classifier=True)
    classifier = {f"{layer}.{leaf}" for layer in new.classifier_layers() for leaf in ("weight", "bias")}
    before = old.state_dict()
    for key, value in new.state_dict().items():
        if key in classifier:
            assert torch.equal(value[0], before[key][2])
            assert len(value) == 2
        else:
            assert torch.equal(value, before[key]), key


def test_reset_classifier_without_equal_names_keeps_random_rows(tmp_path):
    old, new = tiny_module(3).decoder, tiny_module(3, seed=1).decoder
    old.class_names, new.class_names = ["a", "b", "c"], ["d", "e", "f"]
    random = {key: value.clone() for key, value in new.state_dict().items()}
    torch.save(old.state_dict(), tmp_path / "d.pth")
    load_weights(new, tmp_path / "d.pth", reset_classifier=True)
    for name, value in new.state_dict().items():
        assert torch.equal(value, random[name] if name.startswith("conv_last") else old.state_dict()[name])


def test_whole_names_precede_first_synonyms_and_other_synonyms():
    ade = class_table("ade20k", 150).names
    assert equal_names(ade, ade) == {i: i for i in range(150)}
    new = ["stool", "POT;jar", "screen", "car;"]
    assert [ade[i].split(";")[0] for i in equal_names(ade, new).values()] == ["stool", "pot", "screen", "car"]
    assert equal_names(["car;", "a;b"], ["bus;", "b"]) == {1: 1}


def test_trained_classifier_is_not_reset(tmp_path):
    """Evaluation and inference with the configuration of the training load all rows."""
    words = ["MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "MODEL.pretrained", False, "DIR", tmp_path]
    words += ["DATASET.num_class", 3, "MODEL.weights_decoder", tmp_path / "decoder_a.pth"]
    words = [str(word) for word in words]
    saved = build_module(load_config(None, [*words, "DATASET.classes", "[a,b,c]"]), torch.device("cpu"), resumed=True)
    RunFolder(tmp_path).save_weights(saved, "a.pth")
    cfg = load_config(None, [*words, "DATASET.classes", "[a,x,c]", "MODEL.reset_classifier", "True"])
    rows = [
        build_module(cfg, torch.device("cpu"), checkpoint=name).decoder.conv_last.weight for name in ("a.pth", None)
    ]
    assert torch.equal(rows[0], saved.decoder.conv_last.weight)
    assert (rows[1] == saved.decoder.conv_last.weight).flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(("names", "warns"), [("bac", True), ("abc", False), ("abd", False)])
def test_another_order_of_the_classes_is_a_warning(tmp_path, caplog, names, warns):
    old, new = tiny_module(3).decoder, tiny_module(3).decoder
    old.class_names, new.class_names = tuple("abc"), tuple(names)
    torch.save(old.state_dict(), tmp_path / "d.pth")
    load_weights(new, tmp_path / "d.pth")
    assert ("DATASET.classes" in caplog.text) == warns


def test_class_names_are_stored_in_every_kind_of_file(tmp_path):
    module, names = tiny_module(), ["a", "b", "c;d"]
    module.decoder.class_names = names
    folder = RunFolder(tmp_path)
    folder.save_weights(module, "best.pth")
    network = tmp_path / "net.safetensors"
    write_network(module, load_config(None, ["DATASET.num_class", 3]), class_table(names, 3), network)
    for path in (tmp_path / "decoder_best.pth", network):
        assert saved_class_names(read_state_dict(path)) == names
    assert saved_class_names(read_state_dict(tmp_path / "encoder_best.pth")) == ()


def test_file_saved_on_a_gpu_loads_without_one(encoder_file, tmp_path):
    """The test replaces the device `cpu` in the file by `cuda:0`."""
    moved, cpu, gpu = tmp_path / "gpu.pth", b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    with zipfile.ZipFile(encoder_file) as old, zipfile.ZipFile(moved, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            assert cpu in old.read(name) or not name.endswith("data.pkl")
            new.writestr(name, old.read(name).replace(cpu, gpu))
    assert_loads(moved, torch.load(encoder_file, weights_only=True))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_wrappers_and_prefixes_of_other_programs_are_removed(tmp_path, prefix, wrapper):
    expected = TinyEncoder().state_dict()
    state = {f"{prefix}{k}".replace("deep.", "deep._orig_mod."): v for k, v in expected.items()}
    other = {"epoch": 3, "best": np.float64(0.5), "seen": np.int64(7), "flag": np.bool_(True)}
    torch.save({wrapper: state, **other} if wrapper else state, tmp_path / "a.pth")
    assert_loads(tmp_path / "a.pth", expected)


def test_safetensors(tmp_path):
    expected = TinyEncoder().state_dict()
    save_file(expected, tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.safetensors", expected)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"b\.safetensors.*damaged"):
        read_checkpoint(tmp_path / "b.safetensors")


def test_history_with_numpy_scalars(tmp_path):
    files, module = RunFolder(tmp_path), tiny_module()
    files.save_weights(module, "epoch_2.pth")
    curves = {"epoch": [np.float64(0.5), 1.0], "loss": [np.float32(2.0), 1.5], "acc": [np.int64(0), np.float16(0.5)]}
    torch.save({"train": curves}, tmp_path / "history_epoch_2.pth")
    history = files.load_epoch(module, 2)
    assert history["train"] == {"epoch": [0.5, 1.0], "loss": [2.0, 1.5], "acc": [0, 0.5]}
    assert {type(x) for part in history.values() for points in part.values() for x in points} == {float, int}


class _Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": _Code()}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Code()))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(WeightsError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_file_is_named(tmp_path, name):
    for content in (b"", b"broken", b"PK\x03\x04rest", b"<html>", b"\x80\x02}q"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(("content", "description"), [({0: torch.zeros(1)}, "keys 0"), ([1, 2], "list")])
def test_file_without_state_dict_is_named(tmp_path, content, description):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=rf"a\.pth .*{description}"):
        load_weights(TinyEncoder(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"b\.pth.*a\.pth"):
        load_weights(TinyEncoder(), tmp_path / "b.pth")


def test_flipped_bit_is_detected(encoder_file):
    """After any bit was flipped, the file is refused, or all tensors are unchanged."""
    content, rng = encoder_file.read_bytes(), random.Random(0)
    saved, refused = read_checkpoint(encoder_file), 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        encoder_file.write_bytes(flipped)
        try:
            loaded = read_checkpoint(encoder_file)
        except WeightsError:
            refused += 1
        else:
            assert loaded.keys() == saved.keys()
            assert all(torch.equal(value, saved[key]) for key, value in loaded.items())
    assert refused > 50


def test_published_decoder_loads():
    path = shared("data/published/ade20k-mobilenetv2dilated-c1_deepsup/decoder_epoch_20.pth")
    decoder = ModelBuilder.build_decoder("c1_deepsup", fc_dim=320, num_class=150)
    counts = {kind: len(names) for kind, names in load_weights(decoder, path).items()}
    assert counts == {"loaded": 16, "legacy": 6, "missing": 0, "skipped": 0}
