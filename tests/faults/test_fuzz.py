"""Random and malicious inputs are read, or raise an error with a message; they do nothing else.

`FUZZ=20 pytest tests/faults/test_fuzz.py` tries twenty times as many examples.
"""

import contextlib
import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import here
from scenes import TinyEncoder, options

from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset
from mit_semseg.dataset.classes import ClassTableError, read_csv
from mit_semseg.dataset.image_io import ImageFileError, image_size, read_image, read_label, unusual_properties
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import load_records, write_odgt
from mit_semseg.engine.checkpoint import CheckpointError, read_resume
from mit_semseg.lib.utils import UserError
from mit_semseg.models import ModelBuilder
from mit_semseg.models.weight_files import WeightsError, read_checkpoint, read_state_dict
from mit_semseg.models.weights import load_weights

FUZZ = float(os.environ.get("FUZZ", "1"))
TRACE = Path("/tmp/mit_semseg_must_not_exist")  # created if code in a file is executed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.fixed_dictionaries(
    {}, optional={key: JSON | st.just("a.png") for key in ("fpath_img", "fpath_segm", "width", "height", "x")}
)
LINES = st.one_of(RECORDS.map(json.dumps), JSON.map(json.dumps), st.text(max_size=30), st.just("[" * 100_000))


def examples(count):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=int(count * FUZZ), deadline=None, suppress_health_check=checks)


