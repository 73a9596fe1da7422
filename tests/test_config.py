"""Options: old files load unchanged, every problem is reported at once, shipped files are right."""

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from yacs.config import CfgNode

from mit_semseg.config import ConfigError, cfg, load_config
from mit_semseg.config.defaults import OPTIONS
from mit_semseg.models import ModelBuilder

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(ROOT.glob("config/*.yaml"))

ORIGINAL_DEFAULTS = {
    "DATASET.num_class": 150,
    "DATASET.imgSizes": (300, 375, 450, 525, 600),
    "DATASET.imgMaxSize": 1000,
    "DATASET.padding_constant": 8,
    "DATASET.segm_downsampling_rate": 8,
    "DATASET.random_flip": True,
    "MODEL.weights_encoder": "",
    "MODEL.weights_decoder": "",
    "MODEL.fc_dim": 2048,
    "TRAIN.batch_size_per_gpu": 2,
    "TRAIN.num_epoch": 20,
    "TRAIN.start_epoch": 0,
    "TRAIN.epoch_iters": 5000,
    "TRAIN.optim": "SGD",
    "TRAIN.lr_encoder": 0.02,
    "TRAIN.lr_decoder": 0.02,
    "TRAIN.lr_pow": 0.9,
    "TRAIN.beta1": 0.9,
    "TRAIN.weight_decay": 1e-4,
    "TRAIN.deep_sup_scale": 0.4,
    "TRAIN.fix_bn": False,
    "TRAIN.workers": 16,
    "TRAIN.disp_iter": 20,
    "TRAIN.seed": 304,
    "VAL.batch_size": 1,
    "VAL.visualize": False,
    "VAL.checkpoint": "epoch_20.pth",
    "TEST.batch_size": 1,
    "TEST.checkpoint": "epoch_20.pth",
    "TEST.result": "./",
}

# A file as users of the original have them, every key of it.
OLD_FILE = """
DATASET:
  root_dataset: "./data/"
  list_train: "./data/training.odgt"
  list_val: "./data/validation.odgt"
  num_class: 150
  imgSizes: (300, 375, 450, 525, 600)
  imgMaxSize: 1000
  padding_constant: 32
  segm_downsampling_rate: 4
  random_flip: True
MODEL:
  arch_encoder: "hrnetv2"
  arch_decoder: "c1"
  fc_dim: 720
TRAIN:
  batch_size_per_gpu: 2
  num_epoch: 30
  start_epoch: 0
  epoch_iters: 5000
  optim: "SGD"
  lr_encoder: 0.02
  lr_decoder: 0.02
  lr_pow: 0.9
  beta1: 0.9
  weight_decay: 1e-4
  deep_sup_scale: 0.4
  fix_bn: False
  workers: 16
  disp_iter: 20
  seed: 304
VAL:
  visualize: False
  checkpoint: "epoch_30.pth"
TEST:
  checkpoint: "epoch_30.pth"
  result: "./"
DIR: "ckpt/ade20k-hrnetv2-c1"
"""


def get(node, key):
    for part in key.split("."):
        node = node[part]
    return node


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("key", ORIGINAL_DEFAULTS)
def test_defaults_of_the_original(key):
    assert get(cfg, key) == ORIGINAL_DEFAULTS[key]
    assert type(get(cfg, key)) is type(ORIGINAL_DEFAULTS[key])


def test_old_file_loads_unchanged(tmp_path):
    path = write(tmp_path / "old.yaml", OLD_FILE)
    new, old = load_config(path), cfg.clone()
    old.merge_from_file(str(path))
    for node in (new, old):
        assert (node.MODEL.arch_encoder, node.MODEL.fc_dim, node.TRAIN.weight_decay) == ("hrnetv2", 720, 1e-4)
        assert (node.DATASET.imgSizes, node.DIR) == ((300, 375, 450, 525, 600), "ckpt/ade20k-hrnetv2-c1")
    assert cfg.MODEL.arch_encoder == "resnet50dilated"  # the global defaults are not touched


def test_cfg_is_the_node_that_callers_know():
    node = cfg.clone()
    assert isinstance(node, CfgNode)
    node.merge_from_list(["TRAIN.num_epoch", "7", "DATASET.imgSizes", "(200, 300)"])
    node.list_test = [{"fpath_img": "a.jpg"}]
    node.freeze()
    assert (node.TRAIN.num_epoch, node.DATASET.imgSizes, len(node.list_test)) == (7, (200, 300), 1)
    with pytest.raises(AttributeError):
        node.DIR = "elsewhere"


