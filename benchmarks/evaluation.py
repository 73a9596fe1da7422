"""Measure an evaluation, from image files to metrics and panels (PNG files).

    python benchmarks/evaluation.py [--device cuda] [--workers 8] [--json FILE]

The images are synthetic and have 683x512 pixels. The networks have random weights and 150 classes. By default, one
worker loads the images.

- baseline: Pillow and NumPy prepare the images. The network runs in float32, channels first. The logits of all
  classes are resized to the image size, softmax is averaged over the scales, and histograms give the IoU.
- ours: `evaluate` with the options of eval.py, in float32 or bfloat16. It also computes boundary IoU, calibration and
  label quality, which the baseline does not.
- without boundary IoU: the same, except that the pixels near boundaries are not counted.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from common import interleaved, parser_of, write
from metrics_and_colors import CLASSES, color_by_class, histograms
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import write_images
from mit_semseg.dataset import ValDataset
from mit_semseg.dataset.transforms import MEAN, STD, round_up, scale_for
from mit_semseg.evaluation import InferenceOptions, Predictor, diagnostics, evaluate
from mit_semseg.evaluation.evaluator import LoadOptions
from mit_semseg.models import ModelBuilder, SegmentationModule, pyramid
from mit_semseg.predict.results import save_png
from mit_semseg.predict.visualize import result_panel

ADE20K = (300, 375, 450, 525, 600)
CASES = (
    ("mobilenetv2dilated", "c1_deepsup", (512,)),
    ("resnet18dilated", "ppm_deepsup", ADE20K),
    ("resnet50dilated", "ppm_deepsup", ADE20K),
    ("hrnetv2", "c1", (512,)),
)


class BaselineDataset(Dataset):
    """Prepares images and labels with Pillow and NumPy."""

    def __init__(self, dataset: ValDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        data, record = self.dataset, self.dataset.records[index]
        image = Image.open(data.path(record, "fpath_img")).convert("RGB")
        scales = []
        for short in data.img_sizes:
            scale = scale_for(*image.size, short, data.img_max_size)
            size = [round_up(int(side * scale), data.padding_constant) for side in image.size]
            x = np.float32(image.resize(size, Image.Resampling.BILINEAR)) / 255
            x = ((x - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)
            scales.append(torch.from_numpy(np.ascontiguousarray(x))[None])
        label = np.int64(Image.open(data.path(record, "fpath_segm"))) - 1
        return {"img_ori": np.array(image), "img_data": scales, "seg_label": label}


def baseline(module: SegmentationModule, dataset: ValDataset, folder: Path, workers: int) -> np.ndarray:
    """Evaluate and write panels; return the number of pixels in intersections and unions, (2, CLASSES)."""
    totals, device = np.zeros((2, CLASSES)), next(module.parameters()).device
    loader = DataLoader(BaselineDataset(dataset), batch_size=None, num_workers=workers)
    with torch.no_grad(), mock.patch.object(pyramid, "conv_over_pyramid", pyramid.conv_over_resized):
        for number, item in enumerate(loader):
            label, probabilities = np.asarray(item["seg_label"]), 0
            for x in item["img_data"]:
                logits = module.logits({"img_data": x.to(device)})
                resized = F.interpolate(logits, label.shape, mode="bilinear", align_corners=False)
                probabilities = probabilities + resized.softmax(dim=1) / len(item["img_data"])
            prediction = probabilities.argmax(dim=1)[0].cpu().numpy()
            totals += histograms(prediction, label)
            panel = [np.asarray(item["img_ori"])]
            panel += [color_by_class(values, dataset.table.colors) for values in (label, prediction)]
            Image.fromarray(np.concatenate(panel, axis=1)).save(folder / f"{number}.png")
    return totals


def no_boundary_counts(prediction: torch.Tensor, label: torch.Tensor, num_class: int) -> torch.Tensor:
    """Replace `boundary_counts`, without its work."""
    return torch.zeros(3, num_class, dtype=torch.int64, device=label.device)


def ours(predictor: Predictor, dataset: ValDataset, folder: Path, workers: int, boundaries: bool):
    """Call `evaluate` and write panels; return the result of `evaluate`."""
    counts = diagnostics.boundary_counts if boundaries else no_boundary_counts
    with ThreadPoolExecutor(2) as pool, mock.patch.object(diagnostics, "boundary_counts", counts):

        def save(item, label_map):
            path = folder / f"{Path(item['info']).stem}.png"
            pool.submit(lambda: save_png(result_panel(item, label_map, dataset.table), path))

        loading = LoadOptions(workers=workers)
        return evaluate(predictor, dataset, loading=loading, progress=False, on_result=save, diagnostics=True)


def measure(
    encoder: str, decoder: str, sizes: tuple[int, ...], device: torch.device, images: int, workers: int, repeats: int
) -> list[dict]:
    """Return a row of results for every implementation; `sizes` are the short sides of the scales."""
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, pretrained=False)
    dec = ModelBuilder.build_decoder(decoder, num_class=CLASSES, in_channels=enc.out_channels)
    module = SegmentationModule(enc, dec, None).eval().to(device)
    with TemporaryDirectory() as name:
        folder, out = Path(name), Path(name, "out")
        write_images(folder)
        out.mkdir()
        opt = SimpleNamespace(imgSizes=sizes, imgMaxSize=1000, padding_constant=8, num_class=CLASSES)
        dataset = ValDataset(folder, ".", opt)
        dataset.records = [dataset.records[i % len(dataset.records)] for i in range(images)]
        implementations = {"baseline": partial(baseline, module, dataset, out, workers)}
        for precision in ("fp32", "bf16"):
            predictor = Predictor(module, device, InferenceOptions(precision=precision))
            for boundaries, suffix in ((True, ""), (False, ", without boundary IoU")):
                run = partial(ours, predictor, dataset, out, workers, boundaries)
                implementations[f"ours, {precision}{suffix}"] = run
        ms = interleaved(implementations, device, repeats)
    return [
        {
            "network": f"{encoder} + {decoder}, {len(sizes)} scale{'s' * (len(sizes) > 1)}",
            "implementation": name,
            "ms per image": value / images,
            "times faster": ms["baseline"] / value,
        }
        for name, value in ms.items()
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=4, help="images per measurement (default: 4)")
    parser.add_argument("--workers", type=int, default=1, help="workers that load images (default: 1)")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="indices of `CASES` to measure (default: all)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for number in args.cases:
        rows += measure(*CASES[number], device, args.images, args.workers, args.repeats)
    write(args.json, "evaluation", device, rows)


if __name__ == "__main__":
    main()
