"""Rows out of plain text: what each row holds, that no token is lost, where the stream can be cut and taken up."""

import itertools
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict
from datasets.distributed import split_dataset_by_node
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_encdec_distill.data import find_sentinels, load_plain_text, plain_text
from hf_encdec_distill.data.plain_text import R_DENOISING, X_DENOISING, draw_spans, find_seams, prefix_row, span_row


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


NEWLINE = "\n"


def code(number, lines=12):
    """Text with indented lines and words that depend on `number`."""
    body = (f"    if x{number} > {i}:\n        return 'räd {number * i}'\n" for i in range(lines))
    return f"def f{number}(x):\n" + "".join(body) + "\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE in which most line ends are merged with indentation; two special tokens are free."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|end|>", "<repo>", "<file>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([code(i) for i in range(4)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    assert "Ċ" in tokenizer.get_vocab() and "ĊĠĠĠ" in tokenizer.get_vocab()
    return tokenizer


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for number in range(40):
        (folder / ("deep" if number % 2 else "") / f"{number}.py").write_text(code(number), encoding="utf-8")
    return folder


def newline(tokenizer):
    return tokenizer.get_vocab()["Ċ"]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def held_out(*args, **options):
    return list(load_plain_text(*args, split="validation", **options))


# One window -> one row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        # No start token within a quarter of the window, 3 tokens: split where it was asked for.
        (11, ([*range(10, 21)], [21], [*range(10, 22)], 11)),
        # The nearest token that holds the start token 9 is 15 = 8 + 9 + 7 7, at place 5.
        (6, ([10, 11, 12, 13, 14, 8], [7, 7, *range(16, 22)], [10, 11, 12, 13, 14, 8, 9, 7, 7, *range(16, 22)], 7)),
        (2, ([10, 11, 12, 13, 14, 8], [7, 7, *range(16, 22)], [10, 11, 12, 13, 14, 8, 9, 7, 7, *range(16, 22)], 7)),
        (1, ([10], [*range(11, 22)], [*range(10, 22)], 1)),
    ],
)
def test_split_by_hand(point, expected):
    row = prefix_row([*range(10, 22)], point, 9, {9: ([], []), 15: ([8], [7, 7])})
    assert tuple(row.values()) == expected
    assert list(row) == ["input_ids", "labels", "teacher_input_ids", "teacher_labels_start"]


def test_split_of_the_nearest_of_several():
    row = prefix_row([1, 2, 9, 3, 4, 5, 9, 6, 7, 9, 8, 9], 6, 9, {9: ([], [])})
    assert (row["input_ids"], row["labels"]) == ([1, 2, 9, 3, 4, 5], [6, 7, 9, 8, 9])
    assert row["teacher_input_ids"] == [1, 2, 9, 3, 4, 5, 9, 6, 7, 9, 8, 9]  # the text
    row = prefix_row([1, 2, 9, 3], 2, None, {})
    assert (row["input_ids"], row["labels"], row["teacher_labels_start"]) == ([1, 2], [9, 3], 2)


def test_a_start_token_at_either_end_is_no_place_to_split():
    row = prefix_row([9, 1, 2, 9], 2, 9, {9: ([], [])})
    assert (row["input_ids"], row["labels"]) == ([9, 1], [2, 9])


def test_spans_by_hand():
    row = span_row([*range(10, 20)], [(2, 4), (5, 6), (7, 10)], [1, 2], 3)
    assert row == {
        "input_ids": [10, 11, 1, 14, 2, 16, 1],
        "labels": [1, 12, 13, 2, 15, 1, 17, 18, 19, 3],
        "teacher_input_ids": [*range(10, 20)],
        # Column 1 predicts what is in column 2, and so on; sentinels and the end are not the teacher's.
        "teacher_label_positions": [-1, 1, 2, -1, 4, -1, 6, 7, 8, -1],
    }


