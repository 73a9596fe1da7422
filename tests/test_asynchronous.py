"""Training steps and evaluation do not synchronize with the device.

These tests need no GPU. They run on the CPU or on the meta device, and a dispatch mode records operators that would
synchronize on a GPU. Reading a value of a meta tensor is an error. test_gpu.py uses `torch.cuda.set_sync_debug_mode`.
"""

import pytest
import torch
from scenes import options, tiny_module, write_data_set
from torch.utils._python_dispatch import TorchDispatchMode
from training import make_trainer

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import World, build_loss
from mit_semseg.engine.losses import LOSSES
from mit_semseg.engine.train_step import LossWeights
from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.evaluation.metrics import confusion_counts
from mit_semseg.models import DECODERS, ModelBuilder, SegmentationModule

META = torch.device("meta")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "bincount"}


class SyncRecorder(TorchDispatchMode):
    """Records the operators that would synchronize with a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.copies = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and [
            x for x in args[1] if x is not None and x.dtype == torch.bool
        ]
        if name in READS or masks:
            self.found.append(name)
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(result, torch.Tensor) and result.is_meta:
            source = args[1] if name == "copy_" else args[0]
            if not source.is_meta:
                self.copies += 1
                if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                    self.found.append(f"{name} from {source.device}")
        return result


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return TrainDataset(write_data_set(tmp_path_factory.mktemp("data")), "train", options(), 2).as_uint8()[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_training_step_reads_no_values(batch, tmp_path, loss, amp):
    """Run real steps on the CPU, where a fused optimizer and the gradient scaler work as on a GPU."""
    module = tiny_module(crit=build_loss(loss, class_weights=(1, 2, 3) if loss == "ce" else ()))
    trainer = make_trainer(tmp_path, module=module, amp=amp, clip_grad=1.0, accumulate=2)
    micro_batches = [[batch], [batch]]
    weights = LossWeights(micro_batches, module.crit, trainer.world, False)
    for _ in range(2):
        with SyncRecorder() as recorder:
            trainer.train_step([trainer.to_devices(batches) for batches in micro_batches], weights)
        assert not recorder.found
    assert trainer.metrics.read()[2] == 2


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [("resnet18dilated", name) for name in DECODERS] + [("hrnetv2", "c1"), ("mobilenetv2dilated", "c1_deepsup")],
)
def test_network_copies_nothing_to_the_device(batch, tmp_path, encoder, decoder):
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=3, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, build_loss(), 0.4).to(META)
    trainer = make_trainer(tmp_path, module=module, world=World(devices=[META]), channels_last=True)
    with SyncRecorder() as recorder:
        (moved,) = trainer.to_devices([batch])
        loss, accuracy = module(moved)
        loss.backward()
        trainer.metrics.add(1, loss.detach().reshape(1), torch.stack([loss.detach(), accuracy]).double())
    assert not recorder.found
    assert recorder.copies == 2  # images and labels


@pytest.mark.parametrize("opts", [{}, {"flip": True}, {"window_size": (32, 40)}])
def test_evaluation_reads_and_copies_nothing(opts):
    predictor = Predictor(tiny_module().to(META), META, InferenceOptions(**opts))
    scales = [torch.empty(1, 3, *size, device=META) for size in ((48, 64), (72, 96))]
    item = {"img_ori": torch.empty(61, 83, 3).numpy(), "img_data": scales}
    with SyncRecorder() as recorder:
        (label_map,) = predictor.label_maps([item])
        counts = confusion_counts(label_map, torch.empty(61, 83, dtype=torch.int64, device=META), 3)
    assert label_map.dtype == torch.uint8
    assert label_map.shape == (61, 83)
    assert counts.shape == (4, 4)
    assert not recorder.found
    assert not recorder.copies
