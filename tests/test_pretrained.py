"""Downloads of published and ImageNet weights from a local server."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pooch
import pytest
import torch
from near import assert_near
from PIL import Image
from runs import ROOT, here
from torch import nn

from mit_semseg.models import ModelBuilder, pretrained
from mit_semseg.models.pretrained import cache_dir, download, download_published
from mit_semseg.models.weight_files import WeightsError

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


def test_torchvision_vgg_is_converted_to_convolutions():
    theirs = {f"features.{i}.weight": torch.full((1,), float(i)) for i in (0, 24)}
    theirs |= {"classifier.0.weight": torch.randn(2, 512 * 49), "classifier.0.bias": torch.randn(2)}
    theirs |= {"classifier.3.weight": torch.randn(3, 4096), "classifier.3.bias": torch.randn(3)}
    ours = pretrained.convert_torchvision_vgg(theirs, ["features.0.weight", "features.23.weight", "conv6.weight"])
    assert ours["features.23.weight"].item() == 24
    x = torch.randn(1, 512, 7, 7)
    convolved = nn.functional.conv2d(x, ours["conv6.weight"], ours["conv6.bias"]).flatten()
    assert_near(
        convolved, nn.functional.linear(x.flatten(), theirs["classifier.0.weight"], theirs["classifier.0.bias"])
    )
    assert ours["conv7.weight"].shape == (3, 4096, 1, 1)


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
