"""The encoder's last layer, of which a classifier reads the first token of each sequence and no other.

So of packed micro-batches it computes no more than that: keys and values of all tokens, all else of first
ones. That leaves out 10 of the 12 parts of its products, forward and backward, and almost all of its
attention, and changes nothing that is read. Padded ones, the reference, go through the stock layer.

Shapes: T tokens of a packed micro-batch, S sequences, D features, H heads, K units a head.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from toolkit.model.attention import attend_from_first


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
        first_1SD = firsts(hidden_states, bounds).unsqueeze(0)
        context_1SD = self._attend(first_1SD, hidden_states, bounds, longest)
        return self.feed_forward_chunk(self.attention.output(context_1SD, first_1SD))

    def _attend(
        self, first_1SD: Tensor, hidden_1TD: Tensor, bounds: Tensor, longest: int
    ) -> Tensor:
        """Let each sequence's first token attend to all of its tokens; return (1, S, D)."""
        inner = self.attention.self

        def project(layer: nn.Module, x: Tensor) -> Tensor:
            """(1, N, D) -> (1, H, N, K)."""
            return layer(x).unflatten(-1, (-1, inner.attention_head_size)).transpose(1, 2)

        query_1HSK = project(inner.query, first_1SD)
        key_1HTK, value_1HTK = (project(x, hidden_1TD) for x in (inner.key, inner.value))
        inputs = query_1HSK, key_1HTK, value_1HTK
        return attend_from_first(*inputs, bounds, longest, inner.scaling).flatten(2)


def firsts(x: Tensor, bounds: Tensor | None) -> Tensor:
    """Return the entries of each sequence's first token: (S, L, ...) or (1, T, ...) -> (S, ...)."""
    if bounds is None:
        return x[:, 0]
    # empty sequences, which keep shapes few, may begin behind the last token
    return x[0].index_select(0, bounds[:-1].clamp(max=x.shape[1] - 1))
