"""Rendered results, their file names, and training curves."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from mit_semseg.cli.plots import save_curves
from mit_semseg.dataset import class_table
from mit_semseg.predict.results import SUFFIXES, unique_stems
from mit_semseg.predict.visualize import class_fractions, colorEncode, overlay, panel

IMAGE_NAME = st.from_regex(r"(x/|X/|\.\./)?[abA](\.jpg|\.png|\.PNG|_overlay|_2){0,3}", fullmatch=True)


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["a.jpg", "x/a.jpg"], ["a", "x/a"]),
        (["a.jpg", "a.png", "A.jpeg"], ["a.jpg", "a.png", "A.jpeg"]),
        (["a.jpg", "a_overlay.jpg"], ["a", "a_overlay.jpg"]),
        (["../a.jpg", "/b/c.jpg"], ["_parent/a", "b/c"]),
    ],
)
def test_extension_is_kept_only_if_needed(names, stems):
    assert [str(stem) for stem in unique_stems(names).values()] == stems


@hypothesis.given(st.lists(IMAGE_NAME, unique=True, max_size=12))
def test_results_never_share_a_file_name(names):
    """File names also differ on file systems that ignore case."""
    stems = unique_stems(names)
    files = [f"{stem}{suffix}".casefold() for stem in stems.values() for suffix in SUFFIXES]
    assert len(set(files)) == len(files)
    assert not any(stem.is_absolute() or ".." in stem.parts for stem in stems.values())


def test_panel_overlay_and_class_fractions():
    table = class_table("", 3)
    image, label = np.full((60, 80, 3), 90, np.uint8), np.zeros((60, 80), np.int64)
    label[:15], label[-15:] = 2, -1
    assert class_fractions(label, table) == [
        {"class": "class 1", "index": 0, "fraction": 0.5, "color": table.colors[0].tolist()},
        {"class": "class 3", "index": 2, "fraction": 0.25, "color": table.colors[2].tolist()},
    ]
    colored = colorEncode(label, table.colors)
    assert colored[0, 0].tolist() == table.colors[2].tolist()
    assert colored[-1, 0].tolist() == [0, 0, 0]
    assert panel([image, colored]).size == (166, 60)
    assert overlay(image, label, table).width > 80
    overlay(image, np.full((60, 80), -1), table)  # the legend is empty


def test_curves_are_plotted_with_and_without_validation(tmp_path):
    points = {"epoch": [0.5, 1.0], "loss": [2.0, 1.0], "acc": [0.3, 0.6]}
    save_curves({"train": points, "val": {"epoch": [1], "mean_iou": [0.4], "acc": [0.6]}}, tmp_path / "c.png")
    save_curves({"train": points}, tmp_path / "d.png")
    assert Image.open(tmp_path / "c.png").size == Image.open(tmp_path / "d.png").size == (1210, 440)
