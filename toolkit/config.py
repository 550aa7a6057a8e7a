"""The one configuration object: defaults < `--config` YAML files < flags.

    python -m toolkit train --config configs/runs/smoke.yaml --lr 3e-5

`parse` accepts every form that a W&B agent emits, reports all problems at once, and does all of
it before torch is imported. `RunConfig` is flat because its names are also the keys of sweeps,
YAML files and summaries.
"""

import ast
import codecs
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from toolkit import strict_yaml
from toolkit.console import say
from toolkit.errors import ConfigError
from toolkit.redact import redact_values

Spec = TypeVar("Spec")
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
    """W&B project."""
    entity: str | None = None
    """User or team; null means the key's own."""
    group: str | None = None
    """Group shown together, for example one sweep."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""


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
    """Encoder: minilm, bert-base, a local folder, or the hub name of a BERT model."""
    encoder_revision: str | None = option(None)
    """Commit of a hub encoder; null means the pinned one where we know it, else its newest."""
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
    label_names: str | None = option(None)
    """The two labels of local files, separated by a comma, the negative one first; null means
    recognise usual pairs."""
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
    split_seed: int = option(0, "[0, 4294967295]")
    """Seed of splits and subsets. Keep it while `seed` varies, so that runs share their test rows."""
    max_length: int = option(256, "[4, inf)")
    """Longest sequence in tokens, special tokens included; longer reviews are truncated."""

    # Optimisation
    batch_size: int = option(16, "[1, inf)")
    """Reviews per optimizer step, over all ranks and micro-batches."""
    grad_accum: int = option(1, "[1, inf)")
    """Micro-batches that each rank runs per optimizer step."""
    max_tokens: int | None = option(None, "[4, inf)")
    """Set the number of micro-batches of each step so that none exceeds this many tokens; null means
    `grad_accum` does, and on a CPU 8192 if that is 1."""
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
    """bf16: autocast over fp32 weights, LayerNorm's results in bf16, too. fp32: no autocast."""
    batching: Literal["auto", "packed", "padded"] = option("auto")
    """packed: no padding. padded: stock BERT. auto: packed, but for fp32 on a GPU and for GPUs older than
    Ampere, which have no kernel for it."""
    compile: bool = option(False, identity=False)
    """Compile all but the head, and capture it in CUDA graphs: for runs of thousands of steps on a GPU.
    Compiling takes a minute. On a CPU there is little to gain."""
    seed: int = option(0, "[0, 4294967295]")
    """Seed of head weights, row order and dropout."""

    # Evaluation
    eval_every: int | None = option(None, "[1, inf)")
    """Evaluate on validation every so many steps, besides each epoch's end."""
    best_metric: Literal["f1", "accuracy", "precision", "recall", "loss"] = option("f1")
    """Validation metric that picks the best model."""
    eval_tokens: int | None = option(None, "[4, inf)", identity=False)
    """Tokens per micro-batch in evaluation; null means 4,096 on a CPU and 32,768 on a GPU."""

    # Checkpoints
    resume: str = option("auto", identity=False)
    """Go on from a checkpoint: auto (the run folder's newest that is whole), strict (the newest, which
    has to be whole), none (start anew), or the path of a checkpoint or a run folder."""
    save_minutes: float = option(5.0, "[0, inf]", identity=False)
    """Save a checkpoint every so many minutes, besides each evaluation; 0 means after every step."""
    keep_checkpoints: int = option(2, "[2, inf)", identity=False)
    """Checkpoints to keep; older ones are deleted once a new one is complete."""
    on_failed_save: Literal["continue", "stop"] = option("continue", identity=False)
    """What to do when a checkpoint cannot be written, on a full disk for example."""
    rank_timeout: float = option(120.0, "[5, inf)", identity=False)
    """Seconds until a process that is dead or hangs ends the run."""

    # Place and presentation
    output_dir: str = option("runs", identity=False)
    """Folder of the run folders."""
    cache_dir: str | None = option(None, identity=False)
    """Folder of token caches and downloads; null means $TOOLKIT_CACHE_DIR or ~/.cache/bert-heads."""
    run_id: str | None = option(None, identity=False)
    """Name of the run folder; null means a hash of what defines the run."""
    experiment: str | None = option(None, identity=False)
    """Name of the run in tables of results; null means its id."""
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

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir).expanduser() / str(self.run_id)

    @property
    def wandb_place(self) -> tuple[dict[str, Any], str, Path]:
        """Where W&B files the run: project and so on, the run's name, its folder."""
        return dataclasses.asdict(self.wandb), str(self.run_id), self.folder

    def identity(self) -> dict[str, Any]:
        """Return the fields that define the run: all that change what it computes."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata.get("identity", True)}

    def hash(self) -> str:
        """Return the sha256 of `identity()` as hexadecimal text."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `--config` accepts.

        A run id that follows from the rest is left out: with another flag besides, it would be wrong.
        """
        values = redact_values(dataclasses.asdict(self))
        if self.run_id == _hashed_run_id(self):
            values["run_id"] = None
        return yaml.safe_dump(values, sort_keys=False)


FIELDS = {f.name: f for f in dataclasses.fields(RunConfig)}


class Item(NamedTuple):
    """One setting as the user wrote it."""

    source: str
    key: str
    value: Any


@functools.cache
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
        SystemExit: after `--help`, `--print_config` or `--print_folder`.
    """
    parser = build_parser(prog)
    tokens = normalise(argv)
    if {"-h", "--help"} & set(tokens):
        parser.print_help()
        raise SystemExit(0)
    shows = {"--print_config", "--print_folder"} & set(tokens)
    items, problems = _items([token for token in tokens if token not in shows])
    values: dict[str, Any] = {}
    for item in items:
        problem = _take(parser, item, values)
        if problem:
            problems.append(f"{item.source}: {problem}")
    config = RunConfig(**(values | {"wandb": WandbConfig(**values.get("wandb", {}))}))
    config = dataclasses.replace(config, run_id=config.run_id or _hashed_run_id(config))
    problems += _conflicts(config)
    if problems:
        raise ConfigError(problems)
    if shows:
        if "--print_config" in shows:
            say(config.to_yaml())
        else:
            sys.stdout.write(f"{config.folder}\n")  # for scripts: `say` might blacken a part of it
        raise SystemExit(0)
    return config


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
        if not has_value and position < len(argv) and not argv[position].startswith("--"):
            has_value, value, position = "=", argv[position], position + 1
        if not has_value and _is_switch(key):
            has_value, value = "=", "true"
        if key != "--_wandb":
            tokens.append(key + has_value + value)
    return sorted(tokens, key=lambda token: not token.startswith("--config="))


