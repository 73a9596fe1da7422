"""Train a segmentation network: python train.py --cfg config/NAME.yaml [--gpus 0] [KEY VALUE ...]"""

import os
from dataclasses import fields

import torch

from mit_semseg.apps import cli
from mit_semseg.apps.recorder import RunRecorder
from mit_semseg.config import load_config
from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import RunFiles, Settings, build_optimizer, fit, freeze_batch_norm

EXAMPLES = """\
  python train.py --cfg config/quickstart.yaml
  python train.py --cfg config/ade20k-resnet50dilated-ppm_deepsup.yaml --gpus 0
  python train.py --cfg config/quickstart.yaml TRAIN.num_epoch 10 TRAIN.resume auto"""


def main() -> None:
    args = cli.make_parser(__doc__, EXAMPLES, device_option="--gpus").parse_intermixed_args()
    cfg = load_config(args.cfg, args.opts)
    device, files, train = cli.pick_device(args.device), RunFiles(cfg.DIR), cfg.TRAIN
    if not train.start_epoch:
        files.find_resume(train.resume)  # refuse to write over a run before anything is loaded or logged
    logger = cli.setup_logger(filename=f"{cfg.DIR}/log.txt")
    logger.info("options:\n%s", cfg.dump())
    logger.info("device: %s", cli.describe(device))

    torch.manual_seed(train.seed)
    data = cfg.DATASET
    dataset = TrainDataset(data.root_dataset, data.list_train, data, train.batch_size_per_gpu, seed=train.seed)
    validation = ValDataset(data.root_dataset, data.list_val, data) if train.eval_epoch else None
    logger.info("%d training images, %d classes", dataset.num_sample, len(dataset.table))
    module = cli.build_module(cfg, device)
    if train.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if train.fix_bn:
        freeze_batch_norm(module)
    optimizer = build_optimizer(
        module.encoder,
        module.decoder,
        name=train.optim,
        lr_encoder=train.lr_encoder,
        lr_decoder=train.lr_decoder,
        beta1=train.beta1,
        weight_decay=train.weight_decay,
    )
    values = {field.name: train[field.name] for field in fields(Settings)}
    values["workers"] = min(train.workers, os.cpu_count() or 1)
    recorder = RunRecorder(cfg.DIR, dataset.table, tensorboard=train.tensorboard)
    fit(module, optimizer, dataset, files, Settings(**values), device=device, resume=train.resume,
        val_dataset=validation, recorder=recorder)  # fmt: skip
    recorder.close()
    logger.info("training is complete: %s", cfg.DIR)


if __name__ == "__main__":
    cli.run(main)
