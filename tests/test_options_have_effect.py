"""Every option is read and changes something: one entry per option, and none may be missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SMALL, in_process, same, weights, words
from scenes import write_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mit_semseg import build
from mit_semseg.config import load_config
from mit_semseg.config.defaults import OPTIONS
from mit_semseg.engine import MaskedNLLLoss, distributed
from mit_semseg.lib.utils import UserError
from mit_semseg.models import SegmentationModule
from mit_semseg.predict import segmenter

SIZES = [(60, 40), (40, 60), (52, 44), (44, 64)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "train", SIZES, seed=1)
    write_pairs(root / "other", SIZES[:3], seed=2)
    write_pairs(root / "val", [(50, 40), (40, 56)], seed=3)
    write_pairs(root / "elsewhere" / "train", SIZES, seed=4)
    write_pairs(root / "elsewhere" / "val", SIZES[:1], seed=4)
    write_pairs(root / "palette", SIZES, seed=1)
    for path in (root / "palette" / "annotations").iterdir():
        label = Image.fromarray(np.asarray(Image.open(path)))
        label.putpalette(list(range(12)))
        label.save(path)
    return root


class Runs:
    """Runs scripts with the small options and remembers runs that several tests compare with."""

    def __init__(self, data, folder, monkeypatch):
        self.data, self.folder, self.monkeypatch, self.count = data, folder, monkeypatch, 0

    def options(self, changes):
        return {**SMALL, "DATASET.root_dataset": self.data, "DIR": self.folder / "run", **changes}

    def train(self, **changes):
        self.count += 1
        changes = {"DIR": self.folder / f"run{self.count}", **{k.replace("__", "."): v for k, v in changes.items()}}
        in_process("train", self.monkeypatch, "--gpus", "cpu", *words(self.options(changes)))
        return Path(changes["DIR"])


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory, module_patch):
    return Runs(data, tmp_path_factory.mktemp("runs"), module_patch)


@pytest.fixture(scope="module")
def baseline(runs):
    return runs.train()


# Options whose change must change the trained weights.
CHANGES_WEIGHTS = {
    "DATASET.root_dataset": lambda data: data / "elsewhere",
    "DATASET.list_train": "other",
    "DATASET.num_class": 4,
    "DATASET.imgSizes": 56,
    "DATASET.imgMaxSize": 50,
    "DATASET.padding_constant": 32,
    "DATASET.segm_downsampling_rate": 4,
    "DATASET.random_flip": False,
    "DATASET.random_scale": (0.5, 1.5),
    "DATASET.crop_size": (32, 40),
    "DATASET.color_jitter": 0.5,
    "DATASET.blur": 2.0,
    "DATASET.normalization": "caffe",
    "DATASET.train_resize": "pixel-exact",
    "MODEL.arch_encoder": "resnet18",
    "MODEL.arch_decoder": "c1",
    "MODEL.weights_encoder": lambda data: data / "start_encoder.pth",
    "MODEL.weights_decoder": lambda data: data / "start_decoder.pth",
    "MODEL.output_stride": 16,
    "MODEL.norm": "inplace",
    "TRAIN.batch_size_per_gpu": 1,
    "TRAIN.num_epoch": 3,
    "TRAIN.epoch_iters": 2,
    "TRAIN.optim": "AdamW",
    "TRAIN.lr_encoder": 0.005,
    "TRAIN.lr_decoder": 0.005,
    "TRAIN.lr_pow": 2,
    "TRAIN.warmup_iters": 3,
    "TRAIN.beta1": 0.5,
    "TRAIN.weight_decay": 0.1,
    "TRAIN.deep_sup_scale": 1.0,
    "TRAIN.loss": "ce+lovasz",
    "TRAIN.class_weights": (1, 2, 3),
    "TRAIN.label_smoothing": 0.1,
    "TRAIN.fix_bn": True,
    "TRAIN.seed": 5,
    "TRAIN.accumulate": 2,
    "TRAIN.clip_grad": 0.01,
    "TRAIN.amp": "bf16",
}


def seconds_left_out(folder):
    return re.sub(r"Time: .*?, lr|remaining \S+|\d\d:\d\d:\d\d", "", (folder / "log.txt").read_text())


@pytest.mark.parametrize("key", CHANGES_WEIGHTS)
def test_changes_the_training(key, runs, baseline, data):
    value = CHANGES_WEIGHTS[key]
    if "MODEL.weights_" in key:
        for part in ("encoder", "decoder"):
            (data / f"start_{part}.pth").write_bytes((baseline / f"{part}_epoch_1.pth").read_bytes())
    changed = runs.train(**{key: value(data) if callable(value) else value})
    assert not same(weights(changed), weights(baseline))


def test_equal_options_give_equal_weights(runs, baseline):
    again = runs.train()
    assert same(weights(again), weights(baseline))


# The others, each with what it must change.


def effect_of_cat_max_ratio(runs, baseline):
    folders = [runs.train(**{"DATASET.crop_size": 24, "DATASET.cat_max_ratio": ratio}) for ratio in (1, 0.5)]
    assert not same(*map(weights, folders))


def first_loss(folder):
    return torch.load(folder / "history_epoch_1.pth", weights_only=True)["train"]["loss"][0]


def effect_of_ohem_threshold(runs, baseline):
    kept = {"TRAIN.loss": "ohem", "TRAIN.ohem_min_kept": 1}
    folders = [runs.train(**kept, **{"TRAIN.ohem_threshold": p}) for p in (0.2, 1)]
    assert not same(*map(weights, folders))
    assert first_loss(folders[1]) == pytest.approx(first_loss(baseline), rel=1e-4)  # every pixel is hard


def effect_of_ohem_min_kept(runs, baseline):
    few = {"TRAIN.loss": "ohem", "TRAIN.ohem_threshold": 0.1}
    folders = [runs.train(**few, **{"TRAIN.ohem_min_kept": n}) for n in (1, 100_000)]
    assert not same(*map(weights, folders))
    assert first_loss(folders[1]) == pytest.approx(first_loss(baseline), rel=1e-4)


def effect_of_train_visualize(runs, baseline):
    folder = runs.train(TRAIN__eval_epoch=1, TRAIN__visualize=True)
    panels = [p.relative_to(folder / "vis").as_posix() for p in sorted((folder / "vis").rglob("*.png"))]
    assert panels == [f"epoch_{epoch}/val/images/{name}.png" for epoch in (1, 2) for name in ("00", "01")]
    assert not (baseline / "vis").exists()
    with pytest.raises(UserError, match=r"set TRAIN\.eval_epoch"):
        runs.train(TRAIN__visualize=True)


def effect_of_num_val(runs, baseline):
    folder = runs.train(TRAIN__eval_epoch=2, TRAIN__visualize=True, VAL__num_val=1)
    assert [p.name for p in (folder / "vis").rglob("*.png")] == ["00.png"]


def looked_at(runs, baseline, **changes):
    """Label maps that test.py writes for the validation pictures."""
    files = segmented(runs, baseline, **changes)
    return {name: content for name, content in files.items() if name.endswith("_index.png")}


def effect_of_flip(runs, baseline):
    plain = evaluated(runs, baseline), looked_at(runs, baseline)
    mirrored = {"INFERENCE.flip": True}
    assert evaluated(runs, baseline, **mirrored)["iou_per_class"] != plain[0]["iou_per_class"]
    assert looked_at(runs, baseline, **mirrored) != plain[1]


def effect_of_window(runs, baseline):
    plain = evaluated(runs, baseline), looked_at(runs, baseline)
    windows = {"INFERENCE.window_size": (32, 40)}
    assert evaluated(runs, baseline, **windows)["iou_per_class"] != plain[0]["iou_per_class"]
    assert looked_at(runs, baseline, **windows) != plain[1]


def effect_of_overlap(runs, baseline):
    maps = [looked_at(runs, baseline, **{"INFERENCE.window_size": 32, "INFERENCE.window_overlap": n}) for n in (0, 0.8)]
    assert maps[0] != maps[1]


def effect_of_precision(runs, baseline):
    """What the network computes in; the scores are nearly the same, and exactly in strict float32 on a CPU."""
    used, logits = [], SegmentationModule.logits

    def seen(self, feed):
        used.append(list(self.encoder.parameters())[-1].dtype)
        return logits(self, feed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationModule, "logits", seen)
        figures = [evaluated(runs, baseline, **{"INFERENCE.precision": p}) for p in ("auto", "fp32", "bf16")]
    assert used == [torch.float32] * 8 + [torch.bfloat16] * 4
    assert figures[0]["iou_per_class"] == figures[1]["iou_per_class"]
    assert abs(figures[2]["pixel_accuracy"] - figures[0]["pixel_accuracy"]) < 0.05
    with pytest.raises(UserError, match="fp16 needs a GPU; on the CPU set bf16"):
        evaluated(runs, baseline, **{"INFERENCE.precision": "fp16"})


def effect_of_eval_resize(runs, baseline):
    from mit_semseg.dataset import transforms

    used, resize = [], transforms.imresize_fast
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "imresize_fast", lambda *args: used.append(args) or resize(*args))
        exact = evaluated(runs, baseline)["pixel_accuracy"]
        assert not used
        fast = evaluated(runs, baseline, **{"DATASET.eval_resize": "fast"})["pixel_accuracy"]
    assert len(used) == 4
    assert abs(fast - exact) < 0.02


def effect_of_inference_compile(runs, baseline):
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
        figures = evaluated(runs, baseline, **{"INFERENCE.compile": True})
    assert len(compiled) == 1  # the real compiler takes half a minute, see test_network.py
    assert figures["mean_iou"] == evaluated(runs, baseline)["mean_iou"]


def effect_of_dir(runs, baseline):
    assert (runs.train(DIR=runs.folder / "named") / "decoder_epoch_2.pth").is_file()


def effect_of_list_val(runs, baseline):
    results = [evaluated(runs, baseline, **{"DATASET.list_val": split}) for split in ("val", "other")]
    assert [r["images"] for r in results] == [2, 3]


def effect_of_classes(runs, baseline):
    result = evaluated(runs, baseline, **{"DATASET.classes": "['a','b','c']", "DATASET.ignore_values": "[0]"})
    assert [entry["class"] for entry in result["iou_per_class"]] == ["a", "b", "c"]


def effect_of_ignore_values(runs, baseline):
    names = {"DATASET.classes": "['a','b','c']"}
    counts = [
        evaluated(runs, baseline, **names, **{"DATASET.ignore_values": ignored})["labelled_pixels"]
        for ignored in ("[0]", "[3]")
    ]
    assert counts[0] != counts[1]


def effect_of_on_error(runs, baseline):
    (runs.data / "gone.odgt").write_text('{"fpath_img": "gone.png", "width": 4, "height": 5}\n' * 3)
    for mode, message in (("stop", "has no fpath_segm"), ("skip", "3 images one after the other cannot be used")):
        with pytest.raises(UserError, match=message):
            runs.train(**{"DATASET.list_train": "gone.odgt", "DATASET.on_error": mode})


def effect_of_max_pixels(runs, baseline):
    with pytest.raises(UserError, match=r"DATASET\.max_pixels allows 2000"):
        runs.train(**{"DATASET.max_pixels": 2000})


def effect_of_max_bytes(runs, baseline):
    with pytest.raises(UserError, match=r"DATASET\.max_bytes allows 1000"):
        runs.train(**{"DATASET.max_bytes": 1000})


def effect_of_palette_labels(runs, baseline):
    with pytest.raises(UserError, match=r"DATASET\.palette_labels True"):
        runs.train(**{"DATASET.list_train": "palette"})
    folder = runs.train(**{"DATASET.list_train": "palette", "DATASET.palette_labels": True})
    assert same(weights(folder), weights(baseline))


def effect_of_fc_dim(runs, baseline):
    with pytest.raises(UserError, match=r"MODEL\.fc_dim is 512, but mobilenetv2dilated gives 320 channels: set 320"):
        runs.train(MODEL__fc_dim=512)
    assert same(weights(runs.train(MODEL__fc_dim=320)), weights(baseline))


def effect_of_pretrained(runs, baseline):
    runs.monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    runs.monkeypatch.setenv("MIT_SEMSEG_HOME", str(runs.folder / "cache"))
    with pytest.raises(UserError, match=r"MODEL\.pretrained False"):
        runs.train(MODEL__pretrained=True)
    runs.train(DIR=baseline, MODEL__pretrained=True, TRAIN__resume="auto")  # a continued run needs no base


def effect_of_new_head(runs, baseline):
    changes = {"DATASET.num_class": 5, "MODEL.weights_decoder": baseline / "decoder_epoch_2.pth"}
    with pytest.raises(UserError, match=r"MODEL\.reset_classifier True"):
        runs.train(**changes)
    folder = runs.train(**changes, **{"MODEL.reset_classifier": True})
    assert "started anew (other number of classes): conv_last.weight" in (folder / "log.txt").read_text()


def effect_of_start_epoch(runs, baseline):
    folder = runs.folder / "continued"
    runs.train(DIR=folder, TRAIN__num_epoch=1)
    runs.train(DIR=folder, TRAIN__start_epoch=1)
    assert "continuing after epoch 1" in (folder / "log.txt").read_text()
    history = torch.load(folder / "history_epoch_2.pth", weights_only=True)["train"]
    assert history["epoch"] == [2 / 3, 1, 4 / 3, 2]


def effect_of_workers(runs, baseline):
    values = [loader_of(runs, TRAIN__workers=n).num_workers for n in (0, 1, 10_000)]
    assert values[:2] == [0, 1]
    assert 1 <= values[2] < 10_000  # never more than there are cores
    assert same(weights(runs.train(TRAIN__workers=1)), weights(baseline))


def effect_of_timeout(runs, baseline):
    assert [loader_of(runs, TRAIN__workers=1, RUNTIME__timeout=n).timeout for n in (7.5, 60)] == [7.5, 60]
    with distributed.join(torch.device("cpu"), 7.5) as processes:
        assert processes.timeout == 7.5  # that of the replicas of one process


def loader_of(runs, **changes):
    """The loader of a training run."""
    from mit_semseg.engine import loop

    made, make = [], loop.make_loader
    runs.monkeypatch.setattr(loop, "make_loader", lambda *a, **kw: made.append(make(*a, **kw)) or made[-1])
    runs.train(TRAIN__num_epoch=1, TRAIN__epoch_iters=1, **changes)
    runs.monkeypatch.setattr(loop, "make_loader", make)
    return made[0]


def effect_of_disp_iter(runs, baseline):
    lines = [(runs.train(TRAIN__disp_iter=n) / "log.txt").read_text().count("Accuracy") for n in (1, 3)]
    assert lines == [6, 2]


def effect_of_deterministic(runs, baseline):
    """On the CPU the same weights; an operation that has no deterministic form is named."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        loss = MaskedNLLLoss.of_logits
        patch.setattr(
            MaskedNLLLoss,
            "of_logits",
            lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()) or loss(*args),
        )
        folder = runs.train(TRAIN__deterministic=True)
        assert seen
        assert all(seen)
        assert not torch.are_deterministic_algorithms_enabled()
        assert same(weights(folder), weights(baseline))

        def unrepeatable(*args):
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
            return loss(*args)

        patch.setattr(MaskedNLLLoss, "of_logits", unrepeatable)
        with pytest.raises(
            UserError, match=r"TRAIN\.deterministic: put_ .*does not have a deterministic implementation"
        ):
            runs.train(TRAIN__deterministic=True)