def _is_switch(key: str) -> bool:
    return key[2:] in FIELDS and FIELDS[key[2:]].type is bool


def _items(tokens: list[str]) -> tuple[list[Item], list[str]]:
    """List every setting in files and flags, and what cannot be read."""
    items: list[Item] = []
    problems: list[str] = []
    for token in tokens:
        key, has_value, value = token.partition("=")
        if not _is_unicode(token):  # nor could config.yaml hold it
            problems.append(f"{key}: got {value!r}, which is not UTF-8; if it is a path, rename it")
        elif not key.startswith("--"):
            name = token.lstrip("-")
            hint = f"; did you mean --{name}?" if name in FIELDS else " (flags start with --)"
            problems.append(f"{token}: is not a flag{hint}")
        elif not value and (key == "--config" or (not has_value and key[2:] in FIELDS)):
            problems.append(f"{key}: has no value")
        elif key == "--config":
            try:
                items += _file_items(value)
            except ValueError as error:
                problems.append(f"--config {value}: {error}")
        else:
            items.append(Item("flag", key[2:], _from_text(key[2:], value)))
    return items, problems


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a path may be any bytes
        return False
    return True


def _file_items(path: str) -> list[Item]:
    text, content = strict_yaml.read(Path(path).expanduser(), or_nothing=True)
    # text as it is written: to YAML `no` is False, and 0123456, a commit's first digits, is 42798
    written = yaml.load(text, yaml.BaseLoader) or {}
    texts = {key: as_written for key, as_written in written.items() if _takes_text(key)}
    return [
        Item(path, str(key), value if value is None else texts.get(key, value))
        for key, value in content.items()
    ]


def _from_text(key: str, text: str) -> Any:
    """Read a flag's text as YAML, after what Python prints (`None`, `{'a': None}`) was understood."""
    if _takes_text(key) and text not in ("None", "null"):
        return text
    if text[:1] in ("{", "["):
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(text)
    try:
        return yaml.safe_load({"None": "null", "inf": ".inf"}.get(text, text))
    except yaml.YAMLError:
        return text


def _takes_text(name: str) -> bool:
    return name in FIELDS and FIELDS[name].type in (str, str | None)


def _takes_int(name: str) -> bool:
    return name in FIELDS and FIELDS[name].type in (int, int | None)


