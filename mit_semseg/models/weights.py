"""How weights are loaded into a network. Reading files: `reading.py`; where the published ones are: `published.py`."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..lib.nn import InPlaceABN
from ..lib.nn.inplace_abn import has_inplace_norms, scale_of
from ..lib.utils import shorten
from .weight_files import WeightsError, read_state_dict

logger = logging.getLogger(__name__)

# Buffers that the batch norms of the published files carry and ours need not have.
LEGACY_SUFFIXES = ("._tmp_running_mean", "._tmp_running_var", "._running_iter")
OPTIONAL_SUFFIX = ".num_batches_tracked"


# Beginnings of the decoder's keys in a network of the Cityscapes toolbox, and ours; the rest is the encoder's.
TOOLBOX_MARK = "head.1.weight"
TOOLBOX_DECODER = (
    ("head.0.", ""),
    ("head.1.", "conv_last."),
    ("dsn.0.", "cbr_deepsup.0."),
    ("dsn.1.", "cbr_deepsup.1."),
    ("dsn.3.", "conv_last_deepsup."),
)


@dataclass
class LoadReport:
    """What became of the entries of a weights file."""

    what: str
    path: str
    loaded: list[str] = field(default_factory=list)
    legacy: list[str] = field(default_factory=list)  # batch-norm buffers of the published files, not needed
    skipped: list[str] = field(default_factory=list)  # classifier entries of another number of classes
    surplus: list[str] = field(default_factory=list)  # entries the model has no place for
    missing: list[str] = field(default_factory=list)  # batch-norm counters that the file does not have

    def __str__(self) -> str:
        parts = [f"{self.what}: loaded {len(self.loaded)} entries of {self.path}"]
        if self.legacy:
            parts.append(f"{len(self.legacy)} legacy batch-norm buffers not needed")
        if self.missing:
            parts.append(f"{len(self.missing)} batch-norm counters absent in the file")
        if self.skipped:
            parts.append(f"started anew (other number of classes): {', '.join(self.skipped)}")
        if self.surplus:
            parts.append(f"not used: {shorten(self.surplus)}")
        return "; ".join(parts)


def is_whole_network(path: str | os.PathLike) -> bool:
    """Whether a file holds encoder and decoder together, as the Cityscapes toolbox's do."""
    return TOOLBOX_MARK in read_state_dict(path)


def part_of_network(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Encoder or decoder of a whole network of the Cityscapes toolbox, by our keys; any other state dict as it is.

    Args:
        state: of a file.
        part: 'encoder' or 'decoder'.
    """
    if TOOLBOX_MARK not in state or part not in ("encoder", "decoder"):
        return state
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in state.items():
        old, new = next((pair for pair in TOOLBOX_DECODER if key.startswith(pair[0])), ("", None))
        parts["encoder" if new is None else "decoder"][key if new is None else new + key.removeprefix(old)] = value
    return parts[part]


def _for_norms_of(
    module: nn.Module, state: dict[str, Tensor], path: str | os.PathLike, what: str, part: str
) -> dict[str, Tensor]:
    """Entries of a file for the norms of a module; says where the two do not compute the same.

    Raises:
        WeightsError: the file is of in-place norms with activation, the module has others.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, InPlaceABN)]
    activated = any(norm.activation != "none" for norm in norms)
    if has_inplace_norms(state):
        if not norms:
            raise WeightsError(
                f"{path} was trained with in-place norms, {what} has others and would compute something else: set "
                f"MODEL.norm inplace (norm_layer=InPlaceABNSync)"
            )
        return state
    if TOOLBOX_MARK in state:
        # The toolbox's networks were trained with in-place norms, which count no batches.
        inplace = not any(key.endswith(OPTIONAL_SUFFIX) for key in state)
        state = part_of_network(state, part)
        if inplace and not norms:
            return _without_inplace_norms(state, module)
        activated = activated and part == "encoder"  # its heads have leaky ReLUs as well
    negative = sum(int((v < 0).sum()) for k, v in state.items() if v.dim() == 1 and k.endswith("weight"))
    if activated or (norms and negative):
        changes = ["leaky ReLU for ReLU"] * activated + [f"{negative} scales lose their sign"] * bool(negative)
        logger.warning(
            "%s was trained with other norms than in-place ones, from which %s computes something else (%s) until it "
            "has been trained on; MODEL.norm sync computes the same",
            path,
            what,
            ", ".join(changes),
        )
    return state


