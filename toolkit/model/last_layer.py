"""The encoder's last layer, of which a classifier reads the first token of each sequence and no other.

So of packed micro-batches it computes no more than that: keys and values of all tokens, all else of first
ones. That leaves out 10 of the 12 parts of its products, forward and backward, and almost all of its
attention, and changes nothing that is read. Padded ones, the reference, go through the stock layer.

Shapes: T tokens of a packed micro-batch, S sequences, D features, H heads, K units a head.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from toolkit.model.attention import attend


class LastLayer(BertLayer):
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
        inner = self.attention.self
        first_1SD = firsts(hidden_states, bounds).unsqueeze(0)

        def project(layer: nn.Module, x: Tensor) -> Tensor:
            """(1, N, D) -> (1, H, N, K)."""
            return layer(x).unflatten(-1, (-1, inner.attention_head_size)).transpose(1, 2)

        context_1SHK, _ = attend(
            inner,
            project(inner.query, first_1SD),
            project(inner.key, hidden_states),
            project(inner.value, hidden_states),
            None,
            bounds=bounds,
            longest=longest,
            one_query=True,
            scaling=inner.scaling,
        )
        return self.feed_forward_chunk(self.attention.output(context_1SHK.flatten(2), first_1SD))


def firsts(x: Tensor, bounds: Tensor | None) -> Tensor:
    """Return the entries of each sequence's first token: (S, L, ...) or (1, T, ...) -> (S, ...)."""
    if bounds is None:
        return x[:, 0]
    # empty sequences, which keep shapes few, may begin behind the last token
    return x[0].index_select(0, bounds[:-1].clamp(max=x.shape[1] - 1))
