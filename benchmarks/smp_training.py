"""Train and evaluate a network of segmentation_models.pytorch on the batches and with the options of train.py.

    python benchmarks/smp_training.py ARCHITECTURE {ce,dice,ce+dice,ce+lovasz} KEY VALUE ...

The encoder is tf_efficientnet_lite0 with the ImageNet weights that this package uses. The losses are those of
segmentation_models.pytorch. Its logits have the size of the image: set DATASET.segm_downsampling_rate 1. Images and
evaluation are those of this package. Writes DIR/result/results.json. Requires pip install segmentation-models-pytorch.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from mit_semseg import build
from mit_semseg.config import Config, load_config
from mit_semseg.dataset.loader import make_loader
from mit_semseg.dataset.transforms import normalize_batch
from mit_semseg.evaluation import Predictor
from mit_semseg.evaluation.evaluator import evaluate
from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import renormalize
from mit_semseg.models.weight_names import convert_names

IGNORE = -1
LOSSES = {
    "ce": lambda: nn.CrossEntropyLoss(ignore_index=IGNORE),
    "dice": lambda: smp.losses.DiceLoss("multiclass", ignore_index=IGNORE),
    "lovasz": lambda: smp.losses.LovaszLoss("multiclass", ignore_index=IGNORE),
}


class Network(nn.Module):
    """Network of segmentation_models.pytorch; the input has ImageNet normalization."""

    def __init__(self, architecture: str, classes: int):
        super().__init__()
        self.net = smp.create_model(architecture, "timm-tf_efficientnet_lite0", None, classes=classes)
        ours = ModelBuilder.build_encoder("efficientnet_lite0", pretrained=True)
        self.mean, self.std = ours.mean, ours.std
        theirs, own = convert_names(self.net.encoder.state_dict(), ours), ours.state_dict()
        for key, value in own.items():
            theirs[key].copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(renormalize(x, self.mean, self.std))


@dataclass
class Logits:
    """A network with the interface that `Predictor` expects."""

    network: Network
    align_corners = False

    def logits(self, batch: dict) -> Tensor:
        return self.network(batch["img_data"])


def train(network: Network, cfg: Config, losses: list[nn.Module]) -> None:
    """Train with AdamW and the poly schedule; the encoder and the decoder have their own learning rates."""
    encoder = list(network.net.encoder.parameters())
    decoder = [p for name, p in network.net.named_parameters() if not name.startswith("encoder.")]
    groups = [
        {"params": encoder, "lr": cfg.TRAIN.lr_encoder},
        {"params": decoder, "lr": cfg.TRAIN.lr_decoder},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.TRAIN.weight_decay)
    steps = cfg.TRAIN.num_epoch * cfg.TRAIN.epoch_iters
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, cfg.TRAIN.lr_pow)
    dataset, _ = build.build_data(cfg)
    network.train()
    for batch in islice(make_loader(dataset, workers=cfg.TRAIN.workers, batch_size=None), steps):
        images = normalize_batch(batch["img_data"], batch["normalization"], batch["sizes"])
        logits = network(images.contiguous())
        loss = sum(function(logits, batch["seg_label"]) for function in losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", help="for example unet, fpn, deeplabv3plus, upernet")
    parser.add_argument("loss", choices=("ce", "dice", "ce+dice", "ce+lovasz"))
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="options of train.py")
    parser.add_argument("--gpu", choices=("cpu",), default="cpu", help="device")
    parser.add_argument("-q", action="store_true", help="ignored")
    args = parser.parse_args()
    cfg = load_config(None, args.options)
    torch.manual_seed(cfg.TRAIN.seed)
    network = Network(args.architecture, cfg.DATASET.num_class)
    train(network, cfg, [LOSSES[name]() for name in args.loss.split("+")])
    evaluation = evaluate(Predictor(Logits(network.eval())), build.build_val_dataset(cfg), progress=False)
    path = Path(cfg.DIR, "result", "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evaluation.as_dict()))


if __name__ == "__main__":
    main()
