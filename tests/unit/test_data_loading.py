"""Rows from files, folders and names; carving; what is wrong with them."""

import argparse
import csv
import gzip
import json
import logging

import datasets
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from hf_encdec_distill import data
from hf_encdec_distill.cli._inputs import load_splits, load_test_rows
from hf_encdec_distill.data.loading import load_pairs, load_tables, save_pairs


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def _frame(count, start=0):
    return pd.DataFrame(
        {
            "code": [f"code, {n}\nünï" for n in range(start, start + count)],
            "text": [f"t\t{n}" for n in range(start, start + count)],
        }
    )


WRITERS = {
    "rows.csv": lambda frame, file: frame.to_csv(file, index=False),
    "rows.tsv": lambda frame, file: frame.to_csv(file, index=False, sep="\t"),
    "rows.json": lambda frame, file: frame.to_json(file, orient="records"),
    "rows.jsonl": lambda frame, file: frame.to_json(file, orient="records", lines=True),
    "ROWS.PARQUET": lambda frame, file: frame.to_parquet(file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_rows(tmp_path, name):
    frame = _frame(40)
    WRITERS[name](frame, tmp_path / name)
    splits = load_pairs(tmp_path / name, "code", "text")
    assert {split: rows.column_names for split, rows in splits.items()} == {
        split: ["source", "target"] for split in ("train", "validation", "test")
    }
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 26, "validation": 6, "test": 8}
    pairs = [(row["source"], row["target"]) for rows in splits.values() for row in rows]
    assert sorted(pairs) == sorted(zip(frame["code"], frame["text"]))


def test_folder_with_a_file_for_each_split(tmp_path):
    for name, start in (("train", 0), ("validation", 100), ("test", 200)):
        _frame(5, start).to_csv(tmp_path / f"{name}.csv", index=False)
    splits = load_pairs(str(tmp_path), "code", "text")
    assert splits["validation"]["source"][0] == "code, 100\nünï"
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 5, "validation": 5, "test": 5}


def test_files_by_the_names_of_their_splits(tmp_path):
    _frame(20).to_csv(tmp_path / "a.csv", index=False)
    _frame(5, 100).to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    files = {"train": tmp_path / "a.csv", "validation": str(tmp_path / "b.jsonl")}
    splits = load_pairs(files, "code", "text")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 16, "validation": 5, "test": 4}
    assert splits["validation"]["target"][0] == "t\t100"
    del files["train"]
    assert {name: len(rows) for name, rows in load_pairs(files, "code", "text").items()} == {"validation": 5}


