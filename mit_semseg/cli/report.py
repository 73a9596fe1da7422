"""The report of an evaluation: scores, a table of classes, the most confused ones, the worst and the best images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..dataset.classes import ONE_CLASS_WARNING
from ..evaluation.evaluator import Evaluation, Score
from ..lib.utils import TEXT, atomic_write
from .plots import optional, save_confusion

PAIRS = 20  # most confused pairs shown
PICTURES = 12  # worst and best pictures shown

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
.panel { display: inline-grid; max-width: 100%; } .columns { display: grid; grid-template-columns: repeat(3, 1fr); }
.columns span { text-align: center; color: #555; } h1 { overflow-wrap: anywhere; }
@media (max-width: 600px) {
  body { font-size: 13px; padding: 0; margin: 1em .5em; } td, th { padding: .2em .3em; } .bar { display: none; }
  td { white-space: normal; overflow-wrap: anywhere; } th { position: static; }
}
"""
SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)).forEach(row => body.append(row));
};
"""


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class that were taken for another.

    Attributes:
        label, prediction: class indices.
        pixels: how many.
        share: of the pixels labelled with the class, in 0..1.
    """

    label: int
    prediction: int
    pixels: int
    share: float


def confused_pairs(confusion: np.ndarray, most: int = PAIRS) -> list[Confusion]:
    """The pairs of classes with the most wrong pixels, largest first.

    Args:
        confusion: (C, C) pixels by label and prediction.
        most: how many pairs.
    """
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(wrong, axis=None)[::-1][:most]
    pairs = [np.unravel_index(i, wrong.shape) for i in order]
    return [
        Confusion(int(a), int(b), int(wrong[a, b]), float(wrong[a, b] / confusion[a].sum()))
        for a, b in pairs
        if wrong[a, b]
    ]


def write_report(evaluation: Evaluation, folder: Path, title: str, panels: dict[str, str]) -> None:
    """Write `report.html` and `confusion.png`.

    Args:
        evaluation: what is shown.
        folder: of the files.
        title: of the page.
        panels: for pictures that have one, by their names, the panel's path below the folder.
    """
    with optional("confusion.png"):
        save_confusion(evaluation, folder / "confusion.png")
    parts = [f"<h1>{escape(title)}</h1>", *_figures(evaluation), *_left_out(evaluation)]
    parts += [*_classes(evaluation), *_confusions(evaluation)]
    ranked = sorted(
        (score for score in evaluation.scores if score.labelled), key=lambda score: (score.mean_iou, score.accuracy)
    )
    for name, scores in (("Worst", ranked[:PICTURES]), ("Best", ranked[::-1][:PICTURES])):
        parts += _pictures(name, scores, panels)
    head = f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "".join([*parts, f"<script>{SCRIPT}</script>"])
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>'
    with atomic_write(folder / "report.html") as partial:
        partial.write_text(page + "\n", **TEXT)


def _figures(evaluation: Evaluation) -> list[str]:
    s = evaluation.summary
    scores = {
        f"mean IoU, all {len(s.iou)} classes": f"{s.mean_iou:.2%}",
        f"mean IoU, {int(s.present.sum())} classes present": f"{s.mean_iou_present:.2%}",
        "pixel accuracy": f"{s.pixel_accuracy:.2%}",
        "mean class accuracy": f"{s.mean_accuracy:.2%}",
        "images": f"{evaluation.images}",
        "images per second": f"{evaluation.images_per_second:.2f}",
    }
    pairs = (f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in scores.items())
    warning = f"<p>{escape(ONE_CLASS_WARNING.format(evaluation.only_class))}</p>" if evaluation.only_class else ""
    return [f"<dl>{''.join(pairs)}</dl>{warning}"]


def _left_out(evaluation: Evaluation) -> list[str]:
    if not evaluation.skipped:
        return []
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in evaluation.skipped)
    return [f"<h2>{len(evaluation.skipped)} left out</h2><p>Not included in the scores:</p><ul>{lines}</ul>"]


def _sortable(head: Sequence[str], rows: Sequence[Sequence[tuple[object, str]]]) -> str:
    """A table of cells (value to sort by, HTML); text is sorted as text and stands at the left."""
    kinds = [' class="text"' if rows and isinstance(value, str) else "" for value, _ in rows[0]] if rows else []
    top = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(head, kinds, strict=True)) if rows else ""
    lines = []
    for row in rows:
        cells = [
            f'<td{kind} data-value="{escape(str(value))}">{shown}</td>'
            for (value, shown), kind in zip(row, kinds, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _share(value: float) -> tuple[float, str]:
    return value, f"{value:.2%}"


def _classes(evaluation: Evaluation) -> list[str]:
    table, s, confusion = evaluation.table, evaluation.summary, evaluation.metric.confusion
    total, rows = max(confusion.sum(), 1), []
    for number, name in enumerate(table.names):
        own, iou = confusion[number].sum(), float(s.iou[number])
        color = tuple(int(v) for v in table.colors[number])
        kind = "" if s.present[number] else ' class="absent"'
        short = f'<span{kind} title="{escape(name)}">{escape(table.labels[number])}</span>'
        shown = f'<span class="swatch" style="background: rgb{color}"></span>{short}'
        bar = f'{iou:.2%}<span class="bar"><i style="width: {iou:.1%}"></i></span>'
        recall = _share(float(confusion[number, number] / max(own, 1)))
        rows.append([(name, shown), (iou, bar), recall, _share(float(own / total))])
    note = (
        "Click on a column's head to sort. Accuracy (recall): the part of a class's pixels that were predicted as it. "
        "Grey: not in the labels."
    )
    head = "class", "IoU", "accuracy", "share of all pixels"
    return ["<h2>Classes</h2>", f"<p>{note}</p>", _sortable(head, rows)]


def _confusions(evaluation: Evaluation) -> list[str]:
    names = evaluation.table.labels
    rows = [
        [
            (names[pair.label], escape(names[pair.label])),
            (names[pair.prediction], escape(names[pair.prediction])),
            (pair.pixels, f"{pair.pixels:,}"),
            _share(pair.share),
        ]
        for pair in confused_pairs(evaluation.metric.confusion)
    ]
    head = "label", "prediction", "pixels", "share of the label's pixels"
    table = _sortable(head, rows) if rows else "<p>None: every labelled pixel is right.</p>"
    caption = "<figcaption>Confusion matrix: labels in rows, predictions in columns, shares of the row.</figcaption>"
    image = '<img src="confusion.png" alt="Confusion matrix">'
    return ["<h2>Most confused classes</h2>", table, f"<figure>{image}{caption}</figure>"]


def _pictures(name: str, scores: Sequence[Score], panels: dict[str, str]) -> list[str]:
    parts = [f"<h2>{name} images</h2>"]
    if scores and not panels:
        parts.append("<p>With VAL.visualize True they are shown here.</p>")
    for score in scores:
        caption = f"{escape(score.name)}: mean IoU {score.mean_iou:.2%}, pixel accuracy {score.accuracy:.2%}"
        image = panels.get(score.name)
        columns = "".join(f"<span>{column}</span>" for column in ("image", "label", "prediction"))
        picture = f'<img loading="lazy" src="{quote(os.fsencode(image))}" alt="{caption}">' if image else ""
        shown = f'<div class="panel"><div class="columns">{columns}</div>{picture}</div>' if image else ""
        parts.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>")
    return parts
