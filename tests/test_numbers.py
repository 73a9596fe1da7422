"""Numbers at their edges: values too large for float16, nothing to learn from, one class, a thousand classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from runs import SMALL, here, same, words
from scenes import options, tiny_module, write_data_set

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import MaskedNLLLoss, Processes, RunFolder, Settings, build_optimizer, fit, train_step
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.distributed import Place, parallel
from mit_semseg.engine.loop import TrainingStopped
from mit_semseg.lib.nn import to_batchnorm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


class TooLarge(TrainDataset):
    """Some batches have pictures whose values are beyond float16."""

    numbers: frozenset = frozenset()

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        return {**batch, "img_data": batch["img_data"] * 1e6} if index in self.numbers else batch


def trained(root, folder, numbers, norm=lambda module: module, **changes):
    settings = Settings(**{"num_epoch": 2, "epoch_iters": 4, "disp_iter": 2, "amp": "fp16", **changes})
    module = norm(tiny_module(crit=MaskedNLLLoss()))
    dataset = TooLarge(root, "train", options(), 2)
    dataset.numbers = frozenset(numbers)
    optimizer = build_optimizer(module.encoder, module.decoder, lr_encoder=0.05, lr_decoder=0.05)
    return fit(module, optimizer, dataset, RunFolder(folder), settings, devices=[CPU], resume="auto")


def finite(state):
    return all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("norm", [lambda module: module, to_batchnorm], ids=["sync", "batch"])
def test_a_step_too_large_for_float16_is_skipped_and_counted(root, tmp_path, norm):
    done = trained(root, tmp_path, {2, 5, 7}, norm)
    assert done.skipped == 3
    assert finite(done.module.state_dict())
    counters = [value for key, value in done.module.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counters
    assert all(value == 5 for value in counters)
    assert np.isfinite(done.history["train"]["loss"]).all()
    assert len(done.history["train"]["loss"]) == 4
    assert read_resume(tmp_path / "resume.pth")["skipped"] == (3, 1)
    for path in tmp_path.glob("*coder_epoch_*.pth"):
        assert finite(torch.load(path, weights_only=True))
    again = trained(root, tmp_path, {2, 5, 7}, norm)  # a run that is continued still knows
    assert again.skipped == 3


def test_the_first_step_of_all_may_be_skipped(root, tmp_path):
    """It leaves no momenta: fused SGD would have made some, of whatever was in the memory (here NaN)."""
    done = trained(root, tmp_path, {0}, deterministic=True)
    assert done.skipped == 1
    assert finite(done.module.state_dict())
    momenta = [state["momentum_buffer"] for state in done.optimizer.state.values()]
    assert all(value.isfinite().all() and value.abs().max() < 1e4 for value in momenta)


def one_step(rank, folder=None):
    """A step whose pictures are too large in one of the processes, with norms that learn from each device alone."""
    module = to_batchnorm(tiny_module(crit=MaskedNLLLoss()))
    processes = Processes(Place(rank, 2, rank, 2)) if rank is not None else Processes()
    runner = parallel(module, [CPU], processes)
    optimizer = build_optimizer(module.encoder, module.decoder)
    scaler = torch.amp.GradScaler("cpu")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.manual_seed(0)
    batch = {"img_data": torch.randn(2, 3, 32, 32), "seg_label": torch.zeros(2, 4, 4, dtype=torch.long)}
    if rank != 0:
        batch["img_data"] *= 1e6
    where = {"devices": [CPU], "processes": processes, "settings": Settings(amp="fp16"), "loss": module.crit}
    figures = train_step(runner, [[batch]], optimizer, scaler, **where)
    return figures.skipped, same(before, module.state_dict())


def test_all_processes_skip_the_step_of_one(tmp_path):
    assert in_processes(2, tmp_path, one_step) == [(True, True)] * 2


def test_a_skipped_step_changes_nothing():
    assert one_step(None) == (True, True)


def test_too_many_skipped_steps_end_the_run(root, tmp_path):
    with pytest.raises(TrainingStopped, match=r"25 steps one after the other were too large for float16.*epoch_7\.pth"):
        trained(root, tmp_path, range(4, 100), epoch_iters=4, num_epoch=20, disp_iter=1)


def relabelled(folder, values, kind=np.uint8):
    """A data set whose labels have other values."""
    write_data_set(folder)
    rng = np.random.default_rng(0)
    for path in folder.rglob("annotations/*.png"):
        width, height = Image.open(path).size
        Image.fromarray(rng.choice(values, (height, width)).astype(kind)).save(path)
    return folder


@pytest.mark.parametrize(
    ("values", "classes", "pixels"), [((0,), 3, 0), ((1,), 1, 1), ((0, 1), 1, 0.5), (range(1001), 1000, 1)]
)
@pytest.mark.parametrize("loss", ["ce", "ohem", "ce+dice", "lovasz"])
def test_labels_of_nothing_of_one_and_of_a_thousand_classes(tmp_path, values, classes, pixels, loss):
    """Trained and evaluated without a figure that is not finite."""
    root = relabelled(tmp_path / "data", values, np.uint16 if classes > 255 else np.uint8)
    changes = {**SMALL, "DATASET.root_dataset": root, "DATASET.num_class": classes, "DIR": tmp_path / "run"}
    changes |= {"TRAIN.loss": loss, "TRAIN.epoch_iters": 1, "TRAIN.disp_iter": 1}
    done = here("train.py", "--gpu", "cpu", *words(changes))
    assert done.returncode == 0, done.stderr
    history = torch.load(tmp_path / "run" / "history_epoch_2.pth", weights_only=True)
    assert np.isfinite(history["train"]["loss"]).all()
    assert ("no pixel was labelled since the last line" in done.stdout) == (pixels == 0)
    if loss == "ce":
        done = here("eval.py", "--gpu", "cpu", *words(changes))
        assert done.returncode == 0, done.stderr
        assert ("No pixel is labelled" in done.stdout) == (pixels == 0)
        figures = json.loads((tmp_path / "run" / "result" / "results.json").read_text())
        assert all(np.isfinite(value) for value in figures.values() if isinstance(value, float))
        whole = sum(w * h for w, h in [(50, 40), (40, 56), (64, 48)])
        assert figures["labelled_pixels"] == pytest.approx(pixels * whole, rel=0.05)
