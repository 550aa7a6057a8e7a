"""Local files and hub folders: every format, every complaint, and the counts add up."""

import gzip
import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.programs import run_for_peak, run_python
from tests.tiny import build_cache, reviews
from toolkit import files
from toolkit.data import local
from toolkit.data.prepare import DataSpec
from toolkit.data.rows import SourceSpec
from toolkit.data.sources import open_source
from toolkit.data.validate import check
from toolkit.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def usable(path: Path, **choices: object) -> list[tuple[str, int]]:
    """Read a source and return (text, class) of its usable rows."""
    bad_rows = str(choices.pop("bad_rows", "error"))
    source = open_source(SourceSpec(str(path), **choices), path)
    split = check(source, bad_rows)["train"]
    return [
        (row.text, int(split.labels[number]))
        for number, row in enumerate(split.split.read())
        if split.usable[number]
    ]


def complaints(path: Path, **choices: object) -> str:
    with pytest.raises(DataError) as caught:
        usable(path, **choices)
    return str(caught.value)


ROWS = [("Good, really", "pos"), ('He said "no"\nand left', "neg"), ("", "pos"), ("🙂 é\0", "neg")]


def csv_text(rows: list[tuple[str, str]], delimiter: str = ",") -> str:
    quoted = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return "\n".join([delimiter.join(("text", "label")), *quoted]) + "\n"


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        return write(path, "\n".join(json.dumps({"text": t, "label": y}) for t, y in ROWS))
    if suffix == ".parquet":
        texts, labels = zip(*ROWS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
        return path
    return write(path, csv_text(ROWS, "\t" if suffix == ".tsv" else ","))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    expected = [(text, int(label == "pos")) for text, label in ROWS]
    assert usable(write_rows(tmp_path, suffix)) == expected


@pytest.mark.parametrize(
    ("encoding", "flag"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("utf-8-sig", "utf_8"),
        ("latin-1", "latin-1"),
        ("utf-16", "utf-16"),
        ("cp1252", "cp1252"),
    ],
)
def test_encodings(tmp_path: Path, encoding: str, flag: str) -> None:
    path = write(tmp_path / "x.csv", "text,label\ncafé très bon,1\nmauvais,0\n", encoding)
    assert usable(path, encoding=flag) == [("café très bon", 1), ("mauvais", 0)]


def test_wrong_encoding_is_named_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\ngood,1\ncafé,1\nbad,0\n", "latin-1")
    assert "1 row with text in another encoding (see --encoding): 2" in complaints(path)
    path = write(tmp_path / "y.csv", "text,label\ngood,1\n", "utf-16")
    assert "--encoding utf-16" in complaints(path)
    path = write(tmp_path / "z.csv", "text,label\ngood,1\n")
    assert "cannot be read" in complaints(path, encoding="no-such-encoding")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("1", "2"), (0, 1)),
        (("0", "1"), (0, 1)),
        (("Negative", "Positive"), (0, 1)),
        (("False", "True"), (0, 1)),
        (("-1", "1"), (0, 1)),
        (("0.0", "1.0"), (0, 1)),
    ],
)
def test_usual_label_pairs_need_no_flag(
    tmp_path: Path, values: tuple[str, str], expected: tuple[int, int]
) -> None:
    path = write(tmp_path / "x.csv", f"text,label\na,{values[1]}\nb,{values[0]}\n")
    assert usable(path) == [("a", expected[1]), ("b", expected[0])]


def test_other_label_names_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "title,body,verdict\nT,nice,thumbs up\n,bah,Thumbs Down\n")
    assert "--label_names" in complaints(path, text_column="title,body", label_column="verdict")
    write(tmp_path / "y.csv", "review;verdict\na;1\n")
    assert "it has ['review', 'verdict']" in complaints(tmp_path / "y.csv")
    rows = usable(
        path,
        text_column="title,body",
        label_column="verdict",
        label_names="thumbs down,thumbs up",
    )
    assert rows == [("T\nnice", 1), ("bah", 0)]


