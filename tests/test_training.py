"""The training loop: optimizer, schedule, freezing, and what happens when the loss explodes."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SMALL, here, in_process, same, weights, words
from scenes import options, tiny_module, write_data_set, write_pairs
from torch import nn

from mit_semseg.dataset import TrainDataset
from mit_semseg.engine import (
    MaskedNLLLoss,
    Processes,
    RunFolder,
    Settings,
    build_optimizer,
    fit,
    freeze_batch_norm,
    learning_rates,
    loop,
    settle,
    train_step,
)
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.distributed import parallel
from mit_semseg.engine.loop import TrainingStopped
from mit_semseg.engine.optim import schedule, set_learning_rates

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data_set(folder)
    return folder


def run(root, folder, *, seed=0, dataset=None, **changes):
    settings = Settings(**{"num_epoch": 2, "epoch_iters": 4, "disp_iter": 2, **changes.pop("settings", {})})
    module = tiny_module(crit=MaskedNLLLoss(), seed=seed)
    module.decoder.cbr.append(nn.Dropout2d(0.2))  # so that the random state matters
    optimizer = build_optimizer(module.encoder, module.decoder, lr_encoder=0.05, lr_decoder=0.05)
    dataset = dataset or TrainDataset(root, "train", options(), batch_per_gpu=2)
    done = fit(module, optimizer, dataset, RunFolder(folder), settings, devices=[CPU], **changes)
    return done, weights(folder, f"epoch_{settings.num_epoch}.pth")


# Optimizer and schedule


def test_weight_decay_is_for_matrices_only():
    module = tiny_module()
    optimizer = build_optimizer(module.encoder, module.decoder, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.1) for p in group["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))


def test_one_sgd_step_is_the_definition():
    """v = 0.9 v + g + decay w; w -= lr v, with its own lr for encoder and decoder."""
    module = tiny_module().double()
    optimizer = build_optimizer(module.encoder, module.decoder, lr_encoder=0.1, lr_decoder=0.3, weight_decay=0.01)
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


def test_schedule():
    assert schedule(0, 100) == 1
    assert schedule(50, 100) == pytest.approx(0.5**0.9)
    assert schedule(100, 100) == 0
    assert schedule(0, 100, warmup=10) == pytest.approx(0.1)
    assert schedule(9, 100, warmup=10) == pytest.approx(0.91**0.9)


def test_unknown_optimizer_and_nothing_to_train():
    module = tiny_module()
    with pytest.raises(ValueError, match="choose one of SGD, AdamW"):
        build_optimizer(module.encoder, module.decoder, name="Adagrad")
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        build_optimizer(module.encoder, module.decoder)


def test_frozen_batch_norm_stays_frozen_and_dropout_stays_on():
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


@pytest.mark.parametrize("weight", [None, (1.0, 10.0, 0.5)])
def test_accumulated_batches_equal_one_large_batch(root, weight):
    """With frozen norms, two batches of two pictures of one size give the gradient of the batch of four, also where
    classes weigh differently and the batches have different ones."""
    labels = [torch.randint(-1, classes, (2, 4, 4)) for classes in (1, 3)]
    batches = [{"img_data": torch.randn(2, 3, 32, 32), "seg_label": label} for label in labels]
    whole = [{key: torch.cat([b[key] for b in batches]) for key in batches[0]}]
    results = []
    for chunk in (batches, whole):
        module = tiny_module(crit=MaskedNLLLoss(weight=weight))
        freeze_batch_norm(module)
        optimizer = build_optimizer(module.encoder, module.decoder)
        scaler, alone = torch.amp.GradScaler("cpu", enabled=False), Processes()
        runner = parallel(module, [CPU], alone)
        where = {"devices": [CPU], "processes": alone, "settings": Settings(), "loss": module.crit}
        figures = settle([train_step(runner, [[b] for b in chunk], optimizer, scaler, **where)], alone)
        results.append((torch.tensor(figures[0]), *module.state_dict().values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_mixed_precision_trains(root, tmp_path, amp):
    done, _ = run(root, tmp_path, settings={"amp": amp, "num_epoch": 6, "disp_iter": 4})
    losses = done.history["train"]["loss"]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in done.module.parameters())


# Losses that explode, pictures that cannot be read


@pytest.mark.parametrize("at_once", [("cpu",), ()])
def test_non_finite_loss_stops_with_files_and_last_checkpoint(root, tmp_path, at_once, monkeypatch):
    """Also where the figures of several steps are read together, as on a GPU."""
    monkeypatch.setattr(loop, "READ_AT_ONCE", at_once)

    class Poisoned(TrainDataset):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            if index == 6:
                batch["img_data"][0, 0, 0, 0] = float("nan")
            return batch

    dataset = Poisoned(root, "train", options(), batch_per_gpu=2)
    files = dataset[6]["info"]
    with pytest.raises(TrainingStopped) as error:
        run(root, tmp_path, dataset=dataset, settings={"epoch_iters": 5, "disp_iter": 3, "checkpoint_iters": 0})
    text = str(error.value)
    for part in ("step 7 (epoch 2, iteration 2)", "the loss is nan", *files, "epoch_1.pth", "resume.pth"):
        assert part in text
    assert all(torch.isfinite(v).all() for v in weights(tmp_path, "epoch_1.pth").values())
    assert read_resume(tmp_path / "resume.pth")["step"] == 5


@pytest.mark.parametrize("most", [2, 100])
def test_figures_that_are_read_later_are_the_same(root, tmp_path, most, monkeypatch):
    done, _ = run(root, tmp_path / "at once")
    monkeypatch.setattr(loop, "READ_AT_ONCE", ())
    monkeypatch.setattr(loop, "MOST_PENDING", most)
    later, _ = run(root, tmp_path / "later")
    assert later.history == done.history
    assert not later.pending
    assert same(weights(tmp_path / "later"), weights(tmp_path / "at once"))


def test_unreadable_training_image_is_named_without_a_traceback(root, tmp_path):
    folder = tmp_path / "data"
    write_pairs(folder / "train", [(60, 40), (52, 44)])
    (folder / "train" / "annotations" / "01.png").write_bytes(b"no picture")
    for workers in (0, 1):
        done = here(
            "train.py",
            *words(
                {
                    **SMALL,
                    "DATASET.root_dataset": folder,
                    "DIR": tmp_path / "run",
                    "TRAIN.workers": workers,
                    "TRAIN.resume": "restart",
                }
            ),
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ")
        assert "annotations/01.png: no readable image" in done.stderr


def test_an_encoder_without_a_learning_rate_stays_as_it_is(root, tmp_path):
    """Its statistics, too."""
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path, "TRAIN.num_epoch": 2, "TRAIN.lr_encoder": 0}
    assert here("train.py", "--gpu", "cpu", *words(changes)).returncode == 0
    first, second = (weights(tmp_path, f"epoch_{n}.pth") for n in (1, 2))
    same_keys = {key for key in first if torch.equal(first[key], second[key])}
    assert {key for key in first if key.startswith("encoder.")} <= same_keys
    assert "decoder.conv_last.weight" not in same_keys


@pytest.mark.parametrize(("devices", "steps"), [("cpu", 2), ("cpu,cpu", 1)])
def test_an_epoch_of_no_given_length_is_once_through_the_images(root, tmp_path, devices, steps):
    """Four images, in batches of 3 of every device."""
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path, "TRAIN.num_epoch": 2}
    changes |= {"TRAIN.epoch_iters": 0, "TRAIN.batch_size_per_gpu": 3}
    done = here("train.py", "--gpu", devices, *words(changes))
    assert done.returncode == 0, done.stderr
    assert f"Epoch: [2][{steps}/{steps}]" in done.stdout
    assert read_resume(tmp_path / "resume.pth")["step"] == 2 * steps


def test_the_terminal_shows_the_options_that_differ_and_the_log_all(root, tmp_path):
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path, "TRAIN.num_epoch": 1}
    done = here("train.py", "--gpu", "cpu", *words(changes))
    assert "TRAIN.num_epoch 1" in done.stdout
    assert "weight_decay" not in done.stdout
    log = (tmp_path / "log.txt").read_text()
    assert "weight_decay: 0.0001" in log
    assert "TRAIN.num_epoch 1" in log


def test_labels_of_a_single_class_are_said(tmp_path):
    """Binary labels with 0 = background, of which the standard table makes one class and ignored pixels."""
    root = write_data_set(tmp_path / "data")
    for path in root.glob("*/annotations/*.png"):
        Image.fromarray((np.array(Image.open(path)) > 1).astype(np.uint8)).save(path)
    changes = {
        **SMALL,
        "DATASET.root_dataset": root,
        "TRAIN.eval_epoch": 1,
        "TRAIN.num_epoch": 1,
        "VAL.checkpoint": "epoch_1.pth",
    }
    own = {"DATASET.num_class": 2, "DATASET.classes": "[background, object]"}
    for name, more in (("one", {"DATASET.num_class": 1}), ("own", own)):
        options = words({**changes, **more, "DIR": tmp_path / name})
        for program, warnings in (("train.py", 2), ("eval.py", 1)):
            done = here(program, "--gpu", "cpu", *options)
            assert done.returncode == 0, done.stderr
            warned = done.stdout.count("all labelled pixels belong to class")
            assert warned == (0 if name == "own" else warnings)
            assert done.stdout.count("DATASET.classes [background, object]") == warned


def test_optimizer_sees_no_frozen_parameters(root, tmp_path, monkeypatch):
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path, "TRAIN.fix_bn": True, "TRAIN.num_epoch": 1}
    in_process("train", monkeypatch, *words(changes))
    trained = weights(tmp_path, "epoch_1.pth")
    means = [v for k, v in trained.items() if k.endswith("running_mean")]
    assert means
    assert not any(v.any() for v in means)
