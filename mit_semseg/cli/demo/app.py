"""A web page that segments pictures with a trained network.

    python -m mit_semseg.demo --cfg config/NAME.yaml [--port 7860] [KEY VALUE ...]

The page is for this computer only unless --host says otherwise. Uploads are deleted after ten minutes, and with the
page; what is shown and saved is made in the visitor's browser.
"""

import argparse
import logging
import math
import threading
from functools import partial
from pathlib import Path

from ...config import Config, load_config
from ...dataset import ValDataset
from ...dataset.layouts import find_images
from ...engine import RunFolder
from ...lib.utils import UserError, expand_path
from ...predict.segmenter import Segmenter
from ..common import make_parser, run
from ..devices import describe, pick_devices
from ..logs import setup_logger
from .page import Networks, build_page, launch
from .uploads import Limits

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python -m mit_semseg.demo --cfg config/quickstart.yaml
  python -m mit_semseg.demo --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0 TEST.checkpoint best.pth
  python -m mit_semseg.demo --cfg config/quickstart.yaml --host 0.0.0.0 --port 8000 --max-upload 5 --max-pixels 8"""

SHOWN_EXAMPLES = 6


def checkpoints_of(cfg: Config) -> list[str]:
    """Checkpoints one can choose from: TEST.checkpoint first, then the best and the epochs of DIR, newest first."""
    files = RunFolder(cfg.DIR)
    found = [cfg.TEST.checkpoint, "best.pth", *(f"epoch_{n}.pth" for n in reversed(files.epochs()))]
    parts = ("encoder", "decoder")
    there = [name for name in dict.fromkeys(found) if all(files.part(part, name).is_file() for part in parts)]
    if not there or there[0] != cfg.TEST.checkpoint:
        files.pair(cfg.TEST.checkpoint)  # a file elsewhere; otherwise this says what is missing
        there.insert(0, cfg.TEST.checkpoint)
    return there


def examples_of(cfg: Config, given: str | None) -> list[str]:
    """Pictures shown as examples: of a folder, or some of the validation set if it is there."""
    if given:
        found = [str(path) for path in find_images(Path(given))]
        if not found:
            raise UserError(f"--examples {given}: no pictures there")
        return found[:SHOWN_EXAMPLES]
    try:
        data = ValDataset(cfg.DATASET.root_dataset, cfg.DATASET.list_val, cfg.DATASET)
    except UserError as error:
        logger.info("no examples: %s", error)
        return []
    return [str(Path(cfg.DATASET.root_dataset, item["fpath_img"])) for item in data.subsample(SHOWN_EXAMPLES).records]


def main() -> None:
    """Serve the page from the command line, until Ctrl-C."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.prog = "python -m mit_semseg.demo"
    standard = Limits()
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to serve at; 0.0.0.0 is for the whole network"
    )
    parser.add_argument("--port", type=int, metavar="N", default=7860, help="port to serve at; 0 takes a free one")
    parser.add_argument("--examples", metavar="FOLDER", type=expand_path, help="to choose from (default: validation)")
    parser.add_argument("--max-upload", type=float, default=standard.upload, metavar="MB", help="of a file")
    parser.add_argument("--max-pixels", type=float, default=standard.pixels, metavar="MILLIONS", help="of a picture")
    parser.add_argument("--max-waiting", type=int, default=standard.waiting, metavar="N", help="in the queue")
    args = parser.parse_intermixed_args()
    limits = _limits_of(args)
    cfg = load_config(args.cfg, args.opts)
    setup_logger(0, None, args.level)
    device = pick_devices(args.device)[0]
    networks = Networks(checkpoints_of(cfg), partial(Segmenter.from_cfg, cfg, device=device))
    networks.load(networks.names[0])  # what is wrong with it is said now, not to the first visitor
    logger.info("device: %s", describe(device))
    about = f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DATASET.num_class} classes."
    page = build_page(networks, limits, examples_of(cfg, args.examples), about)
    address = launch(page, limits, args.host, args.port)
    try:
        logger.info("the page is at %s (Ctrl-C ends it)", address)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _limits_of(args: argparse.Namespace) -> Limits:
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: give a number from 1 to 65535, or 0 for a free one")
    for name, least in (("upload", 0.001), ("pixels", 0.001), ("waiting", 1)):
        value = getattr(args, f"max_{name}")
        if not least <= value < math.inf:
            raise UserError(f"--max-{name} {value}: give a number from {least} up")
    return Limits(args.max_upload, args.max_pixels, args.max_waiting)


if __name__ == "__main__":
    run(main)
