"""Invariant 2: packed = padded = stock BERT, logits and gradients; and the model as a file."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import BertForSequenceClassification, BertModel

from tests.kernels import use_kernels
from toolkit.data.batches import Batch, _pack, evaluation_batches, make_batch
from toolkit.data.steps import cost
from toolkit.engine.runtime import Runtime
from toolkit.errors import DataError
from toolkit.model import attention, products
from toolkit.model.classifier import ClassifierSpec, HeadClassifier, build_classifier
from toolkit.model.encoders import check_encoder, encoder_folder
from toolkit.model.heads import HEADS, HeadOptions, build_head

NAMES = ("neg", "pos")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime("fp32", 1)


def logits_and_gradient(
    model: HeadClassifier, runtime: Runtime, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logits = model(**runtime.inputs(batch)).logits[: len(batch.rows)]
    functional.cross_entropy(logits, runtime.labels(batch), reduction="sum").backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm().detach() / b.norm().detach())


def test_a_cpu_attends_by_products(
    split, runtime: Runtime, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two layers: in the last one, first tokens alone ask."""
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    calls: list[int] = []
    plain = products.attend

    def attend(joint: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(joint))
        return plain(joint, *rest)

    monkeypatch.setattr(products, "attend", attend)
    batch = make_batch(split, np.arange(3, 20), padded=False)
    logits_and_gradient(model, runtime, batch)
    assert calls == [batch.computed_tokens]
    with torch.no_grad():
        model(**runtime.inputs(batch))
    assert calls == [batch.computed_tokens] * 2


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_packed_equals_padded(
    head: str, training: bool, split, runtime: Runtime, tiny_encoder: Path
) -> None:
    """In training with dropout on: the masks belong to the reviews, not to the layout."""
    model, _ = build_classifier(ClassifierSpec(head, dropout=0.3), tiny_encoder, NAMES)
    model.train(training)
    rows, keys = np.arange(3, 20), np.arange(17, dtype=np.uint64) * np.uint64(977)
    packed, padded = (
        logits_and_gradient(model, runtime, make_batch(split, rows, padded=p, slot_keys=keys))
        for p in (False, True)
    )
    assert relative(packed[0], padded[0]) < 1e-5
    assert relative(packed[1], padded[1]) < 1e-5


