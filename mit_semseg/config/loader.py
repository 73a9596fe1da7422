"""Reading YAML files and command lines into a checked configuration."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from yacs.config import CfgNode

from ..lib.utils import expand_path
from .defaults import OPTIONS
from .validation import ConfigError, contradictions, convert, unknown_key

BASE_KEY = "_BASE_"
_NULL, _TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
MOST_VALUES = 100_000  # of a YAML file, whose lists of class names are its longest


class Config(CfgNode):
    """A yacs node whose merges know the options: types, ranges, `_BASE_` files, and one error for all problems.

    Like any `CfgNode` it can be cloned, frozen, dumped, and given new attributes.
    """

    def option(self, key: str) -> object:
        """Value of an option by its dotted name, e.g. `TRAIN.seed`."""
        node = self
        for part in key.split("."):
            node = node[part]
        return node

    def differences(self) -> dict[str, object]:
        """Options that differ from the defaults, by dotted name."""
        return {key: self.option(key) for key, option in OPTIONS.items() if self.option(key) != option.default}

    def merge_from_file(self, cfg_filename: str | os.PathLike) -> None:
        """Merge a YAML file (and the files it is based on).

        Raises:
            ConfigError: anything in it is wrong.
        """
        _merge(self, _read_yaml(Path(cfg_filename)))

    def merge_from_list(self, cfg_list: Iterable[str]) -> None:
        """Merge `[key, value, key, value, ...]`, e.g. `["TRAIN.num_epoch", "10"]`.

        Raises:
            ConfigError: anything in it is wrong.
        """
        _merge(self, _read_list(list(cfg_list)))


def _default_config() -> Config:
    root = Config()
    for key, option in OPTIONS.items():
        *sections, leaf = key.split(".")
        node = root
        for section in sections:
            if section not in node:
                node[section] = Config()
            node = node[section]
        node[leaf] = option.default
    return root


cfg = _default_config()


def load_config(path: str | os.PathLike | None = None, opts: Iterable[str] = ()) -> Config:
    """The defaults, changed by a YAML file and then by a command line; checked and frozen.

    The global `cfg`, which callers may have changed, is not read.

    Args:
        path: YAML file; None takes the defaults.
        opts: `[key, value, ...]` or `["key=value", ...]`, as at the end of a command line.

    Raises:
        ConfigError: lists every unknown key, wrong type, number out of range and contradiction, with their origin.
    """
    node = _default_config()
    given = _read_yaml(Path(expand_path(os.fspath(path)))) if path else []
    _merge(node, [*given, *_read_list(list(opts))])
    node.freeze()
    return node


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Give a parser `--cfg FILE` and the trailing `KEY VALUE ...`, to be handed to `load_config`."""
    parser.add_argument(
        "--cfg", metavar="FILE", type=expand_path, default=default, help=f"YAML file (default: {default or 'none'})"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="options to change, e.g. TRAIN.num_epoch 10")


def _merge(node: Config, given: list[tuple[str, object, str]]) -> None:
    """Set (key, value, origin) triples on a node; all problems are collected before anything is raised."""
    problems, accepted = [], {}
    for key, value, origin in given:
        try:
            if key not in OPTIONS and key in node:
                accepted[key] = value  # an attribute that the caller has added
            elif key not in OPTIONS:
                problems.append(f"{unknown_key(key)} [{origin}]" if key else f"{value} [{origin}]")
            else:
                accepted[key] = convert(key, value)
        except ValueError as error:
            problems.append(f"{error} [{origin}]")
    values = {key: node.option(key) for key in OPTIONS} | accepted
    problems += contradictions(values)
    if problems:
        raise ConfigError(problems)
    for key, value in accepted.items():
        *sections, leaf = key.split(".")
        target = node
        for section in sections:
            target = target[section]
        target[leaf] = value


def _read_list(opts: list[str]) -> list[tuple[str, object, str]]:
    opts = [word for opt in opts for word in _key_and_value(opt)]
    keys = [opt for opt in opts[::2] if isinstance(opt, str) and opt not in OPTIONS]
    files = [opt for opt in opts if isinstance(opt, str) and os.path.isfile(opt)]
    if len(files) > 1 and any(key in files for key in keys):
        raise ConfigError([f"{files[0]}, {files[1]} ...: files where options belong; put a pattern in quotes, '*.jpg'"])
    if len(opts) % 2:
        raise ConfigError([f"{opts[-1]}: options come in pairs KEY VALUE, the last has no value [command line]"])
    return [(key, value, "command line") for key, value in zip(opts[::2], opts[1::2], strict=True)]


def _key_and_value(opt: object) -> list:
    """`KEY=VALUE` as two words; any other word as it is."""
    key, equals, value = opt.partition("=") if isinstance(opt, str) else ("", "", "")
    is_key = equals and re.fullmatch(r"DIR|[A-Z]+\.\w+", key)
    return [key, value] if is_key else [opt]


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, object, str]]:
    """(key, value, origin) of a YAML file, those of the file it is based on first."""
    try:
        chain = (*above, path.resolve())
        content = _loaded(path.read_text(encoding="utf-8")) if path.resolve() not in above else None
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file{_closest(path)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    except Exception as error:  # the reader meets what it does not understand, a 31st of June, with any exception
        raise ConfigError([f"{path} is no YAML file: {' '.join(str(error).split())}"]) from None
    if chain[-1] in above:
        raise ConfigError([f"{path} is based on itself: {' -> '.join(p.name for p in chain)}"])
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError([f"{path}: expected sections such as TRAIN: and MODEL:, found {type(content).__name__}"])
    content = dict(content)
    base = content.pop(BASE_KEY, None)
    inherited = _read_yaml(path.parent / expand_path(str(base)), chain) if base else []
    return inherited + list(_flatten(content, str(path)))


def _closest(path: Path) -> str:
    """The YAML file whose name is most like that of a missing one, in its folder or in config/."""
    there = [found for folder in (path.parent, Path("config")) for found in sorted(folder.glob("*.y*ml"))]
    near = difflib.get_close_matches(path.stem, [found.stem for found in there], n=1, cutoff=0.3)
    return f"; did you mean {next(found for found in there if found.stem == near[0])}?" if near else ""


def _loaded(text: str) -> object:
    """The values of a YAML text.

    Raises:
        ValueError: with what its aliases stand for it would be a huge one: some lines can stand for gigabytes.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
        if node is None:
            return None
        _keep_words(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_words(node: yaml.Node, prefix: str = "") -> None:
    """Mark the values of options that take text as text: YAML reads no, 010 and 2024-01-02 as other things."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not prefix:
            _keep_words(value, f"{name}.")
        elif name in OPTIONS and str in OPTIONS[name].types:
            listed = isinstance(value, yaml.SequenceNode)
            for word in value.value if listed else [value]:
                if isinstance(word, yaml.ScalarNode) and (listed or word.tag != _NULL):
                    word.tag = _TEXT


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, those of an alias counted wherever it stands."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # of one that is part of itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _flatten(content: Mapping, origin: str, prefix: str = ""):
    sections = {key.split(".")[0] for key in OPTIONS if "." in key}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not prefix:
            yield from _flatten(value, origin, f"{name}.")
        elif not prefix and name in sections:
            if value is not None:
                yield "", f"{name}: expected options below it, found {value!r}", origin
        else:
            yield name, value, origin
