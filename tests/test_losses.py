"""Losses, compared with PyTorch, brute-force computations and their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mit_semseg.engine import cross_entropy
from mit_semseg.engine.losses import LOSSES, DiceLoss, LovaszLoss, MaskedNLLLoss, OhemLoss, build_loss

CLASSES, SHAPE = 5, (2, 6, 7)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits = torch.randn(SHAPE[0], CLASSES, *SHAPE[1:], dtype=torch.float64) * 2
    return logits.requires_grad_(), torch.randint(-1, CLASSES - 1, SHAPE)  # no pixel has the last class


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.0, 3.0)])
def test_cross_entropy_equals_pytorch(batch, weights, smoothing):
    logits, label = batch
    ours = MaskedNLLLoss(weight=weights, label_smoothing=smoothing)(logits.log_softmax(1), label)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    theirs = F.cross_entropy(logits, label, weight, ignore_index=-1, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [1, 40, 100, 10_000])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0, 0.0, 3.0)])
def test_cross_entropy_of_logits_equals_pytorch(batch, weights, block, layout, monkeypatch):
    """The values of `block` give blocks of one row, two rows, or the whole batch."""
    monkeypatch.setitem(cross_entropy.BLOCK, "cpu", block)
    logits, label = batch[0].detach().contiguous(memory_format=layout).requires_grad_(), batch[1]
    ours = MaskedNLLLoss(weight=weights).of_logits(logits, label)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    theirs = F.cross_entropy(logits, label, weight, ignore_index=-1)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(3 * loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_cross_entropy_of_logits_in_16_bits_and_without_labels(batch):
    logits, label = batch[0].detach(), batch[1]
    criterion = MaskedNLLLoss()
    torch.testing.assert_close(criterion.of_logits(logits, label), criterion(logits.log_softmax(1), label))
    coarse = logits.bfloat16().requires_grad_()
    loss = criterion.of_logits(coarse, label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, criterion(coarse.detach().float().log_softmax(1), label))
    assert torch.autograd.grad(loss, coarse)[0].dtype == torch.bfloat16
    nothing = criterion.of_logits(coarse, torch.full_like(label, -1))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, coarse)[0].any()
    smooth = MaskedNLLLoss(label_smoothing=0.1)
    torch.testing.assert_close(smooth.of_logits(logits, label), smooth(logits.log_softmax(1), label))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("class_weight", [1e-6, 1e-4, 1.0, 1e5, 1e6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_under_autocast_equal_pytorch_for_any_class_weight(dtype, class_weight, smoothing):
    """Class weights, the loss scale and the weight of a device are never rounded to 16 bits."""
    torch.manual_seed(1)
    features = torch.randn(2, 8, 24, 32)
    label = torch.randint(-1, CLASSES, (2, 24, 32))
    weights = torch.full((CLASSES,), class_weight)
    weights[1::2] = 1
    conv = torch.nn.Conv2d(8, CLASSES, 1)
    scale = 2.0**16 * 0.7 if dtype == torch.float16 else 0.7

    def gradient(loss_of):
        with torch.autocast("cpu", dtype=dtype):
            logits = conv(features)
            assert logits.dtype == dtype
            loss = loss_of(logits)
        return torch.autograd.grad(loss * scale, logits)[0].double()

    ours = gradient(lambda x: MaskedNLLLoss(weight=weights, label_smoothing=smoothing).of_logits(x, label))
    theirs = gradient(lambda x: F.cross_entropy(x.float(), label, weights, ignore_index=-1, label_smoothing=smoothing))
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    # A wrong factor for all gradients would act like another learning rate.
    assert abs((ours * theirs).sum() / theirs.square().sum() - 1) < 1e-3
    small = theirs.abs() > 0
    assert (ours[small] != 0).double().mean() > 0.99


@pytest.mark.parametrize("min_kept", [1, 10, 40, 10_000])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.7, 1.0])
def test_ohem_equals_its_definition(batch, threshold, min_kept):
    """The mean is over pixels with probability <= `threshold`, but at least over the `min_kept` hardest pixels."""
    logits, label = batch
    log_probs = logits.log_softmax(1)
    pixels = [(log_probs[n, label[n, i, j], i, j]) for n, i, j in np.ndindex(*SHAPE) if label[n, i, j] >= 0]
    pixels.sort()
    hard = sum(p.exp() <= threshold for p in pixels)
    kept = pixels[: max(int(hard), min(min_kept, len(pixels)))]
    expected = -torch.stack(kept).mean()
    torch.testing.assert_close(OhemLoss(threshold, min_kept)(log_probs, label), expected)


def test_dice_equals_its_definition(batch):
    logits, label = batch
    probs, losses = logits.softmax(1).detach(), []
    for number in range(CLASSES):
        p, y = probs[:, number][label >= 0], (label[label >= 0] == number).double()
        if y.sum():
            losses.append(1 - 2 * (p * y).sum() / (p.sum() + y.sum()))
    expected = torch.stack(losses).mean()
    assert len(losses) == CLASSES - 1
    torch.testing.assert_close(DiceLoss()(logits.log_softmax(1), label).detach(), expected)


def jaccard_of(wrong, truth):
    """Return the Jaccard loss (1 - IoU) of a class with the pixels `truth` and the wrongly predicted pixels `wrong`."""
    union = truth | wrong
    return len(wrong) / len(union) if union else 0.0


def test_lovasz_is_the_extension_of_the_jaccard_loss(batch):
    """Errors are sorted in descending order; each is multiplied by the increase of the Jaccard loss it causes."""
    logits, label = batch
    probs, losses = logits.softmax(1).detach(), []
    for number in range(CLASSES):
        p, y = probs[:, number][label >= 0].numpy(), (label[label >= 0] == number).numpy()
        truth = {i for i in range(len(y)) if y[i]}
        if not truth:
            continue
        errors, wrong, total, before = np.abs(y - p), set(), 0.0, 0.0
        for i in np.argsort(-errors):
            wrong.add(int(i))
            total += errors[i] * (jaccard_of(wrong, truth) - before)
            before = jaccard_of(wrong, truth)
        losses.append(total)
    assert LovaszLoss()(logits.log_softmax(1), label).item() == pytest.approx(np.mean(losses), rel=1e-12)


def test_gradients_of_lovasz_in_16_bits_are_close_to_64():
    """bfloat16 cannot represent every pixel count above 256."""
    torch.manual_seed(0)
    logits, label = torch.randn(1, 4, 64, 64, dtype=torch.float64), torch.randint(0, 4, (1, 64, 64))
    gradients = []
    for kind in (torch.float64, torch.bfloat16):
        x = logits.to(kind, copy=True).requires_grad_()
        LovaszLoss()(x.log_softmax(1), label).backward()
        gradients.append(x.grad.double().flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.05)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_do_not_matter(name, batch):
    logits, label = batch
    loss = build_loss(name, ohem_min_kept=20)
    value = loss(logits.log_softmax(1), label)
    value.backward()
    assert not logits.grad.movedim(1, -1)[label < 0].any()
    changed = torch.where((label < 0).unsqueeze(1), torch.randn_like(logits), logits.detach())
    torch.testing.assert_close(loss(changed.log_softmax(1), label), value.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_loss_without_labelled_pixels_is_zero_with_gradients(name, batch):
    logits, label = batch
    value = build_loss(name, class_weights=(1.0,) * CLASSES, label_smoothing=0.1)(
        logits.log_softmax(1), torch.full_like(label, -1)
    )
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_class_weight_0_gives_loss_0():
    """All pixels of the batch have class weight 0, and label smoothing is on."""
    logits = torch.randn(2, 3, 30, 30, requires_grad=True)
    label = torch.zeros(2, 30, 30, dtype=torch.int64)
    loss = MaskedNLLLoss(weight=(0, 1, 1), label_smoothing=0.1)(logits.log_softmax(1), label)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name, batch):
    logits, label = batch
    loss = build_loss(name, ohem_min_kept=30, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x.log_softmax(1), label), logits)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_agrees_with_float64(name, batch):
    logits, label = batch
    loss = build_loss(name, ohem_min_kept=20)
    exact = loss(logits.detach().log_softmax(1), label).item()
    assert loss(logits.detach().float().log_softmax(1), label).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_synchronize_with_the_device(name):
    """Tensors on the meta device have no values, so reading a value is an error."""
    log_probs = torch.empty(1, CLASSES, *SHAPE[1:], device="meta", requires_grad=True)
    label = torch.empty(1, *SHAPE[1:], device="meta", dtype=torch.int64)
    loss = build_loss(name, class_weights=(1.0,) * CLASSES, label_smoothing=0.1).to("meta")
    assert loss(log_probs, label).shape == ()


def test_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"focal.*ce, ohem, dice"):
        build_loss("focal")


@pytest.mark.parametrize("ignore", [-1, 255])
@pytest.mark.parametrize("loss", [MaskedNLLLoss, OhemLoss, DiceLoss])
def test_any_value_can_be_the_ignore_index(loss, ignore):
    """A label that is neither a class nor the ignore index is an error."""
    x = torch.randn(2, 3, 6, 5).log_softmax(1)
    label = torch.randint(0, 3, (2, 6, 5))
    label[0, :2] = -1
    expected = loss()(x, label)
    assert torch.equal(loss(ignore_index=ignore)(x, label.where(label >= 0, ignore)), expected)
    with pytest.raises((IndexError, RuntimeError)):
        loss(ignore_index=ignore)(x, label.where(label >= 0, 7))
