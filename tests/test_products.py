"""Attention by products, against torch's own for each sequence."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from toolkit.model import products

HEADS, UNITS = 4, 8
LENGTHS = {
    "alike": [16, 16, 32],
    "a window reaches over its neighbours": [5, 40, 17, 31, 3],
    "one token each": [1, 1, 1, 61],
    "empty ones": [20, 0, 0, 28],
    "shorter than a window": [3, 4],
    "one": [48],
}


def make_joint(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return queries, keys and values that want a gradient, and the bounds of these sequences."""
    dice = torch.Generator().manual_seed(len(lengths))
    joint = torch.randn(sum(lengths), 3, HEADS, UNITS, generator=dice).to(dtype)
    return joint.requires_grad_(), torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def attend_with_torch(joint: Tensor, bounds: Tensor) -> Tensor:
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        query, key, value = (part.transpose(0, 1)[None] for part in joint[start:end].unbind(1))
        attended = functional.scaled_dot_product_attention(query, key, value, scale=0.3)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_results_and_gradients(lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    joint, bounds = make_joint(lengths, dtype)
    exact = joint.detach().float().requires_grad_()
    expected = attend_with_torch(exact, bounds)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(gradient)
    found = products.attend(joint, bounds, 0.3)
    found.backward(gradient.to(dtype))
    assert found.dtype == dtype
    assert relative(found, expected) < tolerance
    assert exact.grad is not None
    assert relative(joint.grad, exact.grad) < tolerance


def test_scores_are_fp32_in_bf16() -> None:
    """They would be wrong by 0.1 here, and weights by a tenth."""
    joint, bounds = make_joint([24, 40, 9], torch.float32)
    with torch.no_grad():
        joint[:, 0] *= 20
    rounded = joint.detach().bfloat16().requires_grad_()
    expected = attend_with_torch(rounded.detach().float(), bounds)
    assert relative(products.attend(rounded, bounds, 0.3), expected) < 4e-3


def test_autocast_leaves_scores_in_fp32() -> None:
    joint, bounds = make_joint([24, 40], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = products.attend(joint, bounds, 0.3)
    assert relative(found, attend_with_torch(joint, bounds)) < 2e-6


def test_sizes_of_products_are_few() -> None:
    """Whatever the lengths and wherever a sequence lies, also at the end of a pack."""
    lengths = [*range(1, 257), *range(256, 0, -1)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    found = products.windows(bounds, int(bounds[-1]))
    assert len(found) == 512
    assert {window.tokens.stop - window.tokens.start for window in found} == set(range(16, 257, 16))
    for sequence, tokens, inside in found:
        assert tokens.stop <= bounds[-1]
        assert tokens.start + inside.start == sequence.start
        assert tokens.start + inside.stop == sequence.stop


def test_tokens_of_no_sequence_are_refused() -> None:
    joint, bounds = make_joint([4, 4], torch.float32)
    with pytest.raises(AssertionError, match="each token"):
        products.attend(joint, bounds[:2], 0.3)
