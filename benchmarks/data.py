"""Measure how many training images per second one process loads.

    python benchmarks/data.py [--json FILE]

The images are synthetic JPEGs of 683x512 pixels. Batches have two images at one of the five short sides of ADE20K.

- baseline: Pillow decodes and resizes, NumPy normalizes, the batch is float32.
- pixel-exact: Pillow decodes and resizes, the batch is uint8 and is normalized on the device.
- fast: like pixel-exact, but PyTorch resizes. DATASET.train_resize is `fast` by default.

Each implementation runs in the main process with one thread, and then in a DataLoader with one worker. The
normalization on the device is not measured.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from common import interleaved, parser_of, write
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.transforms import MEAN, STD, round_up

WIDTH, HEIGHT, IMAGES, RATE = 683, 512, 16, 8
CPU = torch.device("cpu")


def write_images(folder: Path) -> None:
    """Write smooth images with noise, and labels with large regions."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        regions = Image.fromarray(rng.integers(0, 151, (12, 16), dtype=np.uint8))
        for name, image, ending in (
            ("images", Image.fromarray(pixels), "jpg"),
            ("annotations", regions.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST), "png"),
        ):
            (folder / name).mkdir(exist_ok=True)
            image.save(folder / name / f"{number:02d}.{ending}")


class Baseline(Dataset):
    """Prepares batches with Pillow and NumPy; images, sizes and flips are the same as in a training dataset."""

    def __init__(self, dataset: TrainDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        data = self.dataset
        rng = np.random.default_rng((data.seed, 1, index))
        short, flips = int(rng.choice(data.img_sizes)), rng.random(data.batch_per_gpu) < 0.5
        pairs = []
        for record, flip in zip((data.records[i] for i in data.order[index]), flips, strict=True):
            image = Image.open(data.path(record, "fpath_img")).convert("RGB")
            label = Image.open(data.path(record, "fpath_segm"))
            if flip:
                image, label = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, label))
            scale = min(short / min(image.size), data.img_max_size / max(image.size))
            size = tuple(int(side * scale) for side in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR)
            x = (np.float32(image) / 255 - np.float32(MEAN)) / np.float32(STD)
            pairs.append((x.transpose(2, 0, 1), label.resize(size, Image.Resampling.NEAREST)))
        height, width = (round_up(max(x.shape[i] for x, _ in pairs), data.padding_constant) for i in (1, 2))
        images = torch.zeros(len(pairs), 3, height, width)
        labels = torch.full((len(pairs), height // RATE, width // RATE), -1, dtype=torch.long)
        for i, (x, label) in enumerate(pairs):
            images[i, :, : x.shape[1], : x.shape[2]] = torch.from_numpy(x)
            padded = Image.new("L", (round_up(x.shape[2], RATE), round_up(x.shape[1], RATE)))
            padded.paste(label)
            small = padded.resize((padded.width // RATE, padded.height // RATE), Image.Resampling.NEAREST)
            labels[i, : small.height, : small.width] = torch.from_numpy(np.int64(small)) - 1
        return {"img_data": images, "seg_label": labels}


def datasets(folder: Path) -> dict[str, Dataset]:
    """Return one dataset for each implementation, by name."""
    values = {"imgSizes": (300, 375, 450, 525, 600), "imgMaxSize": 1000, "padding_constant": 8, "num_class": 150}
    made = {}
    for resize in ("pixel-exact", "fast"):
        opt = SimpleNamespace(**values, segm_downsampling_rate=RATE, train_resize=resize)
        made[resize] = TrainDataset(folder, ".", opt, batch_per_gpu=2)
    return {"baseline": Baseline(made["pixel-exact"])} | {k: d.as_uint8() for k, d in made.items()}


def main() -> None:
    parser = parser_of(__doc__, repeats=7, device=False, threads=None)
    parser.add_argument("--batches", type=int, default=12, help="batches per measurement (default: 12)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with TemporaryDirectory() as folder:
        write_images(Path(folder))
        implementations = datasets(Path(folder))

        def read(dataset: Dataset) -> None:
            for number in range(args.batches):
                dataset[number]

        def load(dataset: Dataset) -> None:
            for _ in DataLoader(dataset, batch_size=None, sampler=range(args.batches * 4), num_workers=1):
                pass

        for where, work, count in (("in the main process", read, 1), ("in a worker", load, 4)):
            ms = interleaved({name: lambda d=d, f=work: f(d) for name, d in implementations.items()}, CPU, args.repeats)
            for name, value in ms.items():
                rows.append(
                    {
                        "implementation": f"{name}, {where}",
                        "images/s": 2e3 * args.batches * count / value,
                        "times faster": ms["baseline"] / value,
                    }
                )
    write(args.json, "data", CPU, rows)


if __name__ == "__main__":
    main()
