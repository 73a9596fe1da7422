"""Loss of untrained decoders."""

import math

import pytest
import torch
import torch.nn.functional as F

from mit_semseg.models import DECODERS, ModelBuilder
from mit_semseg.models.weights import load_weights

MARGIN = 1.5  # above ln(num_class), the loss of equal probabilities


def losses(decoder, num_class):
    """Return the cross entropy of every head on feature maps like those of a trained encoder."""
    torch.manual_seed(1)
    sizes = [(24, 24), (12, 12), (12, 12), (12, 12)]
    features = [torch.randn(2, c, *size).relu() for c, size in zip((256, 512, 1024, 2048), sizes, strict=True)]
    label = torch.randint(0, num_class, (2, 24, 24))
    decoder.train()
    with torch.no_grad():
        heads = decoder.logits(features)
    return [F.cross_entropy(decoder.resize(logits, (24, 24)), label).item() for logits in heads]


@pytest.mark.parametrize("num_class", [2, 11, 150])
@pytest.mark.parametrize("name", DECODERS)
def test_initial_loss_is_close_to_equal_probabilities(name, num_class):
    torch.manual_seed(0)
    decoder = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=num_class)
    assert max(losses(decoder, num_class)) < math.log(num_class) + MARGIN


@pytest.mark.parametrize("name", ["c1_deepsup", "ppm_deepsup", "upernet", "aspp_deepsup", "psp_deepsup"])
def test_loss_of_a_reset_classifier_is_close_to_equal_probabilities(name, tmp_path):
    torch.manual_seed(0)
    trained = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=150)
    torch.save(trained.state_dict(), tmp_path / "decoder.pth")
    decoder = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=2)
    load_weights(decoder, tmp_path / "decoder.pth", reset_classifier=True)
    assert max(losses(decoder, 2)) < math.log(2) + MARGIN
