"""Scaling, padding and label sampling are the same as in the training of the published weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from golden import sample
from shared_data import shared

from mit_semseg.dataset import TestDataset, TrainDataset, ValDataset
from mit_semseg.dataset.transforms import round_up


def gold():
    return json.loads(shared("parity/data/golden_data.json").read_text())


def check(tensor, expected):
    assert list(tensor.shape) == expected["shape"]
    # JPEG decoders differ by one level, which is 1 / 255 / 0.224 = 0.0175 after normalization.
    np.testing.assert_allclose(sample(tensor, 64), expected["values"], rtol=0, atol=0.02)
    if "mean" in expected:
        assert tensor.double().mean().item() == pytest.approx(expected["mean"], abs=1e-3)


def histogram(label):
    values, counts = np.unique(label.numpy(), return_counts=True)
    return dict(zip(map(str, values), counts, strict=True))


def test_training_batches_match_the_golden_values():
    for case in gold()["train"]:
        opt = SimpleNamespace(**case["opt"])
        root = shared("parity/data")
        dataset = TrainDataset(root, root / "golden.odgt", opt, batch_per_gpu=case["batch_per_gpu"])
        assert len(dataset) == case["len"]
        records = {record["fpath_img"]: record for record in dataset.records}
        assert case["batches"]
        for drawn in case["batches"]:
            batch = dataset.load_batch([records[f] for f in drawn["files"]], drawn["short_size"], drawn["flips"])
            check(batch["img_data"], drawn["img"])
            assert list(batch["seg_label"].shape) == drawn["label"]["shape"]
            # The original code pads with class 0, this package with the ignore index; all other pixels are equal.
            ours, theirs = histogram(batch["seg_label"]), drawn["label"]["hist"]
            assert {k: v for k, v in ours.items() if k not in "-10"} == {
                k: v for k, v in theirs.items() if k not in "-10"
            }
            assert ours.get("-1", 0) + ours.get("0", 0) == theirs.get("-1", 0) + theirs.get("0", 0)
            values = np.array(drawn["label"]["values"])
            mine = sample(batch["seg_label"], 64)
            assert np.array_equal(mine[values > 0], values[values > 0])
            assert set(mine[values == 0]) <= {0, -1}


@pytest.mark.parametrize("kind", ["val", "test"])
def test_evaluation_items_match_the_golden_values(kind):
    for case in gold()[kind]:
        root, opt = shared("parity/data"), SimpleNamespace(**case["opt"])
        lines = [json.loads(line) for line in (root / "golden.odgt").read_text().splitlines()]
        if kind == "val":
            dataset = ValDataset(root, root / "golden.odgt", opt)
        else:
            dataset = TestDataset([{"fpath_img": str(root / line["fpath_img"])} for line in lines], opt)
        assert len(dataset) == case["len"] == len(case["items"])
        for i, expected in enumerate(case["items"]):
            item = dataset[i]
            assert item["info"].endswith(expected["info"])
            if kind == "val":
                assert histogram(item["seg_label"]) == expected["label"]["hist"]
                assert np.array_equal(sample(item["seg_label"], 64), expected["label"]["values"])
                for tensor, numbers in zip(item["img_data"], expected["img_data"], strict=True):
                    check(tensor, numbers)
            else:
                assert sorted(item) == expected["keys"]
                assert [list(x.shape) for x in item["img_data"]] == expected["shapes"]


def test_slices_of_the_list_match_the_golden_values():
    root = shared("parity/data")
    opt = SimpleNamespace(imgSizes=[300], imgMaxSize=1000, padding_constant=8)
    dataset = ValDataset(root, root / "golden.odgt", opt, max_sample=4, start_idx=1, end_idx=3)
    assert [record["fpath_img"] for record in dataset.records] == gold()["val_slice_max4_1_3"]


def test_rounding_matches_the_golden_values():
    for x, multiple, expected in gold()["round2nearest_multiple"]:
        assert round_up(x, multiple) == expected
