"""Segment images: python test.py --imgs IMAGE_OR_FOLDER --cfg config/NAME.yaml [--gpus 0-3] [KEY VALUE ...]"""

from mit_semseg.cli import common, devices, logs, segment
from mit_semseg.config import load_config
from mit_semseg.engine import distributed
from mit_semseg.lib.utils import expand_path
from mit_semseg.predict.video import is_video

EXAMPLES = """\
  python test.py --imgs street.jpg --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python test.py --imgs photos/ --overlay --json TEST.result segmented
  python test.py --imgs photos/ --gpus 0-3
  python test.py --imgs 'photos/**/*.png' --gpu 0 TEST.checkpoint best.pth
  python test.py --imgs clip.mp4 --smoothing 0.5"""


def main() -> int:
    parser = common.make_parser(__doc__, EXAMPLES, common.TEST_KEYS)
    text = "image, folder (searched recursively), glob pattern, video, or number of a camera"
    parser.add_argument("--imgs", required=True, metavar="PATH", type=expand_path, help=text)
    segment.add_arguments(parser)
    args = parser.parse_intermixed_args()
    cfg, suffixes = load_config(args.cfg, args.opts), segment.suffixes_of(args)
    if is_video(args.imgs):
        logs.setup_logger(0, None, args.level)
        return segment.run_video(cfg, args.imgs, devices.pick_devices(args.device)[0], args.smoothing)
    with distributed.join(devices.pick_devices(args.device), cfg.RUNTIME.timeout) as world:
        common.check_ranks(cfg, world)
        logs.setup_logger(world.rank, None, args.level)
        return segment.run(cfg, world, args.imgs, suffixes, args.min_confidence)


if __name__ == "__main__":
    common.run(main, "the images segmented so far are in TEST.result")
