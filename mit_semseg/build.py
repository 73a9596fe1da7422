"""Build objects from a configuration: devices, datasets, network, optimizer, inference options.

Nothing below this module reads the configuration.
"""

import logging
import math
from dataclasses import fields

import torch

from .config import OPTIONS, Config, load_config
from .dataset import TrainDataset, ValDataset
from .dataset.classes import class_table_from_options
from .engine import RunFolder, TrainingOptions, build_loss, build_optimizer, freeze_batch_norm
from .evaluation import InferenceOptions
from .evaluation.evaluator import LoadOptions
from .evaluation.inference import lacks_bfloat16
from .lib.nn import enable_activation_checkpointing
from .lib.nn.inplace_abn import has_inplace_norms
from .lib.nn.scatter import as_device
from .lib.utils import UserError
from .models import ModelBuilder, SegmentationModule
from .models.layers import NORMS
from .models.pretrained import PUBLISHED, download_published, published_options
from .models.weight_files import read_state_dict

logger = logging.getLogger(__name__)

# Options stored in checkpoints, except those that only say how a run starts.
RUN_SECTIONS = ("DATASET.", "INFERENCE.", "MODEL.", "TRAIN.", "VAL.num_val")
START_KEYS = ("TRAIN.resume", "TRAIN.start_epoch")
COMPILE_MULTIPLE = 64  # of the sides of batches, so that the network is compiled for few sizes


def build_module(
    cfg: Config, device: torch.device, *, checkpoint: str | None = None, resumed: bool = False
) -> SegmentationModule:
    """Build the network on a device.

    Args:
        cfg: configuration.
        device: for the network.
        checkpoint: suffix of trained weights in DIR, e.g. `epoch_20.pth`, or a file; the weights of a published model
            are downloaded if they do not exist. None for training: the MODEL options choose the initial weights.
        resumed: the weights will be restored from a checkpoint, so do not load initial ones.

    Raises:
        UserError: weights do not exist or do not fit, or an option does not suit the device.
    """
    if not checkpoint:
        _check_training_device(cfg, device)
        if resumed:
            return _assemble(cfg, pretrained=False).to(device)
        files = cfg.MODEL.weights_encoder, cfg.MODEL.weights_decoder
        return _assemble(cfg, files, pretrained=cfg.MODEL.pretrained).to(device)
    folder = RunFolder(cfg.DIR)
    if name := _missing_published(cfg, folder, checkpoint):
        logger.info("downloading the published model %s to %s", name, cfg.DIR)
        download_published(name, cfg.DIR)
    files = tuple(map(str, folder.weight_files(checkpoint)))
    with folder.naming_checkpoints():
        if cfg.MODEL.norm == "inplace" and not has_inplace_norms(read_state_dict(files[0])):
            raise UserError(f"{files[0]} was not trained with MODEL.norm inplace: set MODEL.norm sync")
        return _assemble(cfg, files, pretrained=False).to(device)


def _missing_published(cfg: Config, folder: RunFolder, checkpoint: str) -> str:
    """Name of the published model that the configuration describes if its weights are not in DIR, else ''."""
    name, exists = folder.folder.name, [folder.path(part, checkpoint).is_file() for part in ("encoder", "decoder")]
    if any(exists) or name not in PUBLISHED or checkpoint != f"epoch_{PUBLISHED[name]}.pth":
        return ""
    published = load_config(None, published_options(name))
    keys = ("MODEL.arch_encoder", "MODEL.arch_decoder", "DATASET.num_class")
    return name if all(cfg.option(key) == published.option(key) for key in keys) else ""


def _check_training_device(cfg: Config, device: torch.device) -> None:
    if cfg.MODEL.norm == "inplace" and device.type == "mps":
        raise UserError("MODEL.norm inplace computes in float64, which mps does not support: set MODEL.norm sync")
    if cfg.TRAIN.amp == "bf16" and lacks_bfloat16(device):
        raise UserError(f"TRAIN.amp bf16: {device} does not support bfloat16; set TRAIN.amp fp16 or off")


