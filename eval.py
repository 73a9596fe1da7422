"""Evaluate a trained network: python eval.py --cfg config/NAME.yaml [--gpu 0] [KEY VALUE ...]"""

from mit_semseg.apps import cli, scoring
from mit_semseg.config import load_config

EXAMPLES = """\
  python eval.py --cfg config/quickstart.yaml
  python eval.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0
  python eval.py --cfg config/quickstart.yaml VAL.visualize True VAL.checkpoint best.pth"""


def main() -> None:
    args = cli.make_parser(__doc__, EXAMPLES).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    device = cli.pick_device(args.device)
    cli.setup_logger(filename=None).info("device: %s", cli.describe(device))
    scoring.report(cfg, args.cfg, scoring.score(cfg, device))


if __name__ == "__main__":
    cli.run(main)
