"""Pictures that are drawn, and the names of results."""

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from mit_semseg.cli.plots import save_curves
from mit_semseg.dataset import class_table
from mit_semseg.predict.visualize import ENDINGS, class_fractions, colorEncode, overlay, panel, result_stems


def test_names_of_results_never_meet():
    names = ["a.jpg", "a_overlay.jpg", "b.jpg", "x/b.jpg", "x/c.jpg", "x/c.png", "../x/d.jpg", "x/d.jpg", "/x/e.jpg"]
    stems = result_stems(names)
    written = [f"{stem}{ending}" for stem in stems.values() for ending in ENDINGS]
    assert len(set(written)) == len(written)
    assert str(stems["b.jpg"]) == "b"
    assert str(stems["x/c.png"]) == "x/c.png"
    assert not any(stem.is_absolute() or ".." in stem.parts for stem in stems.values())


NAME = st.from_regex(r"(x/|X/|\.\./)?[abA](\.jpg|\.png|\.PNG|_overlay|_2){0,3}", fullmatch=True)


@hypothesis.given(st.lists(NAME, unique=True, max_size=12))
def test_names_of_any_results_never_meet(names):
    """Nor on disks that take capital letters for small ones."""
    stems = result_stems(names)
    written = [f"{stem}{ending}".casefold() for stem in stems.values() for ending in ENDINGS]
    assert len(set(written)) == len(written)


def test_panel_overlay_and_shares():
    table = class_table("", 3)
    image, label = np.full((60, 80, 3), 90, np.uint8), np.zeros((60, 80), np.int64)
    label[:15], label[-15:] = 2, -1
    assert class_fractions(label, table) == [
        {"class": "class 1", "index": 0, "share": 0.5, "color": table.colors[0].tolist()},
        {"class": "class 3", "index": 2, "share": 0.25, "color": table.colors[2].tolist()},
    ]
    colored = colorEncode(label, table.colors)
    assert colored[0, 0].tolist() == table.colors[2].tolist()
    assert colored[-1, 0].tolist() == [0, 0, 0]
    assert panel([image, colored]).size == (166, 60)
    drawn = overlay(image, label, table)
    assert drawn.height == 60
    assert drawn.width > 80
    overlay(image, np.full((60, 80), -1), table)  # nothing to name


def test_curves(tmp_path):
    points = {"epoch": [0.5, 1.0], "loss": [2.0, 1.0], "acc": [0.3, 0.6]}
    save_curves({"train": points, "val": {"epoch": [1], "mean_iou": [0.4], "acc": [0.6]}}, tmp_path / "c.png")
    save_curves({"train": points}, tmp_path / "d.png")  # a history of the original
    assert Image.open(tmp_path / "c.png").size == (1210, 440)
