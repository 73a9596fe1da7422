"""Evaluate a trained network on several devices: python eval_multipro.py --gpus 0-3 --cfg config/NAME.yaml"""

from mit_semseg.cli import common, evaluate, logs
from mit_semseg.cli.devices import describe, pick_devices
from mit_semseg.config import load_config

EXAMPLES = """\
  python eval_multipro.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0-3
  python eval_multipro.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0,2 VAL.visualize True
  python eval_multipro.py --cfg config/quickstart.yaml --gpus cpu,cpu"""


def main() -> int:
    args = common.make_parser(__doc__, EXAMPLES, common.EVALUATION).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    common.refuse_torchrun("eval_multipro.py starts its own processes: under torchrun use eval.py")
    devices = pick_devices(args.device)
    logs.setup_logger(0, None, args.level).info("devices: %s", ", ".join(map(describe, devices)))
    evaluation = evaluate.score(args.cfg, args.opts, devices)
    evaluate.report(cfg, args.cfg, evaluation)
    return 1 if evaluation.skipped else 0


if __name__ == "__main__":
    common.run(main, "figures are written at the end only, so start it again")
