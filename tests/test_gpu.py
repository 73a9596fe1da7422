"""Tests of numerical accuracy, training, inference and scripts on a GPU.

    pytest -m gpu                    # needs an NVIDIA GPU
    TEST_DEVICE=cpu pytest -m gpu    # runs most of these tests on the CPU, to check the test code

Without a GPU, they are skipped.
"""

import copy
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden import golden_input, sample
from ranks import ENV, on_ranks
from runs import ROOT, Job, here, same, small, weights, words
from scenes import options, tiny_module, write_data_set
from test_compilation import assert_no_recompilation
from test_label_map import KINDS, assert_best, logits_of, reference_scores
from test_models_golden import MODELS, filled_decoder, filled_encoder
from training import make_trainer

from mit_semseg import Segmenter
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.classes import class_table_from_options
from mit_semseg.engine import MaskedNLLLoss, World, build_loss, build_optimizer
from mit_semseg.engine.distributed import parallelize
from mit_semseg.engine.losses import LOSSES
from mit_semseg.engine.train_step import LossWeights, deterministic_algorithms
from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.evaluation.inference import _without_tf32
from mit_semseg.evaluation.label_map import _triton_kernel, label_map_from_logits, labels_of_strip, probability_strips
from mit_semseg.evaluation.metrics import confusion_counts
from mit_semseg.lib.nn import UserScatteredDataParallel, enable_activation_checkpointing
from mit_semseg.lib.nn.scatter import HostCopy, _copy_streams, copy_to_device
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.layers import at_least_float32

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older PyTorch reads this before the first matrix product
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
GPU = "0" if CUDA else "cpu"  # value of --gpu
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
cuda_only = pytest.mark.skipif(not CUDA, reason="tests CUDA itself")


def relative_error(actual, expected):
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def network(encoder, decoder, classes=5):
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=classes, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, build_loss(), 0.4)
    return module.to(DEVICE, memory_format=torch.channels_last).train()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batches(root):
    dataset = TrainDataset(root, "train", options(), 2).as_uint8()
    return [dataset[i] for i in range(6)]


# Numbers


