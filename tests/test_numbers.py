"""Training with fp16 overflows, without labelled pixels, with one class and with 1000 classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from runs import same
from scenes import options, tiny_module, write_data_set
from training import make_trainer

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import MaskedNLLLoss, TrainingStopped, World
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.distributed import parallelize
from mit_semseg.engine.losses import build_loss
from mit_semseg.engine.train_step import LossWeights
from mit_semseg.evaluation import Predictor, evaluate
from mit_semseg.evaluation.evaluator import LoadOptions
from mit_semseg.lib.nn import to_batchnorm


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


class OverflowDataset(TrainDataset):
    """A training dataset; images exceed the range of float16 in batches whose index is in `overflows`."""

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        return {**batch, "img_data": batch["img_data"] * 1e6} if index in self.overflows else batch


def train(root, folder, overflows, **changes):
    trainer = make_trainer(folder, module=tiny_module(crit=MaskedNLLLoss()), amp="fp16", **changes)
    dataset = OverflowDataset(root, "train", options(), 2)
    dataset.overflows = overflows
    trainer.fit(dataset, resume="auto")
    return trainer


def test_fp16_overflow_is_skipped_and_counted(root, tmp_path):
    trainer = train(root, tmp_path, {2, 5, 7}, ema=0.9)
    assert trainer.overflows == 3
    assert trainer.average.updates == 5
    state = trainer.module.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert {int(value) for key, value in state.items() if key.endswith("num_batches_tracked")} == {5}
    assert np.isfinite(trainer.history["train"]["loss"]).all()
    assert read_resume(tmp_path / "resume.pth")["overflows"] == (3, 1)
    resumed = train(root, tmp_path, {2, 5, 7}, ema=0.9)
    assert (resumed.overflows, resumed.average.updates) == (3, 5)


@pytest.mark.parametrize(("overflows", "frozen"), [({0}, 0), ({0, 1, 2}, 0), ({3, 4}, 3)])
def test_overflows_in_the_first_steps_leave_finite_momentum(root, tmp_path, overflows, frozen):
    # deterministic mode fills uninitialized memory with NaN
    trainer = train(root, tmp_path, overflows, deterministic=True, freeze_encoder=frozen)
    assert trainer.overflows == len(overflows)
    momentum = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    assert all(value.abs().max() < 1e4 for value in momentum)


class InfiniteGradient(MaskedNLLLoss):
    """A loss with a finite value, and with infinite gradients in the first three steps (two calls per step)."""

    calls = 0

    def of_logits(self, logits, label):
        self.calls += 1
        return super().of_logits(logits, label) + ((logits * 0).abs().sum().sqrt() if self.calls <= 6 else 0)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_steps_with_infinite_gradients_are_skipped_and_counted(root, tmp_path, amp):
    trainer = make_trainer(
        tmp_path, module=tiny_module(crit=InfiniteGradient()), amp=amp, disp_iter=4, deterministic=True
    )
    before = trainer.module.decoder.conv_last.weight.detach().clone()
    trainer.fit(TrainDataset(root, "train", options(), 2))
    assert trainer.overflows == 3
    assert trainer.scaler.get_scale() == 1
    after = trainer.module.decoder.conv_last.weight
    assert after.isfinite().all()
    assert 0 < (after - before).abs().max() < 1


def overflow_on_rank_1(rank, folder, world_size):
    module = to_batchnorm(tiny_module(crit=MaskedNLLLoss()))
    world = World(rank, world_size, rank, world_size)
    trainer = make_trainer(folder, module=module, world=world, amp="fp16")
    trainer.model = parallelize(module, world)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    batch = {"img_data": torch.randn(2, 3, 32, 32), "seg_label": torch.zeros(2, 4, 4, dtype=torch.long)}
    if rank == world_size - 1:
        batch["img_data"] *= 1e6
    trainer.train_step([[batch]], LossWeights([[batch]], module.crit, world, False))
    return trainer.overflows, same(before, module.state_dict())


@pytest.mark.parametrize("world_size", [1, 2])
def test_overflow_on_one_rank_leaves_all_ranks_unchanged(tmp_path, world_size):
    results = on_ranks(world_size, tmp_path, overflow_on_rank_1, tmp_path, world_size)
    assert results == [(1, True)] * world_size


def test_25_overflows_in_a_row_stop_the_run(root, tmp_path):
    with pytest.raises(TrainingStopped, match=r"25 .*epoch_7\.pth.*TRAIN\.amp"):
        train(root, tmp_path, range(4, 100), num_epoch=20, disp_iter=1)


@pytest.mark.parametrize(
    ("values", "num_class", "fraction"), [((0,), 3, 0), ((1,), 1, 1), ((0, 1), 1, 0.5), (range(1001), 1000, 1)]
)
def test_loss_and_metrics_are_finite_for_any_labels(tmp_path, caplog, values, num_class, fraction):
    """Training logs a warning if no pixel is labelled, or if there is only one class."""
    root, rng, opt = write_data_set(tmp_path / "data"), np.random.default_rng(0), options(num_class=num_class)
    for path in root.rglob("annotations/*.png"):
        label = rng.choice(values, Image.open(path).size[::-1])
        Image.fromarray(label.astype(np.uint16 if num_class > 255 else np.uint8)).save(path)
    for loss in ("ce", "ohem", "ce+dice", "lovasz"):
        module = tiny_module(num_class, crit=build_loss(loss))
        trainer = make_trainer(tmp_path / loss, module=module, num_epoch=1, disp_iter=1)
        caplog.clear()
        trainer.fit(TrainDataset(root, "train", opt, 2))
        assert np.isfinite(trainer.history["train"]["loss"]).all()
        assert ("WARNING" in [record.levelname for record in caplog.records]) == (fraction == 0 or num_class == 1)
    result = evaluate(Predictor(module), ValDataset(root, "val", opt), loading=LoadOptions(workers=0)).summary
    assert np.isfinite([result.overall, result.mean_iou_present, result.mean_accuracy, *result.iou]).all()
    assert result.pixels == pytest.approx(fraction * (50 * 40 + 40 * 56 + 64 * 48), rel=0.05)