def effect_of_recompute(runs, baseline):
    """The same weights; see test_recompute.py for what is kept in memory."""
    folder = runs.train(TRAIN__activation_checkpointing=True)
    assert same(weights(folder), weights(baseline))
    with pytest.raises(UserError, match=r"TRAIN\.recompute True is for encoders of blocks"):
        runs.train(TRAIN__activation_checkpointing=True, MODEL__norm="inplace")
    with pytest.raises(UserError, match="start a process per device"):
        in_process(
            "train",
            runs.monkeypatch,
            "--gpus",
            "cpu,cpu",
            *words(runs.options({"TRAIN.activation_checkpointing": True})),
        )


def effect_of_train_compile(runs, baseline):
    """The encoder goes through the compiler (which takes half a minute, and is left out here), in few sizes."""
    sizes = []

    def compiler(function, **_):
        return lambda *args, **kwargs: sizes.append(tuple(args[0].shape[-2:])) or function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiler)
        runs.train(TRAIN__compile=True)
    assert len(sizes) == 6
    assert all(side % build.COMPILED_SIZES == 0 for size in sizes for side in size)
    with pytest.raises(UserError, match=r"TRAIN\.compile does not work with several devices of one process"):
        in_process("train", runs.monkeypatch, "--gpus", "cpu,cpu", *words(runs.options({"TRAIN.compile": True})))


