"""Classification heads: pooled features in, logits out.

Shapes: S sequences, D features, W hidden units, C classes. Adding a head is one class and one line
in `HEADS`; the command line offers it at once.
"""

from dataclasses import dataclass

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class HeadOptions:
    """What can be configured about a head."""

    width: int | None = None
    """Hidden units; None means as many as there are features."""
    depth: int = 3
    """Linear layers, for heads whose depth is free."""
    activation: str = "gelu"
    dropout: float = 0.1


class V1(nn.Sequential):
    """The baseline: Dropout, Linear(C)."""

    def __init__(self, features: int, classes: int, options: HeadOptions) -> None:
        super().__init__(nn.Dropout(options.dropout), nn.Linear(features, classes))


class V2(nn.Sequential):
    """One hidden layer: Dropout, Linear, activation, Dropout, Linear(C)."""

    def __init__(self, features: int, classes: int, options: HeadOptions) -> None:
        super().__init__(*feed_forward(features, classes, options, depth=2))


class V3(nn.Sequential):
    """A deeper stack, by default three linear layers, each but the last with an activation."""

    def __init__(self, features: int, classes: int, options: HeadOptions) -> None:
        super().__init__(*feed_forward(features, classes, options, depth=options.depth))


def feed_forward(features: int, classes: int, options: HeadOptions, depth: int) -> list[nn.Module]:
    """Return the layers of a stack with `depth` linear layers, dropout in front of each."""
    width = options.width or features
    layers: list[nn.Module] = []
    for inputs in [features] + [width] * (depth - 2):
        layers += [
            nn.Dropout(options.dropout),
            nn.Linear(inputs, width),
            ACTIVATIONS[options.activation](),
        ]
    return [*layers, nn.Dropout(options.dropout), nn.Linear(width, classes)]


HEADS: dict[str, type[nn.Module]] = {"v1": V1, "v2": V2, "v3": V3}


def build_head(name: str, features: int, classes: int, options: HeadOptions) -> nn.Module:
    """Build a head: a module from (S, D) features to (S, C) logits."""
    return HEADS[name](features, classes, options)
