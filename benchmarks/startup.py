"""How long does it take until something happens?

    python benchmarks/startup.py [--json FILE]

Fresh processes that take turns: one that imports torch, one that imports every part of the package with it, one that
loads the weights of MobileNetV2 + C1 and runs the network once, and `test.py` on one picture (one scale). What the
package adds is the second less the first; what the script adds is the last less the third.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import interleaved, parser_of, write
from PIL import Image

from mit_semseg.models import ModelBuilder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "config/ade20k-mobilenetv2dilated-c1_deepsup.yaml"
EVERYTHING = (
    "import torch, mit_semseg, mit_semseg.models, mit_semseg.engine, mit_semseg.predict.segmenter, mit_semseg.utils"
)
NETWORK = """
import sys, torch
from mit_semseg.models import ModelBuilder, SegmentationModule
encoder = ModelBuilder.build_encoder("mobilenetv2dilated", weights=sys.argv[1] + "/encoder_epoch_20.pth")
decoder = ModelBuilder.build_decoder(
    "c1_deepsup", in_channels=encoder.out_channels, weights=sys.argv[1] + "/decoder_epoch_20.pth"
)
with torch.inference_mode():
    SegmentationModule(encoder, decoder, None).eval().logits({"img_data": torch.zeros(1, 3, 304, 400)})
"""


def main() -> None:
    args = parser_of(__doc__, device=False, threads=None).parse_args()
    with TemporaryDirectory() as folder:
        encoder = ModelBuilder.build_encoder("mobilenetv2dilated", pretrained=False)
        decoder = ModelBuilder.build_decoder("c1_deepsup", in_channels=encoder.out_channels)
        torch.save(encoder.state_dict(), f"{folder}/encoder_epoch_20.pth")
        torch.save(decoder.state_dict(), f"{folder}/decoder_epoch_20.pth")
        pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/picture.jpg")
        options = ["DIR", folder, "TEST.result", f"{folder}/out", "DATASET.imgSizes", "300"]
        commands = {
            "torch": ["-c", "import torch"],
            "torch and the package": ["-c", EVERYTHING],
            "weights and network": ["-c", NETWORK, folder],
            "test.py": ["test.py", "--imgs", f"{folder}/picture.jpg", "--cfg", CONFIG, "--gpu", "cpu", *options],
        }

        def call(command: list[str]) -> None:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

        cpu = torch.device("cpu")
        ms = interleaved({name: lambda c=c: call(c) for name, c in commands.items()}, cpu, args.repeats)
    rows = [
        {"what": what, "ms": ms[whole], "beyond it, ms": ms[whole] - ms[part], "ratio": ms[whole] / ms[part]}
        for what, whole, part in (
            ("importing the package, beside torch", "torch and the package", "torch"),
            ("test.py, beside weights and network", "test.py", "weights and network"),
        )
    ]
    write(args.json, "startup", cpu, rows)


if __name__ == "__main__":
    main()