def test_every_problem_is_reported_at_once(tmp_path):
    path = write(
        tmp_path / "bad.yaml",
        """
DATASET: {num_clas: 20, padding_constant: 12}
TRAIN: {lr_encoder: fast, batch_size_per_gpu: 0, optim: sgdd, start_epoch: 30}
MODEL: {arch_encoder: resnet50dilate}
lr_pow: 2
VAL: 3
""",
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, ["TRAIN.num_epoch", "2.5"])
    text = str(error.value)
    for part in (
        "DATASET.num_clas: there is no such option; did you mean DATASET.num_class?",
        "TRAIN.lr_encoder: 'fast' is no number",
        "TRAIN.batch_size_per_gpu: 0 is out of range; allowed: at least 1",
        "TRAIN.optim: 'sgdd' is not allowed; did you mean SGD? allowed: SGD, AdamW",
        "did you mean resnet50dilated?",
        "lr_pow: there is no such option; did you mean TRAIN.lr_pow?",
        "VAL: expected options below it",
        "TRAIN.num_epoch: '2.5' is no whole number",
        "[command line]",
        "padding_constant 12 must be a multiple of DATASET.segm_downsampling_rate 8: set padding_constant 16",
        "TRAIN.start_epoch 30 leaves nothing to train",
    ):
        assert part in text
    assert len(error.value.problems) == 10
    assert "bad.yaml]" in text


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.num_epoch"], "come in pairs"),
        (["DATASET.imgSizes", "()"], "list is empty"),
        (["DATASET.imgSizes", "(300, 'a')"], "no whole number"),
        (["DATASET.imgMaxSize", "100"], "smaller than every short side"),
        (["DATASET.classes", "['a', 'b']"], "lists 2 names"),
        (["DATASET.ignore_values", "[255]"], "goes with a list of names"),
        (["TRAIN.start_epoch", "2", "TRAIN.resume", "auto"], "use one of them"),
        (["MODEL.reset_classifier", "True"], "needs a file"),
        (["MODEL.output_stride", "4"], "hrnetv2's only"),
        (["TRAIN.warmup_iters", "100000"], "not shorter"),
        (["TRAIN.lr_encoder", "nan"], "is no number"),
        (["TRAIN.fix_bn", "3"], "no True or False"),
        (
            ["TRAIN.compile", "True", "TRAIN.activation_checkpointing", "True"],
            "TRAIN.compile cannot compile what TRAIN.activation_checkpointing",
        ),
    ],
)
def test_contradictions_and_wrong_values(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, opts)


def test_values_are_read_as_what_they_say(tmp_path):
    path = write(tmp_path / "a.yaml", "TRAIN: {lr_encoder: 1e-4, num_epoch: 1e1, resume: off, amp: OFF, optim: adamw}")
    train = load_config(path, ["TRAIN.lr_decoder", "1", "TRAIN.fix_bn", "true", "DATASET.imgSizes", "240"]).TRAIN
    assert (train.lr_encoder, train.num_epoch, train.resume, train.amp) == (1e-4, 10, "off", "off")
    listed = ["DATASET.classes", "[road, car]", "DATASET.num_class", "2", "DATASET.ignore_values", "[255]"]
    assert load_config(None, listed).DATASET.classes == ("road", "car")
    assert (train.optim, train.lr_decoder, train.fix_bn) == ("AdamW", 1.0, True)


