"""Any input at all: it is read, or refused with a sentence; nothing else happens.

`FUZZ=20 pytest -s tests/faults/test_fuzz.py` tries twenty times as much as the suite and prints how much that was.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import zipfile
from functools import lru_cache

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import here
from scenes import TinyEncoder, options, tiny_module

from mit_semseg import Segmenter
from mit_semseg.cli.devices import parse_devices, pick_devices
from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset, class_table
from mit_semseg.dataset.classes import ClassTableError, read_csv
from mit_semseg.dataset.image_io import ImageFileError, image_size, peculiarities, read_image, read_label
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import load_records, write_odgt
from mit_semseg.engine.checkpoint import CheckpointError, read_resume
from mit_semseg.lib.utils import UserError
from mit_semseg.models import ModelBuilder
from mit_semseg.models.weight_files import WeightsError, read_checkpoint, read_state_dict
from mit_semseg.models.weights import load_weights

FUZZ = float(os.environ.get("FUZZ", "1"))
TRIED: dict[str, int] = {}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.fixed_dictionaries(
    {}, optional={key: JSON | st.just("a.png") for key in ("fpath_img", "fpath_segm", "width", "height", "x")}
)
LINES = st.one_of(RECORDS.map(json.dumps), JSON.map(json.dumps), st.text(max_size=30), st.just("[" * 100_000))


def many(count):
    """Settings of a test that tries so many examples."""
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=int(count * FUZZ), deadline=None, suppress_health_check=ignored)


def count(what):
    TRIED[what] = TRIED.get(what, 0) + 1


@pytest.fixture(scope="module", autouse=True)
def tried():
    yield
    print("\ntried:", ", ".join(f"{number} {what}" for what, number in TRIED.items()))


@given(st.lists(LINES, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
@many(150)
def test_lists(tmp_path, lines, separator, listed):
    """What is read has what the rest relies on, and can be written and read again."""
    count("lists")
    path = tmp_path / "list.odgt"
    path.write_bytes(separator.join(lines).encode("utf-8", "surrogatepass"))
    problems = [] if listed else None
    try:
        records = load_records(path, tmp_path, problems)
    except ListError as error:
        assert str(path) in str(error)
        return
    assert records
    for record in records:
        assert record["fpath_img"]
        assert isinstance(record.get("fpath_segm", ""), str)
        assert record.get("width", 1) >= 0
    dataset = ValDataset(tmp_path, records, options(on_error="skip"))
    assert all("error" in dataset[i] for i in range(len(dataset)))


@given(st.binary(max_size=200))
@many(100)
def test_bytes_as_lists_and_tables(tmp_path, content):
    count("files of bytes")
    path = tmp_path / "file"
    path.write_bytes(content)
    with contextlib.suppress(ListError):
        load_records(path, tmp_path)
    with contextlib.suppress(ClassTableError):
        read_csv(path)
    with contextlib.suppress(UserError):
        load_config(path)
    with pytest.raises(ImageFileError):
        read_image(path)


@given(st.lists(st.lists(st.text(max_size=9), max_size=4), max_size=5))
@many(100)
def test_class_tables(tmp_path, rows):
    count("class tables")
    path = tmp_path / "classes.csv"
    path.write_text("raw,name,color\n" + "\n".join(",".join(row) for row in rows), encoding="utf-8", errors="replace")
    try:
        table = read_csv(path)
    except ClassTableError as error:
        assert str(path) in str(error)
    else:
        assert len(table) == len(set(table.names)) == len(table.colors)


@given(st.text(max_size=12) | st.from_regex(r"(gpu)?[0-9]{1,12}(-(gpu)?[0-9]{1,12})?(,cpu|,[0-9])*", fullmatch=True))
@many(300)
def test_devices(text):
    count("names of devices")
    for read in (parse_devices, pick_devices):
        try:
            assert read(text)
        except UserError as error:
            assert len(str(error)) < 500


YAML = st.recursive(
    st.text(max_size=10) | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(YAML.map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | st.text(max_size=60))
@many(150)
def test_yaml_files(tmp_path, text):
    count("YAML files")
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with contextlib.suppress(UserError):
        load_config(path)


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("DIR: !!python/object/apply:os.system ['touch /tmp/mit_semseg_must_not_exist']")
    with pytest.raises(UserError, match="is no YAML file"):
        load_config(path)
    assert not os.path.exists("/tmp/mit_semseg_must_not_exist")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, left out, put in or cut off; mostly near its beginning, where headers are."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = (
            min(int(rng.expovariate(1 / 60)), len(content) - 1) if rng.random() < 0.7 else rng.randrange(len(content))
        )
        kind = rng.randrange(5)
        if kind == 0:
            content[place] = rng.randrange(256)
        elif kind == 1:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[place : place + rng.randint(1, 8)]
        elif kind == 3:
            content[place:place] = rng.randbytes(rng.randint(1, 8))
        elif len(content) > 2:
            del content[max(1, rng.randrange(len(content))) :]
        if not content:
            content += b"x"
    return bytes(content)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/mit_semseg_must_not_exist",)


def checkpoints(folder):
    """Files of every form in which weights come."""
    state = TinyEncoder().state_dict()
    torch.save(state, folder / "new.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"step": 1, "model": state}, folder / "state.pth")
    (folder / "evil.pth").write_bytes(pickle.dumps(_Evil()))
    return [path.read_bytes() for path in sorted(folder.glob("*.pth"))]


def test_checkpoints(tmp_path):
    """Also where a checksum of what was changed would be right: the archive is written anew around it."""
    rng, whole = random.Random(0), checkpoints(tmp_path)
    path, module = tmp_path / "x.pth", TinyEncoder()
    for number in range(int(300 * FUZZ)):
        count("checkpoints")
        content = whole[number % len(whole)]
        if zipfile.is_zipfile(io.BytesIO(content)) and number % 3:
            packed = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(packed, "w") as target:
                for name in source.namelist():
                    inside = source.read(name)
                    target.writestr(name, damaged(inside, rng) if name.endswith("data.pkl") else inside)
            content = packed.getvalue()
        else:
            content = damaged(content, rng)
        path.write_bytes(content)
        for read in (read_checkpoint, read_state_dict, lambda file: load_weights(module, file)):
            with contextlib.suppress(WeightsError):
                read(path)
        with contextlib.suppress(CheckpointError):
            read_resume(path)
    assert not os.path.exists("/tmp/mit_semseg_must_not_exist")


def test_pictures(tmp_path):
    """Of every format that is common; a picture that is read has the size that its header says."""
    rng, pixels = random.Random(0), np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).quantize(16)]
    whole = []
    for image in images:
        for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI"):
            with contextlib.suppress(OSError, ValueError):
                file = io.BytesIO()
                image.save(file, kind)
                whole.append(file.getvalue())
    path = tmp_path / "x"
    for number in range(int(900 * FUZZ)):
        count("pictures")
        path.write_bytes(damaged(whole[number % len(whole)], rng))
        for read in (read_label, peculiarities):
            with contextlib.suppress(ImageFileError):
                read(path)
        try:
            image = read_image(path)
        except ImageFileError as error:
            assert str(path) in str(error)
        else:
            assert image.mode == "RGB"
            assert image.size == image_size(path)


@given(st.binary(max_size=60) | st.integers() | st.text(max_size=5) | st.none() | st.lists(st.integers(), max_size=3))
@many(60)
def test_what_is_no_picture(given_):
    count("values that are no picture")
    with contextlib.suppress(UserError):
        segmenter()(given_)


@lru_cache
def segmenter() -> Segmenter:
    return Segmenter(tiny_module(), class_table("", 3), options())


@given(st.dictionaries(st.text("abcdefgh/._-é\n", min_size=1, max_size=12), st.just(1), min_size=1, max_size=5))
@many(60)
def test_lists_are_read_as_they_were_written(tmp_path, names):
    count("lists written")
    records = [{"fpath_img": name, "fpath_segm": name[::-1]} for name in names]
    write_odgt(records, tmp_path / "list.odgt")
    assert load_records(tmp_path / "list.odgt") == records


@pytest.mark.parametrize("script", ["train.py", "eval.py", "test.py", "mit_semseg.export", "mit_semseg.demo"])
def test_a_script_that_is_given_a_malicious_checkpoint(tmp_path, script):
    """However it comes to it: weights to start from, to continue from, to evaluate, to export."""
    torch.save({"x": _Evil()}, tmp_path / "evil.pth")
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    for part in ("encoder_epoch_1", "decoder_epoch_1", "resume", "history_epoch_1"):
        (tmp_path / f"{part}.pth").write_bytes((tmp_path / "evil.pth").read_bytes())
    (tmp_path / "l.odgt").write_text('{"fpath_img": "a.png", "fpath_segm": "a.png", "width": 32, "height": 24}')
    sound = tmp_path / "sound"
    sound.mkdir()
    encoder = ModelBuilder.build_encoder("resnet18", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1", num_class=3, in_channels=encoder.out_channels)
    torch.save(encoder.state_dict(), sound / "encoder_epoch_1.pth")
    torch.save(decoder.state_dict(), sound / "decoder_epoch_1.pth")
    (sound / "history_epoch_1.pth").write_bytes((tmp_path / "evil.pth").read_bytes())
    fixed = ["DIR", tmp_path, "MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "DATASET.num_class", 3]
    fixed += ["DATASET.list_train", tmp_path / "l.odgt", "DATASET.list_val", tmp_path / "l.odgt"]
    fixed += ["MODEL.pretrained", False, "VAL.checkpoint", "epoch_1.pth", "TEST.checkpoint", "epoch_1.pth"]
    ways = {
        "train.py": [
            ["TRAIN.resume", "auto"],
            ["TRAIN.start_epoch", 1],
            ["DIR", sound, "TRAIN.start_epoch", 1],  # but for its history
            ["DIR", tmp_path / "new", "MODEL.weights_encoder", tmp_path / "evil.pth"],
            ["DIR", tmp_path / "new", "MODEL.weights_decoder", tmp_path / "evil.pth"],
            ["DIR", tmp_path / "new", "TRAIN.resume", tmp_path / "evil.pth"],
        ],
        "eval.py": [[], ["VAL.checkpoint", tmp_path / "evil.pth"]],
        "test.py": [
            ["--imgs", tmp_path / "a.png"],
            ["--imgs", tmp_path / "a.png", "TEST.checkpoint", tmp_path / "evil.pth"],
        ],
        "mit_semseg.export": [[]],
        "mit_semseg.demo": [[]],
    }
    for way in ways[script]:
        flags = [word for word in way if str(word).startswith("--")]
        front = way[: 2 * len(flags)]
        device = [] if script == "mit_semseg.export" else ["--gpu", "cpu"]
        done = here(script, *front, *device, *fixed, *way[2 * len(flags) :])
        assert done.returncode == 2, (way, done.stdout, done.stderr)
        assert re.search(r"\w+\.pth was refused: it is damaged or holds more than tensors", done.stderr), way
        assert sound not in way or "history_epoch_1.pth was refused" in done.stderr
    assert not os.path.exists("/tmp/mit_semseg_must_not_exist")
