"""How fast are exported networks, in float32 and in 8-bit integers, compared to PyTorch?

    python benchmarks/exported.py [--json FILE]

Networks with random weights, one 512x688 image, logits resized to the image. PyTorch: the network as trained (eager,
float32, channels first), and as prepared for inference in float32 and bfloat16. ONNX Runtime: the file of
`python -m mit_semseg.export` and its int8 copy, calibrated with four synthetic images. All use the same number of
threads and take turns.
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
from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.models.layers import resize

PAIRS = (("mobilenetv2dilated", "c1_deepsup"), ("resnet18dilated", "ppm_deepsup"), ("resnet50dilated", "ppm_deepsup"))
CALIBRATION_IMAGES = 4  # their number does not change the time
CPU = torch.device("cpu")


def measure(encoder: str, decoder: str, folder: Path, dataset: ValDataset, repeats: int) -> dict:
    """Return the time of the network in PyTorch, and how many times faster the other forms are."""
    module, feed = network_of(encoder, decoder), {"img_data": torch.randn(1, 3, *INPUT)}
    path, int8_path = folder / f"{encoder}.onnx", folder / f"{encoder}.int8.onnx"
    export(module, path, kind="onnx", metadata={})
    quantize(path, int8_path, dataset)
    networks = {
        "eager": module,
        "inference": Predictor(module, CPU).network,
        "bf16": Predictor(module, CPU, InferenceOptions(precision="bf16")).network,
        "onnx": OnnxNetwork(path),
        "onnx int8": OnnxNetwork(int8_path),
    }

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
        dataset = ValDataset(name, name, options).subsample(CALIBRATION_IMAGES)
        rows = [measure(*pair, folder, dataset, args.repeats) for pair in PAIRS]
    write(args.json, f"exported networks, {INPUT[0]}x{INPUT[1]}", CPU, rows)


if __name__ == "__main__":
    main()