@given(st.lists(LINES, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
@examples(150)
def test_lists_give_valid_records_or_list_error(tmp_path, lines, separator, collect):
    path = tmp_path / "list.odgt"
    path.write_bytes(separator.join(lines).encode("utf-8", "surrogatepass"))
    try:
        records = load_records(path, tmp_path, [] if collect else None)
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


@given(st.dictionaries(st.text("abcdefgh/._-é\n", min_size=1, max_size=12), st.just(1), min_size=1, max_size=5))
@examples(60)
def test_written_lists_are_read_unchanged(tmp_path, names):
    records = [{"fpath_img": name, "fpath_segm": name[::-1]} for name in names]
    write_odgt(records, tmp_path / "list.odgt")
    assert load_records(tmp_path / "list.odgt") == records


@given(st.binary(max_size=200))
@examples(100)
def test_random_bytes_raise_user_errors(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (lambda file: load_records(file, tmp_path), read_csv, load_config):
        with contextlib.suppress(UserError):
            read(path)
    with pytest.raises(ImageFileError):
        read_image(path)


@given(st.lists(st.lists(st.text(max_size=9), max_size=4), max_size=5))
@examples(100)
def test_class_tables_are_consistent_or_raise_class_table_error(tmp_path, rows):
    path = tmp_path / "classes.csv"
    path.write_text("raw,name,color\n" + "\n".join(",".join(row) for row in rows), encoding="utf-8", errors="replace")
    try:
        table = read_csv(path)
    except ClassTableError as error:
        assert str(path) in str(error)
    else:
        assert len(table) == len(set(table.names)) == len(table.colors)


@given(JSON.map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | st.text(max_size=60))
@examples(150)
def test_yaml_files_load_or_raise_user_errors(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with contextlib.suppress(UserError):
        load_config(path)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change, delete, insert or truncate bytes, mostly near the start, where headers are."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        near_start = min(int(rng.expovariate(1 / 60)), len(content) - 1)
        position = near_start if rng.random() < 0.7 else rng.randrange(len(content))
        kind = rng.randrange(5)
        if kind == 0:
            content[position] = rng.randrange(256)
        elif kind == 1:
            content[position] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[position : position + rng.randint(1, 8)]
        elif kind == 3:
            content[position:position] = rng.randbytes(rng.randint(1, 8))
        elif len(content) > 2:
            del content[max(1, rng.randrange(len(content))) :]
        content = content or bytearray(b"x")
    return bytes(content)


def test_damaged_images_have_the_size_of_their_header_or_raise_image_file_error(tmp_path):
    rng, pixels = random.Random(0), np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    files = []
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).quantize(16)):
        for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI"):
            with contextlib.suppress(OSError, ValueError):
                file = io.BytesIO()
                image.save(file, kind)
                files.append(file.getvalue())
    path = tmp_path / "x"
    for i in range(int(900 * FUZZ)):
        path.write_bytes(damage(files[i % len(files)], rng))
        unusual_properties(path)
        with contextlib.suppress(ImageFileError):
            read_label(path)
        try:
            image = read_image(path)
        except ImageFileError as error:
            assert str(path) in str(error)
        else:
            assert image.mode == "RGB"
            assert image.size == image_size(path)


class MaliciousObject:
    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


def test_damaged_checkpoints_raise_errors_and_execute_nothing(tmp_path):
    rng, module, path = random.Random(0), TinyEncoder(), tmp_path / "x.pth"
    state = module.state_dict()
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"step": 1, "model": state}, tmp_path / "nested.pth")
    (tmp_path / "malicious.pth").write_bytes(pickle.dumps(MaliciousObject()))
    files = [file.read_bytes() for file in sorted(tmp_path.glob("*.pth"))]
    for i in range(int(300 * FUZZ)):
        content = files[i % len(files)]
        if zipfile.is_zipfile(io.BytesIO(content)) and i % 3:  # damage the pickle, with valid checksums around it
            archive = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(archive, "w") as target:
                for name in source.namelist():
                    data = source.read(name)
                    target.writestr(name, damage(data, rng) if name.endswith("data.pkl") else data)
            path.write_bytes(archive.getvalue())
        else:
            path.write_bytes(damage(content, rng))
        for read in (read_checkpoint, read_state_dict, lambda file: load_weights(module, file)):
            with contextlib.suppress(WeightsError):
                read(path)
        with contextlib.suppress(CheckpointError):
            read_resume(path)
    assert not TRACE.exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ["TRAIN.resume", "auto"]),
        ("train.py", ["TRAIN.start_epoch", 1]),
        ("train.py", ["DIR", "only_history", "TRAIN.start_epoch", 1]),
        ("train.py", ["DIR", "new", "MODEL.weights_encoder", "evil.pth"]),
        ("train.py", ["DIR", "new", "MODEL.weights_decoder", "evil.pth"]),
        ("train.py", ["DIR", "new", "TRAIN.resume", "evil.pth"]),
        ("eval.py", []),
        ("eval.py", ["VAL.checkpoint", "evil.pth"]),
        ("test.py", ["--imgs", "a.png"]),
        ("mit_semseg.export", []),
        ("mit_semseg.demo", []),
    ],
)
def test_scripts_refuse_malicious_checkpoints(tmp_path, script, words):
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    (tmp_path / "l.odgt").write_text('{"fpath_img": "a.png", "fpath_segm": "a.png", "width": 32, "height": 24}')
    for name in ("evil", "resume", "encoder_epoch_1", "decoder_epoch_1", "history_epoch_1"):
        torch.save({"x": MaliciousObject()}, tmp_path / f"{name}.pth")
    if "only_history" in words:  # with valid weights
        (tmp_path / "only_history").mkdir()
        encoder = ModelBuilder.build_encoder("resnet18", pretrained=False)
        decoder = ModelBuilder.build_decoder("c1", num_class=3, in_channels=encoder.out_channels)
        torch.save(encoder.state_dict(), tmp_path / "only_history" / "encoder_epoch_1.pth")
        torch.save(decoder.state_dict(), tmp_path / "only_history" / "decoder_epoch_1.pth")
        (tmp_path / "history_epoch_1.pth").rename(tmp_path / "only_history" / "history_epoch_1.pth")
    words = [tmp_path / word if word in ("a.png", "evil.pth", "new", "only_history") else word for word in words]
    flags, opts = (words, []) if words[:1] == ["--imgs"] else ([], words)
    device = [] if script == "mit_semseg.export" else ["--gpu", "cpu"]
    fixed = ["DIR", tmp_path, "MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "DATASET.num_class", 3]
    fixed += ["DATASET.list_train", tmp_path / "l.odgt", "DATASET.list_val", tmp_path / "l.odgt"]
    fixed += ["MODEL.pretrained", False, "VAL.checkpoint", "epoch_1.pth", "TEST.checkpoint", "epoch_1.pth"]
    done = here(script, *flags, *device, *fixed, *opts)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert ".pth" in done.stderr
    assert not TRACE.exists()
