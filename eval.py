"""Evaluate a trained network: python eval.py --cfg config/NAME.yaml [--gpu 0] [KEY VALUE ...]"""

from mit_semseg.cli import common, evaluate, logs
from mit_semseg.cli.devices import describe_all, pick_devices
from mit_semseg.config import load_config
from mit_semseg.engine import distributed

EXAMPLES = """\
  python eval.py --cfg config/quickstart.yaml
  python eval.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0
  torchrun --nproc_per_node=8 eval.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python eval.py --cfg config/quickstart.yaml VAL.visualize True VAL.checkpoint best.pth"""


def main() -> int:
    args = common.make_parser(__doc__, EXAMPLES, common.EVALUATION).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    devices = pick_devices(args.device)
    with distributed.join(devices[0], cfg.RUNTIME.timeout) as processes:
        common.compare(cfg, processes)
        logger = logs.setup_logger(processes.rank, None, args.level)
        logger.info("devices: %s", describe_all(devices, processes))
        evaluation = evaluate.score(args.cfg, args.opts, devices, processes)
        if processes.main:
            evaluate.report(cfg, args.cfg, evaluation)
    return 1 if evaluation.skipped else 0


if __name__ == "__main__":
    common.run(main, "figures are written at the end only, so start it again")
