"""Activation checkpointing saves memory and does not change the training."""

import copy

import pytest
import torch

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.lib.nn import enable_activation_checkpointing
from mit_semseg.models import ModelBuilder, SegmentationModule

BLOCKS = {"resnet18": 8, "resnet50": 16, "mobilenetv2dilated": 17, "hrnetv2": 12}


def step(module, batch):
    """Return the loss, the number of bytes saved for the backward pass, and a dict of gradients and buffers."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = module(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return loss, sum(kept.values()), gradients | dict(module.named_buffers())


@pytest.mark.parametrize("name", [*list(BLOCKS)[:3], pytest.param("hrnetv2", marks=pytest.mark.long)])
def test_training_step_is_bit_identical_and_keeps_less_memory(name):
    encoder = ModelBuilder.build_encoder(name, pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=3, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss()).train()
    batch = {"img_data": torch.randn(2, 3, 64, 64), "seg_label": torch.randint(-1, 3, (2, 8, 8))}
    checkpointed = copy.deepcopy(module)
    assert enable_activation_checkpointing(checkpointed.encoder) == BLOCKS[name]
    assert list(checkpointed.state_dict()) == list(module.state_dict())
    (loss, bytes_kept, expected), (other_loss, fewer_bytes, tensors) = step(module, batch), step(checkpointed, batch)
    assert torch.equal(other_loss, loss)
    assert [key for key, value in expected.items() if not torch.equal(tensors[key], value)] == []
    assert fewer_bytes < 0.6 * bytes_kept


def test_blocks_are_recomputed_in_training_only():
    encoder, calls = ModelBuilder.build_encoder("resnet18", pretrained=False), []
    enable_activation_checkpointing(encoder)
    encoder.layer2[0].conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 32, 32)
    encoder.eval()(x)[0].sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        encoder.train()(x)
    assert len(calls) == 2
    encoder(x)[0].sum().backward()
    assert len(calls) == 4
