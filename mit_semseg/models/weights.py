"""Strict loading of weights into encoders and decoders."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..lib.nn import InPlaceABN
from ..lib.nn.inplace_abn import effective_weight, has_inplace_norms
from ..lib.utils import shorten_list
from .weight_files import WeightsError, read_state_dict

logger = logging.getLogger(__name__)

# Batch-norm buffers of the published files that our models do not have
LEGACY_SUFFIXES = ("._tmp_running_mean", "._tmp_running_var", "._running_iter")
OPTIONAL_SUFFIX = ".num_batches_tracked"

# The Cityscapes toolbox saves encoder and decoder in one file: its prefixes of decoder keys and ours. All other keys
# belong to the encoder.
TOOLBOX_KEY = "head.1.weight"
TOOLBOX_DECODER = {
    "head.0.": "",
    "head.1.": "conv_last.",
    "dsn.0.": "cbr_deepsup.0.",
    "dsn.1.": "cbr_deepsup.1.",
    "dsn.3.": "conv_last_deepsup.",
}


@dataclass
class LoadReport:
    """Result of loading a file: names of its entries by what was done with them."""

    name: str  # of the module
    path: str
    loaded: list[str] = field(default_factory=list)
    legacy: list[str] = field(default_factory=list)  # see LEGACY_SUFFIXES
    skipped: list[str] = field(default_factory=list)  # classifier with a different number of classes
    unexpected: list[str] = field(default_factory=list)  # not in the model
    missing: list[str] = field(default_factory=list)  # batch-norm counters that are not in the file

    def __str__(self) -> str:
        groups = {
            "ignored legacy batch-norm buffers": self.legacy,
            "batch-norm counters not in the file": self.missing,
            "classifier not loaded": self.skipped,
            "ignored": self.unexpected,
        }
        parts = [f"{label}: {len(keys)} ({shorten_list(keys)})" for label, keys in groups.items() if keys]
        return "; ".join([f"{self.name}: loaded {len(self.loaded)} entries of {self.path}", *parts])


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    state: Mapping[str, Tensor] | None = None,
    name: str = "model",
    part: str = "",
    reset_classifier: bool = False,
    ignore_unexpected: bool = False,
) -> LoadReport:
    """Load a state dict strictly, and log and return what was loaded.

    Only the legacy batch-norm buffers of the published files may be unexpected and only `num_batches_tracked` missing.

    Args:
        module: encoder or decoder.
        path: file with the state dict.
        state: content of the file if it was already read.
        name: name of the module in messages.
        part: 'encoder' or 'decoder': which part to load if the file holds both (Cityscapes toolbox).
        reset_classifier: skip the classifier if it has a different number of classes.
        ignore_unexpected: skip entries that the model does not have, e.g. the classifier of ImageNet weights.

    Raises:
        WeightsError: the file cannot be read or does not fit; `module` is then unchanged.
    """
    own, report, matching, mismatched = module.state_dict(), LoadReport(name, str(path)), {}, []
    state = _adapt_to_norms(module, read_state_dict(path) if state is None else state, path, name, part)
    for key, value in state.items():
        if key not in own:
            (report.legacy if key.endswith(LEGACY_SUFFIXES) else report.unexpected).append(key)
        elif value.shape == own[key].shape:
            matching[key] = value
        elif reset_classifier and key.startswith("conv_last") and value.shape[1:] == own[key].shape[1:]:
            report.skipped.append(key)
        else:
            mismatched.append(f"{key} is {tuple(value.shape)}, expected {tuple(own[key].shape)}")
    absent = [key for key in own if key not in state]
    report.missing = [key for key in absent if key.endswith(OPTIONAL_SUFFIX)]
    missing = [key for key in absent if not key.endswith(OPTIONAL_SUFFIX)]
    unexpected = [] if ignore_unexpected else report.unexpected
    if mismatched or missing or unexpected:
        problems = {"wrong shape": mismatched, "missing in the file": missing, "unexpected in the file": unexpected}
        text = "; ".join(f"{problem}: {shorten_list(names)}" for problem, names in problems.items() if names)
        if mismatched and all(line.startswith("conv_last") for line in mismatched) and not missing and not unexpected:
            text += (
                "; the number of classes differs: set the number of the file, or train a new classifier with "
                "MODEL.reset_classifier True (reset_classifier=True)"
            )
        raise WeightsError(f"{path} does not fit {name}: {text}")
    module.load_state_dict(matching, strict=False)
    report.loaded = list(matching)
    logger.info("%s", report)
    return report


def is_version_1(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is that of a ResNet of version 1.0, whose stem has 64 channels (later: 128)."""
    return state.get("conv3.weight", torch.empty(0)).shape[:1] == (64,)


def is_whole_network(path: str | os.PathLike) -> bool:
    """Return whether a file holds both encoder and decoder, like those of the Cityscapes toolbox."""
    return TOOLBOX_KEY in read_state_dict(path)


def _adapt_to_norms(
    module: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike, name: str, part: str
) -> Mapping[str, Tensor]:
    """Select `part` of a toolbox file and convert its in-place norms for a module with ordinary norms.

    Logs a warning if a module with in-place norms computes something else than the network that was trained.

    Raises:
        WeightsError: the file has activated in-place norms and the module has ordinary ones.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, InPlaceABN)]
    if has_inplace_norms(state):
        if norms:
            return state
        raise WeightsError(
            f"{path} was trained with in-place norms, which {name} does not have: set MODEL.norm inplace "
            f"(norm_layer=InPlaceABNSync)"
        )
    activated, inplace = any(norm.activation != "none" for norm in norms), False
    if TOOLBOX_KEY in state:
        inplace = not any(key.endswith(OPTIONAL_SUFFIX) for key in state)  # the toolbox's in-place norms do not count
        if part:
            state = _toolbox_part(state, part)
        activated = activated and part == "encoder"  # the toolbox's decoders have leaky ReLU as well
    if not norms:
        return _absolute_scales(state, module) if inplace else state
    negative = (
        0 if inplace else sum(int((v < 0).sum()) for k, v in state.items() if v.dim() == 1 and k.endswith("weight"))
    )
    if activated or negative:
        changes = ["leaky ReLU instead of ReLU"] * activated + [f"{negative} scales lose their sign"] * bool(negative)
        logger.warning(
            "%s was trained without in-place norms; %s computes different outputs (%s) until it is fine-tuned. "
            "MODEL.norm sync computes the same outputs.",
            path,
            name,
            ", ".join(changes),
        )
    return state


def _toolbox_part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the encoder or decoder of a toolbox file, with our keys."""
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in state.items():
        prefix = next((prefix for prefix in TOOLBOX_DECODER if key.startswith(prefix)), None)
        if prefix is None:
            parts["encoder"][key] = value
        else:
            parts["decoder"][TOOLBOX_DECODER[prefix] + key.removeprefix(prefix)] = value
    return parts[part]


def _absolute_scales(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Replace the weight of each norm by |weight| + eps, by which in-place norms multiply."""
    modules, converted = dict(module.named_modules()), dict(state)
    for key in state:
        name, _, leaf = key.rpartition(".")
        if leaf == "running_mean" and name in modules:
            converted[f"{name}.weight"] = effective_weight(state[f"{name}.weight"], modules[name].eps)
    return converted
