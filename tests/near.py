"""Comparing floating-point results that are computed in another order."""

import torch


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    """Check that no value is off by more than a part of the largest one.

    Sums of many terms are rounded relative to their terms, not to themselves: a small result of large terms may be all
    rounding, and another processor, number of threads or version of a library rounds otherwise. Of float32, whose
    rounding is 6e-8, networks keep 1e-6 to 1e-5; the default leaves room of ten.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    worst, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert worst <= relative * largest, f"off by {worst / largest:.2g} of the largest value, {relative:g} is allowed"
