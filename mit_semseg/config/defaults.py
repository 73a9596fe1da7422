"""Every option: name, default, what is allowed, and what it means. This is the only list."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: the value without a YAML file; its type is the option's type.
        help: meaning, in a line.
        low, high: bounds of a number (inclusive), also of the numbers in a list.
        fractions: the numbers in a list need not be whole.
        choices: allowed values.
        kinds: types allowed, where the default's type is not the only one.
        path: a path, in which `~` and environment variables are expanded.
    """

    default: object
    help: str
    low: float = -inf
    high: float = inf
    choices: tuple = ()
    kinds: tuple[type, ...] = ()
    fractions: bool = False
    path: bool = False

    @property
    def types(self) -> tuple[type, ...]:
        """Types a value may have."""
        return self.kinds or (type(self.default),)


ENCODER_NAMES = (
    "mobilenetv2dilated",
    "resnet18",
    "resnet18dilated",
    "resnet34",
    "resnet34dilated",
    "resnet50",
    "resnet50dilated",
    "resnet101",
    "resnet101dilated",
    "resnext101",
    "hrnetv2",
    "vgg16_dilated8",
    "vgg19_dilated8",
    "resnet34_v1",
    "resnet34_dilated16",
    "resnet34_dilated8",
    "resnet50_v1",
    "resnet50_dilated16",
    "resnet50_dilated8",
    "resnet101_cityscapes",
)
DECODER_NAMES = (
    "c1",
    "c1_deepsup",
    "ppm",
    "ppm_deepsup",
    "upernet",
    "upernet_lite",
    "aspp",
    "aspp_deepsup",
    "psp",
    "psp_deepsup",
    "c1_bilinear",
    "c5_bilinear",
    "psp_bilinear",
)

