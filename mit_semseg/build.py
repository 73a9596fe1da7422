"""From options to objects: the network, its loss, the optimizer, and how inference looks at a picture."""

import logging
import math
from dataclasses import fields

import torch

from .config import OPTIONS, Config, load_config
from .dataset import TrainDataset, ValDataset
from .dataset.pairs import class_table_of
from .engine import RunFolder, Settings, build_loss, build_optimizer, freeze_batch_norm
from .evaluation import InferenceOptions
from .evaluation.network import lacks_bfloat16
from .lib.nn import enable_activation_checkpointing
from .lib.nn.inplace_abn import has_inplace_norms
from .lib.nn.scatter import as_device
from .lib.utils import UserError
from .models import ModelBuilder, SegmentationModule
from .models.layers import NORMS
from .models.pretrained import PUBLISHED, download_published, published_options
from .models.weight_files import read_state_dict

logger = logging.getLogger(__name__)

OF_THE_RUN = ("DATASET.", "INFERENCE.", "MODEL.", "TRAIN.", "RUNTIME.", "VAL.num_val")
HOW_IT_GOES_ON = ("TRAIN.resume", "TRAIN.start_epoch")
COMPILED_SIZES = 64  # sides of batches are multiples of this where the network is compiled for every size


def build_module(
    cfg: Config, device: torch.device, *, checkpoint: str | None = None, continued: bool = False
) -> SegmentationModule:
    """The network that the options describe, on a device.

    Args:
        cfg: configuration.
        device: where to put it.
        checkpoint: suffix of the trained weights in DIR, e.g. `epoch_20.pth`, which are downloaded if they are those of
            a published model; None starts training, from the MODEL options.
        continued: the weights will come from the run in DIR, so no others are read or fetched.

    Raises:
        UserError: weights are missing or do not fit, or MODEL.fc_dim contradicts the encoder.
    """
    if not checkpoint:
        _check_device(cfg, device)
        model = cfg.MODEL
        # A resumed run takes all weights from its saved state; the initial files may have been deleted.
        initial = (
            ("", "", False) if continued else (model.weights_encoder, model.weights_decoder, model.reset_classifier)
        )
        return _assembled(cfg, *initial, pretrained=model.pretrained and not continued).to(device)
    files = RunFolder(cfg.DIR)
    if name := _published(cfg, files, checkpoint):
        logger.info("downloading the published model %s to %s", name, cfg.DIR)
        download_published(name, cfg.DIR)
    encoder_file, decoder_file = map(str, files.pair(checkpoint))
    with files.offering(checkpoint):
        if cfg.MODEL.norm == "inplace" and not has_inplace_norms(read_state_dict(encoder_file)):
            raise UserError(
                f"{encoder_file} was not trained with MODEL.norm inplace, which would compute something else from it: "
                f"set MODEL.norm sync"
            )
        return _assembled(cfg, encoder_file, decoder_file, reset_classifier=False, pretrained=False).to(device)


def _published(cfg: Config, files: RunFolder, checkpoint: str) -> str:
    """Name of the published model that these options describe if its weights are not in DIR, else ''."""
    name, there = files.folder.name, [files.part(part, checkpoint).is_file() for part in ("encoder", "decoder")]
    if any(there) or name not in PUBLISHED or checkpoint != f"epoch_{PUBLISHED[name]}.pth":
        return ""
    wanted = load_config(None, published_options(name))
    keys = ("MODEL.arch_encoder", "MODEL.arch_decoder", "DATASET.num_class")
    return name if all(cfg.option(key) == wanted.option(key) for key in keys) else ""


def _check_device(cfg: Config, device: torch.device) -> None:
    """Refuse training options that the device does not support.

    Raises:
        UserError: with the option and the device.
    """
    if cfg.MODEL.norm == "inplace" and device.type == "mps":
        raise UserError("MODEL.norm inplace computes in float64, which mps does not support: set MODEL.norm sync")
    if cfg.TRAIN.amp == "bf16" and lacks_bfloat16(device):
        raise UserError(f"TRAIN.amp bf16: {device} does not support bfloat16; set TRAIN.amp fp16 or off")


