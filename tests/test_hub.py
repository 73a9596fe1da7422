"""torch.hub finds every published network in the checkout."""

from pathlib import Path

import pytest
import torch

from mit_semseg.models.published import PUBLISHED

ROOT = str(Path(__file__).resolve().parents[1])


def test_the_list_is_that_of_the_published_networks():
    assert set(torch.hub.list(ROOT, source="local")) == {name.replace("-", "_") for name in PUBLISHED} | {"segmenter"}


@pytest.mark.parametrize("name", ["ade20k_mobilenetv2dilated_c1_deepsup", "ade20k_resnet18dilated_ppm_deepsup"])
def test_a_network_without_its_weights(name):
    module = torch.hub.load(ROOT, name, source="local", pretrained=False, num_class=7)
    with torch.inference_mode():
        scores = module({"img_data": torch.randn(1, 3, 64, 72)}, segSize=(60, 70))
    assert scores.shape == (1, 7, 60, 70)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 60, 70))
    assert "published for ADE20K" in torch.hub.help(ROOT, name, source="local")
