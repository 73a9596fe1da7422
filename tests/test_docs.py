"""The pages of docs/: their commands are run, one after the other, as someone would who pastes them.

In a folder of its own, with fewer steps of training. What cannot be run here says why in a comment at its end: it needs
the network, a download, GPUs or several machines, or it serves until it is stopped (and is then started and stopped).
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from runs import ROOT, here
from scenes import write_pairs

PAGES = sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = ("download", "network", "GPUs", "machines")
RUN = ("quickstart", "own-data", "evaluation", "exporting")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    """(command, what its comment says) of every line."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    return [(line.split("  #")[0].split(" # ")[0].strip(), line.partition("# ")[2]) for line in lines]


def is_run_here(note):
    return not note.startswith(ELSEWHERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the checkout offers, with less training, and a data set of one's own."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "config", folder / "config")
    config = folder / "config" / "quickstart.yaml"
    text = config.read_text()
    assert "epoch_iters: 50" in text
    config.write_text(text.replace("epoch_iters: 50", "epoch_iters: 2"))
    (mine,) = blocks(ROOT / "docs" / "own-data.md", "yaml")
    for text, shorter in (("num_epoch: 30", "num_epoch: 1"), ("[300, 375, 450]", "[64, 72]")):
        assert text in mine
        mine = mine.replace(text, shorter)
    (folder / "mine.yaml").write_text(mine)
    for name in ("train", "val"):
        write_pairs(folder / "data" / "mine" / name, [(60, 45)] * 4, values=(0, 1, 2, 255))
    return folder


def test_every_page_has_its_commands_run_or_says_why_not():
    for page in PAGES:
        for command, note in commands(page):
            assert page.stem in RUN or not is_run_here(note), (page.name, command)


@pytest.mark.long
@pytest.mark.parametrize("name", RUN)
def test_commands(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command, note in commands(ROOT / "docs" / f"{name}.md"):
        if not is_run_here(note):
            continue
        program, *words = shlex.split(command)
        assert program == "python", command
        module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        if note.startswith("serves"):
            serve(module, arguments, folder)
            continue
        if module == "mit_semseg.dataset.synthetic":
            arguments += ["--train", "4", "--val", "2"]
        done = here(module, *arguments)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr)


def serve(module, arguments, folder):
    """Start what serves, see that it does, and stop it as its user would."""
    command = [sys.executable, "-m", module, *arguments, "--port", "0"]
    job = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert any("the page is at http://127.0.0.1" in line for line in job.stdout)
    finally:
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 130


def test_pages_and_links_exist():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)h#][^)#]*)", text) + re.findall(r'src="([^"]+)"', text):
            assert (page.parent / target).exists(), (page.name, target)


def test_guarantees_are_checked_by_tests_that_exist():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in source] == []


def test_every_page_can_be_found_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert f"docs/{page.name}" in readme, page.name


def test_benchmarks_that_the_page_names_exist():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    named = re.findall(r"^    python (benchmarks/\w+\.py)(.*)$", text, re.MULTILINE)
    assert len(named) > 8
    for script, words in named:
        source = (ROOT / script).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        for option in re.findall(r"--[a-z]+", words):
            assert f'"{option}"' in source, (script, option)
