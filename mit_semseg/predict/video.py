"""Segmenting videos and cameras: every frame tinted with the colours of its classes."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..dataset.layouts import VIDEO_ENDINGS
from ..lib import opencv as cv2
from ..lib.utils import UserError, WriteError, atomic_write, progress_bar
from .segmenter import Segmenter

logger = logging.getLogger(__name__)

CODEC = "mp4v"  # MPEG-4, which OpenCV writes without further libraries
USUAL_RATE = 25.0  # frames per second, where a camera does not say


class VideoError(UserError, RuntimeError):
    """A video or camera that cannot be read or written; the message names it."""


@dataclass(frozen=True)
class Written:
    """What became of a video.

    Attributes:
        path: of the new one.
        frames: written.
        interruption: that ended it before its end.
    """

    path: Path
    frames: int
    interruption: KeyboardInterrupt | None = None


def is_video(given: str) -> bool:
    """Whether `--imgs` names a video file or a camera (a number, unless a file or folder has that name)."""
    return not Path(given).is_dir() and (_is_camera(given) or Path(given).suffix.lower() in VIDEO_ENDINGS)


def _is_camera(given: str) -> bool:
    return re.fullmatch("[0-9]{1,4}", given) is not None and not Path(given).exists()


def output_path(given: str, folder: Path) -> Path:
    """Where the segmented video goes."""
    stem = f"camera_{given}" if _is_camera(given) else Path(given).stem
    return folder / f"{stem}_segmented.mp4"


def segment_video(
    segmenter: Segmenter,
    given: str,
    path: Path,
    *,
    smoothing: float = 0.0,
    alpha: float = 0.5,
    most: int | None = None,
    progress: bool = True,
) -> Written:
    """Write a video with the frames tinted by class: the number of frames, their size and the duration stay the same.

    Odd sides are padded by one pixel. The output has a constant frame rate. After an interruption it contains the
    frames segmented so far.

    Args:
        given: a video file, or the number of a camera, which is recorded until interrupted.
        path: of the new video; it appears when it is complete or interrupted.
        smoothing: share of the previous frames in a frame's scores, 0 (none) to below 1.
        alpha: weight of the colours.
        most: stop after so many frames; None takes all.
        progress: show a progress bar (on a terminal).

    Raises:
        VideoError: not readable as a video, or nothing can be written.
        WriteError: the disk is full.
        KeyboardInterrupt: before the first frame.
    """
    interruption, count = None, 0
    with _opened(given) as source:
        frames = _Frames(source, given, most, progress)
        with atomic_write(path) as partial:
            # OpenCV chooses the container by the ending.
            own = partial.with_name(partial.name + path.suffix)
            writer = _Writer(own, frames.size, frames.rate)
            try:
                if not writer.opened:
                    raise VideoError(f"{path}: OpenCV cannot write a video there ({CODEC}, {frames.size})")
                with progress_bar(total=frames.total, desc="segmenting", unit="frame", shown=progress) as bar:
                    for result in segmenter.frames(frames, smoothing=smoothing):
                        writer.write(np.asarray(result.overlay(alpha, legend=False)))
                        count += 1
                        bar.update()
            except KeyboardInterrupt as caught:
                interruption = caught
                if not count:
                    raise
            finally:
                writer.release()
                if count and _holds(own, count):
                    own.replace(partial)
                own.unlink(missing_ok=True)
            if not count:
                raise VideoError(f"{given}: not a single frame could be read")
            if not partial.exists():  # OpenCV does not say so
                raise WriteError(f"{path} cannot be written to its end: is the disk full?")
    return Written(path, count, interruption)


@contextmanager
def _opened(given: str) -> Iterator["cv2.VideoCapture"]:
    """Open a video file or camera.

    Raises:
        VideoError: it cannot be opened.
    """
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error below replaces OpenCV's output
    try:
        source = cv2.VideoCapture(int(given) if _is_camera(given) else given)
    finally:
        cv2.utils.logging.setLogLevel(level)
    try:
        if not source.isOpened() or not all(_size(source)):
            if _is_camera(given):
                raise VideoError(f"camera {given}: cannot be opened, and there is no file or folder of that name")
            raise VideoError(f"{given}: cannot be opened as a video (damaged, or missing?)")
        yield source
    finally:
        source.release()


def _size(source: "cv2.VideoCapture") -> tuple[int, int]:
    """(width, height)."""
    return int(source.get(cv2.CAP_PROP_FRAME_WIDTH)), int(source.get(cv2.CAP_PROP_FRAME_HEIGHT))


class _Writer:
    """A new video of (H, W, 3) uint8 RGB frames.

    Args:
        path: of the file.
        size: (width, height); odd sides, which the codec does not take, get one more, and nothing is cut.
        rate: frames per second, of which the codec knows no more than 65,535 parts.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float):
        self._right, self._below = size[0] % 2, size[1] % 2
        size = size[0] + self._right, size[1] + self._below
        rate = rate if rate <= 65 else round(rate, 1)
        self._video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODEC), rate, size)
        self.opened, self.release = self._video.isOpened(), self._video.release

    def write(self, frame: np.ndarray) -> None:
        """Add a frame."""
        frame = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        self._video.write(cv2.copyMakeBorder(frame, 0, self._below, 0, self._right, cv2.BORDER_REPLICATE))


def _holds(path: Path, count: int) -> bool:
    """Whether a file is a video of so many frames."""
    video = cv2.VideoCapture(str(path))
    try:
        return video.isOpened() and int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == count
    finally:
        video.release()


class _Frames(Iterable):
    """The frames of a video, (H, W, 3) uint8 RGB, until it ends.

    Args:
        source: opened.
        given: the video file, or the number of a camera.
        most: end after so many; None takes all.
        progress: show a progress bar while the times of the frames are read.
    """

    def __init__(self, source: "cv2.VideoCapture", given: str, most: int | None, progress: bool):
        self.source, self.size, self._most = source, _size(source), most
        # Headers can state a wrong count and rate, and the rate can vary: use the timestamps of the frames.
        times = [] if _is_camera(given) else _times(given, most, progress)
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0
        self.rate = next((r for r in (rate, source.get(cv2.CAP_PROP_FPS)) if 0 < r < 1000), USUAL_RATE)
        self.total = len(times) or most  # for the progress bar
        claimed = int(source.get(cv2.CAP_PROP_FRAME_COUNT))
        if times and len(times) != (min(claimed, most) if most else claimed) and claimed > 0:
            logger.warning("%s: %d frames can be decoded, its header says %d", given, len(times), claimed)

    def __iter__(self) -> Iterator[np.ndarray]:
        number = 0
        while number != self._most:
            there, frame = self.source.read()
            if not there:
                return
            if frame.shape[1::-1] != self.size:  # the size can change within a stream
                frame = cv2.resize(frame, self.size, interpolation=cv2.INTER_AREA)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            number += 1


def _times(path: str, most: int | None, progress: bool) -> list[float]:
    """Timestamps in seconds of all frames of a video file that can be decoded."""
    times = []
    with _opened(path) as source, progress_bar(desc="reading times", unit="frame", shown=progress, leave=False) as bar:
        while len(times) != most and source.grab():
            times.append(source.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            bar.update()
    return times
