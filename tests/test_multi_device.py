"""Training and evaluation give the same results on one device, several devices and several ranks."""

import os
import signal
import subprocess

import pytest
import torch
from ranks import ENV, TORCHRUN, changes_for, on_ranks, rank_environment, start_ranks, write_images
from runs import ROOT, assert_same_results, forked, here, results, script, words
from scenes import options, tiny_module
from test_training import Poisoned
from training import CPU, make_trainer

from mit_semseg.cli import common, devices
from mit_semseg.cli.workers import Shard, WorkerError, run_sharded
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.loader import make_loader
from mit_semseg.engine import MaskedNLLLoss, TrainingStopped, World, freeze_batch_norm
from mit_semseg.lib.nn import enable_activation_checkpointing
from mit_semseg.lib.utils import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


class Doubles(torch.utils.data.Dataset):
    """A training dataset with float64 images."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        batch = self.dataset[index]
        return {**batch, "img_data": batch["img_data"].double()}


def train(root, folder, batch_size, *, world=None, frozen=False, checkpointing=False, dataset=TrainDataset, **training):
    """Train for 10 steps in float64; return the training curves and the state dict."""
    torch.set_default_dtype(torch.float64)
    try:
        module = tiny_module(crit=MaskedNLLLoss())
        if frozen:
            freeze_batch_norm(module)
        if checkpointing:
            assert enable_activation_checkpointing(module.encoder) >= 1
        data = dataset(root, "train", options(imgSizes=(40,), random_flip=False), batch_per_gpu=batch_size)
        changes = {"num_epoch": 1, "epoch_iters": 10, "disp_iter": 1, **training}
        trainer = make_trainer(folder, module=module, world=world, **changes)
        trainer.fit(Doubles(data))
    finally:
        torch.set_default_dtype(torch.float32)
    state = module.state_dict()
    if trainer.average:
        with trainer.average.in_network():
            state |= {f"average {key}": value.clone() for key, value in module.state_dict().items()}
    return trainer.history["train"], {k: v.numpy() for k, v in state.items()}


def _train_rank(rank, root, folder, batch_size, changes):
    return train(root, folder, batch_size, world=World(rank, 2, rank, 2), **changes)


def train_on_two_ranks(root, folder, batch_size, **changes):
    first, second = on_ranks(2, folder, _train_rank, root, folder / "run", batch_size, changes)
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    assert first[0] == second[0]
    assert all((first[1][key] == second[1][key]).all() for key in first[1])  # equal bit for bit
    return first


REPLICAS, ACCUMULATED = {"world": World(devices=[CPU] * 2)}, {"accumulate": 2}
FREEZE = {"freeze_encoder": 5, "ema": 0.9}


@pytest.mark.parametrize(
    ("frozen", "variants"),
    [
        (False, {"one": (4, {}), "replicas": (2, REPLICAS), "ranks": (2, {})}),
        (False, {"one": (4, ACCUMULATED), "replicas": (2, REPLICAS | ACCUMULATED), "ranks": (2, ACCUMULATED)}),
        (False, {"one": (4, {}), "again": (4, {"checkpointing": True}), "ranks": (2, {"checkpointing": True})}),
        (False, {"one": (4, FREEZE), "replicas": (2, REPLICAS | FREEZE), "ranks": (2, FREEZE)}),
        # Accumulation equals a larger batch only with frozen norms, because statistics depend on the micro-batch.
        (True, {"one": (4, {}), "steps": (2, ACCUMULATED), "replicas": (2, REPLICAS), "ranks": (1, ACCUMULATED)}),
    ],
    ids=["step", "accumulation", "checkpointing", "frozen encoder and average", "frozen norms"],
)
def test_same_global_batch_gives_the_same_training(root, tmp_path, frozen, variants):
    """Losses, accuracies, weights and running statistics are equal over 10 steps."""
    results = {}
    for name, (batch_size, changes) in variants.items():
        (tmp_path / name).mkdir()
        function = train_on_two_ranks if name == "ranks" else train
        results[name] = function(root, tmp_path / name, batch_size, frozen=frozen, **changes)
    history, state = results.pop("one")
    assert len(history["loss"]) == 10
    assert history["loss"][-1] < history["loss"][0]
    for name, (other_history, other_state) in results.items():
        for key in ("loss", "acc"):
            assert other_history[key] == pytest.approx(history[key], rel=1e-6), name
        for key, value in state.items():
            a, b = torch.from_numpy(other_state[key]), torch.from_numpy(value)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=f"{name}: {key}")


class PoisonedOnRank1(Poisoned):
    poisoned = 5  # rank 1 loads batches 1, 3, 5, ...


def _poisoned_rank(rank, root, folder):
    data = PoisonedOnRank1(root, "train", options(imgSizes=(40,), random_flip=False), batch_per_gpu=2)
    try:
        train(root, folder, 2, dataset=PoisonedOnRank1, world=World(rank, 2, rank, 2))
    except TrainingStopped as error:
        return f"{error} !{','.join(data[5]['info'])}"


def test_nonfinite_loss_stops_all_ranks_and_names_the_images(root, tmp_path):
    for text in on_ranks(2, tmp_path, _poisoned_rank, root, tmp_path / "run"):
        message, names = text.split(" !")
        assert "step 3 (epoch 1, iteration 3)" in message
        assert all(name in message for name in names.split(","))


def by_ranks(name, *arguments):
    """Run a script on two ranks; return the standard output of rank 0."""
    first, _ = [job.end() for job in start_ranks(name, *arguments)]
    return first.stdout


@pytest.fixture(scope="module")
def jobs(root, tmp_path_factory):
    """Train on two replicas of one process, then on two ranks; return the folder, and the output of the ranks."""
    folder = tmp_path_factory.mktemp("jobs")
    replicas, ranks = (changes_for(root, folder / name, TRAIN__epoch_iters=2) for name in ("replicas", "ranks"))
    script("train.py", {**replicas, "--gpu": "cpu,cpu"}, env=ENV)
    return folder, by_ranks("train.py", ranks)


def test_ranks_train_like_replicas(jobs):
    folder, output = jobs
    a, b = (torch.load(folder / name / "history_epoch_2.pth", weights_only=True) for name in ("replicas", "ranks"))
    assert len(a["train"]["loss"]) == 4
    assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=1e-5)
    assert b["val"]["loss"] == pytest.approx(a["val"]["loss"], rel=1e-2)
    assert b["val"]["acc"] == pytest.approx(a["val"]["acc"], abs=0.02)
    log = (folder / "ranks" / "log.txt").read_text()
    assert "devices: cpu (1 threads) on each of 2 ranks" in log
    assert log.count("epoch 1, step 1/2") == 1  # only rank 0 logs
    assert output.count("training is complete") == 1


def test_sharded_evaluation_and_segmentation_equal_one_process(jobs, root, tmp_path):
    folder, _ = jobs
    options = changes_for(root, folder / "ranks", TEST__result=tmp_path / "alone")
    path = folder / "ranks" / "result" / "results.json"

    here("eval.py", options)
    alone = results(path)
    assert by_ranks("eval.py", options).count("Mean IoU (over all") == 1
    assert_same_results(results(path), alone)

    images = "--imgs", root / "val" / "images", "--index"
    here("test.py", *images, options)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}
    assert len(expected) == 6
    for name, run in (("ranks", by_ranks), ("workers", lambda *args: script(*args, {"--gpu": "cpu,cpu"}).stdout)):
        output = run("test.py", *images, {**options, "TEST.result": tmp_path / name})
        assert output.count("3 of 3 images segmented") == 1
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == expected


@pytest.mark.long
def test_restart_does_not_resume_a_checkpoint_of_another_job(root, jobs):
    folder = jobs[0] / "ranks"
    before = (folder / "resume.pth").read_bytes()
    command = [*TORCHRUN, "--max-restarts=1", *words(ROOT / "train.py", changes_for(root, folder, TRAIN__num_epoch=3))]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert done.stderr.count("TRAIN.resume auto") >= 2
    assert (folder / "resume.pth").read_bytes() == before


def _add_index(shard, report, base):
    report(f"{shard.index} of {shard.count} on {shard.device}")
    if shard.index == 1 and base < 0:
        if base == -1:
            raise UserError("a negative base")
        os.kill(os.getpid(), signal.SIGKILL)
    return base + shard.index


def test_work_is_sharded_over_worker_processes(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda method: forked)  # spawned processes start slowly
    world, reports = World(devices=[CPU] * 2), []
    assert run_sharded(_add_index, world, 5, [10], reports.append) == [10, 11]
    assert sorted(reports) == ["0 of 2 on cpu", "1 of 2 on cpu"]
    assert run_sharded(_add_index, world, 1, [10], reports.append) == [10]
    assert reports[-1] == "0 of 1 on cpu"
    with pytest.raises(UserError, match=r"^a negative base$"):
        run_sharded(_add_index, world, 5, [-1], reports.append)
    with pytest.raises(WorkerError, match="images 3 to 5"):
        run_sharded(_add_index, world, 5, [-2], reports.append)


def test_shards_of_a_rank_share_the_cores_of_its_machine(monkeypatch):
    """Two machines with 64 cores each run 16 ranks in total, so eight ranks share 64 cores."""
    monkeypatch.setattr(World, "gather", lambda self, value, doing: [value])
    (shard,) = run_sharded(lambda shard, report: shard, World(9, 16, 1, 8), 100, (), print)
    assert shard == Shard(CPU, 9, 16, 8)
    monkeypatch.setattr("mit_semseg.dataset.loader.available_cores", lambda: 64)
    loaders = [make_loader([0] * 7, workers=n, local_size=shard.local_size) for n in (16, 6, 0)]
    assert [loader.num_workers for loader in loaders] == [8, 6, 0]


def test_every_rank_gets_its_own_device(monkeypatch):
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    assert World.from_environment() == World()  # MASTER_ADDR is not set, so torchrun is not used
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert World.from_environment() == World(3, 4, 1, 2, 0)
    assert devices.pick_devices("cpu,cpu") == [CPU]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert devices.pick_devices(None) == [torch.device("cuda", 1)]
    assert devices.pick_devices("4-7") == [torch.device("cuda", 5)]
    with pytest.raises(UserError, match=r"2 processes .*gpu4"):
        devices.pick_devices("4")
    with pytest.raises(UserError, match=r"eval\.py"):
        common.refuse_torchrun("use eval.py")


def test_rank_uses_the_gpu_that_its_launcher_assigned(monkeypatch):
    """With `srun --gpus-per-task=1`, a rank sees only its own GPU; torchrun does not hide the other GPUs."""
    for name, value in rank_environment(5, 8, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert devices.pick_devices(None) == devices.pick_devices("0") == [torch.device("cuda", 0)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="8 processes"):
        devices.pick_devices(None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="8 processes"):
        devices.pick_devices(None)
