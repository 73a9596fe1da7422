"""Entry points of torch.hub: every published network by its name, with underscores.

    module = torch.hub.load("mit_semseg", "ade20k_resnet50dilated_ppm_deepsup", source="local")

gives a `SegmentationModule` in eval mode: called as `module({"img_data": x}, segSize=(H, W))` with normalized pictures
(N, 3, h, w) it returns probabilities (N, 150, H, W). `segmenter` gives a `mit_semseg.Segmenter`, which takes pictures.
"""

from mit_semseg import Segmenter as _Segmenter
from mit_semseg.models import ModelBuilder as _ModelBuilder
from mit_semseg.models import SegmentationModule as _SegmentationModule
from mit_semseg.models.pretrained import PUBLISHED as _PUBLISHED
from mit_semseg.models.pretrained import download_published as _fetch_published

dependencies = ["torch", "torchvision", "numpy", "scipy", "cv2", "yacs", "tqdm", "PIL", "yaml"]


def _entry(name: str):
    encoder_name, decoder_name = name.split("-")[1:]

    def load(
        pretrained: bool = True, num_class: int = 150, reset_classifier: bool = False, **kwargs
    ) -> _SegmentationModule:
        files = _fetch_published(name) if pretrained else ("", "")
        encoder = _ModelBuilder.build_encoder(encoder_name, weights=str(files[0]), pretrained=False, **kwargs)
        decoder = _ModelBuilder.build_decoder(
            decoder_name,
            num_class=num_class,
            weights=str(files[1]),
            in_channels=encoder.out_channels,
            reset_classifier=reset_classifier,
            **kwargs,
        )
        return _SegmentationModule(encoder, decoder, None).eval()

    load.__name__ = name.replace("-", "_")
    load.__doc__ = f"""{encoder_name} and {decoder_name}, published for ADE20K.

        pretrained: with the published weights, downloaded at the first use; False starts from random ones.
        num_class: of the classifier; 150 with the published weights, unless it is started anew.
        reset_classifier: start the classifier anew.
        kwargs: passed to encoder and decoder, e.g. `norm_layer`.
    """
    return load


for _name in _PUBLISHED:
    globals()[_name.replace("-", "_")] = _entry(_name)


def segmenter(name: str = "ade20k-resnet50dilated-ppm_deepsup", **kwargs) -> _Segmenter:
    """A published network that takes pictures, see `mit_semseg.Segmenter.from_pretrained`."""
    return _Segmenter.from_pretrained(name, **kwargs)