def effect_of_channels_last(runs, baseline):
    cfg = load_config(None, words(runs.options({"TRAIN.channels_last": True})))
    module = build.build_module(cfg, torch.device("cpu"))
    weight = module.decoder.cbr[0].weight
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    build.build_training(cfg, module, 12, 1)
    assert module.decoder.cbr[0].weight.is_contiguous(memory_format=torch.channels_last)
    # The same sums in another order: the first step agrees, later ones drift apart as any rounding does.
    once = {"TRAIN.disp_iter": 1, "TRAIN.num_epoch": 1, "TRAIN.epoch_iters": 1}
    first, second = (first_loss(runs.train(TRAIN__channels_last=order, **once)) for order in (False, True))
    assert first == pytest.approx(second, rel=1e-3)


def effect_of_eval_epoch(runs, baseline):
    folder = runs.train(TRAIN__eval_epoch=2)
    assert (folder / "decoder_best.pth").is_file()
    assert not (baseline / "decoder_best.pth").exists()
    history = torch.load(folder / "history_epoch_2.pth", weights_only=True)["val"]
    assert history["epoch"] == [2]
    assert same(weights(folder), weights(baseline))  # validating does not disturb the training


def effect_of_checkpoint_iters(runs, baseline):
    from mit_semseg.engine import keeper

    saves = {}
    for every in (0, 1):
        written = []
        original = keeper.save_atomic
        runs.monkeypatch.setattr(
            keeper, "save_atomic", lambda obj, path, w=written, f=original: (w.append(path), f(obj, path))
        )
        runs.train(TRAIN__checkpoint_iters=every)
        runs.monkeypatch.setattr(keeper, "save_atomic", original)
        saves[every] = sum(path.name == "resume.pth" for path in written)
    assert saves == {0: 2, 1: 6}


