"""The Triton kernel gives the same label maps as the reference, on a GPU or else in Triton's interpreter."""

import sys

import pytest
import torch
from test_label_map import KINDS, assert_best, logits_of, reference_scores

from mit_semseg.evaluation import label_map

kernel = pytest.importorskip("mit_semseg.evaluation.label_map_triton", reason="Triton is part of PyTorch on Linux only")
CLASSES, PIXELS = kernel.CLASSES, kernel.PIXELS
DEVICE = "cpu"  # Triton's interpreter runs the kernel, see conftest.py; test_gpu.py runs it on a GPU


def triton_labels(logits, size, align_corners=False):
    return kernel.label_map_triton([x.to(DEVICE) for x in logits], size, align_corners).cpu()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_label_map_is_the_class_with_the_best_score(kind, views, align_corners):
    size = (4, PIXELS + 3)
    logits = [logits_of(kind, CLASSES + 5, 3 + i, 8 + 2 * i, seed=i) for i in range(views)]
    assert_best(triton_labels(logits, size, align_corners), reference_scores(logits, size, align_corners))


@pytest.mark.parametrize("classes", [1, 2, CLASSES, 2 * CLASSES + 1])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (2, 2 * PIXELS)])
def test_label_map_for_sizes_and_classes_around_the_block_size(size, classes):
    logits = [logits_of("noise", classes, 4, 6, seed=i) for i in range(2)]
    assert_best(triton_labels(logits, size), reference_scores(logits, size))


def test_probabilities_of_large_logits_are_accurate():
    """Two views prefer different classes by nearly the same probability; the logits of the first view are large."""
    difference = torch.rand(1, PIXELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.stack([difference, 0 * difference]) + torch.arange(600, 600 + PIXELS)
    first = first.float()
    second = (first - first[1]).flip(0) * (1 + 2e-5)
    scores = reference_scores([first.double(), second.double()], (1, PIXELS))
    labels = triton_labels([first, second], (1, PIXELS)).long()
    assert (scores.amax(0) - scores.gather(0, labels[None])[0]).max() < 5e-7


def test_first_of_equal_classes_wins():
    logits = torch.zeros(2 * CLASSES, 2, 3)
    logits[[3, CLASSES + 3]] = 1
    assert (triton_labels([logits], (4, 6)) == 3).all()
    assert (triton_labels([logits, logits], (4, 6)) == 3).all()


@pytest.fixture
def uncached():
    label_map._triton_kernel.cache_clear()
    yield label_map._triton_kernel
    label_map._triton_kernel.cache_clear()


def test_missing_triton_gives_one_warning(monkeypatch, caplog, uncached):
    monkeypatch.setitem(sys.modules, "mit_semseg.evaluation.label_map_triton", None)
    assert uncached(torch.device("cpu")) is None
    assert "without Triton" in caplog.text


def test_kernel_that_cannot_be_compiled_gives_one_warning(monkeypatch, caplog, uncached):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")

    monkeypatch.setattr("mit_semseg.evaluation.label_map_triton.label_map_triton", fail)
    assert uncached(torch.device("cpu")) is None
    assert "RuntimeError: Failed to find C compiler" in caplog.text


def test_kernel_is_used_after_it_ran_once(uncached):
    assert uncached(torch.device(DEVICE)) is kernel.label_map_triton
