"""Evaluate a trained network: python eval.py --cfg config/NAME.yaml [--gpu 0] [KEY VALUE ...]"""

import json
from pathlib import Path

from mit_semseg.apps import cli
from mit_semseg.apps.visualize import result_names, result_panel, save_picture
from mit_semseg.config import load_config
from mit_semseg.dataset import ValDataset
from mit_semseg.evaluation import evaluate
from mit_semseg.lib.utils import whole_file

EXAMPLES = """\
  python eval.py --cfg config/quickstart.yaml
  python eval.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpu 0
  python eval.py --cfg config/quickstart.yaml VAL.visualize True VAL.checkpoint best.pth"""


def main() -> None:
    args = cli.make_parser(__doc__, EXAMPLES).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    device = cli.pick_device(args.device)
    logger = cli.setup_logger(filename=None)
    logger.info("device: %s", cli.describe(device))

    data, results = cfg.DATASET, Path(cfg.DIR, "result")
    dataset = ValDataset(data.root_dataset, data.list_val, data)
    module = cli.build_module(cfg, device, checkpoint=cfg.VAL.checkpoint)

    names = result_names([record["fpath_img"] for record in dataset.records])

    def draw(item, prediction):
        save_picture(result_panel(item, prediction, dataset.table), Path(results, f"{names[item['info']]}.png"))

    evaluation = evaluate(
        module, dataset, device=device, batch_size=cfg.VAL.batch_size, on_result=draw if cfg.VAL.visualize else None
    )
    print(evaluation.report())
    with whole_file(results / "results.json") as partial:
        content = {"config": args.cfg, "checkpoint": cfg.VAL.checkpoint, **evaluation.as_dict()}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"Written to {results}: results.json" + (" and a panel per image" if cfg.VAL.visualize else ""))


if __name__ == "__main__":
    cli.run(main)
