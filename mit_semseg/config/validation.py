"""Check option values and combinations of options."""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

import yaml

from ..lib.utils import UserError, closest, expand_path
from .defaults import OPTIONS, Option

MIN_WINDOW = 32  # in pixels; equal to the largest output stride
TYPE_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "text", tuple: "a list"}
BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class ConfigError(UserError, ValueError):
    """A configuration is invalid. `problems` has one message per error."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(["invalid configuration:", *(f"  - {problem}" for problem in problems)]))
        self.problems = problems


def unknown_option(key: str, value: object) -> str:
    """Return the error message for a name that is not an option."""
    if any(name.startswith(f"{key}.") for name in OPTIONS):
        return f"{key}: expected a section with options, got {type(value).__name__}"
    same_name = (f"; did you mean {name}?" for name in OPTIONS if name.lower().endswith(f".{key.lower()}"))
    return f"{key}: unknown option{next(same_name, closest(key, OPTIONS, 0.5))}"


def convert(key: str, value: object) -> object:
    """Convert a value or its text form to the type of an option. Raise ValueError if the value is not allowed."""
    option = OPTIONS[key]
    candidates = (_convert_to(kind, value, option) for kind in option.types)
    result = next((candidate for candidate in candidates if candidate is not None), None)
    if result is None:
        names = " or ".join(TYPE_NAMES[kind] for kind in option.types)
        raise ValueError(f"{key}: expected {names}, got {value!r} (default {option.default!r})")
    if option.choices:
        spellings = {str(choice).lower(): choice for choice in option.choices}
        if str(result).lower() in spellings:
            return spellings[str(result).lower()]
        allowed = [str(choice) for choice in option.choices]
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(allowed)}{closest(str(result), allowed)}")
    if isinstance(result, str):
        return expand_path(result) if option.path else result
    if result == () and option.default:
        raise ValueError(f"{key}: the list is empty; it must have at least one number")
    for number in result if isinstance(result, tuple) else (result,):
        if not isinstance(number, str) and not option.low <= number <= option.high:
            bounds = f"at least {option.low:g}" if math.isinf(option.high) else f"{option.low:g} to {option.high:g}"
            raise ValueError(f"{key}: expected {bounds}, got {number!r}")
    return result


def _convert_to(kind: type, value: object, option: Option) -> object | None:
    """Return a value converted to the type `kind`, or None if it cannot be converted."""
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is tuple:
        items = _parse_list(value) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            return None
        item_type = float if option.fractions else str if str in option.types else int
        converted = tuple(_convert_to(item_type, item, option) for item in items)
        return None if any(item is None for item in converted) else converted
    if kind is bool:
        value = BOOL_WORDS.get(value.strip().lower()) if isinstance(value, str) else value
        return value if isinstance(value, bool) else None
    number = _parse_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= sys.float_info.max:
        return None  # also rejects NaN and infinity
    return kind(number) if kind(number) == number else None


def _parse_list(text: str) -> list | None:
    """Parse text such as `[a, b]` or `(a, b)` into a list of strings. Return None for other text."""
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
    """Return one message per conflict between options. `values` maps the name of every option to its value."""
    return [*_check_dataset(values), *_check_model_and_run(values), *_check_unused(values)]


def _check_dataset(v: Mapping[str, object]) -> Iterator[str]:
    pad, rate = v["DATASET.padding_constant"], v["DATASET.segm_downsampling_rate"]
    scale, crop, sizes = v["DATASET.random_scale"], v["DATASET.crop_size"], v["DATASET.imgSizes"]
    if isinstance(crop, tuple) and (len(crop) != 2 or not all(crop)):
        yield f"DATASET.crop_size {crop} must be one number, or two positive numbers (height, width)"
    if scale and (len(scale) != 2 or scale[0] > scale[1]):
        yield f"DATASET.random_scale {scale} must be (smallest factor, largest factor), e.g. (0.5, 2.0)"
    if pad % rate:
        fix = f"set padding_constant {math.ceil(pad / rate) * rate}"
        yield f"DATASET.padding_constant {pad} must be a multiple of DATASET.segm_downsampling_rate {rate}; {fix}"
    if min(sizes if isinstance(sizes, (list, tuple)) else (sizes,)) > v["DATASET.imgMaxSize"]:
        yield f"DATASET.imgMaxSize {v['DATASET.imgMaxSize']} must be at least the minimum of DATASET.imgSizes {sizes}"

    if v["DATASET.val_fraction"] and v["DATASET.list_val"] != OPTIONS["DATASET.list_val"].default:
        yield "DATASET.val_fraction takes images from list_train; remove either DATASET.list_val or val_fraction"
    if v["DATASET.label_format"] == "colors" and not isinstance(v["DATASET.classes"], str):
        yield "DATASET.label_format colors needs a class table with colors; set DATASET.classes to a CSV file"

    if v["DATASET.class_mix"] and v["TRAIN.batch_size_per_gpu"] == 1:
        yield "DATASET.class_mix needs at least two images per batch; increase TRAIN.batch_size_per_gpu"

    channels, bands = v["DATASET.channels"], bool(v["DATASET.mean"] or v["DATASET.std"])
    if (bands or channels != 3) and not len(v["DATASET.mean"]) == len(v["DATASET.std"]) == channels:
        counts = f"{len(v['DATASET.mean'])} and {len(v['DATASET.std'])}"
        yield f"DATASET.channels {channels} needs {channels} numbers in DATASET.mean and DATASET.std; got {counts}"
    if bands and (v["DATASET.color_jitter"] or v["DATASET.blur"]):
        yield "DATASET.color_jitter and DATASET.blur cannot be combined with DATASET.mean; remove them"
    if bands and v["DATASET.normalization"] != "imagenet":
        yield "DATASET.normalization caffe cannot be combined with DATASET.mean; remove one of them"

    names, num_class, weights = v["DATASET.classes"], v["DATASET.num_class"], v["TRAIN.class_weights"]
    if not isinstance(names, str) and len(names) != num_class:
        yield f"DATASET.classes has {len(names)} names, but DATASET.num_class is {num_class}; change one option"
    if v["DATASET.ignore_values"] and isinstance(names, str):
        yield "DATASET.ignore_values works only with a list in DATASET.classes; in a CSV file, use rows without a name"
    if isinstance(weights, str) and weights != "auto":
        yield f"TRAIN.class_weights {weights!r} must be auto, or a list of {num_class} numbers"
    elif weights not in ((), "auto") and len(weights) != num_class:
        yield f"TRAIN.class_weights has {len(weights)} numbers, but DATASET.num_class is {num_class}; change one option"


def _check_model_and_run(v: Mapping[str, object]) -> Iterator[str]:
    encoder, stride, inplace = v["MODEL.arch_encoder"], v["MODEL.output_stride"], v["MODEL.norm"] == "inplace"
    if encoder.startswith("vgg") and stride not in (0, 8):
        yield f"MODEL.output_stride {stride}: {encoder} supports only output stride 8"
    if stride == 4 and encoder != "hrnetv2":
        yield f"MODEL.output_stride 4 works only with hrnetv2, not with {encoder}; set 8, 16 or 32"
    if v["MODEL.reset_classifier"] and not v["MODEL.weights_decoder"]:
        yield "MODEL.reset_classifier True needs a file with decoder weights; set MODEL.weights_decoder"
    if inplace and v["TRAIN.amp"] != "off":
        yield f"MODEL.norm inplace does not support TRAIN.amp {v['TRAIN.amp']}; set TRAIN.amp off or MODEL.norm sync"
    if v["TRAIN.compile"] and not v["TRAIN.channels_last"]:
        yield "TRAIN.compile needs TRAIN.channels_last True; otherwise, every image size would cause a recompilation"
    if v["TRAIN.activation_checkpointing"]:
        if inplace or encoder.startswith("vgg"):
            yield "TRAIN.activation_checkpointing does not support MODEL.norm inplace or VGG encoders; set it to False"
        if v["TRAIN.compile"]:
            yield "TRAIN.compile and TRAIN.activation_checkpointing cannot be combined; set one of them to False"

    if not v["TRAIN.lr_encoder"] and not v["TRAIN.lr_decoder"]:
        yield "TRAIN.lr_encoder and TRAIN.lr_decoder are 0, so no weight is trained; set one of them to a larger value"
    if v["TRAIN.freeze_encoder"] and not v["TRAIN.lr_decoder"]:
        yield "TRAIN.freeze_encoder needs TRAIN.lr_decoder above 0; otherwise, the first steps train no weight"
    num_epoch, start = v["TRAIN.num_epoch"], v["TRAIN.start_epoch"]
    if start >= num_epoch:
        yield f"TRAIN.start_epoch {start} must be less than TRAIN.num_epoch {num_epoch}"
    if start and v["TRAIN.resume"] != "off":
        yield "TRAIN.start_epoch and TRAIN.resume cannot be combined; set start_epoch 0 or resume off"
    if v["TRAIN.eval_epoch"] > num_epoch:
        yield f"TRAIN.eval_epoch {v['TRAIN.eval_epoch']} must be at most TRAIN.num_epoch {num_epoch}"
    if v["TRAIN.visualize"] and not v["TRAIN.eval_epoch"]:
        yield "TRAIN.visualize True needs validation; set TRAIN.eval_epoch to at least 1"

    window = v["INFERENCE.window_size"]
    sides = window if isinstance(window, tuple) else (window,) * 2
    if len(sides) != 2 or (any(sides) and min(sides) < MIN_WINDOW):
        yield f"INFERENCE.window_size {window} must be 0, or a side or (height, width) of at least {MIN_WINDOW} pixels"


def _check_unused(v: Mapping[str, object]) -> Iterator[str]:
    """Yield one message per option that differs from its default but has no effect."""
    losses = v["TRAIN.loss"].split("+")
    cross_entropy = "ce" in losses or "ohem" in losses, "TRAIN.loss ce, ohem, ce+dice or ce+lovasz"
    ohem = "ohem" in losses, "TRAIN.loss ohem"
    requirements = {
        "TRAIN.class_weights": cross_entropy,
        "TRAIN.label_smoothing": cross_entropy,
        "TRAIN.ohem_threshold": ohem,
        "TRAIN.ohem_min_kept": ohem,
        "TRAIN.lr_pow": (v["TRAIN.schedule"] == "poly", "TRAIN.schedule poly"),
        "TRAIN.patience": (v["TRAIN.eval_epoch"], "TRAIN.eval_epoch"),
        "TRAIN.lr_decay": (v["TRAIN.lr_encoder"], "TRAIN.lr_encoder"),
        "TRAIN.freeze_encoder": (v["TRAIN.lr_encoder"], "TRAIN.lr_encoder"),
        "TRAIN.deep_sup_scale": (v["MODEL.arch_decoder"].endswith("_deepsup"), "a decoder with deep supervision"),
        "MODEL.weights_classes": (v["MODEL.reset_classifier"], "MODEL.reset_classifier"),
        "DATASET.val_groups": (v["DATASET.val_fraction"], "DATASET.val_fraction"),
        "DATASET.val_seed": (v["DATASET.val_fraction"], "DATASET.val_fraction"),
        "INFERENCE.window_overlap": (v["INFERENCE.window_size"], "INFERENCE.window_size"),
        "DATASET.cat_max_ratio": (v["DATASET.crop_size"], "DATASET.crop_size"),
    }
    for key, (has_effect, needed) in requirements.items():
        if not has_effect and v[key] != OPTIONS[key].default:
            yield f"{key} {v[key]} has no effect; set {needed}, or remove {key}"
