"""Configuration: precedence, agent argument forms, all problems at once, and speed."""

import os
from pathlib import Path

import pytest
import yaml

from tests.programs import ROOT, run_python
from toolkit.config import FIELDS, RunConfig, build_parser, head_names, parse
from toolkit.errors import ConfigError


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv))
    return caught.value.problems


def test_defaults_then_files_then_flags(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 1e-5\nepochs: 2\nhead: v1\n")
    second.write_text("lr: 3e-5\n")
    config = parse(["--head", "v3", "--config", str(first), f"--config={second}"])
    assert (config.lr, config.epochs, config.head) == (3e-5, 2.0, "v3")
    assert config.batch_size == RunConfig().batch_size


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--overwrite=True", "overwrite", True),
        ("--overwrite=False", "overwrite", False),
        ("--overwrite=true", "overwrite", True),
        ("--overwrite", "overwrite", True),
        ("--max_steps=None", "max_steps", None),
        ("--lr=2e-05", "lr", 2e-5),
        ("--batch-size=32", "batch_size", 32),
        ("--epochs=5", "epochs", 5.0),
        ("--head=v1", "head", "v1"),
        ("--label_names=['bad', 'good']", "label_names", "bad,good"),
        ("--label_names=[3, 5]", "label_names", "3,5"),
        ("--label_names=no,yes", "label_names", "no,yes"),
        ("--label_names=None", "label_names", None),
        ("--run_id=12", "run_id", "12"),
        ("--max_grad_norm=inf", "max_grad_norm", float("inf")),
    ],
)
def test_every_form_that_a_wandb_agent_emits(argument: str, name: str, value: object) -> None:
    assert getattr(parse([argument]), name) == value


def test_nested_dictionaries_and_the_rerun_argument_of_an_agent() -> None:
    config = parse(["--wandb={'project': 'p', 'entity': None}", "--_wandb={'x': {'y': 1}}"])
    assert (config.wandb.project, config.wandb.entity) == ("p", None)
    assert parse(["--wandb.project=q"]).wandb.project == "q"


def test_all_problems_at_once_with_names_and_ranges(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("batch_sise: 4\nepochs: -1\n")
    found = problems(
        "--lr=fast", "--hed=v1", f"--config={file}", "--grad_accum=0", "--precision=fp8", "stray",
        "--config=absent.yaml", "--batch_size=2.5", "-seed", "--head=v9", "--lr",
        "--dataset=\udcff.csv",
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 13
    for part in (
        "lr got 'fast', allowed is float in (0, 1]",
        "hed is unknown; did you mean head?",
        "batch_sise is unknown; did you mean batch_size?",
        "epochs got -1, allowed is float in (0, inf)",
        "grad_accum got 0, allowed is int in [1, inf)",
        "precision got 'fp8', allowed is one of bf16, fp32",
        "stray: is not a flag (flags start with --)",
        "absent.yaml: cannot be read",
        "batch_size got 2.5",
        "--lr: has no value",
        r"--dataset: got '\udcff.csv', which is not UTF-8",
        "-seed: is not a flag; did you mean --seed?",
        "head got 'v9', allowed is one of v1, v2, v3",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--head=v9"], ("head", "v1, v2, v3")),
        (["--head=v1", "--head_width=8"], ("head_width", "v1")),
        (["--head=v1", "--head_activation=relu"], ("head_activation", "v1")),
        (["--head=v2", "--head_depth=4"], ("head_depth", "v2")),
        (["--max_tokens=512", "--grad_accum=2"], ("max_tokens", "grad_accum")),
        (["--max_tokens=64"], ("max_tokens", "max_length")),
        (["--eval_tokens=64"], ("eval_tokens", "max_length")),
        (["--compile", "--batching=padded"], ("compile", "batching")),
        (["--label_names=[a]"], ("label_names", "two different names")),
        (["--wandb=None"], ("wandb", "project")),
        (["--wandb={'projct': 1}"], ("wandb", "projct")),
        (["--run_id=../x"], ("run_id", "letters")),
        (["--encoding=latin1x"], ("encoding", "latin1x")),
    ],
)
def test_conflicts_name_both_sides(argv: list[str], names: tuple[str, ...]) -> None:
    [problem] = problems(*argv)
    assert all(name in problem for name in names)


def test_every_field_refuses_nonsense() -> None:
    checked = 0
    for name, field in FIELDS.items():
        if field.type in (str, str | None):
            continue  # any text is a text; other checks come with their meaning
        assert name in problems(f"--{name}={{'no': 'sense'}}")[0], name
        checked += 1
    assert checked >= 35


def test_null_is_refused_where_a_value_is_needed(tmp_path: Path) -> None:
    nullable = {name for name, field in FIELDS.items() if "None" in str(field.type)}
    needed = [name for name in FIELDS if name not in nullable]
    assert len(nullable) >= 10
    assert len(needed) >= 30
    file = tmp_path / "nulls.yaml"
    file.write_text("".join(f"{name}: null\n" for name in needed))
    found = problems("--config", str(file))
    assert len(found) == len(needed)
    assert all(
        f"{name} got null, allowed is " in said for name, said in zip(needed, found, strict=True)
    )
    assert "allowed is one of bf16, fp32" in next(said for said in found if "precision" in said)
    [said] = problems("--head=None")
    assert said == "flag: head got null, allowed is str"
    file.write_text("".join(f"{name}: null\n" for name in nullable))
    assert parse(["--config", str(file)]) == parse([])


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("lr: 1e-5\nhead: v1\nlr: 2e-5\n")
    [said] = problems("--config", str(file))
    assert "found lr 2 times: keep one" in said
    assert "line 1, column 1" in said
    file.write_text("wandb: {project: a, project: b}\n")
    assert "found project 2 times" in problems("--config", str(file))[0]
    file.write_text("wandb: &common {project: a, group: g}\n")
    assert parse(["--config", str(file)]).wandb.project == "a"


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "--head=v1"]])
def test_a_config_that_is_not_named(argv: list[str]) -> None:
    assert problems(*argv) == ["--config: has no value"]


