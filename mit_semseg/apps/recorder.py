"""Where the figures of a training run are shown: curves as a PNG, and TensorBoard."""

from pathlib import Path

import numpy as np

from ..dataset import ClassTable
from ..lib.utils import UserError
from .visualize import result_panel, save_curves

PICTURES = 4  # validation panels shown per validation


class RunRecorder:
    """Writes `curves.png` after every epoch, and TensorBoard events if asked to.

    Args:
        folder: DIR of the run.
        table: class names and colours.
        tensorboard: write events to `folder`/tensorboard.

    Raises:
        UserError: TensorBoard is asked for but not installed.
    """

    def __init__(self, folder: str, table: ClassTable, *, tensorboard: bool = False):
        self.folder, self.table = Path(folder), table
        self.writer, self._pictures = None, []
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "TRAIN.tensorboard is on, but TensorBoard is not installed: pip install tensorboard"
                ) from None
            self.writer = SummaryWriter(str(self.folder / "tensorboard"))

    def step(self, step: int, values: dict[str, float]) -> None:
        """Training figures at a step."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def picture(self, item: dict, prediction: np.ndarray) -> None:
        """A validation result; the first few are kept for the next `epoch`."""
        if self.writer and len(self._pictures) < PICTURES:
            self._pictures.append(result_panel(item, prediction, self.table))

    def epoch(self, epoch: int, history: dict, evaluation) -> None:
        """End of an epoch: curves, validation scores and pictures."""
        save_curves(history, self.folder / "curves.png")
        if self.writer and evaluation is not None:
            summary = evaluation.summary
            self.writer.add_scalar("val/mean_iou", summary.mean_iou, epoch)
            self.writer.add_scalar("val/pixel_accuracy", summary.pixel_accuracy, epoch)
            for name, iou, present in zip(self.table.names, summary.iou, summary.present, strict=True):
                if present:
                    self.writer.add_scalar(f"val_iou/{name}", iou, epoch)
            for i, picture in enumerate(self._pictures):
                self.writer.add_image(f"val/{i}", np.asarray(picture), epoch, dataformats="HWC")
        self._pictures = []
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self.writer:
            self.writer.close()