@pytest.mark.parametrize("given_as", ["file", "folder", "mapping", "stream"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_text_that_pandas_takes_for_a_missing_number_is_text(tmp_path, caplog, suffix, given_as):
    """None, NA and null are answers, an empty cell is none: as Python's csv module reads the file."""
    words = ["None", "NA", "N/A", "null", "NULL", "NaN", "nan", "n/a", "<NA>", "-1.#IND", "", "Yes."]
    file = tmp_path / "data" / f"train.{suffix}"
    file.parent.mkdir()
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerow(["source", "target"])
        writer.writerows([f"{word} {n}" if n % 2 else word, word] for n in range(4) for word in words)
    with file.open("a", newline="") as stream:
        stream.write("unquoted" + ("\t" if suffix == "tsv" else ",") + "\n")
    with file.open(newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t" if suffix == "tsv" else ","))[1:]
    expected = sorted(pair for pair in rows if all(pair))
    assert ["None", "None"] in expected and len(expected) == 4 * (len(words) - 1)
    if given_as == "stream":
        stream = load_tables(file, None, ["source", "target"], streaming=True)["train"]
        found = [[row["source"], row["target"]] for row in stream if row["source"] and row["target"]]
    else:
        splits = load_pairs({"file": file, "folder": file.parent, "mapping": {"train": file}}[given_as])
        found = [[row["source"], row["target"]] for split in splits.values() for row in split]
        assert f"{len(rows) - len(expected)} of {len(rows)} rows left out" in caplog.text
    assert sorted(found) == expected


@pytest.mark.parametrize("given_as", ["file", "folder"])
def test_quotes_that_enclose_no_cell_are_text(tmp_path, caplog, given_as):
    """Two cells of a TSV that begin with a quote, and none that ends in one: no line between them is lost."""
    sources = [f"{chr(34) if n in (3, 20) else ''}src {n}" for n in range(40)]
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.tsv"
    file.write_text("source\ttarget\n" + "".join(f"{source}\ttgt {n}\n" for n, source in enumerate(sources)))
    splits = load_pairs({"file": file, "folder": file.parent}[given_as])
    assert sorted(source for split in splits.values() for source in split["source"]) == sorted(sources)
    assert "quotes that do not enclose whole cells" in caplog.text


@pytest.mark.parametrize("given_as", ["file", "folder", "compressed"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("row", ["a {n}|b|note", "a {n}|b|", "hi| a {n}|b", '"a| {n}"|"b"|""'])
def test_rows_that_are_longer_than_the_header_are_refused(tmp_path, suffix, row, given_as):
    """To pandas the first cell is an index: the source would be b, and the target what follows it."""
    text = "source|target\n\n" + "".join(row.format(n=n) + "\n" for n in range(20))
    text = text.replace("|", {"csv": ",", "tsv": "\t"}[suffix])
    file = tmp_path / "data" / f"train.{suffix}"
    file.parent.mkdir()
    if given_as == "compressed":
        file = file.with_name(f"{file.name}.gz")
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    with pytest.raises(
        ValueError, match=f"^{file}: the first row has 3 cells, and the header has 2: name each column"
    ):
        load_pairs(file if given_as == "file" else file.parent)


def test_one_long_row_is_named(tmp_path):
    for rows, message in (
        ("hi, x,y\na,b\n", "the first row has 3 cells, and the header has 2"),
        ("a,b\nhi, x,y\n", "Expected 2 fields in line 3, saw 3"),
    ):
        (tmp_path / "a.csv").write_text("source,target\n" + rows)
        with pytest.raises(ValueError, match=f"a.csv.*{message}"):
            load_pairs(tmp_path / "a.csv")


def test_columns_that_a_folder_describes_itself(tmp_path):
    """With an index among them, which is then no mistake."""
    (tmp_path / "train.csv").write_text("target;source\n" + "".join(f"{n};b {n};a, {n}\n" for n in range(20)))
    with pytest.raises(ValueError, match="cells that are separated by ';', expected ','"):
        load_pairs(tmp_path)
    config = 'configs:\n- config_name: default\n  data_files: train.csv\n  sep: ";"\n'
    (tmp_path / "README.md").write_text(f"---\n{config}---\n")
    with pytest.raises(ValueError, match="has 3 cells, and the header has 2: .* leave out ';' at the ends"):
        load_pairs(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{config}  index_col: 0\n---\n")
    pairs = sorted((row["source"], row["target"]) for rows in load_pairs(tmp_path).values() for row in rows)
    assert pairs == sorted((f"a, {n}", f"b {n}") for n in range(20))


@pytest.mark.parametrize("given_as", ["file", "folder"])
def test_quotes_behind_backslashes_are_refused_in_a_csv(tmp_path, caplog, given_as):
    """What pandas would make of them is no text of theirs. Backslashes in a file of Python's csv module are text."""
    rows = [[f'a "{n}" x\\', f'\\"{n}\n"'] for n in range(20)]
    file = tmp_path / "data" / "train.csv"
    file.parent.mkdir()
    given = {"file": file, "folder": file.parent}[given_as]
    with file.open("w", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["source", "target"], *rows])
    found = [[row["source"], row["target"]] for split in load_pairs(given).values() for row in split]
    assert sorted(found) == sorted(rows) and not caplog.records
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL, escapechar="\\", doublequote=False)
        writer.writerows([["source", "target"], *rows])
    with pytest.raises(ValueError, match=r'train.csv, line 2: a quote inside of a cell is written \\", expected two'):
        load_pairs(given)


def test_a_quote_that_encloses_no_cell_of_a_csv_is_told(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("source,target\n" + "".join(f'"a {n}" ,b\n' for n in range(20)))
    assert "a 7 " in {source for split in load_pairs(tmp_path / "a.csv").values() for source in split["source"]}
    assert "a.csv, line 2: a quote that does not enclose a whole cell" in caplog.text


def test_saved_pairs_come_back(tmp_path):
    pairs = [{"source": f"a\n{n} ü", "target": f'"{n}"'} for n in range(20)]
    assert save_pairs(iter(pairs), tmp_path / "new" / "a.jsonl") == 20
    splits = load_pairs(tmp_path / "new" / "a.jsonl")
    assert sorted((row for rows in splits.values() for row in rows), key=lambda row: int(row["target"][1:-1])) == pairs
    with pytest.raises(ValueError, match="no rows to write"):
        save_pairs([], tmp_path / "b.jsonl")

    def broken():
        yield pairs[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pairs(broken(), tmp_path / "b.jsonl")
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ""] == []

    (tmp_path / "c.jsonl.partial").write_text("another process is writing this")
    assert save_pairs(pairs, tmp_path / "c.jsonl") == 20
    assert (tmp_path / "c.jsonl.partial").read_text() == "another process is writing this"


@pytest.mark.parametrize("one", [True, False])
def test_what_save_to_disk_wrote(tmp_path, one):
    rows = Dataset.from_pandas(_frame(20))
    (rows if one else DatasetDict(train=rows, dev=rows.select([3]), extra=rows)).save_to_disk(tmp_path / "saved")
    splits = load_pairs(tmp_path / "saved", "code", "text")
    if one:
        assert [len(splits[name]) for name in ("train", "validation", "test")] == [13, 3, 4]
    else:
        assert splits["validation"]["target"][:] == ["t\t3"]  # "dev" is validation, and only test is carved
        assert [len(splits[name]) for name in ("train", "validation", "test")] == [16, 1, 4]


def test_columns_may_swap_names(tmp_path):
    frame = _frame(20).rename(columns={"code": "target", "text": "source"})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert load_pairs(tmp_path / "a.csv", "target", "source")["train"]["source"][0].startswith("code")


def test_no_dataset_is_the_built_in_task(monkeypatch):
    from hf_encdec_distill.data import python_docstrings

    monkeypatch.setattr(python_docstrings, "load_python_docstrings", lambda **options: options)
    assert load_pairs(cache_dir="there", progress=False) == {"cache_dir": "there", "progress": False}


def test_carving_depends_on_the_rows_and_not_on_their_order(tmp_path):
    frame = _frame(2000)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.sample(frac=1, random_state=1).to_csv(tmp_path / "b.csv", index=False)
    a, b = (load_pairs(tmp_path / name, "code", "text") for name in ("a.csv", "b.csv"))
    for name, size in {"test": 100, "validation": 95, "train": 1805}.items():  # 5 % of 2000, 5 % of the 1900 left
        assert len(a[name]) == size
        assert sorted(a[name]["source"]) == sorted(b[name]["source"])


def test_rows_with_the_same_source_stay_together(tmp_path):
    frame = pd.DataFrame({"source": [f"s{n % 30}" for n in range(300)], "target": [f"t{n}" for n in range(300)]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    sources = [set(rows["source"]) for rows in load_pairs(tmp_path / "a.csv").values()]
    assert [len(group) for group in sources] == [20, 4, 6]  # a fifth of 30, a fifth of the 24 left
    assert sum(map(len, sources)) == len(set.union(*sources)) == 30


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    frame = pd.DataFrame({"source": ["a", None, " \n", *"bcdefg"], "target": ["A", "B", "C", "", *"DEFGH"]})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    with caplog.at_level(logging.WARNING):
        splits = load_pairs(tmp_path / "a.jsonl")
    assert sorted(text for rows in splits.values() for text in rows["source"]) == ["a", *"cdefg"]
    assert "3 of 9 rows left out" in caplog.text


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"code": ["a"], "text": ["b"]}, {}, "no column 'source'; the columns are 'code', 'text' .*--source-column"),
        (
            {"source": ["a"], "text": ["b"]},
            {},
            "no column 'target'; the columns are 'source', 'text' .*--target-column",
        ),
        ({"source": ["a"], "target": [1]}, {}, "a.jsonl, line 1: 'target' is 1, expected text: put it in quotes"),
        ({"source": ["a"], "target": [["b"]]}, {}, r"a.jsonl, line 1: 'target' is \['b'\], expected text"),
        ({"source": ["a"], "target": ["b"]}, {"target_column": "source"}, "both column 'source'"),
        (
            {"source": ["a"], "target": ["b"], "pixel_values": [[[1.0]]]},
            {},
            "'pixel_values' holds images.*from Python",
        ),
        ({"source": [""], "target": ["b"]}, {}, r"\(train\): none of the 1 rows has text"),
        ({"source": [None], "target": ["b"]}, {}, "none of the 1 rows has text"),
        (
            {"source": ["a", "b", "a"], "target": ["c", "d", "e"]},
            {},
            "has 2 distinct sources, too few to hold out test and validation: give at least 3, or a folder",
        ),
    ],
)
def test_columns_and_rows_that_cannot_do(tmp_path, columns, arguments, message):
    pd.DataFrame(columns).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match=message):
        load_pairs(tmp_path / "a.jsonl", **arguments)


def test_images_that_are_left_out_are_named(tmp_path, caplog):
    rows = Dataset.from_pandas(_frame(20)).map(lambda row: {"photo": {"bytes": b"", "path": None}})
    rows.cast_column("photo", datasets.Image(decode=False)).save_to_disk(tmp_path / "saved")
    with caplog.at_level(logging.WARNING, logger="hf_encdec_distill.data.loading"):
        load_pairs(tmp_path / "saved", "code", "text")
    assert "column 'photo' holds images, which are left out" in caplog.text


def test_splits_none_of_which_is_train(tmp_path):
    rows = Dataset.from_pandas(_frame(3))
    DatasetDict(one=rows, two=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has the splits one, two: expected one that is called 'train'"):
        load_pairs(tmp_path / "saved", "code", "text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gone.csv", "gone.csv is not there"),
        ("gone.parquet", "gone.parquet is not there"),
        ("nobody/no-such-dataset", "neither a readable folder nor a dataset that the Hub gives us"),
    ],
)
def test_datasets_that_are_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(name)


def test_a_copy_that_cannot_be_written_is_not_a_fault_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    (tmp_path / "pairs.csv").write_text("source,target\na,b\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "no folder" / "datasets")
    with pytest.raises(ValueError, match=r"pairs.csv was not read, .* \(Not a directory\): .* HF_DATASETS_CACHE"):
        load_pairs(tmp_path / "pairs.csv")


def test_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"suffix '.xlsx', expected one of .csv, .tsv"):
        load_pairs(tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv gives no rows, read as csv: it is empty"),
        ("a.csv", "source,target\n", "a.csv gives no rows, read as csv: it has a header and no rows"),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", "{not json", r"a.json, line 1 is not JSON \(Expecting property name"),
        ("a.json", '[{"source": "x",\n"target"]', r"a.json is not JSON \(Expecting ':' delimiter: line 2"),
        ("a.jsonl", '{"source": "x"}\n\n{"source"\n', r"a.jsonl, line 3 is not JSON \(Expecting ':' delimiter"),
        ("a.jsonl", '{"source": "x", "target": "y"}\n' * 2 + '{"target": true}', "line 3: 'target' is True, expected"),
        (
            "a.jsonl",
            '{"target": "y"}\n{"target": "\\ud83d"}',
            r"a.jsonl, line 2: 'target' is '\\ud83d', no valid Unicode",
        ),
        ("a.csv", "source;target\nx;y\n", "columns are 'source;target': separate the cells .* by commas, not by ';'"),
        ("a.csv", "source, target\nx,y\n", r"are 'source', ' target' \(a CSV has to begin with a line of them\)"),
        ("a.csv", "source,target\ncaf\xe9,x\n", r"a.csv is not in UTF-8 \('utf-8' codec .*: save it as UTF-8"),
        ("a.jsonl", '{"source": "caf\xe9"}\n', r"a.jsonl is not in UTF-8 \('utf-8' codec .*: save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("given_as", ["file", "folder"])
def test_files_that_cannot_be_read(tmp_path, name, content, message, given_as):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / name
    file.write_text(content, encoding="latin-1")
    if given_as == "folder" and "read as csv" in message:
        message = "data is neither a readable folder nor a dataset"
    with pytest.raises(ValueError, match=message):
        load_pairs(file if given_as == "file" else file.parent)


@pytest.mark.parametrize("given_as", ["file", "folder"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_text_that_looks_like_something_else_stays_as_it_stands(tmp_path, suffix, given_as):
    """Labels, numbers, truth values and dates, each of which is all that a column has."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / f"train.{suffix}"
    for targets in (["0", "1"], ["007", "1.0"], ["true", "false"], ["2024-01-01"], ["2024-01-01 00:00:00"]):
        rows = [{"source": f"{n}", "target": targets[n % len(targets)]} for n in range(20)]
        with file.open("w", newline="") as stream:
            if suffix in ("csv", "tsv"):
                writer = csv.DictWriter(stream, ["source", "target"], delimiter="\t" if suffix == "tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
            else:
                stream.write(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
        splits = load_pairs(file if given_as == "file" else file.parent)
        found = sorted((dict(row) for split in splits.values() for row in split), key=lambda row: int(row["source"]))
        assert found == rows


def test_columns_that_are_no_text(tmp_path):
    pd.DataFrame({"source": ["a"], "target": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="Column 'target' holds int64, expected text: .* or save it as text"):
        load_pairs(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["test", "dev"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_that_are_named_after_another_split_are_not_trained_on(tmp_path, name, suffix):
    frame, folder = _frame(30), tmp_path / "data"
    folder.mkdir()
    WRITERS[f"rows.{suffix}"](frame, folder / f"{name}.{suffix}")
    splits = load_pairs(folder, "code", "text")
    assert {split: len(rows) for split, rows in splits.items()} == {{"dev": "validation"}.get(name, name): 30}
    arguments = argparse.Namespace(dataset=str(folder), source_column="code", target_column="text")
    assert sorted(load_test_rows(arguments)["source"]) == sorted(frame["code"])
    with pytest.raises(ValueError, match="has no training rows, only the split"):
        load_splits(**vars(arguments))


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_ENCDEC_DISTILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data.cache_root() == tmp_path / ".cache/hf_encdec_distill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_root() == tmp_path / "xdg/hf_encdec_distill"
    monkeypatch.setenv("HF_ENCDEC_DISTILL_CACHE", "~/mine")
    assert data.cache_root() == tmp_path / "mine"
    assert data.cache_root(tmp_path / "given") == tmp_path / "given"


def test_names_of_the_package():
    assert {name for name in data.__all__ if getattr(data, name) is None} == set()
    assert data.load_pairs is load_pairs
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        data.nothing  # noqa: B018


def test_splits_by_each_name_that_they_have(tmp_path):
    """By any name that a split has on the Hub; one that is none is not passed over."""
    files = {}
    for name in ("train", "val", "test"):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"source": f"{name} {i}", "target": "x"}) + "\n" for i in range(9)))
    splits = load_pairs(files)
    assert {name: split["source"][0] for name, split in splits.items()} == {
        "train": "train 0",
        "validation": "val 0",
        "test": "test 0",
    }
    for wrong in ({"training": files["train"], "train": files["test"]}, {"trian": files["train"]}):
        with pytest.raises(ValueError, match="name each once, by one of train, training, validation"):
            load_pairs(wrong)
