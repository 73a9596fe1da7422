"""Serve a web page that segments uploaded images with a trained network.

    python -m mit_semseg.demo --cfg config/NAME.yaml [--port 7860] [KEY VALUE ...]

Without --host, only this machine can open the page. Uploads are deleted after ten minutes and at exit.
"""

import logging
import math
import threading
from functools import partial
from pathlib import Path

from ...build import build_val_dataset
from ...config import Config, load_config
from ...dataset.layouts import find_images
from ...engine import RunFolder
from ...lib.utils import UserError, expand_path
from ...predict.segmenter import Segmenter
from ..common import make_parser
from ..devices import pick_devices
from ..logs import setup_logger
from .page import Networks, build_page, launch
from .uploads import Limits

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python -m mit_semseg.demo --cfg config/quickstart.yaml
  python -m mit_semseg.demo --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0 TEST.checkpoint best.pth
  python -m mit_semseg.demo --cfg config/quickstart.yaml --host 0.0.0.0 --port 8000 --max-upload 5 --max-pixels 8"""

MAX_EXAMPLES = 6  # maximum number of example images


def find_checkpoints(cfg: Config) -> list[str]:
    """Return checkpoint names: TEST.checkpoint, then complete checkpoints in DIR (best.pth, newest to oldest epoch)."""
    folder = RunFolder(cfg.DIR)
    names = ["best.pth", *(f"epoch_{epoch}.pth" for epoch in reversed(folder.epochs()))]
    complete = [name for name in names if all(folder.path(part, name).is_file() for part in ("encoder", "decoder"))]
    return list(dict.fromkeys([cfg.TEST.checkpoint, *complete]))


def weights_version(cfg: Config, name: str) -> tuple[int, ...]:
    """Return the modification times of the files of a checkpoint."""
    folder = RunFolder(cfg.DIR)
    paths = folder.path("encoder", name), folder.path("decoder", name), Path(name)
    return tuple(path.stat().st_mtime_ns for path in paths if path.is_file())


def find_examples(cfg: Config, folder: str | None) -> list[str]:
    """Return paths of images in `folder` or, if it is None, of validation images ([] if they cannot be read)."""
    if folder:
        images = [str(path) for path in find_images(Path(folder))]
        if not images:
            raise UserError(f"--examples {folder} contains no images; give another folder")
        return images[:MAX_EXAMPLES]
    try:
        dataset = build_val_dataset(cfg).subsample(MAX_EXAMPLES)
    except UserError as error:
        logger.info("the page has no example images: %s", error)
        return []
    return [str(dataset.path(record, "fpath_img")) for record in dataset.records]


def main() -> None:
    """Run `python -m mit_semseg.demo` until Ctrl-C."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.prog = "python -m mit_semseg.demo"
    text = "address to listen on (default: 127.0.0.1, for this machine only); 0.0.0.0 is for all machines"
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help=text)
    text = "port to listen on (default: 7860); 0 selects a free port"
    parser.add_argument("--port", type=int, metavar="N", default=7860, help=text)
    text = "folder of example images (default: images of the validation set)"
    parser.add_argument("--examples", metavar="FOLDER", type=expand_path, help=text)
    for name, kind, unit, text in (
        ("upload", float, "MB", "maximum file size in MB"),
        ("pixels", float, "MILLIONS", "maximum image size in million pixels"),
        ("waiting", int, "N", "maximum number of images in the queue"),
    ):
        text = f"{text} (default: %(default)s)"
        parser.add_argument(f"--max-{name}", type=kind, metavar=unit, default=Limits._field_defaults[name], help=text)
    args = parser.parse_intermixed_args()
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} is out of range; use 0 to 65535")
    limits = Limits(args.max_upload, args.max_pixels, args.max_waiting)
    for name, value in limits._asdict().items():
        if not 0 < value < math.inf:
            raise UserError(f"--max-{name} {value} is out of range; use a finite number above 0")
    cfg = load_config(args.cfg, args.opts)
    if cfg.DATASET.mean:
        raise UserError("the web page supports only 8-bit RGB images, not DATASET.mean; segment images with test.py")
    setup_logger(0, None, args.level)
    device = pick_devices(args.device)[0]
    networks = Networks(
        find_checkpoints(cfg), partial(Segmenter.from_cfg, cfg, device=device), partial(weights_version, cfg)
    )
    networks.load(networks.names[0])  # report errors of TEST.checkpoint before the page is served
    logger.info("device: %s", device)
    description = f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DATASET.num_class} classes."
    page = build_page(networks, limits, find_examples(cfg, args.examples), description)
    url = launch(page, limits, args.host, args.port)
    try:
        logger.info("serving at %s (Ctrl-C to stop)", url)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