@pytest.mark.parametrize(
    "text",
    [
        "TRAIN: {seed: " + 5000 * "1" + "}",
        "DATASET: {palette_labels: !!bool x}",
        "DIR: " + 3000 * "[",
        '_BASE_: "a\\0b"',
        "TRAIN: {lr_encoder: " + 400 * "1" + "}",
        "TRAIN: {lr_encoder: '{[]}'}",
        "".join(f"x{n}: &x{n} [{9 * f'*x{n - 1}, '}0]\n" for n in range(1, 15)).replace("*x0", "0") + "VAL: *x14",
        "VAL: &x [*x]",
    ],
    ids=lambda text: text[:24],
)
def test_what_yaml_stumbles_over_is_a_problem_like_any_other(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml|b is no YAML file"):
        load_config(write(tmp_path / "c.yaml", text))


def test_words_of_yaml_are_text_as_written(tmp_path):
    text = """
DIR: 2024-31-12
DATASET: {num_class: 6, classes: [no, yes, 010, 2024-01-02, ~, 'on']}
VAL: {checkpoint: 1e3}
"""
    words = ("no", "yes", "010", "2024-01-02", "~", "on")
    path = write(tmp_path / "a.yaml", text)
    loaded = load_config(path)
    assert (loaded.DIR, loaded.DATASET.classes, loaded.VAL.checkpoint) == ("2024-31-12", words, "1e3")
    dumped = write(tmp_path / "dumped.yaml", loaded.dump())
    assert load_config(dumped).DATASET.classes == words
    merged = cfg.clone()
    merged.merge_from_file(path)
    assert merged.DATASET.classes == words
    for listed in ("[no, yes, 010, 2024-01-02, ~, on]", "(no, yes, 010, 2024-01-02, ~, 'on')", str(list(words))):
        opts = ["DATASET.classes", listed, "DATASET.num_class", "6"]
        assert load_config(None, opts).DATASET.classes == words


PATHS = [key for key, option in OPTIONS.items() if option.path]


def test_every_path_expands_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert {"DIR", "DATASET.root_dataset", "TEST.result", "MODEL.weights_encoder", "DATASET.classes"} <= set(PATHS)
    lines = [f"  {key.split('.')[1]}: ~/x" for key in PATHS if key.startswith("DATASET.")]
    (tmp_path / "base.yaml").write_text("\n".join(["DATASET:", *lines]))
    (tmp_path / "a.yaml").write_text("_BASE_: ~/base.yaml")
    others = [word for key in PATHS if "DATASET" not in key for word in (key, "${SCRATCH}/$USERS_x")]
    loaded = load_config("~/a.yaml", others)
    for key in PATHS:
        expected = "x" if "DATASET" in key else "scratch/$USERS_x"  # a variable that is not set stays
        assert get(loaded, key) == str(tmp_path / expected)


def test_a_path_that_exists_as_written_is_not_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    assert load_config(None, ["DIR", "$HOME"]).DIR == "$HOME"


def test_options_may_be_joined_to_their_values():
    opts = ["TRAIN.num_epoch=3", "DIR=a=b", "TRAIN.epoch_iters", "7", "TEST.result", "x=y"]
    loaded = load_config(None, opts)
    assert (loaded.TRAIN.num_epoch, loaded.DIR, loaded.TRAIN.epoch_iters, loaded.TEST.result) == (3, "a=b", 7, "x=y")
    with pytest.raises(ConfigError, match=r"TRAIN\.num_epochs.*TRAIN\.num_epoch\?"):
        load_config(None, ["TRAIN.num_epochs=3"])


def test_a_missing_file_names_the_closest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"config/ade20k-hrnetv2\.yaml"):
        load_config("config/ade20k-hrnetv2-c1.yaml")
    with pytest.raises(ConfigError, match=r"config/quickstart\.yaml"):
        load_config("quikstart.yaml")


def test_the_global_node_does_not_change_what_is_loaded(monkeypatch):
    monkeypatch.setitem(cfg.DATASET, "num_class", 3)
    assert load_config().DATASET.num_class == 150


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_shipped_files_state_what_other_programs_read(path):
    """Programs read these with `yaml.safe_load` alone, without base files and defaults."""
    own, loaded = yaml.safe_load(path.read_text()), load_config(path)
    for key in ("DIR", "DATASET.num_class", "MODEL.fc_dim", "VAL.checkpoint", "TEST.checkpoint"):
        assert get(own, key) == get(loaded, key), key
    encoder = ModelBuilder.build_encoder(loaded.MODEL.arch_encoder, pretrained=False)
    assert encoder.out_channels[-1] == loaded.MODEL.fc_dim


