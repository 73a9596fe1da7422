"""Segment the frames of a video file or camera, and write a video in which they are blended with class colors."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..dataset.layouts import VIDEO_ENDINGS
from ..dataset.rasters import SOFTWARE
from ..lib import opencv as cv2
from ..lib.utils import UserError, WriteError, atomic_write, progress_bar
from .segmenter import Segmenter

logger = logging.getLogger(__name__)

CODEC = "mp4v"  # MPEG-4, which OpenCV can write without additional libraries
OPACITY = 0.5  # weight of the class colors
TAG = b"\0\0\0\x12free" + SOFTWARE.encode()  # MPEG-4 box that marks files of this program; players ignore it
DEFAULT_RATE = 25.0  # frames per second if a camera or video does not report its frame rate


class VideoError(UserError, RuntimeError):
    """A video or camera cannot be read, or a video cannot be written."""


def is_video(source: str) -> bool:
    """Return whether a value of `--imgs` is a video file or the number of a camera."""
    return not Path(source).is_dir() and (_is_camera(source) or Path(source).suffix.lower() in VIDEO_ENDINGS)


def _is_camera(source: str) -> bool:
    return re.fullmatch("[0-9]{1,4}", source) is not None and not Path(source).exists()


def output_path(source: str, folder: Path) -> Path:
    """Return the path of the segmented video in the output folder. The videos of a folder have different paths."""
    if _is_camera(source):
        return folder / f"camera_{source}_segmented.mp4"
    video = Path(source)
    same = [path for path in video.parent.glob("*") if path.stem == video.stem and is_video(str(path))]
    return folder / f"{video.name if len(same) > 1 else video.stem}_segmented.mp4"


def _has_tag(path: Path) -> bool:
    """Return whether a file was written by `segment_video`."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(TAG)))
        return file.read() == TAG


def segment_video(
    segmenter: Segmenter, source: str, path: Path, *, smoothing: float = 0.0
) -> tuple[int, KeyboardInterrupt | None]:
    """Segment all frames of a source, and write a video in which they are blended with class colors.

    The video has as many frames as the source, the same frame size and duration, and a constant frame rate. Odd sides
    are padded by one pixel.

    Args:
        segmenter: segmenter for the frames.
        source: video file, or number of a camera, which is recorded until Ctrl-C.
        path: output file.
        smoothing: see `Segmenter.segment_frames`.

    Returns:
        Number of written frames, and the `KeyboardInterrupt` that has ended the video, or None.

    Raises:
        VideoError: the source has no readable frame, OpenCV cannot write the video, or `path` exists and was not
            written by this program.
        WriteError: the video cannot be written completely, e.g. because the disk is full.
    """
    if path.exists() and not _has_tag(path):
        raise VideoError(f"{path} exists and was not written by this program; use another output folder")
    interruption, count = None, 0
    times = [] if _is_camera(source) else _read_timestamps(source)
    capture = _open(source)
    with atomic_write(path) as partial:
        size, rate = _frame_size(capture), _frame_rate(capture, times)
        header_count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if times and 0 < header_count != len(times):
            logger.warning("%s: the header reports %d frames, but %d can be decoded", source, header_count, len(times))
        output = partial.with_name(partial.name + path.suffix)  # OpenCV derives the file format from the suffix
        even_size = tuple(side + side % 2 for side in size)  # the codec requires even sides
        writer = cv2.VideoWriter(str(output), cv2.VideoWriter_fourcc(*CODEC), rate, even_size)
        try:
            if not writer.isOpened():
                raise VideoError(f"{path}: OpenCV cannot write a video of {size[0]}x{size[1]} with codec {CODEC}")
            with progress_bar(total=len(times) or None, desc="segmenting", unit="frame") as bar:
                for result in segmenter.segment_frames(_read_frames(capture, size), smoothing=smoothing):
                    frame = cv2.cvtColor(np.asarray(result.overlay(OPACITY, legend=False)), cv2.COLOR_RGB2BGR)
                    padding = 0, size[1] % 2, 0, size[0] % 2  # top, bottom, left, right
                    writer.write(cv2.copyMakeBorder(frame, *padding, cv2.BORDER_REPLICATE))
                    count += 1
                    bar.update()
        except KeyboardInterrupt as error:
            interruption = error
            if not count:
                raise
        finally:
            writer.release()
            try:
                written = int(cv2.VideoCapture(str(output)).get(cv2.CAP_PROP_FRAME_COUNT)) if count else 0
                if written >= count > 0:  # one more if the interruption came between `write` and the count
                    count = written
                    with open(output, "ab") as file:
                        file.write(TAG)
                    output.replace(partial)
            finally:
                output.unlink(missing_ok=True)
        if not count:
            raise VideoError(f"{source}: no frame can be decoded")
        if not partial.exists():  # OpenCV does not report write errors
            raise WriteError(f"{path} cannot be written completely; check the free disk space")
    return count, interruption


def _open(source: str) -> "cv2.VideoCapture":
    """Open a video file or camera; raise a `VideoError` if it cannot be read."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # hide OpenCV's own error message
    capture = cv2.VideoCapture(int(source) if _is_camera(source) else source)
    cv2.utils.logging.setLogLevel(level)
    if not capture.isOpened() or not all(_frame_size(capture)):
        if _is_camera(source):
            raise VideoError(f"camera {source} cannot be opened, and no file or folder is named {source}")
        raise VideoError(f"{source} does not exist, is damaged or is not a video")
    return capture


def _frame_size(capture: "cv2.VideoCapture") -> tuple[int, int]:
    return int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))


def _read_timestamps(path: str) -> list[float]:
    """Read all frames and return their timestamps in seconds; the header can be wrong, and the rate can vary."""
    capture, times = _open(path), []
    with progress_bar(desc="reading", unit="frame", leave=False) as bar:
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            bar.update()
    return times


def _frame_rate(capture: "cv2.VideoCapture", times: list[float]) -> float:
    """Return the frame rate from the timestamps; if unknown, from the header; if still unknown, `DEFAULT_RATE`."""
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0
    rate = next((r for r in (rate, capture.get(cv2.CAP_PROP_FPS)) if 0 < r < 1000), DEFAULT_RATE)
    return rate if rate <= 65 else round(rate, 1)  # MPEG-4 stores 3 decimals only up to 65.535


def _read_frames(capture: "cv2.VideoCapture", size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield every frame as array (H, W, 3) uint8 RGB, resized to `size` (width, height) if needed."""
    while (answer := capture.read())[0]:
        frame = answer[1]
        if frame.shape[1::-1] != size:  # the size can change within a stream
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
