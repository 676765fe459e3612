"""Targets that a teacher writes: against `generate` row by row, against probabilities, and what is kept of them."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distillation_toys import TEMPLATE, arguments, ragged_rows, write_writer
from rouge_score.rouge_scorer import RougeScorer
from tokenizer_toys import wordpiece
from transformers import AutoTokenizer

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation import LiveTeacher, TargetGeneration, capture
from hf_encdec_distill.distillation.teachers import targets
from hf_encdec_distill.distillation.teachers.targets import generate_tokens
from hf_encdec_distill.distillation.teachers.workers import merge_caches
from hf_encdec_distill.models.vocabulary import trim_tokenizer


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


ROWS = [{"source": "def f(): return" + " x" * (i % 5) + str(i), "target": f"Return {i}."} for i in range(8)]
SAMPLED = {"sampling_temperature": 0.9, "num_return_sequences": 3}


@pytest.fixture
def teacher_folder(tmp_path, make_bpe_tokenizer):
    return write_writer(tmp_path / "teacher", make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>"))


@pytest.fixture
def tokenizer(teacher_folder):
    return AutoTokenizer.from_pretrained(teacher_folder)


@pytest.fixture
def write(tmp_path, teacher_folder, tokenizer):
    """Captures with a `TargetGeneration` of the given fields; returns what `load_dataset` reads of the folder."""

    def run(name="cache", rows=ROWS, batch_size=4, teacher=None, **fields):
        generation = TargetGeneration(**{"max_new_tokens": 30, **fields})
        capture(
            teacher or LiveTeacher.load(teacher_folder),
            rows,
            tmp_path / name,
            tokenizer,
            generation=generation,
            prompt_template=TEMPLATE,
            k=len(tokenizer),
            batch_size=batch_size,
            rows_per_shard=4,
            progress=False,
        )
        return datasets.load_dataset(str(tmp_path / name))["train"]

    return run


def by_source(rows):
    return {row["source"]: row["target"] for row in rows}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_of_each_row_alone(write, teacher_folder, tokenizer, num_beams):
    ours = write(num_beams=num_beams)
    assert ours["reference"][:] == [f"Return {row['source'].split('x')[-1].split('return')[-1]}." for row in ours]
    model = LiveTeacher.load(teacher_folder).model
    expected = {}
    for row in ROWS:
        ids = tokenizer(row["source"] + "\n#", return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=30, do_sample=False, num_beams=num_beams)[0, ids.shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if tokenizer.eos_token_id in tokens and text.strip():
            expected[row["source"]] = text
    assert 0 < len(expected) < len(ROWS)
    assert by_source(ours) == expected


def test_what_is_sampled_has_the_probabilities_of_the_model(teacher_folder):
    """The first token of 4,000 answers, and the second after the likeliest first, within five standard deviations."""
    model, prompt = LiveTeacher.load(teacher_folder).model, [5, 9, 30]
    numbers = torch.rand(4000, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draw = targets._Draw(numbers, 0.8)
    tokens = generate_tokens(
        model, [prompt] * 4000, 0, max_new_tokens=2, do_sample=False, logits_processor=[draw], eos_token_id=None
    )
    prompt = [prompt]
    for place in range(2):
        with torch.no_grad():
            probs = torch.softmax(model(torch.tensor(prompt)).logits[0, -1].double() / 0.8, -1)
        count = len(tokens)
        counts = torch.bincount(tokens[:, place], minlength=len(probs))
        assert ((counts - count * probs).abs() <= 5 * (count * probs * (1 - probs)).sqrt() + 1).all()
        first = int(counts.argmax())
        tokens = tokens[tokens[:, place] == first]
        prompt = [[*prompt[0], first]]


def test_a_row_gets_the_same_in_whatever_batch_and_order(write):
    one = write("one", **SAMPLED)
    two = write("two", rows=ROWS[::-1], batch_size=1, **SAMPLED)
    other = write("other", seed=1, **SAMPLED)
    assert by_source(one) == by_source(two)
    assert by_source(one) != by_source(other)


def test_the_likeliest_is_kept(write, teacher_folder, tokenizer):
    """Of all answers the one with the highest mean log-probability, which transformers' own loss gives."""
    model = LiveTeacher.load(teacher_folder).model
    every = write("all", keep="all", **SAMPLED)
    best = {}
    for row in every:
        prompt, target = (tokenizer(text).input_ids for text in (row["source"] + "\n#", row["target"]))
        target = [*target, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        value = -F.cross_entropy(logits, torch.tensor(target)).item()
        assert row["mean_log_prob"] == pytest.approx(value, abs=1e-4)
        best.setdefault(row["source"], []).append((value, row["target"]))
    assert max(map(len, best.values())) == 3
    assert by_source(write("best", **SAMPLED)) == {source: max(answers)[1] for source, answers in best.items()}


def test_the_closest_to_the_reference_is_kept(write, monkeypatch):
    answers = {row["source"]: [f"No {i}", row["target"].lower(), "Return"] for i, row in enumerate(ROWS)}

    def written(teacher, requests, generation, ends, tokenizer):
        texts = [text for request in requests for text in answers[request.source]]
        return padded([[*tokenizer(text).input_ids, ends[0]] for text in texts])

    monkeypatch.setattr(targets, "_write", written)
    ours = by_source(write(keep="closest", **SAMPLED))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for row in ROWS:
        scores = [scorer.score(row["target"], text)["rougeL"].fmeasure for text in answers[row["source"]]]
        assert ours[row["source"]] == answers[row["source"]][int(np.argmax(scores))]


@pytest.mark.parametrize("reference", ["красная лиса бежит", "東京は2020年も晴れでした"])
def test_the_closest_in_another_script(reference):
    """ROUGE knows no word of it; nor is the number that both have all that there is to compare."""
    texts = ["совсем 2020 другое", reference[:-3], "2020"]
    rows = [{"text": text, "reference": reference} for text in texts]
    kept = targets.keep(rows, TargetGeneration(keep="closest", **SAMPLED), Counter())
    assert [row["text"] for row in kept] == [reference[:-3]]


def padded(lists):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in lists], batch_first=True)