def test_one_layer_and_bf16(split, runtime: Runtime, tiny_encoder: Path) -> None:
    """The last layer is the first, too; weights in bf16 train, and autocast scores."""
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    model.eval().bert.encoder.layer = model.bert.encoder.layer[1:]
    packed, padded = (make_batch(split, np.arange(3, 20), padded=p) for p in (False, True))
    expected = logits_and_gradient(model, runtime, padded)
    for ours, theirs in zip(logits_and_gradient(model, runtime, packed), expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative(model(**runtime.inputs(packed)).logits[:17], expected[0]) < 3e-2
    model.bfloat16()  # sums over tokens are in three digits then: a third is lost, padded as well
    ours, theirs = (logits_and_gradient(model, runtime, batch) for batch in (packed, padded))
    for mine, stock, exact in zip(ours, theirs, expected, strict=True):
        assert relative(mine.float(), exact) < 1.2 * relative(stock.float(), exact)


def test_packs_are_refused_where_they_would_be_wrong(
    split, runtime: Runtime, tiny_encoder: Path, tmp_path: Path
) -> None:
    """By a model that drops attention weights in training; one that was saved takes them as before."""
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    inputs = runtime.inputs(make_batch(split, np.arange(9), padded=False))
    model.save_pretrained(tmp_path)
    loaded = HeadClassifier.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    model.config.attention_probs_dropout_prob = 0.1
    model(**inputs)
    with pytest.raises(AssertionError, match="packs have none"):
        model.train()(**inputs)


def test_the_last_layer_computes_what_is_read(
    split, runtime: Runtime, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all tokens, the rest of first ones; that logits stay, the test above says."""
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    seen: list[tuple[int, ...]] = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_pre_hook(
            lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
        )
    attend = attention.attend

    def spy(first: torch.Tensor | None, joint: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((0 if first is None else len(first), *joint.shape[:2]))
        return attend(first, joint, *rest)

    monkeypatch.setattr(attention, "attend", spy)
    batch = make_batch(split, np.arange(12), padded=False)
    tokens, firsts = batch.computed_tokens, len(batch.bounds) - 1
    model(**runtime.inputs(batch))
    assert seen == [(0, tokens, 3), (1, tokens), (firsts, tokens, 2), (1, firsts)]
    seen.clear()
    padded = make_batch(split, np.arange(12), padded=True)
    model(**runtime.inputs(padded))
    assert seen == [padded.input_ids.shape] * 2


def test_norms_hand_on_what_products_read(tiny_encoder: Path) -> None:
    """Computed in fp32, of inputs in either precision; without autocast nothing is rounded."""
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    norms = [layer for layer in model.bert.modules() if isinstance(layer, torch.nn.LayerNorm)]
    assert len(norms) == 5
    x = torch.randn(3, 32)
    for norm in norms:
        exact = functional.layer_norm(x, (32,), norm.weight, norm.bias, norm.eps)
        assert torch.equal(norm(x), exact)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(x), exact.bfloat16())
            assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_padded_is_stock_bert(split, runtime: Runtime, tiny_encoder: Path) -> None:
    """Encoder, pooler and v1 against BertModel and BertForSequenceClassification, gradients too."""
    model, _ = build_classifier(ClassifierSpec("v1"), tiny_encoder, NAMES)
    model.eval()
    stock = BertForSequenceClassification.from_pretrained(tiny_encoder, num_labels=2).eval()
    stock.classifier.load_state_dict(model.head[1].state_dict())
    batch = make_batch(split, np.arange(12), padded=True)
    ours, gradient = logits_and_gradient(model, runtime, batch)
    mask = torch.from_numpy(batch.attention_mask)
    theirs = stock(torch.from_numpy(batch.input_ids), attention_mask=mask).logits
    functional.cross_entropy(theirs, runtime.labels(batch), reduction="sum").backward()
    assert relative(ours, theirs) < 1e-6
    their_gradient = torch.cat([p.grad.flatten() for p in stock.parameters()])
    assert relative(gradient, their_gradient) < 1e-5
    pooled = BertModel.from_pretrained(tiny_encoder).eval()(
        torch.from_numpy(batch.input_ids), attention_mask=mask
    )
    assert relative(ours, model.head(pooled.pooler_output)) < 1e-6


def test_a_review_does_not_see_its_neighbours(split, runtime: Runtime, tiny_encoder: Path) -> None:
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    model.eval()
    with torch.no_grad():
        together = model(**runtime.inputs(make_batch(split, np.arange(9), padded=False))).logits
        for row in range(9):
            alone = make_batch(split, np.array([row]), padded=False)
            torch.testing.assert_close(model(**runtime.inputs(alone)).logits[0], together[row])


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(
    head: str, split, runtime: Runtime, tiny_encoder: Path
) -> None:
    model, _ = build_classifier(ClassifierSpec(head), tiny_encoder, NAMES)
    logits_and_gradient(model.eval(), runtime, make_batch(split, np.arange(20), padded=False))
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "key.bias" not in n)


def test_an_empty_micro_batch_has_gradient_zero(
    split, runtime: Runtime, tiny_encoder: Path
) -> None:
    model, _ = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)
    for padded in (False, True):
        batch = make_batch(split, np.array([], dtype=np.int64), padded=padded)
        assert (batch.tokens, len(batch.labels)) == (0, 0)
        model.zero_grad()
        logits = model(**runtime.inputs(batch)).logits[: len(batch.rows)]
        functional.cross_entropy(logits, runtime.labels(batch), reduction="sum").backward()
        assert all((p.grad == 0).all() for p in model.parameters())


def test_depth_width_activation_and_dropout_are_configurable() -> None:
    options = HeadOptions(width=5, depth=4, activation="tanh", dropout=0.2)
    layers = [type(layer).__name__ for layer in build_head("v3", 7, 2, options).children()]
    assert layers == ["Dropout", "Linear", "Tanh"] * 3 + ["Dropout", "Linear"]
    shapes = [
        (m.in_features, m.out_features)
        for m in build_head("v3", 7, 2, options).children()
        if hasattr(m, "weight")
    ]
    assert shapes == [(7, 5), (5, 5), (5, 5), (5, 2)]
    depths = {
        name: sum(hasattr(m, "weight") for m in build_head(name, 7, 2, HeadOptions()).children())
        for name in HEADS
    }
    assert depths == {"v1": 1, "v2": 2, "v3": 3}


@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded_it_is_the_same_model(
    head: str, split, runtime: Runtime, tiny_encoder: Path, tmp_path: Path
) -> None:
    spec = ClassifierSpec(head, head_width=None if head == "v1" else 9)
    model, _ = build_classifier(spec, tiny_encoder, NAMES)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = HeadClassifier.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == {0: "neg", 1: "pos"}
    assert loaded.config.head == head
    batch = make_batch(split, np.arange(6), padded=True)
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids),
        "attention_mask": torch.from_numpy(batch.attention_mask),
    }
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert loaded(**inputs, labels=torch.from_numpy(batch.labels)).loss > 0


def test_the_same_seed_gives_the_same_head(tiny_encoder: Path) -> None:
    first, again, other = (
        build_classifier(ClassifierSpec("v3", seed=seed), tiny_encoder, NAMES)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.head[1].weight, again.head[1].weight)
    assert not torch.equal(first.head[1].weight, other.head[1].weight)
    assert first.head[1].weight.std() > 0.1, "Xavier, not BERT's 0.02"


def copy_encoder(encoder: Path, folder: Path, change) -> Path:
    shutil.copytree(encoder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_pooler_is_reported_loudly(tiny_encoder: Path, tmp_path: Path) -> None:
    [about_dropout] = build_classifier(ClassifierSpec(), tiny_encoder, NAMES)[1]
    assert "Attention dropout (0.1 in the encoder) is off" in about_dropout
    bare = copy_encoder(
        tiny_encoder, tmp_path / "a", lambda w: {n: t for n, t in w.items() if "pooler" not in n}
    )
    warning, _ = build_classifier(ClassifierSpec(), bare, NAMES)[1]
    assert "no trained pooler" in warning
    torn = copy_encoder(
        tiny_encoder, tmp_path / "b", lambda w: {n: t for n, t in w.items() if "layer.1" not in n}
    )
    with pytest.raises(DataError, match="lacks weights"):
        build_classifier(ClassifierSpec(), torn, NAMES)


def test_other_models_pickled_weights_and_long_sequences_are_refused(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_encoder, folder)
    check_encoder(folder, 64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError) as caught:
        check_encoder(folder, 65)
    text = str(caught.value)
    for part in (
        "'roberta'",
        "has no model.safetensors",
        "64 positions, less than max_length (65)",
    ):
        assert part in text
    with pytest.raises(DataError, match="is no folder; names are minilm, bert-base"):
        encoder_folder("./nowhere", None, tmp_path)
    with pytest.raises(DataError, match="no readable"):
        check_encoder(tmp_path, 64)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_batches_cover_the_split(split, padded: bool, world_size: int) -> None:
    ranks = [
        list(evaluation_batches(split, rank, world_size, max_tokens=100, padded=padded))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    rows = np.concatenate([batch.rows for batches in ranks for batch in batches])
    assert sorted(rows) == list(range(len(split)))
    for batch in (batch for batches in ranks for batch in batches if len(batch.rows)):
        assert batch.computed_tokens <= 100
        assert batch.computed_tokens == cost(split.lengths(batch.rows), padded=padded)


def test_the_gpus_path_is_the_cpus(
    split, runtime: Runtime, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call for all sequences, or one for each: logits and gradients."""
    model, _ = build_classifier(ClassifierSpec(dropout=0.3), tiny_encoder, NAMES)
    model.train()
    rows, keys = np.arange(3, 20), np.arange(17, dtype=np.uint64) * np.uint64(977)
    batch = make_batch(split, rows, padded=False, slot_keys=keys)
    assert batch.computed_tokens > batch.tokens, "there is filling, too"
    expected = logits_and_gradient(model, runtime, batch)
    use_kernels(monkeypatch)
    found = logits_and_gradient(model, runtime, batch)
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("longest", [2, 7, 250])
def test_packs_have_few_sizes(longest: int) -> None:
    """Few shapes, little filling, no sequence too long; the first tokens and sequences as they are."""
    dice = np.random.default_rng(longest)
    shapes, shares = set(), []
    for _ in range(400):
        lengths = dice.integers(1, longest + 1, size=32)
        ends = np.cumsum(lengths)
        tokens = np.arange(ends[-1])
        pack = _pack(lengths, tokens, tokens, tokens.astype(np.int32), longest)
        for name in ("input_ids", "position_ids", "dropout_keys"):
            assert (pack[name][0, : len(tokens)] == tokens).all()
            assert not pack[name][0, len(tokens) :].any()
        bounds, total = pack["bounds"], pack["input_ids"].size
        assert (bounds[: len(lengths) + 1] == np.append(0, ends)).all()
        gaps = np.diff(bounds)
        assert gaps.min() >= 0
        assert gaps.max() <= longest
        assert bounds[-1] == total
        shapes.add((total, len(bounds)))
        shares.append(len(tokens) / total)
    assert len(shapes) <= 16
    assert len(shapes) < 8 or np.mean(shares) > 0.95


def test_the_gpus_path_compiles_whole(
    split, runtime: Runtime, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph breaks, no number that lives on the CPU, else CUDA graphs are none; one compilation.

    And what Inductor makes of it computes the same: at this width a product that overflowed did not.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    model, _ = build_classifier(ClassifierSpec(dropout=0.3), tiny_encoder, NAMES)
    model.train()
    numbers = [np.arange(first, first + size) for first, size in ((0, 3), (9, 5), (3, 7), (7, 9))]
    batches = [make_batch(split, rows, rows.astype(np.uint64), padded=False) for rows in numbers]
    assert len({batch.computed_tokens for batch in batches}) == 4
    expected = [logits_and_gradient(model, runtime, batch) for batch in batches]
    use_kernels(monkeypatch)
    counter = CompileCounterWithBackend("inductor")
    model.compile_encoder(on_gpu=False, backend=counter, fullgraph=True)
    for batch, theirs in zip(batches, expected, strict=True):
        ours = logits_and_gradient(model, runtime, batch)
        assert relative(ours[0], theirs[0]) < 1e-5
        assert relative(ours[1], theirs[1]) < 1e-5
    inputs = [
        node.meta["example_value"]
        for g in counter.graphs
        for node in g.graph.nodes
        if node.op == "placeholder"
    ]
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    assert len(tensors) > 20
    assert all(tensor.dim() > 0 for tensor in tensors)
    names = [n.name for g in counter.graphs for n in g.graph.nodes if n.op == "placeholder"]
    assert any("dropout_keys" in name for name in names)
    assert not any("keys_value" in name for name in names), "taken for one that never moves"
    assert len(counter.graphs) == 1, "compiled once for all sizes"
