"""The encoder's layers; of the last one a classifier reads the first token of each sequence and no other.

So of packed micro-batches it computes no more than that: keys and values of all tokens, all else of first
ones. That leaves out 10 of the 12 parts of its products, forward and backward, and almost all of its
attention, and changes nothing that is read. Padded ones, the reference, go through the stock layer.

Shapes: T tokens of a packed micro-batch, S sequences, L tokens of a padded one, D features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from toolkit.model.attention import PackedSelfAttention


class PackedLayer(BertLayer):
    """A BERT layer whose attention knows packed tokens."""

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention.self = PackedSelfAttention(config, layer_idx=layer_idx)


class LastLayer(PackedLayer):
    """A BERT layer that returns (1, S, D) for (1, T, D)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        bounds: Tensor | None = None,
        longest: int = 0,
        **options: Any,
    ) -> Tensor:
        """Encode; all arguments are BERT's but those that cut packed tokens into sequences.

        Args:
            hidden_states: (S, L, D), or (1, T, D) when packed.
            attention_mask: of padded rows.
            rest: for the stock layer.
            bounds: (S + 1,) int32, cuts packed tokens into sequences; None means padded.
            longest: tokens that no packed sequence exceeds.
            options: for the stock layer.
        """
        if bounds is None:
            return super().forward(hidden_states, attention_mask, *rest, **options)
        first_1SD = firsts(hidden_states, bounds).unsqueeze(0)
        cuts: Any = {"bounds": bounds, "longest": longest, "first_1SD": first_1SD}
        context_1SD, _ = self.attention.self(hidden_states, **cuts)
        return self.feed_forward_chunk(self.attention.output(context_1SD, first_1SD))


class CompactLayerNorm(nn.LayerNorm):
    """LayerNorm that computes in fp32 under autocast and hands on what the next product will read.

    Autocast would leave its result in fp32, 4 bytes a unit, to be read again for the residual and as a
    gradient. Products round it to bf16 anyway; now the residual, and its sum with a layer's output, are
    bf16, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., D)."""
        normal = super().forward(x)
        kind = x.device.type
        return (
            normal.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else normal
        )


def compact_norms(module: nn.Module) -> None:
    """Put `CompactLayerNorm` in the place of every LayerNorm, before pretrained weights are loaded."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.LayerNorm:
                setattr(parent, name, CompactLayerNorm(child.normalized_shape, child.eps))


def firsts(x: Tensor, bounds: Tensor | None) -> Tensor:
    """Return the entries of each sequence's first token: (S, L, ...) or (1, T, ...) -> (S, ...)."""
    if bounds is None:
        return x[:, 0]
    # empty sequences, which keep shapes few, may begin behind the last token
    return x[0].index_select(0, bounds[:-1].clamp(max=x.shape[1] - 1))
