"""Random and malicious files are read or refused with an error, and code in them is not executed.

`FUZZ=20 pytest tests/faults/test_fuzz.py` tries twenty times as many examples as the default.
"""

import contextlib
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import here
from scenes import options, write_pairs

from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset
from mit_semseg.dataset.image_io import ImageFileError, image_size, read_image, read_label, unusual_properties
from mit_semseg.dataset.layouts import ListError
from mit_semseg.dataset.records import load_records
from mit_semseg.lib.utils import UserError

FUZZ = float(os.environ.get("FUZZ", "1"))
TRACE = Path("/tmp/mit_semseg_must_not_exist")  # the malicious code creates this file

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=8), SCALARS, max_size=3)
RECORDS = st.dictionaries(st.sampled_from(["fpath_img", "fpath_segm", "width", "height"]), JSON | st.just("a.png"))
LINES = st.one_of(RECORDS.map(json.dumps), JSON.map(json.dumps), st.text(max_size=30), st.just("[" * 100_000))


examples = settings(max_examples=int(150 * FUZZ), deadline=None, suppress_health_check=list(HealthCheck))


@given(st.lists(LINES, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
@examples
def test_lists_give_valid_records_or_list_error(tmp_path, lines, separator, collect):
    path = tmp_path / "list.odgt"
    path.write_bytes(separator.join(lines).encode("utf-8", "surrogatepass"))
    try:
        records = load_records(path, tmp_path, [] if collect else None)
    except ListError as error:
        assert str(path) in str(error)
        return
    assert all(record["fpath_img"] and record.get("width", 1) >= 0 for record in records)
    dataset = ValDataset(tmp_path, records, options(on_error="skip"))
    assert all("error" in dataset[i] for i in range(len(dataset)))


@given(JSON.map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | st.text(max_size=60))
@examples
def test_yaml_files_load_or_raise_user_errors(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with contextlib.suppress(UserError):
        load_config(path)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return the content after random bytes were changed, mostly in the header; it is sometimes truncated."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position = (
            min(int(rng.expovariate(1 / 60)), len(content)) if rng.random() < 0.7 else rng.randrange(len(content))
        )
        content[position : position + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 8))
        content = content or bytearray(b"x")
    return bytes(content[: rng.randint(1, len(content))] if rng.random() < 0.2 else content)


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


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ["TRAIN.resume", "auto"]),
        ("train.py", ["TRAIN.start_epoch", 1]),
        ("train.py", ["DIR", "new", "MODEL.weights_encoder", "evil.pth"]),
        ("eval.py", []),
        ("test.py", ["--imgs", "images"]),
        ("mit_semseg.export", []),
        ("mit_semseg.demo", []),
    ],
)
def test_scripts_refuse_malicious_checkpoints(tmp_path, script, words):
    write_pairs(tmp_path, [(32, 24)])
    for name in ("evil", "resume", "encoder_epoch_1", "decoder_epoch_1", "history_epoch_1"):
        torch.save({"x": MaliciousObject()}, tmp_path / f"{name}.pth")
    words = [tmp_path / word if word in ("images", "evil.pth", "new") else word for word in words]
    device = [] if script == "mit_semseg.export" else ["--gpu", "cpu"]
    fixed = ["DIR", tmp_path, "MODEL.arch_encoder", "resnet18", "MODEL.arch_decoder", "c1", "DATASET.num_class", 3]
    fixed += ["DATASET.list_train", tmp_path, "DATASET.list_val", tmp_path, "MODEL.pretrained", False]
    fixed += ["VAL.checkpoint", "epoch_1.pth", "TEST.checkpoint", "epoch_1.pth"]
    assert ".pth" in here(script, *device, *fixed, *words, code=2).stderr
    assert not TRACE.exists()