def effect_of_resume(runs, baseline):
    with pytest.raises(UserError, match=r"already holds a run: add TRAIN\.resume auto"):
        runs.train(DIR=baseline)
    before = seconds_left_out(baseline)
    runs.train(DIR=baseline, TRAIN__resume="auto")
    assert "nothing to train" in seconds_left_out(baseline).removeprefix(before)
    copy = runs.train(TRAIN__resume=baseline / "resume.pth", TRAIN__num_epoch=3)
    assert (copy / "decoder_epoch_3.pth").is_file()
    assert not (copy / "decoder_epoch_2.pth").exists()
    runs.train(DIR=copy, TRAIN__resume="restart")
    assert same(weights(copy), weights(baseline))


def effect_of_tensorboard(runs, baseline):
    folder = runs.train(TRAIN__tensorboard=True, TRAIN__eval_epoch=1)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr_encoder", "val/mean_iou", "val_iou/class 1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val/mean_iou")] == [1, 2]
    assert set(events.Tags()["images"]) == {"val/0", "val/1"}
    assert not (baseline / "tensorboard").exists()


def evaluated(runs, baseline, **changes):
    options = runs.options({"DIR": baseline, **changes})
    assert in_process("eval", runs.monkeypatch, "--gpu", "cpu", *words(options)) == 0
    return json.loads((baseline / "result" / "results.json").read_text())