def test_typed_parquet_labels(tmp_path: Path) -> None:
    for labels in ([1, 0], [1.0, 0.0], [True, False]):
        table = pyarrow.table({"text": ["a", "b"], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert usable(tmp_path / "x.parquet") == [("a", 1), ("b", 0)]


def test_all_problems_in_one_error_with_at_most_20_rows(tmp_path: Path) -> None:
    lines = ['{"text": "fine", "label": "pos"}', '{"text": "fine", "label": "neg"}']
    lines += ['{"text": null, "label": "pos"}', '{"text": 5, "label": "pos"}', "not json", "[1]"]
    lines += ['{"text": "x", "label": "postive"}'] * 30
    lines += ['{"text": "\\ud800", "label": "pos"}', '{"text": "x", "label": null}']
    text = complaints(write(tmp_path / "x.jsonl", "\n".join(lines)))
    for part in (
        "1 row with null text: 3",
        "1 row with text that is not a string: 4",
        "1 row with no label: 38",
        "2 rows with not a JSON object: 5, 6",
        "30 rows with label 'postive', which is neither 'neg' nor 'pos'",
        "26 and 10 more",
        "text in another encoding (see --encoding): 37",
        "--bad_rows quarantine",
    ):
        assert part in text, text


def test_broken_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\ngood,1\na,b,c,1\nshort\nbad,0\n")
    text = complaints(path)
    assert "1 row with 4 fields where the header has 2: 2" in text
    assert "1 row with 1 fields where the header has 2: 3" in text
    unclosed = write(tmp_path / "y.csv", 'text,label\ngood,1\n"never closed,0\nbad,0\n')
    for bad_rows in ("error", "quarantine"):  # the rows behind it would be lost without a word
        text = complaints(unclosed, bad_rows=bad_rows, label_names="0,1")
        assert "1 row with broken quoting, so that it is unclear where the row ends" in text


def test_a_start_reads_files_for_their_hash_alone_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How quotes are meant is looked at when rows are read."""
    monkeypatch.setattr(files, "LARGE_BYTES", 0)
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)
    monkeypatch.setattr(local, "_quotes_are_text", lambda *_: 1 / 0)
    path = write(tmp_path / "x.tsv", 'text\tlabel\na "b\tpos\n')
    first = open_source(SourceSpec(str(path)), tmp_path / "cache")
    with pytest.raises(ZeroDivisionError):
        next(first.splits["train"].read())
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: 1 / 0)
    assert open_source(SourceSpec(str(path)), tmp_path / "cache").revision == first.revision


def test_quotes_may_enclose_columns_where_in_rows_they_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", '"text"\t"label"\nthe 27" tv\t1\n"Great" he said\t0\n')
    assert usable(path) == [('the 27" tv', 1), ('"Great" he said', 0)]


def test_a_quote_left_open_in_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not take the rest of the file into memory: what lies behind is read as rows again."""
    monkeypatch.setattr(local, "MAX_CELL", 1000)
    rows = [f"row {number},{number % 3}" for number in range(500)]
    path = write(tmp_path / "x.csv", "\n".join(["text,label", "good,1", '"open,0', *rows]))
    text = complaints(path, label_names="0,1")
    assert "1 row with broken quoting, so that it is unclear where the row ends" in text
    assert re.search(r"1\d\d rows with label '2'", text), text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.csv", "", "the file is empty"),
        ("x.csv", "text,label\n", "has no rows"),
        ("x.jsonl", "\n", "has no rows"),
        ("x.csv", "txt,label\na,1\n", "has no column 'text', it has ['txt', 'label']"),
        ("x.xlsx", "PK", "format is not one of"),
        ("x.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert expected in complaints(write(tmp_path / name, content))


RAW = [
    ('"Great tv, they say', "pos"),
    ("fine", "pos"),
    ('a 27" screen', "neg"),
    ('"good" movie', "pos"),
    ("bad,", "neg"),
]


def test_quotes_of_tsv_files_may_be_text(tmp_path: Path) -> None:
    """As Amazon's and GLUE's are; read as enclosing cells, they swallow the rows up to the next one."""
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in RAW)]
    path = write(tmp_path / "x.tsv", "\n".join(lines) + "\n")
    assert usable(path) == [(text, int(label == "pos")) for text, label in RAW]
    assert open_source(SourceSpec(str(path)), path).notes() == ["x.tsv: quotes are text"]
    swallowing = write(tmp_path / "y.tsv", "\n".join([*lines[:3], 'not 27"\tneg']) + "\n")
    assert [text for text, _ in usable(swallowing)] == ['"Great tv, they say', "fine", 'not 27"']


def test_quotes_that_enclose_cells_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"He said ""hi"""\t1\n"two\nlines"\t0\n')
    assert usable(path) == [('He said "hi"', 1), ("two\nlines", 0)]
    assert not open_source(SourceSpec(str(path)), path).notes()
    broken = write(tmp_path / "y.csv", 'text,label\n"good" movie,1\nbad,0\n')
    assert "broken quoting" in complaints(broken)


def test_blanks_around_column_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "id, text, label\n1,good,1\n2,bad,0\n")
    assert usable(path, label_column=" label") == [("good", 1), ("bad", 0)]