OPTIONS: dict[str, Option] = {
    "DIR": Option("ckpt/ade20k-resnet50dilated-ppm_deepsup", "folder of checkpoints, log and results", path=True),
    # Data
    "DATASET.root_dataset": Option("./data/", "folder that the paths in the lists are relative to", path=True),
    "DATASET.list_train": Option(
        "./data/training.odgt",
        "training list: an .odgt file, a folder with images/ and annotations/ (or one whose path has a part images), a "
        "folder of Cityscapes such as leftImg8bit/train, or a list of PASCAL VOC such as "
        "ImageSets/Segmentation/train.txt; below root_dataset, or as it stands",
        path=True,
    ),
    "DATASET.list_val": Option("./data/validation.odgt", "validation list, as list_train", path=True),
    "DATASET.num_class": Option(150, "number of classes", low=1, high=32767),
    "DATASET.classes": Option(
        "",
        "class table: 'ade20k', 'cityscapes', 'pascal_voc', a CSV file (raw, name, color), or a list of names; '' is "
        "ADE20K for 150 classes and numbered classes otherwise, raw value 0 unlabelled",
        kinds=(str, tuple),
        path=True,
    ),
    "DATASET.ignore_values": Option(
        (),
        "raw label values to ignore when `classes` is a list; the names go to the other values from 0 up",
        low=0,
        high=65535,
    ),
    "DATASET.palette_labels": Option(False, "read palette PNG labels (PASCAL VOC style) by their indices"),
    "DATASET.imgSizes": Option(
        (300, 375, 450, 525, 600),
        "short sides: one is drawn per training batch, all are averaged in evaluation",
        low=1,
        high=100000,
        kinds=(tuple, int),
    ),
    "DATASET.imgMaxSize": Option(1000, "longest side after resizing", low=1, high=100000),
    "DATASET.padding_constant": Option(8, "sides of a batch are rounded up to a multiple of this", low=1, high=4096),
    "DATASET.segm_downsampling_rate": Option(8, "training labels are sampled down by this", low=1, high=4096),
    "DATASET.random_flip": Option(True, "mirror training images left to right, half of the time"),
    "DATASET.random_scale": Option(
        (),
        "smallest and largest factor of a training image's own size, e.g. (0.5, 2.0); () scales to imgSizes instead",
        low=0.01,
        high=100,
        fractions=True,
    ),
    "DATASET.crop_size": Option(
        0,
        "side (or height and width) of the region that is cut out of a training image, padded where the image is "
        "smaller; 0 does not cut",
        low=0,
        high=100000,
        kinds=(int, tuple),
    ),
    "DATASET.cat_max_ratio": Option(
        1.0,
        "largest share of a crop that one class may have before another place is tried; 1 takes any",
        low=0.01,
        high=1,
    ),
    "DATASET.color_jitter": Option(
        0.0,
        "largest relative change of brightness, contrast and saturation in training (and of hue, a fifth of it)",
        low=0,
        high=1,
    ),
    "DATASET.blur": Option(
        0.0, "largest standard deviation (pixels) of the blur that half of the training images get", low=0, high=100
    ),
    "DATASET.normalization": Option(
        "imagenet",
        "of pictures: imagenet (RGB in 0..1, mean and standard deviation), or caffe (BGR minus the mean, as the "
        "Cityscapes toolbox has it)",
        choices=("imagenet", "caffe"),
    ),
    "DATASET.train_resize": Option(
        "fast",
        "how training images are resized: pixel-exact (Pillow, as the published weights were trained), or fast, which "
        "differs by one grey level here and there",
        choices=("fast", "pixel-exact"),
    ),
    "DATASET.eval_resize": Option(
        "pixel-exact", "how images are resized in evaluation and segmenting", choices=("fast", "pixel-exact")
    ),
    "DATASET.on_error": Option(
        "stop",
        "what an image, label or line of a list that cannot be used does: stop ends the run with its name; skip leaves "
        "it out, which is counted and named, and makes the exit code 1",
        choices=("stop", "skip"),
    ),
    "DATASET.max_pixels": Option(
        178956970,
        "pixels of an image that is opened at most: a small file may unpack to fill the memory. The default, beyond "
        "which Pillow opens none, is the highest value; larger images are to be cut into tiles",
        low=1,
        high=178956970,
    ),
    "DATASET.max_bytes": Option(2**30, "bytes of an image file that is opened at most", low=1),
    # Model
    "MODEL.arch_encoder": Option("resnet50dilated", "encoder", choices=ENCODER_NAMES),
    "MODEL.arch_decoder": Option("ppm_deepsup", "decoder", choices=DECODER_NAMES),
    "MODEL.weights_encoder": Option("", "file of the encoder's initial weights; '' is MODEL.pretrained", path=True),
    "MODEL.weights_decoder": Option("", "file of the decoder's initial weights; '' is random ones", path=True),
    "MODEL.fc_dim": Option(
        2048, "channels of the encoder's last map; not needed, but checked if set to anything but the default", low=1
    ),
    "MODEL.output_stride": Option(
        0, "8, 16 or 32 (hrnetv2 also 4); 0 is what the encoder's name says", choices=(0, 4, 8, 16, 32)
    ),
    "MODEL.norm": Option(
        "sync",
        "batch norm: batch (statistics of each device), sync (of all devices), or inplace (of all devices, joined with "
        "the activation, which becomes leaky ReLU: in ResNets half the memory of both; not for mixed precision)",
        choices=("batch", "sync", "inplace"),
    ),
    "MODEL.pretrained": Option(True, "start the encoder from its ImageNet base when weights_encoder is ''"),
    "MODEL.reset_classifier": Option(
        False, "start the classifier anew where weights_decoder has another number of classes"
    ),
    # Training
    "TRAIN.batch_size_per_gpu": Option(2, "images per device and step", low=1),
    "TRAIN.num_epoch": Option(20, "epochs to train", low=1),
    "TRAIN.start_epoch": Option(0, "continue from the files of this epoch in DIR (weights and history only)", low=0),
    "TRAIN.epoch_iters": Option(5000, "steps per epoch; 0 is once through the training images", low=0),
    "TRAIN.optim": Option("SGD", "optimizer", choices=("SGD", "AdamW")),
    "TRAIN.lr_encoder": Option(0.02, "initial learning rate of the encoder; 0 freezes it, with its statistics", low=0),
    "TRAIN.lr_decoder": Option(0.02, "initial learning rate of the decoder", low=0),
    "TRAIN.lr_pow": Option(0.9, "power of the poly schedule", low=0),
    "TRAIN.warmup_iters": Option(0, "steps over which the learning rates rise linearly", low=0),
    "TRAIN.beta1": Option(0.9, "momentum of SGD, first beta of AdamW", low=0, high=0.999999),
    "TRAIN.weight_decay": Option(1e-4, "weight decay, of convolution and linear weights only", low=0),
    "TRAIN.deep_sup_scale": Option(0.4, "weight of the deep supervision loss", low=0),
    "TRAIN.loss": Option(
        "ce",
        "cross entropy (ce), the same of the hard pixels (ohem), Dice or Lovasz-softmax for rare classes, or a sum; "
        "all but ce are of each device's batch",
        choices=("ce", "ohem", "dice", "lovasz", "ce+dice", "ce+lovasz"),
    ),
    "TRAIN.class_weights": Option(
        (),
        "weight of every class in cross entropy, a list of num_class numbers; () weighs all the same",
        low=0,
        high=1e6,
        fractions=True,
    ),
    "TRAIN.label_smoothing": Option(0.0, "share of cross entropy's target that all classes get", low=0, high=0.999),
    "TRAIN.ohem_threshold": Option(
        0.7, "ohem: probability of the true class up to which a pixel is hard", low=0, high=1
    ),
    "TRAIN.ohem_min_kept": Option(
        100000,
        "ohem: pixels of a device's pictures that are kept at least; a pixel of a label that is sampled down by 8 "
        "counts as 64",
        low=1,
    ),
    "TRAIN.fix_bn": Option(False, "freeze the statistics and parameters of every batch norm"),
    "TRAIN.workers": Option(16, "data loading processes, at most one per core; 0 loads in the main process", low=0),
    "TRAIN.disp_iter": Option(20, "steps between two lines of the log", low=1),
    "TRAIN.seed": Option(304, "seed of weights, order, sizes, flips and dropout", low=0, high=2**63 - 1),
    "TRAIN.deterministic": Option(
        False,
        "the same weights bit for bit on the same hardware, also on GPUs; an operation that cannot is named. On a CPU "
        "that is so without it, but for dropout in several replicas of one process",
    ),
    "TRAIN.accumulate": Option(1, "batches whose gradients are averaged before a step", low=1),
    "TRAIN.clip_grad": Option(0.0, "largest norm of the gradient; 0 does not clip", low=0),
    "TRAIN.amp": Option("off", "mixed precision", choices=("off", "bf16", "fp16")),
    "TRAIN.channels_last": Option(True, "keep images and feature maps in channels-last memory order: faster"),
    "TRAIN.activation_checkpointing": Option(
        False,
        "compute the insides of the encoder's blocks again in the backward pass instead of keeping them: half the "
        "memory, a third more time; not for several devices of one process, nor VGG",
    ),
    "TRAIN.compile": Option(
        False,
        "compile the encoder (torch.compile), half a minute or more for every size of a batch; sizes are rounded up to "
        "a multiple of 64, so that there are few; not for several devices of one process, nor with recompute",
    ),
    "TRAIN.eval_epoch": Option(0, "epochs between two validations; 0 never validates", low=0),
    "TRAIN.visualize": Option(False, "write panels of every validation during training to DIR/vis"),
    "TRAIN.checkpoint_iters": Option(1000, "steps between two saves inside an epoch; 0 saves at its end only", low=0),
    "TRAIN.resume": Option(
        "off",
        "auto continues the run in DIR if there is one, off refuses to write over it, restart does; or a file",
        path=True,
    ),
    "RUNTIME.timeout": Option(
        1800.0,
        "seconds that processes, replicas and data loading wait for one another before the run ends",
        low=0.1,
        high=1e6,  # queues of Python count no further than 2 ** 31 milliseconds
    ),
    "TRAIN.tensorboard": Option(False, "write scalars and pictures for TensorBoard to DIR/tensorboard"),
    # Validation
    "VAL.batch_size": Option(1, "images loaded per step; the figures do not depend on it", low=1),
    "VAL.num_val": Option(0, "validate on the first so many images during training; 0 takes all", low=0),
    "VAL.visualize": Option(False, "write panels [image | annotation | prediction] to DIR/result"),
    "VAL.checkpoint": Option("epoch_20.pth", "which checkpoint of DIR to evaluate", path=True),
    # How the network looks at a picture in validation, evaluation and segmenting
    "INFERENCE.flip": Option(False, "average with the mirrored picture"),
    "INFERENCE.window_size": Option(
        0,
        "side (or height and width) of the overlapping windows that go through the network one by one; 0 takes the "
        "whole picture",
        low=0,
        high=100000,
        kinds=(int, tuple),
    ),
    "INFERENCE.window_overlap": Option(
        1 / 3, "share of a window that the next one covers again, at least", low=0, high=0.95
    ),
    "INFERENCE.precision": Option(
        "auto",
        "of the network: auto and fp32 are float32 (fp32 without the TF32 that GPUs may use); bf16 and fp16 are faster "
        "and give some pixels, one in a hundred, another class",
        choices=("auto", "fp32", "bf16", "fp16"),
    ),
    "INFERENCE.compile": Option(
        False, "compile the network (torch.compile) at the first picture of every size: up to a minute each"
    ),
    # Segmenting pictures
    "TEST.batch_size": Option(
        1, "pictures loaded per step; on a GPU those of one size go through the network together", low=1
    ),
    "TEST.checkpoint": Option("epoch_20.pth", "which checkpoint of DIR to segment with", path=True),
    "TEST.result": Option("./", "folder to write the results to", path=True),
}