def sizes_of_batches(runs, module, work):
    """What `work` returns for batches of one and of two, and the sizes that `module` asks for."""
    seen, read = [], module.read_items
    runs.monkeypatch.setattr(module, "read_items", lambda d, **kw: seen.append(kw["batch_size"]) or read(d, **kw))
    results = [work(size) for size in (1, 2)]
    runs.monkeypatch.setattr(module, "read_items", read)
    assert seen == [1, 2]
    return results


def effect_of_val_batch_size(runs, baseline):
    from mit_semseg.evaluation import evaluator

    results = sizes_of_batches(runs, evaluator, lambda size: evaluated(runs, baseline, **{"VAL.batch_size": size}))
    results = [{key: value for key, value in result.items() if "second" not in key} for result in results]
    assert results[0] == results[1]


def effect_of_visualize(runs, baseline):
    panels = baseline / "result" / "val" / "images"
    evaluated(runs, baseline)
    assert not panels.exists()
    evaluated(runs, baseline, **{"VAL.visualize": True})
    assert sorted(p.name for p in panels.iterdir()) == ["00.png", "01.png"]


def effect_of_val_checkpoint(runs, baseline):
    first, last = (evaluated(runs, baseline, **{"VAL.checkpoint": f"epoch_{n}.pth"}) for n in (1, 2))
    assert first["iou_per_class"] != last["iou_per_class"] or first["pixel_accuracy"] != last["pixel_accuracy"]
    with pytest.raises(UserError, match=r"epoch_9\.pth; the checkpoint can be epoch_1\.pth, epoch_2\.pth"):
        evaluated(runs, baseline, **{"VAL.checkpoint": "epoch_9.pth"})


