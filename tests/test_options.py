"""Every option of the configuration is read and has an effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import in_process, same, small, weights, words
from scenes import write_pairs

from mit_semseg import build
from mit_semseg.config import load_config
from mit_semseg.config.defaults import OPTIONS
from mit_semseg.dataset import datasets
from mit_semseg.engine import MaskedNLLLoss, distributed, trainer
from mit_semseg.evaluation import evaluator
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
    write_pairs(root / "palette", SIZES, seed=1)
    for path in (root / "palette" / "annotations").iterdir():
        label = Image.fromarray(np.asarray(Image.open(path)))
        label.putpalette(list(range(12)))
        label.save(path)
    return root


class Scripts:
    """Short runs of the scripts in this process; options are given as keywords such as TRAIN__seed."""

    def __init__(self, data, folder):
        self.data, self.folder, self.count = data, folder, 0

    def train(self, **changes):
        self.count += 1
        options = small(self.data, self.folder / f"run{self.count}", **changes)
        in_process("train.py", options)
        return Path(options["DIR"])

    def evaluate(self, folder, **changes):
        assert in_process("eval.py", small(self.data, folder, **changes)) == 0
        return json.loads((folder / "result" / "results.json").read_text())

    def segment(self, folder, **changes):
        """Segment the validation images with test.py; return a dict with the contents of the output files."""
        options = small(self.data, folder, **{"TEST.result": self.folder / "out", **changes})
        assert in_process("test.py", "--index", "--imgs", self.data / "val" / "images", options) == 0
        return {path.name: path.read_bytes() for path in sorted(Path(options["TEST.result"]).iterdir())}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return Scripts(data, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def baseline(run):
    return run.train()


@pytest.fixture(scope="module")
def one_epoch(run):
    return run.train(TRAIN__num_epoch=1)


@pytest.fixture(scope="module")
def results(run, baseline):
    """Return the scores and the output files of the baseline run."""
    return run.evaluate(baseline), run.segment(baseline)


def log_of(folder):
    return (folder / "log.txt").read_text()


def history_of(folder, epoch=1):
    return torch.load(folder / f"history_epoch_{epoch}.pth", weights_only=True)


# Options that change the trained weights.
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
    "DATASET.class_sampling": 0.01,
    "DATASET.class_mix": 1,
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
    "TRAIN.num_epoch": 2,
    "TRAIN.epoch_iters": 2,
    "TRAIN.optim": "AdamW",
    "TRAIN.lr_encoder": 0.005,
    "TRAIN.lr_decoder": 0.005,
    "TRAIN.lr_decay": 0.5,
    "TRAIN.lr_base_batch": 16,
    "TRAIN.schedule": "cosine",
    "TRAIN.lr_pow": 2,
    "TRAIN.warmup_iters": 3,
    "TRAIN.freeze_encoder": 1,
    "TRAIN.ema": 0.9,
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


# Options that change the trained weights only together with others, as (other options, two values to compare).
CHANGES_WEIGHTS_WITH_OTHERS = {
    "DATASET.cat_max_ratio": ({"DATASET.crop_size": 24}, (1, 0.5)),
    "TRAIN.class_weights": ({}, ("auto", (1, 1, 1))),
    "TRAIN.ohem_threshold": ({"TRAIN.loss": "ohem", "TRAIN.ohem_min_kept": 1}, (0.2, 1)),
    "TRAIN.ohem_min_kept": ({"TRAIN.loss": "ohem", "TRAIN.ohem_threshold": 0.1}, (1, 100_000)),
}

# Options that change the scores and the output files.
CHANGES_RESULTS = {"INFERENCE.flip": True, "INFERENCE.window_size": [32, 40]}


@pytest.mark.parametrize("key", CHANGES_WEIGHTS)
def test_changed_option_changes_the_trained_weights(key, run, one_epoch, data):
    value = CHANGES_WEIGHTS[key]
    if "MODEL.weights_" in key:
        for part in ("encoder", "decoder"):
            (data / f"start_{part}.pth").write_bytes((one_epoch / f"{part}_epoch_1.pth").read_bytes())
    changed = run.train(**{"TRAIN.num_epoch": 1, key: value(data) if callable(value) else value})
    assert not same(*(weights(folder, "epoch_1.pth") for folder in (changed, one_epoch)))


@pytest.mark.parametrize("key", CHANGES_WEIGHTS_WITH_OTHERS)
def test_changed_option_changes_the_trained_weights_together_with_others(key, run):
    others, values = CHANGES_WEIGHTS_WITH_OTHERS[key]
    folders = [run.train(TRAIN__num_epoch=1, **others, **{key: value}) for value in values]
    assert not same(*(weights(folder, "epoch_1.pth") for folder in folders))


@pytest.mark.parametrize("key", CHANGES_RESULTS)
def test_changed_option_changes_the_results(key, run, baseline, results):
    change = {key: CHANGES_RESULTS[key]}
    scores, files = run.evaluate(baseline, **change), run.segment(baseline, **change)
    assert scores["options"][key.removeprefix("INFERENCE.")] == CHANGES_RESULTS[key]
    assert scores["iou_per_class"] != results[0]["iou_per_class"]
    assert files != results[1]


def test_equal_options_give_equal_weights(run, baseline):
    assert same(weights(run.train()), weights(baseline))


def name_of_test(option):
    return "test_option_" + option.lower().replace(".", "_")


def test_every_option_is_tested():
    tests = {name for name in globals() if name.startswith("test_option_")}
    tables = CHANGES_WEIGHTS, CHANGES_WEIGHTS_WITH_OTHERS, CHANGES_RESULTS
    assert tests.union(*(map(name_of_test, table) for table in tables)) == set(map(name_of_test, OPTIONS))


def test_option_train_visualize(run):
    folder = run.train(TRAIN__eval_epoch=1, TRAIN__visualize=True)
    panels = [p.relative_to(folder / "vis").as_posix() for p in sorted((folder / "vis").rglob("*.png"))]
    assert panels == [f"epoch_{epoch}/val/images/{name}.png" for epoch in (1, 2) for name in ("00", "01")]
    with pytest.raises(UserError, match=r"TRAIN\.eval_epoch"):
        run.train(TRAIN__visualize=True)


def test_option_val_num_val(run):
    folder = run.train(TRAIN__eval_epoch=2, TRAIN__visualize=True, VAL__num_val=1)
    assert [p.name for p in (folder / "vis").rglob("*.png")] == ["00.png"]


def test_option_inference_window_overlap(run, baseline):
    files = [run.segment(baseline, INFERENCE__window_size=32, INFERENCE__window_overlap=n) for n in (0, 0.8)]
    assert files[0] != files[1]


def test_option_inference_precision(run, baseline, monkeypatch):
    dtypes, logits = [], SegmentationModule.logits

    def record(self, feed):
        dtypes.append(list(self.encoder.parameters())[-1].dtype)
        return logits(self, feed)

    monkeypatch.setattr(SegmentationModule, "logits", record)
    auto, fp32, bf16 = (run.evaluate(baseline, INFERENCE__precision=p) for p in ("auto", "fp32", "bf16"))
    assert dtypes == [torch.float32] * 8 + [torch.bfloat16] * 4
    assert auto["iou_per_class"] == fp32["iou_per_class"]
    assert abs(bf16["pixel_accuracy"] - auto["pixel_accuracy"]) < 0.05


def test_option_dataset_eval_resize(run, baseline, monkeypatch):
    calls, resize = [], datasets.imresize_fast
    monkeypatch.setattr(datasets, "imresize_fast", lambda *args: calls.append(args) or resize(*args))
    exact, fast = (run.evaluate(baseline, DATASET__eval_resize=r)["pixel_accuracy"] for r in ("pixel-exact", "fast"))
    assert len(calls) == 4
    assert abs(fast - exact) < 0.02


def test_option_inference_compile(run, baseline, results, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    assert run.evaluate(baseline, INFERENCE__compile=True)["mean_iou"] == results[0]["mean_iou"]
    assert len(compiled) == 17  # blocks; test_inference.py tests the real compiler, which is slow


def test_option_dir(run):
    assert (run.train(DIR=run.folder / "named") / "decoder_epoch_2.pth").is_file()


def test_option_dataset_list_val(run, baseline):
    for split, images in (("val", 2), ("other", 3)):
        scores = run.evaluate(baseline, DATASET__list_val=split)
        assert (scores["images"], scores["options"]["list_val"]) == (images, split)


def test_option_dataset_classes(run, baseline):
    result = run.evaluate(baseline, DATASET__classes="['a','b','c']", DATASET__ignore_values="[0]")
    assert [entry["class"] for entry in result["iou_per_class"]] == ["a", "b", "c"]


def test_option_dataset_ignore_values(run, baseline):
    results = [
        run.evaluate(baseline, DATASET__classes="['a','b','c']", DATASET__ignore_values=v) for v in ("[0]", "[3]")
    ]
    assert results[0]["labelled_pixels"] != results[1]["labelled_pixels"]


def test_option_dataset_on_error(run):
    (run.data / "missing.odgt").write_text('{"fpath_img": "missing.png", "width": 4, "height": 5}\n' * 3)
    for mode, message in (("stop", "fpath_segm"), ("skip", r"DATASET\.on_error skip")):
        with pytest.raises(UserError, match=message):
            run.train(DATASET__list_train="missing.odgt", DATASET__on_error=mode)


BANDS = {"DATASET.mean": (100, 100, 100), "DATASET.std": (50, 50, 50)}


def test_option_dataset_channels(run):
    with pytest.raises(UserError, match=r"DATASET\.channels 4.*DATASET\.mean"):
        run.train(DATASET__channels=4)
    with pytest.raises(UserError, match=r"DATASET\.channels\), got an image of"):
        run.train(DATASET__channels=4, DATASET__mean=(1, 1, 1, 1), DATASET__std=(1, 1, 1, 1))


def test_option_dataset_mean(run, baseline):
    assert not same(weights(run.train(**BANDS)), weights(baseline))


def test_option_dataset_std(run):
    first, second = (run.train(**BANDS | {"DATASET.std": std}) for std in ((50, 50, 50), (60, 60, 60)))
    assert not same(weights(first), weights(second))


SPLIT = {"DATASET.list_val": "./data/validation.odgt", "DATASET.val_fraction": 0.5}


def test_option_dataset_val_fraction(run, baseline):
    assert run.evaluate(baseline, **SPLIT)["images"] == run.evaluate(baseline, DATASET__list_val="train")["images"] // 2
    with pytest.raises(UserError, match=r"DATASET\.val_fraction.*DATASET\.list_val"):
        run.evaluate(baseline, DATASET__val_fraction=0.5)


def test_option_dataset_val_seed(run, baseline):
    results = [run.evaluate(baseline, **SPLIT, DATASET__val_seed=seed) for seed in range(6)]
    assert len({frozenset(row["image"] for row in result["per_image"]) for result in results}) > 1


def test_option_dataset_val_groups(run, baseline):
    with pytest.raises(UserError, match=r"DATASET\.val_groups"):  # all names belong to one group
        run.evaluate(baseline, **SPLIT, DATASET__val_groups=True)


def test_option_dataset_label_format(run, baseline):
    with pytest.raises(UserError, match=r"DATASET\.label_format palette"):
        run.train(DATASET__list_train="palette")
    assert same(weights(run.train(DATASET__list_train="palette", DATASET__label_format="palette")), weights(baseline))


def test_option_model_fc_dim(run, baseline):
    with pytest.raises(UserError, match=r"MODEL\.fc_dim 512.* 320"):
        run.train(MODEL__fc_dim=512)
    assert same(weights(run.train(MODEL__fc_dim=320)), weights(baseline))


def test_option_model_pretrained(run, baseline, monkeypatch):
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(run.folder / "cache"))
    with pytest.raises(UserError, match=r"MODEL\.pretrained False"):
        run.train(MODEL__pretrained=True)
    run.train(DIR=baseline, MODEL__pretrained=True, TRAIN__resume="auto")  # a resumed run loads no initial weights


def test_option_model_reset_classifier(run, baseline):
    changes = {"DATASET.num_class": 5, "MODEL.weights_decoder": baseline / "decoder_epoch_2.pth"}
    with pytest.raises(UserError, match=r"MODEL\.reset_classifier True"):
        run.train(**changes)
    assert "3 of 5 classes" in log_of(run.train(**changes, MODEL__reset_classifier=True))


def test_option_model_weights_classes(run, baseline, tmp_path):
    plain = tmp_path / "decoder.pth"  # without the names of the classes
    torch.save(dict(torch.load(baseline / "decoder_epoch_2.pth", weights_only=True)), plain)
    changes = {"DATASET.num_class": 2, "DATASET.classes": "[sky,road]", "DATASET.ignore_values": "[0,3]"}
    changes |= {"MODEL.weights_decoder": plain, "MODEL.reset_classifier": True}
    assert "MODEL.weights_classes" in log_of(run.train(**changes))
    assert "1 of 2 classes" in log_of(run.train(**changes, MODEL__weights_classes="[road,river,sea]"))


def test_option_train_start_epoch(run):
    folder = run.train(DIR=run.folder / "continued", TRAIN__num_epoch=1)
    run.train(DIR=folder, TRAIN__start_epoch=1)
    assert history_of(folder, 2)["train"]["epoch"] == [2 / 3, 1, 4 / 3, 2]


def loader_of(run, **changes):
    """Return the DataLoader of a training run."""
    loaders, make = [], trainer.make_loader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_loader", lambda *a, **kw: loaders.append(make(*a, **kw)) or loaders[-1])
        run.train(TRAIN__num_epoch=1, TRAIN__epoch_iters=1, **changes)
    return loaders[0]


def test_option_train_workers(run, baseline):
    counts = [loader_of(run, TRAIN__workers=n).num_workers for n in (0, 1, 10_000)]
    assert counts[:2] == [0, 1]
    assert 1 <= counts[2] < 10_000  # limited by the number of cores
    assert same(weights(run.train(TRAIN__workers=1)), weights(baseline))


def test_option_runtime_timeout(run):
    assert loader_of(run, TRAIN__workers=1, RUNTIME__timeout=7.5).timeout == 7.5
    with distributed.join([torch.device("cpu")], 7.5) as world:
        assert world.timeout == 7.5


def test_option_train_disp_iter(run):
    assert [log_of(run.train(TRAIN__disp_iter=n)).count(", acc ") for n in (1, 3)] == [6, 2]


def test_option_train_deterministic(run, baseline, monkeypatch):
    """Weights do not change on the CPU; operations without a deterministic implementation raise an error."""
    enabled, loss = [], MaskedNLLLoss.of_logits

    def record(*args):
        enabled.append(torch.are_deterministic_algorithms_enabled())
        return loss(*args)

    def nondeterministic(*args):
        torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
        return loss(*args)

    monkeypatch.setattr(MaskedNLLLoss, "of_logits", record)
    assert same(weights(run.train(TRAIN__deterministic=True)), weights(baseline))
    assert set(enabled) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(MaskedNLLLoss, "of_logits", nondeterministic)
    with pytest.raises(UserError, match=r"TRAIN\.deterministic: put_ "):
        run.train(TRAIN__deterministic=True)


def test_option_train_activation_checkpointing(run, baseline):
    """The option does not change the weights; test_activation_checkpoint.py tests the memory."""
    assert same(weights(run.train(TRAIN__activation_checkpointing=True)), weights(baseline))
    for changes in ({"MODEL.norm": "inplace"}, {"--gpu": "cpu,cpu"}):
        with pytest.raises(UserError, match=r"TRAIN\.activation_checkpointing"):
            run.train(TRAIN__activation_checkpointing=True, **changes)


def test_option_train_compile(run, monkeypatch):
    """The blocks of the encoder are compiled; test_compilation.py tests the real compiler, which is slow."""
    calls = []

    def compiler(function, **_):
        return lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiler)
    run.train(TRAIN__compile=True)
    assert len(calls) == 6 * 17  # steps and blocks
    for changes in ({"--gpu": "cpu,cpu"}, {"TRAIN.channels_last": False}):
        with pytest.raises(UserError, match=r"TRAIN\.compile"):
            run.train(TRAIN__compile=True, **changes)


def test_option_train_channels_last(run):
    cfg = load_config(None, words(small(run.data, run.folder, TRAIN__channels_last=True))[2:])  # remove --gpu cpu
    module = build.build_module(cfg, torch.device("cpu"))
    assert not module.decoder.cbr[0].weight.is_contiguous(memory_format=torch.channels_last)
    build.build_training(cfg, module, 12, 1)
    assert module.decoder.cbr[0].weight.is_contiguous(memory_format=torch.channels_last)
    once = {"TRAIN.disp_iter": 1, "TRAIN.num_epoch": 1, "TRAIN.epoch_iters": 1}
    folders = [run.train(TRAIN__channels_last=value, **once) for value in (False, True)]
    first, second = (history_of(folder)["train"]["loss"][0] for folder in folders)
    assert first == pytest.approx(second, rel=1e-3)  # sums are computed in another order


def test_option_train_eval_epoch(run, baseline):
    folder = run.train(TRAIN__eval_epoch=2)
    assert (folder / "decoder_best.pth").is_file()
    assert not (baseline / "decoder_best.pth").exists()
    assert history_of(folder, 2)["val"]["epoch"] == [2]
    assert same(weights(folder), weights(baseline))  # validation does not change training


def test_option_train_patience(run):
    short = {"TRAIN.num_epoch": 3, "TRAIN.epoch_iters": 1, "TRAIN.eval_epoch": 1}
    rates = {"TRAIN.lr_encoder": 1e-12, "TRAIN.lr_decoder": 1e-12, "TRAIN.fix_bn": True}
    folders = [run.train(**short, **rates, TRAIN__patience=patience) for patience in (0, 1)]
    assert [(folder / "encoder_epoch_3.pth").is_file() for folder in folders] == [True, False]


def test_option_train_checkpoint_iters(run, monkeypatch):
    names, save = [], trainer.save_atomic
    monkeypatch.setattr(trainer, "save_atomic", lambda obj, path: (names.append(path.name), save(obj, path)))
    for every, expected in ((0, 2), (1, 6)):
        names.clear()
        run.train(TRAIN__checkpoint_iters=every)
        assert names.count("resume.pth") == expected


def test_option_train_resume(run, baseline):
    with pytest.raises(UserError, match=r"TRAIN\.resume auto"):
        run.train(DIR=baseline)
    run.train(DIR=baseline, TRAIN__resume="auto")
    assert "nothing to train" in log_of(baseline)
    copy = run.train(TRAIN__resume=baseline / "resume.pth", TRAIN__num_epoch=3)
    assert (copy / "decoder_epoch_3.pth").is_file()
    assert not (copy / "decoder_epoch_2.pth").exists()
    run.train(DIR=copy, TRAIN__resume="restart")
    assert same(weights(copy), weights(baseline))


def test_option_train_logger(run):
    events = list((run.train(TRAIN__logger="tensorboard") / "tensorboard").glob("events.*"))
    assert len(events) == 1


@pytest.fixture
def batch_sizes(monkeypatch):
    """Return a list to which test.py and eval.py append their batch sizes."""
    sizes = []
    for module in (evaluator, segmenter):

        def record(dataset, device, loading, read=module.read_items):
            sizes.append(loading.batch_size)
            return read(dataset, device, loading)

        monkeypatch.setattr(module, "read_items", record)
    return sizes


def test_option_val_batch_size(run, baseline, results, batch_sizes):
    scores = run.evaluate(baseline, VAL__batch_size=2)
    assert batch_sizes == [2]
    assert scores["iou_per_class"] == results[0]["iou_per_class"]


def test_option_val_visualize(run, baseline, results):
    panels = baseline / "result" / "val" / "images"
    assert not panels.exists()
    run.evaluate(baseline, VAL__visualize=True)
    assert sorted(p.name for p in panels.iterdir()) == ["00.png", "01.png"]


def test_option_val_checkpoint(run, baseline):
    first, last = (run.evaluate(baseline, VAL__checkpoint=f"epoch_{n}.pth") for n in (1, 2))
    assert first["iou_per_class"] != last["iou_per_class"] or first["pixel_accuracy"] != last["pixel_accuracy"]
    for name, message in (
        ("epoch_9.pth", r"epoch_9\.pth .*epoch_1\.pth, epoch_2\.pth"),
        ("/nowhere/a.pth", r"/nowhere/a\.pth"),
        (baseline / "encoder_epoch_2.pth", r"encoder_epoch_2\.pth"),
    ):
        with pytest.raises(UserError, match=message):
            run.evaluate(baseline, VAL__checkpoint=name)


def test_option_test_checkpoint(run, baseline):
    with pytest.raises(UserError, match=r"epoch_9\.pth"):
        run.segment(baseline, TEST__checkpoint="epoch_9.pth")


def test_option_test_result(run, baseline):
    files = run.segment(baseline, TEST__result=run.folder / "there")
    assert list(files) == ["00.png", "00_index.png", "01.png", "01_index.png"]


def test_option_test_batch_size(run, baseline, results, batch_sizes):
    assert run.segment(baseline, TEST__batch_size=2) == results[1]
    assert batch_sizes == [2]


def test_checkpoints_of_different_norms_are_not_mixed_up(run, baseline):
    inplace = run.train(MODEL__norm="inplace")
    assert run.evaluate(inplace, MODEL__norm="inplace")["images"] == 2
    with pytest.raises(UserError, match=r"MODEL\.norm inplace"):
        run.evaluate(inplace)
    with pytest.raises(UserError, match=r"MODEL\.norm sync"):
        run.evaluate(baseline, MODEL__norm="inplace")
    with pytest.raises(UserError, match=r"MODEL\.norm inplace"):
        run.train(DIR=inplace, TRAIN__resume="auto", TRAIN__num_epoch=3)


def test_unsupported_option_is_refused_before_training(monkeypatch):
    with pytest.raises(UserError, match=r"MODEL\.norm inplace"):
        build.build_module(load_config(None, ["MODEL.norm", "inplace"]), torch.device("mps"))
    monkeypatch.setattr(build, "lacks_bfloat16", lambda device: True)
    with pytest.raises(UserError, match=r"TRAIN\.amp bf16: cuda:0"):
        build.build_module(load_config(None, ["TRAIN.amp", "bf16"]), torch.device("cuda:0"))
