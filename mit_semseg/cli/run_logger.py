"""Write the plots and validation panels of a training run, and pass its metrics to an experiment tracker."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..dataset import ClassTable
from ..evaluation.evaluator import Evaluation
from ..lib.utils import UTF8, UserError, atomic_write
from ..predict.results import save_png, unique_stems
from ..predict.visualize import result_panel
from .plots import log_plot_errors, save_curves
from .trackers import TRACKERS

logger = logging.getLogger(__name__)

TRACKED_IMAGES = 4  # maximum number of panels per validation that are passed to the tracker


class RunLogger:
    """Writes `curves.png` after every epoch, and optionally validation panels; passes metrics to a tracker.

    Args:
        folder: DIR of the run.
        table: class names and colors.
        logger: a key of `TRACKERS`, or 'none'.
        options: names and values of all options.
        images: paths of all validation images, whose panels are written to `folder`/vis/epoch_N; empty for no panels.
        main: whether this is rank 0. Other ranks write only panels.
        resumed: continue the run of the tracker that an earlier training in `folder` has started.

    Raises:
        UserError: the tracker is not installed.
    """

    def __init__(
        self,
        folder: str,
        table: ClassTable,
        *,
        logger: str,
        options: Mapping[str, object],
        images: Sequence[str],
        main: bool,
        resumed: bool,
    ):
        self.resumed, self.folder, self.table, self.options, self.main = resumed, Path(folder), table, options, main
        self._stems, self._panels = unique_stems(images), []
        self._tracker_class = TRACKERS.get(logger) if main else None
        if self._tracker_class and not find_spec(self._tracker_class.package):
            package = self._tracker_class.package
            raise UserError(f"TRAIN.logger {logger} needs the package {package}; run pip install {package}")

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        with self._stop_on_error():
            if self._tracker_class:
                self._tracker.log({f"train/{name}": value for name, value in values.items()}, step)

    def log_image(self, epoch: int, item: dict, prediction: np.ndarray) -> None:
        """Write the panel of a validation item (see `result_panel`); keep the first `TRACKED_IMAGES` panels."""
        keep = self._tracker_class and len(self._panels) < TRACKED_IMAGES
        panel = result_panel(item, prediction, self.table) if keep or self._stems else None
        if keep:
            self._panels.append(panel)
        if self._stems:
            save_png(panel, self.folder / "vis" / f"epoch_{epoch}" / f"{self._stems[item['info']]}.png")

    def log_epoch(self, step: int, history: dict, evaluation: Evaluation | None) -> None:
        """On rank 0, write `curves.png`, and pass validation metrics and panels to the tracker."""
        if not self.main:
            return
        with log_plot_errors("curves.png"):
            save_curves(history, self.folder / "curves.png")
        with self._stop_on_error():
            if self._tracker_class and evaluation is not None:
                s = evaluation.summary
                values = {"loss": evaluation.loss, "mean_iou": s.mean_iou, "pixel_accuracy": s.pixel_accuracy}
                values = {f"val/{name}": value for name, value in values.items()}
                ious = {f"val_iou/{self.table.labels[i]}": float(s.iou[i]) for i in np.flatnonzero(s.present)}
                self._tracker.log(values | ious, step)
                self._tracker.log_images({f"val/{i}": panel for i, panel in enumerate(self._panels)}, step)
        self._panels = []

    @cached_property
    def _tracker(self):
        """The tracker. It is created on first use, because a new run first deletes earlier files in `folder`.

        `logger_run.json` contains its run, which a resumed training continues.
        """
        path, name = self.folder / "logger_run.json", self._tracker_class.package
        stored = json.loads(path.read_text(**UTF8)) if self.resumed and path.is_file() else {}
        tracker = self._tracker_class(self.folder, self.options, stored.get(name, ""))
        if tracker.run:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(stored | {name: tracker.run}), **UTF8)
        return tracker

    @contextmanager
    def _stop_on_error(self) -> Iterator[None]:
        """Context that disables the tracker if it fails, e.g. because the disk is full or a server is not reachable."""
        try:
            yield
        except Exception as error:
            title = self._tracker_class.title
            logger.warning("%s failed (%s: %s); training continues without it", title, type(error).__name__, error)
            self._tracker_class = None

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_) -> None:
        if self._tracker_class and "_tracker" in vars(self):
            with self._stop_on_error():
                self._tracker.close()
