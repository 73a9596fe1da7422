"""Segment pictures: python test.py --imgs PICTURE_OR_FOLDER --cfg config/NAME.yaml [--gpus 0-3] [KEY VALUE ...]"""

from logging import INFO
from pathlib import Path

from mit_semseg.cli import common, logs
from mit_semseg.cli.devices import describe_all, pick_devices
from mit_semseg.cli.segment import add_result_arguments, check_arguments, endings_of, segment_share
from mit_semseg.cli.segment import run as run_video
from mit_semseg.cli.workers import share_out
from mit_semseg.config import load_config
from mit_semseg.engine import distributed
from mit_semseg.lib.utils import expand_path, progress_bar
from mit_semseg.predict import video
from mit_semseg.predict.images import find_inputs

EXAMPLES = """\
  python test.py --imgs street.jpg --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python test.py --imgs photos/ --overlay --json TEST.result segmented
  python test.py --imgs photos/ --gpus 0-3
  python test.py --imgs 'photos/**/*.png' --gpu 0 TEST.checkpoint best.pth
  python test.py --imgs clip.mp4 --smoothing 0.5"""


def main() -> int:
    parser = common.make_parser(__doc__, EXAMPLES, common.PICTURES)
    what = "a picture, a folder (recursive), a glob, a video, or a camera's number"
    parser.add_argument("--imgs", required=True, metavar="PATH", type=expand_path, help=what)
    parser.add_argument("--smoothing", type=float, default=0, help="of a video: share of the previous frames, 0 to 1")
    add_result_arguments(parser)
    args = parser.parse_intermixed_args()
    cfg, endings = load_config(args.cfg, args.opts), endings_of(args)
    check_arguments(args)
    devices = pick_devices(args.device)
    if video.is_video(args.imgs):
        logs.setup_logger(0, None, args.level)
        run_video(cfg, args.imgs, devices[0], args.smoothing)
        return 0
    with distributed.join(devices[0], cfg.RUNTIME.timeout) as processes:
        common.compare(cfg, processes)
        logger = logs.setup_logger(processes.rank, None, args.level)
        logger.info("devices: %s", describe_all(devices, processes))
        found = find_inputs(args.imgs, Path(cfg.TEST.result), endings) if processes.main else None
        plan = processes.collect(found, "looking for pictures")[0]  # one list for all
        with progress_bar(total=len(plan), desc="segmenting", unit="img", shown=processes.main) as bar:
            say = bar.write if args.level <= INFO else bar.set_postfix_str  # a quiet bar is not shown
            arguments = segment_share, devices, processes, len(plan), (args.cfg, args.opts, plan, endings)
            shares = share_out(*arguments, lambda line: bar.update() or say(line))
        failed = [reason for share in shares for reason in share]
        if processes.main:
            print(f"{len(plan) - len(failed)} of {len(plan)} pictures segmented, results in {cfg.TEST.result}")
            for reason in failed:
                print(f"not segmented: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    common.run(main, "the pictures done so far are in TEST.result")
