"""The step plan: every row once an epoch, whoever computes it; equal tokens; little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.data.hashing import key64, shuffled
from toolkit.data.steps import Stream, balance, cost, deal, epoch_order


@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    epochs=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    seed=st.integers(0, 3),
)
def test_every_row_once_in_every_epoch(
    num_rows: int, batch_size: int, epochs: float, seed: int
) -> None:
    stream = Stream(num_rows, batch_size, epochs, seed)
    rows = [stream.rows(stream.slots(step)) for step in range(stream.num_steps)]
    if not rows:
        assert round(epochs * num_rows) == 0
        return
    assert all(len(step) == batch_size for step in rows[:-1])
    consumed = np.concatenate(rows)
    assert len(consumed) == round(epochs * num_rows)
    for epoch in range(int(epochs)):
        assert sorted(consumed[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_a_step_needs_nothing_before_it() -> None:
    stream = Stream(num_rows=1000, batch_size=32, epochs=3, seed=5)
    forwards = [stream.rows(stream.slots(step)) for step in range(stream.num_steps)]
    epoch_order.cache_clear()
    backwards = [stream.rows(stream.slots(step)) for step in reversed(range(stream.num_steps))]
    assert all((a == b).all() for a, b in zip(forwards, reversed(backwards), strict=True))


def test_the_order_is_the_same_on_every_machine() -> None:
    """Written down once: a change of it would make old runs irreproducible."""
    assert epoch_order(0, 0, 10).tolist() == [1, 3, 5, 2, 8, 7, 0, 6, 4, 9]
    assert epoch_order(0, 1, 10).tolist() != epoch_order(0, 0, 10).tolist()
    assert epoch_order(1, 0, 10).tolist() != epoch_order(0, 0, 10).tolist()


def test_epochs_end_where_their_last_row_is() -> None:
    stream = Stream(num_rows=10, batch_size=4, epochs=2, seed=0)
    assert [stream.ends_epoch(step) for step in range(stream.num_steps)] == [
        False, False, True, False, True,
    ]  # fmt: skip
    assert Stream(num_rows=10, batch_size=4, epochs=2, seed=0, max_steps=2).ends_epoch(1)


def test_max_steps_cuts_the_run() -> None:
    assert Stream(100, 8, 3, 0, max_steps=5).num_slots == 40
    assert Stream(10, 8, 1, 0, max_steps=5).num_slots == 10


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80),
    world_size=st.integers(1, 9),
    grad_accum=st.integers(1, 9),
    max_tokens=st.one_of(st.none(), st.integers(64, 256)),
    padded=st.booleans(),
)
def test_a_deal_covers_the_step_exactly(
    lengths: list[int], world_size: int, grad_accum: int, max_tokens: int | None, padded: bool
) -> None:
    array = np.array(lengths)
    dealt = deal(array, world_size, grad_accum=grad_accum, max_tokens=max_tokens, padded=padded)
    assert len(dealt) == world_size
    assert len({len(batches) for batches in dealt}) == 1
    assert len(dealt[0]) >= 1
    rows = np.concatenate([rows for batches in dealt for rows in batches])
    assert sorted(rows) == list(range(len(lengths)))
    if max_tokens:
        assert all(cost(array[r], padded=padded) <= max_tokens for b in dealt for r in b)
    else:
        assert len(dealt[0]) <= grad_accum


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_that_does_not_fit_sets_the_size_of_all(padded: bool) -> None:
    """250 tokens are filled up to 256; it is not worth a micro-batch for each short row."""
    lengths = np.array([250] + [20] * 20)
    ranks = deal(lengths, 2, max_tokens=100, padded=padded)
    assert [len(batches) for batches in ranks] == [2, 2]
    largest = max(cost(lengths[rows], padded=padded) for batches in ranks for rows in batches)
    assert largest == (250 if padded else 256)


def amazon_like(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(93), 0.47, count), 20, 256).astype(np.int64)


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_ranks_carry_equal_tokens(grad_accum: int) -> None:
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(20):
        lengths = amazon_like(rng, 256)
        tokens = [
            sum(lengths[rows].sum() for rows in batches)
            for batches in deal(lengths, 8, grad_accum=grad_accum)
        ]
        worst = max(worst, max(tokens) / np.mean(tokens))
    assert worst <= 1.03


def test_padding_is_small_with_several_padded_micro_batches() -> None:
    rng = np.random.default_rng(0)
    lengths = amazon_like(rng, 256)
    dealt = deal(lengths, 8, grad_accum=4, padded=True)
    computed = [sum(cost(lengths[rows], padded=True) for rows in batches) for batches in dealt]
    assert sum(computed) / lengths.sum() < 1.10
    assert max(computed) / np.mean(computed) < 1.10
    random = [cost(lengths[start : start + 8], padded=True) for start in range(0, 256, 8)]
    assert sum(random) / lengths.sum() > 1.5, "the bound above would be met by any batches"


def test_balance_keeps_order_and_survives_more_parts_than_rows() -> None:
    parts = balance(np.array([5, 9, 1]), 5)
    assert sorted(len(part) for part in parts) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000, 2**16 + 1])
def test_a_shuffle_holds_every_number_once(count: int) -> None:
    order = shuffled(key64("a purpose", count), count)
    assert sorted(order.tolist()) == [*range(count)]
    assert count < 1000 or (order != np.arange(count)).mean() > 0.99