def segmented(runs, baseline, **changes):
    options = runs.options({"DIR": baseline, "TEST.result": runs.folder / "out", **changes})
    pictures = runs.data / "val" / "images"
    code = in_process("test", runs.monkeypatch, "--index", "--gpu", "cpu", "--imgs", pictures, *words(options))
    assert code == 0
    folder = Path(options["TEST.result"])
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def effect_of_test_checkpoint(runs, baseline):
    with pytest.raises(UserError, match="no checkpoint"):
        segmented(runs, baseline, **{"TEST.checkpoint": "epoch_9.pth"})


def effect_of_test_result(runs, baseline):
    files = segmented(runs, baseline, **{"TEST.result": runs.folder / "there"})
    assert list(files) == ["00.png", "00_index.png", "01.png", "01_index.png"]


def effect_of_test_batch_size(runs, baseline):

    results = sizes_of_batches(runs, segmenter, lambda size: segmented(runs, baseline, **{"TEST.batch_size": size}))
    assert results[0] == results[1]


OTHER_EFFECTS = {
    "DATASET.cat_max_ratio": effect_of_cat_max_ratio,
    "TRAIN.ohem_threshold": effect_of_ohem_threshold,
    "TRAIN.ohem_min_kept": effect_of_ohem_min_kept,
    "TRAIN.visualize": effect_of_train_visualize,
    "VAL.num_val": effect_of_num_val,
    "INFERENCE.flip": effect_of_flip,
    "INFERENCE.window_size": effect_of_window,
    "INFERENCE.window_overlap": effect_of_overlap,
    "INFERENCE.precision": effect_of_precision,
    "DATASET.eval_resize": effect_of_eval_resize,
    "INFERENCE.compile": effect_of_inference_compile,
    "DIR": effect_of_dir,
    "DATASET.list_val": effect_of_list_val,
    "DATASET.classes": effect_of_classes,
    "DATASET.ignore_values": effect_of_ignore_values,
    "DATASET.palette_labels": effect_of_palette_labels,
    "DATASET.on_error": effect_of_on_error,
    "DATASET.max_pixels": effect_of_max_pixels,
    "DATASET.max_bytes": effect_of_max_bytes,
    "MODEL.fc_dim": effect_of_fc_dim,
    "MODEL.pretrained": effect_of_pretrained,
    "MODEL.reset_classifier": effect_of_new_head,
    "TRAIN.start_epoch": effect_of_start_epoch,
    "TRAIN.workers": effect_of_workers,
    "RUNTIME.timeout": effect_of_timeout,
    "TRAIN.disp_iter": effect_of_disp_iter,
    "TRAIN.channels_last": effect_of_channels_last,
    "TRAIN.activation_checkpointing": effect_of_recompute,
    "TRAIN.deterministic": effect_of_deterministic,
    "TRAIN.compile": effect_of_train_compile,
    "TRAIN.eval_epoch": effect_of_eval_epoch,
    "TRAIN.checkpoint_iters": effect_of_checkpoint_iters,
    "TRAIN.resume": effect_of_resume,
    "TRAIN.tensorboard": effect_of_tensorboard,
    "VAL.batch_size": effect_of_val_batch_size,
    "VAL.visualize": effect_of_visualize,
    "VAL.checkpoint": effect_of_val_checkpoint,
    "TEST.batch_size": effect_of_test_batch_size,
    "TEST.checkpoint": effect_of_test_checkpoint,
    "TEST.result": effect_of_test_result,
}