@pytest.mark.parametrize("precision", ["float64", "float32", "TF32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS["pairs"])
def test_golden_outputs(name, precision):
    """The limits are relative errors of the probabilities, far above those of rounding in each precision."""
    pair, gold = MODELS["pairs"][name], MODELS["pairs"][name]["soft"]["softmax"]
    dtype = torch.float64 if precision == "float64" else torch.float32
    module = SegmentationModule(copy.deepcopy(filled_encoder(pair["encoder"])), filled_decoder(name), None).eval()
    module.to(DEVICE, dtype, memory_format=torch.channels_last)
    size, autocast = tuple(gold["shape"][-2:]), precision == "bfloat16"
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        if precision == "float32" and CUDA:
            with _without_tf32():
                outputs = module({"img_data": golden_input(*size).to(DEVICE, dtype)}, segSize=size)
        else:
            outputs = module({"img_data": golden_input(*size).to(DEVICE, dtype)}, segSize=size)
    actual, expected = torch.from_numpy(sample(outputs.cpu(), 64)), torch.tensor(gold["values"], dtype=torch.float64)
    limit = {"float64": 1e-8, "float32": 1e-4, "TF32": 0.02, "bfloat16": 0.1}[precision]
    assert relative_error(actual, expected) < limit


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("classes", "views", "source", "size"),
    [
        (150, 1, (64, 86), (512, 683)),
        (150, 5, (75, 100), (512, 683)),
        (19, 2, (97, 97), (1024, 2048)),
        (1, 1, (4, 4), (17, 65)),
        (2, 3, (1, 1), (1, 1)),
        (300, 2, (33, 41), (129, 1)),
        (151, 1, (50, 60), (1, 777)),
        (16, 20, (9, 7), (65, 63)),
        (257, 10, (5, 40), (33, 200)),
    ],
)
def test_label_map_has_the_best_scores(classes, views, source, size, align_corners):
    """Compare the kernel with scores in float64 and with strips of probabilities, for all memory formats of logits."""
    for kind in KINDS:
        logits = [logits_of(kind, classes, source[0] + i, source[1] + 2 * i, seed=i).to(DEVICE) for i in range(views)]
        expected = reference_scores([x.double() for x in logits], size, align_corners)
        for inputs in (logits, [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in logits]):
            assert_best(label_map_from_logits(inputs, size, align_corners=align_corners), expected)
        strips = probability_strips(logits, size, align_corners=align_corners, exact=False)
        assert_best(torch.cat([labels_of_strip(strip) for strip in strips]), expected)


@cuda_only
def test_label_map_kernel_is_used():
    assert _triton_kernel(torch.device("cuda", 0)) is not None


@cuda_only
def test_label_map_of_a_large_image_needs_little_memory():
    logits = [torch.randn(150, 250, 375, device=DEVICE) for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels = label_map_from_logits(logits, (4000, 6000))
    assert torch.cuda.max_memory_allocated() - before < 2**29
    assert labels.shape == (4000, 6000)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, dtype, limit):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 19, 24, 30, generator=generator, dtype=torch.float64).mul_(4).to(dtype)
    label = torch.randint(-1, 19, (2, 24, 30), generator=generator)
    results = []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        loss = build_loss(name, class_weights=[1 + i / 9 for i in range(19)], ohem_min_kept=100).to(device)
        x = logits.to(device, kind).requires_grad_()
        if hasattr(loss, "of_logits"):
            value = loss.of_logits(x, label.to(device))
        else:
            value = loss(F.log_softmax(at_least_float32(x), 1), label.to(device))
        results.append((value, *torch.autograd.grad(value, x)))
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < limit


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_deterministic(name):
    loss = build_loss(name, class_weights=[1.0, 2.0, 0.5], ohem_min_kept=50).to(DEVICE)
    label, scores = torch.randint(-1, 3, (2, 12, 10), device=DEVICE), torch.randn(2, 3, 12, 10, device=DEVICE)
    results = []
    with deterministic_algorithms(True):
        for _ in range(2):
            x = scores.clone().requires_grad_()
            value = loss(torch.log_softmax(x, 1), label)
            results.append([value, *torch.autograd.grad(value, x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Training


def trainer_of(folder, *, device=DEVICE, world=None, classes=3, **changes):
    module = tiny_module(classes, crit=MaskedNLLLoss()).to(device, memory_format=torch.channels_last).train()
    optimizer = build_optimizer(module.encoder, module.decoder, changes.pop("optim", "SGD"), rates=(0.01, 0.01))
    world = world or World(devices=[device])
    return make_trainer(folder, module=module, optimizer=optimizer, world=world, channels_last=True, **changes)


def step(trainer, *batches):
    loss_weights = LossWeights([batches], trainer.module.crit, trainer.world, False)
    trainer.train_step([trainer.to_devices(batches)], loss_weights)
    trainer.step += 1


def flat(tensors):
    return torch.cat([x.detach().double().cpu().flatten() for x in tensors])


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-4), ("TF32", 0.02), ("bf16", 0.05), ("fp16", 0.05)])
def test_steps_equal_those_on_the_cpu(batches, tmp_path, precision, limit):
    amp = precision if precision in ("bf16", "fp16") else "off"
    ours, expected = trainer_of(tmp_path, amp=amp), trainer_of(tmp_path, device=torch.device("cpu"))
    if amp == "fp16":
        ours.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64)  # small, so that no step overflows
    for batch in batches:
        if precision == "float32" and CUDA:
            with _without_tf32():
                step(ours, batch)
        else:
            step(ours, batch)
        step(expected, batch)
    for kind in ("parameters", "buffers"):
        assert relative_error(flat(getattr(ours.module, kind)()), flat(getattr(expected.module, kind)())) < limit


