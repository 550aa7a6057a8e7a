"""A BERT encoder and a head as one model that saves and loads like any other of `transformers`.

Shapes: T tokens of a packed micro-batch, S sequences, L longest of them, D features, C classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, BertPreTrainedModel, initialization
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

from toolkit.errors import DataError
from toolkit.model.dropout import DropoutKeys, replace_dropout, share_keys
from toolkit.model.heads import HeadOptions, build_head
from toolkit.model.layers import LastLayer, PackedLayer, compact_norms, firsts


class HeadClassifierConfig(BertConfig):
    """BERT's configuration and the head's.

    The model type is our own: under "bert" the stock classes would load such a folder and put a
    random head where ours was.
    """

    model_type = "bert_with_head"

    head: str = "v2"
    head_width: int | None = None
    head_depth: int = HeadOptions.depth
    head_activation: str = "gelu"
    head_dropout: float = 0.1
    trained_length: int | None = None
    """Tokens that texts were cut to in training."""
    trained_precision: str | None = None
    """bf16 or fp32: what the computation was in; weights are fp32."""


class HeadClassifier(BertPreTrainedModel):
    """Encoder, pooler and head."""

    config_class = HeadClassifierConfig
    base_model_prefix = "bert"

    def __init__(self, config: HeadClassifierConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        last = config.num_hidden_layers - 1
        layers = [PackedLayer(config, number) for number in range(last)] + [LastLayer(config, last)]
        self.bert.encoder.layer = nn.ModuleList(layers)
        compact_norms(self.bert)
        options = HeadOptions(
            config.head_width, config.head_depth, config.head_activation, config.head_dropout
        )
        self.head = build_head(config.head, config.hidden_size, len(config.id2label or {}), options)
        # of all tokens; of those that the last layer hands on (packed: first ones); of first ones, for
        # the head, which is not compiled
        self.token_keys, self.last_keys, self.sequence_keys = (DropoutKeys() for _ in range(3))
        next_layer = replace_dropout(self.bert, self.token_keys)
        share_keys(self.bert.encoder.layer[last], self.last_keys)
        replace_dropout(self.head, self.sequence_keys, first_layer=next_layer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what the checkpoint does not hold; `initialization` leaves alone what it does."""
        if isinstance(module, nn.Linear) and any(module is layer for layer in self.head.modules()):
            # Xavier (Glorot and Bengio, 2010). BERT's normal(0, 0.02) shrinks the signal at every
            # layer of a deep head: to 0.4 at 384 units
            initialization.xavier_uniform_(module.weight)
            initialization.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def compile_encoder(self, *, on_gpu: bool, **options: Any) -> None:
        """Compile everything but the head, at its first call; names of weights do not change.

        Args:
            on_gpu: capture it in CUDA graphs, too.
            options: of `torch.compile`.
        """
        defaults = {"mode": "reduce-overhead"} if on_gpu else {}
        model: Any = self
        compiled = torch.compile(model.encode, **defaults | options)

        def encode(**inputs: Any) -> Tensor:
            # otherwise the first sizes are taken for constants, and the next batch has all compiled again
            for name in ("input_ids", "position_ids", "bounds", "dropout_keys", "first_keys"):
                torch._dynamo.maybe_mark_dynamic(inputs[name], inputs[name].dim() - 1)
            return compiled(**inputs)

        model.encode = encode
        # it would cut the encoder at DDP's buckets, into graphs that pass numbers to each other
        torch._dynamo.config.optimize_ddp = False
        if on_gpu:
            set_up_inductor(self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        bounds: Tensor | None = None,
        longest: int = 0,
        dropout_keys: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify sequences.

        Args:
            input_ids: (S, L), or (1, T) when packed.
            attention_mask: (S, L), 1 on tokens; None means that there is no padding.
            token_type_ids: as in BERT.
            position_ids: as in BERT; needed when packed.
            labels: (S,); if given, the mean cross-entropy is returned as `loss`.
            bounds: (S + 1,) int32, cuts packed tokens into sequences; None means not packed.
            longest: tokens that no packed sequence exceeds.
            dropout_keys: int32 with the shape of `input_ids`, see `toolkit.model.dropout`.

        Returns:
            `logits` (S, C), and `loss` if there are labels.
        """
        first_keys = None if dropout_keys is None else firsts(dropout_keys, bounds)
        self.sequence_keys.value = first_keys
        pooled_SD = self.encode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            bounds=bounds,
            longest=longest,
            dropout_keys=dropout_keys,
            first_keys=first_keys,
        )
        # the head costs next to nothing; in bf16 its logits would have three digits
        with torch.autocast(pooled_SD.device.type, enabled=False):
            logits_SC = self.head(pooled_SD.to(next(self.head.parameters()).dtype))
        loss = None if labels is None else functional.cross_entropy(logits_SC.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_SC)

    def encode(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        bounds: Tensor | None,
        longest: int,
        dropout_keys: Tensor | None,
        first_keys: Tensor | None,
    ) -> Tensor:
        """Return what BERT pools of each sequence, (S, D); arguments as in `forward`.

        `first_keys` (S,) are the dropout keys of first tokens.

        What changes from batch to batch is an argument: a tensor that hung on a module would be taken for
        one that never moves, and another CUDA graph captured whenever it did.
        """
        self.token_keys.value = dropout_keys
        self.last_keys.value = dropout_keys if bounds is None else first_keys
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        if bounds is None:
            return self.bert(*inputs).pooler_output
        # else packs would lose attention dropout without a word
        assert not self.training or self.config.attention_probs_dropout_prob == 0, "packs have none"
        encoded = self.bert(*inputs, bounds=bounds, longest=longest)
        pooler = self.bert.pooler
        assert pooler is not None  # BERT itself pooled the first sequence only
        return pooler(encoded.last_hidden_state.squeeze(0).unsqueeze(1))


def set_up_inductor(width: int) -> None:
    """Choose for packs of few sizes what Inductor, left alone, gets wrong on a GPU.

    It holds for all that this process compiles from now on.

    Args:
        width: features of a token.
    """
    settings = torch._inductor.config.triton
    # it complains of a CUDA graph for each size, which is what we want
    settings.cudagraph_dynamic_shape_warn_limit = None
    # One kernel sums LayerNorm's gradients by row and by column. Where it takes several rows at a time
    # (of 512 units or less; of any if compiled for 67,584 tokens or more on an H100) sums go through
    # shared memory: 13.5 of a step's 46 ms; 1 to 3 should be left (torch 2.11, tests/bench/NOTES.md)
    settings.mix_order_reduction = width > 512
    settings.mix_order_reduction_split_size = 16
    # small batches would have other kernels: half a minute of compiling, in an epoch's last step, say
    settings.mix_order_reduction_non_strict_mode = True


@dataclass(frozen=True)
class ClassifierSpec:
    """What a user said about the model. The fields are those of `RunConfig`."""

    head: str = "v2"
    head_width: int | None = None
    head_depth: int | None = None
    head_activation: str = "gelu"
    dropout: float = 0.1
    encoder_dropout: float | None = None
    seed: int = 0


def build_classifier(
    spec: ClassifierSpec, encoder_folder: Path, label_names: tuple[str, str]
) -> tuple[HeadClassifier, list[str]]:
    """Join a pretrained encoder and a new head, in fp32.

    Attention dropout is 0 in every batching: the packed back ends have none. Seeds torch's generator, and
    silences transformers' own reports for good.

    Returns:
        The model, and what a user should know: what the checkpoint lacks, and what is not used of it.

    Raises:
        DataError: when the checkpoint lacks weights of the encoder.
    """
    base, _ = BertConfig.get_config_dict(encoder_folder)
    config = _classifier_config(spec, base, label_names)
    transformers_logging.set_verbosity_error()  # its report of new weights is replaced by ours
    transformers_logging.disable_progress_bar()
    torch.manual_seed(spec.seed)
    loaded: Any = HeadClassifier.from_pretrained(
        encoder_folder,
        config=config,
        attn_implementation="sdpa",
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, info = loaded
    notes = _missing_weights(info["missing_keys"], encoder_folder)
    if probability := base.get("attention_probs_dropout_prob", 0.1):  # BERT's own default
        notes.append(f"Attention dropout ({probability} in the encoder) is off: packs have none.")
    return model, notes


def _classifier_config(
    spec: ClassifierSpec, base: dict[str, Any], label_names: tuple[str, str]
) -> HeadClassifierConfig:
    ours = {
        "model_type": HeadClassifierConfig.model_type,
        "architectures": [HeadClassifier.__name__],
        "attention_probs_dropout_prob": 0.0,
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
        "head": spec.head,
        "head_width": spec.head_width,
        "head_depth": spec.head_depth or HeadOptions.depth,
        "head_activation": spec.head_activation,
        "head_dropout": spec.dropout,
    }
    if spec.encoder_dropout is not None:
        ours["hidden_dropout_prob"] = spec.encoder_dropout
    return HeadClassifierConfig.from_dict(base | ours)


def _missing_weights(missing: set[str], encoder_folder: Path) -> list[str]:
    """Sort absent weights: the head is new by design, a pooler may be, anything else is damage."""
    rest = sorted(name for name in missing if not name.startswith("head."))
    pooler = [name for name in rest if name.startswith("bert.pooler.")]
    if len(rest) > len(pooler):
        raise DataError([f"encoder {encoder_folder} lacks weights: {', '.join(rest[:5])} ..."])
    if pooler:
        return [
            f"WARNING: {encoder_folder} has no trained pooler: it starts from random weights, like "
            "the head. Expect to need more steps than with a checkpoint that has one."
        ]
    return []
