"""Files of a run: what is saved, what a run goes on from, and how signals end it."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runs import SMALL, Job, here, same, script, weights, words
from scenes import options, tiny_module, write_data_set
from test_training import CPU, run
from torch import nn

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import CheckpointError, MaskedNLLLoss, RunFolder, Settings, build_optimizer, checkpoint, fit
from mit_semseg.engine.checkpoint import read_resume, save_atomic
from mit_semseg.engine.guards import Interruption, deterministic
from mit_semseg.engine.loop import TrainingStopped
from mit_semseg.lib.utils import HOST, UserError, WriteError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def test_files_of_a_run(root, tmp_path):
    val = ValDataset(root, "val", options())
    done, _ = run(root, tmp_path, settings={"eval_epoch": 1}, val_dataset=val)
    names = sorted(p.name for p in tmp_path.iterdir())
    parts = ("encoder", "decoder", "history")
    expected = [f"{part}_epoch_{n}.pth" for part in parts for n in (1, 2)] + ["resume.pth"]
    assert names == sorted([*expected, "encoder_best.pth", "decoder_best.pth"])
    history = torch.load(tmp_path / "history_epoch_2.pth", weights_only=True)
    assert history["train"]["epoch"] == [0.5, 1.0, 1.5, 2.0]
    assert set(history["train"]) == {"epoch", "loss", "acc"}
    assert history["val"]["epoch"] == [1, 2]
    assert max(history["val"]["mean_iou"]) == done.best


def test_resuming_keeps_new_rates_and_refuses_another_model(root, tmp_path):
    run(root, tmp_path, settings={"num_epoch": 1})
    module = tiny_module(crit=MaskedNLLLoss())
    module.decoder.cbr.append(nn.Dropout2d(0.2))
    dataset, files = TrainDataset(root, "train", options()), RunFolder(tmp_path)

    def resumed(name="SGD", module=module):
        optimizer = build_optimizer(
            module.encoder, module.decoder, name=name, lr_encoder=0.5, beta1=0.3, weight_decay=0.2
        )
        fit(module, optimizer, dataset, files, Settings(num_epoch=1, epoch_iters=4), devices=[CPU], resume="auto")
        return optimizer

    optimizer = resumed()
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.3, 0.2)
    assert all("momentum_buffer" in s for s in optimizer.state.values())
    with pytest.raises(CheckpointError, match=r"saved: SGD .* now: AdamW"):
        resumed("AdamW")
    with pytest.raises(CheckpointError, match=r"another model .*DATASET\.num_class"):
        resumed(module=tiny_module(5, crit=MaskedNLLLoss()))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("first", [False, True])
def test_resuming_with_another_memory_format_keeps_the_optimizer_state(root, tmp_path, name, first):
    """A run that changes TRAIN.channels_last ends with the weights of one that does not, up to rounding."""
    rates = {"SGD": 0.05, "AdamW": 0.001}

    def trained(folder, formats):
        dataset = TrainDataset(root, "train", options(), batch_per_gpu=2)
        for epoch, channels_last in enumerate(formats, start=1):
            module = tiny_module(crit=MaskedNLLLoss())
            module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            parts = module.encoder, module.decoder
            optimizer = build_optimizer(*parts, name=name, lr_encoder=rates[name], lr_decoder=rates[name])
            settings = Settings(num_epoch=2, epoch_iters=3, channels_last=channels_last)
            files = RunFolder(folder)
            if epoch < len(formats):
                settings = replace(settings, num_epoch=epoch)
            done = fit(module, optimizer, dataset, files, settings, devices=[CPU], resume="auto")
            for parameter, state in done.optimizer.state.items():
                for value in state.values():
                    assert value.dim() == 0 or value.stride() == parameter.stride()
        return weights(folder)

    expected = trained(tmp_path / "same", [first, first])
    changed = trained(tmp_path / "changed", [first, not first])
    for key, value in expected.items():
        if value.is_floating_point():
            assert (changed[key] - value).norm() <= 1e-3 * max(1e-3, value.norm()), key


def test_what_is_other_when_a_run_goes_on_is_said(root, tmp_path):
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path / "run", "TRAIN.num_epoch": 1}
    changes |= {
        "DATASET.list_train": "train",
        "DATASET.classes": "['sea','land','sky']",
        "DATASET.ignore_values": "[0]",
    }
    assert here("train.py", "--gpu", "cpu", *words(changes)).returncode == 0
    same_options = here("train.py", "--gpu", "cpu", *words({**changes, "TRAIN.resume": "auto"}))
    assert "other options" not in same_options.stdout
    changes |= {
        "TRAIN.resume": "auto",
        "TRAIN.num_epoch": 2,
        "INFERENCE.flip": True,
        "DATASET.classes": "['sea','sky','land']",
    }
    done = here("train.py", "--gpu", "cpu", *words(changes))
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stdout.splitlines() if "going on with other options than before" in line)
    assert "TRAIN.num_epoch 2 (was 1)" in said
    assert "INFERENCE.flip True (was False)" in said
    assert "names of the classes ['sea', 'sky', 'land'] (was ['sea', 'land', 'sky'])" in said


def test_weights_that_are_not_finite_are_not_saved(root, tmp_path):
    """The loss before the last update was: what was saved earlier is what there is to go on from."""
    run(root, tmp_path, settings={"num_epoch": 1})
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    module = tiny_module(crit=MaskedNLLLoss())
    module.decoder.cbr.append(nn.Dropout2d(0.2))
    optimizer = build_optimizer(module.encoder, module.decoder, lr_encoder=1e38, lr_decoder=1e38, weight_decay=10)
    dataset, settings = TrainDataset(root, "train", options()), Settings(num_epoch=5, epoch_iters=4, checkpoint_iters=1)
    with pytest.raises(
        TrainingStopped, match=r"step 5: \S+ is not finite any more.* epoch_1\.pth .*resume\.pth\. A smaller"
    ):
        fit(module, optimizer, dataset, RunFolder(tmp_path), settings, devices=[CPU], resume="auto")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == kept


def test_another_length_of_epochs_writes_over_none(root, tmp_path):
    run(root, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds epochs up to 2, but step 8 with TRAIN\.epoch_iters 8 is in epoch 2"
    ):
        run(root, tmp_path, settings={"epoch_iters": 8}, resume="auto")
    run(root, tmp_path, settings={"epoch_iters": 2, "num_epoch": 5}, resume="auto")
    assert RunFolder(tmp_path).epochs() == [1, 2, 4, 5]


def test_what_a_killed_run_left_is_removed_wherever_it_is(root, tmp_path):
    run(root, tmp_path, settings={"num_epoch": 1})
    """Of dead processes of this machine, and of other machines after a day; never of one that may still write."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    vis = tmp_path / "vis" / "epoch_1"
    vis.mkdir(parents=True)
    names = f"a.{HOST}.{dead.pid}", f"b.{HOST}.{os.getppid()}", "c.elsewhere.1", "d.elsewhere.1", "film"
    gone, alive, new, old, mine = (vis / f"{name}.partial" for name in names)
    for path in (gone, alive, new, old, mine):
        path.touch()
    for path in (old, mine):
        os.utime(path, (time.time() - 90_000,) * 2)
    run(root, tmp_path, settings={"num_epoch": 1}, resume="auto")
    assert sorted(vis.iterdir()) == sorted([alive, new, mine])


