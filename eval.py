"""Evaluate a trained network: python eval.py --cfg config/NAME.yaml [--gpu 0] [KEY VALUE ...]"""

from mit_semseg.cli import common, devices, evaluate, logs
from mit_semseg.config import load_config
from mit_semseg.engine import distributed

EXAMPLES = """\
  python eval.py --cfg config/quickstart.yaml
  python eval.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0
  torchrun --nproc_per_node=8 eval.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python eval.py --cfg config/quickstart.yaml VAL.visualize True VAL.checkpoint best.pth"""


def main() -> int:
    parser = common.make_parser(__doc__, EXAMPLES, common.EVAL_KEYS)
    evaluate.add_arguments(parser)
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    with distributed.join(devices.pick_devices(args.device), cfg.RUNTIME.timeout) as world:
        common.check_ranks(cfg, world)
        logs.setup_logger(world.rank, None, args.level)
        return evaluate.run(cfg, world, args)


if __name__ == "__main__":
    common.run(main, "metrics are written only at the end; run the command again")
