"""Files of a run, bit-identical resuming, stop signals, and the lock of the run folder."""

import errno
import os
import signal
import time

import pytest
import torch
from runs import Job, here, same, script, small, weights
from scenes import options, tiny_module, write_data_set
from training import make_trainer, run

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import CheckpointError, MaskedNLLLoss, RunFolder, build_optimizer, checkpoint
from mit_semseg.engine.checkpoint import read_resume
from mit_semseg.engine.signals import StopSignals
from mit_semseg.lib.utils import HOST, UserError, WriteError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def test_files_of_a_run(root, tmp_path):
    trainer, _ = run(root, tmp_path, training={"eval_epoch": 1}, val_dataset=ValDataset(root, "val", options()))
    parts = ("encoder", "decoder", "history")
    expected = [f"{part}_epoch_{n}.pth" for part in parts for n in (1, 2)] + ["resume.pth"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*expected, "encoder_best.pth", "decoder_best.pth"])
    history = torch.load(tmp_path / "history_epoch_2.pth", weights_only=True)
    assert history["train"]["epoch"] == [0.5, 1.0, 1.5, 2.0]
    assert set(history["train"]) == {"epoch", "loss", "acc"}
    assert history["val"]["epoch"] == [1, 2]
    assert max(history["val"]["mean_iou"]) == trainer.best_iou


@pytest.mark.parametrize("stop", range(1, 8))
def test_resume_at_any_step_is_bit_identical(root, tmp_path, stop):
    """The run fails when it loads the batch after step `stop`, and is then started again."""

    class Failing(TrainDataset):
        def __getitem__(self, index):
            if index == stop:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    val = ValDataset(root, "val", options())
    training = {"eval_epoch": 1, "checkpoint_iters": 3, "ema": 0.9, "freeze_encoder": 2, "schedule": "cosine"}
    training |= {"disp_iter": 4}
    whole, expected = run(root, tmp_path / "whole", training=training, val_dataset=val)
    dataset = Failing(root, "train", options(), batch_per_gpu=2)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", training=training, val_dataset=val, dataset=dataset)
    # Initial weights (and their seed) matter only if the run failed before its first checkpoint.
    seed = 0 if stop < training["checkpoint_iters"] else 9
    resumed, got = run(root, tmp_path / "cut", seed=seed, training=training, val_dataset=val, resume="auto")
    assert same(got, expected)
    assert same(*(weights(tmp_path / name, "epoch_2_raw.pth") for name in ("whole", "cut")))
    assert resumed.history == whole.history
    assert resumed.best_iou == whole.best_iou


def test_resume_uses_new_rates_and_refuses_another_model_or_optimizer(root, tmp_path):
    make_trainer(tmp_path, num_epoch=1).fit(TrainDataset(root, "train", options()))

    def resume(name="SGD", num_class=3):
        module = tiny_module(num_class, crit=MaskedNLLLoss())
        optimizer = build_optimizer(module.encoder, module.decoder, name, rates=(0.5, 0.5), beta1=0.3, weight_decay=0.2)
        trainer = make_trainer(tmp_path, module=module, optimizer=optimizer, num_epoch=1)
        trainer.fit(TrainDataset(root, "train", options()), resume="auto")
        return optimizer

    optimizer = resume()
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.3, 0.2)
    assert all("momentum_buffer" in s for s in optimizer.state.values())
    with pytest.raises(CheckpointError, match=r"SGD .* AdamW .*TRAIN\.optim"):
        resume("AdamW")
    with pytest.raises(CheckpointError, match=r"DATASET\.num_class"):
        resume(num_class=5)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("first", [False, True])
def test_resume_with_another_memory_format_keeps_the_optimizer_state(root, tmp_path, name, first):
    """A change of TRAIN.channels_last changes the weights only by rounding errors."""
    lr = {"SGD": 0.05, "AdamW": 0.001}[name]

    def train(folder, formats):
        for epoch, channels_last in enumerate(formats, start=1):
            module = tiny_module(crit=MaskedNLLLoss())
            module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            optimizer = build_optimizer(module.encoder, module.decoder, name, rates=(lr, lr))
            changes = {"num_epoch": epoch, "epoch_iters": 3, "channels_last": channels_last}
            trainer = make_trainer(folder, module=module, optimizer=optimizer, **changes)
            trainer.fit(TrainDataset(root, "train", options(), batch_per_gpu=2), resume="auto")
            for parameter, state in optimizer.state.items():
                assert all(v.dim() == 0 or v.stride() == parameter.stride() for v in state.values())
        return weights(folder)

    expected = train(tmp_path / "same", [first, first])
    changed = train(tmp_path / "changed", [first, not first])
    for key, value in expected.items():
        if value.is_floating_point():
            assert (changed[key] - value).norm() <= 1e-3 * max(1e-3, value.norm()), key


