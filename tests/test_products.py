"""Attention by products, against torch's own for each sequence."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from toolkit.model import products

HEADS, UNITS = 4, 8
LENGTHS = {
    "without filling": [32, 32, 64],
    "with filling": [5, 40, 17, 31, 3],
    "more than a group": [20, 31, 1, 40, 19, 18, 17, 32, 30, 16, 11],
    "one token each": [1, 1, 1, 61],
    "empty ones": [20, 0, 0, 28],
    "narrower than any width": [3, 4],
    "one": [48],
    "many short ones": [*range(3, 33), *range(33, 50)],
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


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_without_a_backward_pass(lengths: list[int]) -> None:
    """Through torch's attention, whether or not this CPU has tiles."""
    joint, bounds = make_joint(lengths, torch.bfloat16)
    with torch.no_grad():
        found = products.without_weights(joint, bounds, 0.3)
        expected = attend_with_torch(joint.float(), bounds)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 1e-2


@pytest.mark.parametrize(
    ("tiles", "dtype", "trains", "expected"),
    [
        (True, torch.bfloat16, False, True),
        (True, torch.bfloat16, True, False),
        (True, torch.float32, False, False),
        (False, torch.bfloat16, False, False),
    ],
)
def test_torchs_attention_is_taken_where_it_is_faster(
    tiles: bool,
    dtype: torch.dtype,
    trains: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joint, bounds = make_joint([24, 40], dtype)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    monkeypatch.setattr(products, "without_weights", lambda joint, *rest: joint)
    found = products.attend(joint.requires_grad_(trains), bounds, 0.3)
    assert (found is joint) == expected


def test_bf16_is_as_exact_as_torchs_own() -> None:
    """By its products, as `attn_implementation="eager"` has them: large scores are rounded by 0.1."""
    joint, bounds = make_joint([24, 40, 9], torch.float32)
    with torch.no_grad():
        joint[:, 0] *= 20
    rounded = joint.detach().bfloat16()
    expected = attend_with_torch(rounded.float(), bounds)
    stock = []
    for start, end in pairwise(bounds.tolist()):
        query, key, value = (part.transpose(0, 1) for part in rounded[start:end].unbind(1))
        weight = (query @ key.mT * 0.3).softmax(-1, dtype=torch.float32).bfloat16()
        stock.append((weight @ value).transpose(0, 1))
    found = products.attend(rounded, bounds, 0.3)
    assert relative(found, expected) < min(1.2e-2, relative(torch.cat(stock), expected))


def test_autocast_leaves_scores_in_fp32() -> None:
    joint, bounds = make_joint([24, 40], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = products.attend(joint, bounds, 0.3)
    assert relative(found, attend_with_torch(joint, bounds)) < 2e-6


def test_sizes_of_products_are_few() -> None:
    """Whatever the lengths; and no sequence is forgotten."""
    lengths = [*range(257), *range(256, 0, -1)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    pack = torch.empty(int(bounds[-1]), 3, HEADS, UNITS, dtype=torch.bfloat16)
    found = products.groups_of(bounds, pack)
    assert {group.width for group in found} == set(range(32, 257, 32))
    for group in found:
        assert 1 <= len(group.sequences) <= {32: 16, 64: 8, 96: 5}.get(group.width, 4)
        assert all(group.width - 32 < length <= group.width for length in group.lengths)
    sequences = sorted((piece.start, piece.stop) for group in found for piece in group.sequences)
    most = [
        max(products.GROUP_SEQUENCES, products.GROUP_TOKENS // width)
        for width in range(32, 257, 32)
    ]
    assert sum(most) == 49, "sizes, 2.5 ms and 4 MB each"
    assert len(found) == 4 + 8 + 13 + 5 * 16, "as few as can be"
    assert sequences == [pair for pair in pairwise(bounds.tolist()) if pair[0] < pair[1]]
    assert len(sequences) == 512


def test_what_is_not_finite_stays_in_its_review() -> None:
    joint, bounds = make_joint([24, 20, 19], torch.float32)
    with torch.no_grad():
        joint[24:44] = float("nan")
    found = products.attend(joint, bounds, 0.3)
    assert found.isnan().any(2).any(1).tolist() == [False] * 24 + [True] * 20 + [False] * 19


def test_tokens_of_no_sequence_are_refused() -> None:
    joint, bounds = make_joint([4, 4], torch.float32)
    with pytest.raises(AssertionError, match="each token"):
        products.attend(joint, bounds[:2], 0.3)
