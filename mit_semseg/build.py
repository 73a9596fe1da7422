"""Build devices, datasets, network, optimizer and inference options from a configuration.

The packages engine, evaluation and models do not import the configuration; this module passes options to them.
"""

import logging
import math
from contextlib import suppress
from dataclasses import fields

import torch

from .config import OPTIONS, Config, load_config
from .dataset import TrainDataset, ValDataset
from .dataset.class_counts import class_counts
from .dataset.classes import class_names, class_table_from_options
from .engine import RunFolder, TrainingOptions, build_loss, build_optimizer, freeze_batch_norm
from .engine.losses import balanced_class_weights
from .evaluation import InferenceOptions
from .evaluation.evaluator import LoadOptions
from .evaluation.inference import lacks_bfloat16
from .lib.nn import compile_blocks, enable_activation_checkpointing
from .lib.nn.inplace_abn import has_inplace_norms
from .lib.nn.scatter import as_device
from .lib.utils import UserError
from .models import ModelBuilder, SegmentationModule
from .models.layers import NORMS
from .models.pretrained import PUBLISHED, download_published, published_options
from .models.weight_files import read_state_dict

logger = logging.getLogger(__name__)

# Checkpoints store these sections and options, except START_KEYS, which matter only at the start of a run.
RUN_SECTIONS = ("DATASET.", "INFERENCE.", "MODEL.", "TRAIN.", "VAL.num_val")
START_KEYS = ("TRAIN.resume", "TRAIN.start_epoch")


def build_module(
    cfg: Config,
    device: torch.device,
    *,
    checkpoint: str | None = None,
    resumed: bool = False,
    dataset: TrainDataset | None = None,
) -> SegmentationModule:
    """Build the segmentation network on a device.

    Args:
        checkpoint: path of a checkpoint, or `epoch_20.pth` for `encoder_epoch_20.pth` and `decoder_epoch_20.pth` in
            DIR; missing files of a published model are downloaded. None (training) uses the weights in MODEL options.
        resumed: do not load initial weights, because the caller will restore a checkpoint.
        dataset: training set, whose pixels are counted for TRAIN.class_weights auto; None uses no class weights then.

    Raises:
        UserError: weights do not exist or do not match the network, or the device does not support an option.
    """
    if not checkpoint:
        if cfg.MODEL.norm == "inplace" and device.type == "mps":
            raise UserError("MODEL.norm inplace needs float64, which mps does not support; set MODEL.norm sync")
        if cfg.TRAIN.amp == "bf16" and lacks_bfloat16(device):
            raise UserError(f"TRAIN.amp bf16: {device} does not support bfloat16; set TRAIN.amp fp16 or off")
        files = ("", "") if resumed else (cfg.MODEL.weights_encoder, cfg.MODEL.weights_decoder)
        pretrained = cfg.MODEL.pretrained and not resumed
        reset = cfg.MODEL.reset_classifier
        return _assemble(cfg, files, pretrained=pretrained, reset_classifier=reset, dataset=dataset).to(device)
    folder = RunFolder(cfg.DIR)
    if name := _missing_published(cfg, folder, checkpoint):
        logger.info("downloading the published model %s to %s", name, cfg.DIR)
        download_published(name, cfg.DIR)
    files = tuple(map(str, folder.weight_files(checkpoint)))
    with folder.naming_checkpoints():
        if cfg.MODEL.norm == "inplace" and not has_inplace_norms(read_state_dict(files[0])):
            raise UserError(f"the weights {files[0]} were not trained with MODEL.norm inplace; set MODEL.norm sync")
        module = _assemble(cfg, files, pretrained=False).to(device)
    module.temperature = folder.read_temperature(checkpoint)
    return module