def _takes_null(name: str) -> bool:
    return type(None) in get_args(FIELDS[name].type)


def _take(parser: ArgumentParser, item: Item, values: dict[str, Any]) -> str | None:
    """Put one setting into `values`; return what is wrong with it instead, if anything is."""
    name, _, inner = item.key.partition(".")
    if name not in FIELDS or (inner and name != "wandb"):
        close = difflib.get_close_matches(item.key, FIELDS, n=1)
        return f"{item.key} is unknown" + (
            f"; did you mean {close[0]}?" if close else "; see --help"
        )
    if item.value is None and not inner and not _takes_null(name):
        return f"{item.key} got null, allowed is {_allowed(name)}"
    value = _as_text(item.value) if _takes_text(name) else item.value
    if _takes_int(name) and isinstance(value, float) and value.is_integer():
        value = int(value)  # W&B draws 16.0 from q_uniform
    try:
        parsed = _parsed(parser, name, {inner: value} if inner else value)
        if name == "wandb":
            parsed = {key: parsed[key] for key in ({inner} if inner else value)}
    except Exception as error:  # jsonargparse raises several types; each means "does not fit"
        reason = f" ({' '.join(str(error).split())})" if name == "wandb" else ""
        return f"{item.key} got {item.value!r}, allowed is {_allowed(name)}{reason}"
    allowed = FIELDS[name].metadata.get("allowed")
    if allowed and parsed is not None and not _inside(parsed, allowed):
        return f"{name} got {item.value!r}, allowed is {_allowed(name)}"
    values[name] = values.get(name, {}) | parsed if name == "wandb" else parsed
    return None


_known: dict[tuple[str, str], Any] = {}
"""What `_parsed` has found. The runs of a sweep share most of their values, and jsonargparse takes some
milliseconds for each."""


def _parsed(parser: ArgumentParser, name: str, value: Any) -> Any:
    """Check and convert a field's value."""
    key = (name, repr(value))  # tells 1 from True and 1.0, which are equal
    if key not in _known:
        _known[key] = parser.parse_object({name: value}).as_dict()[name]
    return _known[key]


def _as_text(value: Any) -> Any:
    """Let YAML's numbers and lists stand for text: `run_id: 12`, `label_names: [3, 5]`."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        value = [part.strip(" '\"") for part in value[1:-1].split(",")]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if value is None or isinstance(value, str | dict) else str(value)


def _inside(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _allowed(name: str) -> str:
    kind, interval = FIELDS[name].type, FIELDS[name].metadata.get("allowed")
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is WandbConfig:
        return "project, entity, group, tags"
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
    if config.head_activation != RunConfig.head_activation and config.head == "v1":
        found.append("head_activation does not apply to head v1, which has no hidden layer")
    if config.compile and config.batching == "padded":
        found.append("compile is for packed batches: leave out batching (padded) or compile")
    if config.max_tokens and config.grad_accum > 1:
        found.append("max_tokens sets the number of micro-batches itself: leave grad_accum at 1")
    for name in ("max_tokens", "eval_tokens"):
        tokens = getattr(config, name)
        if tokens and tokens < config.max_length:
            found.append(f"{name} ({tokens}) must be at least max_length ({config.max_length})")
    if config.label_names is not None:
        names = [name.strip() for name in config.label_names.split(",")]
        if len(names) != 2 or len(set(names)) != 2 or not all(names):
            found.append(f"label_names must be two different names, got {config.label_names!r}")
    try:
        codecs.lookup(config.encoding)
    except LookupError:
        found.append(
            f"encoding got {config.encoding!r}, allowed are utf-8, latin-1, cp1252, utf-16 ..."
        )
    if config.run_id is not None and not RUN_ID.fullmatch(config.run_id):
        found.append(
            f"run_id got {config.run_id!r}, allowed are letters, digits and . _ - (at most 64)"
        )
    return found


def part(kind: type[Spec], config: RunConfig, **more: Any) -> Spec:
    """Make a module's own settings of the fields that it shares with the configuration."""
    names = [f.name for f in dataclasses.fields(kind) if f.name not in more]  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in names}, **more)


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


def _hashed_run_id(config: RunConfig) -> str:
    return f"{config.head}-{config.hash()[:10]}"


def cache_dir(config: RunConfig) -> Path:
    """Return the folder of token caches and downloads."""
    chosen = config.cache_dir or os.environ.get("TOOLKIT_CACHE_DIR") or "~/.cache/bert-heads"
    return Path(chosen).expanduser().absolute()