def test_the_second_run_in_a_folder_is_refused(root, tmp_path):
    """Also several that start at the same time; and the folder is free again when the first has been killed."""
    changes = {**SMALL, "DATASET.root_dataset": root, "DIR": tmp_path / "run", "TRAIN.num_epoch": 1000}
    arguments = "train.py", "--gpu", "cpu", *words({**changes, "TRAIN.workers": 1, "TRAIN.resume": "auto"})
    jobs = [Job(*arguments) for _ in range(2)]
    deadline = time.monotonic() + 120
    while sum(job.returncode is None for job in jobs) > 1 or not (tmp_path / "run" / "encoder_epoch_1.pth").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (running,) = [job for job in jobs if job.returncode is None]
    for job in jobs:
        if job is not running:
            done = job.end(10)
            assert done.returncode == 2
            assert f"another training run (process {running.pid} on {HOST}) uses {tmp_path / 'run'}" in done.stderr
            assert "Traceback" not in done.stderr
    running.kill()
    later = Job(*arguments)
    assert any("continuing" in line for line in later.lines()), later.errors()
    later.kill()


def test_encoder_and_decoder_are_replaced_together(tmp_path, monkeypatch):
    files, save = RunFolder(tmp_path), checkpoint._save
    files.save_weights(tiny_module(seed=0), "best.pth")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_room(obj, path):
        save(obj, path)
        if "decoder" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_save", no_room)
    with pytest.raises(WriteError, match=r"decoder_best\.pth cannot be written"):
        files.save_weights(tiny_module(seed=1), "best.pth")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_nothing_is_written_over_unasked(root, tmp_path):
    files = RunFolder(tmp_path)
    run(root, tmp_path, settings={"num_epoch": 3, "eval_epoch": 1}, val_dataset=ValDataset(root, "val", options()))
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    elsewhere = tmp_path.parent / "elsewhere.pth"
    elsewhere.write_bytes(kept["resume.pth"])
    for mode, start, message in (
        ("off", 0, "already holds a run"),
        (str(elsewhere), 0, "already holds a run"),
        ("off", 1, "would write over epochs up to 3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            files.find_resume(mode, start)
    assert files.find_resume("off", 3) is None
    assert files.find_resume("auto") == files.resume
    files.resume.unlink()
    with pytest.raises(CheckpointError, match=r"no resume\.pth .* TRAIN\.start_epoch 3"):
        files.find_resume("auto")
    assert {p.name for p in tmp_path.iterdir()} == set(kept) - {"resume.pth"}
    mine = {"encoder_imagenet.pth", "film.partial"}
    for name in (*mine, f"resume.pth.{HOST}.{os.getpid()}.partial"):
        (tmp_path / name).touch()
    run(root, tmp_path, settings={"num_epoch": 1}, resume="restart")
    names = {f"{part}_epoch_1.pth" for part in ("encoder", "decoder", "history")} | {"resume.pth", *mine}
    assert {p.name for p in tmp_path.iterdir()} == names  # nothing of the old run is left to be taken for the new one's


def test_a_run_stopped_while_validating_has_its_weights_and_validates_again(root, tmp_path):
    class Breaking(ValDataset):
        def __getitem__(self, index):
            raise UserError("a damaged picture")

    settings = {"eval_epoch": 2}
    val = ValDataset(root, "val", options())
    whole, expected = run(root, tmp_path / "whole", settings=settings, val_dataset=val)
    with pytest.raises(UserError, match="a damaged picture"):
        run(root, tmp_path / "cut", settings=settings, val_dataset=Breaking(root, "val", options()))
    assert same(weights(tmp_path / "cut"), expected)
    resumed, _ = run(root, tmp_path / "cut", settings=settings, val_dataset=val, resume="auto")
    assert resumed.history == whole.history
    assert (tmp_path / "cut" / "decoder_best.pth").is_file()
    continued, _ = run(root, tmp_path / "cut", settings={**settings, "start_epoch": 2, "num_epoch": 3})
    assert continued.best == whole.best


@pytest.mark.parametrize("lost", ["encoder", "decoder", "history"])
def test_a_run_stopped_while_saving_an_epoch_saves_it_again(root, tmp_path, lost):
    whole, expected = run(root, tmp_path / "whole")
    run(root, tmp_path / "cut")
    (tmp_path / "cut" / f"{lost}_epoch_2.pth").unlink()
    again, got = run(root, tmp_path / "cut", resume="auto")
    assert same(got, expected)
    history = torch.load(tmp_path / "cut" / "history_epoch_2.pth", weights_only=True)
    assert history == again.history == whole.history


@pytest.mark.parametrize("stop", range(1, 8))
def test_resuming_at_any_step_is_bit_identical(root, tmp_path, stop):
    """The run breaks down when the batch after `stop` steps is read, and is started again."""

    class Breaking(TrainDataset):
        def __getitem__(self, index):
            if index == stop:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    val = ValDataset(root, "val", options())
    settings = {"eval_epoch": 1, "checkpoint_iters": 3}
    whole, expected = run(root, tmp_path / "whole", settings=settings, val_dataset=val)
    dataset = Breaking(root, "train", options(), batch_per_gpu=2)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", settings=settings, val_dataset=val, dataset=dataset)
    # Before the first save a restart begins anew, with the same seed; after it the seed of the restart has no say.
    seed = 0 if stop < settings["checkpoint_iters"] else 9
    resumed, got = run(root, tmp_path / "cut", seed=seed, settings=settings, val_dataset=val, resume="auto")
    assert same(got, expected)
    assert resumed.history == whole.history
    assert resumed.best == whole.best


def signalled(root):
    changes = {**SMALL, "DATASET.root_dataset": root, "TRAIN.epoch_iters": 14, "TRAIN.num_epoch": 1}
    return changes | {"TRAIN.disp_iter": 1, "TRAIN.workers": 1}


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert here("train.py", "--gpu", "cpu", *words({**signalled(root), "DIR": folder})).returncode == 0
    return weights(folder, "epoch_1.pth")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_its_last_step_saved(root, tmp_path, undisturbed, number, code):
    """Nothing is lost, and what goes on from there equals an undisturbed run."""
    changes = signalled(root)
    job = Job("train.py", *words({**changes, "DIR": tmp_path / "ended"}))
    job.until("Epoch: [1][3/14]")
    os.killpg(job.pid, number)  # as a terminal does, which the loader process is not to hear
    done = job.end(60)
    assert done.returncode == code, done.stderr
    assert done.stdout.count(f"{signal.Signals(number).name}: ending after this step") == 1
    assert done.stderr.strip().endswith("the same command with TRAIN.resume auto goes on from there")
    assert "Traceback" not in done.stderr
    last = done.stdout.count("Accuracy")
    assert 3 <= last < 14
    assert read_resume(tmp_path / "ended" / "resume.pth")["step"] == last

    done = script("train.py", *words({**changes, "DIR": tmp_path / "ended", "TRAIN.resume": "auto"}))
    assert f"at step {last} of 14" in done.stdout
    assert same(weights(tmp_path / "ended", "epoch_1.pth"), undisturbed)


def test_an_ignored_signal_stays_ignored():
    """As in a process that a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_what_pytorch_refuses_is_taken_for_unrepeatable():
    with pytest.raises(TrainingStopped, match=r"^ckpt/deterministic"), deterministic(True):
        raise TrainingStopped("ckpt/deterministic: something else")


def test_the_second_signal_ends_at_once():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    save_atomic({"x": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local"):
        save_atomic({"x": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_resume_of_something_else_is_named(root, tmp_path):
    torch.save({"x": 1}, tmp_path / "resume.pth")
    with pytest.raises(CheckpointError, match="is no state to continue from"):
        run(root, tmp_path, resume="auto")
    (tmp_path / "resume.pth").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="damaged"):
        run(root, tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match="there is no file nowhere"):
        run(root, tmp_path, resume="nowhere")


def test_where_the_newest_is_damaged_the_one_before_is_offered(root, tmp_path):
    run(root, tmp_path)
    damaged = tmp_path / "encoder_epoch_2.pth"
    (tmp_path / "resume.pth").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"weights of epoch 2 are there: .*start_epoch 2 goes on from them$"):
        run(root, tmp_path, resume="auto")
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"the weights of epoch 1 are there: .*, with later epochs moved away$"):
        run(root, tmp_path, resume="auto")
    with pytest.raises(CheckpointError, match=r"encoder_epoch_2\.pth .*damaged.*; epoch_1\.pth in .* can be read"):
        run(root, tmp_path, settings={"start_epoch": 2, "num_epoch": 3})
