"""Names, defaults, allowed values and help texts of all options."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Option:
    """Default, help text and allowed values of an option."""

    default: object
    help: str
    low: float = -inf  # smallest allowed number; in a list, this applies to every number
    high: float = inf  # largest allowed number
    choices: tuple = ()  # allowed values; () for options without a fixed set of values
    kinds: tuple[type, ...] = ()  # allowed types, tried in this order; if empty, the type of the default
    fractions: bool = False  # whether numbers in a list may be non-integer
    path: bool = False  # whether `~` and environment variables are expanded

    @property
    def types(self) -> tuple[type, ...]:
        return self.kinds or (type(self.default),)


OPTIONS: dict[str, Option] = {
    "DIR": Option("ckpt/ade20k-resnet50dilated-ppm_deepsup", "Folder for checkpoints, log and results.", path=True),
    "DATASET.root_dataset": Option("./data/", "Base folder for the paths in the lists.", path=True),
    "DATASET.list_train": Option(
        "./data/training.odgt",
        "Training list: an .odgt file, a folder with images/ and annotations/, a Cityscapes folder such as "
        "leftImg8bit/train, or a PASCAL VOC list such as ImageSets/Segmentation/train.txt.",
        path=True,
    ),
    "DATASET.list_val": Option("./data/validation.odgt", "Validation list, see list_train.", path=True),
    "DATASET.val_fraction": Option(
        0.0,
        "Use this fraction of the images in list_train for validation, instead of list_val. 0: off.",
        low=0,
        high=0.9,
    ),
    "DATASET.val_groups": Option(
        False,
        "With val_fraction: images whose names differ only in the last number, e.g. frames of a video, stay together.",
    ),
    "DATASET.val_seed": Option(0, "With val_fraction: seed of the choice of images.", low=0),
    "DATASET.num_class": Option(150, "Number of classes.", low=1, high=32767),
    "DATASET.classes": Option(
        "",
        "Class table: ade20k, cityscapes, pascal_voc, a CSV file (raw,name,color), or a list of names. If empty: "
        "ADE20K for num_class 150; otherwise label value 0 is ignored, and values 1 to num_class are the classes.",
        kinds=(tuple, str),
        path=True,
    ),
    "DATASET.ignore_values": Option(
        (),
        "Ignored label values. The names in DATASET.classes are assigned to the other values in ascending order.",
        low=0,
        high=65535,
    ),
    "DATASET.label_format": Option(
        "gray",
        "Content of label files. gray: gray values are the label values. palette: palette indices are the label values "
        "(PASCAL VOC). colors: the colors of the class table.",
        choices=("gray", "palette", "colors"),
    ),
    "DATASET.imgSizes": Option(
        (300, 375, 450, 525, 600),
        "Short sides of resized images. Training draws one per batch; evaluation averages over all.",
        low=1,
        kinds=(tuple, int),
    ),
    "DATASET.imgMaxSize": Option(1000, "Maximum long side of resized images.", low=1),
    "DATASET.padding_constant": Option(8, "Height and width of a batch are rounded up to a multiple of this.", low=1),
    "DATASET.segm_downsampling_rate": Option(8, "Downsampling rate of the training labels.", low=1),
    "DATASET.random_flip": Option(True, "Flip half of the training images left to right."),
    "DATASET.random_scale": Option(
        (),
        "Range of random scales for training, relative to the image file, e.g. (0.5, 2.0). Replaces imgSizes and "
        "imgMaxSize in training. If empty, the short side is one of imgSizes.",
        low=0.01,
        fractions=True,
    ),
    "DATASET.crop_size": Option(
        0,
        "Size of random crops for training: one side, or (height, width). Smaller images are padded. 0 does not crop.",
        low=0,
        kinds=(int, tuple),
    ),
    "DATASET.cat_max_ratio": Option(
        1.0, "Maximum fraction of one class in a crop. Other crops are drawn again. 1 accepts all.", low=0.01, high=1
    ),
    "DATASET.class_sampling": Option(
        0.0,
        "Draw training images by the classes they contain, rare classes more often (Hoyer et al., 2022). The value is "
        "the temperature: 0.01 draws mostly the rarest classes, 1 draws all almost equally often. 0: off.",
        low=0,
    ),
    "DATASET.class_mix": Option(
        0.0,
        "Probability that pixels of half of the classes of another image of the batch are pasted into a training image "
        "(ClassMix; Olsson et al., 2021).",
        low=0,
        high=1,
    ),
    "DATASET.color_jitter": Option(
        0.0, "Maximum change of brightness, contrast and saturation; for the hue, a fifth of this value.", low=0, high=1
    ),
    "DATASET.blur": Option(
        0.0, "Maximum standard deviation of Gaussian blur, in pixels; applied to half of the training images.", low=0
    ),
    "DATASET.channels": Option(3, "Channels of the images. Other numbers than 3 need mean and std.", low=1, high=1000),
    "DATASET.mean": Option(
        (),
        "Mean of every channel, in units of the file. If set, images are not converted to 8-bit RGB, and are read with "
        "rasterio. The doctor prints mean and standard deviation.",
        fractions=True,
    ),
    "DATASET.std": Option((), "Standard deviation of every channel, see mean.", low=1e-12, fractions=True),
    "DATASET.normalization": Option(
        "imagenet", "imagenet: (RGB / 255 - mean) / std. caffe: BGR - mean.", choices=("imagenet", "caffe")
    ),
    "DATASET.train_resize": Option(
        "fast",
        "Resizing of training images. pixel-exact: with Pillow, as in the training of the published weights. fast: "
        "pixel values differ by at most one level.",
        choices=("fast", "pixel-exact"),
    ),
    "DATASET.eval_resize": Option(
        "pixel-exact", "Resizing in evaluation and inference, see train_resize.", choices=("fast", "pixel-exact")
    ),
    "DATASET.on_error": Option(
        "stop", "Unusable files and list lines: stop with an error, or skip and report them.", choices=("stop", "skip")
    ),
    "MODEL.arch_encoder": Option("resnet50dilated", "Encoder, see docs/models.md."),
    "MODEL.arch_decoder": Option("ppm_deepsup", "Decoder, see docs/models.md."),
    "MODEL.weights_encoder": Option("", "File with initial encoder weights. '' uses MODEL.pretrained.", path=True),
    "MODEL.weights_decoder": Option("", "File with initial decoder weights. '' is random.", path=True),
    "MODEL.fc_dim": Option(
        2048,
        "Channels of the last feature map. The default is read from the encoder; other values must equal it.",
        low=1,
    ),
    "MODEL.output_stride": Option(
        0, "Output stride of the encoder; 4 only for hrnetv2. 0: default of the encoder.", choices=(0, 4, 8, 16, 32)
    ),
    "MODEL.norm": Option(
        "sync",
        "Batch norm. batch: statistics per device. sync: synchronized over all devices. inplace: synchronized, in "
        "place, with leaky ReLU; halves the memory of ResNets; does not support mixed precision.",
        choices=("batch", "sync", "inplace"),
    ),
    "MODEL.pretrained": Option(True, "Initialize the encoder with ImageNet weights if weights_encoder is ''."),
    "MODEL.reset_classifier": Option(
        False,
        "Classes of weights_decoder with other names than yours: initialize their rows of the classifier randomly, and "
        "keep the rows of classes with equal names.",
    ),
    "MODEL.weights_classes": Option(
        "ade20k",
        "For reset_classifier: classes of weights_decoder, see DATASET.classes; not used if the file contains names.",
        kinds=(tuple, str),
        path=True,
    ),
    "TRAIN.batch_size_per_gpu": Option(2, "Images per device and batch.", low=1),
    "TRAIN.num_epoch": Option(20, "Number of epochs.", low=1),
    "TRAIN.start_epoch": Option(
        0, "Load this epoch (weights, averaged with TRAIN.ema, and history) from DIR and continue. 0: off.", low=0
    ),
    "TRAIN.epoch_iters": Option(5000, "Steps per epoch. 0 is one pass over the training images.", low=0),
    "TRAIN.optim": Option("SGD", "Optimizer: SGD or AdamW."),
    "TRAIN.lr_encoder": Option(0.02, "Initial learning rate of the encoder. 0 freezes the encoder.", low=0),
    "TRAIN.lr_decoder": Option(0.02, "Initial learning rate of the decoder.", low=0),
    "TRAIN.lr_decay": Option(
        1.0,
        "Learning rate of a stage of the encoder, as a fraction of the rate of the next stage; the last stage has "
        "lr_encoder. For networks of timm, the stages are the groups of timm.",
        low=0.01,
        high=1,
    ),
    "TRAIN.lr_base_batch": Option(
        0, "Multiply the learning rates by images per step / lr_base_batch. 0 does not change them.", low=0
    ),
    "TRAIN.schedule": Option("poly", "Learning rate schedule.", choices=("poly", "cosine")),
    "TRAIN.lr_pow": Option(0.9, "Power of the poly schedule.", low=0),
    "TRAIN.warmup_iters": Option(0, "Steps of linear learning rate warmup.", low=0),
    "TRAIN.freeze_encoder": Option(
        0, "Steps at the start in which weights and statistics of the encoder do not change. lr_encoder 0: all.", low=0
    ),
    "TRAIN.ema": Option(
        0.0,
        "Decay of an exponential moving average of the weights, e.g. 0.999. Validation uses the averaged weights, and "
        "weight files contain them; files with the suffix _raw contain the weights of the last step. 0: no average.",
        low=0,
        high=0.999999,
    ),
    "TRAIN.beta1": Option(0.9, "Momentum of SGD; beta1 of AdamW.", low=0, high=0.999999),
    "TRAIN.weight_decay": Option(1e-4, "Weight decay of convolution and linear weights.", low=0),
    "TRAIN.deep_sup_scale": Option(0.4, "Weight of the deep supervision loss.", low=0),
    "TRAIN.loss": Option(
        "ce",
        "ce: cross entropy. ohem: cross entropy of hard pixels. dice: soft Dice loss. lovasz: surrogate for one minus "
        "the mean IoU. a+b: sum. All losses except ce are computed per device.",
    ),
    "TRAIN.class_weights": Option(
        (),
        "Class weights in cross entropy: num_class numbers. auto: 1 / sqrt(fraction of the training pixels that have "
        "the class). () gives all classes weight 1.",
        low=0,
        kinds=(tuple, str),
        fractions=True,
    ),
    "TRAIN.label_smoothing": Option(0.0, "Label smoothing of cross entropy.", low=0, high=0.999),
    "TRAIN.ohem_threshold": Option(
        0.7, "ohem: a pixel is hard if the probability of its class is at most this value.", low=0, high=1
    ),
    "TRAIN.ohem_min_kept": Option(
        100000, "ohem: minimum number of pixels that are kept per device, in pixels of the image.", low=1
    ),
    "TRAIN.fix_bn": Option(False, "Freeze statistics and parameters of all batch norms."),
    "TRAIN.workers": Option(16, "DataLoader workers, at most one per core. 0 loads in the main process.", low=0),
    "TRAIN.disp_iter": Option(20, "Steps between log lines.", low=1),
    "TRAIN.seed": Option(304, "Seed of weights, image order, augmentation and dropout.", low=0, high=2**63 - 1),
    "TRAIN.deterministic": Option(
        False,
        "Bit-identical weights in every run on the same hardware, also on GPUs. Operations without a deterministic "
        "implementation raise an error.",
    ),
    "TRAIN.accumulate": Option(1, "Batches per device and step (gradient accumulation).", low=1),
    "TRAIN.clip_grad": Option(0.0, "Maximum gradient norm. 0 does not clip.", low=0),
    "TRAIN.amp": Option(
        "off",
        "Mixed precision. auto: bf16 on GPUs with bfloat16 arithmetic, off on other devices.",
        choices=("off", "auto", "bf16", "fp16"),
    ),
    "TRAIN.channels_last": Option(True, "Use the channels last memory format, which is faster."),
    "TRAIN.activation_checkpointing": Option(
        False,
        "Recompute the activations of encoder blocks in the backward pass: about half the memory, up to a third more "
        "time. Not for several devices in one process, nor for VGG.",
    ),
    "TRAIN.compile": Option(
        False,
        "Compile the blocks of the encoder with torch.compile. A new image size needs no recompilation. Needs "
        "channels_last. Not for several devices in one process, nor with activation_checkpointing.",
    ),
    "TRAIN.eval_epoch": Option(0, "Epochs between validations. 0 does not validate.", low=0),
    "TRAIN.patience": Option(
        0, "Stop after this many validations in a row without a better mean IoU. 0: never.", low=0
    ),
    "TRAIN.visualize": Option(False, "Write panels of every validation to DIR/vis."),
    "TRAIN.checkpoint_iters": Option(1000, "Steps between checkpoints. 0 saves only at the end of every epoch.", low=0),
    "TRAIN.resume": Option(
        "off",
        "If DIR contains a run: off stops with an error, auto resumes it, restart overwrites it. A path to a "
        "resume.pth file resumes from that file.",
        path=True,
    ),
    "TRAIN.logger": Option(
        "none",
        "Also pass metrics, learning rates, IoU per class, validation panels and options to an experiment tracker. "
        "tensorboard writes to DIR/tensorboard.",
        choices=("none", "tensorboard", "wandb", "trackio", "mlflow"),
    ),
    "RUNTIME.timeout": Option(1800.0, "Timeout in seconds for ranks, replicas and data loading.", low=0.1, high=1e6),
    "VAL.batch_size": Option(
        1,
        "Images per DataLoader batch. On a GPU, consecutive images of equal size are processed in one batch, which can "
        "change results by rounding errors.",
        low=1,
    ),
    "VAL.num_val": Option(0, "Validation images during training, from the start of the list. 0 is all.", low=0),
    "VAL.visualize": Option(False, "Write panels [image | label | prediction] to DIR/result."),
    "VAL.checkpoint": Option("epoch_20.pth", "Checkpoint in DIR to evaluate.", path=True),
    "INFERENCE.flip": Option(False, "Average the predictions for the image and the flipped image."),
    "INFERENCE.window_size": Option(
        0, "Side, or (height, width), of sliding windows. 0 uses the whole image.", low=0, kinds=(int, tuple)
    ),
    "INFERENCE.window_overlap": Option(
        1 / 3, "Minimum overlap of neighboring windows, as a fraction of the window size.", low=0, high=0.95
    ),
    "INFERENCE.precision": Option(
        "auto",
        "auto: float32, TF32 allowed. fp32: float32, TF32 disabled. bf16 and fp16 are faster and change the class of "
        "about 1 % of the pixels.",
        choices=("auto", "fp32", "bf16", "fp16"),
    ),
    "INFERENCE.compile": Option(
        False, "Compile the blocks of the encoder with torch.compile. A new image size needs no recompilation."
    ),
    "TEST.batch_size": Option(
        1, "Images per DataLoader batch. On a GPU, consecutive images of equal size are processed in one batch.", low=1
    ),
    "TEST.checkpoint": Option("epoch_20.pth", "Checkpoint in DIR for inference.", path=True),
    "TEST.result": Option("./", "Folder for the results.", path=True),
}
