"""The one configuration object: defaults < `--config` YAML files < flags.

    python -m toolkit train --config configs/runs/smoke.yaml --lr 3e-5

`parse` accepts every form that a W&B agent emits, reports all problems at once, and does all of
it before torch is imported. `RunConfig` is flat because its names are also the keys of sweeps,
YAML files and summaries.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from toolkit.errors import ConfigError

BEST_METRICS = ("f1", "accuracy", "precision", "recall", "loss")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def option(default: Any, allowed: str | None = None, *, identity: bool = True) -> Any:
    """Declare a field.

    Args:
        default: its default.
        allowed: an interval such as "(0, 1]" that a number has to lie in.
        identity: False when the field does not change what the run computes; it then stays out of
            the run id.
    """
    return field(default=default, metadata={"allowed": allowed, "identity": identity})


@dataclass(frozen=True)
class WandbConfig:
    """Where Weights & Biases files the run."""

    project: str = "bert-heads"
    """Project."""
    entity: str | None = None
    """User or team; null means the key's own."""
    group: str | None = None
    """Group shown together, for example one sweep."""
    tags: list[str] = field(default_factory=list)
    """Tags."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    # Model
    head: str = option("v2")
    """Classification head: v1 (one linear layer), v2 (two) or v3 (a deeper stack)."""
    head_width: int | None = option(None, "[1, 65536]")
    """Units of a hidden layer of the head; null means the encoder's hidden size."""
    head_depth: int | None = option(None, "[3, 16]")
    """Number of linear layers of head v3; null means 3. The other heads have a fixed depth."""
    head_activation: Literal["gelu", "relu", "silu", "tanh"] = option("gelu")
    """Activation between the linear layers of the head."""
    dropout: float = option(0.1, "[0, 1)")
    """Dropout in the head."""
    encoder: str = option("minilm")
    """Encoder: minilm, bert-base, bert-large, a local folder, or the hub name of a BERT model."""
    encoder_revision: str | None = option(None)
    """Commit of a hub encoder; null means the pinned one where we know it."""
    encoder_dropout: float | None = option(None, "[0, 1)")
    """Dropout on the encoder's hidden states; null means what its checkpoint says."""

    # Data
    dataset: str = option("snippets")
    """Data set: snippets, amazon_polarity, or the path of a CSV, TSV, JSONL or Parquet file or folder."""
    dataset_path: str | None = option(None)
    """A local copy of a hub data set's repository, read instead of the hub."""
    dataset_revision: str | None = option(None)
    """Commit of a hub data set; null means the pinned one."""
    text_column: str = option("text")
    """Text column of local files; several, separated by commas, are joined by a line break."""
    label_column: str = option("label")
    """Label column of local files."""
    label_names: list[str] | None = option(None)
    """The two labels of local files, the negative one first; null means recognise usual pairs."""
    encoding: str = option("utf-8")
    """Text encoding of local CSV, TSV and JSONL files."""
    bad_rows: Literal["error", "quarantine"] = option("error")
    """Rows that cannot be used: stop and list them, or write them to a side file and go on."""
    train_rows: int | None = option(None, "[2, inf)")
    """Train on a seeded, class-balanced subset of this size."""
    validation_rows: int | None = option(None, "[2, inf)")
    """Size of the validation split carved from train; null means a tenth, at most 10,000 rows."""
    test_rows: int | None = option(None, "[1, inf)")
    """Test on a seeded, class-balanced subset of this size."""
    split_seed: int = option(0, "[0, inf)")
    """Seed of splits and subsets. Keep it while `seed` varies, so that runs share their test rows."""
    max_length: int = option(256, "[4, inf)")
    """Longest sequence in tokens, special tokens included; longer reviews are truncated."""

    # Optimisation
    batch_size: int = option(16, "[1, inf)")
    """Reviews per optimizer step, over all ranks and micro-batches."""
    grad_accum: int = option(1, "[1, inf)")
    """Micro-batches that each rank runs per optimizer step."""
    max_tokens: int | None = option(None, "[4, inf)")
    """Set the number of micro-batches of each step so that none exceeds this many tokens."""
    epochs: float = option(3.0, "(0, inf)")
    """Passes over the training rows."""
    max_steps: int | None = option(None, "[1, inf)")
    """Stop after this many optimizer steps; the schedule then ends there too."""
    lr: float = option(5e-5, "(0, 1]")
    """Peak learning rate."""
    head_lr: float | None = option(None, "(0, 1]")
    """Peak learning rate of the head; null means `lr`."""
    weight_decay: float = option(0.01, "[0, 1]")
    """Weight decay; biases and LayerNorm have none."""
    warmup_ratio: float = option(0.1, "[0, 1)")
    """Share of the steps over which the rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant"] = option("linear")
    """How the rate falls after warm-up."""
    max_grad_norm: float = option(1.0, "(0, inf]")
    """Clip the gradient's norm to this; .inf turns clipping off."""
    max_skipped: int = option(10, "[0, inf)")
    """Give up as diverged after more steps than this with a loss or gradient that is not finite."""
    precision: Literal["bf16", "fp32"] = option("bf16")
    """bf16: autocast over fp32 weights. fp32: no autocast."""
    batching: Literal["auto", "packed", "padded"] = option("auto")
    """packed: no padding. padded: stock BERT. auto: packed where the device has a back end for it."""
    seed: int = option(0, "[0, inf)")
    """Seed of head weights, row order and dropout."""

    # Evaluation
    eval_every: int | None = option(None, "[1, inf)")
    """Evaluate on validation every so many steps, besides each epoch's end."""
    best_metric: Literal["f1", "accuracy", "precision", "recall", "loss"] = option("f1")
    """Validation metric that picks the best model."""
    eval_tokens: int = option(8192, "[4, inf)", identity=False)
    """Tokens per micro-batch in evaluation."""

    # Place and presentation
    output_dir: str = option("runs", identity=False)
    """Folder of the run folders."""
    cache_dir: str | None = option(None, identity=False)
    """Folder of token caches and downloads; null means $TOOLKIT_CACHE_DIR or ~/.cache/bert-heads."""
    run_id: str | None = option(None, identity=False)
    """Name of the run folder; null means a hash of what defines the run."""
    overwrite: bool = option(False, identity=False)
    """Train again although the run folder holds a completed run (which is moved aside)."""
    track: Literal["wandb", "none"] = option("wandb", identity=False)
    """Mirror the metrics to Weights & Biases: online with a key, offline without; or do not."""
    wandb: WandbConfig = field(default_factory=WandbConfig, metadata={"identity": False})
    """Weights & Biases."""
    log_every: int = option(10, "[1, inf)", identity=False)
    """Log every so many optimizer steps."""
    cpu_threads: int | None = option(None, "[1, 1024]", identity=False)
    """Threads per CPU process; null means the usable cores shared by the processes of this machine."""
    dry_run: bool = option(False, identity=False)
    """Prepare the data, print the plan, train nothing."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that define the run: all that change what it computes."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata.get("identity", True)}

    def hash(self) -> str:
        """Return the sha256 of `identity()` as hexadecimal text."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `--config` accepts."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


