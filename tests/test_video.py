"""Tests of video segmentation: frame count, size and duration are kept; wrong headers, errors, interruption."""

import itertools
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from ranks import rank_environment
from runs import Job, here
from test_segmenter import folder  # noqa: F401

from mit_semseg import Segmenter
from mit_semseg.lib import opencv
from mit_semseg.predict.video import DEFAULT_RATE, is_video, output_path, segment_video

SIZE, RATE, FRAMES = (64, 48), 12.5, 10


def write_clip(path, frames, rate=RATE, codec="mp4v", backend=cv2.CAP_ANY):
    frames = list(frames)
    writer = cv2.VideoWriter(str(path), backend, cv2.VideoWriter_fourcc(*codec), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A moving square on noise."""
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
    done = here("test.py", "--imgs", clip, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", out)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.iterdir()] == ["clip_segmented.mp4"]
    (source, _), (frames, rate) = read_clip(clip), read_clip(out / "clip_segmented.mp4")
    assert len(frames) == FRAMES
    assert rate == pytest.approx(RATE)
    for frame, original in zip(frames, source, strict=True):
        expected = np.asarray(segmenter(cv2.cvtColor(original, cv2.COLOR_BGR2RGB)).overlay(0.5, legend=False))
        assert np.abs(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(int) - expected).mean() < 12  # compression


def test_interruption_keeps_the_frames_so_far(clip, segmenter, tmp_path, monkeypatch):
    segment_frames = segmenter.segment_frames

    def interrupted(frames, **options):
        yield from itertools.islice(segment_frames(frames, **options), 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(segmenter, "segment_frames", interrupted)
    written = segment_video(segmenter, str(clip), tmp_path / "out.mp4", progress=False)
    assert written.frames == len(read_clip(tmp_path / "out.mp4")[0]) == 4
    assert isinstance(written.interruption, KeyboardInterrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_signal_keeps_the_frames_so_far(folder, tmp_path, number, code):  # noqa: F811
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8) for _ in range(600))
    clip, out = write_clip(tmp_path / "long.mp4", noise), tmp_path / "out"
    job = Job("test.py", "--imgs", clip, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", out)
    while sum(path.stat().st_size for path in out.glob("*")) < 30_000:  # some frames
        assert job.returncode is None, job.errors()
        time.sleep(0.01)
    job.send(number)
    done = job.end(60)
    assert done.returncode == code, done.stderr
    assert [path.name for path in out.iterdir()] == ["long_segmented.mp4"]
    assert 1 < len(read_clip(out / "long_segmented.mp4")[0]) < 600


class PatchedCapture:
    """`cv2.VideoCapture` with other properties for one source."""

    source, path, properties, create = "", "", {}, cv2.VideoCapture

    def __init__(self, source):
        self.patched = source == self.source
        self.capture = type(self).create(self.path if self.patched else source)
        self.times = iter(self.properties.get(cv2.CAP_PROP_POS_MSEC, ()))

    def get(self, key):
        if not self.patched or key not in self.properties:
            return self.capture.get(key)
        return next(self.times) if key == cv2.CAP_PROP_POS_MSEC else self.properties[key]

    def __getattr__(self, name):
        return getattr(self.capture, name)


@pytest.fixture
def segment_patched(clip, segmenter, tmp_path, monkeypatch):
    """Segment the clip under another name and with other properties."""

    def segment(source, properties):
        attributes = {"source": source, "path": str(clip), "properties": properties}
        with monkeypatch.context() as patch:
            patch.setattr(opencv, "VideoCapture", type("Capture", (PatchedCapture,), attributes))
            written = segment_video(segmenter, str(source), tmp_path / "out.mp4", progress=False)
        frames, rate = read_clip(tmp_path / "out.mp4")
        assert written.frames == len(frames) == FRAMES
        return rate

    return segment


def test_camera_without_rate_gets_the_default_rate(segment_patched):
    assert segment_patched(3, {cv2.CAP_PROP_FRAME_COUNT: 0, cv2.CAP_PROP_FPS: 0}) == DEFAULT_RATE


@pytest.mark.parametrize("count", [1, FRAMES, 60, -1, 0])
def test_wrong_header_is_ignored_with_a_warning(clip, segment_patched, caplog, count):
    rate = segment_patched(str(clip), {cv2.CAP_PROP_FRAME_COUNT: count, cv2.CAP_PROP_FPS: 5.0})
    assert rate == pytest.approx(RATE)
    assert ("header" in caplog.text) == (count in (1, 60))


def test_duration_is_kept_for_a_variable_frame_rate(clip, segment_patched):
    """Ten frames in 4.5 s: at 0, 0.1, ... 0.5 s, then every second."""
    times = [0, 100, 200, 300, 400, 500, 1500, 2500, 3500, 4500]
    rate = segment_patched(str(clip), {cv2.CAP_PROP_POS_MSEC: times})
    assert (FRAMES - 1) / rate == pytest.approx(4.5, rel=1e-3)


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".mpg", ".ts", ".mov", ".wmv", ".m4v", ".3gp"])
def test_containers_are_read_to_the_end(segmenter, tmp_path, suffix):
    frames = [np.full((*SIZE[::-1], 3), 30 * number, np.uint8) for number in range(8)]
    path = write_clip(tmp_path / f"source{suffix}", frames, 25, "MJPG" if suffix == ".avi" else "mp4v")
    if not (count := len(read_clip(path)[0])):
        pytest.skip(f"this OpenCV cannot write {suffix}")
    assert is_video(str(path))
    written = segment_video(segmenter, str(path), tmp_path / "out.mp4", progress=False)
    assert written.frames == len(read_clip(tmp_path / "out.mp4")[0]) == count >= 7


@pytest.mark.parametrize(
    ("size", "rate", "backend"),
    [
        ((81, 61), 25, cv2.CAP_OPENCV_MJPEG),  # the other backends crop odd sizes
        (SIZE, 119.8834, cv2.CAP_ANY),
        (SIZE, 66.6667, cv2.CAP_ANY),
        (SIZE, 1 / 7, cv2.CAP_ANY),
    ],
)
def test_odd_sizes_and_unusual_rates_are_kept(segmenter, tmp_path, size, rate, backend):
    """The source is Motion JPEG, which can have any size and rate; the output, MPEG-4, cannot."""
    frame = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path = write_clip(tmp_path / "source.avi", [frame] * 3, rate, "MJPG", backend)
    segment_video(segmenter, str(path), tmp_path / "out.mp4", progress=False)
    frames, output_rate = read_clip(tmp_path / "out.mp4")
    assert len(frames) == 3
    assert frames[0].shape[1::-1] == tuple(side + side % 2 for side in size)
    assert output_rate == pytest.approx(rate, rel=1e-3)


def test_videos_among_images_are_skipped_and_reported(folder, clip, tmp_path):  # noqa: F811
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    for suffix in ("mp4", "mpg", "MTS"):
        (tmp_path / f"b.{suffix}").write_bytes(clip.read_bytes())
    for inputs in (tmp_path, tmp_path / "*"):
        out = tmp_path / "out"
        done = here("test.py", "--imgs", inputs, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", out)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in out.iterdir()] == ["a.png"]
        assert f"--imgs {tmp_path / 'b.MTS'}" in done.stdout + done.stderr


def test_smoothing_reduces_changes_between_frames(segmenter, clip):
    frames = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in read_clip(clip)[0]]

    def changes(smoothing):
        maps = [result.label_map for result in segmenter.segment_frames(frames, smoothing=smoothing)]
        return np.mean([(a != b).mean() for a, b in itertools.pairwise(maps)])

    assert changes(0.8) < changes(0.0)
    first = next(segmenter.segment_frames(frames, smoothing=0.5))
    assert np.array_equal(first.label_map, segmenter(frames[0]).label_map)
    with pytest.raises(ValueError, match="smoothing"):
        next(segmenter.segment_frames(frames, smoothing=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--imgs", "invalid.mp4"], "invalid.mp4"),
        (["--imgs", "missing.mp4"], "missing.mp4"),
        (["--imgs", "invalid.mp4", "--smoothing", "2"], "--smoothing 2"),
        (["--imgs", "invalid.mp4", "--overlay", "--no-panel"], "--overlay"),
        (["--imgs", "a.png", "--smoothing", "0.5"], "--smoothing 0.5"),
        (["--imgs", "20240101123456"], "20240101123456"),
        (["--imgs", "2007"], "camera 2007"),
        (["--imgs", "²"], "²"),
    ],
)
def test_unusable_input_is_an_error(folder, tmp_path, monkeypatch, words, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "invalid.mp4").write_bytes(b"not a video")
    done = here("test.py", *words, "--cfg", folder / "own.yaml", "TEST.result", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "VIDEOIO" not in done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_torchrun_does_not_segment_videos(folder, monkeypatch):  # noqa: F811
    for name, value in rank_environment(1, 2, 29500).items():
        monkeypatch.setenv(name, str(value))
    done = here("test.py", "--imgs", "0", "--cfg", folder / "own.yaml")
    assert done.returncode == 2
    assert "torchrun" in done.stderr


def test_numbers_are_cameras_unless_they_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "x.mp4"):
        (tmp_path / name).mkdir()
    (tmp_path / "2007").write_bytes(b"")
    sources = ("2024", "2007", "2008", "x.mp4", "CLIP.MP4", "image.jpg")
    assert [is_video(source) for source in sources] == [False, False, True, False, True, False]
    assert output_path("0", Path("out")) == Path("out", "camera_0_segmented.mp4")