def test_what_is_unfinished_empty_or_a_duplicate_is_dropped_and_counted(write, tokenizer, monkeypatch, caplog):
    end, word = tokenizer.eos_token_id, tokenizer("Yes").input_ids

    def written(teacher, requests, generation, ends, tokenizer):
        assert end in ends
        of_first = [[*word, end, 7], word, [*word, end]]  # what comes after EOS is no part of it
        return padded(of_first + [[end], word, tokenizer(" ").input_ids + [end]] * (len(requests) - 1))

    monkeypatch.setattr(targets, "_write", written)
    monkeypatch.setattr(targets.logger, "propagate", True, raising=False)
    warnings = []
    monkeypatch.setattr(targets.logger, "warning", warnings.append)
    rows = write(rows=ROWS[:4], keep="all", **SAMPLED)
    assert by_source(rows) == {ROWS[0]["source"]: "Yes"} and len(rows) == 1
    assert warnings == ["train: 1 of 12 answers kept; dropped: 4 unfinished, 6 empty, 1 duplicate."]

    monkeypatch.setattr(targets, "_write", lambda *_: torch.full((9, 2), 7))
    with pytest.raises(ValueError, match=r"none of the teacher's answers.*'unfinished': 9.*max_new_tokens=30"):
        write("none", rows=ROWS[:3], **SAMPLED)


def test_a_row_is_answered_once(write, teacher_folder, tmp_path, monkeypatch):
    """Interrupted in the last batch; then the rows that are on disk are not asked again, refused ones among them."""
    teacher = LiveTeacher.load(teacher_folder)
    generate, asked = teacher.model.generate, []

    def spy(input_ids, stop_at=None, **options):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(len(input_ids))
        return generate(input_ids=input_ids, **options)

    whole = write("whole", batch_size=2)
    monkeypatch.setattr(teacher.model, "generate", lambda **options: spy(stop_at=3, **options))
    with pytest.raises(KeyboardInterrupt):
        write(batch_size=2, teacher=teacher)
    on_disk = {
        key
        for file in (tmp_path / "cache").glob("*.parquet")
        for key in datasets.Dataset.from_parquet(str(file))["key"]
    }
    assert len(on_disk) == 6  # all that was answered
    asked.clear()
    monkeypatch.setattr(teacher.model, "generate", spy)
    assert by_source(write(batch_size=2, teacher=teacher)) == by_source(whole)
    assert sum(asked) == len(ROWS) - len(on_disk)
    asked.clear()
    assert len(write(batch_size=2, teacher=teacher)) == len(whole) and not asked
    with pytest.raises(ValueError, match="captured with generation=.*'num_beams': 1.*'num_beams': 2"):
        write(num_beams=2)


