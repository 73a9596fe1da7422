"""Segmented videos keep frame count, size and duration, and unusable input is an error."""

import shutil
import signal
import time
from itertools import pairwise, repeat
from pathlib import Path

import cv2
import numpy as np
import pytest
from runs import Job, here
from test_segmenter import folder  # noqa: F401

from mit_semseg import Segmenter
from mit_semseg.lib import opencv
from mit_semseg.predict.video import DEFAULT_RATE, VideoError, is_video, output_path, segment_video

SIZE, RATE, FRAMES = (64, 48), 12.5, 10
CAPTURE, WRITER = cv2.VideoCapture, cv2.VideoWriter


def write_clip(path, frames, rate=RATE, codec="mp4v", backend=cv2.CAP_ANY):
    frames = list(frames)
    writer = cv2.VideoWriter(str(path), backend, cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Write a video with a moving square on noise; return its path."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 60, (*SIZE[::-1], 3), dtype=np.uint8) for _ in range(FRAMES)]
    for number, frame in enumerate(frames):
        frame[10:30, 4 * number : 4 * number + 20] = (40, 200, 90)
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames)


@pytest.fixture(scope="module")
def segmenter(folder):  # noqa: F811
    return Segmenter.from_config(folder / "own.yaml", device="cpu")


def read_clip(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (answer := capture.read())[0]:
        frames.append(answer[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_video_has_the_frames_size_and_rate_of_its_source(clip, folder, segmenter):  # noqa: F811
    out = folder / "video"
    here("test.py", "--imgs", clip, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", out)
    assert [p.name for p in out.iterdir()] == ["clip_segmented.mp4"]
    (source, _), (frames, rate) = read_clip(clip), read_clip(out / "clip_segmented.mp4")
    assert len(frames) == FRAMES
    assert rate == pytest.approx(RATE)
    for frame, original in zip(frames, source, strict=True):
        expected = np.asarray(segmenter(cv2.cvtColor(original, cv2.COLOR_BGR2RGB)).overlay(0.5, legend=False))
        assert (
            np.abs(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(int) - expected).mean() < 12
        )  # compression changes pixels


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_signal_keeps_the_frames_so_far(folder, tmp_path, number, code):  # noqa: F811
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (240, 320, 3), dtype=np.uint8) for _ in range(200))
    clip, out = write_clip(tmp_path / "long.mp4", noise), tmp_path / "out"
    job = Job("test.py", "--imgs", clip, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", out)
    while sum(path.stat().st_size for path in out.glob("*")) < 30_000:  # about 10 frames fill the file buffer
        assert job.returncode is None, job.errors()
        time.sleep(0.01)
    job.send(number)
    job.end(60, code)
    assert [path.name for path in out.iterdir()] == ["long_segmented.mp4"]
    assert 1 < len(read_clip(out / "long_segmented.mp4")[0]) < 200


@pytest.mark.parametrize("after", [False, True])
def test_interruption_before_or_after_a_frame_is_written(segmenter, clip, tmp_path, monkeypatch, after):
    class PatchedWriter:
        def __init__(self, *args):
            self.writer, self.calls = WRITER(*args), 0

        def write(self, frame):
            self.calls += 1
            if after or self.calls < 4:
                self.writer.write(frame)
            if self.calls == 4:
                raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.writer, name)

    monkeypatch.setattr(opencv, "VideoWriter", PatchedWriter)
    written, interruption = segment_video(segmenter, str(clip), tmp_path / "out.mp4")
    assert isinstance(interruption, KeyboardInterrupt)
    assert written == len(read_clip(tmp_path / "out.mp4")[0]) == (4 if after else 3)


class PatchedCapture:
    """A `cv2.VideoCapture` that opens the clip as camera 3, and replaces properties of the clip."""

    def __init__(self, source, clip, properties):
        path = str(clip) if source in (3, str(clip)) else source
        self.capture = CAPTURE(path)
        self.properties = {key: iter(values) for key, values in properties.items()} if path == str(clip) else {}

    def get(self, key):
        return next(self.properties[key]) if key in self.properties else self.capture.get(key)

    def __getattr__(self, name):
        return getattr(self.capture, name)


@pytest.mark.parametrize(
    ("source", "count", "header_rate", "times", "rate"),
    [
        ("3", 0, 0, (), DEFAULT_RATE),  # camera 3
        ("clip", 1, 5, (), RATE),
        ("clip", -1, 5, (), RATE),
        ("clip", 60, 5, (), RATE),
        ("clip", FRAMES, 5, (0, 100, 200, 300, 400, 500, 1500, 2500, 3500, 4500), 2),  # a variable frame rate
    ],
)
def test_duration_is_kept_for_wrong_headers_and_variable_rates(
    clip, segmenter, tmp_path, monkeypatch, caplog, source, count, header_rate, times, rate
):
    properties = {cv2.CAP_PROP_FRAME_COUNT: repeat(count), cv2.CAP_PROP_FPS: repeat(header_rate)}
    if times:
        properties[cv2.CAP_PROP_POS_MSEC] = times
    with monkeypatch.context() as patch:
        patch.setattr(opencv, "VideoCapture", lambda given: PatchedCapture(given, clip, properties))
        written, _ = segment_video(segmenter, source.replace("clip", str(clip)), tmp_path / "out.mp4")
    frames, written_rate = read_clip(tmp_path / "out.mp4")
    assert written == len(frames) == FRAMES
    assert written_rate == pytest.approx(rate)
    assert ("header" in caplog.text) == (count in (1, 60))


@pytest.mark.parametrize(
    ("size", "rate", "backend"),
    [((81, 61), 25, cv2.CAP_OPENCV_MJPEG), (SIZE, 119.8834, cv2.CAP_ANY), (SIZE, 1 / 7, cv2.CAP_ANY)],
)
def test_odd_sizes_and_unusual_rates_are_kept(segmenter, tmp_path, size, rate, backend):
    """The source (Motion JPEG) can have any size and frame rate, but the output (MPEG-4) cannot."""
    frame = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = write_clip(tmp_path / "source.avi", [frame] * 3, rate, "MJPG", backend)
    segment_video(segmenter, str(path), tmp_path / "out.mp4")
    frames, output_rate = read_clip(tmp_path / "out.mp4")
    assert len(frames) == 3
    assert frames[0].shape[1::-1] == tuple(side + side % 2 for side in size)
    assert output_rate == pytest.approx(rate, rel=1e-3)


def test_videos_among_images_are_skipped_and_reported(folder, clip, tmp_path):  # noqa: F811
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    for suffix in ("mp4", "mpg", "MTS"):
        (tmp_path / f"b.{suffix}").write_bytes(clip.read_bytes())
    out = tmp_path / "out"
    done = here("test.py", "--imgs", tmp_path / "*", "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", out)
    assert [path.name for path in out.iterdir()] == ["a.png"]
    assert f"--imgs {tmp_path / 'b.MTS'}" in done.stdout + done.stderr


def test_smoothing_reduces_changes_between_frames(segmenter, clip):
    frames = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in read_clip(clip)[0]]

    def changes(smoothing):
        maps = [result.label_map for result in segmenter.segment_frames(frames, smoothing=smoothing)]
        return np.mean([(a != b).mean() for a, b in pairwise(maps)])

    assert changes(0.8) < changes(0.0)
    first = next(segmenter.segment_frames(frames, smoothing=0.5))
    assert np.array_equal(first.label_map, segmenter(frames[0]).label_map)
    with pytest.raises(ValueError, match="smoothing"):
        next(segmenter.segment_frames(frames, smoothing=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--imgs", "invalid.mp4"], "invalid.mp4"),
        (["--imgs", "invalid.mp4", "--smoothing", "2"], "--smoothing 2"),
        (["--imgs", "invalid.mp4", "--overlay", "--no-panel"], "--overlay"),
        (["--imgs", "a.png", "--smoothing", "0.5"], "--smoothing 0.5"),
        (["--imgs", "2007"], "camera 2007"),
    ],
)
def test_unusable_input_is_an_error(folder, tmp_path, monkeypatch, words, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "invalid.mp4").write_bytes(b"not a video")
    errors = here("test.py", *words, "--cfg", folder / "own.yaml", "TEST.result", tmp_path / "out", code=2).stderr
    assert message in errors
    assert "VIDEOIO" not in errors
    assert not list(tmp_path.glob("out/*"))


def test_numbers_are_cameras_unless_they_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "x.mp4"):
        (tmp_path / name).mkdir()
    (tmp_path / "2007").write_bytes(b"")
    sources = ("2024", "2007", "2008", "x.mp4", "CLIP.MP4", "image.jpg")
    assert [is_video(source) for source in sources] == [False, False, True, False, True, False]
    assert output_path("0", Path("out")) == Path("out", "camera_0_segmented.mp4")


def test_only_videos_of_this_program_are_overwritten(segmenter, clip, tmp_path):
    path = tmp_path / "out.mp4"
    for _ in range(2):
        segment_video(segmenter, str(clip), path)
    assert len(read_clip(path)[0]) == len(read_clip(clip)[0])
    shutil.copy(clip, path)
    with pytest.raises(VideoError, match=r"out\.mp4"):
        segment_video(segmenter, str(clip), path)
    assert path.read_bytes() == clip.read_bytes()


def test_videos_with_equal_stems_have_different_outputs(tmp_path):
    for name in ("a.mp4", "a.avi", "b.mp4", "b.png"):
        (tmp_path / name).write_bytes(b"")
    names = [output_path(str(tmp_path / name), Path("out")).name for name in ("a.mp4", "a.avi", "b.mp4")]
    assert names == ["a.mp4_segmented.mp4", "a.avi_segmented.mp4", "b_segmented.mp4"]