@pytest.mark.parametrize("key", OTHER_EFFECTS)
def test_has_its_effect(key, runs, baseline):
    OTHER_EFFECTS[key](runs, baseline)


def test_norms_of_a_checkpoint_are_not_mixed_up(runs, baseline):
    inplace = runs.train(MODEL__norm="inplace")
    assert evaluated(runs, inplace, **{"MODEL.norm": "inplace"})["images"] == 2
    with pytest.raises(UserError, match=r"set MODEL\.norm inplace"):
        evaluated(runs, inplace)
    with pytest.raises(UserError, match=r"was not trained with MODEL\.norm inplace.* set MODEL\.norm sync"):
        evaluated(runs, baseline, **{"MODEL.norm": "inplace"})
    with pytest.raises(UserError, match=r"the saved run has inplace norms, this one plain: use its MODEL\.norm"):
        runs.train(DIR=inplace, TRAIN__resume="auto", TRAIN__num_epoch=3)


def test_checkpoints_by_path(runs, baseline):
    with pytest.raises(UserError, match=r"there is no checkpoint file /nowhere/a\.pth"):
        evaluated(runs, baseline, **{"VAL.checkpoint": "/nowhere/a.pth"})
    with pytest.raises(UserError, match="does not hold a whole network"):
        evaluated(runs, baseline, **{"VAL.checkpoint": baseline / "encoder_epoch_2.pth"})


def test_results_say_how_they_came_about(runs, baseline):
    options = evaluated(runs, baseline, **{"INFERENCE.flip": True, "DATASET.imgSizes": "(40,)"})["options"]
    assert options["flip"] is True
    assert options["imgSizes"] == [40]
    assert options["list_val"] == "val"


def test_no_option_is_left_out():
    assert set(CHANGES_WEIGHTS) | set(OTHER_EFFECTS) == set(OPTIONS)
    assert not set(CHANGES_WEIGHTS) & set(OTHER_EFFECTS)