def test_signed_labels_need_no_flag(tmp_path: Path) -> None:
    assert usable(write(tmp_path / "x.csv", "text,label\na,+1\nb,-1\n")) == [("a", 1), ("b", 0)]


def test_long_label_names(tmp_path: Path) -> None:
    names = "n" * 45, "p" * 40
    rows = [("a", names[1]), ("b", names[0]), ("c", names[1] + " not")]
    path = write(tmp_path / "x.csv", "text,label\n" + "".join(f"{t},{y}\n" for t, y in rows))
    found = usable(path, label_names=",".join(names), bad_rows="quarantine")
    assert found == [("a", 1), ("b", 0)]


def test_a_flood_of_other_labels_hides_no_named_one(tmp_path: Path) -> None:
    junk = "".join(f"x,junk {n}\n" for n in range(10_050))
    path = write(tmp_path / "x.csv", f"text,label\n{junk}a,thumbs up\nb,thumbs down\n")
    found = usable(path, label_names="thumbs down,thumbs up", bad_rows="quarantine")
    assert found == [("a", 1), ("b", 0)]


def test_quarantine_is_offered_where_it_helps(tmp_path: Path) -> None:
    unknown = write(tmp_path / "x.csv", "text,label\na,up\nb,down\nc,0,0\n")
    assert "--bad_rows" not in complaints(unknown)
    broken = write(tmp_path / "y.csv", 'text,label\na,1\nb,0\nc,0,0\n"d,1\n')
    assert "--bad_rows" not in complaints(broken)
    helps = write(tmp_path / "z.csv", "text,label\na,1\nb,0\nc,0,0\n")
    assert "--bad_rows quarantine" in complaints(helps)


def test_label_names_that_are_one_label(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na,1\nb,0\n")
    assert "is one label twice" in complaints(path, label_names="1,1.0")


def test_an_encoding_of_parquet_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".parquet")
    assert "encoding has no effect on Parquet files" in complaints(path, encoding="latin-1")


def test_a_class_that_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na,no\nb,no\n")
    text = complaints(path, label_names="no,yes")
    assert "no usable row has the label 'yes'" in text


