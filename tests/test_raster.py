"""Large, tiled and georeferenced images are segmented window by window."""

import subprocess
import sys

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from runs import ROOT, here, small
from scenes import options, tiny_module, write_data_set

from mit_semseg import Segmenter
from mit_semseg.dataset import TestDataset, class_table, rasters
from mit_semseg.dataset.image_io import ImageFileError, read_image
from mit_semseg.evaluation import InferenceOptions, Predictor
from mit_semseg.lib.utils import UserError
from mit_semseg.predict.raster import is_raster
from mit_semseg.predict.results import is_output_file

TRANSFORM = from_origin(500_000, 5_200_000, 0.5, 0.5)


def write_tiff(path, pixels, *, tiled=True, geo=True, **profile):
    """Write pixels (H, W, C) to a TIFF file."""
    height, width, channels = pixels.shape
    profile |= {"driver": "GTiff", "height": height, "width": width, "count": channels, "dtype": pixels.dtype}
    profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64} if tiled else {}
    profile |= {"crs": "EPSG:32632", "transform": TRANSFORM} if geo else {}
    with rasterio.open(path, "w", **profile) as target:
        target.write(np.moveaxis(pixels, -1, 0))
    return path


def random_pixels(height, width, channels=3, seed=0):
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 16), -(-width // 16), channels), np.uint8)
    return blocks.repeat(16, 0).repeat(16, 1)[:height, :width]


def segmenter(window=(48, 64), classes=3, **changes):
    module, table = tiny_module(classes), class_table("", classes)
    inference = InferenceOptions(window_size=window, window_overlap=0.25)
    return Segmenter(module, table, options(num_class=classes, **changes), inference=inference)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("size", [(96, 160), (93, 157), (20, 30), (510, 40)])
def test_result_equals_a_sliding_window_over_the_whole_image(tmp_path, size):
    multiple = 24 if size[0] == 510 else 8  # the rows 512 to 528 contain only padding
    pixels, net = random_pixels(*size), segmenter(padding_constant=multiple)
    write_tiff(tmp_path / "a.tif", pixels)
    paths = net.segment_raster(tmp_path / "a.tif", tmp_path / "a", ("_index.tif", "_confidence.tif"))
    index, confidence = (rasterio.open(path).read(1) for path in paths)
    padded = np.zeros([-(-side // multiple) * multiple for side in size] + [3], np.uint8)
    padded[: size[0], : size[1]] = pixels
    dataset = TestDataset([], options(imgSizes=(min(padded.shape[:2]),), imgMaxSize=1000))
    item = dataset.multi_scale(Image.fromarray(padded))
    item["img_data"][0][..., size[0] :, :] = 0  # the padding is zero after normalization
    item["img_data"][0][..., size[1] :] = 0
    predictor = Predictor(tiny_module(), "cpu", InferenceOptions(window_size=(48, 64), window_overlap=0.25))
    (expected,) = predictor.predict([item], confidence=True)
    inside = slice(0, size[0]), slice(0, size[1])
    assert np.array_equal(index, expected.label_map.numpy()[inside])
    assert np.array_equal(confidence, (expected.confidence[inside] * 255).round().byte().numpy())


def test_georeference_colors_and_missing_pixels_are_kept(tmp_path):
    pixels = random_pixels(100, 120).clip(1)
    pixels[:10, :30] = 0
    write_tiff(tmp_path / "a.tif", pixels, nodata=0)
    net = segmenter()
    suffixes = "_index.tif", "_label.tif", "_confidence.tif"
    index, label, confidence = map(rasterio.open, net.segment_raster(tmp_path / "a.tif", tmp_path / "a", suffixes))
    for result in (index, label, confidence):
        assert (result.crs, result.transform) == (rasterio.CRS.from_epsg(32632), TRANSFORM)
        assert not result.read_masks(1)[:10, :30].any()
    assert index.read_masks(1)[10:].all()
    assert index.colormap(1)[1] == (*net.table.colors[1].tolist(), 255)
    assert np.array_equal(label.read(1)[10:], index.read(1)[10:] + 1)
    assert (index.read(1)[:10, :30] == 255).all()


def test_palette_colors_and_ground_control_points_are_kept(tmp_path):
    pixels = random_pixels(64, 64)
    image = Image.fromarray(pixels).quantize(16, dither=Image.Dither.NONE)
    palette = {i: tuple(image.getpalette()[3 * i : 3 * i + 3]) for i in range(16)}
    points = [rasterio.control.GroundControlPoint(r, c, 500 + c, 900 - r) for r, c in ((0, 0), (0, 60), (60, 0))]
    with rasterio.open(
        tmp_path / "p.tif", "w", driver="GTiff", height=64, width=64, count=1, dtype="uint8", photometric="palette"
    ) as target:
        target.write(np.asarray(image), 1)
        target.write_colormap(1, palette)
        target.gcps = points, rasterio.CRS.from_epsg(32632)
    write_tiff(tmp_path / "rgb.tif", np.asarray(image.convert("RGB")))
    net = segmenter()
    first, second = (net.segment_raster(tmp_path / f"{name}.tif", tmp_path / name)[0] for name in ("p", "rgb"))
    with rasterio.open(first) as result:
        assert np.array_equal(result.read(1), rasterio.open(second).read(1))
        assert [(point.x, point.y) for point in result.gcps[0]] == [(point.x, point.y) for point in points]
    assert is_raster(tmp_path / "p.tif")


def test_results_are_recognized_at_any_size(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", random_pixels(64, 64))
    (path,) = segmenter().segment_raster(tmp_path / "a.tif", tmp_path / "a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert is_output_file(path)
    assert not is_output_file(tmp_path / "a.tif")
    segmenter().segment_raster(tmp_path / "a.tif", tmp_path / "a")
    write_tiff(tmp_path / "a_index.tif", random_pixels(64, 64))
    with pytest.raises(UserError, match=r"a_index\.tif"):
        segmenter().segment_raster(tmp_path / "a.tif", tmp_path / "a")


def test_minimum_confidence_writes_the_ignored_value(tmp_path):
    write_tiff(tmp_path / "a.tif", random_pixels(64, 64))
    net, suffixes = segmenter(), ("_label.tif", "_confidence.tif")
    net.segment_raster(tmp_path / "a.tif", tmp_path / "a", suffixes)
    limit = (int(np.median(rasterio.open(tmp_path / "a_confidence.tif").read(1))) + 0.5) / 255
    paths = net.segment_raster(tmp_path / "a.tif", tmp_path / "a", suffixes, min_confidence=limit)
    label, confidence = (rasterio.open(path).read(1) for path in paths)
    assert np.array_equal(label == 0, confidence < limit * 255)
    assert 0 < (label == 0).sum() < label.size


def test_minimum_confidence_is_compared_before_rounding(tmp_path):
    write_tiff(tmp_path / "a.tif", random_pixels(64, 64))
    module = tiny_module(3)
    torch.nn.init.zeros_(module.decoder.conv_last.weight)
    module.decoder.conv_last.bias.data[:] = torch.tensor([0, 7.0, 0])  # confidence 0.9982, which rounds to 255 of 255
    net = Segmenter(module, class_table("", 3), options(), inference=InferenceOptions(window_size=(48, 64)))
    for limit, ignored in ((0.998, False), (0.999, True)):
        (path,) = net.segment_raster(tmp_path / "a.tif", tmp_path / "a", ("_label.tif",), min_confidence=limit)
        assert (rasterio.open(path).read(1) == 0).all() == ignored


def test_tiled_and_georeferenced_files_and_files_above_the_limit_are_rasters(tmp_path, monkeypatch):
    pixels = random_pixels(128, 128)
    Image.fromarray(pixels).save(tmp_path / "plain.tif")
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert is_raster(write_tiff(tmp_path / "tiled.tif", pixels, geo=False))
    assert is_raster(write_tiff(tmp_path / "geo.tif", pixels, tiled=False))
    bands = random_pixels(128, 128, 13)
    assert is_raster(write_tiff(tmp_path / "tiled_bands.tif", bands, geo=False))
    assert not is_raster(write_tiff(tmp_path / "bands.tif", bands, tiled=False, geo=False))
    for name in ("plain.tif", "image.png", "broken.png", "missing.tif"):
        assert not is_raster(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert is_raster(tmp_path / "image.png")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert not is_raster(tmp_path / "image.png")
    rasters._rasterio.cache_clear()
    with pytest.raises(UserError, match="rasterio"):
        segmenter().segment_raster(tmp_path / "image.png", tmp_path / "a")


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_pixels_equal_those_of_other_readers(tmp_path, dtype, photometric):
    pixels = random_pixels(64, 64, 1).astype(dtype) * (1 if dtype == np.uint8 else 257)
    path = write_tiff(tmp_path / "a.tif", pixels, photometric=photometric)
    with rasters.open_raster(path) as raster:
        assert np.array_equal(raster.read_rgb(slice(None), slice(None)), np.asarray(read_image(path)))


def test_orientation_is_applied_or_refused(tmp_path, monkeypatch):
    pixels, exif = random_pixels(64, 96), Image.Exif()
    exif[274] = 6
    path = write_tiff(tmp_path / "a.tif", pixels)
    with Image.open(path) as image:
        image.save(tmp_path / "turned.tif", tiffinfo={**dict(image.tag_v2), 274: 6})
    assert not is_raster(tmp_path / "turned.tif")
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert is_raster(tmp_path / "turned.jpg")
    with pytest.raises(ImageFileError, match=r"turned\.jpg.*orientation"):
        segmenter().segment_raster(tmp_path / "turned.jpg", tmp_path / "a")


def test_damaged_files_and_other_types_of_pixels_are_errors(tmp_path):
    write_tiff(tmp_path / "a.tif", random_pixels(64, 64).astype(np.uint16))
    with pytest.raises(ImageFileError, match=r"a\.tif.*DATASET\.mean"):
        segmenter().segment_raster(tmp_path / "a.tif", tmp_path / "a")
    assert not list(tmp_path.glob("a_*"))
    path = write_tiff(tmp_path / "b.tif", random_pixels(256, 256), compress="deflate")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ImageFileError, match=r"b\.tif"):
        segmenter().segment_raster(path, tmp_path / "b")
    assert not list(tmp_path.glob("b_*"))


def test_script_segments_rasters_and_images_of_a_folder(tmp_path):
    run = small(write_data_set(tmp_path / "data"), tmp_path / "run", TRAIN__num_epoch=1)
    run |= {"TEST.checkpoint": "epoch_1.pth", "TEST.result": tmp_path / "out", "INFERENCE.window_size": 64}
    here("train.py", run)
    folder = tmp_path / "images"
    folder.mkdir()
    write_tiff(folder / "map.tif", random_pixels(100, 90))
    write_tiff(folder / "damaged.tif", random_pixels(256, 256), compress="deflate")
    (folder / "damaged.tif").write_bytes((folder / "damaged.tif").read_bytes()[:-3000])
    Image.fromarray(random_pixels(40, 50)).save(folder / "photo.png")
    done = here("test.py", "--imgs", folder, "--index", run, code=1)
    assert "2 of 3 images segmented" in done.stdout
    assert "damaged.tif" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"map_index.tif", "photo.png", "photo_index.png"}
    assert "1 of 1" in here("test.py", "--imgs", folder / "map.tif", run).stdout  # overwrites its own file
    write_tiff(tmp_path / "out" / "map_index.tif", random_pixels(32, 32))
    assert "map_index.tif" in here("test.py", "--imgs", folder / "map.tif", run, code=2).stderr


@pytest.mark.long
def test_memory_does_not_grow_with_the_height(tmp_path):
    """Segment images of 2,000 and of 16,000 rows; compare the peak memory of the processes."""
    peaks = []
    for height in (2_000, 16_000):
        write_tiff(tmp_path / "a.tif", random_pixels(height, 2_000), compress="deflate")
        program = (
            "import resource, torch; from test_raster import segmenter; torch.set_num_threads(2);"
            f"segmenter((256, 256)).segment_raster({str(tmp_path / 'a.tif')!r}, {str(tmp_path / 'a')!r});"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT / "tests", capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 150, peaks  # the pixels of the larger image alone take 96 MB more
