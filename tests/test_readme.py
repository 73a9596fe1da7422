"""What the README says is there and works: commands, files, the YAML, the Python lines."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_segmenter import PIXELS, write_weights

from mit_semseg.config import load_config
from mit_semseg.config.defaults import OPTIONS
from mit_semseg.dataset.synthetic import write_dataset
from mit_semseg.models import ModelBuilder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [part.strip() for line in lines for part in line.split("&&")]


def test_there_are_commands_and_the_first_two_are_the_promised():
    assert commands()[:8] == [
        "git clone ADDRESS_OF_THIS_REPOSITORY mit_semseg",
        "cd mit_semseg",
        "python3 -m venv venv",
        "source venv/bin/activate",
        "pip install -e .",
        "./demo_test.sh",
        'pip install -e ".[test]"',
        "pytest",
    ]


def test_the_picture_is_shown_at_its_size():
    width = int(re.search(r'docs/quickstart\.png" [^>]*width="(\d+)"', README)[1])
    assert Image.open(ROOT / "docs" / "quickstart.png").width == width


@pytest.mark.parametrize("command", commands())
def test_command_names_what_exists(command):
    parts = shlex.split(command)
    if parts[0].startswith("./"):
        assert (ROOT / parts[0]).stat().st_mode & 0o100
    if parts[0] == "python" and parts[1] == "-m":
        assert (ROOT / (parts[2].replace(".", "/") + ".py")).is_file()
    elif parts[0] == "python":
        assert (ROOT / parts[1]).is_file()
    if "--cfg" in parts and parts[parts.index("--cfg") + 1].startswith("config/"):
        load_config(ROOT / parts[parts.index("--cfg") + 1])


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)h][^)]*)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(targets) > 5
    for target in targets:
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_yaml_block_loads(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(block)
    assert load_config(tmp_path / "mine.yaml").DATASET.classes == ("road", "car", "other")


def test_python_block_runs(tmp_path, monkeypatch):
    _, block = blocks("python")
    monkeypatch.chdir(tmp_path)
    encoder = ModelBuilder.build_encoder("resnet18dilated", pretrained=False)
    torch.save(encoder.state_dict(), "encoder_epoch_20.pth")
    torch.save(ModelBuilder.build_decoder("ppm_deepsup", fc_dim=512).state_dict(), "decoder_epoch_20.pth")
    names = {"image": torch.zeros(1, 3, 64, 64)}
    with torch.no_grad():
        exec(block, names)
    assert names["scores"].shape == (1, 150, 480, 640)


def test_every_published_recipe_is_listed():
    for path in (ROOT / "config").glob("ade20k-*.yaml"):
        assert f"`{path.stem}`" in README + (ROOT / "docs/version-1.md").read_text()


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "config").glob("*.yaml")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_that_a_page_names_exist(page):
    named = set(re.findall(r"\b(?:DATASET|MODEL|TRAIN|VAL|INFERENCE|TEST)\.[A-Za-z_]+\b", page.read_text()))
    assert named <= set(OPTIONS)


def test_segmenter_block_runs(tmp_path, monkeypatch):
    """With a network of random weights in place of the quick start's."""
    block, _ = blocks("python")
    write_weights(tmp_path / "ckpt" / "quickstart", "mobilenetv2dilated", "c1_deepsup", "epoch_4.pth", 7)
    write_dataset(tmp_path / "data" / "quickstart", train=1, val=1)
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "quickstart.yaml", tmp_path / "config")
    Image.fromarray(PIXELS).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["probabilities"].shape == (3, *PIXELS.shape[:2])
    assert sorted(p.name for p in (tmp_path / "segmented").iterdir()) == [
        "picture.json",
        "picture.png",
        "picture_index.png",
    ]