def test_missing_paths_and_names() -> None:
    with pytest.raises(DataError, match="did you mean snippets"):
        open_source(SourceSpec("snipets"), Path())
    with pytest.raises(DataError, match="neither a known name nor a path"):
        open_source(SourceSpec("/no/such/file.csv"), Path())


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (SourceSpec("snippets", text_column="body"), "text_column"),
        (SourceSpec("snippets", dataset_revision="abc"), "dataset_revision"),
        (SourceSpec("amazon_polarity", label_names="a,b"), "label_names"),
        (SourceSpec("x.csv", dataset_path="y"), "dataset_path"),
    ],
)
def test_settings_without_effect_are_refused(spec: SourceSpec, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} has no effect on the data set"):
        open_source(spec, Path())


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "text,label\na,1\nb,0\n")
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.csv", "test.csv"], ["test", "train"]),
        (["Train.CSV", "dev.csv", "test_final.csv"], ["test", "train", "validation"]),
        (["train/a.csv", "train/b.csv", "test/training_style.csv"], ["test", "train"]),
        (["data/train-00000-of-00001.csv", ".hidden/train.csv"], ["train"]),
        (
            [
                "train-0-00000-of-00002.csv",
                "train-0-00000-of-00002.d/a.csv",
                "train-0-00001-of-00002.csv",
            ],
            ["train"],
        ),
    ],
)
def test_folders_are_sorted_into_splits(
    tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    source = open_source(SourceSpec(str(folder_with(tmp_path, *names))), tmp_path)
    assert sorted(source.splits) == expected
    rows = sum(sum(1 for _ in split.read()) for split in source.splits.values())
    assert rows == 2 * len([name for name in names if not name.startswith(".")])


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["test.csv"], "found no train file"),
        (["train.csv", "more.csv"], "more.csv: name it train, validation or test"),
        (["train.csv", "test.json"], "test.json: format is not one of"),
        (["train.csv", "test.csv.xz"], "test.csv.xz: format is not one of"),
        (["train.csv", "train.tsv"], "train is there in several formats"),
        (["train.csv", "train_old.csv"], "is train train.csv, or that and train_old.csv"),
        (["train.csv", "dev.csv", "val.csv"], "is validation dev.csv, or that and val.csv"),
        (
            ["train-00000-of-00003.csv", "train-00002-of-00003.csv"],
            "train-00001-of-00003.csv is missing",
        ),
        (["train.csv", "../elsewhere/part.csv"], "test: a link to a folder is not followed"),
    ],
)
def test_no_file_of_a_folder_is_passed_over(
    tmp_path: Path, names: list[str], complaint: str
) -> None:
    folder = folder_with(tmp_path, *names)
    if (folder.parent / "elsewhere").exists():
        (folder / "test").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(DataError, match=complaint):
        open_source(SourceSpec(str(folder)), tmp_path)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_are_recognised_by_the_header(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "x.csv", csv_text(ROWS, delimiter))
    assert usable(path) == [(text, int(label == "pos")) for text, label in ROWS]


def test_stars_are_no_pair_and_never_guessed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.csv", "text,label\n" + "".join(f"a,{n % 5 + 1}\n" for n in range(20))
    )
    for bad_rows in ("error", "quarantine"):
        assert "['1', '2', '3', '4', '5']" in complaints(path, bad_rows=bad_rows)


def test_a_few_odd_labels_do_not_hide_the_pair(tmp_path: Path) -> None:
    lines = [f"a,{n % 2}" for n in range(30)] + ["b,7", "c,"]
    path = write(tmp_path / "x.csv", "\n".join(["text,label", *lines]))
    text = complaints(path)
    assert "1 row with label '7', which is neither '0' nor '1': 31" in text
    assert "1 row with no label: 32" in text
    assert "To go on without these rows" in text
    assert len(usable(path, bad_rows="quarantine")) == 30
    assert "two are needed" in complaints(write(tmp_path / "y.csv", "text,label\na,1\nb,1\n"))


def test_many_kinds_of_problems_stay_readable(tmp_path: Path) -> None:
    lines = [f"a,label {n}" for n in range(12_000)] + ["good,pos", "bad,neg"]
    text = complaints(write(tmp_path / "x.csv", "\n".join(["text,label", *lines])))
    assert len(text.splitlines()) < 20
    assert "further kinds of problems" in text
    assert "no usable row" not in text


