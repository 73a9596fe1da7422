"""Measure the start-up time of the package and of test.py.

    python benchmarks/startup.py [--json FILE]

Every measurement starts a new Python process. The first row compares importing torch and all parts of the package with
importing torch only. The second row compares test.py for one image with a minimal script that loads the same weights
and runs the network once.
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
        Image.fromarray(pixels).save(f"{folder}/image.jpg")
        options = ["DIR", folder, "TEST.result", f"{folder}/out", "DATASET.imgSizes", "300"]
        commands = {
            "import torch": ["-c", "import torch"],
            "import torch and the package": ["-c", EVERYTHING],
            "minimal script": ["-c", NETWORK, folder],
            "test.py": ["test.py", "--imgs", f"{folder}/image.jpg", "--cfg", CONFIG, "--gpu", "cpu", *options],
        }

        def call(command: list[str]) -> None:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

        cpu = torch.device("cpu")
        ms = interleaved({name: lambda c=c: call(c) for name, c in commands.items()}, cpu, args.repeats)
    rows = [
        {
            "case": case,
            "reference": reference,
            "ms": ms[case],
            "difference, ms": ms[case] - ms[reference],
            "ratio": ms[case] / ms[reference],
        }
        for case, reference in (("import torch and the package", "import torch"), ("test.py", "minimal script"))
    ]
    write(args.json, "startup", cpu, rows)


if __name__ == "__main__":
    main()
