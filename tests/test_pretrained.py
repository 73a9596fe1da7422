"""Downloads of published and ImageNet weights from a local server."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pooch
import pytest
import torch
from near import assert_near
from PIL import Image
from runs import ROOT, here
from torch import nn

from mit_semseg.models import ModelBuilder, pretrained
from mit_semseg.models.pretrained import cache_dir, download, download_published
from mit_semseg.models.utils import load_url
from mit_semseg.models.weight_files import WeightsError

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def served(site):
    (site.folder / "a.bin").write_bytes(CONTENT)
    return site


@pytest.mark.parametrize("sha256", ["", DIGEST, DIGEST[:8].upper()])
def test_file_is_downloaded_once(served, tmp_path, sha256, capfd):
    path, level = tmp_path / "new" / "a.bin", pooch.get_logger().level
    for _ in range(2):
        assert download(f"{served.address}/a.bin", path, sha256=sha256) == path
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert path.stat().st_mode & 0o044 == 0o044  # readable for other users
    assert len(served.requests) == 1
    assert capfd.readouterr() == ("", "")
    assert pooch.get_logger().level == level


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("truncated", "IncompleteRead"), ("wrong hash", DIGEST), ("not found", "404"), ("server down", "refused")],
)
def test_failed_download_leaves_no_file(served, tmp_path, failure, reason):
    url, sha256 = f"{served.address}/a.bin", ""
    if failure == "truncated":
        served.truncate["/a.bin"] = 1000
    elif failure == "wrong hash":
        sha256 = "00ff"
    elif failure == "not found":
        (served.folder / "a.bin").unlink()
    else:
        url = "http://127.0.0.1:9/a.bin"
    path = tmp_path / "new" / "a.bin"
    with pytest.raises(WeightsError, match=rf"(?i){url} .*({reason}).*{path.parent}.*MIT_SEMSEG_MIRROR") as error:
        download(url, path, sha256=sha256)
    assert "\n" not in str(error.value)
    assert not [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")]
    served.truncate.clear()
    (served.folder / "a.bin").write_bytes(CONTENT)
    assert download(f"{served.address}/a.bin", path, sha256=DIGEST).read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_concurrent_downloads_fetch_the_file_once(served, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(f"{served.address}/a.bin", tmp_path / "a.bin"), range(4)))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(served.requests) == 1


@pytest.mark.parametrize(
    ("url", "tried"),
    [
        ("http://host/a.bin", ["https://host/a.bin", "http://host/a.bin"]),
        ("http://host:8080/a.bin", ["http://host:8080/a.bin"]),
        ("https://host/a.bin", ["https://host/a.bin"]),
    ],
)
def test_https_is_tried_before_http(tmp_path, monkeypatch, caplog, url, tried):
    """A file from an unencrypted connection without known hash is reported."""
    requested = []

    def get(self, url, output, _):
        requested.append(url)
        if url.startswith("https:"):
            raise ValueError("certificate expired")
        Path(output).write_bytes(CONTENT)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", get)
    if url.startswith("https:"):
        with pytest.raises(WeightsError, match="certificate expired"):
            download(url, tmp_path / "a.bin")
    else:
        download(url, tmp_path / "a.bin")
        download(url, tmp_path / "b.bin", sha256=DIGEST)
        assert [record.args[0] for record in caplog.records if record.levelname == "WARNING"] == [url]
    assert requested[: len(tried)] == tried


def test_cache_folder(monkeypatch, tmp_path):
    """Also for a user without home directory."""
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MIT_SEMSEG_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mit_semseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", mock.Mock(side_effect=RuntimeError))
    assert cache_dir() == Path(tempfile.gettempdir(), "mit_semseg")


def test_load_url(site, tmp_path):
    torch.save({"weight": torch.ones(2)}, site.folder / "a.pth")
    for _ in range(2):
        assert load_url(f"{site.address}/a.pth", tmp_path / "files", "cpu")["weight"].tolist() == [1, 1]
    assert len(site.requests) == 1


def test_imagenet_weights_come_from_the_mirror_then_from_the_cache(site, tmp_path):
    source = ModelBuilder.build_encoder("resnet18", pretrained=False)
    state = {**source.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    (site.folder / "model" / "pretrained_resnet").mkdir()
    torch.save(state, site.folder / "model" / "pretrained_resnet" / "resnet18-imagenet.pth")
    encoder = ModelBuilder.build_encoder("resnet18dilated", weights="")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), source.parameters(), strict=True))
    assert (tmp_path / "cache" / "resnet18-imagenet.pth").is_file()
    report = pretrained.load_imagenet_weights(encoder, "resnet18dilated")
    assert report.unexpected == ["fc.weight", "fc.bias"]
    assert len(site.requests) == 1


def test_torchvision_vgg_is_converted_to_convolutions():
    theirs = {f"features.{i}.weight": torch.full((1,), float(i)) for i in (0, 2, 5, 24)}
    theirs |= {"classifier.0.weight": torch.randn(2, 512 * 49), "classifier.0.bias": torch.randn(2)}
    theirs |= {"classifier.3.weight": torch.randn(3, 4096), "classifier.3.bias": torch.randn(3)}
    own = ["features.0.weight", "features.2.weight", "features.5.weight", "features.23.weight", "conv6.weight"]
    ours = pretrained.convert_torchvision_vgg(theirs, own)
    assert [ours[key].item() for key in own[:4]] == [0, 2, 5, 24]
    x = torch.randn(1, 512, 7, 7)
    convolved = nn.functional.conv2d(x, ours["conv6.weight"], ours["conv6.bias"]).flatten()
    connected = nn.functional.linear(x.flatten(), theirs["classifier.0.weight"], theirs["classifier.0.bias"])
    assert_near(convolved, connected)
    assert ours["conv7.weight"].shape == (3, 4096, 1, 1)


def test_error_without_imagenet_weights_names_the_options(monkeypatch, tmp_path):
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("MIT_SEMSEG_HOME", str(tmp_path))
    options = r"MODEL\.weights_encoder.*MODEL\.pretrained False.*pretrained=False"
    with pytest.raises(WeightsError, match=rf"{options}.*{tmp_path}.*MIT_SEMSEG_MIRROR"):
        ModelBuilder.build_encoder("resnet50dilated", weights="")
    with pytest.raises(WeightsError, match=rf"resnet34dilated: .*{options}"):
        ModelBuilder.build_encoder("resnet34dilated")


def test_published_model_is_downloaded_to_the_cache_or_a_folder(site, tmp_path):
    name = "ade20k-resnet50-upernet"
    (site.folder / "model" / "pytorch" / name).mkdir(parents=True)
    for part in ("encoder", "decoder"):
        (site.folder / "model" / "pytorch" / name / f"{part}_epoch_30.pth").write_bytes(CONTENT)
    for folder, expected in ((None, tmp_path / "cache" / name), (tmp_path / "ckpt", tmp_path / "ckpt")):
        paths = download_published(name, folder)
        assert paths == (expected / "encoder_epoch_30.pth", expected / "decoder_epoch_30.pth")
        assert all(path.is_file() for path in paths)
    with pytest.raises(WeightsError, match=r"'ade20k-x'.*ade20k-mobilenetv2dilated"):
        download_published("ade20k-x")


@pytest.mark.parametrize(
    ("name", "digest"), [("resnet18dilated-ppm_deepsup", "adcdcbf7530e"), ("mobilenetv2dilated-c1_deepsup", "f9271676")]
)
def test_published_model_with_the_wrong_hash_is_refused(site, tmp_path, name, digest):
    folder = site.folder / "model" / "pytorch" / f"ade20k-{name}"
    folder.mkdir(parents=True)
    (folder / "encoder_epoch_20.pth").write_bytes(CONTENT)
    with pytest.raises(WeightsError, match=rf"encoder_epoch_20\.pth.*{digest}"):
        download_published(f"ade20k-{name}", tmp_path / "ckpt")
    assert not list((tmp_path / "ckpt").glob("*.pth"))


def test_script_downloads_a_published_model_to_its_folder(site, tmp_path, monkeypatch):
    name = "ade20k-mobilenetv2dilated-c1_deepsup"
    source = site.folder / "model" / "pytorch" / name
    source.mkdir(parents=True)
    monkeypatch.setattr(pretrained, "SHA256", {})
    encoder = ModelBuilder.build_encoder("mobilenetv2dilated", pretrained=False)
    decoder = ModelBuilder.build_decoder("c1_deepsup", fc_dim=320)
    for part, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module.state_dict(), source / f"{part}_epoch_20.pth")
    Image.new("RGB", (64, 48), "teal").save(tmp_path / "a.png")
    words = ["--cfg", ROOT / "config" / f"{name}.yaml", "--gpu", "cpu", "DATASET.imgSizes", "(40,)"]
    words = ["--imgs", tmp_path / "a.png", *words, "TEST.result", tmp_path / "out", "DIR"]
    for requests in (2, 2):  # the second run does not download
        done = here("test.py", *words, tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert len(site.requests) == requests
    assert (tmp_path / name / "decoder_epoch_20.pth").is_file()
    done = here("test.py", *words, tmp_path / "other")  # not the name of a published model
    assert done.returncode == 2
    assert "encoder_epoch_20.pth" in done.stderr
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", "http://127.0.0.1:9")
    for part in ("encoder", "decoder"):
        (tmp_path / name / f"{part}_epoch_20.pth").unlink()
    done = here("test.py", *words, tmp_path / name)
    assert done.returncode == 2
    for text in ("MIT_SEMSEG_MIRROR", "encoder_epoch_20.pth", str(tmp_path / name)):
        assert text in done.stderr
