"""Web page that segments uploaded images with a trained network.

    python -m mit_semseg.demo --cfg config/NAME.yaml [--port 7860] [KEY VALUE ...]

Only this machine can open the page unless --host is given. Uploads are deleted after ten minutes and at exit.
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

MAX_EXAMPLES = 6


def find_checkpoints(cfg: Config) -> list[str]:
    """Return the checkpoints to choose from: TEST.checkpoint, then the best and the epochs of DIR, newest first."""
    folder = RunFolder(cfg.DIR)
    folder.weight_files(cfg.TEST.checkpoint)
    names = ["best.pth", *(f"epoch_{epoch}.pth" for epoch in reversed(folder.epochs()))]
    complete = [name for name in names if all(folder.path(part, name).is_file() for part in ("encoder", "decoder"))]
    return list(dict.fromkeys([cfg.TEST.checkpoint, *complete]))


def find_examples(cfg: Config, folder: str | None) -> list[str]:
    """Return example images: from a folder, else from the validation set if it can be read."""
    if folder:
        images = [str(path) for path in find_images(Path(folder))]
        if not images:
            raise UserError(f"--examples {folder}: no images found")
        return images[:MAX_EXAMPLES]
    try:
        dataset = build_val_dataset(cfg).subsample(MAX_EXAMPLES)
    except UserError as error:
        logger.info("no example images: %s", error)
        return []
    return [str(dataset.path(record, "fpath_img")) for record in dataset.records]


def main() -> None:
    """Run `python -m mit_semseg.demo` until Ctrl-C."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.prog = "python -m mit_semseg.demo"
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on; 0.0.0.0 for the whole network"
    )
    parser.add_argument("--port", type=int, metavar="N", default=7860, help="port to listen on; 0 for any free port")
    parser.add_argument(
        "--examples", metavar="FOLDER", type=expand_path, help="example images (default: from the validation set)"
    )
    for name, kind, unit, text in (
        ("upload", float, "MB", "file size"),
        ("pixels", float, "MILLIONS", "pixels per image"),
        ("waiting", int, "N", "images in the queue"),
    ):
        text = f"limit of the {text} (default: %(default)s)"
        parser.add_argument(f"--max-{name}", type=kind, metavar=unit, default=Limits._field_defaults[name], help=text)
    args = parser.parse_intermixed_args()
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: must be in 0..65535")
    limits = Limits(args.max_upload, args.max_pixels, args.max_waiting)
    for name, value in limits._asdict().items():
        if not 0 < value < math.inf:
            raise UserError(f"--max-{name} {value}: must be above 0")
    cfg = load_config(args.cfg, args.opts)
    setup_logger(0, None, args.level)
    device = pick_devices(args.device)[0]
    networks = Networks(find_checkpoints(cfg), partial(Segmenter.from_cfg, cfg, device=device))
    networks.load(networks.names[0])  # report its errors now
    logger.info("device: %s", device)
    description = f"{cfg.MODEL.arch_encoder} + {cfg.MODEL.arch_decoder}, {cfg.DATASET.num_class} classes."
    page = build_page(networks, limits, find_examples(cfg, args.examples), description)
    url = launch(page, limits, args.host, args.port)
    try:
        logger.info("serving at %s (Ctrl-C to stop)", url)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
