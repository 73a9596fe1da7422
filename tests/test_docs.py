"""Commands and Python examples in README.md and docs/*.md run; linked files, anchors and option names exist.

Commands run in a folder with configuration files for short runs. A command is not run if its comment begins with
`needs` (a dataset or GPUs), `downloads`, or `serves` (until Ctrl-C).
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here
from scenes import write_pairs
from test_segmenter import write_weights

from mit_semseg.config import load_config
from mit_semseg.config.defaults import OPTIONS
from mit_semseg.dataset.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
EXECUTED = ("quickstart", "own-data", "training", "evaluation", "segmenting", "exporting", "wrong-labels", "confidence")
PUBLISHED, SMALLER = "ade20k-resnet50dilated-ppm_deepsup", "ade20k-resnet18dilated-c1_deepsup"  # SMALLER is faster


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    """Return a list with a tuple (command, comment) for every line of shell code."""
    lines = [line for block in code_blocks(page, "bash") for line in block.splitlines()]
    lines += re.findall(r"^    ((?:python|torchrun) .+)$", page.read_text(), re.MULTILINE)
    return [tuple(part.strip() for part in line.partition(" # ")[::2]) for line in lines if line.strip()]


def is_executed(comment):
    return not comment.startswith(("needs", "downloads", "serves"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_existing_files_and_options(page):
    for words in (shlex.split(part) for line, _ in commands(page) for part in line.split(" && ")):
        if words[0].startswith("./"):
            assert (ROOT / words[0]).is_file(), words
        if words[0] in ("python", "torchrun"):
            module = words[2].replace(".", "/") if words[1] == "-m" else next(w for w in words if w.endswith(".py"))
            assert (ROOT / module).with_suffix(".py").is_file() or (ROOT / module / "__main__.py").is_file(), words
            for word in words:
                if word.startswith("config/"):
                    load_config(ROOT / word)
                elif word.startswith("--") and module.startswith("benchmarks/"):
                    sources = (ROOT / module).read_text(), (ROOT / "benchmarks" / "common.py").read_text()
                    assert f'"{word}"' in "".join(sources), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_options_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in (target for target in targets if not target.startswith("https://")):
        name, _, anchor = target.partition("#")
        path = page.parent / (name or page.name)
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in [title.lower().replace(" ", "-") for title in titles], target
    named = set(re.findall(r"\b(?:DATASET|MODEL|TRAIN|RUNTIME|VAL|INFERENCE|TEST)\.[A-Za-z_]+\b", text))
    assert named <= set(OPTIONS)


def test_names_exist_in_the_linked_files():
    """docs/extending.md refers to code as `name` in [file](link)."""
    places = re.findall(r"`([\w.]+)`\s+in\s+\[[^\]]+\]\(\.\./([\w./]+)\)", (ROOT / "docs" / "extending.md").read_text())
    assert len(places) > 30
    for name, path in places:
        assert all(re.search(rf"\b{part}\b", (ROOT / path).read_text()) for part in name.split(".")), (name, path)


def test_readme_links_to_every_page():
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in PAGES[0].read_text()] == []


@pytest.mark.parametrize("page", [page for page in DOCS if "```bash" in page.read_text()], ids=lambda page: page.name)
def test_commands_are_executed_or_say_why_not(page):
    assert page.stem in EXECUTED or not any(is_executed(comment) for _, comment in commands(page))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with configurations for short runs, and with a dataset for docs/own-data.md."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "config", folder / "config")
    (own_data,) = code_blocks(ROOT / "docs" / "own-data.md", "yaml")
    (folder / "mine.yaml").write_text(own_data)
    for file, old, new in (
        ("config/quickstart.yaml", "epoch_iters: 50", "epoch_iters: 2"),
        ("mine.yaml", "num_epoch: 20", "num_epoch: 1"),
        ("mine.yaml", "[300, 375, 450]", "[64, 72]"),
    ):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
    for name in ("train", "val"):
        write_pairs(folder / "data" / "mine" / name, [(60, 45)] * 4, values=(0, 1, 2, 255))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", EXECUTED)
def test_commands_run(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    executed = [command for command, comment in commands(ROOT / "docs" / f"{name}.md") if is_executed(comment)]
    for command in executed:
        _, *words = shlex.split(command)
        module, *arguments = words[1:] if words[0] == "-m" else words
        if module == "mit_semseg.dataset.synthetic":
            arguments += ["--train", "4", "--val", "2"]
        here(module, *arguments)


def test_python_examples_run(tmp_path, monkeypatch):
    write_weights(tmp_path / "cache" / SMALLER, *SMALLER.split("-")[1:], "epoch_20.pth", 150)
    write_weights(tmp_path / "ckpt" / "quickstart", "mobilenetv2dilated", "c1_deepsup", "epoch_4.pth", 7)
    write_weights(tmp_path, "resnet18dilated", "ppm_deepsup", "epoch_20.pth", 150)
    write_dataset(tmp_path / "data" / "quickstart", train=1, val=1)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 60, 3), np.uint8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path / "cache"))
    (short,) = code_blocks(PAGES[0], "python")
    segmenting, sharing, _, networks = code_blocks(ROOT / "docs" / "python.md", "python")  # the third needs the hub
    names = {"image": torch.zeros(1, 3, 64, 64)}
    with torch.no_grad():
        exec(networks, names)
        exec(short.replace(PUBLISHED, SMALLER), names)
        exec(segmenting, names)
        exec(sharing, names)
    assert (tmp_path / "overlay.png").is_file()
    assert names["class_probabilities"].shape == (1, 150, 480, 640)
    assert names["logits"].shape == (1, 150, 8, 8)
    assert names["probabilities"].shape == (3, 45, 60)
    assert {p.name for p in (tmp_path / "segmented").iterdir()} == {"image.json", "image.png", "image_index.png"}
