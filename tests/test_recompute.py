"""Blocks that are computed again learn what they learn otherwise, and keep less."""

import copy

import pytest
import torch

from mit_semseg.engine import MaskedNLLLoss, Processes
from mit_semseg.engine.distributed import parallel
from mit_semseg.lib.nn import enable_activation_checkpointing
from mit_semseg.lib.utils import UserError
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.layers import NORMS


def step(module, feed):
    """State after a step of plain gradient descent, and the bytes that its graph kept."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = module(feed)
    loss.backward()
    with torch.no_grad():
        for p in module.parameters():
            p -= 0.01 * p.grad
    return module.state_dict(), sum(kept.values())


@pytest.mark.parametrize("norm", ["batch", "sync"])
@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenetv2dilated", pytest.param("hrnetv2", marks=pytest.mark.long)]
)
def test_a_step_is_the_same(name, norm):
    torch.manual_seed(0)
    encoder = ModelBuilder.build_encoder(name, pretrained=False, norm_layer=NORMS[norm])
    decoder = ModelBuilder.build_decoder("c1", num_class=3, in_channels=encoder.out_channels)
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss()).double().train()
    feed = {"img_data": torch.randn(2, 3, 64, 64).double(), "seg_label": torch.randint(-1, 3, (2, 8, 8))}
    other = copy.deepcopy(module)
    assert enable_activation_checkpointing(other.encoder) == {"mobilenetv2dilated": 1}.get(name, 4)
    (plain, much), (again, little) = step(module, feed), step(other, feed)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, msg=key)
    assert little < 0.6 * much


def test_nothing_is_computed_again_in_inference():
    encoder, calls = ModelBuilder.build_encoder("resnet18", pretrained=False), []
    enable_activation_checkpointing(encoder)
    encoder.layer2[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 32, 32)
    encoder.eval()(x)[0].sum().backward()
    assert len(calls) == 1
    encoder.train()(x)[0].sum().backward()
    assert len(calls) == 3


def test_replicas_of_one_process_are_refused():
    module = ModelBuilder.build_encoder("resnet18", pretrained=False)
    enable_activation_checkpointing(module)
    with pytest.raises(UserError, match="does not work with several devices of one process"):
        parallel(module, [torch.device("cpu")] * 2, Processes())
