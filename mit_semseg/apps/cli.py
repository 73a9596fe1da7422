"""What the scripts share: parsers, logging, devices, and building a model from options."""

import argparse
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from ..config import Config, add_config_arguments
from ..engine import MaskedNLLLoss, RunFiles, Settings, build_optimizer, freeze_batch_norm
from ..lib.utils import UserError, available_cores
from ..models import ModelBuilder, SegmentationModule

DEFAULT_CONFIG = "config/ade20k-resnet50dilated-ppm_deepsup.yaml"
LOG_FORMAT = "[%(asctime)s %(levelname)s] %(message)s"


class NotSupportedCliException(UserError, ValueError):
    """A device that is not of a known form."""


def parse_devices(input_devices: str) -> list[str]:
    """Names of devices from a list such as `0-3`, `0,2`, `gpu0-gpu3` or `cpu`.

    Returns:
        `["gpu0", "gpu1", ...]`, each once; `cpu` stays `cpu`.

    Raises:
        NotSupportedCliException: a part is of another form.
    """
    devices: list[str] = []
    for part in input_devices.split(","):
        text = part.strip().lower()
        match = re.fullmatch(r"(gpu)?(\d+)-(?(1)(?:gpu)?)(\d+)", text)
        if text == "cpu":
            names = ["cpu"]
        elif re.fullmatch(r"(gpu)?\d+", text):
            names = [f"gpu{text.removeprefix('gpu')}"]
        elif match:
            low, high = sorted((int(match[2]), int(match[3])))
            names = [f"gpu{i}" for i in range(low, high + 1)]
        else:
            raise NotSupportedCliException(
                f'Can not recognize device: "{text}"; give GPU numbers such as 0, 0-3 or 0,2, or cpu'
            )
        devices += [name for name in names if name not in devices]
    return devices


def pick_device(text: str | None) -> torch.device:
    """The device to work on.

    Args:
        text: as for `parse_devices`, one device; None takes the first GPU if there is one, else the CPU.

    Raises:
        UserError: several devices, or a GPU that is not there.
    """
    devices = pick_devices(text)
    if len(devices) > 1:
        raise UserError(f"{len(devices)} devices given ({', '.join(map(str, devices))}), but this script works on one")
    return devices[0]


def pick_devices(text: str | None) -> list[torch.device]:
    """The devices to work on, as `pick_device`; `cpu` may come more than once, for several processes.

    Raises:
        UserError: a GPU that is not there.
    """
    if text is None:
        return [torch.device("cuda:0" if torch.cuda.is_available() else "cpu")]
    if {part.strip().lower() for part in text.split(",")} == {"cpu"}:
        return [torch.device("cpu")] * len(text.split(","))
    return [_device(name) for name in parse_devices(text)]


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    index, count = int(name.removeprefix("gpu")), torch.cuda.device_count()
    if index >= count:
        there = f"GPUs 0 to {count - 1}" if count else "no GPU that PyTorch can use"
        raise UserError(f"{name} was asked for, but this machine has {there}; leave the option out, or give cpu")
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """A device for the log, with the GPU's name or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Parser with `--cfg`, the device option and the trailing options; examples are shown below the help."""
    parser = argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpus",
        "--gpu",
        dest="device",
        metavar="N",
        help="number of the GPU, or cpu (default: the first GPU if there is one, else the CPU)",
    )
    add_config_arguments(parser, DEFAULT_CONFIG)
    return parser


def setup_logger(distributed_rank: int = 0, filename: str | None = "log.txt") -> logging.Logger:
    """Log to the terminal and, if a name is given, to a file (appended to).

    Args:
        distributed_rank: of this process; all but 0 log warnings only.
        filename: of the log; None logs to the terminal alone.

    Returns:
        The toolkit's logger.
    """
    log = logging.getLogger(__package__.split(".")[0])
    log.setLevel(logging.INFO if distributed_rank == 0 else logging.WARNING)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if filename:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(filename, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    return log


def build_module(
    cfg: Config, device: torch.device, *, checkpoint: str | None = None, continued: bool = False
) -> SegmentationModule:
    """The network that the options describe, on a device.

    Args:
        cfg: configuration.
        device: where to put it.
        checkpoint: suffix of the trained weights in DIR, e.g. `epoch_20.pth`; None starts training, from the MODEL
            options.
        continued: the weights will come from the run in DIR, so no ImageNet base is fetched.

    Raises:
        UserError: weights are missing or do not fit, or MODEL.fc_dim contradicts the encoder.
    """
    model = cfg.MODEL
    encoder_file, decoder_file = model.weights_encoder, model.weights_decoder
    if checkpoint:
        encoder_file, decoder_file = map(str, RunFiles(cfg.DIR).pair(checkpoint))
    encoder = ModelBuilder.build_encoder(
        model.arch_encoder,
        weights=encoder_file,
        pretrained=model.pretrained and not continued,
        output_stride=model.output_stride or None,
    )
    _check_fc_dim(model, encoder)
    decoder = ModelBuilder.build_decoder(
        model.arch_decoder,
        num_class=cfg.DATASET.num_class,
        weights=decoder_file,
        in_channels=encoder.out_channels,
        new_head=model.new_head and not checkpoint,
    )
    module = SegmentationModule(encoder, decoder, MaskedNLLLoss(), cfg.TRAIN.deep_sup_scale)
    return module.to(device)


def build_training(cfg: Config, module: SegmentationModule) -> tuple[torch.optim.Optimizer, Settings]:
    """Optimizer and settings of a training run; freezes batch norms and sets the memory order if asked to."""
    train = cfg.TRAIN
    if train.channels_last:
        module.to(memory_format=torch.channels_last)
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
    values["workers"] = min(train.workers, available_cores())
    return optimizer, Settings(**values)


def _check_fc_dim(model: Config, encoder: torch.nn.Module) -> None:
    default, own = 2048, encoder.out_channels[-1]
    if model.fc_dim not in (default, own):
        raise UserError(
            f"MODEL.fc_dim is {model.fc_dim}, but {model.arch_encoder} gives {own} channels: set {own}, or leave it out"
        )


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main function; a user's mistake is printed without a traceback and exits with 2."""
    try:
        sys.exit(main())
    except UserError as error:
        # A loader process puts its traceback before the message.
        text = str(error).split(f"{type(error).__name__}: ")[-1].strip()
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(
            f"error: the GPU is out of memory ({str(error).splitlines()[0]}); lower TRAIN.batch_size_per_gpu, "
            f"DATASET.imgSizes or DATASET.imgMaxSize",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
