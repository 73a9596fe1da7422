"""Compare the speed of exported networks with PyTorch.

    python benchmarks/exported.py [--json FILE]

The networks have random weights. The input is one image of 512x688 pixels, and the output is logits, resized to the
size of the image.

- PyTorch, eager: the network as it was built (float32, channels first).
- PyTorch, prepared: the network as eval.py prepares it (fused batch norms, channels last), in float32 or bfloat16.
- ONNX, ONNX int8: the files that `python -m mit_semseg.export --int8` writes, run with ONNX Runtime.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from common import interleaved, network_of, parser_of, write
from roofline import INPUT

from data import write_images
from mit_semseg.cli.export import export
from mit_semseg.cli.quantize import OnnxNetwork, quantize
from mit_semseg.dataset import ValDataset
from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.models.layers import resize

PAIRS = (("mobilenetv2dilated", "c1_deepsup"), ("resnet18dilated", "ppm_deepsup"), ("resnet50dilated", "ppm_deepsup"))
CALIBRATION_IMAGES = 4  # the number does not affect the speed of the network
CPU = torch.device("cpu")


def measure(encoder: str, decoder: str, folder: Path, dataset: ValDataset, repeats: int) -> dict:
    """Measure one network; return a row of the table."""
    module, feed = network_of(encoder, decoder), {"img_data": torch.randn(1, 3, *INPUT)}
    path, int8_path = folder / f"{encoder}.onnx", folder / f"{encoder}.int8.onnx"
    export(module, path, kind="onnx", metadata={})
    quantize(path, int8_path, dataset)
    networks = {
        "PyTorch, eager": module,
        "PyTorch, prepared": Predictor(module, CPU).network,
        "PyTorch, prepared, bf16": Predictor(module, CPU, InferenceOptions(precision="bf16")).network,
        "ONNX": OnnxNetwork(path),
        "ONNX int8": OnnxNetwork(int8_path),
    }

    def call(network):
        return lambda: resize(network.logits(feed), INPUT)

    with torch.inference_mode():
        ms = interleaved({name: call(network) for name, network in networks.items()}, CPU, repeats)
    eager = ms.pop("PyTorch, eager")
    ratios = {f"{name}, times faster": eager / value for name, value in ms.items()}
    return {"network": f"{encoder} + {decoder}", "PyTorch, eager ms": eager, **ratios}


def main() -> None:
    args = parser_of(__doc__, device=False).parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        options = SimpleNamespace(imgSizes=(512,), imgMaxSize=1000, padding_constant=8)
        dataset = ValDataset(name, name, options).subsample(CALIBRATION_IMAGES)
        rows = [measure(*pair, folder, dataset, args.repeats) for pair in PAIRS]
    write(args.json, f"exported networks, {INPUT[0]}x{INPUT[1]}", CPU, rows)


if __name__ == "__main__":
    main()
