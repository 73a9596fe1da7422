"""Measure memory and time of in-place batch norm.

    python benchmarks/inplace_abn.py [--device cuda] [--json FILE]

Compares two ResNet-101 PSPNets in a training step: one has batch norm and ReLU, the other in-place batch norm.
Memory is the size of the tensors that the autograd graph saves in the forward pass, without parameters and buffers.
The first column counts only tensors saved by normalization and activation layers.
"""

import torch
from common import interleaved, parser_of, write
from torch import nn

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.layers import NORMS

VARIANTS = {"batch norm, ReLU": "batch", "in place": "inplace"}
NODES = ("BatchNorm", "Relu", "InPlaceABN")  # parts of the names of autograd nodes


def build_network(norm: str, device: torch.device) -> SegmentationModule:
    torch.manual_seed(0)
    layer = NORMS[norm]
    encoder = ModelBuilder.build_encoder("resnet101_cityscapes", pretrained=False, norm_layer=layer)
    decoder = ModelBuilder.build_decoder(
        "psp_deepsup", num_class=19, in_channels=encoder.out_channels, norm_layer=layer
    )
    return SegmentationModule(encoder, decoder, MaskedNLLLoss(), 0.4).to(device).train()


def saved_bytes(module: nn.Module, batch: dict) -> dict[str, int]:
    """Return the number of bytes that the autograd graph of a training step saves, by kind of layer."""
    excluded = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    sizes: dict[str, dict[int, int]] = {"norm and activation": {}, "total": {}}
    stack, visited = [module(batch)[0].grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        stack += [function for function, _ in node.next_functions]
        for tensor in saved_tensors(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in excluded:
                sizes["total"][storage.data_ptr()] = storage.nbytes()
                if any(part in node.name() for part in NODES):
                    sizes["norm and activation"][storage.data_ptr()] = storage.nbytes()
    return {name: sum(storages.values()) for name, storages in sizes.items()}


def saved_tensors(node) -> list[torch.Tensor]:
    if hasattr(node, "saved_tensors"):
        return [tensor for tensor in node.saved_tensors if tensor is not None]
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return [v for v in flat if isinstance(v, torch.Tensor)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, default=193, help="image height and width")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows, steps = torch.device(args.device), {}, {}
    batch = {
        "img_data": torch.randn(args.batch, 3, args.size, args.size, device=device),
        "seg_label": torch.randint(0, 19, (args.batch, args.size, args.size), device=device),
    }
    for name, norm in VARIANTS.items():
        module = build_network(norm, device)
        rows[name] = {
            "case": name,
            **{f"MiB, {part}": size / 2**20 for part, size in saved_bytes(module, batch).items()},
        }

        def step(module=module):
            module.zero_grad(set_to_none=True)
            module(batch)[0].backward()

        steps[name] = step
    for name, ms in interleaved(steps, device, args.repeats).items():
        rows[name]["ms per step"] = ms
    baseline = dict(next(iter(rows.values())))
    for row in rows.values():
        for key in [key for key in baseline if key != "case"]:
            row[f"{key}, ratio"] = row[key] / baseline[key]
    title = f"inplace_abn, ResNet-101 PSPNet, {args.batch}x3x{args.size}x{args.size}"
    write(args.json, title, device, list(rows.values()))


if __name__ == "__main__":
    main()
