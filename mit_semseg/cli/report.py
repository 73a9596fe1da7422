"""HTML report of an evaluation: metrics, IoU per class, most confused classes, worst and best images."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..evaluation.evaluator import Evaluation, ImageScore
from ..lib.utils import UTF8, atomic_write
from .plots import log_plot_errors, save_confusion, save_reliability

MAX_PAIRS = 20  # maximum number of class pairs in the table of confused classes
MAX_IMAGES = 12  # maximum number of worst images, and of best images, in the report

HEAD = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
th { cursor: pointer; background: #f6f6f6; position: sticky; top: 0; user-select: none; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
.swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid #888; margin-right: .5em; }
td { white-space: nowrap; }
.bar { display: inline-block; width: 8em; background: #eee; margin-left: .8em; vertical-align: middle; }
.bar i { display: block; height: .7em; background: #4a86c5; }
.absent { color: #999; }
dl { display: flex; flex-wrap: wrap; gap: .6em 2em; margin: 0; } dt { color: #555; } dd { margin: 0; font-size: 1.3em; }
figure { margin: 1em 0; } figure img { max-width: 100%; } figcaption { color: #555; overflow-wrap: anywhere; }
.panel { display: inline-grid; max-width: 100%; }
.columns { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column; }
.columns span { text-align: center; color: #555; } h1 { overflow-wrap: anywhere; }
@media (max-width: 600px) {
  body { font-size: 13px; padding: 0; margin: 1em .5em; } td, th { padding: .2em .3em; } .bar { display: none; }
  td:first-child, td.text { white-space: normal; overflow-wrap: anywhere; } th { position: static; }
}
"""
SCRIPT = """
for (const header of document.querySelectorAll("table.sortable th")) header.onclick = () => {
  const body = header.closest("table").tBodies[0], column = header.cellIndex;
  const descending = header.getAttribute("aria-sort") !== "descending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  [...body.rows].sort((a, b) => descending ? compare(b, a) : compare(a, b)).forEach(row => body.append(row));
};
"""


def confused_pairs(confusion: np.ndarray, limit: int = MAX_PAIRS) -> list[tuple[int, int]]:
    """Return at most `limit` pairs (label, wrong prediction), in descending order of the number of pixels.

    `confusion` (C, C) contains numbers of pixels, with labels in rows and predictions in columns.
    """
    wrong = confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))
    order = np.argsort(wrong, axis=None)[::-1][:limit]
    return [(int(a), int(b)) for a, b in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[a, b]]


def write_report(
    evaluation: Evaluation, folder: Path, title: str, panels: dict[str, str], doubtful: Sequence[str]
) -> None:
    """Write `report.html`, `confusion.png` and `calibration.png` to a folder.

    Args:
        evaluation: result with diagnostics.
        folder: output folder.
        title: title of the page.
        panels: image names -> paths of panels, relative to `folder`.
        doubtful: paths of the panels of the doubtful labels, relative to `folder`.
    """
    with log_plot_errors("confusion.png"):
        save_confusion(evaluation, folder / "confusion.png")
    with log_plot_errors("calibration.png"):
        save_reliability(evaluation.diagnostics.reliability, folder / "calibration.png")
    ranked = sorted((score for score in evaluation.scores if score.labelled), key=lambda s: (s.mean_iou, s.accuracy))
    body = (
        f"<h1>{escape(title)}</h1>"
        + _metrics(evaluation)
        + _classes(evaluation)
        + _confusions(evaluation)
        + _images("Worst", ranked[:MAX_IMAGES], panels)
        + _images("Best", ranked[::-1][:MAX_IMAGES], panels)
        + _doubtful(evaluation, doubtful)
        + _calibration(evaluation)
    )
    head = f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style>"
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}<script>{SCRIPT}</script></body></html>'
    with atomic_write(folder / "report.html") as partial:
        partial.write_text(page + "\n", **UTF8)


def _metrics(evaluation: Evaluation) -> str:
    s = evaluation.summary
    values = {
        f"mean IoU, all {len(s.iou)} classes": f"{s.mean_iou:.2%}",
        f"mean IoU, {int(s.present.sum())} classes present": f"{s.mean_iou_present:.2%}",
        "pixel accuracy": f"{s.pixel_accuracy:.2%}",
        "mean class accuracy": f"{s.mean_accuracy:.2%}",
        "images": f"{evaluation.images}",
        "images per second": f"{evaluation.images_per_second:.2f}",
    }
    pairs = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())
    warning = f"<p>{escape(evaluation.warning)}</p>" if evaluation.warning else ""
    html = f"<dl>{pairs}</dl>{warning}"
    if evaluation.skipped:
        lines = "".join(f"<li>{escape(message)}</li>" for message in evaluation.skipped)
        html += f"<h2>{len(evaluation.skipped)} images skipped</h2><p>Not included in the metrics:</p><ul>{lines}</ul>"
    return html


