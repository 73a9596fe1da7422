"""Files of version 2 load unchanged, all errors are reported together, and the shipped YAML files are valid."""

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

# A configuration file of version 2 with every key and its default value.
VERSION_2_FILE = """
DATASET:
  {root_dataset: ./data/, list_train: ./data/training.odgt, list_val: ./data/validation.odgt, num_class: 150,
  imgSizes: "(300, 375, 450, 525, 600)", imgMaxSize: 1000, padding_constant: 8, segm_downsampling_rate: 8,
  random_flip: True}
MODEL:
  {arch_encoder: resnet50dilated, arch_decoder: ppm_deepsup, weights_encoder: "", weights_decoder: "", fc_dim: 2048}
TRAIN:
  {batch_size_per_gpu: 2, num_epoch: 20, start_epoch: 0, epoch_iters: 5000, optim: SGD, lr_encoder: 0.02,
  lr_decoder: 0.02, lr_pow: 0.9, beta1: 0.9, weight_decay: 1e-4, deep_sup_scale: 0.4, fix_bn: False, workers: 16,
  disp_iter: 20, seed: 304}
VAL: {batch_size: 1, visualize: False, checkpoint: epoch_20.pth}
TEST: {batch_size: 1, checkpoint: epoch_20.pth, result: ./}
DIR: ckpt/ade20k-resnet50dilated-ppm_deepsup
"""


def get(config, key):
    return config[key] if key == "DIR" else config[key.split(".")[0]][key.split(".")[1]]


def write(path, text):
    path.write_text(text)
    return path


def test_version_2_file_has_the_default_values(tmp_path):
    assert load_config(write(tmp_path / "old.yaml", VERSION_2_FILE)) == load_config() == cfg


def test_cfg_is_a_yacs_node_that_callers_can_extend(tmp_path):
    config = cfg.clone()
    assert isinstance(config, CfgNode)
    config.MINE, config.DATASET.imgSizes = "x", [300]
    config.merge_from_list(["MINE", "[7", "TRAIN.num_epoch", "7"])
    assert (config.MINE, config.TRAIN.num_epoch, config.DATASET.imgSizes) == ("[7", 7, [300])
    config.merge_from_list(["DATASET.imgSizes", "(200, 300)"])
    config.merge_from_file(str(write(tmp_path / "a.yaml", "MINE: [1, 2.5, text, no]\nTRAIN: {fix_bn: True}")))
    config.freeze()
    assert (config.DATASET.imgSizes, config.TRAIN.fix_bn) == ((200, 300), True)
    assert config.MINE == [1, 2.5, "text", False]  # with the types that `yaml.safe_load` gives
    with pytest.raises(AttributeError):
        config.DIR = "elsewhere"


@pytest.mark.parametrize(
    "text", ["TRAIN: {seed: 5}\nDATASET: {}\nTRAIN: {num_epoch: 3}", "DIR: x\nTRAIN:\n  seed: 5\n  seed: 6"]
)
def test_repeated_keys_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"a\.yaml.* (TRAIN|seed) .*lines? (1|3) and (3|4)"):
        load_config(write(tmp_path / "a.yaml", text))


def test_changes_of_the_global_cfg_do_not_affect_load_config(monkeypatch):
    monkeypatch.setitem(cfg.DATASET, "num_class", 3)
    assert load_config().DATASET.num_class == 150