def test_base_files(tmp_path):
    write(tmp_path / "base.yaml", "TRAIN: {num_epoch: 3, seed: 5}\nDIR: a")
    write(tmp_path / "middle.yaml", "_BASE_: base.yaml\nTRAIN: {seed: 6}")
    node = load_config(write(tmp_path / "top.yaml", "_BASE_: middle.yaml\nDIR: b"))
    assert (node.TRAIN.num_epoch, node.TRAIN.seed, node.DIR) == (3, 6, "b")
    write(tmp_path / "base.yaml", "_BASE_: top.yaml")
    with pytest.raises(ConfigError, match=r"based on itself: top.yaml -> middle.yaml -> base.yaml -> top.yaml"):
        load_config(tmp_path / "top.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(write(tmp_path / "lost.yaml", "_BASE_: nowhere.yaml"))


# A file under the name that the original gave it.
PAIR_OF = {"ade20k-hrnetv2": "ade20k-hrnetv2-c1"}


def test_shipped_files_are_there():
    assert len(YAMLS) == 19
    assert sum(path.name.startswith("ade20k-") for path in YAMLS) == 13
    assert sum(path.name.startswith("cityscapes-") for path in YAMLS) == 3


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_shipped_files_load(path):
    node = load_config(path)
    text = path.read_text()
    assert f"--cfg config/{path.name}" in text
    name = PAIR_OF.get(path.stem, path.stem)
    assert name == Path(node.DIR).name or name == "own-folders"
    if path.name.startswith("ade20k-"):
        assert name == f"ade20k-{node.MODEL.arch_encoder}-{node.MODEL.arch_decoder}"
        assert "Published" in text
        rate = 1 if "bilinear" in path.name else 8 if "dilated" in path.name else 4
        assert node.DATASET.segm_downsampling_rate == rate


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_shipped_files_evaluate_what_they_train(path):
    node = load_config(path)
    expected = "best.pth" if node.TRAIN.eval_epoch else f"epoch_{node.TRAIN.num_epoch}.pth"
    assert node.VAL.checkpoint == node.TEST.checkpoint == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["DATASET.crop_size", "(1, 2, 3)"], "give one side, or height and width"),
        (["INFERENCE.window_size", "(64, 0)"], "give one side, or height and width"),
        (["DATASET.random_scale", "(2, 0.5)"], "the smallest and the largest factor"),
        (["TRAIN.class_weights", "(1, 2)"], r"has 2 numbers, but DATASET\.num_class is 150"),
        (
            ["TRAIN.label_smoothing", "0.1", "TRAIN.loss", "dice"],
            "label_smoothing 0.1 has no effect; it is cross entropy's",
        ),
        (["TRAIN.ohem_min_kept", "5"], "has no effect; it is of hard pixels: TRAIN.loss ohem"),
        (["INFERENCE.window_overlap", "0.5"], r"has no effect; it is of windows: set INFERENCE\.window"),
        (["DATASET.cat_max_ratio", "0.75"], "has no effect; it is of crops"),
        (["INFERENCE.window_size", "8"], "sides are at least 32 pixels"),
        (["TRAIN.eval_epoch", "30"], r"TRAIN\.eval_epoch 30 never comes: TRAIN\.num_epoch is 20"),
        (["MODEL.norm", "inplace", "TRAIN.amp", "bf16"], "set TRAIN.amp off, or MODEL.norm sync"),
        (["MODEL.arch_encoder", "vgg16_dilated8", "MODEL.output_stride", "16"], "vgg16_dilated8 has 8 only"),
    ],
)
def test_what_does_not_go_together_is_said(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, options)


def test_attributes_that_a_caller_added_and_lists_can_be_merged():
    node = cfg.clone()
    node.MINE, node.DATASET.imgSizes = "x", [300]
    node.merge_from_list(["MINE", "y", "TRAIN.num_epoch", "3"])
    assert (node.MINE, node.TRAIN.num_epoch) == ("y", 3)


def test_a_pattern_without_quotes_is_recognized(tmp_path):
    files = [write(tmp_path / name, "") for name in ("a.jpg", "b.jpg")]
    with pytest.raises(ConfigError, match="put a pattern in quotes"):
        load_config(None, [str(f) for f in files])
    options = ["MODEL.weights_encoder", str(files[0]), "MODEL.weights_decoder", str(files[1])]
    assert load_config(None, options).MODEL.weights_decoder == str(files[1])


def test_own_folders_example_is_short():
    lines = (ROOT / "config/own-folders.yaml").read_text().splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 15


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)) | st.text(max_size=12), VALUES, max_size=4))
def test_anything_loads_or_gives_the_list_of_problems(changes):
    node = cfg.clone()
    opts = [part for key, value in changes.items() for part in (key, value)]
    with suppress(ConfigError):
        node.merge_from_list(opts)
    for key, option in OPTIONS.items():
        assert isinstance(get(node, key), option.types)