def test_options_changed_since_the_checkpoint_are_logged(root, tmp_path):
    options = small(root, tmp_path / "run", TRAIN__num_epoch=1, DATASET__ignore_values="[0]", TRAIN__resume="auto")
    options["DATASET.classes"] = "['sea','land','sky']"
    for _ in range(2):
        assert "options changed" not in here("train.py", options).stdout
    options |= {"TRAIN.num_epoch": 2, "INFERENCE.flip": True, "DATASET.classes": "['sea','sky','land']"}
    done = here("train.py", options)
    line = next(line for line in done.stdout.splitlines() if "options changed" in line)
    assert "TRAIN.num_epoch 2 (was 1)" in line
    assert "INFERENCE.flip True (was False)" in line
    assert "['sea', 'sky', 'land'] (was ['sea', 'land', 'sky'])" in line


def test_another_epoch_length_overwrites_no_epoch(root, tmp_path):
    run(root, tmp_path)
    with pytest.raises(CheckpointError, match=r"TRAIN\.epoch_iters 8"):
        run(root, tmp_path, training={"epoch_iters": 8}, resume="auto")
    run(root, tmp_path, training={"epoch_iters": 2, "num_epoch": 5}, resume="auto")
    assert RunFolder(tmp_path).epochs() == [1, 2, 4, 5]


def test_temporary_files_of_an_interrupted_run_are_removed(root, tmp_path):
    run(root, tmp_path, training={"num_epoch": 1})
    (tmp_path / "vis" / "epoch_1").mkdir(parents=True)
    for name in ("resume.pth.1234abcd.host.5.partial", "vis/epoch_1/a.png.1234abcd.host.5.partial", "film.partial"):
        (tmp_path / name).touch()
    run(root, tmp_path, training={"num_epoch": 1}, resume="auto")
    assert [path.name for path in tmp_path.rglob("*.partial")] == ["film.partial"]


def test_second_run_in_a_folder_is_refused(root, tmp_path):
    """Two runs start at the same time, and one is refused. After the other was killed, a new run can start."""
    options = small(root, tmp_path / "run", TRAIN__num_epoch=1000, TRAIN__workers=1, TRAIN__resume="auto")
    jobs = [Job("train.py", options) for _ in range(2)]
    deadline = time.monotonic() + 120
    while sum(job.returncode is None for job in jobs) > 1 or not (tmp_path / "run" / "encoder_epoch_1.pth").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (running,) = [job for job in jobs if job.returncode is None]
    refused = next(job for job in jobs if job is not running).end(10, code=2)
    assert f"process {running.pid} on {HOST}" in refused.stderr
    assert str(tmp_path / "run") in refused.stderr
    running.kill()
    later = Job("train.py", options)
    assert any("resuming" in line for line in later.lines()), later.errors()
    later.kill()


