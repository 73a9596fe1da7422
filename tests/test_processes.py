"""Several devices and processes: the same figures as one, and what happens when one of them dies."""

import json
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from processes import (
    ENV,
    changes_for,
    children,
    in_processes,
    rank_environment,
    start_ranks,
    torchrun,
    write_pictures,
)
from runs import Job, here, script, words
from scenes import options, tiny_module, write_pairs

from mit_semseg.cli import common, devices
from mit_semseg.cli.workers import Share, share_out
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.loader import make_loader
from mit_semseg.engine import MaskedNLLLoss, Processes, RunFolder, Settings, build_optimizer, fit, freeze_batch_norm
from mit_semseg.engine.distributed import Place
from mit_semseg.engine.loop import TrainingStopped
from mit_semseg.evaluation.evaluator import read_items
from mit_semseg.lib.nn import enable_activation_checkpointing
from mit_semseg.lib.utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"))


# The same training


def trained(
    root, folder, batch_size, *, devices=1, processes=None, frozen=False, recomputed=False, dataset=None, **settings
):
    """Loss trace and all entries of a network after 20 steps in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        module = tiny_module(crit=MaskedNLLLoss())
        if frozen:
            freeze_batch_norm(module)
        if recomputed:
            assert enable_activation_checkpointing(module.encoder) == 1
        data = dataset or TrainDataset(
            root, "train", options(imgSizes=(40,), random_flip=False), batch_per_gpu=batch_size
        )
        optimizer = build_optimizer(module.encoder, module.decoder, lr_encoder=0.05, lr_decoder=0.05)
        done = fit(
            module,
            optimizer,
            _Doubles(data),
            RunFolder(folder),
            Settings(**{"num_epoch": 1, "epoch_iters": 20, "disp_iter": 1, **settings}),
            devices=[CPU] * devices,
            processes=processes,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    return done.history["train"], {k: v.numpy() for k, v in module.state_dict().items()}


class _Doubles(torch.utils.data.Dataset):
    """A training set whose pictures are float64."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        batch = self.dataset[index]
        return {**batch, "img_data": batch["img_data"].double()}


def _trained_process(rank, root, folder, batch_size, options):
    return trained(root, folder, batch_size, processes=Processes(Place(rank, 2, rank, 2)), **options)


def in_two_processes(root, folder, batch_size, **options):
    first, second = in_processes(2, folder, _trained_process, root, folder / "run", batch_size, options)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    assert first[0] == second[0]
    assert all((first[1][key] == second[1][key]).all() for key in first[1])  # bit for bit
    return first


@pytest.mark.parametrize(
    ("frozen", "variants"),
    [
        (False, {"one": (4, {}), "replicas": (2, {"devices": 2}), "processes": (2, {})}),
        (
            False,
            {
                "one": (4, {"accumulate": 2}),
                "replicas": (2, {"devices": 2, "accumulate": 2}),
                "processes": (2, {"accumulate": 2}),
            },
        ),
        # Norms that are computed again meet again in the backward pass.
        (False, {"one": (4, {}), "again": (4, {"recomputed": True}), "processes": (2, {"recomputed": True})}),
        # Statistics are those of the batch in hand: what is accumulated equals a larger batch where norms are frozen.
        (
            True,
            {
                "one": (4, {}),
                "accumulated": (2, {"accumulate": 2}),
                "replicas": (2, {"devices": 2}),
                "processes": (1, {"accumulate": 2}),
            },
        ),
    ],
    ids=["step", "accumulated", "recomputed", "frozen"],
)
def test_the_same_global_batch_gives_the_same_losses(root, tmp_path, frozen, variants):
    """Twenty steps: losses, accuracies, weights and the buffers of the norms."""
    results = {}
    for name, (batch_size, changes) in variants.items():
        (tmp_path / name).mkdir()
        train = in_two_processes if name == "processes" else trained
        results[name] = train(root, tmp_path / name, batch_size, frozen=frozen, **changes)
    history, state = results.pop("one")
    assert len(history["loss"]) == 20
    assert history["loss"][-1] < history["loss"][0]
    for name, (other_history, other_state) in results.items():
        assert other_history["loss"] == pytest.approx(history["loss"], rel=1e-6), name
        assert other_history["acc"] == pytest.approx(history["acc"], rel=1e-6), name
        for key, value in state.items():
            torch.testing.assert_close(
                torch.from_numpy(other_state[key]), torch.from_numpy(value), rtol=1e-6, atol=1e-7, msg=f"{name}: {key}"
            )


def _poisoned_process(rank, root, folder):
    class Poisoned(TrainDataset):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            if index == 5:  # the second process's third batch
                batch["img_data"][0, 0, 0, 0] = float("nan")
            return batch

    data = Poisoned(root, "train", options(), batch_per_gpu=2)
    try:
        trained(root, folder, 2, dataset=data, processes=Processes(Place(rank, 2, rank, 2)))
    except TrainingStopped as error:
        return f"{error} !{','.join(data[5]['info'])}"


