"""What do in-place norms save, and what do they cost?

    python benchmarks/inplace_abn.py [--device cuda] [--json FILE]

A training step of ResNet-101 PSPNet with batch norm and ReLU, and with in-place activated batch norm. Bytes kept are
those of the tensors that the nodes of the autograd graph hold after the forward pass, each storage counted once and
parameters left out: those that normalization and activation hold, and those that anything holds.
"""

import torch
from common import interleaved, parser_of, write
from torch import nn

from mit_semseg.engine import MaskedNLLLoss
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.layers import NORMS

WAYS = {"batch norm, ReLU": "batch", "in place": "inplace"}
KINDS = ("BatchNorm", "Relu", "NormalizeInPlace")  # in the names of the nodes that normalize and activate


def network(norm: str, device: torch.device) -> SegmentationModule:
    torch.manual_seed(0)
    options = {"norm_layer": NORMS[norm]}
    encoder = ModelBuilder.build_encoder("resnet101_cityscapes", pretrained=False, **options)
    decoder = ModelBuilder.build_decoder("psp_deepsup", num_class=19, in_channels=encoder.out_channels, **options)
    return SegmentationModule(encoder, decoder, MaskedNLLLoss(), 0.4).to(device).train()


def bytes_kept(module: nn.Module, feed: dict) -> dict[str, int]:
    """Bytes that the graph of a training step keeps: in `normalization and activation`, and in `everything`."""
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept: dict[str, dict[int, int]] = {"normalization and activation": {}, "everything": {}}
    todo, seen = [module(feed)[0].grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        for tensor in saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept["everything"][storage.data_ptr()] = storage.nbytes()
                if any(kind in node.name() for kind in KINDS):
                    kept["normalization and activation"][storage.data_ptr()] = storage.nbytes()
    return {name: sum(sizes.values()) for name, sizes in kept.items()}


def saved(node) -> list[torch.Tensor]:
    """Tensors that a node of the graph holds."""
    if hasattr(node, "saved_tensors"):
        return list(node.saved_tensors)
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    flat = [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]
    return [v for v in flat if isinstance(v, torch.Tensor)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, default=193, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows, steps = torch.device(args.device), {}, {}
    feed = {
        "img_data": torch.randn(args.batch, 3, args.size, args.size, device=device),
        "seg_label": torch.randint(0, 19, (args.batch, args.size, args.size), device=device),
    }
    for name, norm in WAYS.items():
        module = network(norm, device)
        rows[name] = {
            "what": name,
            **{f"MiB, {what}": size / 2**20 for what, size in bytes_kept(module, feed).items()},
        }

        def step(module=module):
            module.zero_grad(set_to_none=True)
            module(feed)[0].backward()

        steps[name] = step
    for name, ms in interleaved(steps, device, args.repeats).items():
        rows[name]["ms per step"] = ms
    plain = next(iter(rows.values()))
    for row in rows.values():
        for kind, key in zip(("activations", "memory", "time"), [k for k in row if k != "what"], strict=True):
            row[f"{kind} ratio"] = row[key] / plain[key]
    title = f"inplace_abn, ResNet-101 PSPNet, {args.batch}x3x{args.size}x{args.size}"
    write(args.json, title, device, list(rows.values()))


if __name__ == "__main__":
    main()