def _without_inplace_norms(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Norms of in-place networks, which multiply with |weight| + eps, for ordinary ones."""
    own, changed = dict(module.named_modules()), dict(state)
    for key in state:
        name, _, leaf = key.rpartition(".")
        norm = own.get(name)
        if leaf == "running_mean" and norm is not None and not isinstance(norm, InPlaceABN):
            changed[f"{name}.weight"] = scale_of(state[f"{name}.weight"], norm.eps)
    return changed


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    *,
    what: str = "model",
    reset_classifier: bool = False,
    base: bool = False,
    part: str = "",
    convert: Callable | None = None,
) -> LoadReport:
    """Load a state dict strictly and say what was loaded.

    Only the legacy batch-norm buffers of the published files may be surplus, and only `num_batches_tracked` missing.

    Args:
        module: encoder or decoder to fill.
        path: file of the state dict.
        what: how to call the module in messages.
        reset_classifier: classifier entries of another number of classes keep their fresh values, and are listed.
        base: the file is the ImageNet base of an encoder: its classifier is not used, and listed.
        part: 'encoder' or 'decoder' of a file that holds a whole network (the Cityscapes toolbox's).
        convert: makes our entries from the file's and our keys.

    Raises:
        WeightsError: the file cannot be read or does not fit; `module` is then unchanged.
    """
    own, report, fitting, wrong = module.state_dict(), LoadReport(what, str(path)), {}, []
    state = _for_norms_of(module, read_state_dict(path), path, what, part)
    for key, value in (convert(state, own) if convert else state).items():
        if key not in own:
            (report.legacy if key.endswith(LEGACY_SUFFIXES) else report.surplus).append(key)
        elif value.shape == own[key].shape:
            fitting[key] = value
        elif reset_classifier and key.startswith("conv_last") and value.shape[1:] == own[key].shape[1:]:
            report.skipped.append(key)
        else:
            wrong.append(f"{key} is {tuple(value.shape)}, the model's {tuple(own[key].shape)}")
    absent = [key for key in own if key not in fitting and key not in report.skipped and not _named(key, wrong)]
    report.missing = [key for key in absent if key.endswith(OPTIONAL_SUFFIX)]
    lacking = [key for key in absent if not key.endswith(OPTIONAL_SUFFIX)]
    surplus = [] if base else report.surplus
    if wrong or lacking or surplus:
        raise WeightsError(f"{path} does not fit {what}: {_misfits(wrong, lacking, surplus)}")
    module.load_state_dict(fitting, strict=False)
    report.loaded = list(fitting)
    logger.info("%s", report)
    return report


def _misfits(wrong: list[str], lacking: list[str], surplus: list[str]) -> str:
    labels = {"other shape": wrong, "missing in the file": lacking, "unknown to the model": surplus}
    text = "; ".join(f"{label}: {shorten(names)}" for label, names in labels.items() if names)
    if wrong and all(line.startswith("conv_last") for line in wrong) and not lacking and not surplus:
        text += (
            "; the file has another number of classes: give the model the same number, or, to train on from here, "
            "start the classifier anew (MODEL.reset_classifier True, reset_classifier=True)"
        )
    return text


def is_of_version_1(path: str | os.PathLike) -> bool:
    """Whether a file holds a ResNet of version 1.0, whose stem ends in 64 channels (later: 128)."""
    return read_state_dict(path).get("conv3.weight", torch.empty(0)).shape[:1] == (64,)


def _named(key: str, lines: list[str]) -> bool:
    return any(line.startswith(f"{key} is ") for line in lines)