def test_the_written_config_gives_the_same_config(tmp_path: Path) -> None:
    config = parse(["--lr=3e-5", "--max_grad_norm=inf", "--wandb.tags=[a, b]", "--seed=7"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse([f"--config={file}"]) == config
    changed = parse([f"--config={file}", "--lr=1e-3"])
    assert changed.run_id == parse(["--lr=1e-3", "--max_grad_norm=inf", "--seed=7"]).run_id
    assert yaml.safe_load(file.read_text())["seed"] == 7


def test_run_id_is_what_defines_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    base = parse([])
    assert base.run_id == parse(["--output_dir=elsewhere", "--log_every=3", "--track=none"]).run_id
    others = {parse([flag]).run_id for flag in ("--seed=1", "--lr=1e-5", "--head=v1", "--epochs=2")}
    assert len(others | {base.run_id}) == 5
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert parse([]).run_id == base.run_id  # whoever starts it, it is the same run


def test_a_home_folder_is_one_in_flags_and_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves `--config=~/mine.yaml` as it is, and so do sweeps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("output_dir: ~/elsewhere\n")
    assert parse(["--config=~/mine.yaml"]).folder.parent == tmp_path / "elsewhere"


def test_yaml_files_may_be_empty_and_hold_numbers_for_text(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("# nothing yet\n")
    assert parse([f"--config={file}"]) == parse([])
    file.write_text("run_id: 123\nlabel_names: [3, 5]\nwandb:\n  project: p\n")
    config = parse([f"--config={file}", "--wandb.entity=e"])
    assert (config.run_id, config.label_names) == ("123", "3,5")
    assert (config.wandb.project, config.wandb.entity) == ("p", "e")
    file.write_text(
        "run_id: 0012\nlabel_names: [no, yes]\nencoder_revision: 0123456\nexperiment: no\n"
        "dataset_path:\n"
    )
    config = parse(["--config", str(file)])
    assert (config.run_id, config.label_names) == ("0012", "no,yes")
    assert (config.encoder_revision, config.experiment) == ("0123456", "no")
    assert config.dataset_path is None


def test_head_names_are_those_of_the_registry() -> None:
    from toolkit.model.heads import HEADS

    assert head_names() == list(HEADS)


def test_help_is_quick_and_explains_every_field() -> None:
    before = os.times()
    done = run_python("-c", "import sys; from toolkit.train import main; main(['--help'])")
    after = os.times()
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    for name, field in FIELDS.items():
        assert f"--{name}" in words
        assert (field.metadata.get("allowed") or "") in words
    help_texts = [action.help for action in build_parser()._actions if action.dest in FIELDS]
    assert len(help_texts) >= len(FIELDS) - 1
    assert all(len(text) > 4 for text in help_texts)
    # of its own work: other tests may hold the cores meanwhile
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    assert seconds < 1, "--help has to answer at once"


def test_bad_configuration_is_refused_before_torch_is_imported() -> None:
    code = """
import sys
from toolkit.train import main
code = main(["--lr=-1"])
assert not {"torch", "transformers", "datasets", "wandb"} & set(sys.modules), "imported"
sys.exit(code)
"""
    done = run_python("-c", code)
    assert done.returncode == 2, done.stderr
    assert "lr got -1" in done.stderr


def test_print_config_is_yaml() -> None:
    done = run_python(ROOT / "toolkit" / "train.py", "--lr=1e-3", "--print_config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["lr"] == 1e-3


def test_whole_numbers_that_agents_write_as_floats() -> None:
    assert parse(["--batch_size=16.0", "--max_steps=20.0"]).batch_size == 16
    with pytest.raises(ConfigError, match=r"batch_size got 16\.5"):
        parse(["--batch_size=16.5"])


def test_values_that_are_equal_but_of_another_type_stay_apart() -> None:
    """What was parsed before is remembered."""
    assert parse(["--seed=1"]).seed == 1
    with pytest.raises(ConfigError, match="seed got True"):
        parse(["--seed=true"])
