"""What does an exported network cost, also in 8-bit integers, beside the network in PyTorch?

    python benchmarks/exported.py [--json FILE]

Networks of random weights, a 512x688 picture, class scores of its size; the 8-bit files are calibrated with four
generated pictures. PyTorch: the network as it was trained (eager, float32, channels first), and as inference runs it in
float32 and bfloat16; ONNX Runtime: the file of `python -m mit_semseg.export`, with as many threads. All take turns.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from common import interleaved, network_of, parser_of, write
from roofline import INPUT

from data import write_pictures
from mit_semseg.cli.export import export
from mit_semseg.cli.quantize import OnnxNetwork, quantize
from mit_semseg.dataset import ValDataset
from mit_semseg.evaluation import InferenceOptions
from mit_semseg.models.layers import resize

PAIRS = (("mobilenetv2dilated", "c1_deepsup"), ("resnet18dilated", "ppm_deepsup"), ("resnet50dilated", "ppm_deepsup"))
CALIBRATION = 4  # pictures: the time does not depend on it
CPU = torch.device("cpu")


def row_of(encoder: str, decoder: str, folder: Path, pictures: ValDataset, repeats: int) -> dict:
    """Milliseconds of every way for a pair."""
    module, feed = network_of(encoder, decoder), {"img_data": torch.randn(1, 3, *INPUT)}
    path, small = folder / f"{encoder}.onnx", folder / f"{encoder}.int8.onnx"
    export(module, path, kind="onnx", about={})
    quantize(path, small, pictures)
    networks = {
        "eager": module,
        "inference": InferenceOptions().network(module),
        "bf16": InferenceOptions(precision="bf16").network(module),
    }
    networks |= {"onnx": OnnxNetwork(path), "onnx int8": OnnxNetwork(small)}

    def call(network):
        return lambda: resize(network.logits(feed), INPUT)

    with torch.inference_mode():
        ms = interleaved({name: call(network) for name, network in networks.items()}, CPU, repeats)
    ratios = {f"{name}, times faster": ms["eager"] / value for name, value in ms.items() if name != "eager"}
    return {"network": f"{encoder} + {decoder}", "eager ms": ms["eager"], **ratios}


def main() -> None:
    args = parser_of(__doc__, device=False).parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder)
        options = SimpleNamespace(imgSizes=(512,), imgMaxSize=1000, padding_constant=8)
        pictures = ValDataset(name, name, options).spread(CALIBRATION)
        rows = [row_of(*pair, folder, pictures, args.repeats) for pair in PAIRS]
    write(args.json, f"exported networks, {INPUT[0]}x{INPUT[1]}", CPU, rows)


if __name__ == "__main__":
    main()
