"""Compare floating-point results that depend on the order of operations."""

import torch


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    """Check that the largest error is at most `relative` times the largest absolute value.

    float32 results of networks have relative errors of up to 1e-5; the default allows ten times as much.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * largest, f"the relative error is {error / largest:.2g}, expected at most {relative:g}"