def test_every_division_is_as_likely():
    """8 tokens, 4 of them in 2 spans: 3 ways to cut 4 in two, for the hidden ones and for the others."""
    rng = np.random.default_rng(0)
    count = Counter(tuple(draw_spans(8, 2.0, 0.5, rng)) for _ in range(9000))
    ways = [((a, a + b), (a + b + 4 - a, 8)) for a in (1, 2, 3) for b in (1, 2, 3)]
    assert set(count) == set(ways)
    assert all(abs(n - 1000) < 5 * np.sqrt(1000 * 8 / 9) for n in count.values())


@pytest.mark.parametrize(("mean_span", "rate"), [R_DENOISING, X_DENOISING])
@pytest.mark.parametrize("length", [16, 100, 512])
def test_rates_of_spans(mean_span, rate, length):
    rng = np.random.default_rng(1)
    for _ in range(200):
        spans = draw_spans(length, mean_span, rate, rng)
        hidden = [last - first for first, last in spans]
        assert sum(hidden) == round(rate * length)
        assert len(spans) == max(1, round(sum(hidden) / mean_span))
        bounds = [0, *itertools.chain(*spans), length]
        assert bounds == sorted(bounds) and len(set(bounds)) == len(bounds) - 1 and bounds[-2] == length


def test_seams_are_the_same_text(tokenizer):
    seams = find_seams(tokenizer, newline(tokenizer))
    with_newline = {token for token, i in tokenizer.get_vocab().items() if "Ċ" in token}
    assert {tokenizer.convert_ids_to_tokens(i) for i in seams} == with_newline and len(seams) > 4
    for token, (before, after) in seams.items():
        assert tokenizer.decode([*before, newline(tokenizer), *after]) == tokenizer.decode([token])
    assert seams[tokenizer.get_vocab()["ĊĠĠĠ"]] == ([], ids(tokenizer, "   "))
    assert find_seams(tokenizer, tokenizer.pad_token_id) == {tokenizer.pad_token_id: ([], [])}


def test_sentinels(tokenizer, make_bpe_tokenizer):
    assert find_sentinels(tokenizer) == [2, 3]
    other = make_bpe_tokenizer()  # EOS and PAD are <|im_end|>, and <|im_start|> is in the chat template
    assert other.convert_ids_to_tokens(find_sentinels(other)) == ["<|endoftext|>"]
    with pytest.raises(ValueError, match="no free special token.*add_special_tokens.*resize_token_embeddings"):
        find_sentinels(make_bpe_tokenizer(pad_token="<|endoftext|>"))
    other.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    assert other.convert_ids_to_tokens(find_sentinels(other)) == ["<extra_id_0>", "<extra_id_1>"]


# A text -> rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [(0.5, 0.5), (0.2, 0.8)])
def test_every_character_is_in_one_row_in_order(tokenizer, corpus, share):
    """The start token stands where it stands in the text, and the three parts are the text."""
    start = newline(tokenizer)
    rows = held_out(corpus, tokenizer, window=64, start_token_id=start, prefix_share=share)
    text = ""
    for row in rows:
        assert row["teacher_input_ids"] == [*row["input_ids"], start, *row["labels"]]
        assert row["teacher_labels_start"] == len(row["input_ids"]) + 1
        assert 32 <= len(row["teacher_input_ids"]) <= 68  # one token may have become several
        assert share[0] - 0.26 <= len(row["input_ids"]) / len(row["teacher_input_ids"]) <= share[1] + 0.26
        text += tokenizer.decode(row["teacher_input_ids"])
    documents = {code(number) for number in range(40)}
    found = [part + "\n\n" for part in text.split("\n\n\n")]
    assert set(text.replace("\n\n\ndef", "\n\n\n\0def").split("\0")) <= documents and len(found) >= 2
    spread = np.std([len(row["input_ids"]) / len(row["teacher_input_ids"]) for row in rows])
    assert (spread > 0.1) == (share != (0.5, 0.5))


