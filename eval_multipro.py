"""Evaluate a trained network on several devices: python eval_multipro.py --gpus 0-3 --cfg config/NAME.yaml"""

from mit_semseg.cli import common, devices, evaluate, logs
from mit_semseg.config import load_config
from mit_semseg.engine import World

EXAMPLES = """\
  python eval_multipro.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0-3
  python eval_multipro.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0,2 VAL.visualize True
  python eval_multipro.py --cfg config/quickstart.yaml --gpus cpu,cpu"""


def main() -> int:
    parser = common.make_parser(__doc__, EXAMPLES, common.EVAL_KEYS)
    evaluate.add_arguments(parser)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    common.refuse_torchrun("eval_multipro.py starts its own processes; with torchrun use eval.py")
    world = World(devices=devices.pick_devices(args.device), timeout=cfg.RUNTIME.timeout)
    logs.setup_logger(0, None, args.level)
    return evaluate.run(cfg, world, args)


if __name__ == "__main__":
    common.run(main, "metrics are written only at the end; run the command again")
