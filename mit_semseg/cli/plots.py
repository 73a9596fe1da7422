"""Plots: the curves of a training run, and the confusion matrix of an evaluation."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from ..evaluation.evaluator import Evaluation
from ..lib.utils import WriteError, atomic_write

logger = logging.getLogger(__name__)

MATRIX_CLASSES = 40  # most frequent classes in the confusion matrix
FONT = "DejaVu Sans"  # included in matplotlib; Latin, Greek, Cyrillic, Arabic


@contextmanager
def log_plot_errors(name: str) -> Iterator[None]:
    """Log errors other than a full disk: training must not fail because of a plot."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # of matplotlib, a font file, or the user's matplotlibrc
        logger.warning("%s cannot be drawn: %s: %s", name, type(error).__name__, error)


def save_curves(history: dict, path: Path) -> None:
    """Plot `train` (lists epoch, loss, acc) and, if it has any, `val` (epoch, mean_iou, acc) to a PNG file."""
    figure = _figure((11, 4))  # fixed margins: an automatic layout takes as long as the drawing
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.78, bottom=0.13, top=0.91, wspace=0.2)
    train, val = history["train"], history.get("val", {})
    left.plot(train["epoch"], train["loss"], color="tab:blue")
    left.set(title="Training loss", xlabel="epoch")
    curves = [(train, "acc", "-", "pixel accuracy, training", "tab:blue")]
    if val.get("epoch"):
        curves.append((val, "acc", "o-", "pixel accuracy, validation", "tab:orange"))
        curves.append((val, "mean_iou", "o-", "mean IoU, validation", "tab:green"))
    for points, key, style, label, color in curves:
        right.plot(points["epoch"], np.multiply(points[key], 100), style, label=label, color=color)
    right.set(title="Metrics", xlabel="epoch", ylabel="%", ylim=(0, 100))
    right.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def save_confusion(evaluation: Evaluation, path: Path) -> None:
    """Plot the row-normalized confusion matrix of the most frequent classes to a PNG file."""
    confusion = evaluation.metric.confusion
    shown = np.sort(np.argsort(-confusion.sum(1), kind="stable")[:MATRIX_CLASSES])
    fractions = confusion[np.ix_(shown, shown)] / np.maximum(confusion[shown].sum(1, keepdims=True), 1)
    names, fonts = _drawable([evaluation.table.labels[i] for i in shown])
    side = 2.5 + 0.28 * len(shown)
    figure = _figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, fontfamily=fonts)
    axes.set_yticks(range(len(names)), names, fontsize=8, fontfamily=fonts)
    subset = "" if len(shown) == len(confusion) else f" (the {len(shown)} most frequent of {len(confusion)} classes)"
    axes.set(xlabel="prediction", ylabel="label", title=f"Confusion matrix{subset}")
    figure.colorbar(image, shrink=0.8, label="fraction of the label's pixels")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def _figure(size: tuple[float, float], **options):
    """Create a figure of (width, height) inches that is rendered with Agg, without pyplot's global state."""
    try:
        import matplotlib
    except ValueError:  # MPLBACKEND names a backend that is not installed, e.g. that of a notebook server
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # partially imported
        with mock.patch.dict(os.environ):
            del os.environ["MPLBACKEND"]
            import matplotlib  # noqa: F401
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=size, **options)).figure


def _drawable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names and installed fonts that cover them (Chinese, ...); other characters become \\u9053 and the like."""
    from matplotlib import font_manager

    fonts = [FONT]
    missing = {ord(c) for name in names for c in name} - _code_points(font_manager.findfont(FONT))
    for font in font_manager.fontManager.ttflist if missing else ():
        if covered := missing & _code_points(font.fname):
            fonts.append(font.name)
            missing -= covered
        if not missing:
            break
    escapes = {code: chr(code).encode("ascii", "backslashreplace").decode() for code in missing}
    return [name.translate(escapes) for name in names], fonts


def _code_points(path: str) -> set[int]:
    """Return the code points that a font file covers; none if matplotlib cannot read it."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return set()
