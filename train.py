"""Train a segmentation network: python train.py --cfg config/NAME.yaml [--gpus 0-3] [KEY VALUE ...]"""

import torch

from mit_semseg import build
from mit_semseg.cli import common, logs
from mit_semseg.cli.devices import describe_all, pick_devices
from mit_semseg.cli.run_logger import RunLogger
from mit_semseg.config import load_config
from mit_semseg.engine import RunFolder, distributed, fit

EXAMPLES = """\
  python train.py --cfg config/quickstart.yaml
  python train.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0-3
  torchrun --nproc_per_node=8 train.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml
  python train.py --cfg config/quickstart.yaml TRAIN.num_epoch 10 TRAIN.resume auto"""


def main() -> int:
    args = common.make_parser(__doc__, EXAMPLES, common.TRAINING).parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    devices, files = pick_devices(args.device), RunFolder(cfg.DIR)
    with distributed.join(devices[0], cfg.RUNTIME.timeout) as processes, files.locked(processes):
        common.compare(cfg, processes)
        cfg = common.after_restart(cfg, files, processes)
        train = cfg.TRAIN
        # Refuses to write over a run before anything is loaded or logged.
        continued = bool(files.find_resume(train.resume, train.start_epoch) or train.start_epoch)
        dataset, validation = build.build_data(cfg)

        logger = logs.setup_logger(processes.rank, f"{cfg.DIR}/log.txt", args.level)
        logs.log_options(logger, cfg)
        logger.info("devices: %s", describe_all(devices, processes))
        logger.info("%d training images, %d classes", dataset.num_sample, len(dataset.table))
        torch.manual_seed(train.seed)
        with distributed.first_on_machine(processes):
            module = build.build_module(cfg, devices[0], continued=continued)
        batches = len(devices) * processes.size * train.accumulate
        optimizer, settings = build.build_training(cfg, module, dataset.num_sample, batches)
        pictures = [record["fpath_img"] for record in validation.records] if validation and train.visualize else []
        show = {"tensorboard": train.tensorboard, "pictures": pictures, "main": processes.main}
        with RunLogger(cfg.DIR, dataset.table, **show) as recorder:
            run = fit(
                module,
                optimizer,
                dataset,
                files,
                settings,
                devices=devices,
                processes=processes,
                resume=train.resume,
                val_dataset=validation,
                view=build.inference_options(cfg),
                recorder=recorder,
            )
        logger.info("training is complete: %s", cfg.DIR)
    return 1 if run.skipped else 0


if __name__ == "__main__":
    common.run(main, "DIR holds what was saved; the same command with TRAIN.resume auto goes on from there")
