"""Read and check configurations from YAML files and command lines."""

import argparse
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import yaml
from yacs.config import CfgNode

from ..lib.utils import closest, expand_path
from .defaults import OPTIONS
from .validation import ConfigError, check_combinations, convert, unknown_option

BASE_KEY = "_BASE_"
SECTIONS = {key.split(".")[0] for key in OPTIONS if "." in key}
Setting = tuple[str, object, str]  # name of an option, its value, and the file (or "command line") that sets it


class Config(CfgNode):
    """A yacs node. Its merge methods check all options and raise ConfigError if one of them is invalid."""

    def option(self, key: str) -> object:
        """Return the value of an option. `key` is its full name, e.g. `TRAIN.seed`."""
        node, name = _locate(self, key)
        return node[name]

    def differences(self) -> dict[str, object]:
        """Return `{name: value}` for all options whose values are not the defaults."""
        return {key: self.option(key) for key, option in OPTIONS.items() if self.option(key) != option.default}

    def merge_from_file(self, cfg_filename: str | os.PathLike) -> None:
        _merge(self, _read_yaml(Path(cfg_filename)))

    def merge_from_list(self, cfg_list: Iterable[str]) -> None:
        _merge(self, _read_list(list(cfg_list)))


def _locate(config: Config, key: str) -> tuple[Config, str]:
    """Return the node that contains an option (created if missing), and the option's name in this node."""
    section, _, name = key.rpartition(".")
    return (config.setdefault(section, Config()) if section else config), name


def _default_config() -> Config:
    config = Config()
    for key, option in OPTIONS.items():
        node, name = _locate(config, key)
        node[name] = option.default
    return config


cfg = _default_config()


def load_config(path: str | os.PathLike | None = None, opts: Iterable[str] = ()) -> Config:
    """Return a frozen configuration. The YAML file overrides the defaults, and `opts` overrides the file.

    `opts` is `[key, value, ...]` or `["key=value", ...]`. Raise ConfigError, which lists all problems, if there
    are unknown options, invalid values or conflicts. Changes to the global `cfg` do not affect the result.
    """
    config = _default_config()
    settings = _read_yaml(Path(expand_path(os.fspath(path)))) if path else []
    _merge(config, [*settings, *_read_list(list(opts))])
    config.freeze()
    return config


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the arguments `--cfg FILE` and `KEY VALUE ...` to a parser. `load_config` takes their values."""
    text = f"YAML file with options (default: {default or 'none'})"
    parser.add_argument("--cfg", metavar="FILE", type=expand_path, default=default, help=text)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="options, e.g. TRAIN.num_epoch 10")


def _merge(config: Config, settings: list[Setting]) -> None:
    """Apply all settings if they are valid; otherwise change nothing and raise ConfigError."""
    problems, accepted = [], {}
    for key, value, origin in settings:
        try:
            if key in OPTIONS:
                accepted[key] = convert(key, value)
            elif key in config and key not in SECTIONS:
                accepted[key] = _resolve(value)  # not an option, but added to the node by the caller
            else:
                problems.append(f"{unknown_option(key, value)} [{origin}]")
        except ValueError as error:
            problems.append(f"{error} [{origin}]")
    problems += check_combinations({key: config.option(key) for key in OPTIONS} | accepted)
    if problems:
        raise ConfigError(problems)
    for key, value in accepted.items():
        node, name = _locate(config, key)
        node[name] = value


def _resolve(value: object) -> object:
    """Parse text, also inside lists, with `yaml.safe_load`. Return invalid YAML unchanged."""
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
        raise ConfigError([f"expected KEY VALUE, got files {files[0]}, {files[1]} ...; quote patterns such as '*.jpg'"])
    if len(words) % 2:
        raise ConfigError([f"{words[-1]}: the value is missing; write options as KEY VALUE [command line]"])
    return [(key, value, "command line") for key, value in zip(words[::2], words[1::2], strict=True)]


class _Loader(yaml.BaseLoader):
    """Refuses repeated keys. Returns scalars as text, so that class names such as `no` and `010` are not converted.

    Later, `convert` parses the text according to the type of the option.
    """

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"{name} is given twice, in lines {lines[name]} and {line}; remove one")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, children: tuple[Path, ...] = ()) -> list[Setting]:
    """Return the settings of the `_BASE_` file, followed by those of `path`. `children`: files based on `path`."""
    chain = (*children, Path(os.path.abspath(path)))
    if chain[-1] in children:
        raise ConfigError([f"{path}: {BASE_KEY} files form a cycle: {' -> '.join(p.name for p in chain)}"])
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        files = (str(file) for folder in (path.parent, Path("config")) for file in folder.glob("*.y*ml"))
        raise ConfigError([f"{path}: file not found{closest(str(path), files)}"]) from None
    except Exception as error:  # PyYAML raises exceptions of many types for invalid files
        raise ConfigError([f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, Mapping):
        raise ConfigError([f"{path}: expected sections such as TRAIN and MODEL, got {type(content).__name__}"])
    base = content.pop(BASE_KEY, None)
    settings = _read_yaml(path.parent / expand_path(str(base)), chain) if base else []
    for section, value in content.items():
        if isinstance(value, Mapping):
            settings += [(f"{section}.{key}", inner, str(path)) for key, inner in value.items()]
        elif value or section not in SECTIONS:  # skip empty sections
            settings.append((section, value, str(path)))
    return settings