def _assembled(
    cfg: Config, encoder_file: str, decoder_file: str, reset_classifier: bool, *, pretrained: bool
) -> SegmentationModule:
    """The network, with the weights of files."""
    model = cfg.MODEL
    encoder = ModelBuilder.build_encoder(
        model.arch_encoder,
        weights=encoder_file,
        pretrained=pretrained,
        output_stride=model.output_stride or None,
        norm_layer=NORMS[model.norm],
    )
    _check_fc_dim(model, encoder)
    decoder = ModelBuilder.build_decoder(
        model.arch_decoder,
        num_class=cfg.DATASET.num_class,
        weights=decoder_file,
        in_channels=encoder.out_channels,
        output_stride=encoder.output_stride,
        reset_classifier=reset_classifier,
        norm_layer=NORMS[model.norm],
    )
    return SegmentationModule(encoder, decoder, _loss_of(cfg), cfg.TRAIN.deep_sup_scale)


def _loss_of(cfg: Config) -> torch.nn.Module:
    train, rate = cfg.TRAIN, cfg.DATASET.segm_downsampling_rate
    return build_loss(
        train.loss,
        class_weights=train.class_weights,
        label_smoothing=train.label_smoothing,
        ohem_threshold=train.ohem_threshold,
        ohem_min_kept=max(1, train.ohem_min_kept // rate**2),  # pixels of the label
    )


def inference_options(cfg: Config) -> InferenceOptions:
    """How the options let the network look at a picture."""
    window = cfg.INFERENCE.window_size
    window = (window, window) if isinstance(window, int) else tuple(window)
    return InferenceOptions(
        flip=cfg.INFERENCE.flip,
        window=window if all(window) else None,
        overlap=cfg.INFERENCE.window_overlap,
        precision=cfg.INFERENCE.precision,
        compiled=cfg.INFERENCE.compile,
    )


def build_data(cfg: Config) -> tuple[TrainDataset, ValDataset | None]:
    """What a run trains on and, if it validates, what it is validated on."""
    train, data = cfg.TRAIN, cfg.DATASET
    how = {"seed": train.seed, "side_step": COMPILED_SIZES if train.compile else 1}
    training = TrainDataset(data.root_dataset, data.list_train, data, train.batch_size_per_gpu, **how).as_uint8()
    if not train.eval_epoch:
        return training, None
    return training, ValDataset(data.root_dataset, data.list_val, data, cfg.VAL.num_val or -1)


def build_training(
    cfg: Config, module: SegmentationModule, images: int, batches: int
) -> tuple[torch.optim.Optimizer, Settings]:
    """Optimizer and settings of a training run; freezes, lays out and compiles the network as the options say.

    Args:
        images: in the training list; TRAIN.epoch_iters 0 goes through them once an epoch.
        batches: in a step.
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
        name=train.optim,
        lr_encoder=train.lr_encoder,
        lr_decoder=train.lr_decoder,
        beta1=train.beta1,
        weight_decay=train.weight_decay,
    )
    values = {field.name: train[field.name] for field in fields(Settings) if field.name in train}
    values["timeout"] = cfg.RUNTIME.timeout
    values["epoch_iters"] = train.epoch_iters or math.ceil(images / (batches * train.batch_size_per_gpu))
    return optimizer, Settings(**values, options=_of_the_run(cfg))


def _of_the_run(cfg: Config) -> dict[str, object]:
    """The options that make a run and its validations what they are, and the names of its classes."""
    keys = [key for key in OPTIONS if key.startswith(OF_THE_RUN) and key not in HOW_IT_GOES_ON]
    return {**{key: cfg.option(key) for key in keys}, "names of the classes": list(class_table_of(cfg.DATASET).names)}


def _check_fc_dim(model: Config, encoder: torch.nn.Module) -> None:
    default, own = 2048, encoder.out_channels[-1]
    if model.fc_dim not in (default, own):
        raise UserError(
            f"MODEL.fc_dim is {model.fc_dim}, but {model.arch_encoder} gives {own} channels: set {own}, or leave it out"
        )


def auto_device(name: str | torch.device = "auto") -> torch.device:
    """A device that is there.

    Args:
        name: `auto` (the first GPU if there is one, else the CPU), or anything that `torch.device` knows: `cpu`,
            `cuda`, `cuda:1`, `mps`.

    Raises:
        UserError: another name, or a device that this machine does not have.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device(there[1] if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: give auto, {', '.join(there)}") from None
    device = as_device(device) if torch.cuda.is_available() else device
    if str(device) not in there:
        raise UserError(f"device {name!r} is not there: this machine has {', '.join(there)}")
    return device
