"""Train a segmentation network: python train.py --cfg config/NAME.yaml [--gpus 0-3] [KEY VALUE ...]"""

import torch

from mit_semseg import build
from mit_semseg.cli import common, devices, logs
from mit_semseg.cli.run_logger import RunLogger
from mit_semseg.config import OPTIONS, load_config
from mit_semseg.engine import RunFolder, Trainer, distributed

EXAMPLES = """\
  python train.py --cfg config/quickstart.yaml
  python train.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0-3
  torchrun --nproc_per_node=8 train.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python train.py --cfg config/quickstart.yaml TRAIN.num_epoch 10 TRAIN.resume auto"""


def main() -> int:
    args = common.make_parser(__doc__, EXAMPLES, common.TRAIN_KEYS).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    folder = RunFolder(cfg.DIR)
    with distributed.join(devices.pick_devices(args.device), cfg.RUNTIME.timeout) as world, folder.locked(world):
        common.check_ranks(cfg, world)
        common.resume_after_restart(cfg, folder, world)
        # Before data is loaded or a log is written, raise an error if another run in DIR would be overwritten.
        resumed = bool(folder.find_resume(cfg.TRAIN.resume, cfg.TRAIN.start_epoch) or cfg.TRAIN.start_epoch)
        dataset, val_dataset = build.build_data(cfg)

        logger = logs.setup_logger(world.rank, f"{cfg.DIR}/log.txt", args.level)
        logs.log_options(logger, cfg)
        logger.info("devices: %s", devices.describe_all(world))
        logger.info("%d training images, %d classes", dataset.num_sample, len(dataset.table))
        torch.manual_seed(cfg.TRAIN.seed)
        with distributed.first_on_machine(world):
            module = build.build_module(cfg, world.devices[0], resumed=resumed, dataset=dataset)
        batches = world.num_devices * cfg.TRAIN.accumulate
        optimizer, options = build.build_training(cfg, module, dataset.num_sample, batches)
        panels = [record["fpath_img"] for record in val_dataset.records] if val_dataset and cfg.TRAIN.visualize else []
        trainer = Trainer(module, optimizer, folder, options, world)
        with RunLogger(
            cfg.DIR,
            dataset.table,
            logger=cfg.TRAIN.logger,
            options={key: cfg.option(key) for key in OPTIONS},
            images=panels,
            main=world.is_main,
            resumed=resumed,
        ) as run_logger:
            inference = build.inference_options(cfg)
            trainer.fit(dataset, val_dataset, resume=cfg.TRAIN.resume, inference=inference, run_logger=run_logger)
        logger.info("training is complete: %s", cfg.DIR)
    return 1 if trainer.skipped else 0


if __name__ == "__main__":
    common.run(main, "the last checkpoint is in DIR; run the same command with TRAIN.resume auto to continue")