def _sortable(columns: Sequence[str], rows: Sequence[Sequence[tuple[object, str]]]) -> str:
    """Return an HTML table that can be sorted by clicking a column header. Each cell is (sort value, HTML)."""
    classes = [' class="text"' if isinstance(value, str) else "" for value, _ in rows[0]]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(columns, classes, strict=True))
    body = ""
    for row in rows:
        cells = zip(row, classes, strict=True)
        tags = (f'<td{kind} data-value="{escape(str(value))}">{html}</td>' for (value, html), kind in cells)
        body += f"<tr>{''.join(tags)}</tr>"
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _percent(value: float) -> tuple[float, str]:
    return value, f"{value:.2%}"


def _classes(evaluation: Evaluation) -> str:
    table, s, confusion = evaluation.table, evaluation.summary, evaluation.metric.confusion
    boundary = np.nan_to_num(evaluation.diagnostics.boundary_iou)
    total, rows = max(confusion.sum(), 1), []
    for index, name in enumerate(table.names):
        pixels, iou = confusion[index].sum(), float(s.iou[index])
        color = tuple(table.colors[index].tolist())
        css = "" if s.present[index] else ' class="absent"'
        short = f'<span{css} title="{escape(name)}">{escape(table.labels[index])}</span>'
        label = f'<span class="swatch" style="background: rgb{color}"></span>{short}'
        bar = f'{iou:.2%}<span class="bar"><i style="width: {iou:.1%}"></i></span>'
        recall = _percent(float(confusion[index, index] / max(pixels, 1)))
        rows.append(
            [(name, label), (iou, bar), _percent(float(boundary[index])), recall, _percent(float(pixels / total))]
        )
    note = (
        "Click a column header to sort. Boundary IoU counts only pixels near boundaries. Accuracy (recall) is the "
        "fraction of the class's labelled pixels that are predicted correctly. The names of classes without "
        "labelled pixels are gray."
    )
    return f"<h2>Classes</h2><p>{note}</p>" + _sortable(
        ("class", "IoU", "boundary IoU", "accuracy", "fraction of all pixels"), rows
    )


def _confusions(evaluation: Evaluation) -> str:
    confusion, rows = evaluation.metric.confusion, []
    for pair in confused_pairs(confusion):
        pixels = int(confusion[pair])
        names = [(evaluation.table.labels[i], escape(evaluation.table.labels[i])) for i in pair]
        rows.append([*names, (pixels, f"{pixels:,}"), _percent(float(pixels / confusion[pair[0]].sum()))])
    columns = "label", "prediction", "pixels", "fraction of the label's pixels"
    table = _sortable(columns, rows) if rows else "<p>No class was confused with another class.</p>"
    caption = "<figcaption>Confusion matrix: labels in rows, predictions in columns, normalized by row.</figcaption>"
    image = '<img src="confusion.png" alt="Confusion matrix">'
    return f"<h2>Most confused classes</h2>{table}<figure>{image}{caption}</figure>"


def _images(name: str, scores: Sequence[ImageScore], panels: dict[str, str]) -> str:
    html = f"<h2>{name} images</h2>"
    if scores and not panels:
        html += "<p>Set VAL.visualize True to show the images here.</p>"
    for score in scores:
        caption = f"{escape(score.name)}: mean IoU {score.mean_iou:.2%}, pixel accuracy {score.accuracy:.2%}"
        html += _figure(panels.get(score.name), ("image", "label", "prediction"), caption)
    return html


def _figure(path: str | None, columns: Sequence[str], caption: str) -> str:
    """Return a figure with a panel, or only its caption if `path` is None. `caption` is HTML."""
    panel = ""
    if path:
        image = f'<img loading="lazy" src="{quote(os.fsencode(path))}" alt="{caption}">'
        names = "".join(f"<span>{column}</span>" for column in columns)
        panel = f'<div class="panel"><div class="columns">{names}</div>{image}</div>'
    return f"<figure>{panel}<figcaption>{caption}</figcaption></figure>"


def _doubtful(evaluation: Evaluation, panels: Sequence[str]) -> str:
    html = (
        "<h2>Labels that look wrong</h2><p>Images with the lowest label quality, which is the soft minimum over the "
        "pixels of the probability of the given label. Pixels are red where this probability is low. Check these "
        "labels first; the network can also be wrong.</p>"
    )
    for entry, path in zip(evaluation.diagnostics.doubtful, panels, strict=True):
        caption = f"{escape(entry.name)}: label quality {entry.quality:.3f}"
        html += _figure(path, ("image", "label", "prediction", "doubtful pixels"), caption)
    return html


def _calibration(evaluation: Evaluation) -> str:
    error = evaluation.diagnostics.reliability.error
    caption = (
        "<figcaption>Accuracy of the pixels whose largest class probability (confidence) is in a bin. Bars below the "
        f"diagonal: the network is overconfident. Expected calibration error: {error:.2%}.</figcaption>"
    )
    return f'<h2>Calibration</h2><figure><img src="calibration.png" alt="Reliability diagram">{caption}</figure>'
