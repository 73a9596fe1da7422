"""Check the values of options and their combinations."""

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

import yaml

from ..lib.utils import UserError, expand_path
from .defaults import OPTIONS, Option

MIN_WINDOW = 32  # pixels, the largest output stride
TYPE_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "text", tuple: "a list"}
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class ConfigError(UserError, ValueError):
    """All errors of a configuration, one per line and in `problems`."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(["invalid configuration:", *(f"  - {problem}" for problem in problems)]))
        self.problems = problems


def unknown_option(key: str, value: object) -> str:
    """Describe the error about a name that is not an option, with the closest option."""
    if any(name.startswith(f"{key}.") for name in OPTIONS):
        return f"{key}: expected a section with options, got {type(value).__name__}"
    near = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.5)
    if not near:  # perhaps the section is wrong or missing
        names = {name.rsplit(".", 1)[-1].lower(): name for name in OPTIONS}
        near = [names[hit] for hit in difflib.get_close_matches(key.rsplit(".", 1)[-1].lower(), names, n=1)]
    return f"{key}: unknown option" + (f"; did you mean {near[0]}?" if near else "")


def convert(key: str, value: object) -> object:
    """Convert a value to the type of an option; text is parsed. Raise ValueError if the value is not allowed."""
    option = OPTIONS[key]
    candidates = (_convert_to(kind, value, option) for kind in option.types)
    result = next((candidate for candidate in candidates if candidate is not None), None)
    if result is None:
        names = " or ".join(TYPE_NAMES[kind] for kind in option.types)
        raise ValueError(f"{key}: {value!r} is not {names} (default {option.default!r})")
    if option.choices:
        spellings = {str(choice).lower(): choice for choice in option.choices}
        if str(result).lower() in spellings:
            return spellings[str(result).lower()]
        near = difflib.get_close_matches(str(result).lower(), spellings, n=1)
        hint = f"did you mean {spellings[near[0]]}? " if near else ""
        raise ValueError(f"{key}: {value!r} is not allowed; {hint}allowed: {', '.join(map(str, option.choices))}")
    if isinstance(result, str):
        return expand_path(result) if option.path else result
    if result == () and option.default:
        raise ValueError(f"{key}: the list is empty; give at least one number")
    for number in result if isinstance(result, tuple) else (result,):
        if not isinstance(number, str) and not option.low <= number <= option.high:
            bounds = f"at least {option.low:g}" if math.isinf(option.high) else f"{option.low:g} to {option.high:g}"
            raise ValueError(f"{key}: {number!r} is out of range; allowed: {bounds}")
    return result


def _convert_to(kind: type, value: object, option: Option) -> object | None:
    """Return the value as `kind`, or None if it cannot be converted."""
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is tuple:
        items = _parse_list(value) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            return None
        item_type = str if str in option.types else float if option.fractions else int
        converted = tuple(_convert_to(item_type, item, option) for item in items)
        return None if any(item is None for item in converted) else converted
    if kind is bool:
        value = BOOL_WORDS.get(value.strip().lower()) if isinstance(value, str) else value
        return value if isinstance(value, bool) else None
    number = _parse_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= sys.float_info.max:
        return None  # also for NaN and infinity
    return kind(number) if kind(number) == number else None


def _parse_list(text: str) -> list | None:
    """Parse `[a, b]` or `(a, b)` to a list of strings; None if the text is not a list."""
    match = re.fullmatch(r"\s*(?:\[(.*)\]|\((.*)\))\s*", text, re.DOTALL)
    with suppress(yaml.YAMLError, RecursionError):
        return yaml.load(f"[{match[1] or match[2] or ''}]", yaml.BaseLoader) if match else None
    return None


def _parse_number(text: str) -> float | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return None


def check_combinations(values: Mapping[str, object]) -> list[str]:
    """Return a sentence for every conflict between options; `values` has all options."""
    checks = _check_dataset, _check_model, _check_training_and_inference, _check_unused
    return [problem for check in checks for problem in check(values)]


def _check_dataset(v: Mapping[str, object]) -> Iterator[str]:
    pad, rate = v["DATASET.padding_constant"], v["DATASET.segm_downsampling_rate"]
    scale, crop, sizes = v["DATASET.random_scale"], v["DATASET.crop_size"], v["DATASET.imgSizes"]
    if isinstance(crop, tuple) and (len(crop) != 2 or not all(crop)):
        yield f"DATASET.crop_size {crop}: give one side, or height and width"
    if scale and (len(scale) != 2 or scale[0] > scale[1]):
        yield f"DATASET.random_scale {scale}: give the smallest and the largest factor, e.g. (0.5, 2.0)"
    if pad % rate:
        fix = f"set padding_constant {math.ceil(pad / rate) * rate}"
        yield f"DATASET.padding_constant {pad} must be a multiple of DATASET.segm_downsampling_rate {rate}; {fix}"
    if min(sizes if isinstance(sizes, (list, tuple)) else (sizes,)) > v["DATASET.imgMaxSize"]:
        yield f"DATASET.imgMaxSize {v['DATASET.imgMaxSize']} is less than every short side in DATASET.imgSizes {sizes}"

    names, num_class, weights = v["DATASET.classes"], v["DATASET.num_class"], v["TRAIN.class_weights"]
    if not isinstance(names, str) and len(names) != num_class:
        yield f"DATASET.classes has {len(names)} names, but DATASET.num_class is {num_class}; change one of them"
    if v["DATASET.ignore_values"] and isinstance(names, str):
        yield "DATASET.ignore_values needs a list of names in DATASET.classes; in a CSV file use rows without a name"
    if weights and len(weights) != num_class:
        yield f"TRAIN.class_weights has {len(weights)} numbers, but DATASET.num_class is {num_class}"
    if weights and not any(weights):
        yield "TRAIN.class_weights must not all be 0"


def _check_model(v: Mapping[str, object]) -> Iterator[str]:
    encoder, stride, inplace = v["MODEL.arch_encoder"], v["MODEL.output_stride"], v["MODEL.norm"] == "inplace"
    if encoder.startswith("vgg") and stride not in (0, 8):
        yield f"MODEL.output_stride {stride}: {encoder} supports 8 only"
    if stride == 4 and encoder != "hrnetv2":
        yield f"MODEL.output_stride 4 is for hrnetv2 only, not for {encoder}; use 8, 16 or 32"
    if v["MODEL.reset_classifier"] and not v["MODEL.weights_decoder"]:
        yield "MODEL.reset_classifier True needs MODEL.weights_decoder, the file with the other weights"
    if inplace and v["TRAIN.amp"] != "off":
        yield f"MODEL.norm inplace does not support TRAIN.amp {v['TRAIN.amp']}; set TRAIN.amp off or MODEL.norm sync"
    if v["TRAIN.activation_checkpointing"]:
        if inplace or encoder.startswith("vgg"):
            yield "TRAIN.activation_checkpointing True does not support MODEL.norm inplace and VGG encoders"
        if v["TRAIN.compile"]:
            yield "TRAIN.compile and TRAIN.activation_checkpointing exclude each other; use one of them"


def _check_training_and_inference(v: Mapping[str, object]) -> Iterator[str]:
    num_epoch, start, warmup = v["TRAIN.num_epoch"], v["TRAIN.start_epoch"], v["TRAIN.warmup_iters"]
    if start >= num_epoch:
        yield f"TRAIN.start_epoch {start} must be less than TRAIN.num_epoch {num_epoch}"
    if start and v["TRAIN.resume"] != "off":
        yield "TRAIN.start_epoch and TRAIN.resume exclude each other; use one of them"
    if v["TRAIN.eval_epoch"] > num_epoch:
        yield f"TRAIN.eval_epoch {v['TRAIN.eval_epoch']} must be at most TRAIN.num_epoch {num_epoch}"
    if v["TRAIN.visualize"] and not v["TRAIN.eval_epoch"]:
        yield "TRAIN.visualize True needs validation; set TRAIN.eval_epoch"
    if v["TRAIN.epoch_iters"] and warmup >= num_epoch * v["TRAIN.epoch_iters"]:
        yield f"TRAIN.warmup_iters {warmup} must be less than num_epoch * epoch_iters"

    window = v["INFERENCE.window_size"]
    sides = window if isinstance(window, tuple) else (window,) * 2
    if len(sides) != 2 or (any(sides) and min(sides) < MIN_WINDOW):
        yield f"INFERENCE.window_size {window}: give one side, or height and width, of at least {MIN_WINDOW} pixels"


def _check_unused(v: Mapping[str, object]) -> Iterator[str]:
    """Yield a sentence for every option that was changed but has no effect."""
    cross_entropy = v["TRAIN.loss"] not in ("dice", "lovasz"), "TRAIN.loss ce, ohem, ce+dice or ce+lovasz"
    ohem = v["TRAIN.loss"] == "ohem", "TRAIN.loss ohem"
    requirements = {
        "TRAIN.class_weights": cross_entropy,
        "TRAIN.label_smoothing": cross_entropy,
        "TRAIN.ohem_threshold": ohem,
        "TRAIN.ohem_min_kept": ohem,
        "INFERENCE.window_overlap": (v["INFERENCE.window_size"], "INFERENCE.window_size"),
        "DATASET.cat_max_ratio": (v["DATASET.crop_size"], "DATASET.crop_size"),
    }
    for key, (is_used, needed) in requirements.items():
        if not is_used and v[key] != OPTIONS[key].default:
            yield f"{key} {v[key]} has no effect without {needed}; remove it or set that"