def test_a_student_learns_them_from_the_cache(write, tmp_path, teacher_folder, tokenizer):
    rows = write()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher_folder, encoder_num_hidden_layers=3, decoder_num_hidden_layers=2, prompt_template=TEMPLATE
    )
    losses = []
    for source in (tmp_path / "cache", teacher_folder):
        trainer = DistillationTrainer(
            student, arguments(tmp_path, prompt_template=TEMPLATE), teacher=source, train_dataset=rows
        )
        batch = trainer.data_collator([rows[i] for i in range(3)])
        assert (batch["labels"] == tokenizer.eos_token_id).sum() == 3
        losses.append(trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_a_folder_is_not_taken_for_another_of_the_same_name(write, tmp_path):
    """`datasets` keeps what it made of a folder, and does not look into it again while the card says the same."""
    for number, rows in enumerate((ROWS[:6], ROWS[6:])):
        (tmp_path / str(number)).mkdir()
        found = {row["source"] for row in write(f"{number}/written", rows=rows)}
        assert found and found <= {row["source"] for row in rows}


def test_conversations_and_splits(write, tmp_path, teacher_folder, make_bpe_tokenizer):
    make_bpe_tokenizer(pad_token="<|endoftext|>").save_pretrained(teacher_folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    system = {"role": "system", "content": "Be short."}
    rows = [
        {"messages": [system, {"role": "user", "content": row["source"]}, {"role": "assistant", "content": "Yes."}]}
        for row in ROWS
    ]
    data = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[:5]), "validation": datasets.Dataset.from_list(rows[5:])}
    )
    teacher = LiveTeacher.load(teacher_folder)
    count = capture(
        teacher, data, tmp_path / "chat", tokenizer, generation=TargetGeneration(max_new_tokens=40), progress=False
    )
    loaded = datasets.load_dataset(str(tmp_path / "chat"))
    assert set(loaded) == {"train", "validation"}
    assert count == len(loaded["train"]) + len(loaded["validation"])
    for split in loaded.values():
        for row in split:
            assert row["messages"][0] == system and row["reference"] == "Yes."
            assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"] != "Yes."
    named = [{"role": "user", "content": "hi", "name": "Ada"}, {"role": "assistant", "content": "Yes.", "name": None}]
    for row in ({"messages": named}, {"source": named[:1]}):
        with pytest.raises(ValueError, match="chat messages with 'name'"):
            capture(teacher, [row], tmp_path / "named", tokenizer, generation=TargetGeneration(), progress=False)


def test_jobs_without_an_answer_in_a_small_split(tmp_path, teacher_folder, tokenizer, write):
    """Of three jobs two have no row of the second split: with the others' folders theirs hold what one job writes."""
    answered = [row for row in ROWS if row["source"] in by_source(write())]
    split = {"train": ROWS, "validation": answered[:1]}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in split.items()})
    options = {"generation": TargetGeneration(max_new_tokens=30), "prompt_template": TEMPLATE, "progress": False}
    teacher = LiveTeacher.load(teacher_folder)
    for index in range(3):
        capture(teacher, data, tmp_path / f"job{index}", tokenizer, num_shards=3, index=index, **options)
    capture(teacher, data, tmp_path / "alone", tokenizer, **options)
    merge_caches([tmp_path / f"job{index}" for index in range(3)], tmp_path / "merged")
    merged, alone = (datasets.load_dataset(str(tmp_path / name)) for name in ("merged", "alone"))
    assert {name: by_source(rows) for name, rows in merged.items()} == {
        name: by_source(rows) for name, rows in alone.items()
    }
    # None of the rows of a job may be answered; a job that is alone says so.
    too_short = {**options, "generation": TargetGeneration(max_new_tokens=1)}
    assert capture(teacher, data, tmp_path / "refused", tokenizer, num_shards=3, index=0, **too_short) == 0
    with pytest.raises(ValueError, match="none of the teacher's answers to the rows of train is worth keeping"):
        capture(teacher, data, tmp_path / "none", tokenizer, **too_short)


@pytest.mark.parametrize("policy", ["id_map", "universal"])
def test_the_answers_are_the_same_for_a_student_of_other_ids(tmp_path, teacher_folder, tokenizer, write, policy):
    """What the teacher writes, and how likely that is to it, is read in its own tokens."""
    expected = {row["target"]: row["mean_log_prob"] for row in write(keep="all", **SAMPLED)}
    student = wordpiece() if policy == "universal" else trim_tokenizer(tokenizer, ["def return"], len(tokenizer) - 8)
    capture(
        LiveTeacher.load(teacher_folder),
        ROWS,
        tmp_path / "other",
        tokenizer,
        kind="dense",
        student_tokenizer=student,
        vocab_policy=policy,
        generation=TargetGeneration(max_new_tokens=30, keep="all", **SAMPLED),
        prompt_template=TEMPLATE,
        batch_size=4,
        progress=False,
    )
    rows = datasets.load_dataset(str(tmp_path / "other"), "targets")["train"]
    assert {row["target"]: row["mean_log_prob"] for row in rows} == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_is_said(write, tmp_path):
    for fields, message in (
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_return_sequences": 10**9}, "num_return_sequences=1000000000"),
        ({"sampling_temperature": -1.0}, "sampling_temperature=-1.0"),
        ({"keep": "best"}, "keep='best'"),
        ({"num_beams": 2, "sampling_temperature": 1.0}, "set one of the two"),
        ({"num_return_sequences": 2}, "give as many beams"),
    ):
        with pytest.raises(ValueError, match=message):
            TargetGeneration(**fields)
    with pytest.raises(ValueError, match="max_new_tokens=1000000000 do not fit the 2048 positions of the teacher"):
        write("absurd", max_new_tokens=10**9)
    assert not (tmp_path / "absurd").exists()
    with pytest.raises(ValueError, match="a prompt of 11 tokens .* max_new_tokens=2040 do not fit the 2048"):
        write("long", rows=[{"source": "123456789"}], max_new_tokens=2040)
    with pytest.raises(ValueError, match="writes texts"):
        write(rows=ragged_rows(2))
    with pytest.raises(ValueError, match="compares with a reference"):
        write("other", rows=[{"source": "def f()"}], keep="closest", **SAMPLED)
