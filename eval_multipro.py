"""Evaluate a trained network on several devices: python eval_multipro.py --gpus 0-3 --cfg config/NAME.yaml"""

from mit_semseg.apps import cli, logs, scoring
from mit_semseg.apps.devices import describe, pick_devices
from mit_semseg.config import load_config

EXAMPLES = """\
  python eval_multipro.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0-3
  python eval_multipro.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0,2 VAL.visualize True
  python eval_multipro.py --cfg config/quickstart.yaml --gpus cpu,cpu"""


def main() -> int:
    args = cli.make_parser(__doc__, EXAMPLES, cli.EVALUATION).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    cli.refuse_torchrun("eval_multipro.py starts its own processes: under torchrun use eval.py")
    devices = pick_devices(args.device)
    logs.setup_logger(0, None, args.level).info("devices: %s", ", ".join(map(describe, devices)))
    evaluation = scoring.score(args.cfg, args.opts, devices)
    scoring.report(cfg, args.cfg, evaluation)
    return 1 if evaluation.left_out else 0


if __name__ == "__main__":
    cli.run(main, "figures are written at the end only, so start it again")
