"""Segment pictures: python test.py --imgs PICTURE_OR_FOLDER --cfg config/NAME.yaml [--gpu 0] [KEY VALUE ...]"""

from pathlib import Path

from tqdm import tqdm

from mit_semseg.apps import cli
from mit_semseg.apps.predictor import find_pictures, segment
from mit_semseg.config import load_config
from mit_semseg.dataset.datasets import table_of

EXAMPLES = """\
  python test.py --imgs street.jpg --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python test.py --imgs photos/ --overlay --json TEST.result segmented
  python test.py --imgs 'photos/**/*.png' --gpu 0 TEST.checkpoint best.pth"""
SMALLEST_SHARE = 0.001  # classes below are not printed


def main() -> int:
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument("--imgs", required=True, metavar="PATH", help="a picture, a folder (recursive), or a glob")
    parser.add_argument("--overlay", action="store_true", help="also write the tinted picture with a legend")
    parser.add_argument("--index", action="store_true", help="also write the class indices as a grey PNG")
    parser.add_argument("--json", action="store_true", help="also write the classes and their shares as JSON")
    args = parser.parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    device, table = cli.pick_device(args.device), table_of(cfg.DATASET)
    cli.setup_logger(filename=None).info("device: %s", cli.describe(device))
    wanted = {".png": True, "_overlay.png": args.overlay, "_index.png": args.index, ".json": args.json}
    endings = [ending for ending, yes in wanted.items() if yes]
    plan = find_pictures(args.imgs, Path(cfg.TEST.result), endings)
    module = cli.build_module(cfg, device, checkpoint=cfg.TEST.checkpoint)

    failed = []
    results = segment(module, list(plan), cfg.DATASET, table, device=device, batch_size=cfg.TEST.batch_size)
    for result in tqdm(results, total=len(plan), desc="segmenting", unit="img", disable=None):
        if isinstance(result, tuple):
            failed.append(result[1])
            continue
        stem = plan[result.path]
        result.save(stem, endings)
        tqdm.write(f"{result.path} -> {stem}.png")
        for entry in result.classes:
            if entry["share"] > SMALLEST_SHARE:
                tqdm.write(f"  {table.labels[entry['index']]}: {entry['share'] * 100:.2f} %")
    print(f"{len(plan) - len(failed)} of {len(plan)} pictures segmented, results in {cfg.TEST.result}")
    for reason in failed:
        print(f"not segmented: {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
