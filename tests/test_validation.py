"""Validation during training: the loss equals its definition, and training stops without a better mean IoU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import here, same, small, weights
from scenes import options, tiny_module, write_data_set
from training import make_trainer

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.engine import MaskedNLLLoss


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"))


def mean_loss(module, dataset, index, downsampling, class_weight):
    """Compute the weighted mean loss of all pixels in float64, with the nearest labels."""
    total, weight = 0.0, 0.0
    for item in (dataset[i] for i in range(len(dataset))):
        image = item["img_data"][index].double()
        height, width = item["seg_label"].shape[1:]
        rows, columns = (
            [int((i + 0.5) * full / count) for i in range(count)]
            for count, full in ((image.shape[-2] // downsampling, height), (image.shape[-1] // downsampling, width))
        )
        label = item["seg_label"][:, rows][:, :, columns]
        with torch.no_grad():
            logits = module.decoder.logits(module.encoder(image, return_feature_maps=True))
        heads = (
            F.cross_entropy(
                module.decoder.resize(x, label.shape[-2:]), label, class_weight, ignore_index=-1, reduction="sum"
            )
            for x in logits
        )
        total += sum(factor * head for factor, head in zip((1, 0.4), heads, strict=True))
        weight += class_weight[label[label >= 0]].sum()
    return float(total / weight)


@pytest.mark.parametrize("downsampling", [4, 8])
@pytest.mark.parametrize("class_weight", [(1, 1, 1), (3, 0.5, 1)])
def test_validation_loss_equals_its_definition(root, tmp_path, downsampling, class_weight):
    opt = options(imgSizes=(32, 40, 56), segm_downsampling_rate=downsampling)
    val = ValDataset(root, "val", opt)
    module = tiny_module(crit=MaskedNLLLoss(weight=class_weight))
    trainer = make_trainer(tmp_path, module=module, eval_epoch=1)
    trainer.fit(TrainDataset(root, "train", opt, 2), val)
    for epoch, loss in zip((1, 2), trainer.history["val"]["loss"], strict=True):
        trainer.folder.load_epoch(module, epoch)
        weight = torch.tensor(class_weight, dtype=torch.float64)
        assert loss == pytest.approx(mean_loss(module.double().eval(), val, 1, downsampling, weight), rel=1e-5)
        module.float()


def test_training_stops_without_a_better_mean_iou(root, tmp_path):
    """The weights hardly change, so that the mean IoU of the first validation stays the best."""
    run = {"TRAIN.num_epoch": 9, "TRAIN.epoch_iters": 1, "TRAIN.eval_epoch": 1, "TRAIN.fix_bn": True}
    run = small(root, tmp_path, **run, TRAIN__lr_encoder=1e-12, TRAIN__lr_decoder=1e-12)
    output = here("train.py", run | {"TRAIN.patience": 2}).stdout
    assert "TRAIN.patience" in output
    assert sorted(path.name for path in tmp_path.glob("encoder_epoch_*")) == [
        f"encoder_epoch_{n}.pth" for n in (1, 2, 3)
    ]
    assert same(weights(tmp_path, "best.pth"), weights(tmp_path, "epoch_1.pth"))
    resume = run | {"TRAIN.resume": "auto"}
    output = here("train.py", resume | {"TRAIN.patience": 2}).stdout
    assert all(part in output for part in ("nothing to train", "TRAIN.patience"))
    here("train.py", resume | {"TRAIN.patience": 4})
    assert (tmp_path / "encoder_epoch_5.pth").is_file()
    assert not (tmp_path / "encoder_epoch_6.pth").exists()
    here("train.py", resume)
    assert (tmp_path / "encoder_epoch_9.pth").is_file()


def test_curves_of_earlier_versions_have_no_validation_loss(root, tmp_path):
    run = small(root, tmp_path, TRAIN__eval_epoch=1, TRAIN__epoch_iters=1)
    here("train.py", run)
    state = torch.load(tmp_path / "resume.pth", weights_only=True)
    del state["history"]["val"]["loss"]
    torch.save(state, tmp_path / "resume.pth")
    here("train.py", run | {"TRAIN.resume": "auto", "TRAIN.num_epoch": 3})
    losses = torch.load(tmp_path / "history_epoch_3.pth", weights_only=True)["val"]["loss"]
    assert np.isnan(losses).tolist() == [True, True, False]
