"""Read YAML files and command lines into a checked configuration."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
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
    """A yacs node that checks merged options. It can be cloned, frozen, dumped and given new attributes."""

    def option(self, key: str) -> object:
        """Return the value of an option, e.g. `TRAIN.seed`."""
        node = self
        for part in key.split("."):
            node = node[part]
        return node

    def differences(self) -> dict[str, object]:
        """Return the options that differ from their defaults."""
        return {key: self.option(key) for key, option in OPTIONS.items() if self.option(key) != option.default}

    def merge_from_file(self, cfg_filename: str | os.PathLike) -> None:
        """Merge a YAML file and its `_BASE_` files. Raise ConfigError with all errors."""
        _merge(self, _read_yaml(Path(cfg_filename)))

    def merge_from_list(self, cfg_list: Iterable[str]) -> None:
        """Merge `[key, value, ...]`, e.g. `["TRAIN.num_epoch", "10"]`. Raise ConfigError with all errors."""
        _merge(self, _read_list(list(cfg_list)))


def _default_config() -> Config:
    root = Config()
    for key, option in OPTIONS.items():
        *sections, name = key.split(".")
        node = root
        for section in sections:
            node = node.setdefault(section, Config())
        node[name] = option.default
    return root


cfg = _default_config()


def load_config(path: str | os.PathLike | None = None, opts: Iterable[str] = ()) -> Config:
    """Return a frozen configuration: the defaults, changed by a YAML file and then by a command line.

    Changes of the global `cfg` have no effect.

    Args:
        path: YAML file, or None.
        opts: `[key, value, ...]` or `["key=value", ...]`.

    Raises:
        ConfigError: lists all unknown options, wrong values and conflicts, with their origin.
    """
    config = _default_config()
    settings = _read_yaml(Path(expand_path(os.fspath(path)))) if path else []
    _merge(config, [*settings, *_read_list(list(opts))])
    config.freeze()
    return config


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--cfg FILE` and trailing `KEY VALUE ...` to a parser, as arguments for `load_config`."""
    parser.add_argument(
        "--cfg", metavar="FILE", type=expand_path, default=default, help=f"YAML file (default: {default or 'none'})"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="options, e.g. TRAIN.num_epoch 10")


def _merge(config: Config, settings: list[Setting]) -> None:
    """Set options after checking all of them."""
    problems, accepted = [], {}
    for key, value, origin in settings:
        try:
            if key in OPTIONS:
                accepted[key] = convert(key, value)
            elif key in config and key not in SECTIONS:
                accepted[key] = value  # an attribute added by the caller
            else:
                problems.append(f"{unknown_option(key, value)} [{origin}]")
        except ValueError as error:
            problems.append(f"{error} [{origin}]")
    problems += check_combinations({key: config.option(key) for key in OPTIONS} | accepted)
    if problems:
        raise ConfigError(problems)
    for key, value in accepted.items():
        *sections, name = key.split(".")
        node = config.option(sections[0]) if sections else config
        node[name] = value


def _read_list(opts: list[str]) -> list[Setting]:
    opts = [word for opt in opts for word in _split_assignment(opt)]
    keys = [opt for opt in opts[::2] if isinstance(opt, str) and opt not in OPTIONS]
    files = [opt for opt in opts if isinstance(opt, str) and os.path.isfile(opt)]
    if len(files) > 1 and any(key in files for key in keys):
        problem = f"{files[0]}, {files[1]} ...: expected KEY VALUE, got files; quote a file pattern, e.g. '*.jpg'"
        raise ConfigError([problem])
    if len(opts) % 2:
        raise ConfigError([f"{opts[-1]}: value is missing; options are pairs KEY VALUE [command line]"])
    return [(key, value, "command line") for key, value in zip(opts[::2], opts[1::2], strict=True)]


def _split_assignment(word: object) -> list:
    """Split `KEY=VALUE` into two words."""
    key, equals, value = word.partition("=") if isinstance(word, str) else ("", "", "")
    return [key, value] if equals and re.fullmatch(r"DIR|[A-Z]+\.\w+", key) else [word]


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
    inherited = _read_yaml(path.parent / expand_path(str(base)), chain) if base else []
    return [*inherited, *((key, value, str(path)) for key, value in _flatten(content))]


def _suggest_file(path: Path) -> str:
    files = [file for folder in (path.parent, Path("config")) for file in sorted(folder.glob("*.y*ml"))]
    near = difflib.get_close_matches(path.stem, [file.stem for file in files], n=1, cutoff=0.3)
    return f"; did you mean {next(file for file in files if file.stem == near[0])}?" if near else ""


def _flatten(content: Mapping) -> Iterator[tuple[str, object]]:
    """Yield dotted names and values."""
    for section, value in content.items():
        if isinstance(value, Mapping):
            yield from ((f"{section}.{key}", inner) for key, inner in value.items())
        elif value or section not in SECTIONS:  # skip empty sections
            yield section, value