@pytest.mark.parametrize("optim", ["SGD", "AdamW"])
def test_overflow_in_fp16_changes_nothing(batches, tmp_path, optim):
    trainer = trainer_of(tmp_path, amp="fp16", optim=optim)
    trainer.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**34)

    def state():
        momentum = [x for values in trainer.optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
        return [x.clone() for x in (*trainer.module.parameters(), *trainer.module.buffers(), *momentum)]

    before, steps = state(), 0
    while trainer.overflows == steps:
        assert all(map(torch.equal, state(), before))
        step(trainer, batches[0])
        steps += 1
    assert steps > 1
    assert all(bool(x.isfinite().all()) for x in state())
    assert not all(map(torch.equal, trainer.module.parameters(), before))


@pytest.mark.parametrize("devices", [[DEVICE, DEVICE], [torch.device("cuda", 0), torch.device("cuda", 1)]], ids=str)
def test_replicas_equal_the_whole_batch(devices):
    if devices[0] != devices[1] and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module = tiny_module(crit=MaskedNLLLoss()).double().to(devices[0])
    images, labels = torch.randn(4, 3, 32, 40, dtype=torch.float64), torch.randint(0, 3, (4, 4, 5))
    feeds = [{"img_data": images[i : i + 2], "seg_label": labels[i : i + 2]} for i in (0, 2)]
    parameters = list(module.parameters())
    loss = UserScatteredDataParallel(module, devices)(feeds)[0].mean()
    expected, _ = module({"img_data": images.to(devices[0]), "seg_label": labels.to(devices[0])})
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def _train_on_rank(rank, size, folder, batches, backend):
    device = torch.device("cuda", rank if backend == "nccl" else 0) if CUDA else DEVICE
    trainer = trainer_of(folder, world=World(rank, size, rank, size, devices=[device]), device=device)
    trainer.module.double()
    trainer.model = parallelize(trainer.module, trainer.world)
    for batch in batches:
        half = len(batch["img_data"]) // size
        own = {key: batch[key][rank * half : (rank + 1) * half] for key in ("img_data", "seg_label")}
        step(trainer, own)
    return {name: value.cpu().numpy() for name, value in trainer.module.state_dict().items()}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_ranks_equal_the_whole_batch(tmp_path, backend):
    """Over gloo, two ranks share a GPU."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "img_data": torch.randn(4, 3, 32, 40, dtype=torch.float64, generator=generator),
            "seg_label": torch.randint(-1, 3, (4, 4, 5), generator=generator),
        }
        for _ in range(3)
    ]
    ranks = on_ranks(2, tmp_path, _train_on_rank, 2, tmp_path, batches, backend, backend=backend)
    expected = trainer_of(tmp_path, device=torch.device("cpu"))
    expected.module.double()
    for batch in batches:
        step(expected, batch)
    for state in ranks:
        for name, value in expected.module.state_dict().items():
            np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-6, atol=1e-9)


def _communicate_alone(rank):
    x = torch.arange(5, dtype=torch.float64, device=DEVICE)
    rows = torch.empty(1, 5, dtype=torch.float64, device=DEVICE)
    dist.all_gather_into_tensor(rows, x[None])
    dist.all_reduce(x)
    dist.broadcast(torch.ones(2, dtype=torch.int64, device=DEVICE), 0)
    return rows[0].tolist() == x.tolist()


@cuda_only
def test_nccl_supports_the_exchanged_types(tmp_path):
    assert on_ranks(1, tmp_path, _communicate_alone, backend="nccl") == [True]


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ("resnet18dilated", "ppm_deepsup"),
        ("mobilenetv2dilated", "c1_deepsup"),
        ("resnet50", "upernet"),
        ("hrnetv2", "c1"),
    ],
)
def test_deterministic_training_gives_the_same_bits_twice(encoder, decoder):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 96, 128, generator=generator).to(DEVICE, memory_format=torch.channels_last)
    feed = {"img_data": images, "seg_label": torch.randint(-1, 5, (2, 12, 16), generator=generator).to(DEVICE)}
    results = []
    with deterministic_algorithms(True):
        for _ in range(2):
            module = network(encoder, decoder)
            optimizer = build_optimizer(module.encoder, module.decoder)
            for _ in range(3):
                torch.manual_seed(1)
                optimizer.zero_grad()
                module(feed)[0].backward()
                optimizer.step()
            results.append(flat(module.state_dict().values()))
    assert torch.equal(*results)


def test_activation_checkpointing_gives_the_same_gradients_in_less_memory():
    images = torch.randn(2, 3, 160, 192, device=DEVICE).contiguous(memory_format=torch.channels_last)
    feed, results, peaks = {"img_data": images, "seg_label": torch.randint(0, 5, (2, 20, 24), device=DEVICE)}, [], []
    for checkpointing in (False, True):
        module = network("resnet50dilated", "ppm_deepsup")
        if checkpointing:
            enable_activation_checkpointing(module.encoder)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        module(feed)[0].backward()
        peaks.append(torch.cuda.max_memory_allocated() if CUDA else 1 - checkpointing)
        results.append(flat(p.grad for p in module.parameters()))
    assert relative_error(*results) < 1e-3
    assert peaks[1] < peaks[0]


@cuda_only
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize(("encoder", "decoder"), [("resnet50dilated", "ppm_deepsup"), ("hrnetv2", "c1")])
def test_training_step_does_not_synchronize(root, tmp_path, encoder, decoder, amp):
    """This includes the first step with an image size."""
    dataset = TrainDataset(root, "train", options(imgSizes=(40, 48, 56, 64, 72)), 2).as_uint8()
    pinned = [
        {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in dataset[i].items()}
        for i in range(8)
    ]
    module = network(encoder, decoder, 3)
    trainer = make_trainer(tmp_path, module=module, world=World(devices=[DEVICE]), channels_last=True, amp=amp)
    loss_weights = [LossWeights([[batch]], module.crit, trainer.world, False) for batch in pinned]
    trainer.train_step([trainer.to_devices([pinned[0]])], loss_weights[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch, own in zip(pinned, loss_weights, strict=True):
            trainer.train_step([trainer.to_devices([batch])], own)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.metrics.read()[2] == 9


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_resumed_run_is_bit_identical(root, tmp_path, amp):
    changes = {
        "TRAIN__deterministic": True,
        "TRAIN__amp": amp,
        "--gpu": GPU,
        "TRAIN__num_epoch": 3,
        "TRAIN__disp_iter": 1,
    }
    here("train.py", small(root, tmp_path / "whole", **changes))
    arguments = small(root, tmp_path / "cut", **changes, TRAIN__resume="auto")
    job = Job("train.py", arguments)
    job.until("epoch 2, step 1/3")
    job.send(signal.SIGTERM)
    job.end(code=143)
    here("train.py", arguments)
    assert same(*(weights(tmp_path / name, "epoch_3.pth") for name in ("whole", "cut")))


def test_compiled_blocks_equal_eager_blocks_for_all_sizes():
    assert_no_recompilation(DEVICE)


# Inference


@cuda_only
@pytest.mark.parametrize("opts", [{}, {"flip": True}, {"window_size": (32, 40)}, {"precision": "bf16"}])
def test_evaluation_does_not_synchronize(opts):
    predictor = Predictor(network("resnet18dilated", "ppm_deepsup"), DEVICE, InferenceOptions(**opts))

    def evaluate(height, width):
        scales = [torch.randn(1, 3, *size, device=DEVICE) for size in ((48, 64), (72, 96))]
        label = torch.zeros(height, width, dtype=torch.int64).pin_memory()
        item = {"img_ori": np.zeros((height, width, 3), np.uint8), "img_data": scales}
        (labels,) = predictor.label_maps([item])
        return HostCopy((labels, confusion_counts(labels, label.to(DEVICE, non_blocking=True), 5)))

    evaluate(61, 83)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copies = [evaluate(61, 83), evaluate(40, 50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for copy_, pixels in zip(copies, (61 * 83, 40 * 50), strict=True):
        labels, counts = copy_.wait()
        assert counts.sum() == pixels
        assert np.array_equal(counts[0].numpy(), np.bincount(labels.numpy().ravel(), minlength=6))


def test_batches_and_single_images_have_nearly_equal_label_maps():
    predictor = Predictor(network("resnet18dilated", "c1"), DEVICE)
    images = torch.randn(4, 3, 64, 96, device=DEVICE)
    items = [{"img_ori": np.zeros((64, 96, 3), np.uint8), "img_data": [x[None]]} for x in images]
    for ours, item in zip(predictor.label_maps(items), items, strict=True):
        assert (ours == predictor.label_map(item)).float().mean() > 0.99


def test_segmenter_in_eight_threads_gives_the_same_results():
    opt = options(imgSizes=(32, 48), num_class=5)
    segmenter = Segmenter(network("resnet18dilated", "ppm_deepsup"), class_table_from_options(opt), opt, device=DEVICE)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40 + 8 * i, 60, 3), dtype=np.uint8) for i in range(8)]
    expected = [segmenter(image).label_map for image in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for result, labels in zip(pool.map(segmenter, images), expected, strict=True):
                assert np.array_equal(result.label_map, labels)


@cuda_only
def test_copies_are_complete_before_they_are_used():
    """Matrix products on the copy stream delay the copies."""
    device = torch.device("cuda", 0)
    copy_to_device({"x": torch.ones(1)}, device)  # creates the copy stream
    matrix = torch.randn(4096, 4096, device=device)
    for n in range(20):
        with torch.cuda.stream(_copy_streams[device]):
            for _ in range(20):
                matrix = (matrix @ matrix).clamp(-1, 1)
        host = {"x": torch.full((1000, 1000), float(n)).pin_memory(), "y": [torch.ones(3).pin_memory()]}
        copies = copy_to_device(host, device)
        assert copies["x"].sum().item() == n * 1e6
        assert torch.equal(copy_to_device(copies, device)["y"][0].cpu(), torch.ones(3))


# Scripts


def test_scripts(root, tmp_path):
    arguments = small(root, tmp_path, **{"--gpu": GPU, "TRAIN.amp": "auto", "TRAIN.eval_epoch": 1})
    here("train.py", arguments)
    scores = []
    for name, more in (("eval.py", {}), ("eval_multipro.py", {}), ("eval.py", {"VAL.batch_size": 2})):
        here(name, arguments, more)
        scores.append(json.loads((tmp_path / "result" / "results.json").read_text())["mean_iou"])
    assert scores[0] == scores[1]
    assert scores[2] == pytest.approx(scores[0], abs=0.02)
    for number, more in enumerate(({}, {"TEST.batch_size": 3}, {"INFERENCE.window_size": 40})):
        out = tmp_path / f"out{number}"
        here("test.py", "--imgs", root / "val" / "images", arguments, {"TEST.result": out}, more)
        assert len(list(out.glob("*.png"))) == 3


@cuda_only
def test_torchrun_with_all_gpus(root, tmp_path):
    count = torch.cuda.device_count()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    arguments = {k: v for k, v in small(root, tmp_path, TRAIN__eval_epoch=1).items() if k != "--gpu"}
    for name in ("train.py", "eval.py"):
        done = subprocess.run([*torchrun, name, *words(arguments)], cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "result" / "results.json").is_file()
