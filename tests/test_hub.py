"""Entry points of torch.hub."""

import importlib.util
from pathlib import Path

import pytest
import torch
from test_segmenter import write_weights

from mit_semseg.lib.utils import UserError
from mit_semseg.models.pretrained import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name.replace("-", "_"), source="local", **kwargs)


def test_every_published_model_has_an_entry_point():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    entries = {name for name in vars(hub) if callable(getattr(hub, name)) and not name.startswith("_")}
    assert entries == {name.replace("-", "_") for name in PUBLISHED} | {"segmenter"}
    assert all("published" in getattr(hub, name).__doc__ for name in entries)


@pytest.mark.parametrize("name", ["ade20k-mobilenetv2dilated-c1_deepsup", "ade20k-resnet18dilated-ppm_deepsup"])
def test_model_with_random_weights(name):
    module = load(name, pretrained=False, num_class=7)
    with torch.inference_mode():
        scores = module({"img_data": torch.randn(1, 3, 64, 72)}, segSize=(60, 70))
    assert scores.shape == (1, 7, 60, 70)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 60, 70))


def test_model_with_published_weights_and_a_new_classifier(tmp_path, monkeypatch):
    name = "ade20k-resnet18dilated-c1_deepsup"
    write_weights(tmp_path / "pytorch" / name, "resnet18dilated", "c1_deepsup", "epoch_20.pth", 150)
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", tmp_path.as_uri())
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "cache"))
    module = load(name, num_class=7, reset_classifier=True)
    with torch.inference_mode():
        assert module({"img_data": torch.randn(1, 3, 64, 64)}, segSize=(64, 64)).shape == (1, 7, 64, 64)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", (tmp_path / "missing").as_uri())
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"encoder_epoch_20\.pth"):
        load("ade20k-resnet18dilated-ppm_deepsup")
