"""Optimizer, learning rate schedule, frozen norms, mixed precision, and losses that are not finite."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here, same, small, weights
from scenes import options, tiny_module, write_data_set, write_pairs
from torch import nn
from training import check_layer_wise_learning_rates, make_trainer, run

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import (
    MaskedNLLLoss,
    TrainingOptions,
    TrainingStopped,
    World,
    build_optimizer,
    freeze_batch_norm,
    learning_rates,
)
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.optim import lr_factor, set_learning_rates
from mit_semseg.engine.train_step import LossWeights
from mit_semseg.lib.utils import UserError
from mit_semseg.models import ENCODERS, ModelBuilder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def test_weight_decay_applies_to_matrices_only():
    module = tiny_module()
    optimizer = build_optimizer(module.encoder, module.decoder, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.1) for p in group["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))


def test_sgd_step_equals_its_definition():
    """The definition is v = 0.9 v + g + decay w, w -= lr v; encoder and decoder have different learning rates lr."""
    module = tiny_module().double()
    optimizer = build_optimizer(module.encoder, module.decoder, rates=(0.1, 0.3), weight_decay=0.01)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in before.items()}
    for factor in (1.0, 0.5):
        set_learning_rates(optimizer, factor)
        for name, p in module.named_parameters():
            p.grad = torch.ones_like(p)
            decay = 0.01 if p.dim() > 1 else 0
            velocity[name] = 0.9 * velocity[name] + 1 + decay * before[name]
            before[name] = before[name] - factor * (0.1 if name.startswith("encoder") else 0.3) * velocity[name]
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name])
    assert learning_rates(optimizer) == {"encoder": 0.05, "decoder": 0.15}


@pytest.mark.parametrize(
    ("schedule", "step", "warmup", "factor"),
    [
        *(("poly", 0, 0, 1), ("poly", 50, 0, 0.5**0.9), ("poly", 100, 0, 0)),
        *(("poly", 0, 10, 0.1), ("poly", 9, 10, 0.91**0.9)),
        *(("cosine", 0, 0, 1), ("cosine", 25, 0, 0.5 + 0.5**1.5), ("cosine", 50, 0, 0.5), ("cosine", 100, 0, 0)),
        ("cosine", 4, 10, 0.5 * (1 + np.cos(0.04 * np.pi)) / 2),
    ],
)
def test_learning_rate_schedule(schedule, step, warmup, factor):
    training = TrainingOptions(num_epoch=1, epoch_iters=100, schedule=schedule, warmup_iters=warmup)
    assert lr_factor(step, training) == pytest.approx(factor, abs=1e-15)


@pytest.mark.parametrize("arch", ENCODERS)
def test_layer_wise_learning_rates_decrease_toward_the_image(arch):
    with torch.device("meta"):
        check_layer_wise_learning_rates(ModelBuilder.build_encoder(arch, pretrained=False))


def test_layer_wise_learning_rates_need_an_encoder_with_stages():
    module = tiny_module()
    with pytest.raises(UserError, match=r"TRAIN\.lr_decay 0\.9.*TinyEncoder.*stage_of"):
        build_optimizer(module.encoder, module.decoder, lr_decay=0.9)


def test_unknown_optimizer_and_frozen_network_are_refused():
    module = tiny_module()
    with pytest.raises(ValueError, match=r"Adagrad.*SGD, AdamW"):
        build_optimizer(module.encoder, module.decoder, "Adagrad")
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer(module.encoder, module.decoder)


def test_frozen_batch_norm_stays_frozen_in_train_mode_and_dropout_active():
    module = tiny_module(crit=MaskedNLLLoss())
    module.decoder.cbr.append(nn.Dropout2d(0.5))
    freeze_batch_norm(module)
    module.train()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    module({"img_data": torch.randn(2, 3, 32, 32), "seg_label": torch.zeros(2, 4, 4, dtype=torch.long)})[0].backward()
    assert norms
    assert not any(m.training or m.weight.requires_grad for m in norms)
    assert all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert module.decoder.cbr[-1].training
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied.eval().train()
        norms = [m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert not any(m.training for m in norms)


@pytest.mark.parametrize("weight", [None, (1.0, 10.0, 0.5)])
def test_accumulated_batches_equal_one_large_batch(tmp_path, weight):
    """The norms are frozen. Classes may have weights, and the two batches contain different classes."""
    labels = [torch.randint(-1, classes, (2, 4, 4)) for classes in (1, 3)]
    batches = [{"img_data": torch.randn(2, 3, 32, 32), "seg_label": label} for label in labels]
    whole = [{key: torch.cat([b[key] for b in batches]) for key in batches[0]}]
    results = []
    for micro_batches in (batches, whole):
        trainer = make_trainer(tmp_path, module=tiny_module(crit=MaskedNLLLoss(weight=weight)))
        freeze_batch_norm(trainer.module)
        micro_batches = [[batch] for batch in micro_batches]
        trainer.train_step(micro_batches, LossWeights(micro_batches, trainer.module.crit, World(), False))
        results.append((trainer.metrics.totals, *trainer.module.state_dict().values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_mixed_precision_trains(root, tmp_path, amp):
    trainer, _ = run(root, tmp_path, training={"amp": amp, "num_epoch": 6, "disp_iter": 4})
    losses = trainer.history["train"]["loss"]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trainer.module.parameters())


class Poisoned(TrainDataset):
    """A training dataset in which one batch contains NaN."""

    poisoned = 6

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        if index == self.poisoned:
            batch["img_data"][0, 0, 0, 0] = float("nan")
        return batch


def test_nonfinite_loss_stops_the_run_and_names_images_and_checkpoint(root, tmp_path):
    """The run stops at the next log line. The step changes no weights, and no later checkpoint is saved."""
    dataset = Poisoned(root, "train", options(), batch_per_gpu=2)
    with pytest.raises(TrainingStopped) as error:
        run(root, tmp_path, dataset=dataset, training={"epoch_iters": 5, "disp_iter": 4, "checkpoint_iters": 0})
    text = str(error.value)
    for part in ("step 7 (epoch 2, iteration 2)", "nan", *dataset[6]["info"], "epoch_1.pth", "resume.pth"):
        assert part in text
    assert all(torch.isfinite(v).all() for v in weights(tmp_path, "epoch_1.pth").values())
    assert read_resume(tmp_path / "resume.pth")["step"] == 5


@pytest.mark.parametrize("amp", ["off", "bf16"])  # for fp16 see test_numbers.py
def test_step_with_nonfinite_loss_changes_no_weight(tmp_path, amp):
    trainer = make_trainer(tmp_path, amp=amp)
    batch = {"img_data": torch.randn(2, 3, 32, 32), "seg_label": torch.zeros(2, 4, 4, dtype=torch.long)}
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    micro_batches = [[{**batch, "img_data": batch["img_data"] * float("nan")}]]
    trainer.train_step(micro_batches, LossWeights(micro_batches, trainer.module.crit, World(), False))
    assert all(torch.equal(p, before[name]) for name, p in trainer.module.named_parameters())
    with pytest.raises(TrainingStopped, match="step 1 "):
        trainer.log()


def test_metrics_do_not_depend_on_how_often_they_are_read(root, tmp_path):
    """A loss that is logged for four steps is the mean of the losses of single steps; weights are bit-identical."""
    every_step, weights_a = run(root, tmp_path / "a", training={"disp_iter": 1})
    once, weights_b = run(root, tmp_path / "b", training={"disp_iter": 4})
    losses = every_step.history["train"]["loss"]
    assert once.history["train"]["loss"] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], rel=1e-12)
    assert same(weights_a, weights_b)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_training_image_is_named_without_a_traceback(tmp_path, workers):
    folder = tmp_path / "data"
    write_pairs(folder / "train", [(60, 40), (52, 44)])
    (folder / "train" / "annotations" / "01.png").write_bytes(b"not an image")
    errors = here("train.py", small(folder, tmp_path / "run", TRAIN__workers=workers), code=2).stderr
    assert errors.startswith("error: ")
    assert "annotations/01.png" in errors


@pytest.mark.parametrize("fix_bn", [False, True])
def test_frozen_encoder_changes_after_the_given_steps(root, tmp_path, fix_bn):
    changes = {"TRAIN.freeze_encoder": 2, "TRAIN.epoch_iters": 1, "TRAIN.num_epoch": 3, "TRAIN.fix_bn": fix_bn}
    here("train.py", small(root, tmp_path, **changes))
    epochs = [weights(tmp_path, f"epoch_{n}.pth") for n in (1, 2, 3)]
    unchanged = [{key for key in a if torch.equal(a[key], b[key])} for a, b in pairwise(epochs)]
    encoder = {key for key in epochs[0] if key.startswith("encoder.")}
    norms = {key for key in encoder if key.rpartition(".")[0] + ".running_mean" in encoder}
    assert encoder <= unchanged[0]
    assert unchanged[1] & encoder == (norms if fix_bn else set())
    assert "decoder.conv_last.weight" not in unchanged[0] | unchanged[1]


def test_encoder_with_learning_rate_0_keeps_weights_and_statistics(root, tmp_path):
    here("train.py", small(root, tmp_path, TRAIN__lr_encoder=0))
    first, second = (weights(tmp_path, f"epoch_{n}.pth") for n in (1, 2))
    unchanged = {key for key in first if torch.equal(first[key], second[key])}
    assert {key for key in first if key.startswith("encoder.")} <= unchanged
    assert "decoder.conv_last.weight" not in unchanged


@pytest.mark.parametrize(("devices", "steps"), [("cpu", 2), ("cpu,cpu", 1)])
def test_epoch_iters_0_is_one_pass_over_the_images(root, tmp_path, devices, steps):
    """With batches of three, four images need two steps on one device, and one step on two devices."""
    changes = {"--gpu": devices, "TRAIN.epoch_iters": 0, "TRAIN.batch_size_per_gpu": 3}
    done = here("train.py", small(root, tmp_path, **changes))
    assert f"epoch 2, step {steps}/{steps}, " in done.stdout
    assert read_resume(tmp_path / "resume.pth")["step"] == 2 * steps


def test_terminal_shows_changed_options_and_log_file_all(root, tmp_path):
    done = here("train.py", small(root, tmp_path, TRAIN__num_epoch=1))
    assert "TRAIN.num_epoch 1" in done.stdout
    assert "weight_decay" not in done.stdout
    log = (tmp_path / "log.txt").read_text()
    assert "weight_decay: 0.0001" in log
    assert "TRAIN.num_epoch 1" in log


def test_labels_of_a_single_class_give_a_warning(tmp_path):
    """With labels 0 (background) and 1, only one class is left, because the default class table ignores 0."""
    root = write_data_set(tmp_path / "data")
    for path in root.glob("*/annotations/*.png"):
        Image.fromarray((np.array(Image.open(path)) > 1).astype(np.uint8)).save(path)
    changes = {"TRAIN.eval_epoch": 1, "TRAIN.num_epoch": 1, "VAL.checkpoint": "epoch_1.pth"}
    listed = {"DATASET.num_class": 2, "DATASET.classes": "[background, object]"}
    for name, more, expected in (("one", {"DATASET.num_class": 1}, (2, 1)), ("listed", listed, (0, 0))):
        for program, warnings in zip(("train.py", "eval.py"), expected, strict=True):
            done = here(program, small(root, tmp_path / name, **changes, **more))
            assert done.stdout.count("mit_semseg.dataset.doctor") == warnings
