"""Videos: as many frames, as large and as fast as the given one; broken and interrupted ones can be played."""

import itertools
import signal
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from processes import free_port, rank_environment
from runs import Job, here
from test_segmenter import folder  # noqa: F401

from mit_semseg import Segmenter
from mit_semseg.predict.video import USUAL_RATE, VideoError, is_video, output_path, segment_video

SIZE, RATE, FRAMES = (64, 48), 12.5, 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A moving square on noise."""
    path, rng = tmp_path_factory.mktemp("clip") / "clip.mp4", np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), RATE, SIZE)
    for number in range(FRAMES):
        frame = rng.integers(0, 60, (*SIZE[::-1], 3), dtype=np.uint8)
        frame[10:30, 4 * number : 4 * number + 20] = (40, 200, 90)
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture(scope="module")
def segmenter(folder):  # noqa: F811
    return Segmenter.from_config(folder / "own.yaml", device="cpu")


def frames_of(path):
    source, frames = cv2.VideoCapture(str(path)), []
    while (answer := source.read())[0]:
        frames.append(answer[1])
    return frames, source.get(cv2.CAP_PROP_FPS)


def test_test_py_writes_a_video_like_the_given_one(clip, folder, segmenter):  # noqa: F811
    done = here(
        "test.py", "--imgs", clip, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", folder / "video"
    )
    assert done.returncode == 0, done.stderr
    assert "clip_segmented.mp4: 10 frames" in done.stdout
    assert [p.name for p in (folder / "video").iterdir()] == ["clip_segmented.mp4"]
    (given, _), (frames, rate) = frames_of(clip), frames_of(folder / "video" / "clip_segmented.mp4")
    assert len(frames) == FRAMES
    assert rate == pytest.approx(RATE)
    for frame, original in zip(frames, given, strict=True):
        assert frame.shape == (*SIZE[::-1], 3)
        expected = np.asarray(segmenter(cv2.cvtColor(original, cv2.COLOR_BGR2RGB)).overlay(0.5, legend=False))
        assert np.abs(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(int) - expected).mean() < 12  # compression


def test_an_interrupted_run_leaves_what_there_is(clip, segmenter, tmp_path, monkeypatch):
    frames = segmenter.frames

    def interrupted(pictures, **how):
        for number, result in enumerate(frames(pictures, **how)):
            if number == 4:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(segmenter, "frames", interrupted)
    written = segment_video(segmenter, str(clip), tmp_path / "out.mp4", progress=False)
    assert written.frames == 4
    assert isinstance(written.interruption, KeyboardInterrupt)
    assert len(frames_of(tmp_path / "out.mp4")[0]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_script_that_is_stopped_leaves_a_video(folder, tmp_path, number, code):  # noqa: F811
    """The real script, on a clip that takes long enough."""
    clip = tmp_path / "long.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), RATE, SIZE)
    rng = np.random.default_rng(0)
    for _ in range(600):
        writer.write(rng.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))
    writer.release()
    job = Job("test.py", "--imgs", clip, "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", tmp_path / "out")
    while sum(path.stat().st_size for path in tmp_path.glob("out/*")) < 30_000:  # some frames
        assert job.returncode is None, job.errors()
        time.sleep(0.01)
    job.send(number)
    done = job.end(60)
    assert done.returncode == code, done.stderr
    assert "frames, interrupted" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["long_segmented.mp4"]
    assert 1 < len(frames_of(tmp_path / "out" / "long_segmented.mp4")[0]) < 600


def test_a_camera_is_recorded_until_it_ends(clip, segmenter, tmp_path, monkeypatch):
    """A camera does not say how many frames there will be; this one is a file."""
    opened = cv2.VideoCapture

    class Camera:
        def __init__(self, given):
            self.is_camera = given == 3
            self.source = opened(str(clip) if self.is_camera else given)

        def get(self, what):
            silent = self.is_camera and what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS)
            return 0 if silent else self.source.get(what)

        def __getattr__(self, name):
            return getattr(self.source, name)

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    written = segment_video(segmenter, "3", tmp_path / "out.mp4", progress=False)
    monkeypatch.undo()
    assert (written.frames, written.interruption) == (FRAMES, None)
    frames, rate = frames_of(tmp_path / "out.mp4")
    assert len(frames) == FRAMES
    assert rate == USUAL_RATE


class _Header:
    """`cv2.VideoCapture` with other answers for one file."""

    clip, answers, opened = "", {}, cv2.VideoCapture

    def __init__(self, given):
        self.source, self.wrong = type(self).opened(given), given == self.clip

    def get(self, what):
        return self.answers[what] if self.wrong and what in self.answers else self.source.get(what)

    def __getattr__(self, name):
        return getattr(self.source, name)


@pytest.mark.parametrize("claimed", [1, FRAMES, 60, -1, 0])
def test_all_frames_are_written_whatever_the_header_says(clip, segmenter, tmp_path, monkeypatch, caplog, claimed):
    answers = {cv2.CAP_PROP_FRAME_COUNT: claimed, cv2.CAP_PROP_FPS: 5.0}
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "VideoCapture", type("Capture", (_Header,), {"clip": str(clip), "answers": answers}))
        written = segment_video(segmenter, str(clip), tmp_path / "out.mp4", progress=False)
    frames, rate = frames_of(tmp_path / "out.mp4")
    assert (written.frames, len(frames), rate) == (FRAMES, FRAMES, pytest.approx(RATE))
    assert ("its header says 60" in caplog.text) == (claimed == 60)


def test_the_duration_stays_where_the_frame_rate_varies(segmenter, clip, tmp_path, monkeypatch):
    """Frames at 0, 0.1, ... 0.5 and then every second: 10 frames in 4.5 s, and one more interval."""
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 2.5, 3.5, 4.5]

    class Varying(_Header):
        number = -1

        def grab(self):
            self.number += 1
            return self.source.grab()

        def get(self, what):
            return 1000 * times[self.number] if what == cv2.CAP_PROP_POS_MSEC else self.source.get(what)

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "VideoCapture", Varying)
        segment_video(segmenter, str(clip), tmp_path / "out.mp4", progress=False)
    frames, rate = frames_of(tmp_path / "out.mp4")
    assert (len(frames) - 1) / rate == pytest.approx(4.5, rel=1e-3)


@pytest.mark.parametrize("ending", [".avi", ".mkv", ".mpg", ".ts", ".mov", ".wmv", ".m4v", ".3gp"])
def test_containers(segmenter, tmp_path, ending):
    """What OpenCV can write here, it reads: all frames arrive in order."""
    path = tmp_path / f"given{ending}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*("MJPG" if ending == ".avi" else "mp4v")), 25, SIZE)
    if not writer.isOpened():
        pytest.skip(f"this OpenCV writes no {ending}")
    for number in range(8):
        writer.write(np.full((*SIZE[::-1], 3), 30 * number, np.uint8))
    writer.release()
    assert is_video(str(path))
    given, written = len(frames_of(path)[0]), segment_video(segmenter, str(path), tmp_path / "out.mp4", progress=False)
    assert written.frames == len(frames_of(tmp_path / "out.mp4")[0]) == given >= 7


def test_a_video_in_a_folder_of_pictures_is_named(folder, clip, tmp_path):  # noqa: F811
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    for ending in ("mp4", "mpg", "MTS"):
        (tmp_path / f"b.{ending}").write_bytes(clip.read_bytes())
    words = "--cfg", folder / "own.yaml", "--gpu", "cpu", "TEST.result", tmp_path / "out"
    for given in (tmp_path, tmp_path / "*"):
        done = here("test.py", "--imgs", given, *words)
        assert done.returncode == 0, done.stderr
        assert "1 of 1 pictures segmented" in done.stdout
        assert "3 videos left out" in done.stdout + done.stderr
        assert f"--imgs {tmp_path / 'b.MTS'}" in done.stdout + done.stderr


def test_smoothing_takes_the_flicker_out(segmenter, clip):
    given = [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in frames_of(clip)[0]]

    def changes(smoothing):
        maps = [result.label_map for result in segmenter.frames(given, smoothing=smoothing)]
        return np.mean([(a != b).mean() for a, b in pairwise(maps)])

    assert changes(0.8) < changes(0.0)
    assert np.array_equal(next(segmenter.frames(given, smoothing=0.5)).label_map, segmenter(given[0]).label_map)
    with pytest.raises(ValueError, match=r"smoothing 1: give a share"):
        next(segmenter.frames(given, smoothing=1))


def test_mistakes_are_named(folder, tmp_path, segmenter):  # noqa: F811
    (tmp_path / "no.mp4").write_bytes(b"no video")
    for words, message in (
        (["--imgs", tmp_path / "no.mp4"], "cannot be opened as a video"),
        (["--imgs", tmp_path / "gone.mp4"], "there is no such file"),
        (["--imgs", tmp_path / "no.mp4", "--smoothing", "2"], "--smoothing 2: give a share"),
        (["--imgs", tmp_path / "no.mp4", "--overlay", "--no-panel"], "--overlay, --no-panel: for pictures"),
        (["--imgs", tmp_path / "a.png", "--smoothing", "0.5"], "--smoothing 0.5 is for videos"),
        (["--imgs", "20240101123456"], "no such file or folder"),
        (["--imgs", "2007"], "camera 2007: cannot be opened"),
        (["--imgs", "²"], "no such file or folder"),
    ):
        done = here("test.py", *words, "--cfg", folder / "own.yaml", "TEST.result", tmp_path / "out")
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "VIDEOIO" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    with pytest.raises(VideoError, match="camera 77: cannot be opened"):
        segment_video(segmenter, "77", tmp_path / "out.mp4", progress=False)


@pytest.mark.parametrize(
    ("size", "rate"), [((81, 61), 25), ((64, 48), 119.8834), ((64, 48), 66.6667), ((64, 48), 1 / 7)]
)
def test_any_size_and_rate(segmenter, tmp_path, monkeypatch, size, rate):
    """The codec takes even sides and rates of few digits: nothing is cut, and the rate is nearly the same."""
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    opened, left, ahead = cv2.VideoCapture, iter(range(3)), iter(range(3))
    shown = itertools.count()
    source = SimpleNamespace(
        isOpened=lambda: True,
        get=lambda key: {
            cv2.CAP_PROP_FRAME_WIDTH: size[0],
            cv2.CAP_PROP_FRAME_HEIGHT: size[1],
            cv2.CAP_PROP_FPS: rate,
            cv2.CAP_PROP_FRAME_COUNT: 3,
            cv2.CAP_PROP_POS_MSEC: 1000 / rate * next(shown) if key == cv2.CAP_PROP_POS_MSEC else None,
        }[key],
        read=lambda: (next(left, None) is not None, picture),
        grab=lambda: next(ahead, None) is not None,
        release=lambda: None,
    )
    monkeypatch.setattr(cv2, "VideoCapture", lambda given: source if given == "given.mp4" else opened(given))
    segment_video(segmenter, "given.mp4", tmp_path / "out.mp4", progress=False)
    frames, there = frames_of(tmp_path / "out.mp4")
    assert len(frames) == 3
    assert frames[0].shape[1::-1] == tuple(side + side % 2 for side in size)
    assert there == pytest.approx(rate, rel=1e-3)


def test_a_file_or_folder_of_digits_is_no_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "2007").write_bytes(b"")
    assert not is_video("2024")
    assert not is_video("2007")
    assert is_video("2008")
    assert not is_video("x.mp4")


def test_one_process_segments_a_video(folder, monkeypatch):  # noqa: F811
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, str(value))
    done = here("test.py", "--imgs", "0", "--cfg", folder / "own.yaml")
    assert done.returncode == 2
    assert "a video is segmented by one process: python test.py --imgs 0" in done.stderr


def test_what_is_a_video():
    assert is_video("CLIP.MP4")
    assert is_video("0")
    assert not is_video("picture.jpg")
    assert output_path("0", Path("out")) == Path("out", "camera_0_segmented.mp4")
