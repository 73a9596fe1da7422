"""Commands, examples and tables in README.md agree with the repository. test_docs.py tests links and options."""

import re

from test_docs import ROOT, code_blocks, commands

from mit_semseg.config import load_config

PATH = ROOT / "README.md"
README = PATH.read_text()


def test_first_commands_install_and_run_the_demo():
    assert [command for command, _ in commands(PATH)][:3] == [
        "git clone ADDRESS_OF_THIS_REPOSITORY mit_semseg && cd mit_semseg",
        "python3 -m venv venv && source venv/bin/activate",
        "pip install -e . && ./demo_test.sh",
    ]
    assert (ROOT / "demo_test.sh").stat().st_mode & 0o100


def test_yaml_example_loads(tmp_path):
    (block,) = code_blocks(PATH, "yaml")
    (tmp_path / "mine.yaml").write_text(block)
    assert load_config(tmp_path / "mine.yaml").DATASET.classes == ("road", "car", "other")


def test_published_results_are_those_of_the_configurations():
    """The metrics are also in docs/models.md, which is generated from comments in the configuration files."""
    models = dict(re.findall(r"`(ade20k-[\w-]+)`(.*)", (ROOT / "docs" / "models.md").read_text()))
    rows = dict(re.findall(r"^\| [^|]+ \| `(ade20k-[\w-]+)`(.*)", README, re.MULTILINE))
    assert len(rows) == 9
    for name, row in rows.items():
        assert set(re.findall(r"\d\d\.\d\d", row)) <= set(re.findall(r"\d\d\.\d\d", models[name])), name


def test_table_of_paths_lists_every_package():
    paths = re.findall(r"`([\w./]+)`", README.split("## Where things are")[1].split("## Documentation")[0])
    packages = [path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "mit_semseg").glob("*/__init__.py")]
    assert set(packages) <= set(paths)
    assert all((ROOT / path).exists() for path in paths if "/" in path or path.endswith(".py"))