def test_a_loss_that_is_not_finite_stops_all_processes_with_the_files(root, tmp_path):
    for text in in_processes(2, tmp_path, _poisoned_process, root, tmp_path / "run"):
        message, files = text.split(" !")
        assert "step 3 (epoch 1, iteration 3): the loss is nan for the batch" in message
        assert all(name in message for name in files.split(","))


# The scripts


def on_one_thread(*arguments):
    torch.set_num_threads(1)
    try:
        return here(*arguments)
    finally:
        torch.set_num_threads(2)


def by_ranks(name, *arguments):
    """Run a script in two processes; what the first one says."""
    first, second = (job.end() for job in start_ranks(name, arguments))
    assert second.returncode == 0, second.stderr
    return first


@pytest.fixture(scope="module")
def jobs(root, tmp_path_factory):
    """The same run on two replicas of one process and on two processes; returns its options for both folders."""
    folder = tmp_path_factory.mktemp("jobs")
    replicas, processes = (
        words(changes_for(root, folder / name, **{"TRAIN.epoch_iters": 4})) for name in ("replicas", "processes")
    )
    done = script("train.py", "--gpus", "cpu,cpu", *replicas, env=ENV)
    assert done.returncode == 0, done.stderr
    done = by_ranks("train.py", *processes)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_processes_train_as_one_with_replicas(jobs):
    folder, output = jobs
    a, b = (torch.load(folder / name / "history_epoch_2.pth", weights_only=True) for name in ("replicas", "processes"))
    assert len(a["train"]["loss"]) == 8
    assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=1e-5)
    assert b["val"]["acc"] == pytest.approx(a["val"]["acc"], abs=0.02)
    log = (folder / "processes" / "log.txt").read_text()
    assert "devices: cpu (1 threads) in each of 2 processes" in log
    assert log.count("Epoch: [1][1/4]") == 1  # one log
    assert output.count("training is complete") == 1