def _missing_published(cfg: Config, folder: RunFolder, checkpoint: str) -> str:
    """Return the name of the published model that must be downloaded to DIR, or '' if no download is needed."""
    name, exists = folder.folder.name, [folder.path(part, checkpoint).is_file() for part in ("encoder", "decoder")]
    if any(exists) or name not in PUBLISHED or checkpoint != f"epoch_{PUBLISHED[name]}.pth":
        return ""
    published = load_config(None, published_options(name))
    keys = ("MODEL.arch_encoder", "MODEL.arch_decoder", "DATASET.num_class")
    return name if all(cfg.option(key) == published.option(key) for key in keys) else ""


def _assemble(
    cfg: Config,
    files: tuple[str, str],
    *,
    pretrained: bool,
    reset_classifier: bool = False,
    dataset: TrainDataset | None = None,
) -> SegmentationModule:
    """Build the network. `files` are the weight files of encoder and decoder; '' loads no weights."""
    model, train, norm = cfg.MODEL, cfg.TRAIN, NORMS[cfg.MODEL.norm]
    encoder = ModelBuilder.build_encoder(
        model.arch_encoder,
        weights=files[0],
        pretrained=pretrained,
        output_stride=model.output_stride or None,
        in_channels=cfg.DATASET.channels if cfg.DATASET.mean else None,
        norm_layer=norm,
    )
    if model.fc_dim not in (OPTIONS["MODEL.fc_dim"].default, encoder.out_channels[-1]):
        raise UserError(
            f"MODEL.fc_dim {model.fc_dim} does not match {model.arch_encoder}, which has {encoder.out_channels[-1]} "
            f"output channels; set MODEL.fc_dim {encoder.out_channels[-1]} or remove the option"
        )
    if cfg.DATASET.normalization == "caffe" and hasattr(encoder, "mean"):
        raise UserError(
            f"DATASET.normalization caffe: {model.arch_encoder} converts images with ImageNet normalization to its own "
            f"normalization; set DATASET.normalization imagenet"
        )
    _check_image_sizes(cfg, getattr(encoder, "size_divisor", 1))
    decoder = ModelBuilder.build_decoder(
        model.arch_decoder,
        num_class=cfg.DATASET.num_class,
        weights=files[1],
        in_channels=encoder.out_channels,
        output_stride=encoder.output_stride,
        reset_classifier=reset_classifier,
        old_classes=class_names(model.weights_classes) if reset_classifier else (),
        class_names=class_table_from_options(cfg.DATASET).names,
        norm_layer=norm,
    )
    class_weights = train.class_weights
    if class_weights == "auto":
        class_weights = balanced_class_weights(class_counts(dataset)) if dataset else ()
    loss = build_loss(
        train.loss,
        class_weights=class_weights,
        label_smoothing=train.label_smoothing,
        ohem_threshold=train.ohem_threshold,
        ohem_min_kept=max(1, train.ohem_min_kept // cfg.DATASET.segm_downsampling_rate**2),  # unit: label pixels
    )
    return SegmentationModule(encoder, decoder, loss, train.deep_sup_scale)


def _check_image_sizes(cfg: Config, divisor: int) -> None:
    """Raise a UserError if images could have sides that are not multiples of `divisor`."""
    for key in ("DATASET.padding_constant", "DATASET.crop_size", "INFERENCE.window_size"):
        sides = cfg.option(key)
        if any(side % divisor for side in ([sides] if isinstance(sides, int) else sides)):
            factor = math.lcm(divisor, cfg.DATASET.segm_downsampling_rate)
            raise UserError(
                f"{key} {sides}: {cfg.MODEL.arch_encoder} needs images whose height and width are multiples of "
                f"{divisor}; set {key} to a multiple of {factor}"
            )


def inference_options(cfg: Config) -> InferenceOptions:
    """Return the options in the section INFERENCE."""
    size = cfg.INFERENCE.window_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return InferenceOptions(**{**cfg.INFERENCE, "window_size": size if all(size) else None})


def load_options(cfg: Config, batch_size: int, local_size: int) -> LoadOptions:
    """Return image loading options; `local_size` is the number of processes on this machine that load images."""
    return LoadOptions(batch_size, cfg.TRAIN.workers, cfg.RUNTIME.timeout, local_size)


def build_val_dataset(cfg: Config, max_images: int = 0) -> ValDataset:
    """Return the validation set, or only its first `max_images` images if `max_images` is not 0."""
    data = cfg.DATASET
    return ValDataset(
        data.root_dataset, data.list_train if data.val_fraction else data.list_val, data, max_images or -1
    )


def build_data(cfg: Config) -> tuple[TrainDataset, ValDataset | None]:
    """Return the training set and the validation set, which is None if TRAIN.eval_epoch is 0."""
    train, data = cfg.TRAIN, cfg.DATASET
    dataset = TrainDataset(data.root_dataset, data.list_train, data, train.batch_size_per_gpu, seed=train.seed)
    return dataset.as_uint8(), build_val_dataset(cfg, cfg.VAL.num_val) if train.eval_epoch else None


def build_training(
    cfg: Config, module: SegmentationModule, images: int, batches: int
) -> tuple[torch.optim.Optimizer, TrainingOptions]:
    """Apply TRAIN options such as channels_last to a network; return the optimizer and the training options.

    Args:
        images: number of training images; with TRAIN.epoch_iters 0, an epoch is one pass over all images.
        batches: number of batches per step, summed over micro-batches, devices and ranks.
    """
    train = cfg.TRAIN
    if train.channels_last:
        module.to(memory_format=torch.channels_last)
    if train.fix_bn:
        freeze_batch_norm(module)
    if train.activation_checkpointing and not enable_activation_checkpointing(module.encoder):
        raise UserError(
            f"TRAIN.activation_checkpointing: {cfg.MODEL.arch_encoder} has no list of blocks; set it to False"
        )
    if train.compile:
        compile_blocks(module.encoder)
        module.encoder.compiled = True
    images_per_step = batches * train.batch_size_per_gpu
    scale = images_per_step / train.lr_base_batch if train.lr_base_batch else 1.0
    optimizer = build_optimizer(
        module.encoder,
        module.decoder,
        train.optim,
        rates=(train.lr_encoder * scale, train.lr_decoder * scale),
        lr_decay=train.lr_decay,
        beta1=train.beta1,
        weight_decay=train.weight_decay,
    )
    values = {field.name: train[field.name] for field in fields(TrainingOptions) if field.name != "run_options"}
    values["amp"] = resolve_amp(train.amp, next(module.parameters()).device)
    values["epoch_iters"] = train.epoch_iters or math.ceil(images / images_per_step)
    if not train.lr_encoder:
        values["freeze_encoder"] = values["epoch_iters"] * train.num_epoch
    keys = [key for key in OPTIONS if key.startswith(RUN_SECTIONS) and key not in START_KEYS]
    stored = {key: cfg.option(key) for key in keys} | {"class names": list(class_table_from_options(cfg.DATASET).names)}
    return optimizer, TrainingOptions(**values, run_options=stored)


def resolve_amp(name: str, device: torch.device) -> str:
    """Return the mixed precision that TRAIN.amp selects; `auto` is bf16 on GPUs with bfloat16 arithmetic, else off."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and not lacks_bfloat16(device) else "off"


def auto_device(name: str | torch.device = "auto") -> torch.device:
    """Return the named device; raise a `UserError` if the name is unknown or this machine does not have the device.

    `name` is `auto` (the first GPU, or the CPU without GPUs), or an argument that `torch.device` accepts.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    available += ["mps"] if torch.backends.mps.is_available() else []
    device = None
    with suppress(RuntimeError):
        device = as_device(name) if torch.cuda.is_available() else torch.device(name)
    if str(device) not in available:
        raise UserError(f"device {name!r} is not available; choose one of {', '.join(available)}")
    return device
