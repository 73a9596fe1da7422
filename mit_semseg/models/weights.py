"""Load weights into encoders and decoders; keys and shapes must match."""

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..lib.nn import InPlaceABN
from ..lib.nn.inplace_abn import effective_weight, has_inplace_norms
from ..lib.utils import shorten_list
from .weight_files import WeightsError, read_state_dict

logger = logging.getLogger(__name__)

# Suffixes of batch-norm buffers that occur in published checkpoints but not in our models
LEGACY_SUFFIXES = ("._tmp_running_mean", "._tmp_running_var", "._running_iter")
OPTIONAL_SUFFIX = ".num_batches_tracked"

# Checkpoints of the Cityscapes toolbox (see `decoders.ppm`) hold encoder and decoder
TOOLBOX_KEY = "head.1.weight"  # occurs only in these checkpoints
TOOLBOX_DECODER = {  # prefixes of decoder keys in these checkpoints -> prefixes of our keys
    "head.0.": "",
    "head.1.": "conv_last.",
    "dsn.0.": "cbr_deepsup.0.",
    "dsn.1.": "cbr_deepsup.1.",
    "dsn.3.": "conv_last_deepsup.",
}


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    state=None,
    name="model",
    part="",
    reset_classifier: bool = False,
    old_classes: Sequence[str] = (),
) -> dict[str, list[str]]:
    """Load a state dict from a file; its keys and shapes must match those of the module.

    There are two exceptions: buffers with `LEGACY_SUFFIXES` are ignored, and `num_batches_tracked` may be missing.

    Args:
        state: state dict in the file, if the caller has already read it.
        part: 'encoder' or 'decoder'; selects the entries of this part if the file contains a whole network.
        reset_classifier: load only the rows of the classifier whose classes have the same name in the file and in
            `module.class_names`; see `equal_names`. Other rows keep their random values. Without names, all rows are
            loaded if the number of classes is equal, and no row if it differs.
        old_classes: class names of the file if its metadata contain none; ignored if their number is wrong.

    Returns a dict with four lists of keys: 'loaded', 'legacy' (ignored), 'missing' and 'skipped' (classifier).
    Raises a WeightsError if the file cannot be read or does not match `module`, which is then unchanged.
    """
    own, matching, legacy, skipped, unexpected, mismatched = module.state_dict(), {}, [], [], [], []
    state = read_state_dict(path) if state is None else state
    old_classes = saved_class_names(state) or old_classes
    state = _adapt_to_norms(module, state, path, name, part)
    names = getattr(module, "class_names", ())
    if sorted(saved := saved_class_names(state)) == sorted(names) and list(saved) != list(names):
        logger.warning("%s has the same classes in another order: %s; check DATASET.classes", path, ", ".join(saved))
    classifier, rows = (module.classifier_layers() if hasattr(module, "classifier_layers") else []), None
    if reset_classifier and classifier:
        count = len(state.get(f"{classifier[0]}.weight", ()))
        rows = _rows_of_equal_names(count, old_classes, names, path)
    for key, value in state.items():
        if key not in own:
            (legacy if key.endswith(LEGACY_SUFFIXES) else unexpected).append(key)
        elif rows is not None and key.rpartition(".")[0] in classifier and value.shape[1:] == own[key].shape[1:]:
            matching[key] = own[key].clone()
            matching[key][list(rows)] = value[list(rows.values())].to(own[key])
        elif value.shape == own[key].shape:
            matching[key] = value
        elif reset_classifier and key.rpartition(".")[0] in classifier and value.shape[1:] == own[key].shape[1:]:
            skipped.append(key)
        else:
            mismatched.append(f"{key} is {tuple(value.shape)}, expected {tuple(own[key].shape)}")
    counters = [key for key in own if key not in state and key.endswith(OPTIONAL_SUFFIX)]
    missing = [key for key in own if key not in state and not key.endswith(OPTIONAL_SUFFIX)]
    problems = {"wrong shape": mismatched, "missing in the file": missing, "unexpected in the file": unexpected}
    if any(problems.values()):
        text = "; ".join(f"{problem}: {shorten_list(names)}" for problem, names in problems.items() if names)
        if not missing and not unexpected and all(line.startswith("conv_last") for line in mismatched):
            text += (
                "; the number of classes differs; set DATASET.num_class to that of the file, or train a new classifier "
                "with MODEL.reset_classifier True (reset_classifier=True)"
            )
        raise WeightsError(f"{path} does not match {name}: {text}")
    module.load_state_dict(matching, strict=False)
    report = {"loaded": list(matching), "legacy": legacy, "missing": counters, "skipped": skipped}
    counts = ", ".join(f"{len(keys)} {kind} ({shorten_list(keys)})" for kind, keys in report.items() if keys)
    logger.info("%s: state-dict entries from %s: %s", name, path, counts)
    return report


