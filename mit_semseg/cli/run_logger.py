"""Write the plots, validation panels and TensorBoard events of a training run."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from ..dataset import ClassTable
from ..evaluation.evaluator import Evaluation
from ..lib.utils import UserError
from ..predict.results import save_png, unique_stems
from ..predict.visualize import result_panel
from .plots import log_plot_errors, save_curves

logger = logging.getLogger(__name__)

TENSORBOARD_IMAGES = 4  # maximum number of panels per validation in TensorBoard


class RunLogger:
    """Writes `curves.png` after every epoch and, optionally, validation panels and TensorBoard events.

    Args:
        folder: DIR of the run.
        table: class names and colors.
        tensorboard: write events to `folder`/tensorboard.
        images: paths of all validation images, whose panels are written to `folder`/vis/epoch_N; empty for no panels.
        main: whether this is rank 0. Other ranks write only panels.
    """

    def __init__(self, folder: str, table: ClassTable, *, tensorboard: bool, images: Sequence[str], main: bool):
        self.folder, self.table, self.main = Path(folder), table, main
        self._stems = unique_stems(images)
        self._tensorboard, self._panels = tensorboard and main, []
        if self._tensorboard:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError:
                raise UserError("TRAIN.tensorboard True requires TensorBoard; run pip install tensorboard") from None

    def log_step(self, step: int, values: dict[str, float]) -> None:
        with self._stop_on_write_error():
            for name, value in values.items() if self._tensorboard else ():
                self._writer.add_scalar(f"train/{name}", value, step)

    def log_image(self, epoch: int, item: dict, prediction: np.ndarray) -> None:
        """Write the panel of a validation item (see `result_panel`); keep the first `TENSORBOARD_IMAGES` panels."""
        keep = self._tensorboard and len(self._panels) < TENSORBOARD_IMAGES
        panel = result_panel(item, prediction, self.table) if keep or self._stems else None
        if keep:
            self._panels.append(panel)
        if self._stems:
            save_png(panel, self.folder / "vis" / f"epoch_{epoch}" / f"{self._stems[item['info']]}.png")

    def log_epoch(self, epoch: int, history: dict, evaluation: Evaluation | None) -> None:
        """On rank 0, write `curves.png`, and write validation metrics and panels to TensorBoard."""
        if not self.main:
            return
        with log_plot_errors("curves.png"):
            save_curves(history, self.folder / "curves.png")
        if self._tensorboard:
            with self._stop_on_write_error():
                if evaluation is not None:
                    summary = evaluation.summary
                    self._writer.add_scalar("val/loss", evaluation.loss, epoch)
                    self._writer.add_scalar("val/mean_iou", summary.mean_iou, epoch)
                    self._writer.add_scalar("val/pixel_accuracy", summary.pixel_accuracy, epoch)
                    for i in np.flatnonzero(summary.present):
                        self._writer.add_scalar(f"val_iou/{self.table.names[i]}", summary.iou[i], epoch)
                    for i, panel in enumerate(self._panels):
                        self._writer.add_image(f"val/{i}", np.asarray(panel), epoch, dataformats="HWC")
                self._writer.flush()
        self._panels = []

    @cached_property
    def _writer(self):
        """`SummaryWriter`. It is created on first use, because a new run first deletes earlier events in `folder`."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"))

    @contextmanager
    def _stop_on_write_error(self) -> Iterator[None]:
        """Context that disables TensorBoard if events cannot be written, e.g. because the disk is full."""
        try:
            yield
        except OSError as error:
            logger.warning("TensorBoard events cannot be written (%s); training continues without TensorBoard", error)
            self._tensorboard = False

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *_) -> None:
        if self._tensorboard and "_writer" in vars(self):
            with self._stop_on_write_error():
                self._writer.close()