def test_json_columns_may_be_absent_in_some_rows(tmp_path: Path) -> None:
    rows = ["broken", '{"text": "a", "label": 1}', '{"title": "t", "text": "b", "label": 0}']
    path = write(tmp_path / "x.jsonl", "\n".join(rows))
    assert usable(path, text_column="title,text", bad_rows="quarantine") == [("a", 1), ("t\nb", 0)]


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    odd = tmp_path / "odd.csv"
    odd.write_bytes(("text,label\n" + "a,1\nb,0\n" * 5000).encode("utf-16") + b"x")
    assert "cannot be read as csv in utf-16" in complaints(odd, encoding="utf-16")
    deep = write(tmp_path / "deep.jsonl", "[" * 100_000 + "\n" + '{"text": "a", "label": 1}')
    assert "1 row with not a JSON object: 1" in complaints(deep, label_names="0,1")
    array = pyarrow.array([b"fine", b"caf\xe9", b"bad"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *array.buffers()[1:])
    table = pyarrow.table({"text": text, "label": [1, 0, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    assert "text in another encoding (see --encoding): 2" in complaints(tmp_path / "bytes.parquet")


def test_quarantine_adds_up(tmp_path: Path, tiny_encoder: Path) -> None:
    good = [f"{text},{label}" for text, label in reviews(60)]
    bad = ["x,maybe", "one,two,three", "y,perhaps"]
    lines = ["text,label", *good[:20], bad[0], *good[20:40], *bad[1:], *good[40:]]
    path = write(tmp_path / "x.csv", "\n".join(lines))
    spec = DataSpec(str(path), bad_rows="quarantine")
    cache = build_cache(spec, tiny_encoder, tmp_path / "cache")
    kept = sum(len(split) for split in cache.splits.values())
    aside = [
        json.loads(line) for line in (cache.folder / "quarantine.jsonl").read_text().splitlines()
    ]
    assert cache.meta["source_rows"] == {"train": 63}
    assert cache.meta["quarantined"] == {"train": 3}
    assert kept == 60
    assert [record["row"] for record in aside] == [21, 42, 43]
    assert [record["text"] for record in aside] == ["x", "one | two | three", "y"]
    assert aside[0]["problem"].startswith("label 'maybe'")


def test_hub_layout_from_a_local_folder(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files named and shaped as in the repository, through the loading code of the hub path."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "copy"
    (folder / "amazon_polarity").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: amazon_polarity\n  data_files:\n"
        "  - split: train\n    path: amazon_polarity/train-*\n"
        "  - split: test\n    path: amazon_polarity/test-*\n---\n"
    )
    rows = [
        (int(label == "pos"), f"Title {n}", text) for n, (text, label) in enumerate(reviews(90))
    ]
    shards = {
        "train-00000-of-00002": rows[:40],
        "train-00001-of-00002": rows[40:70],
        "test-00000-of-00001": rows[70:],
    }
    for name, part in shards.items():
        columns = dict(
            zip(("label", "title", "content"), map(list, zip(*part, strict=True)), strict=True)
        )
        schema = pyarrow.schema(
            [("label", pyarrow.int64()), ("title", pyarrow.string()), ("content", pyarrow.string())]
        )
        pyarrow.parquet.write_table(
            pyarrow.table(columns, schema), folder / "amazon_polarity" / f"{name}.parquet"
        )
    spec = DataSpec("amazon_polarity", dataset_path=str(folder), train_rows=20, test_rows=5)
    cache = build_cache(spec, tiny_encoder, tmp_path / "cache")
    assert {name: len(split) for name, split in cache.splits.items()} == {
        "train": 20,
        "validation": 2,
        "test": 5,
    }
    assert cache.splits["train"].labels.sum() == 10
    assert cache.label_names == ("negative", "positive")
    source = open_source(spec, tmp_path)
    first = next(iter(source.splits["test"].read()))
    assert first.text == f"Title 70\n{rows[70][2]}"
    lost = folder / "amazon_polarity" / "train-00001-of-00002.parquet"
    lost.unlink()
    assert source.changed() == [lost]
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is missing"):
        open_source(spec, tmp_path)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "silent"])
def test_amazon_polarity_without_network_or_cache(
    tmp_path: Path, tiny_encoder: Path, endpoint: str, silent_server: str
) -> None:
    """A refused connection, and a server that never answers: one clear error within 30 s."""
    url = silent_server if endpoint == "silent" else endpoint
    code = "import sys; from toolkit.prepare import main; sys.exit(main(sys.argv[1:]))"
    started = time.monotonic()
    flags = ["--dataset=amazon_polarity", f"--cache_dir={tmp_path}", "--max_length=64"]
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")}
    done = run_python("-c", code, *flags, f"--encoder={tiny_encoder}", **environment)
    assert time.monotonic() - started < 30
    assert done.returncode == 3, done.stderr
    for part in ("fancyzhx/amazon_polarity", "--dataset snippets", "HF_HOME", "--dataset PATH"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_50_mb_text_is_cut_and_counted(tmp_path: Path, tiny_encoder: Path) -> None:
    rows = reviews(40)
    rows[3] = ("great " * 8_500_000, "pos")
    rows[4] = ("x" * 50_000_000, "neg")
    path = write(tmp_path / "x.csv", csv_text(rows))
    code = """
import sys
from pathlib import Path
from toolkit.data.prepare import DataSpec, prepare
from toolkit.data.sources import open_source
spec, cache = DataSpec(sys.argv[1]), Path(sys.argv[3])
cache = prepare(spec, open_source(spec, cache), Path(sys.argv[2]), cache)
print(cache.meta["clipped_texts"])
"""
    peak, said = run_for_peak("-c", code, path, tiny_encoder, tmp_path / "cache")
    assert int(said.split()[-1]) == 2
    assert peak < 1500 * 2**20


def test_awkward_texts_do_not_crash(tmp_path: Path, tiny_encoder: Path) -> None:
    texts = ["", " ", "\0\0", "🙂" * 50, "שלום عليكم", "a\u0301\u200d", "\ufeffgreat", "\r\n", "�"]
    rows = [(text, ("neg", "pos")[number % 2]) for number, text in enumerate(texts * 4)]
    path = tmp_path / "x.jsonl"
    write(path, "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    cache = build_cache(DataSpec(str(path)), tiny_encoder, tmp_path / "cache")
    assert sum(len(split) for split in cache.splits.values()) == len(rows)
    lengths = np.concatenate([s.lengths(np.arange(len(s))) for s in cache.splits.values()])
    assert lengths.min() == 2  # [CLS] [SEP]


def test_columns_that_are_there_twice(tmp_path: Path) -> None:
    """Which of them is meant nobody can tell."""
    rows = write(tmp_path / "rows.csv", "label,text,label\n0,good,1\n1,bad,0\n")
    assert "has 2 columns 'label'; rename all but one" in complaints(rows)
    table = pyarrow.table([["good"], ["1"], ["0"]], names=["text", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "has 2 columns 'label'" in complaints(tmp_path / "rows.parquet")
    others = write(tmp_path / "others.csv", "x,text,x,label\n0,good,1,1\n1,bad,0,0\n")
    assert len(usable(others)) == 2, "those that nobody asks for may be"


def test_columns_that_are_named_twice(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.csv", "text,label\ngood,1\nbad,0\n")
    said = complaints(rows, text_column="text, text")
    assert "text_column and label_column name text twice: once is enough" in said
    assert "name label twice" in complaints(rows, text_column="text,label")


def test_a_compressed_file_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(gzip.compress(b"text,label\ngood,1\nbad,0\n"))
    assert "it is compressed (gzip); unpack it first" in complaints(path)
