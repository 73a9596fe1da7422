"""torch.hub entry points: one for each published model (with `_` instead of `-` in its name), and `segmenter`.

    module = torch.hub.load("mit_semseg", "ade20k_resnet50dilated_ppm_deepsup", source="local")
    probabilities = module({"img_data": images}, segSize=(H, W))  # returns (N, 150, H, W)

`images` are normalized, (N, 3, h, w). A model is a `SegmentationModule` in eval mode; for files use `segmenter`.
"""

from mit_semseg import Segmenter as _Segmenter
from mit_semseg.models import ModelBuilder as _ModelBuilder
from mit_semseg.models import SegmentationModule as _SegmentationModule
from mit_semseg.models.pretrained import PUBLISHED as _PUBLISHED
from mit_semseg.models.pretrained import download_published as _download_published

dependencies = [
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "cv2",
    "yacs",
    "tqdm",
    "PIL",
    "yaml",
    "filelock",
    "pooch",
    "safetensors",
]


def _entry_point(name: str):
    _, encoder_name, decoder_name = name.split("-")

    def load(pretrained: bool = True, num_class: int = 150, reset_classifier: bool = False, **kwargs):
        files = _download_published(name) if pretrained else ("", "")
        encoder = _ModelBuilder.build_encoder(encoder_name, weights=str(files[0]), pretrained=False, **kwargs)
        kwargs |= {"in_channels": encoder.out_channels, "reset_classifier": reset_classifier}
        decoder = _ModelBuilder.build_decoder(decoder_name, num_class=num_class, weights=str(files[1]), **kwargs)
        return _SegmentationModule(encoder, decoder, None).eval()

    load.__name__ = name.replace("-", "_")
    load.__doc__ = f"""Return the encoder {encoder_name} with the decoder {decoder_name}, published for ADE20K.
    With published weights, `num_class` other than 150 needs `reset_classifier`; `kwargs` may contain `norm_layer`."""
    return load


for _name in _PUBLISHED:
    globals()[_name.replace("-", "_")] = _entry_point(_name)


def segmenter(name: str = "ade20k-resnet50dilated-ppm_deepsup", **kwargs) -> _Segmenter:
    """Return a `Segmenter` with a published model; for the options see `mit_semseg.Segmenter.from_pretrained`."""
    return _Segmenter.from_pretrained(name, **kwargs)
