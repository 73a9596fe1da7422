"""Untrained decoders predict nearly equal probabilities for all classes."""

import math

import pytest
import torch
import torch.nn.functional as F

from mit_semseg.models import DECODERS, ModelBuilder

MARGIN = 1.5  # allowed excess over ln(num_class), the loss for equal probabilities


@pytest.mark.parametrize("num_class", [2, 11, 150])
@pytest.mark.parametrize("name", DECODERS)
def test_initial_loss_is_close_to_equal_probabilities(name, num_class):
    """The random feature maps have values like those of a trained encoder."""
    decoder = ModelBuilder.build_decoder(name, fc_dim=2048, num_class=num_class).train()
    features = [torch.randn(2, c, size, size).relu() for c, size in ((256, 24), (512, 12), (1024, 12), (2048, 12))]
    label = torch.randint(0, num_class, (2, 24, 24))
    with torch.no_grad():
        heads = decoder.logits(features)
    losses = [F.cross_entropy(decoder.resize(logits, (24, 24)), label).item() for logits in heads]
    assert max(losses) < math.log(num_class) + MARGIN
