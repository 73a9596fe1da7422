"""A network that has learnt nothing starts near the loss of equal probabilities, ln C, for any number of classes."""

import math

import pytest
import torch
import torch.nn.functional as F

from mit_semseg.models import DECODERS, ModelBuilder
from mit_semseg.models.weights import load_weights

ROOM = 1.5  # above ln C


def losses(decoder, num_class):
    """Cross entropy of every head on feature maps as a trained encoder gives them: non-negative, of unit scale."""
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
def test_initial_loss_is_near_that_of_equal_probabilities(name, num_class):
    torch.manual_seed(0)
    decoder = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=num_class)
    for loss in losses(decoder, num_class):
        assert loss < math.log(num_class) + ROOM


@pytest.mark.parametrize("name", ["c1_deepsup", "ppm_deepsup", "upernet", "aspp_deepsup", "psp_deepsup"])
def test_a_reset_classifier_starts_near_that_loss(name, tmp_path):
    torch.manual_seed(0)
    trained = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=150)
    torch.save(trained.state_dict(), tmp_path / "decoder.pth")
    decoder = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=2)
    load_weights(decoder, tmp_path / "decoder.pth", reset_classifier=True)
    for loss in losses(decoder, 2):
        assert loss < math.log(2) + ROOM
