"""Convert ImageNet state dicts of torchvision, timm and EfficientNet-PyTorch to the names of our encoders."""

import re
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from .encoders.mobilenet import MobileNetV2

# Prefix of the names in a block -> names of the stem, in a block without expansion, and in a block with expansion
MOBILENETS = {
    "features.{number}.conv.": ("features.0.0 features.0.1", "0.0 0.1 1 2", "0.0 0.1 1.0 1.1 2 3"),  # torchvision
    "blocks.{stage}.{block}.": (  # timm
        "conv_stem bn1",
        "conv_dw bn1 conv_pw bn2",
        "conv_pw bn1 conv_dw bn2 conv_pwl bn3",
    ),
    "_blocks.{index}.": (  # EfficientNet-PyTorch
        "_conv_stem _bn0",
        "_depthwise_conv _bn1 _project_conv _bn2",
        "_expand_conv _bn0 _depthwise_conv _bn1 _project_conv _bn2",
    ),
}
RESNET_STEM = {  # timm
    "conv1.0": "conv1",
    "conv1.1": "bn1",
    "conv1.3": "conv2",
    "conv1.4": "bn2",
    "conv1.6": "conv3",
    "bn1": "bn3",
}
# Layers after the last feature map
HEAD = re.compile(r"_?(fc|classifier|conv_head|features\.18|bn1|bn2|incre_modules|downsamp_modules|final_layer)\.")


def convert_names(state: Mapping[str, Tensor], encoder: nn.Module) -> Mapping[str, Tensor]:
    """Rename the entries of a state dict to those of `encoder`, and drop the entries of the classifier.

    Entries with unknown names are kept. A state dict with the names of `encoder` is returned unchanged.
    """
    own = encoder.state_dict()
    if "conv6.weight" in own and "classifier.0.weight" in state:
        return _convert_vgg(state, own) or state
    names = {}
    if "conv1.0.weight" in state:
        names = RESNET_STEM
    elif isinstance(encoder, MobileNetV2):
        names = _mobilenet_names(state, encoder)
    renamed = OrderedDict()
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        new_key = f"{names[layer]}.{leaf}" if layer in names else key
        if new_key in own or not HEAD.match(key):
            renamed[new_key] = value
    return state if renamed.keys() == state.keys() else renamed


def _mobilenet_names(state: Mapping[str, Tensor], encoder: MobileNetV2) -> dict[str, str]:
    """Return the layer names in `state` and the corresponding names in `encoder`; {} if they are equal or unknown."""
    own_names = [name for name, layer in encoder.named_modules() if list(layer.parameters(recurse=False))]
    if all(f"{name}.weight" in state for name in own_names):
        return {}
    for prefix, (stem, first, others) in MOBILENETS.items():
        file_names, index = stem.split(), 0
        for stage, (expansion, _, depth, *_) in enumerate(encoder.stages):
            for block in range(depth):
                start = prefix.format(number=index + 1, index=index, stage=stage, block=block)
                file_names += [start + name for name in (first if expansion == 1 else others).split()]
                index += 1
        if f"{file_names[-1]}.weight" in state:
            return dict(zip(file_names, own_names, strict=True))
    return {}


def _convert_vgg(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of torchvision's VGG, whose first two linear layers become convolutions.

    Return {} if the number of layers differs.
    """
    file_keys, own_keys = (
        sorted((key for key in keys if key.startswith("features.")), key=lambda key: (int(key.split(".")[1]), key))
        for keys in (state, own)
    )
    if len(file_keys) != len(own_keys):
        return {}
    converted = {new: state[key] for new, key in zip(own_keys, file_keys, strict=True)}
    for layer, name, shape in (("classifier.0", "conv6", (512, 7, 7)), ("classifier.3", "conv7", (4096, 1, 1))):
        converted[f"{name}.weight"] = state[f"{layer}.weight"].view(-1, *shape)
        converted[f"{name}.bias"] = state[f"{layer}.bias"]
    return converted
