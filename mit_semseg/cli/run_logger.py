"""Where the figures of a training run are shown: curves and panels as PNG, and TensorBoard."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..dataset import ClassTable
from ..lib.utils import UserError
from ..predict.visualize import result_panel, result_stems, save_png
from .plots import optional, save_curves

logger = logging.getLogger(__name__)

PICTURES = 4  # validation panels shown per validation


class RunLogger:
    """Writes `curves.png` after every epoch, and TensorBoard events if asked to.

    Args:
        folder: DIR of the run.
        table: class names and colours.
        tensorboard: write events to `folder`/tensorboard.
        pictures: of the validation, by their paths in the list: a panel of each is written to `folder`/vis/epoch_N at
            every validation.
        main: False leaves everything but the panels to another process.

    Raises:
        UserError: TensorBoard is asked for but not installed.
    """

    def __init__(
        self,
        folder: str,
        table: ClassTable,
        *,
        tensorboard: bool = False,
        pictures: Sequence[str] = (),
        main: bool = True,
    ):
        self.folder, self.table, self.main = Path(folder), table, main
        self._names = result_stems(pictures)
        self.writer, self._pictures, self._open, self._report = None, [], None, None
        if tensorboard and main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "TRAIN.tensorboard is on, but TensorBoard is not installed: pip install tensorboard"
                ) from None
            self._open = SummaryWriter

    def step(self, step: int, values: dict[str, float]) -> None:
        """Training figures at a step."""
        if self._writes():
            with self._optional():
                for name, value in values.items():
                    self.writer.add_scalar(f"train/{name}", value, step)

    def picture(self, epoch: int, item: dict, prediction: np.ndarray) -> None:
        """A validation result; TensorBoard gets the first few with the next `epoch`."""
        shown = self._writes() and len(self._pictures) < PICTURES
        panel = result_panel(item, prediction, self.table) if shown or self._names else None
        if shown:
            self._pictures.append(panel)
        if self._names:
            save_png(panel, self.folder / "vis" / f"epoch_{epoch}" / f"{self._names[item['info']]}.png")

    def epoch(self, epoch: int, history: dict, evaluation) -> None:
        """End of an epoch: curves, validation scores and pictures."""
        if not self.main:
            return
        with optional("curves.png"):
            save_curves(history, self.folder / "curves.png")
        if self._writes():
            with self._optional():
                if evaluation is not None:
                    self._write_scores(epoch, evaluation.summary)
                self.writer.flush()
        self._pictures = []

    def _writes(self) -> bool:
        """Whether there are events to be written. Their file is begun with the first: a run that starts anew has then
        removed those of the one before."""
        if self._open:
            begin, self._open = self._open, None
            with self._optional():
                self.writer = begin(str(self.folder / "tensorboard"))
        return self.writer is not None

    def _write_scores(self, epoch: int, summary) -> None:
        self.writer.add_scalar("val/mean_iou", summary.mean_iou, epoch)
        self.writer.add_scalar("val/pixel_accuracy", summary.pixel_accuracy, epoch)
        for name, iou, present in zip(self.table.names, summary.iou, summary.present, strict=True):
            if present:
                self.writer.add_scalar(f"val_iou/{name}", iou, epoch)
        for i, picture in enumerate(self._pictures):
            self.writer.add_image(f"val/{i}", np.asarray(picture), epoch, dataformats="HWC")

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Around everything that is written for TensorBoard: a full disk ends that, and not the run."""
        try:
            yield
        except OSError as error:
            logger.warning("TensorBoard's events cannot be written any more, the run goes on without: %s", error)
            self.writer = None

    def __enter__(self) -> "RunLogger":
        """Suppress the traceback of TensorBoard's writer thread on a full disk: the next write raises the same error,
        which is handled."""
        if self._open:
            self._report = threading.excepthook
            threading.excepthook = self._of_a_thread
        return self

    def __exit__(self, *_) -> None:
        """Finish the event file."""
        if self.writer:
            with self._optional():
                self.writer.close()
        if self._report:
            threading.excepthook = self._report

    def _of_a_thread(self, failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self._report(failed)