def test_shared_out_evaluation_and_segmentation_give_the_same_results(jobs, root, tmp_path):
    folder, _ = jobs
    changes = words(changes_for(root, folder / "processes", **{"TEST.result": tmp_path / "alone"}))
    path = folder / "processes" / "result" / "results.json"
    assert here("eval.py", "--gpu", "cpu", *changes).returncode == 0
    alone = json.loads(path.read_text())
    done = by_ranks("eval.py", *changes)
    figures = json.loads(path.read_text())
    assert {k: v for k, v in figures.items() if "second" not in k} == {
        k: v for k, v in alone.items() if "second" not in k
    }
    assert done.stdout.count("Mean IoU (over all") == 1

    pictures = root / "val" / "images"
    assert here("test.py", "--gpu", "cpu", "--imgs", pictures, "--index", *changes).returncode == 0
    expected = {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}
    assert len(expected) == 6
    for name, run in (("job", by_ranks), ("workers", lambda n, *a: script(n, "--gpus", "cpu,cpu", *a))):
        arguments = words(changes_for(root, folder / "processes", **{"TEST.result": tmp_path / name}))
        done = run("test.py", "--imgs", pictures, "--index", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3 of 3 pictures segmented") == 1
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == expected


def test_a_picture_that_cannot_be_read_is_counted_wherever_it_is(jobs, root, tmp_path):
    folder, _ = jobs
    write_pairs(tmp_path / "p", [(40, 40)] * 3)
    (tmp_path / "p" / "images" / "02.png").write_bytes(b"no picture")
    arguments = words(changes_for(root, folder / "processes", **{"TEST.result": tmp_path / "out"}))
    done = script("test.py", "--gpus", "cpu,cpu", "--imgs", tmp_path / "p" / "images", *arguments)
    assert done.returncode == 1
    assert "2 of 3 pictures segmented" in done.stdout
    assert re.search(r"not segmented: .*02\.png: no readable image", done.stdout)


@pytest.mark.long
def test_a_restart_does_not_continue_what_another_job_has_left(root, jobs, tmp_path):
    """The first attempt refuses to write over the run in the folder; so does the second."""
    folder = jobs[0] / "processes"
    before = (folder / "resume.pth").read_bytes()
    changes = changes_for(root, folder, **{"TRAIN.num_epoch": 3})
    done = torchrun("train.py", *words(changes), flags=["--max-restarts=1"])
    assert done.returncode != 0
    assert done.stderr.count("already holds a run: add TRAIN.resume auto") >= 2
    assert (folder / "resume.pth").read_bytes() == before


@pytest.mark.long
def test_a_killed_worker_of_the_evaluation_is_named(jobs, root, tmp_path):
    folder, _ = jobs
    write_pairs(tmp_path / "many", [(60, 40)] * 30, seed=5)
    result = folder / "processes" / "result"
    changes = changes_for(root, folder / "processes", **{"DATASET.list_val": tmp_path / "many", "VAL.visualize": True})
    changes |= {"DATASET.imgSizes": "(40,80,120)", "DATASET.imgMaxSize": 400}
    job = Job("eval_multipro.py", "--gpus", "cpu,cpu", *words(changes), env=ENV)
    while not any("many" in str(p) for p in result.rglob("*.png")):
        assert job.returncode is None, job.errors()
        time.sleep(0.02)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    done = job.end(60)
    assert done.returncode == 2
    assert re.search(
        r"error: worker process \d on cpu, which had images \d+ to \d+ of 30 and had done \d+ of them, was killed by "
        r"SIGKILL",
        done.stderr,
    )
    done = script("eval_multipro.py", "--gpus", "cpu,cpu", *words(changes))
    assert done.returncode == 0, done.stderr
    assert "30 images in" in done.stdout


# Sharing out


def _square(share, send, base):
    send(f"{share.number} of {share.parts} on {share.device}")
    if base < 0 and share.number == 1:
        raise (UserError("a negative base") if base == -1 else KeyError("no key"))
    return base + share.number


@pytest.mark.long
def test_work_is_shared_out_over_worker_processes():
    messages = []
    assert share_out(_square, [CPU, CPU], Processes(), 5, [10], messages.append) == [10, 11]
    assert sorted(messages) == ["0 of 2 on cpu", "1 of 2 on cpu"]
    assert share_out(_square, [CPU, CPU], Processes(), 1, [10], messages.append) == [10]
    assert messages[-1] == "0 of 1 on cpu"
    with pytest.raises(UserError, match=r"^a negative base$"):
        share_out(_square, [CPU, CPU], Processes(), 5, [-1])
    with pytest.raises(UserError, match=r"(?s)images 3 to 5 of 5 and had done 1 of them, failed:.*in _square.*no key"):
        share_out(_square, [CPU, CPU], Processes(), 5, [-2])


def test_shares_know_how_many_of_them_are_on_this_machine(monkeypatch):
    """Of 16 processes on two machines, eight share the cores of one."""
    place = SimpleNamespace(local_size=8)
    job = SimpleNamespace(size=16, rank=9, place=place, collect=lambda own, *_, **__: [own])
    (share,) = share_out(lambda share, send: share, [CPU], job, 100)
    assert share == Share(CPU, 9, 16, 8)
    monkeypatch.setattr("mit_semseg.dataset.loader.available_cores", lambda: 64)
    loaders = []

    def seen(*arguments, **options):
        loaders.append(make_loader(*arguments, **options))
        return loaders[-1]

    monkeypatch.setattr("mit_semseg.evaluation.evaluator.make_loader", seen)
    for workers, expected in ((16, 8), (6, 6), (0, 0)):
        next(read_items([{}] * 100, device="cpu", workers=workers, processes=share.local))
        assert loaders[-1].num_workers == expected


# Devices and data of a process


def test_every_process_of_a_job_takes_a_device_of_its_own(monkeypatch):
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    assert Place.of_this_process() == Place()  # some of it is missing: not torchrun
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert Place.of_this_process() == Place(3, 4, 1, 2, 0)
    assert devices.pick_devices("cpu,cpu") == [CPU]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert devices.pick_devices(None) == [torch.device("cuda", 1)]
    assert devices.pick_devices("4-7") == [torch.device("cuda", 5)]
    with pytest.raises(UserError, match=r"started 2 processes on this machine, .* there are gpu4: start fewer"):
        devices.pick_devices("4")
    with pytest.raises(UserError, match="under torchrun use eval"):
        common.refuse_torchrun("under torchrun use eval.py")


def test_a_process_takes_the_gpu_that_its_launcher_assigned(monkeypatch):
    """One visible GPU for each of eight processes, as of `srun --gpus-per-task=1`; not under torchrun."""
    for name, value in rank_environment(5, 8, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert devices.pick_devices(None) == devices.pick_devices("0") == [torch.device("cuda", 0)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="8 processes on this machine"):
        devices.pick_devices(None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="8 processes on this machine"):
        devices.pick_devices(None)


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr("mit_semseg.dataset.loader.available_cores", lambda: 8)
    dataset = ValDataset.__new__(ValDataset)
    dataset.records, dataset.skipped = list(range(7)), []
    assert [make_loader(dataset, workers=16, processes=n).num_workers for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert make_loader(dataset, workers=0).num_workers == 0
    assert [dataset.shard(i, 3).records for i in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