def test_all_errors_are_reported_together(tmp_path):
    text = """
DATASET: {num_clas: 20, padding_constant: 12}
TRAIN: {lr_encoder: fast, batch_size_per_gpu: 0, amp: bf1, start_epoch: 30}
lr_pow: 2
VAL: 3
"""
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path / "bad.yaml", text), ["TRAIN.num_epoch", "2.5"])
    expected = [
        ("DATASET.num_clas:", "DATASET.num_class?", "bad.yaml]"),
        ("TRAIN.lr_encoder:", "'fast'"),
        ("TRAIN.batch_size_per_gpu:", "at least 1"),
        ("TRAIN.amp:", "'bf1'", "bf16?", "off, auto, bf16, fp16"),
        ("lr_pow:", "TRAIN.lr_pow?"),
        ("VAL:", "section"),
        ("TRAIN.num_epoch:", "'2.5'", "[command line]"),
        ("DATASET.padding_constant 12", "DATASET.segm_downsampling_rate 8", "padding_constant 16"),
        ("TRAIN.start_epoch 30", "TRAIN.num_epoch"),
    ]
    assert len(error.value.problems) == len(expected)
    for problem, parts in zip(error.value.problems, expected, strict=True):
        assert problem.startswith(parts[0])
        assert all(part in problem for part in parts)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.num_epoch"], "TRAIN.num_epoch"),
        (["TRAIN.lr_encoder=0", "TRAIN.lr_decoder=0"], "TRAIN.lr_encoder and TRAIN.lr_decoder"),
        (["DATASET.class_mix=1", "TRAIN.batch_size_per_gpu=1"], "TRAIN.batch_size_per_gpu"),
        (["TRAIN.freeze_encoder=2", "TRAIN.lr_decoder=0"], "TRAIN.lr_decoder"),
        (["DATASET.val_groups=True"], "DATASET.val_fraction"),
        (["DATASET.val_seed=3"], "DATASET.val_fraction"),
        (["MODEL.weights_classes=cityscapes"], "MODEL.reset_classifier"),
        (["TRAIN.deep_sup_scale=1", "MODEL.arch_decoder=c1"], "TRAIN.deep_sup_scale"),
        (["TRAIN.num_epochs=3"], r"TRAIN.num_epochs: .*did you mean TRAIN.num_epoch\?"),
        (["DATASET.imgSizes", "()"], "DATASET.imgSizes"),
        (["DATASET.imgMaxSize", "100"], "DATASET.imgMaxSize 100 .*DATASET.imgSizes"),
        (["DATASET.classes", "['a', 'b']"], "DATASET.classes .*2 .*DATASET.num_class is 150"),
        (["DATASET.ignore_values", "[255]"], "DATASET.ignore_values .*DATASET.classes"),
        (["DATASET.random_scale", "(2, 0.5)"], "DATASET.random_scale"),
        (["TRAIN.start_epoch", "2", "TRAIN.resume", "auto"], "TRAIN.start_epoch and TRAIN.resume"),
        (["TRAIN.visualize", "True"], "TRAIN.visualize .*TRAIN.eval_epoch"),
        (["TRAIN.class_weights", "(1, 2)"], r"TRAIN.class_weights .*2 .*DATASET\.num_class is 150"),
        (["TRAIN.label_smoothing", "0.1", "TRAIN.loss", "dice"], "TRAIN.label_smoothing 0.1 .*TRAIN.loss"),
        (["TRAIN.ohem_min_kept", "5"], "TRAIN.ohem_min_kept 5 .*TRAIN.loss ohem"),
        (["MODEL.reset_classifier", "True"], "MODEL.reset_classifier .*MODEL.weights_decoder"),
        (["MODEL.output_stride", "4"], "MODEL.output_stride 4 .*hrnetv2"),
        (["MODEL.arch_encoder", "vgg16_dilated8", "MODEL.output_stride", "16"], "MODEL.output_stride 16: vgg16"),
        (["MODEL.norm", "inplace", "TRAIN.amp", "bf16"], "MODEL.norm inplace .*TRAIN.amp"),
        (["INFERENCE.window_size", "8"], "INFERENCE.window_size 8.* 32"),
        (["INFERENCE.window_overlap", "0.5"], r"INFERENCE.window_overlap 0.5 .*INFERENCE\.window_size"),
    ],
)
def test_wrong_values_and_conflicts_name_the_options(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, opts)


def test_values_are_converted_to_the_type_of_the_option(tmp_path):
    path = write(tmp_path / "a.yaml", "TRAIN: {lr_encoder: 1e-4, num_epoch: 1e1, resume: off, amp: OFF}\nVAL:\n")
    train = load_config(path, ["TRAIN.lr_decoder", "1", "TRAIN.fix_bn", "true"]).TRAIN
    assert (train.lr_encoder, train.num_epoch, train.resume, train.amp) == (1e-4, 10, "off", "off")
    assert (repr(train.lr_decoder), train.fix_bn) == ("1.0", True)
    opts = ["TRAIN.num_epoch=3", "DIR=a=b", "TRAIN.epoch_iters", "7", "TEST.result", "x=y"]
    config = load_config(None, opts)
    assert (config.TRAIN.num_epoch, config.DIR, config.TRAIN.epoch_iters, config.TEST.result) == (3, "a=b", 7, "x=y")


@pytest.mark.parametrize(
    "text",
    [
        "TRAIN: {seed: " + 5000 * "1" + "}",
        "DIR: " + 3000 * "[",
        '_BASE_: "a\\0b"',
        "VAL: &x [*x]",
        "DIR: !!python/object/apply:os.system ['touch /tmp/mit_semseg_must_not_exist']",
    ],
    ids=lambda text: text[:24],
)
def test_invalid_yaml_is_a_config_error_and_creates_no_objects(tmp_path, text):
    with pytest.raises(ConfigError, match=r"c\.yaml|a.b: cannot be read as YAML"):
        load_config(write(tmp_path / "c.yaml", text))
    assert not Path("/tmp/mit_semseg_must_not_exist").exists()