def test_every_token_is_in_one_row_without_a_start_token(tokenizer, tmp_path):
    file = tmp_path / "a.txt"
    text = "ünï <repo> code <|end|>\n" * 300
    file.write_text(text, encoding="utf-8")
    (row, *_), rows = itertools.tee(load_plain_text(file, tokenizer, window=100).take(50))
    assert list(row) == ["input_ids", "labels", "teacher_input_ids", "teacher_labels_start"]
    expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    count = -(-len(expected) // 100)
    windows = {tuple(expected[len(expected) * i // count : len(expected) * (i + 1) // count]) for i in range(count)}
    seen = set()
    for row in itertools.islice(load_plain_text(file, tokenizer, window=100), count):
        assert row["input_ids"] + row["labels"] == row["teacher_input_ids"]
        assert row["teacher_labels_start"] == len(row["input_ids"]) == round(len(row["teacher_input_ids"]) / 2)
        seen.add(tuple(row["teacher_input_ids"]))
    assert seen == windows
    assert not set(tokenizer.all_special_ids) & set(expected)


def invert(row, sentinels):
    """The window that a denoised row was made of, and of each label the place in it (None: sentinel or end)."""
    spans, places = [], []
    for token in row["labels"][:-1]:
        if token in sentinels:
            spans.append([])
        else:
            spans[-1].append(token)
    window = []
    for token in row["input_ids"]:
        if token in sentinels:
            places += [None, *range(len(window), len(window) + len(spans[0]))]
            window += spans.pop(0)
        else:
            window.append(token)
    return window, [*places, None]


def test_denoised_rows_give_the_text_back(tokenizer, corpus):
    rows = held_out(corpus, tokenizer, objective="span_denoising", window=128)
    text, hidden, tokens = "", [], 0
    for row in rows:
        window, places = invert(row, (2, 3))
        assert window == row["teacher_input_ids"]
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert row["teacher_label_positions"] == [-1 if place is None else place - 1 for place in places]
        text += tokenizer.decode(window)
        hidden.append(sum(place is not None for place in places) / len(window))
        tokens += len(window)
    assert set(text.replace("\n\n\ndef", "\n\n\n\0def").split("\0")) <= {code(number) for number in range(40)}
    rates = Counter(round(rate, 1) for rate in hidden)
    assert 0.5 in rates and {0.1, 0.2} & set(rates) and set(rates) <= {0.1, 0.2, 0.5}


def test_ul2_is_half_prefixes_and_half_spans(tokenizer, corpus):
    start = newline(tokenizer)
    rows = list(load_plain_text(corpus, tokenizer, objective="ul2", window=64, start_token_id=start).take(1000))
    assert {tuple(row) for row in rows} == {("input_ids", "labels", "teacher_input_ids", "teacher_label_positions")}
    denoised = [row for row in rows if row["labels"][0] in (2, 3)]
    assert abs(len(denoised) / 1000 - 0.5) < 5 * 0.5 / np.sqrt(1000)
    masked = np.array([len(row["labels"]) / len(row["teacher_input_ids"]) > 0.4 for row in denoised])
    assert abs(masked.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(denoised))
    for row in rows:
        asked = [(p, label) for p, label in zip(row["teacher_label_positions"], row["labels"]) if p >= 0]
        assert all(row["teacher_input_ids"][place + 1] == label for place, label in asked)
        assert len(asked) == len(row["labels"]) or row["labels"][0] in (2, 3)


def test_windows_begin_with_the_bos_of_a_tokenizer_that_has_one(make_bpe_tokenizer, corpus):
    for add_bos in (True, False):
        rows = held_out(corpus, make_bpe_tokenizer(add_bos=add_bos), window=64)
        assert all((row["input_ids"][0] == 3) == add_bos and 3 not in row["labels"] for row in rows)
        assert 56 <= max(len(row["teacher_input_ids"]) for row in rows) <= 64


# The stream ----------------------------------------------------------------------------------------------------------


def test_read_again_it_is_the_same_and_each_pass_draws_anew(tokenizer, corpus):
    def rows(**options):
        return load_plain_text(corpus, tokenizer, window=64, prefix_share=(0.2, 0.8), shuffle_buffer=50, **options)

    whole = len({str(row["teacher_input_ids"]) for row in rows().take(500)})
    two_passes = list(rows().take(2 * whole))
    assert list(rows().take(2 * whole)) == two_passes
    assert list(rows().skip(whole + 7).take(10)) == two_passes[whole + 7 : whole + 17]
    passes = [
        {str(row["teacher_input_ids"]): row for row in part} for part in (two_passes[:whole], two_passes[whole:])
    ]
    assert passes[0].keys() == passes[1].keys() and len(passes[0]) == whole
    redrawn = [passes[0][key]["input_ids"] != passes[1][key]["input_ids"] for key in passes[0]]
    assert np.mean(redrawn) > 0.9
    assert list(rows(seed=1).take(50)) != two_passes[:50]


@pytest.mark.parametrize("way", ["accelerate", "node"])
@pytest.mark.parametrize("files", [1, 40])
def test_two_processes_see_disjoint_rows(tokenizer, corpus, way, files):
    text = corpus if files == 40 else corpus / "0.py"
    if files == 1:
        text.write_text("".join(code(number) for number in range(80)))
    rows = load_plain_text(text, tokenizer, window=64)
    seen = []
    for rank in range(2):
        if way == "node":
            mine = split_dataset_by_node(rows, rank, 2)
        else:
            loader = DataLoader(rows, batch_size=4, collate_fn=list)
            mine = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
            mine = itertools.chain.from_iterable(mine)
        seen.append({str(row["teacher_input_ids"]) for row in itertools.islice(mine, 60)})
    assert not seen[0] & seen[1] and min(map(len, seen)) > 40


def test_held_out_documents_are_not_in_training(tokenizer, corpus):
    train = {str(row["teacher_input_ids"]) for row in load_plain_text(corpus, tokenizer, window=64).take(500)}
    test = {str(row["teacher_input_ids"]) for row in held_out(corpus, tokenizer, window=64)}
    everything = sum(-(-len(ids(tokenizer, code(number))) // 64) for number in range(40))
    assert not train & test and len(train) + len(test) == everything
    (corpus / "again.md").write_text((corpus / "0.py").read_text())  # the same content is one document
    assert len(held_out(corpus, tokenizer, window=64)) == len(test)


WRITERS = {
    "a.jsonl": lambda rows, path: rows.to_json(path),
    "a.parquet": lambda rows, path: rows.to_parquet(path),
    "a.csv": lambda rows, path: rows.to_csv(path),
    "saved": lambda rows, path: rows.save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(tokenizer, tmp_path, name):
    texts = [code(number) for number in range(40)]
    WRITERS[name](Dataset.from_dict({"body": [*texts, None, ""], "n": [0] * 42}), tmp_path / name)
    rows = load_plain_text(tmp_path / name, tokenizer, window=64, text_column="body").take(400)
    rows = [*rows, *held_out(tmp_path / name, tokenizer, window=64, text_column="body")]
    expected = sum(-(-len(ids(tokenizer, text)) // 64) for text in texts)
    assert len({str(row["teacher_input_ids"]) for row in rows}) == expected


def test_a_data_set_is_its_tables_and_not_its_readme(tokenizer, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("README.md", "LICENSE.txt"):
        (clone / name).write_text("This is about the data set, and none of its documents. " * 20)
    pd.DataFrame({"text": [code(number) for number in range(40)]}).to_csv(clone / "train.csv", index=False)
    rows = load_plain_text(clone, tokenizer, window=512).take(60)
    assert all("data set" not in tokenizer.decode(row["teacher_input_ids"]) for row in rows)
    (clone / "more").mkdir()
    (clone / "more" / "README.md").write_text(code(1))
    with pytest.raises(ValueError, match=r"text files, such as more.README.md, and tables, such as train.csv"):
        load_plain_text(clone, tokenizer)


def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(code(1), encoding="utf-8-sig")
    rows = load_plain_text(tmp_path / "a.txt", tokenizer, window=512).take(1)
    assert [tokenizer.decode(row["teacher_input_ids"]) for row in rows] == [code(1)]
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "b.txt").write_text(code(2), encoding=encoding)
        for text in (tmp_path, tmp_path / "b.txt"):
            with pytest.raises(ValueError, match=r"b\.txt is not in UTF-8 \('utf-8' codec can't decode"):
                load_plain_text(text, tokenizer)


def test_a_validation_split_of_its_own(tokenizer, tmp_path):
    splits = {"train": [code(number) for number in range(30)], "dev": [code(99)]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}).save_to_disk(
        tmp_path / "a"
    )
    rows = held_out(tmp_path / "a", tokenizer, window=64)
    assert "".join(tokenizer.decode(row["teacher_input_ids"]) for row in rows) == code(99)
    train = load_plain_text(tmp_path / "a", tokenizer, window=64).take(300)
    expected = sum(-(-len(ids(tokenizer, text)) // 64) for text in splits["train"])
    assert len({str(row["teacher_input_ids"]) for row in train}) == expected  # all of it


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("held", [False, True])
def test_of_few_documents_the_last_windows_are_held_out(tokenizer, tmp_path, monkeypatch, name, documents, held):
    """Whichever side the hash would put all of them on."""
    monkeypatch.setattr(plain_text, "HELD_OUT", 1.0 if held else 0.0)
    texts = [code(number, lines=40) for number in range(documents)]
    if name == "a.txt":
        texts = ["".join(texts)]
        (tmp_path / name).write_text(texts[0])
    elif name == "a.csv":
        pd.DataFrame({"text": texts}).to_csv(tmp_path / name, index=False)
    else:
        pd.DataFrame({"text": texts}).to_json(tmp_path / name, orient="records", lines=True)
    windows = []
    for text in texts:
        tokens = ids(tokenizer, text)
        count = -(-len(tokens) // 64)
        windows += [tokens[len(tokens) * i // count : len(tokens) * (i + 1) // count] for i in range(count)]
    first = 1 if held else len(windows) - 1
    test = [row["teacher_input_ids"] for row in held_out(tmp_path / name, tokenizer, window=64)]
    train = load_plain_text(tmp_path / name, tokenizer, window=64).take(3 * first)
    assert test == windows[first:]
    assert sorted(row["teacher_input_ids"] for row in train) == sorted(3 * windows[:first])


def test_a_text_of_one_window_is_trained_on_or_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(code(1, lines=1))
    (row,) = load_plain_text(tmp_path / "a.txt", tokenizer, window=512).take(1)
    assert tokenizer.decode(row["teacher_input_ids"]) == code(1, lines=1)
    count = len(row["teacher_input_ids"])
    with pytest.raises(
        ValueError, match=rf"a.txt has one window of text, of {count} tokens, .*--window, or --eval-rows 0"
    ):
        held_out(tmp_path / "a.txt", tokenizer, window=512)


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """What the built-in corpus is made of: three modules, one of each split, and a distribution."""
    site = tmp_path / "site"
    info = site / "thing-1.0.dist-info"
    names = {f"{split}.py": number for number, split in enumerate(("test", "validation", "train"))}
    for path, number in names.items():
        (tmp_path / path).write_text(code(number))
    files = {
        "thing/__init__.py": code(10),
        "thing/copy.py": code(0),  # of what is held out
        "thing/guide.rst": code(11),
        "thing/data.json": code(12),
        "thing/tests/test_a.py": code(13),
        "thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: Thing\nVersion: 1.0\n\n" + code(14),
        "thing-1.0.dist-info/top_level.txt": code(15),
    }
    info.mkdir(parents=True)
    (site / "thing/tests").mkdir(parents=True)
    for path, content in files.items():
        (site / path).write_text(content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*files, "gone.py"]))
    module = sys.modules[find_sentinels.__module__]
    distribution = next(
        iter(module.installed_distributions.__globals__["importlib"].metadata.distributions(path=[str(site)]))
    )
    monkeypatch.setattr(module, "stdlib_files", lambda: ((path, tmp_path / path) for path in names))
    monkeypatch.setattr(module, "split_of", lambda path: path.removesuffix(".py"))
    monkeypatch.setattr(module, "installed_distributions", lambda: {"thing": distribution})
    monkeypatch.setattr(module.sys, "base_prefix", str(tmp_path / "prefix"))
    (tmp_path / "prefix/share/doc").mkdir(parents=True)
    (tmp_path / "prefix/share/doc/manual.txt").write_text(code(16))
    plain_text._builtin_files.cache_clear()
    yield
    plain_text._builtin_files.cache_clear()


def test_the_built_in_corpus(small_world, tokenizer):
    rows = held_out(None, tokenizer, window=64)
    assert "".join(tokenizer.decode(row["teacher_input_ids"]) for row in rows) == code(1)
    train = {
        tokenizer.decode(row["teacher_input_ids"]) for row in load_plain_text(None, tokenizer, window=64).take(1000)
    }
    read = {number for number in range(17) if any(f"def f{number}(" in window for window in train)}
    assert read == {2, 10, 11, 14, 16}


# What is wrong with it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mlm"}, "objective='mlm' is unknown: expected one of prefix_lm, span_denoising, ul2"),
        ({"window": 15}, "window=15 is too short to split: give at least 16"),
        ({"prefix_share": (0.8, 0.2)}, "two shares between 0 and 1"),
        ({"prefix_share": (0.5, 1.0)}, "two shares between 0 and 1"),
        ({"split": "test"}, "split='test' is unknown"),
    ],
)
def test_arguments_out_of_range(tokenizer, corpus, options, message):
    with pytest.raises(ValueError, match=message):
        load_plain_text(corpus, tokenizer, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "n": [1]}, "no column 'text'; the columns are 'body', 'n' .*: choose with --text-column"),
        ({"text": [1, 2]}, "a.jsonl, line 1: 'text' is 1, expected text: put it in quotes, or choose"),
        ({"text": ["too short", None]}, "a row of a table, is a document: give more text, or join short rows"),
    ],
)
def test_tables_that_cannot_do(tokenizer, tmp_path, columns, message):
    pd.DataFrame(columns).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match=message):
        load_plain_text(tmp_path / "a.jsonl", tokenizer)


def test_corpora_that_are_none(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="gone is not there"):
        load_plain_text(tmp_path / "gone", tokenizer)
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match=r"suffix '.docx', expected one of .txt, .md, .rst, .py, .csv"):
        load_plain_text(tmp_path / "a.docx", tokenizer)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty.txt has no document of 16 tokens or more"):
        load_plain_text(tmp_path / "empty.txt", tokenizer)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="empty.csv gives no rows, read as csv: it is empty"):
        load_plain_text(tmp_path / "empty.csv", tokenizer)
    (tmp_path / "tests").mkdir()
    pd.DataFrame({"text": [code(1)]}).to_csv(tmp_path / "tests" / "test.csv", index=False)
    with pytest.raises(ValueError, match="tests has no training text, only the split test"):
        load_plain_text(tmp_path / "tests", tokenizer)
    pd.DataFrame({"text": [1.5]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the text column holds float, expected text"):
        load_plain_text(tmp_path / "a.parquet", tokenizer)