FIELDS = {f.name: f for f in dataclasses.fields(RunConfig)}


PYTHON_TO_YAML = {"None": "null", "True": "true", "False": "false", "inf": ".inf"}


class Item(NamedTuple):
    """One setting as the user wrote it."""

    source: str
    key: str
    value: Any


def build_parser(prog: str = "train.py") -> ArgumentParser:
    """Build the command line; the field docstrings above are its help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=RunConfig.__doc__, exit_on_error=False)
    parser.add_argument(
        "--config", action="config", help="YAML file; later ones win, flags win over all."
    )
    parser.add_class_arguments(RunConfig, None)
    for action in parser._actions:
        allowed = FIELDS[action.dest].metadata.get("allowed") if action.dest in FIELDS else None
        if allowed:
            action.help = f"{action.help} Range {allowed}."
    return parser


def parse(argv: list[str], prog: str = "train.py") -> RunConfig:
    """Turn command-line arguments into a configuration.

    Raises:
        ConfigError: naming every problem in flags and files.
        SystemExit: after `--help` or `--print_config`.
    """
    argv = normalise(argv)
    parser = build_parser(prog)
    if not {"-h", "--help"} & set(argv):
        problems = _problems(parser, argv)
        if problems:
            raise ConfigError(problems)
    namespace = parser.parse_args(argv)
    values = {key: value for key, value in namespace.as_dict().items() if key in FIELDS}
    config = RunConfig(**(values | {"wandb": WandbConfig(**values["wandb"])}))
    problems = _conflicts(config)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(config, run_id=config.run_id or _default_run_id(config))


def normalise(argv: list[str]) -> list[str]:
    """Bring the argument forms of people and of W&B agents to one: `--key=value`, `--config` first.

    A flag in front of `--config` would lose against the file, and `--_wandb={...}`, which an agent
    adds when it runs a preempted run again, is no setting of ours.
    """
    tokens, position = [], 0
    while position < len(argv):
        token, position = argv[position], position + 1
        if not token.startswith("--"):
            tokens.append(token)
            continue
        key, has_value, value = token.partition("=")
        key = "--" + key[2:].replace("-", "_")
        if key in ("--help", "--print_config"):
            tokens.append(key + has_value + value)
            continue
        if not has_value and position < len(argv) and not argv[position].startswith("--"):
            has_value, value, position = "=", argv[position], position + 1
        if not has_value and _is_switch(key):
            has_value, value = "=", "true"
        if key != "--_wandb":
            tokens.append(key + has_value + _yaml_value(value))
    return sorted(tokens, key=lambda token: not token.startswith("--config="))


def _is_switch(key: str) -> bool:
    return key[2:] in FIELDS and FIELDS[key[2:]].type is bool


def _yaml_value(value: str) -> str:
    """Turn what Python prints (`None`, `True`, `{'a': None}`) into what YAML reads."""
    if value in PYTHON_TO_YAML:
        return PYTHON_TO_YAML[value]
    if value[:1] in ("{", "["):
        try:
            return json.dumps(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            return value  # YAML flow syntax such as [neg, pos]
    return value


def _problems(parser: ArgumentParser, argv: list[str]) -> list[str]:
    problems: list[str] = []
    for item in _items(argv, problems):
        problem = _problem(parser, item)
        if problem:
            problems.append(f"{item.source}: {problem}")
    return problems


def _items(argv: list[str], problems: list[str]) -> list[Item]:
    """List every setting in files and flags, and note what cannot be read."""
    items = []
    for token in argv:
        key, has_value, value = token.partition("=")
        if not key.startswith("--"):
            problems.append(f"{token}: is not a flag; did you mean --{token}?")
        elif key == "--config":
            items += _file_items(value, problems)
        elif key == "--print_config":
            continue
        elif not has_value and key[2:] in FIELDS:
            problems.append(f"{key}: has no value")
        else:
            items.append(Item("flag", key[2:], value))
    return items


def _file_items(path: str, problems: list[str]) -> list[Item]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config {path}: cannot be read ({error.strerror})")
        return []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"--config {path}: is not YAML ({' '.join(str(error).split())})")
        return []
    if not isinstance(content, dict):
        problems.append(f"--config {path}: must hold `name: value` lines, got {content!r}")
        return []
    return [Item(path, str(key), value) for key, value in content.items()]


def _problem(parser: ArgumentParser, item: Item) -> str | None:
    """Say what is wrong with one setting alone, or None."""
    name = item.key.split(".")[0]
    if name not in FIELDS or ("." in item.key and name != "wandb"):
        close = difflib.get_close_matches(item.key, FIELDS, n=1)
        return f"{item.key} is unknown" + (
            f"; did you mean {close[0]}?" if close else "; see --help"
        )
    try:
        if item.source == "flag":
            parsed = parser.parse_args([f"--{item.key}={item.value}"])
        else:
            parsed = parser.parse_object({item.key: item.value})
    except Exception as error:  # jsonargparse raises several types; each means "does not fit"
        if name == "wandb":
            return f"{item.key} got {item.value!r} ({' '.join(str(error).split())})"
        return f"{item.key} got {item.value!r}, allowed is {_allowed(name)}"
    value, allowed = parsed.get(name), FIELDS[name].metadata.get("allowed")
    if allowed and value is not None and not _inside(value, allowed):
        return f"{name} got {item.value!r}, allowed is {_allowed(name)}"
    return None


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _allowed(name: str) -> str:
    kind, interval = FIELDS[name].type, FIELDS[name].metadata.get("allowed")
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    text = (
        "true or false"
        if kind is bool
        else str(getattr(kind, "__name__", kind)).replace("None", "null")
    )
    return f"{text} in {interval}" if interval else text


def _conflicts(config: RunConfig) -> list[str]:
    """Check what one field alone does not show; each message names both sides."""
    found = []
    heads = head_names()
    if config.head not in heads:
        close = difflib.get_close_matches(config.head, heads, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        found.append(f"head got {config.head!r}, allowed is one of {', '.join(heads)}{hint}")
    if config.head_depth and config.head != "v3":
        found.append(f"head_depth only applies to head v3, got head {config.head!r}")
    if config.head_width and config.head == "v1":
        found.append("head_width does not apply to head v1, which has no hidden layer")
    if config.max_tokens and config.grad_accum > 1:
        found.append("max_tokens sets the number of micro-batches itself: leave grad_accum at 1")
    for name in ("max_tokens", "eval_tokens"):
        tokens = getattr(config, name)
        if tokens and tokens < config.max_length:
            found.append(f"{name} ({tokens}) must be at least max_length ({config.max_length})")
    if config.label_names is not None and len(set(config.label_names)) != 2:
        found.append(f"label_names must be two different names, got {config.label_names}")
    if config.run_id is not None and not RUN_ID.fullmatch(config.run_id):
        found.append(
            f"run_id got {config.run_id!r}, allowed are letters, digits and . _ - (at most 64)"
        )
    return found


def head_names() -> list[str]:
    """Return the keys of `HEADS` in model/heads.py.

    They are read from its source, because importing it would import torch, and a second list here
    would have to be kept equal to the first.
    """
    source = Path(__file__).with_name("model") / "heads.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "HEADS":
            assert isinstance(node.value, ast.Dict)
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise AssertionError("model/heads.py has no HEADS")


def _default_run_id(config: RunConfig) -> str:
    """Keep the id that a W&B agent gave, else hash what defines the run."""
    agent_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return agent_id or f"{config.head}-{config.hash()[:10]}"


def cache_dir(config: RunConfig) -> Path:
    """Return the folder of token caches and downloads."""
    chosen = config.cache_dir or os.environ.get("TOOLKIT_CACHE_DIR") or "~/.cache/bert-heads"
    return Path(chosen).expanduser().absolute()
