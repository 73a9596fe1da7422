"""Imports between packages go in one direction only, and importing has no side effects."""

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mit_semseg.models import ENCODERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mit_semseg"
# A package may import the packages before it in this list, except for those removed below.
LAYERS = ["lib", "config", "dataset", "models", "evaluation", "engine", "build", "predict", "cli"]
ALLOWED = {layer: set(LAYERS[:position]) for position, layer in enumerate(LAYERS)}
for layer in ("dataset", "models"):
    ALLOWED[layer] -= {"dataset"}
for layer in ("models", "evaluation", "engine"):
    ALLOWED[layer] -= {"config"}
ALLOWED |= {"export": {"cli"}, "demo": {"cli"}, "utils": set(LAYERS)}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    here = ("mit_semseg", *path.relative_to(PACKAGE).with_suffix("").parts)
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            full = (*base, *(node.module.split(".") if node.module else ()))
            names = [full] if len(full) > 1 else [(*full, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        packages |= {name[1] for name in names if name[0] == "mit_semseg" and len(name) > 1}
    return packages


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=str)
def test_imports_go_one_way(path):
    package = package_of(path)
    assert imported_packages(path) - {package} <= ALLOWED[package]


def test_import_rule_covers_every_package():
    assert {package_of(path) for path in FILES} - {"__init__"} == set(ALLOWED)
    assert "models" in imported_packages(PACKAGE / "build.py")


def test_imports_write_print_and_download_nothing(tmp_path):
    """Import every module in an empty folder."""
    modules = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = f"import offline; offline.forbid()\nfor name in {modules!r}: __import__(name)\nimport hubconf"
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PATH": "", "HOME": str(tmp_path)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_import_by_path_under_another_name(tmp_path):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("segkit", {str(PACKAGE / "__init__.py")!r})
module = importlib.util.module_from_spec(spec); sys.modules["segkit"] = module; spec.loader.exec_module(module)
import segkit.models, segkit.config
print(len(segkit.models.ENCODERS), segkit.config.cfg.DATASET.num_class)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(len(ENCODERS)), "150"], done.stderr


def test_network_access_of_tests_is_blocked():
    with pytest.raises(PermissionError, match="tests do not use the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(PermissionError, match="tests do not use the network"):
        socket.getaddrinfo("example.org", 80)