def test_encoder_and_decoder_are_replaced_together(tmp_path, monkeypatch):
    folder, save = RunFolder(tmp_path), checkpoint._save
    folder.save_weights(tiny_module(seed=0), "best.pth")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(obj, path):
        save(obj, path)
        if "decoder" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save", disk_full)
    with pytest.raises(WriteError, match=r"decoder_best\.pth"):
        folder.save_weights(tiny_module(seed=1), "best.pth")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_existing_run_is_only_overwritten_on_request(root, tmp_path):
    folder, val = RunFolder(tmp_path), ValDataset(root, "val", options())
    run(root, tmp_path, training={"num_epoch": 3, "eval_epoch": 1}, val_dataset=val)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    elsewhere = tmp_path.parent / "elsewhere.pth"
    elsewhere.write_bytes(kept["resume.pth"])
    for mode, start, option in (
        ("off", 0, "TRAIN.resume auto"),
        (str(elsewhere), 0, "TRAIN.resume auto"),
        ("off", 1, "TRAIN.start_epoch 3"),
    ):
        with pytest.raises(CheckpointError, match=option):
            folder.find_resume(mode, start)
    assert folder.find_resume("off", 3) is None
    assert folder.find_resume("auto") == folder.resume
    folder.resume.unlink()
    with pytest.raises(CheckpointError, match=r"resume\.pth.* TRAIN\.start_epoch 3"):
        folder.find_resume("auto")
    assert {p.name for p in tmp_path.iterdir()} == set(kept) - {"resume.pth"}
    unrelated = {"encoder_imagenet.pth", "film.partial"}
    for name in (*unrelated, f"resume.pth.{HOST}.{os.getpid()}.partial"):
        (tmp_path / name).touch()
    run(root, tmp_path, training={"num_epoch": 1}, resume="restart")
    names = {f"{part}_epoch_1.pth" for part in ("encoder", "decoder", "history")} | {"resume.pth", *unrelated}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_run_stopped_during_validation_validates_when_resumed(root, tmp_path):
    class Failing(ValDataset):
        def __getitem__(self, index):
            raise UserError("a damaged image")

    training, val = {"eval_epoch": 2}, ValDataset(root, "val", options())
    whole, expected = run(root, tmp_path / "whole", training=training, val_dataset=val)
    with pytest.raises(UserError, match="a damaged image"):
        run(root, tmp_path / "cut", training=training, val_dataset=Failing(root, "val", options()))
    assert same(weights(tmp_path / "cut"), expected)
    resumed, _ = run(root, tmp_path / "cut", training=training, val_dataset=val, resume="auto")
    assert resumed.history == whole.history
    assert (tmp_path / "cut" / "decoder_best.pth").is_file()
    continued, _ = run(root, tmp_path / "cut", training={**training, "start_epoch": 2, "num_epoch": 3})
    assert continued.best_iou == whole.best_iou


@pytest.mark.parametrize("lost", ["encoder", "decoder", "history"])
def test_run_stopped_while_saving_an_epoch_saves_it_when_resumed(root, tmp_path, lost):
    whole, expected = run(root, tmp_path / "whole")
    run(root, tmp_path / "cut")
    (tmp_path / "cut" / f"{lost}_epoch_2.pth").unlink()
    again, got = run(root, tmp_path / "cut", resume="auto")
    assert same(got, expected)
    history = torch.load(tmp_path / "cut" / "history_epoch_2.pth", weights_only=True)
    assert history == again.history == whole.history


SIGNAL_OPTIONS = {"TRAIN.epoch_iters": 14, "TRAIN.num_epoch": 1, "TRAIN.disp_iter": 1, "TRAIN.workers": 1}


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    here("train.py", small(root, folder, **SIGNAL_OPTIONS))
    return weights(folder, "epoch_1.pth")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_signal_saves_the_last_step_and_resume_is_bit_identical(root, tmp_path, undisturbed, number, code):
    options = small(root, tmp_path / "run", **SIGNAL_OPTIONS)
    job = Job("train.py", options)
    job.until("epoch 1, step 3/14")
    os.killpg(job.pid, number)  # like Ctrl-C, which the DataLoader worker must ignore
    done = job.end(60, code)
    assert done.stdout.count(f"{signal.Signals(number).name}: stopping") == 1
    assert "TRAIN.resume auto" in done.stderr
    last = done.stdout.count(", acc ")
    assert 3 <= last < 14
    assert read_resume(tmp_path / "run" / "resume.pth")["step"] == last

    done = script("train.py", {**options, "TRAIN.resume": "auto"})
    assert f"at step {last} of 14" in done.stdout
    assert same(weights(tmp_path / "run", "epoch_1.pth"), undisturbed)


@pytest.fixture
def handle_sigint():
    """Return a function that sets the handler of SIGINT until the end of a test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_ignored_signal_stays_ignored(handle_sigint):
    """Shells start background processes with SIGINT ignored."""
    handle_sigint(signal.SIG_IGN)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals.received


def test_second_signal_stops_immediately(handle_sigint):
    handle_sigint(signal.default_int_handler)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_file_that_is_not_a_resume_checkpoint_is_named(root, tmp_path):
    torch.save({"x": 1}, tmp_path / "resume.pth")
    with pytest.raises(CheckpointError, match=r"resume\.pth"):
        run(root, tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match="nowhere"):
        run(root, tmp_path, resume="nowhere")


def test_error_about_a_damaged_checkpoint_names_the_others(root, tmp_path):
    run(root, tmp_path)
    (tmp_path / "resume.pth").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"resume\.pth.* damaged.*epoch_2\.pth, epoch_1\.pth"):
        run(root, tmp_path, resume="auto")
    damaged = tmp_path / "encoder_epoch_2.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"encoder_epoch_2\.pth.* damaged.*epoch_1\.pth"):
        run(root, tmp_path, training={"start_epoch": 2, "num_epoch": 3})