def _assemble(cfg: Config, files: tuple[str, str] = ("", ""), *, pretrained: bool) -> SegmentationModule:
    """Build encoder, decoder and loss; load weights from the files of encoder and decoder."""
    model, train, norm = cfg.MODEL, cfg.TRAIN, NORMS[cfg.MODEL.norm]
    encoder = ModelBuilder.build_encoder(
        model.arch_encoder,
        weights=files[0],
        pretrained=pretrained,
        output_stride=model.output_stride or None,
        norm_layer=norm,
    )
    if model.fc_dim not in (OPTIONS["MODEL.fc_dim"].default, encoder.out_channels[-1]):
        raise UserError(
            f"MODEL.fc_dim {model.fc_dim}: {model.arch_encoder} has {encoder.out_channels[-1]} channels; set this "
            f"number, or remove the option"
        )
    decoder = ModelBuilder.build_decoder(
        model.arch_decoder,
        num_class=cfg.DATASET.num_class,
        weights=files[1],
        in_channels=encoder.out_channels,
        output_stride=encoder.output_stride,
        reset_classifier=model.reset_classifier,
        norm_layer=norm,
    )
    loss = build_loss(
        train.loss,
        class_weights=train.class_weights,
        label_smoothing=train.label_smoothing,
        ohem_threshold=train.ohem_threshold,
        ohem_min_kept=max(1, train.ohem_min_kept // cfg.DATASET.segm_downsampling_rate**2),  # pixels of the label
    )
    return SegmentationModule(encoder, decoder, loss, train.deep_sup_scale)


def inference_options(cfg: Config) -> InferenceOptions:
    """Return the options of inference."""
    inference = cfg.INFERENCE
    size = (inference.window_size,) * 2 if isinstance(inference.window_size, int) else tuple(inference.window_size)
    return InferenceOptions(
        flip=inference.flip,
        window_size=size if all(size) else None,
        window_overlap=inference.window_overlap,
        precision=inference.precision,
        compile=inference.compile,
    )


def load_options(cfg: Config, batch_size: int, local_size: int) -> LoadOptions:
    """Return the options of loading images for inference."""
    return LoadOptions(batch_size, cfg.TRAIN.workers, cfg.RUNTIME.timeout, local_size)


def build_val_dataset(cfg: Config, max_images: int = 0) -> ValDataset:
    """Return the validation set, its first `max_images` images if not 0."""
    return ValDataset(cfg.DATASET.root_dataset, cfg.DATASET.list_val, cfg.DATASET, max_images or -1)


def build_data(cfg: Config) -> tuple[TrainDataset, ValDataset | None]:
    """Return the training set and, if TRAIN.eval_epoch is not 0, the validation set."""
    train, data = cfg.TRAIN, cfg.DATASET
    options = {"seed": train.seed, "side_step": COMPILE_MULTIPLE if train.compile else 1}
    dataset = TrainDataset(data.root_dataset, data.list_train, data, train.batch_size_per_gpu, **options).as_uint8()
    return dataset, build_val_dataset(cfg, cfg.VAL.num_val) if train.eval_epoch else None


def build_training(
    cfg: Config, module: SegmentationModule, images: int, batches: int
) -> tuple[torch.optim.Optimizer, TrainingOptions]:
    """Return optimizer and options of a training run; freeze, compile and lay out the network as configured.

    Args:
        images: in the training set; TRAIN.epoch_iters 0 is one pass over them.
        batches: per step, over all devices and ranks.
    """
    train = cfg.TRAIN
    if train.channels_last:
        module.to(memory_format=torch.channels_last)
    if train.fix_bn:
        freeze_batch_norm(module)
    if not train.lr_encoder:
        freeze_batch_norm(module.encoder)
        module.encoder.requires_grad_(False)
    if train.activation_checkpointing:
        enable_activation_checkpointing(module.encoder)
    if train.compile:
        module.encoder.compile()
        module.encoder.compiled = True
    optimizer = build_optimizer(
        module.encoder,
        module.decoder,
        train.optim,
        rates=(train.lr_encoder, train.lr_decoder),
        beta1=train.beta1,
        weight_decay=train.weight_decay,
    )
    values = {field.name: train[field.name] for field in fields(TrainingOptions) if field.name != "run_options"}
    values["epoch_iters"] = train.epoch_iters or math.ceil(images / (batches * train.batch_size_per_gpu))
    keys = [key for key in OPTIONS if key.startswith(RUN_SECTIONS) and key not in START_KEYS]
    stored = {key: cfg.option(key) for key in keys} | {"class names": list(class_table_from_options(cfg.DATASET).names)}
    return optimizer, TrainingOptions(**values, run_options=stored)


def auto_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device of this machine.

    Args:
        name: `auto` (the first GPU, or the CPU if there is none), or a name or device that `torch.device` accepts.

    Raises:
        UserError: unknown name, or this machine does not have the device.
    """
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: choose one of auto, {', '.join(available)}") from None
    device = as_device(device) if torch.cuda.is_available() else device
    if str(device) not in available:
        raise UserError(f"device {name!r}: this machine has {', '.join(available)}")
    return device
