"""Compare floating-point results that depend on the order of operations."""

import torch


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    """Check that the largest error is at most a fraction of the largest value.

    float32 results of networks are accurate to 1e-6 to 1e-5; the default leaves a margin of 10.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * largest, f"relative error {error / largest:.2g}, at most {relative:g} allowed"
