"""Names of version 2 that programs import: for each a short program, as it stands in them."""

import pytest
import torch
from runs import Job
from torch import nn

PROGRAMS = {
    "mit_semseg.models.models": """
        import torch
        from mit_semseg.models.models import (C1, C1DeepSup, MobileNetV2Dilated, ModelBuilder, PPM, PPMDeepsup, Resnet,
            ResnetDilated, SegmentationModule, SegmentationModuleBase, UPerNet)
        from mit_semseg.models import resnet
        encoder = ResnetDilated(resnet.__dict__["resnet18"](pretrained=False), dilate_scale=8)
        for decoder in (C1(num_class=5, fc_dim=512), C1DeepSup(5, 512), PPM(5, 512), PPMDeepsup(5, 512, False),
                        UPerNet(5, 512, fpn_inplanes=(64, 128, 256, 512), fpn_dim=64)):
            module = SegmentationModule(encoder, decoder, torch.nn.NLLLoss(ignore_index=-1), 0.4).eval()
            assert isinstance(module, SegmentationModuleBase)
            with torch.no_grad():
                print(tuple(module({"img_data": torch.randn(1, 3, 64, 64)}, segSize=(64, 64)).shape))
        assert len(Resnet(resnet.resnet50())(torch.zeros(1, 3, 64, 64), return_feature_maps=True)) == 4
        """,
    "mit_semseg.models.resnet": """
        from mit_semseg.models.resnet import ResNet, resnet18, resnet50, resnet101
        from mit_semseg.models import resnext
        from mit_semseg.models.resnext import ResNeXt, resnext101
        assert isinstance(resnet101(), ResNet) and isinstance(resnext101(pretrained=False), ResNeXt)
        """,
    "mit_semseg.models.mobilenet": """
        import torch
        from mit_semseg.models import mobilenet
        from mit_semseg.models.models import MobileNetV2Dilated
        net = MobileNetV2Dilated(mobilenet.mobilenetv2(pretrained=False), dilate_scale=8)
        assert net(torch.zeros(1, 3, 64, 64))[-1].shape == (1, 320, 8, 8)
        """,
    "mit_semseg.models.hrnet": """
        from mit_semseg.models.hrnet import HRNetV2, HighResolutionModule, hrnetv2
        assert isinstance(hrnetv2(pretrained=False), HRNetV2)
        """,
    "mit_semseg.models.utils.load_url": """
        import pathlib, torch
        from mit_semseg.models.utils import load_url
        torch.save({"weight": torch.ones(2)}, "there.pth")
        print(load_url(pathlib.Path("there.pth").absolute().as_uri(), model_dir="got", map_location="cpu"))
        """,
    "ModelBuilder.weights_init": """
        import torch
        from mit_semseg.models import ModelBuilder, SegmentationModule
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        net.apply(ModelBuilder.weights_init)
        assert abs(net[1].bias[0].item() - 1e-4) < 1e-9 and net[1].weight.eq(1).all()
        module = SegmentationModule(net, net, None)
        assert module.pixel_acc(torch.eye(3).view(1, 3, 3, 1), torch.tensor([[[0], [1], [0]]])).item() > 0.6
        """,
    "mit_semseg.utils": """
        import numpy as np
        from mit_semseg.utils import AverageMeter, process_range, unique
        meter = AverageMeter()
        meter.add(1.0); meter.add(4.0, 2)
        assert meter.average() == 3.0 and meter.value() == 4.0
        assert list(process_range("gpu", ("0", "2"))) == ["gpu0", "gpu1", "gpu2"]
        values, inverse, counts = unique(np.array([[3, 1], [3, 3]]), return_inverse=True, return_counts=True)
        assert values.tolist() == [1, 3] and counts.tolist() == [1, 3] and inverse.tolist() == [1, 0, 1, 1]
        """,
    "mit_semseg.dataset.BaseDataset": """
        import numpy as np, torch
        from types import SimpleNamespace
        from PIL import Image
        from mit_semseg.dataset import BaseDataset, img_transform, round2nearest_multiple
        class Own(BaseDataset):
            def __init__(self, odgt, opt, **kwargs):
                super().__init__(odgt, opt, **kwargs)
            def __getitem__(self, index):
                img = Image.new("RGB", (self.imgMaxSize, self.imgSizes[0]), "red")
                assert self.list_sample[index]["fpath_img"].endswith("jpg")
                return self.img_transform(img), self.segm_transform(Image.new("L", img.size, 1))
            def __len__(self):
                return self.num_sample
        data = Own([{"fpath_img": f"{i}.jpg"} for i in range(5)],
                   SimpleNamespace(imgSizes=(30, 40), imgMaxSize=50, padding_constant=8), max_sample=4)
        image, label = data[0]
        assert len(data) == 4 and image.shape == (3, 30, 50) and image.dtype == torch.float32
        assert label.shape == (30, 50) and label.dtype == torch.int64 and not label.any()
        assert data.round2nearest_multiple(33, data.padding_constant) == round2nearest_multiple(33, 8) == 40
        assert torch.equal(image, img_transform(np.array(Image.new("RGB", (50, 30), "red"))))
        """,
    "mit_semseg.lib.utils": """
        import torch
        from mit_semseg.lib.utils import as_numpy, mark_volatile, th
        from mit_semseg.lib.utils.th import as_numpy as same
        x = torch.ones(2, requires_grad=True)
        assert not mark_volatile({"a": [x]})["a"][0].requires_grad and same is as_numpy and th.mark_volatile
        """,
    "mit_semseg.lib.nn": """
        from mit_semseg.lib.nn.modules import SynchronizedBatchNorm2d, patch_replication_callback
        from mit_semseg.lib.nn.modules.batchnorm import SynchronizedBatchNorm1d, SynchronizedBatchNorm3d
        from mit_semseg.lib.nn.modules.replicate import DataParallelWithCallback
        from mit_semseg.lib.nn.parallel import UserScatteredDataParallel, user_scattered_collate, async_copy_to
        from mit_semseg.lib.nn.parallel.data_parallel import DictGatherDataParallel
        import mit_semseg.lib.nn as nn
        assert nn.SynchronizedBatchNorm2d is SynchronizedBatchNorm2d
        """,
    "mit_semseg.config.defaults._C": """
        from mit_semseg.config import cfg
        from mit_semseg.config.defaults import _C
        assert _C is cfg and _C.DATASET.num_class == 150
        """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_old_names_run(name, tmp_path):
    lines = PROGRAMS[name].strip("\n").splitlines()
    (tmp_path / "program.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines))
    done = Job(str(tmp_path / "program.py"), cwd=tmp_path).end(120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("scale", [8, 16])
def test_dilating_a_network_is_building_it_dilated(scale):
    from mit_semseg.models import mobilenet, resnet
    from mit_semseg.models.models import MobileNetV2Dilated, ResnetDilated

    x = torch.randn(1, 3, 80, 64, dtype=torch.float64)
    for build, wrap in (
        (resnet.resnet18, ResnetDilated),
        (resnet.resnet50, ResnetDilated),
        (mobilenet.mobilenetv2, MobileNetV2Dilated),
    ):
        plain, dilated = build().double().eval(), build(output_stride=scale).double().eval()
        dilated.load_state_dict(plain.state_dict())
        with torch.no_grad():
            own, expected = (net(x, return_feature_maps=True) for net in (wrap(plain, scale), dilated))
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
        with pytest.raises(ValueError, match="output stride 4"):
            wrap(build(), 4)


def test_hrnet_can_be_traced_symbolically():
    """For any size of picture."""
    from mit_semseg.models import ModelBuilder

    encoder = ModelBuilder.build_encoder("hrnetv2", pretrained=False, output_stride=8).eval()
    traced = torch.fx.symbolic_trace(encoder)
    for size in ((32, 64), (64, 32)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(traced(x)[0], encoder(x, return_feature_maps=True)[0])


def test_c1_can_be_scripted(tmp_path):
    from mit_semseg.models import ModelBuilder

    decoder = ModelBuilder.build_decoder("c1", fc_dim=32, num_class=5).eval()
    scripted = torch.jit.script(decoder)
    features = [torch.randn(1, 16, 12, 10), torch.randn(1, 32, 6, 5)]
    scripted.save(tmp_path / "decoder.pt")
    with torch.no_grad():
        for size in (None, (48, 40)):
            for network in (scripted, torch.jit.load(tmp_path / "decoder.pt")):
                torch.testing.assert_close(network(features, size), decoder(features, segSize=size))
    decoder.conv_last.weight.data.zero_()
    assert scripted.conv_last.weight.eq(0).all()  # the weights are shared, as those of any scripted module
    assert isinstance(decoder.cbr[1], nn.BatchNorm2d)
