"""The kernel for GPUs gives the label maps of the straightforward way: in Triton's interpreter, and on a GPU if there
is one."""

import sys

import pytest
import torch
from test_upsampling import KINDS, assert_same, logits_of, straightforward

from mit_semseg.evaluation import label_map
from mit_semseg.evaluation.label_map import bilinear_neighbors

kernel = pytest.importorskip(
    "mit_semseg.evaluation.label_map_triton", reason="Triton comes with PyTorch for Linux only"
)
CLASSES, PIXELS = kernel.CLASSES, kernel.PIXELS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py turns the interpreter on


def fused(logits, size, align_corners=False):
    sides = [[bilinear_neighbors(n, m, align_corners) for n, m in zip(x.shape[1:], size, strict=True)] for x in logits]
    return kernel.label_map_triton([x.to(DEVICE) for x in logits], size, sides).cpu()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_label_maps(kind, views, align_corners):
    size = (4, PIXELS + 3)
    logits = [logits_of(kind, CLASSES + 5, 3 + i, 8 + 2 * i, seed=i) for i in range(views)]
    assert_same(fused(logits, size, align_corners), straightforward(logits, size, align_corners))


@pytest.mark.parametrize("classes", [1, 2, CLASSES, 2 * CLASSES + 1])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (2, 2 * PIXELS)])
def test_sizes_and_classes(size, classes):
    logits = [logits_of("noise", classes, 4, 6, seed=i) for i in range(2)]
    assert_same(fused(logits, size), straightforward(logits, size))


def test_of_equal_scores_the_first_wins():
    logits = torch.zeros(2 * CLASSES, 2, 3)
    logits[[3, CLASSES + 3]] = 1
    assert (fused([logits], (4, 6)) == 3).all()
    assert (fused([logits, logits], (4, 6)) == 3).all()


def test_without_triton_strips_do_it(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mit_semseg.evaluation.label_map_triton", None)
    label_map._fused.cache_clear()
    with caplog.at_level("INFO"):
        assert label_map._fused(torch.device("cpu")) is None
    assert "strip by strip" in caplog.text
    label_map._fused.cache_clear()


def test_where_the_kernel_cannot_be_compiled_strips_do_it(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")

    monkeypatch.setattr("mit_semseg.evaluation.label_map_triton.label_map_triton", fails)
    label_map._fused.cache_clear()
    assert label_map._fused(torch.device("cpu")) is None
    assert "strip by strip, without Triton's kernel (RuntimeError: Failed to find C compiler" in caplog.text
    label_map._fused.cache_clear()


def test_the_kernel_is_tried_before_it_is_taken():
    label_map._fused.cache_clear()
    assert (
        label_map._fused(torch.device(DEVICE)) is sys.modules["mit_semseg.evaluation.label_map_triton"].label_map_triton
    )
    label_map._fused.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_large_picture_takes_little_memory():
    logits = [torch.randn(150, 250, 375, device="cuda") for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels = label_map.label_map_from_logits(logits, (4000, 6000))
    assert torch.cuda.max_memory_allocated() - before < 2**29
    assert labels.shape == (4000, 6000)