def saved_class_names(state: Mapping[str, Tensor]) -> Sequence[str]:
    """Return the class names in the metadata of a state dict that `read_state_dict` has returned, or ()."""
    entries = getattr(state, "_metadata", {})
    return next((entry["classes"] for entry in entries.values() if "classes" in entry), ())


def equal_names(old: Sequence[str], new: Sequence[str]) -> dict[int, int]:
    """Return the index in `new` -> index in `old` of all classes with equal names.

    A name consists of synonyms that are separated by `;`. If no whole name is equal, the first synonyms are compared,
    and then all synonyms. Case is ignored. If there are several matches, the first one is used.
    """
    found: dict[int, int] = {}
    for keys in (lambda words: [";".join(words)], lambda words: words[:1], lambda words: words):
        index: dict[str, int] = {}
        for i, name in enumerate(old):
            for key in keys(_synonyms(name)):
                index.setdefault(key, i)
        for i, name in enumerate(new):
            matches = [index[key] for key in keys(_synonyms(name)) if key in index]
            if matches:
                found.setdefault(i, matches[0])
    return dict(sorted(found.items()))


def _synonyms(name: str) -> list[str]:
    return [word.strip().casefold() for word in name.split(";") if word.strip()]


def _rows_of_equal_names(
    count: int, old: Sequence[str], new: Sequence[str], path: str | os.PathLike
) -> dict[int, int] | None:
    """Return rows of the new classifier -> rows of the `count` rows in the file, or None if the names are unknown."""
    if not new or len(old) != count:
        logger.warning("the names of the %d classes in %s are unknown; set MODEL.weights_classes", count, path)
        return None
    rows = equal_names(old, new)
    names = shorten_list([new[i] for i in rows]) if rows else "none"
    logger.info("classifier: %d of %d classes have the same name in %s: %s", len(rows), len(new), path, names)
    return rows


def is_version_1(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict belongs to a version 1.0 ResNet, whose stem has 64 instead of 128 output channels."""
    weight = state.get("conv3.weight", state.get("encoder.conv3.weight", torch.empty(0)))
    return weight.shape[:1] == (64,)


def is_whole_network(path: str | os.PathLike) -> bool:
    """Return whether a file contains encoder and decoder: a network file, or a checkpoint of the Cityscapes toolbox."""
    state = read_state_dict(path)
    return TOOLBOX_KEY in state or all(key.startswith(("encoder.", "decoder.")) for key in state)


def _adapt_to_norms(
    module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike, name: str, part: str
) -> Mapping[str, Tensor]:
    """Return the entries of `part`, with in-place norms of the toolbox converted if the module has batch norms."""
    if part and all(key.startswith(("encoder.", "decoder.")) for key in state):
        metadata = getattr(state, "_metadata", {})
        state = OrderedDict((key.removeprefix(f"{part}."), x) for key, x in state.items() if key.startswith(part))
        state._metadata = metadata
    norms = [norm for norm in module.modules() if isinstance(norm, InPlaceABN)]
    if has_inplace_norms(state):
        if norms:
            return state
        raise WeightsError(
            f"{path} was trained with in-place norms, but {name} has batch norms; set MODEL.norm inplace "
            "(norm_layer=InPlaceABNSync)"
        )
    toolbox = TOOLBOX_KEY in state
    inplace = toolbox and not any(key.endswith(OPTIONAL_SUFFIX) for key in state)  # only batch norms have this buffer
    if toolbox and part:
        state = _toolbox_part(state, part)
    if not norms:
        return _absolute_scales(state, module) if inplace else state
    # In the toolbox, in-place norms have an activation in the decoder, but not in the encoder.
    if not inplace or (part == "encoder" and any(norm.activation != "none" for norm in norms)):
        logger.warning(
            "%s was trained without in-place norms and leaky ReLU; the %s uses them, so its outputs differ from those "
            "in training until it is fine-tuned. Set MODEL.norm sync to keep the outputs",
            path,
            name,
        )
    return state


def _toolbox_part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the encoder or decoder entries of a Cityscapes toolbox checkpoint, renamed to our keys."""
    selected = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in TOOLBOX_DECODER if key.startswith(prefix)), "")
        if bool(prefix) == (part == "decoder"):
            selected[TOOLBOX_DECODER.get(prefix, "") + key.removeprefix(prefix)] = value
    return selected


def _absolute_scales(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return `state` with the weight of each norm replaced by |weight| + eps, the scale that in-place norms use."""
    modules, converted = dict(module.named_modules()), dict(state)
    for key in state:
        name, _, leaf = key.rpartition(".")
        if leaf == "running_mean" and name in modules:
            converted[f"{name}.weight"] = effective_weight(state[f"{name}.weight"], modules[name].eps)
    return converted
