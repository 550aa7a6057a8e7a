"""The encoder's last layer, of which a classifier reads the first token of each sequence and no other.

So behind its attention, packed micro-batches go on with those tokens alone. That leaves out an eighth of
the operations of MiniLM's 6 layers, a sixteenth of BERT-base's 12, forward and backward, and changes
nothing that is read. Padded ones, the reference, go through the stock layer.

Shapes: T tokens of a packed micro-batch, S sequences, D features.
"""

from typing import Any

from torch import Tensor
from transformers.models.bert.modeling_bert import BertLayer


class LastLayer(BertLayer):
    """A BERT layer that returns (1, S, D) for (1, T, D)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        bounds: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Encode; all arguments but `bounds`, which cuts tokens into sequences, are BERT's."""
        if bounds is None:
            return super().forward(hidden_states, attention_mask, *rest, **options)
        context_1TD, _ = self.attention.self(hidden_states, None, bounds=bounds, **options)
        context_1SD, inputs_1SD = (
            firsts(x, bounds).unsqueeze(0) for x in (context_1TD, hidden_states)
        )
        return self.feed_forward_chunk(self.attention.output(context_1SD, inputs_1SD))


def firsts(x: Tensor, bounds: Tensor | None) -> Tensor:
    """Return the entries of each sequence's first token: (S, L, ...) or (1, T, ...) -> (S, ...)."""
    if bounds is None:
        return x[:, 0]
    # empty sequences, which keep shapes few, may begin behind the last token
    return x[0].index_select(0, bounds[:-1].clamp(max=x.shape[1] - 1))
