"""Read YAML files and command lines into a checked configuration."""

import argparse
import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import getitem
from pathlib import Path

import yaml
from yacs.config import CfgNode

from ..lib.utils import expand_path
from .defaults import OPTIONS
from .validation import ConfigError, check_combinations, convert, unknown_option

BASE_KEY = "_BASE_"
SECTIONS = {key.split(".")[0] for key in OPTIONS if "." in key}
Setting = tuple[str, object, str]  # option, value, origin (file or command line)


class Config(CfgNode):
    """A yacs node. Merging options checks them and raises ConfigError with all errors."""

    def option(self, key: str) -> object:
        """Return the value of an option, e.g. `TRAIN.seed`."""
        return functools.reduce(getitem, key.split("."), self)

    def differences(self) -> dict[str, object]:
        """Return the options that differ from their defaults."""
        return {key: self.option(key) for key, option in OPTIONS.items() if self.option(key) != option.default}

    def merge_from_file(self, cfg_filename: str | os.PathLike) -> None:
        _merge(self, _read_yaml(Path(cfg_filename)))

    def merge_from_list(self, cfg_list: Iterable[str]) -> None:
        _merge(self, _read_list(list(cfg_list)))


def _default_config() -> Config:
    root = Config()
    for key, option in OPTIONS.items():
        section, _, name = key.rpartition(".")
        node = root.setdefault(section, Config()) if section else root
        node[name] = option.default
    return root


cfg = _default_config()


def load_config(path: str | os.PathLike | None = None, opts: Iterable[str] = ()) -> Config:
    """Return a frozen configuration: the defaults, changed by a YAML file and then by a command line.

    `opts` is `[key, value, ...]` or `["key=value", ...]`. Changes of the global `cfg` have no effect. Raise ConfigError
    with all unknown options, wrong values and conflicts, and their origin.
    """
    config = _default_config()
    settings = _read_yaml(Path(expand_path(os.fspath(path)))) if path else []
    _merge(config, [*settings, *_read_list(list(opts))])
    config.freeze()
    return config


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--cfg FILE` and trailing `KEY VALUE ...` to a parser, as arguments for `load_config`."""
    text = f"YAML file (default: {default or 'none'})"
    parser.add_argument("--cfg", metavar="FILE", type=expand_path, default=default, help=text)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="options, e.g. TRAIN.num_epoch 10")


def _merge(config: Config, settings: list[Setting]) -> None:
    """Set options after checking all of them."""
    problems, accepted = [], {}
    for key, value, origin in settings:
        try:
            if key in OPTIONS:
                accepted[key] = convert(key, value)
            elif key in config and key not in SECTIONS:
                accepted[key] = _resolve(value)  # an attribute added by the caller
            else:
                problems.append(f"{unknown_option(key, value)} [{origin}]")
        except ValueError as error:
            problems.append(f"{error} [{origin}]")
    problems += check_combinations({key: config.option(key) for key in OPTIONS} | accepted)
    if problems:
        raise ConfigError(problems)
    for key, value in accepted.items():
        section, _, name = key.rpartition(".")
        node = config[section] if section else config
        node[name] = value


def _resolve(value: object) -> object:
    """Convert text, also in a list, as `yaml.safe_load` does; leave other text unchanged."""
    if isinstance(value, list):
        return [_resolve(item) for item in value]
    with suppress(yaml.YAMLError, ValueError):
        return yaml.safe_load(value) if isinstance(value, str) else value
    return value


def _read_list(opts: list[str]) -> list[Setting]:
    words = []
    for opt in opts:
        match = re.fullmatch(r"(DIR|[A-Z]+\.\w+)=(.*)", opt, re.DOTALL) if isinstance(opt, str) else None
        words += match.groups() if match else [opt]
    files = [word for word in words if isinstance(word, str) and word not in OPTIONS and os.path.isfile(word)]
    if len(files) > 1 and any(word in files for word in words[::2]):
        raise ConfigError([f"{files[0]}, {files[1]} ...: expected KEY VALUE; quote a file pattern, e.g. '*.jpg'"])
    if len(words) % 2:
        raise ConfigError([f"{words[-1]}: value is missing; options are pairs KEY VALUE [command line]"])
    return [(key, value, "command line") for key, value in zip(words[::2], words[1::2], strict=True)]


def _read_yaml(path: Path, children: tuple[Path, ...] = ()) -> list[Setting]:
    """Read a YAML file after the file it is based on. `children` are the files based on this one."""
    chain = (*children, Path(os.path.abspath(path)))
    if chain[-1] in children:
        raise ConfigError([f"{path}: {BASE_KEY} refers back to itself: {' -> '.join(p.name for p in chain)}"])
    try:
        # The base loader reads every scalar as text, which `convert` parses by the type of the option: class names such
        # as `no` and `010` stay text.
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except FileNotFoundError:
        raise ConfigError([f"{path}: file not found{_suggest_file(path)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    except Exception as error:  # PyYAML raises exceptions of many types for invalid files
        raise ConfigError([f"{path}: not a valid YAML file: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, Mapping):
        raise ConfigError([f"{path}: expected sections such as TRAIN: and MODEL:, got {type(content).__name__}"])
    base = content.pop(BASE_KEY, None)
    settings = _read_yaml(path.parent / expand_path(str(base)), chain) if base else []
    for section, value in content.items():
        if isinstance(value, Mapping):
            settings += [(f"{section}.{key}", inner, str(path)) for key, inner in value.items()]
        elif value or section not in SECTIONS:  # skip empty sections
            settings.append((section, value, str(path)))
    return settings


def _suggest_file(path: Path) -> str:
    files = [file for folder in (path.parent, Path("config")) for file in sorted(folder.glob("*.y*ml"))]
    near = difflib.get_close_matches(path.stem, [file.stem for file in files], n=1, cutoff=0.3)
    return f"; did you mean {next(file for file in files if file.stem == near[0])}?" if near else ""
