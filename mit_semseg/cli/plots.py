"""Plots of training curves and confusion matrices. pyplot is not imported, because it would select a backend."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..evaluation.calibration import Reliability
from ..evaluation.evaluator import Evaluation
from ..lib.utils import WriteError, atomic_write

logger = logging.getLogger(__name__)

MATRIX_CLASSES = 40  # maximum number of classes in the confusion matrix plot
FONT = "DejaVu Sans"  # included in matplotlib; contains Latin, Greek, Cyrillic and Arabic letters


@contextmanager
def log_plot_errors(name: str) -> Iterator[None]:
    """Context that logs errors of the plot `name`, so that training continues. Only a `WriteError` is raised."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # warns of a character missing in all installed fonts
            yield
    except WriteError:
        raise
    except Exception as error:  # caused by matplotlib, a font file, or the user's matplotlibrc
        logger.warning("%s cannot be drawn: %s: %s", name, type(error).__name__, error)


def save_curves(history: dict, path: Path) -> None:
    """Plot the curves of `checkpoint.new_history` to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))  # margins are fixed, because an automatic layout would double the time
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.78, bottom=0.13, top=0.91, wspace=0.2)
    train, val = history["train"], history.get("val", {})
    left.plot(train["epoch"], train["loss"], color="tab:blue", label="training")
    if val.get("loss"):
        left.plot(val["epoch"], val["loss"], "o-", color="tab:orange", label="validation")
        left.legend(loc="upper right", fontsize="small")
    left.set(title="Loss", xlabel="epoch")
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
    """Plot the row-normalized confusion matrix of the `MATRIX_CLASSES` most frequent classes to a PNG file."""
    from matplotlib.figure import Figure

    confusion = evaluation.metric.confusion
    shown = np.sort(np.argsort(-confusion.sum(1), kind="stable")[:MATRIX_CLASSES])
    fractions = confusion[np.ix_(shown, shown)] / np.maximum(confusion[shown].sum(1, keepdims=True), 1)
    names = [evaluation.table.labels[i].replace("$", r"\$") for i in shown]  # `$` would start a formula
    fonts = _find_fonts("".join(names))
    side = 2.5 + 0.28 * len(shown)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, fontfamily=fonts)
    axes.set_yticks(range(len(names)), names, fontsize=8, fontfamily=fonts)
    subset = "" if len(shown) == len(confusion) else f" (the {len(shown)} most frequent of {len(confusion)} classes)"
    axes.set(xlabel="prediction", ylabel="label", title=f"Confusion matrix{subset}")
    figure.colorbar(image, shrink=0.8, label="fraction of the label's pixels")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def save_reliability(reliability: Reliability, path: Path) -> None:
    """Plot a reliability diagram to a PNG file: accuracy and fraction of the pixels in every bin of confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    edges = np.linspace(0, 1, len(reliability.pixels) + 1)
    style = {"width": np.diff(edges), "align": "edge", "edgecolor": "white"}
    top.bar(edges[:-1], np.nan_to_num(reliability.accuracy), color="tab:blue", label="accuracy", **style)
    top.plot([0, 1], [0, 1], "--", color="gray", label="perfect calibration")
    top.set(title=f"Expected calibration error {reliability.error:.2%}", ylabel="accuracy", ylim=(0, 1))
    top.legend(loc="upper left", fontsize="small")
    fractions = reliability.pixels / max(reliability.pixels.sum(), 1)
    bottom.bar(edges[:-1], fractions, color="tab:orange", **style)
    bottom.set(xlabel="confidence", ylabel="fraction of pixels", xlim=(0, 1), ylim=(0, 1))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def _find_fonts(text: str) -> list[str]:
    """Return `FONT` and the names of other installed fonts for the characters of `text` that `FONT` lacks."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    fonts, missing = [FONT], set(map(ord, text))
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name != FONT, "Last Resort" in font.name)):
        if missing and (covered := missing & FT2Font(font.fname).get_charmap().keys()):
            fonts.append(font.name)
            missing -= covered
    return fonts
