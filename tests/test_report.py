"""The HTML report of an evaluation."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from mit_semseg.cli.report import confused_pairs, write_report
from mit_semseg.dataset import class_table
from mit_semseg.evaluation import SegmentationMetric
from mit_semseg.evaluation.calibration import UNIT
from mit_semseg.evaluation.diagnostics import Diagnostics, DoubtfulLabel
from mit_semseg.evaluation.evaluator import Evaluation, ImageScore


def make_evaluation(confusion, names):
    metric = SegmentationMetric(len(names))
    metric.confusion += np.asarray(confusion)
    scores = [ImageScore(f"images/{i}<.jpg", i / 30, i / 20) for i in range(20)]
    diagnostics = Diagnostics(len(names))
    diagnostics.boundary[:, 0] = 4, 4, 2  # boundary IoU 1 / 3
    diagnostics.calibration[:, -1] = 10, 9, 9.9 * UNIT
    diagnostics.doubtful = [DoubtfulLabel("images/7<.jpg", 0.125, np.zeros((4, 4)), np.zeros((1, 1)))]
    return Evaluation(metric, 20, 4.0, class_table(names, len(names)), scores, diagnostics=diagnostics)


def test_confused_pairs_have_the_largest_wrong_counts():
    assert confused_pairs(np.array([[9, 1, 0], [6, 20, 4], [0, 0, 0]])) == [(1, 0), (1, 2), (0, 1)]
    assert len(confused_pairs(np.ones((5, 5)), limit=3)) == 3


def test_report_has_metrics_and_ranked_images_and_escapes_names(tmp_path):
    evaluation = make_evaluation([[9, 1, 0], [6, 20, 4], [0, 0, 0]], ["sky", "a <b> & 'c'", "road"])
    write_report(evaluation, tmp_path, "resnet & co", {"images/0<.jpg": "images/0<.png"}, ["doubtful/1.png"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.png", "confusion.png", "report.html"]
    text = (tmp_path / "report.html").read_text()
    opened, closed = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: opened.append(tag)
    parser.handle_endtag = closed.append
    parser.feed(text)
    assert "b" not in opened
    assert all(opened.count(tag) == closed.count(tag) for tag in ("table", "tr", "td", "figure", "div"))
    for expected in ("<title>resnet &amp; co</title>", "a &lt;b&gt; &amp; &#x27;c&#x27;", "0.125"):
        assert expected in text
    assert {"56.25%", "72.50%", "13.33%", "33.33%", "9.00%"} <= set(re.findall(r"\d+\.\d\d%", text))
    worst, best = text.index("Worst images"), text.index("Best images")
    assert worst < text.index("images/0&lt;.jpg", worst) < best
    assert text.index("images/19&lt;.jpg", best) < text.index("images/18&lt;.jpg", best)
    assert re.findall(r'<img loading="lazy" src="([^"]+)"', text) == ["images/0%3C.png", "doubtful/1.png"]
    for name in ("confusion.png", "calibration.png"):
        assert Image.open(tmp_path / name).size[0] > 200


def test_unlabelled_images_are_not_ranked(tmp_path):
    scores = [ImageScore("labelled.png", 0.5, 0.5), ImageScore("unlabelled.png", 0.0, 0.0, labelled=False)]
    write_report(replace(make_evaluation([[9, 1], [6, 20]], ["a", "b"]), scores=scores), tmp_path, "run", {}, ["1.png"])
    text = (tmp_path / "report.html").read_text()
    assert "labelled.png" in text
    assert "unlabelled.png" not in text
    assert "VAL.visualize True" in text  # the report says how to add panels
