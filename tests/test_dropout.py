"""Keyed dropout: the right share, independent units, a function of the keys alone."""

import torch

from toolkit.model.dropout import DropoutKeys, KeyedDropout, keep_mask


def keys(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, generator=generator)


def test_share_kept() -> None:
    for p in (0.01, 0.1, 0.5, 0.9):
        mask = keep_mask(keys(2000), 384, p, layer=3)
        assert abs(mask.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / mask.numel()) ** 0.5


def test_units_tokens_and_layers_are_uncorrelated() -> None:
    """Also for keys and layers that differ in one bit only."""
    for token_keys in (keys(4000), torch.arange(4000, dtype=torch.int32)):
        masks = [keep_mask(token_keys, 64, 0.5, layer).float() - 0.5 for layer in (0, 1)]
        bound = 6 / 4000**0.5  # six standard deviations of a correlation of 4,000 pairs
        by_unit = (masks[0].T @ masks[0]) * 4 / 4000 - torch.eye(64)
        assert by_unit.abs().max() < bound
        across_layers = (masks[0] * masks[1]).mean() * 4
        assert abs(across_layers) < 6 / masks[0].numel() ** 0.5
        neighbours = (masks[0][1:] * masks[0][:-1]).mean() * 4
        assert abs(neighbours) < 6 / masks[0].numel() ** 0.5


def test_a_token_keeps_its_mask_in_any_company() -> None:
    shared, layer = DropoutKeys(), None
    layer = KeyedDropout(0.3, 7, shared)
    all_keys, x = keys(50), torch.ones(50, 16)
    shared.value = all_keys
    together = layer(x)
    shared.value = all_keys[20:30]
    assert torch.equal(layer(x[20:30]), together[20:30])
    assert set(together.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}


def test_off_in_evaluation_and_ordinary_without_keys() -> None:
    layer = KeyedDropout(0.5, 0, DropoutKeys())
    x = torch.ones(100, 100)
    assert 0.4 < (layer(x) == 0).float().mean() < 0.6
    assert torch.equal(layer.eval()(x), x)