def test_text_options_keep_words_that_yaml_would_convert(tmp_path):
    text = """
DIR: 2024-31-12
DATASET: {num_class: 6, classes: [no, yes, 010, 2024-01-02, ~, 'on']}
VAL: {checkpoint: 1e3}
"""
    words = ("no", "yes", "010", "2024-01-02", "~", "on")
    config = load_config(write(tmp_path / "a.yaml", text))
    assert (config.DIR, config.DATASET.classes, config.VAL.checkpoint) == ("2024-31-12", words, "1e3")
    assert load_config(write(tmp_path / "dumped.yaml", config.dump())) == config
    for value in ("[no, yes, 010, 2024-01-02, ~, on]", str(words)):
        assert load_config(None, ["DATASET.classes", value, "DATASET.num_class", "6"]).DATASET.classes == words


def test_paths_expand_home_and_environment_variables(tmp_path, monkeypatch):
    paths = [key for key, option in OPTIONS.items() if option.path]
    assert {"DIR", "DATASET.root_dataset", "TEST.result", "MODEL.weights_encoder", "DATASET.classes"} <= set(paths)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "base.yaml", "TRAIN: {seed: 5}")
    write(tmp_path / "a.yaml", "_BASE_: ~/base.yaml")
    config = load_config(
        "~/a.yaml", ["MODEL.reset_classifier", "True", *(word for key in paths for word in (key, "${HOME}/$UNSET_x"))]
    )
    assert config.TRAIN.seed == 5
    assert {get(config, key) for key in paths} == {str(tmp_path / "$UNSET_x")}  # $UNSET_x has no value
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    assert load_config(None, ["DIR", "$HOME"]).DIR == "$HOME"  # an existing path is not expanded


def test_base_files_are_merged_first(tmp_path):
    write(tmp_path / "base.yaml", "TRAIN: {num_epoch: 3, seed: 5}\nDIR: a")
    write(tmp_path / "middle.yaml", "_BASE_: base.yaml\nTRAIN: {seed: 6}")
    config = load_config(write(tmp_path / "top.yaml", "_BASE_: middle.yaml\nDIR: b"))
    assert (config.TRAIN.num_epoch, config.TRAIN.seed, config.DIR) == (3, 6, "b")
    write(tmp_path / "base.yaml", "_BASE_: top.yaml")
    with pytest.raises(ConfigError, match=r"top.yaml -> middle.yaml -> base.yaml -> top.yaml"):
        load_config(tmp_path / "top.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(write(tmp_path / "lost.yaml", "_BASE_: nowhere.yaml"))


def test_missing_file_suggests_the_closest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"did you mean config/quickstart\.yaml"):
        load_config("quikstart.yaml")


def test_unquoted_file_pattern_is_recognized(tmp_path):
    files = [str(write(tmp_path / name, "")) for name in ("a.jpg", "b.jpg")]
    with pytest.raises(ConfigError, match=r"a\.jpg, .*b\.jpg .*\*\.jpg"):
        load_config(None, files)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_shipped_file_is_valid(path):
    config, text = load_config(path), path.read_text()
    assert f"--cfg config/{path.name}" in text
    stem = path.stem.removesuffix("-2026")
    name = {"ade20k-hrnetv2": "ade20k-hrnetv2-c1"}.get(stem, stem)  # the name of this file in version 2
    if path.name.startswith("ade20k-"):
        encoder = config.MODEL.arch_encoder.replace(":", "-").partition(".")[0]  # without the tag of timm's weights
        assert name == f"ade20k-{encoder}-{config.MODEL.arch_decoder}"
        rate = 1 if "bilinear" in path.name else 8 if "dilated" in path.name else 4
        assert config.DATASET.segm_downsampling_rate == rate
    # The best checkpoint is evaluated, or the last one if training does not validate.
    expected = "best.pth" if config.TRAIN.eval_epoch else f"epoch_{config.TRAIN.num_epoch}.pth"
    assert config.VAL.checkpoint == config.TEST.checkpoint == expected
    # Other programs read these values with `yaml.safe_load`, so the file itself must contain them.
    plain = yaml.safe_load(text)
    for key in ("DIR", "DATASET.num_class", "MODEL.fc_dim", "VAL.checkpoint", "TEST.checkpoint"):
        assert get(plain, key) == get(config, key), key
    encoder = ModelBuilder.build_encoder(config.MODEL.arch_encoder, pretrained=False)
    assert encoder.out_channels[-1] == config.MODEL.fc_dim


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)) | st.text(max_size=12), VALUES, max_size=4))
def test_any_value_is_accepted_with_the_right_type_or_raises_config_error(changes):
    config = cfg.clone()
    with suppress(ConfigError):
        config.merge_from_list([part for item in changes.items() for part in item])
    for key, option in OPTIONS.items():
        assert isinstance(get(config, key), option.types)
