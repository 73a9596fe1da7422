"""Entry points in hubconf.py, which `torch.hub.load` calls."""

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


def test_published_weights_with_a_new_classifier_and_random_weights(site):
    name = "ade20k-resnet18dilated-c1_deepsup"
    with pytest.raises(UserError, match=r"encoder_epoch_20\.pth"):
        load(name)
    write_weights(site.folder / "model" / "pytorch" / name, "resnet18dilated", "c1_deepsup", "epoch_20.pth", 150)
    for options in ({"reset_classifier": True}, {"pretrained": False}):
        module = load(name, num_class=7, **options)
        with torch.inference_mode():
            scores = module({"img_data": torch.randn(1, 3, 64, 72)}, segSize=(60, 70))
        torch.testing.assert_close(scores.sum(1), torch.ones(1, 60, 70))
        assert scores.shape[1] == 7
