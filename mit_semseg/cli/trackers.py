"""Experiment trackers, which store metrics, options and images of a run: see TRAIN.logger.

Each class has the same methods as `TensorBoard`. `run` identifies the run to continue; '' starts a new run.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

PROJECT = "mit_semseg"  # name of the project or experiment, unless an environment variable of the tracker sets it


class TensorBoard:
    """Writes event files to `folder`/tensorboard."""

    title, package = "TensorBoard", "tensorboard"

    def __init__(self, folder: Path, options: Mapping[str, object], run: str):
        from torch.utils.tensorboard import SummaryWriter

        self.run = ""  # event files in the same folder belong to one run
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("options", "".join(f"    {key}: {value}\n" for key, value in options.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Store scalars; `step` is the number of completed training steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Store RGB images."""
        for name, image in images.items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logs to Weights & Biases; WANDB_MODE=offline writes to `folder`/wandb only."""

    title, package = "Weights & Biases", "wandb"

    def __init__(self, folder: Path, options: Mapping[str, object], run: str):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=dict(options),
            id=run or None,
            resume="allow" if run else None,
            settings=wandb.Settings(console="off"),
        )
        self.run, self._image = self._run.id, wandb.Image

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        self._run.log({name: self._image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Logs to Trackio, which stores runs in TRACKIO_DIR or in the Hugging Face cache."""

    title, package = "Trackio", "trackio"

    def __init__(self, folder: Path, options: Mapping[str, object], run: str):
        import trackio

        self._trackio = trackio
        resume = {"name": run, "resume": "must"} if run else {"resume": "never"}
        config = {key: value if isinstance(value, (int, float)) else str(value) for key, value in options.items()}
        self.run = trackio.init(PROJECT, config=config, **resume).name

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        self._trackio.log({name: self._trackio.Image(image) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class MLflow:
    """Logs to the MLflow server or folder in MLFLOW_TRACKING_URI."""

    title, package = "MLflow", "mlflow"

    def __init__(self, folder: Path, options: Mapping[str, object], run: str):
        import mlflow

        self._mlflow = mlflow
        if not run and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        self.run = mlflow.start_run(run_id=run or None, run_name=folder.name).info.run_id
        if not run:
            mlflow.log_params(options)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in values.items()}, step=step)

    def log_images(self, images: Mapping[str, Image.Image], step: int) -> None:
        for name, image in images.items():
            self._mlflow.log_image(image, key=_mlflow_name(name), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _mlflow_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in names of metrics."""
    return re.sub(r"[^\w .:/-]", "_", name)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}
