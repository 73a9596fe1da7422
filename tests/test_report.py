"""The page of an evaluation says what the counts say, and nothing in a name becomes part of the page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mit_semseg.cli.report import confused_pairs, write_report
from mit_semseg.dataset import class_table
from mit_semseg.evaluation import SegmentationMetric
from mit_semseg.evaluation.evaluator import Evaluation, Score

NAMES = ["sky", "a <b> & 'c'", "road"]


def evaluation_of(confusion, names=NAMES):
    metric = SegmentationMetric(len(names))
    metric.confusion += np.asarray(confusion)
    scores = [Score(f"pictures/{i}<.jpg", i / 30, i / 20) for i in range(20)]
    return Evaluation(metric, 20, 4.0, class_table(names, len(names)), scores)


def test_confused_pairs_are_the_largest_wrong_counts():
    pairs = confused_pairs(np.array([[9, 1, 0], [6, 20, 4], [0, 0, 0]]))
    assert [(p.label, p.prediction, p.pixels) for p in pairs] == [(1, 0, 6), (1, 2, 4), (0, 1, 1)]
    assert [p.share for p in pairs] == pytest.approx([0.2, 4 / 30, 0.1])
    assert len(confused_pairs(np.ones((5, 5)), most=3)) == 3


def test_the_page(tmp_path):
    evaluation = evaluation_of([[9, 1, 0], [6, 20, 4], [0, 0, 0]])
    write_report(evaluation, tmp_path, "resnet & co", {"pictures/0<.jpg": "pictures/0<.png"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["confusion.png", "report.html"]
    text = (tmp_path / "report.html").read_text()
    opened, closed = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            closed.append(tag)

    Reader().feed(text)
    assert "b" not in opened  # of a class's name
    assert {tag: opened.count(tag) for tag in ("table", "tr", "td", "figure")} == {
        tag: closed.count(tag) for tag in ("table", "tr", "td", "figure")
    }
    for expected in ("<title>resnet &amp; co</title>", "56.25%", "a &lt;b&gt; &amp; &#x27;c&#x27;", "72.50%"):
        assert expected in text
    worst, best = text.index("Worst images"), text.index("Best images")
    assert worst < text.index("pictures/0&lt;.jpg", worst) < best
    assert text.index("pictures/19&lt;.jpg", best) < text.index("pictures/18&lt;.jpg", best)
    assert [text.count(f"<span>{column}</span>") for column in ("image", "label", "prediction")] == [1, 1, 1]
    assert "Most confused classes" in text
    assert re.findall(r'<img loading="lazy" src="([^"]+)"', text) == ["pictures/0%3C.png"]
    assert Image.open(tmp_path / "confusion.png").size[0] > 200


def test_a_picture_without_labels_is_none_of_the_worst(tmp_path):
    evaluation = evaluation_of([[9, 1], [6, 20]], ["a", "b"])
    scores = [Score("sound.png", 0.5, 0.5), Score("unlabelled.png", 0.0, 0.0, labelled=False)]
    write_report(replace(evaluation, scores=scores), tmp_path, "run", {})
    text = (tmp_path / "report.html").read_text()
    assert "sound.png" in text
    assert "unlabelled.png" not in text


def test_many_classes_and_perfect_scores(tmp_path):
    names = [f"class {i}" for i in range(60)]
    write_report(evaluation_of(np.diag(np.arange(60)), names), tmp_path, "run", {})
    text = (tmp_path / "report.html").read_text()
    assert "every labelled pixel is right" in text
    assert "VAL.visualize True" in text
    assert text.count('class="swatch"') == 60
