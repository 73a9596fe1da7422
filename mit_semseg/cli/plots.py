"""Diagrams: the curves of a training run, and the confusion matrix of an evaluation."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from ..evaluation.evaluator import Evaluation
from ..lib.utils import WriteError, atomic_write

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MATRIX_CLASSES = 40  # most frequent classes shown in the confusion matrix
FONT = "DejaVu Sans"  # comes with matplotlib; Latin, Greek, Cyrillic, Arabic


@contextmanager
def optional(name: str) -> Iterator[None]:
    """Log errors of a diagram instead of raising them: a run must not end because of a plot.

    Raises:
        WriteError: the disk is full.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # of matplotlib, a font file, or the user's matplotlib settings
        logger.warning("%s cannot be drawn: %s: %s", name, type(error).__name__, error)


def save_curves(history: dict, path: Path) -> None:
    """Loss, accuracy and validation scores against epochs as a PNG.

    Args:
        history: `train` with lists epoch, loss, acc; optionally `val` with epoch, mean_iou, acc.
        path: of the PNG.
    """
    figure = _new_figure((11, 4))  # fixed margins: an automatic layout takes as long as the drawing
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.78, bottom=0.13, top=0.91, wspace=0.2)
    train, val = history["train"], history.get("val", {})
    left.plot(train["epoch"], train["loss"], color="tab:blue")
    left.set(title="Training loss", xlabel="epoch")
    right.plot(train["epoch"], np.multiply(train["acc"], 100), label="pixel accuracy, training", color="tab:blue")
    if val.get("epoch"):
        right.plot(
            val["epoch"], np.multiply(val["acc"], 100), "o-", label="pixel accuracy, validation", color="tab:orange"
        )
        right.plot(
            val["epoch"], np.multiply(val["mean_iou"], 100), "o-", label="mean IoU, validation", color="tab:green"
        )
    right.set(title="Scores", xlabel="epoch", ylabel="%", ylim=(0, 100))
    right.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path, dpi=110)


def save_confusion(evaluation: Evaluation, path: Path) -> None:
    """Save the row-normalized confusion matrix of the most frequent classes as a PNG."""
    confusion = evaluation.metric.confusion
    chosen = np.sort(np.argsort(-confusion.sum(1), kind="stable")[:MATRIX_CLASSES])
    shares = confusion[np.ix_(chosen, chosen)] / np.maximum(confusion[chosen].sum(1, keepdims=True), 1)
    names, fonts = _writable([evaluation.table.labels[i] for i in chosen])
    side = 2.5 + 0.28 * len(chosen)
    figure = _new_figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, fontfamily=fonts)
    axes.set_yticks(range(len(names)), names, fontsize=8, fontfamily=fonts)
    left = "" if len(chosen) == len(confusion) else f" (the {len(chosen)} most frequent of {len(confusion)} classes)"
    axes.set(xlabel="prediction", ylabel="label", title=f"Confusion{left}")
    figure.colorbar(image, shrink=0.8, label="share of the label's pixels")
    _save(figure, path, dpi=100)


def _new_figure(size: tuple[float, float], **options) -> "Figure":
    """An empty figure of (width, height) inches that renders with Agg, whatever backend is configured."""
    try:
        import matplotlib
    except ValueError:  # MPLBACKEND names a backend that is not installed, e.g. that of a notebook server
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]  # partially imported
        with mock.patch.dict(os.environ):
            del os.environ["MPLBACKEND"]
            import matplotlib  # noqa: F401
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=size, **options)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path, dpi: int) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)


def _writable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and the font families that render them.

    Characters that the default font lacks (Chinese, Japanese, Korean, ...) are looked up in the fonts of the system;
    characters found in no font are replaced by escapes such as \\u9053.
    """
    from matplotlib import font_manager

    fonts = [FONT]
    missing = {ord(c) for name in names for c in name} - _letters(font_manager.findfont(FONT))
    for font in font_manager.fontManager.ttflist if missing else ():
        if found := missing & _letters(font.fname):
            fonts.append(font.name)
            missing -= found
        if not missing:
            break
    escaped = {code: chr(code).encode("ascii", "backslashreplace").decode() for code in missing}
    return [name.translate(escaped) for name in names], fonts


def _letters(path: str) -> set[int]:
    """Code points covered by a font file."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # removed, or in a format that matplotlib does not read
        return set()
