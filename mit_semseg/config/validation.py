"""What a value may be, which values go together, and one error that lists every problem."""

import ast
import difflib
import math
import sys
from collections.abc import Mapping

import yaml

from ..lib.utils import UserError, expand_path
from .defaults import OPTIONS, Option

SMALLEST_WINDOW = 32  # pixels: the largest output stride; smaller ones would also be thousands


class ConfigError(UserError, ValueError):
    """Every problem of a configuration, a line each."""

    def __init__(self, problems: list[str]):
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"the configuration has {count}:", *(f"  - {p}" for p in problems)]))
        self.problems = problems


def unknown_key(key: str) -> str:
    """Sentence about a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong section, or without one
        leaves = {name.rsplit(".", 1)[-1].lower(): name for name in OPTIONS}
        hits = difflib.get_close_matches(key.rsplit(".", 1)[-1].lower(), leaves, n=1)
        near = [leaves[hit] for hit in hits]
    return f"{key}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")


def convert(key: str, value: object) -> object:
    """`value` as the type of option `key`; text from a command line or an old YAML file is read as what it says.

    Raises:
        ValueError: the value is not allowed; the message names key, value and what is allowed.
    """
    option = OPTIONS[key]
    if isinstance(value, str) and {str, tuple} <= set(option.types):
        value = _words(value)
    for kind in option.types:
        result = _as_kind(kind, value)
        if result is not None:
            break
    else:
        names = " or ".join(_KIND_NAMES[kind] for kind in option.types)
        raise ValueError(f"{key}: {value!r} is no {names}{_example(option)}")
    if option.choices:
        return _choose(key, option, result)
    if option.path and isinstance(result, str):
        return expand_path(result)
    _check_range(key, option, result)
    return result


_KIND_NAMES = {bool: "True or False", int: "whole number", float: "number", str: "text", tuple: "list"}


def _example(option: Option) -> str:
    return f" (default {option.default!r})" if option.default != "" else ""


def _as_kind(kind: type, value: object) -> object | None:
    """The value as `kind`, or None if it is nothing of the sort."""
    if kind is str:
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # DIR: 2024
        return value if isinstance(value, str) and not _literal_list(value) else None
    if isinstance(value, str):
        value = _literal(value)
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is tuple:
        plain = isinstance(value, (list, tuple)) and all(isinstance(x, (str, int, float, tuple, list)) for x in value)
        return tuple(value) if plain else None  # no dates, which YAML makes of 2024-01-02
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        return None
    if kind is int:
        return int(value) if value == int(value) else None
    return float(value)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        if text.strip().startswith("["):
            return _yaml_list(text)
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return words.get(text.strip().lower(), text)  # the words of YAML


def _yaml_list(text: str) -> object:
    """A list whose words have no quotes, [road, car], as YAML files write it."""
    try:
        return yaml.safe_load(text)
    except Exception:  # any, see `loader`
        return text


def _words(text: str) -> object:
    """The words of a list as they are written, [no, 010], or the text itself if it is no list."""
    if text.strip()[:1] not in ("[", "("):
        return text
    try:
        words = yaml.load("[" + text.strip()[1:-1] + "]", yaml.BaseLoader)
    except yaml.YAMLError:
        return text
    return words if all(isinstance(word, str) for word in words) else text


def _literal_list(text: str) -> bool:
    return text.strip()[:1] in "[(" and isinstance(_literal(text), (list, tuple)) if text.strip() else False


def _choose(key: str, option: Option, value: object) -> object:
    spelled = {str(choice).lower(): choice for choice in option.choices}
    if str(value).lower() in spelled:
        return spelled[str(value).lower()]
    near = difflib.get_close_matches(str(value).lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]}? " if near else ""
    raise ValueError(f"{key}: {value!r} is not allowed; {hint}allowed: {', '.join(map(str, option.choices))}")


def _check_range(key: str, option: Option, value: object) -> None:
    if math.isinf(option.low) and math.isinf(option.high):
        return
    numbers = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and not value and option.default:
        raise ValueError(f"{key}: the list is empty; give at least one number")
    for number in numbers:
        whole = isinstance(value, tuple) and not option.fractions
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            raise ValueError(f"{key}: {number!r} in {value!r} is no {'whole ' if whole else ''}number")
        if not option.low <= number <= option.high:
            bounds = f"at least {option.low:g}" if math.isinf(option.high) else f"{option.low:g} to {option.high:g}"
            raise ValueError(f"{key}: {number!r} is out of range; allowed: {bounds}")


def contradictions(values: Mapping[str, object]) -> list[str]:
    """Sentences about options that do not go together.

    Args:
        values: every option, by its dotted name.
    """
    v, problems = values, _of_the_data(values)
    window = v["INFERENCE.window_size"]
    if any(0 < side < SMALLEST_WINDOW for side in (window if isinstance(window, tuple) else (window,))):
        problems.append(f"INFERENCE.window_size {window}: sides are at least {SMALLEST_WINDOW} pixels")
    weights = v["TRAIN.class_weights"]
    if weights and len(weights) != v["DATASET.num_class"]:
        problems.append(
            f"TRAIN.class_weights has {len(weights)} numbers, but DATASET.num_class is {v['DATASET.num_class']}"
        )
    if weights and not any(weights):
        problems.append("TRAIN.class_weights are all 0: nothing would be learnt")
    if v["TRAIN.start_epoch"] >= v["TRAIN.num_epoch"]:
        problems.append(
            f"TRAIN.start_epoch {v['TRAIN.start_epoch']} leaves nothing to train: TRAIN.num_epoch is "
            f"{v['TRAIN.num_epoch']}"
        )
    if v["TRAIN.start_epoch"] and v["TRAIN.resume"] != "off":
        problems.append("TRAIN.start_epoch and TRAIN.resume both say where to continue: use one of them")
    problems += _without_effect(v)
    if v["MODEL.norm"] == "inplace" and v["TRAIN.amp"] != "off":
        problems.append(
            f"MODEL.norm inplace recovers what it needs from its output, which {v['TRAIN.amp']} is too coarse for: set "
            f"TRAIN.amp off, or MODEL.norm sync"
        )
    if v["TRAIN.activation_checkpointing"] and (
        v["MODEL.norm"] == "inplace" or v["MODEL.arch_encoder"].startswith("vgg")
    ):
        problems.append(
            "TRAIN.activation_checkpointing True works with encoders other than VGG and MODEL.norm sync or batch: "
            "set it to False, or change these"
        )
    if v["TRAIN.activation_checkpointing"] and v["TRAIN.compile"]:
        problems.append(
            "TRAIN.compile cannot compile what TRAIN.activation_checkpointing computes again: use one of them"
        )
    if v["MODEL.arch_encoder"].startswith("vgg") and v["MODEL.output_stride"] not in (0, 8):
        problems.append(f"MODEL.output_stride {v['MODEL.output_stride']}: {v['MODEL.arch_encoder']} has 8 only")
    if v["TRAIN.eval_epoch"] > v["TRAIN.num_epoch"]:
        problems.append(
            f"TRAIN.eval_epoch {v['TRAIN.eval_epoch']} never comes: TRAIN.num_epoch is {v['TRAIN.num_epoch']}"
        )
    if v["TRAIN.visualize"] and not v["TRAIN.eval_epoch"]:
        problems.append("TRAIN.visualize shows validations: set TRAIN.eval_epoch, or leave it out")
    if v["TRAIN.epoch_iters"] and v["TRAIN.warmup_iters"] >= v["TRAIN.num_epoch"] * v["TRAIN.epoch_iters"]:
        problems.append(f"TRAIN.warmup_iters {v['TRAIN.warmup_iters']} is not shorter than the whole training")
    if v["MODEL.reset_classifier"] and not v["MODEL.weights_decoder"]:
        problems.append("MODEL.reset_classifier True needs a file in MODEL.weights_decoder to take the rest from")
    if v["MODEL.output_stride"] == 4 and v["MODEL.arch_encoder"] != "hrnetv2":
        problems.append(f"MODEL.output_stride 4 is hrnetv2's only, not {v['MODEL.arch_encoder']}'s: choose 8, 16 or 32")
    return problems


def _of_the_data(v: Mapping[str, object]) -> list[str]:
    """Sentences about lists, classes, sizes and crops that do not go together."""
    problems = []
    pad, rate = v["DATASET.padding_constant"], v["DATASET.segm_downsampling_rate"]
    scale = v["DATASET.random_scale"]
    for key in ("DATASET.crop_size", "INFERENCE.window_size"):
        if isinstance(v[key], tuple) and (len(v[key]) != 2 or not all(v[key])):
            problems.append(f"{key} {v[key]}: give one side, or height and width")
    if scale and (len(scale) != 2 or scale[0] > scale[1]):
        problems.append(f"DATASET.random_scale {scale}: give the smallest and the largest factor, e.g. (0.5, 2.0)")
    if pad % rate:
        problems.append(
            f"DATASET.padding_constant {pad} must be a multiple of DATASET.segm_downsampling_rate {rate}: set "
            f"padding_constant {math.ceil(pad / rate) * rate}"
        )
    sizes = v["DATASET.imgSizes"]
    sizes = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
    if min(sizes) > v["DATASET.imgMaxSize"]:
        problems.append(
            f"DATASET.imgMaxSize {v['DATASET.imgMaxSize']} is smaller than every short side in DATASET.imgSizes {sizes}"
        )
    names = v["DATASET.classes"]
    listed = isinstance(names, (list, tuple))
    if listed and len(names) != v["DATASET.num_class"]:
        problems.append(f"DATASET.classes lists {len(names)} names, but DATASET.num_class is {v['DATASET.num_class']}")
    if v["DATASET.ignore_values"] and not listed:
        problems.append("DATASET.ignore_values goes with a list of names in DATASET.classes; a CSV file has its own")
    return problems


def _without_effect(v: Mapping[str, object]) -> list[str]:
    """Sentences about options that were changed but are not read beside the others."""
    entropy = v["TRAIN.loss"] not in ("dice", "lovasz")
    read = {
        "TRAIN.class_weights": (entropy, "cross entropy's: TRAIN.loss ce, ohem, ce+dice or ce+lovasz"),
        "TRAIN.label_smoothing": (entropy, "cross entropy's: TRAIN.loss ce, ohem, ce+dice or ce+lovasz"),
        "TRAIN.ohem_threshold": (v["TRAIN.loss"] == "ohem", "of hard pixels: TRAIN.loss ohem"),
        "TRAIN.ohem_min_kept": (v["TRAIN.loss"] == "ohem", "of hard pixels: TRAIN.loss ohem"),
        "INFERENCE.window_overlap": (v["INFERENCE.window_size"], "of windows: set INFERENCE.window_size"),
        "DATASET.cat_max_ratio": (v["DATASET.crop_size"], "of crops: set DATASET.crop_size"),
    }
    return [
        f"{key} {v[key]} has no effect; it is {whose}, or leave it out"
        for key, (used, whose) in read.items()
        if not used and v[key] != OPTIONS[key].default
    ]
