"""The moving average of the weights: its definition, files, validation, resuming and skipped steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import here, same, small, weights
from scenes import options, tiny_module, write_data_set
from training import make_trainer, run

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.weight_average import WeightAverage


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def decay(limit, update):
    return min(limit, (1 + update) / (10 + update))


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.999), st.integers(1, 30))
def test_average_equals_its_definition(limit, updates):
    module = tiny_module().double()
    average = WeightAverage(module, limit)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    tensors = {name: value for name, value in (parameters | dict(module.named_buffers())).items() if value.numel() > 1}
    expected = {name: value.numpy().copy() for name, value in tensors.items()}
    for n in range(1, updates + 1):
        for name, value in tensors.items():
            value.normal_()
            expected[name] = decay(limit, n) * expected[name] + (1 - decay(limit, n)) * value.numpy()
        average.update()
    raw = {name: value.clone() for name, value in module.state_dict().items()}
    with average.in_network():
        for name, value in tensors.items():
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-12, atol=1e-12)
    assert same(module.state_dict(), raw)


def test_network_has_its_own_weights_again_after_an_error():
    module = tiny_module()
    average = WeightAverage(module, 0.5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.nn.init.ones_(module.decoder.conv_last.weight)

    def interrupted():
        with average.in_network():
            assert same(module.state_dict(), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert module.decoder.conv_last.weight.eq(1).all()


@pytest.mark.parametrize(
    "variant",
    [{}, {"TRAIN.accumulate": 2}, {"TRAIN.amp": "bf16"}, {"MODEL.norm": "batch"}, {"--gpu": "cpu,cpu"}],
    ids=str,
)
def test_weight_files_contain_the_average_of_the_raw_files(root, tmp_path, variant):
    changes = {"TRAIN.epoch_iters": 1, "TRAIN.num_epoch": 4, **variant}
    here("train.py", small(root, tmp_path / "ema", **changes, TRAIN__ema=0.3))
    here("train.py", small(root, tmp_path / "plain", **changes))
    raw, average = ([weights(tmp_path / "ema", f"epoch_{n}{part}.pth") for n in (1, 2, 3, 4)] for part in ("_raw", ""))
    assert all(same(raw[n - 1], weights(tmp_path / "plain", f"epoch_{n}.pth")) for n in (1, 2, 3, 4))
    for n in (2, 3, 4):
        d = decay(0.3, n)
        for key, value in average[n - 1].items():
            expected = (
                d * average[n - 2][key] + (1 - d) * raw[n - 1][key] if value.is_floating_point() else raw[n - 1][key]
            )
            torch.testing.assert_close(value, expected, msg=f"epoch {n}: {key}")


def test_average_is_validated_and_saved_as_best(root, tmp_path):
    options = small(root, tmp_path, TRAIN__ema=0.9, TRAIN__eval_epoch=1, TRAIN__num_epoch=3)
    here("train.py", options)
    history = read_resume(tmp_path / "resume.pth")["history"]["val"]
    best = history["epoch"][history["mean_iou"].index(max(history["mean_iou"]))]
    for part in ("", "_raw"):
        assert same(weights(tmp_path, f"best{part}.pth"), weights(tmp_path, f"epoch_{best}{part}.pth"))
    scores = {}
    for suffix in (f"epoch_{best}.pth", f"epoch_{best}_raw.pth"):
        output = here("eval.py", options | {"VAL.checkpoint": suffix}).stdout
        scores[suffix] = next(line for line in output.splitlines() if line.startswith("Mean IoU (over all"))
    assert f"{max(history['mean_iou']):.4f}" in scores[f"epoch_{best}.pth"]
    assert scores[f"epoch_{best}.pth"] != scores[f"epoch_{best}_raw.pth"]


def test_average_starts_when_it_is_switched_on(root, tmp_path):
    """A run without average is resumed with average, from its weights."""
    start = run(root, tmp_path, training={"num_epoch": 1})[0].module.state_dict()
    trainer, _ = run(root, tmp_path, training={"ema": 0.9, "epoch_iters": 4, "num_epoch": 1}, resume="auto")
    assert trainer.average.updates == 0
    with trainer.average.in_network():
        assert same(trainer.module.state_dict(), start)


def test_restart_removes_all_weight_files(root, tmp_path):
    val = ValDataset(root, "val", options())
    run(root, tmp_path, training={"ema": 0.9, "eval_epoch": 1}, val_dataset=val)
    run(root, tmp_path, resume="restart")
    assert not [path.name for path in tmp_path.glob("*raw*")]


def test_class_weights_are_not_averaged(root, tmp_path):
    """A run is resumed with other class weights; the loss always has the new ones."""
    for epochs, class_weights in enumerate((None, [1, 1, 1], [1, 2, 30]), start=1):
        module = tiny_module(crit=MaskedNLLLoss(weight=class_weights))
        trainer = make_trainer(tmp_path, module=module, ema=0.9, num_epoch=epochs)
        trainer.fit(TrainDataset(root, "train", options(), 2), resume="auto")
        assert trainer.average.updates == epochs * trainer.options.epoch_iters
        if class_weights:
            with trainer.average.in_network():
                assert module.crit.weight.tolist() == class_weights


@pytest.mark.parametrize("more", [0, 1])
def test_resumed_run_keeps_the_files_of_completed_epochs(root, tmp_path, more):
    run(root, tmp_path, training={"ema": 0.9, "num_epoch": 1})
    (tmp_path / "temperature_epoch_1.json").write_text('{"temperature": 1.5}')
    before = {path: path.read_bytes() for path in tmp_path.glob("*_epoch_1*")}
    run(root, tmp_path, training={"num_epoch": 1 + more}, resume="auto")
    assert {path: path.read_bytes() for path in tmp_path.glob("*_epoch_1*")} == before
