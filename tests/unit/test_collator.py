"""Text, chat and ready rows -> student and teacher inputs, compared with the tokenizer's own encodings."""

import pickle

import pytest
import torch
from distillation_toys import make_t5
from tokenizer_toys import merging_blanks, renumbered, wordpiece
from transformers import DataCollatorForSeq2Seq

from hf_encdec_distill.distillation.alignment.vocabularies import MappedVocabulary, SharedVocabulary
from hf_encdec_distill.distillation.collator import DistillationCollator
from hf_encdec_distill.models.prompts import student_tokenizer


SOURCES = ["def f(x): return x", "a longer source: def add(a, b): return a + b", "z"]
TARGETS = ["Identity.", "Return the sum of two numbers.", "Zed"]
TEXT = [{"source": s, "target": t} for s, t in zip(SOURCES, TARGETS, strict=True)]
READY = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9, 3]},
    {"input_ids": [5], "attention_mask": [1], "labels": [3]},
]


def unpadded(batch, name, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(batch[name], batch[mask], strict=True)]


def targets(batch):
    return [row[row != -100].tolist() for row in batch["labels"]]


def chat_prompt(tokenizer, messages):
    """The template's text; the tokenizer puts its BOS in front."""
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))["input_ids"]


def test_text_rows_of_a_separate_student(make_bpe_tokenizer):
    """The student reads its own encoding of the source, the teacher its chat template; targets end in EOS."""
    ours, theirs = make_bpe_tokenizer(add_bos=True, chat_template=None), make_bpe_tokenizer(add_bos=True)
    batch = DistillationCollator(ours, theirs)(TEXT)
    assert unpadded(batch, "input_ids", "attention_mask") == [ours(s)["input_ids"] for s in SOURCES]
    expected = [ours(t, add_special_tokens=False)["input_ids"] + [ours.eos_token_id] for t in TARGETS]
    assert targets(batch) == expected
    prompts = [chat_prompt(theirs, [{"role": "user", "content": s}]) for s in SOURCES]
    assert unpadded(batch, "teacher_input_ids", "teacher_attention_mask") == [
        p + t for p, t in zip(prompts, expected, strict=True)
    ]
    assert batch["teacher_labels_start"].tolist() == [len(p) for p in prompts]
    assert all(row.count(theirs.bos_token_id) == 1 for row in batch["teacher_input_ids"].tolist())
    decoded = theirs.decode(unpadded(batch, "teacher_input_ids", "teacher_attention_mask")[2])
    assert decoded == "<s><|im_start|>user\nz<|im_end|>\n<|im_start|>assistant\nZed<|im_end|>"


def test_a_tokenizer_without_a_pad_token(make_bpe_tokenizer):
    """As those of Llama 3 and Mistral: the same batch, and the tokenizer stays as it is."""
    bare, padding = (make_bpe_tokenizer(add_bos=True, pad_token=token) for token in (None, "<|endoftext|>"))
    batch, expected = (DistillationCollator(each, each)(TEXT) for each in (bare, padding))
    assert bare.pad_token is None and set(batch) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in batch.items())


@pytest.mark.parametrize("template", [None, "Summarise:\n{source}\nSummary:", "Seam: {source}\nSummary:"])
def test_text_rows_of_a_merged_student(make_bpe_tokenizer, template):
    """Its encoder reads the teacher's prompt but the last token, which its decoder starts with."""
    theirs = make_bpe_tokenizer(add_bos=True)
    ours = student_tokenizer(theirs, template)
    if template is None:
        prompts = [chat_prompt(theirs, [{"role": "user", "content": s}]) for s in SOURCES]
    else:
        before, after = template.split("{source}")  # in the last template a blank is a token, which no word joins
        alone = [theirs(part, add_special_tokens=False)["input_ids"] for part in (*SOURCES, after)]
        prompts = [theirs(before)["input_ids"] + source + alone[-1] for source in alone[:-1]]
    collator = DistillationCollator(ours, theirs, prompt_template=template, start_token_id=prompts[0][-1])
    batch = collator(TEXT)
    assert unpadded(batch, "input_ids", "attention_mask") == [p[:-1] for p in prompts]
    assert [ours(s)["input_ids"] for s in SOURCES] == [p[:-1] for p in prompts]
    assert batch["teacher_labels_start"].tolist() == [len(p) for p in prompts]
    for prompt, target, row in zip(prompts, targets(batch), batch["teacher_input_ids"].tolist(), strict=True):
        assert row[: len(prompt) + len(target)] == prompt + target
        assert row.count(theirs.bos_token_id) == 1


def test_rows_that_end_in_a_blank_or_are_cut_at_one(make_bpe_tokenizer):
    """No token reaches from the source into the template, so that the prompt ends in the student's start token."""
    theirs = merging_blanks(make_bpe_tokenizer(chat_template=None))
    ours, newline = student_tokenizer(theirs, "{source}\n"), theirs("\n")["input_ids"][0]
    rows = [{"source": source, "target": "Zed"} for source in ("z ", "z \n", "a b", "")]
    for limit in (None, 2, 3):
        collator = DistillationCollator(
            ours, theirs, prompt_template="{source}\n", start_token_id=newline, max_source_length=limit
        )
        batch = collator(rows)
        read = [theirs(row["source"])["input_ids"][: None if limit is None else limit - 1] for row in rows]
        assert unpadded(batch, "input_ids", "attention_mask") == read
        assert batch["teacher_labels_start"].tolist() == [len(ids) + 1 for ids in read]


def test_merged_student_without_a_template(make_bpe_tokenizer):
    """The prompt is the source and then the student's start token."""
    theirs = make_bpe_tokenizer(add_bos=True, chat_template=None)
    batch = DistillationCollator(student_tokenizer(theirs), theirs, start_token_id=7)(TEXT)
    bare = [theirs(s)["input_ids"] for s in SOURCES]
    assert unpadded(batch, "input_ids", "attention_mask") == bare
    teacher = unpadded(batch, "teacher_input_ids", "teacher_attention_mask")
    assert teacher == [s + [7] + t for s, t in zip(bare, targets(batch), strict=True)]
    cut = DistillationCollator(student_tokenizer(theirs), theirs, start_token_id=7, max_source_length=6)(TEXT)
    assert [p[:5] for p in bare] == unpadded(cut, "input_ids", "attention_mask")
    assert cut["teacher_labels_start"].tolist() == [min(len(p), 5) + 1 for p in bare]


def test_merged_student_of_a_template_that_ends_in_the_source(make_bpe_tokenizer):
    """The prompt is the template with the source in it, and then the student's start token."""
    theirs = make_bpe_tokenizer(add_bos=True)
    ours = student_tokenizer(theirs, "Say:\n{source}")
    batch = DistillationCollator(ours, theirs, prompt_template="Say:\n{source}", start_token_id=3)(TEXT)
    prompts = [theirs(f"Say:\n{source}")["input_ids"] for source in SOURCES]
    assert (
        unpadded(batch, "input_ids", "attention_mask") == prompts == [ours(source)["input_ids"] for source in SOURCES]
    )
    assert batch["teacher_labels_start"].tolist() == [len(prompt) + 1 for prompt in prompts]


def test_merged_student_of_another_template_is_an_error(make_bpe_tokenizer):
    theirs = make_bpe_tokenizer(add_bos=True)
    with pytest.raises(ValueError, match="decoder_start_token_id is 7, but the teacher's prompt ends in"):
        DistillationCollator(student_tokenizer(theirs), theirs, start_token_id=7)(TEXT)
    newline = theirs("\n", add_special_tokens=False)["input_ids"][0]
    other = student_tokenizer(theirs, "Other template:\n{source}\n")
    with pytest.raises(ValueError, match="the student's tokenizer encodes 'a' as"):
        DistillationCollator(other, theirs, start_token_id=newline)(TEXT)
    # The student's own tokenizer in place of the teacher's: it has no template to give.
    with pytest.raises(ValueError, match="teacher_processing_class"):
        made = student_tokenizer(theirs)
        DistillationCollator(made, made, start_token_id=newline)(TEXT)


def test_conversations(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(add_bos=True)
    before = [{"role": "system", "content": "sys"}, {"role": "user", "content": "hi"}]
    row = {"messages": [*before, {"role": "assistant", "content": "yo"}]}
    prompt = chat_prompt(tokenizer, before)
    target = [*tokenizer("yo", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    merged = DistillationCollator(student_tokenizer(tokenizer), tokenizer, start_token_id=prompt[-1])([row])
    assert merged["input_ids"].tolist() == [prompt[:-1]] and merged["labels"].tolist() == [target]
    assert merged["teacher_input_ids"].tolist() == [prompt + target]
    separate = DistillationCollator(tokenizer, tokenizer)([row])
    assert separate["input_ids"].tolist() == [prompt]
    # A student without a chat template reads a single message as it is, and refuses what it can't encode.
    plain = DistillationCollator(make_bpe_tokenizer(add_bos=True, chat_template=None), tokenizer)
    single = plain([{"messages": row["messages"][1:]}])
    assert single["input_ids"].tolist() == [tokenizer("hi")["input_ids"]]
    with pytest.raises(ValueError, match="no chat template to encode 2 messages"):
        plain([row])
    with pytest.raises(ValueError, match="the target has to be text"):
        plain([{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}])
    for messages in ([], 5, [{"content": "no role"}], [{"role": "user", "content": "hi"}, "yo"]):
        with pytest.raises(ValueError, match="not a conversation"):
            plain([{"messages": messages}])


def test_lengths(make_bpe_tokenizer):
    """The source is cut inside the template; a target that was cut does not claim to end."""
    tokenizer = make_bpe_tokenizer(add_bos=True)
    collator = DistillationCollator(tokenizer, tokenizer, max_source_length=40, max_target_length=5)
    batch = collator([{"source": "x" * 99, "target": "klmnopqrs"}, {"source": "x", "target": "klmn"}])
    assert batch["teacher_labels_start"][0] == 40 and len(batch["input_ids"][0]) == 40
    text = tokenizer.decode(batch["teacher_input_ids"][0][:40])
    assert text.startswith("<s><|im_start|>user\nxxx") and text.endswith("x<|im_end|>\n<|im_start|>assistant\n")
    letters = tokenizer("klmnopqrs", add_special_tokens=False)["input_ids"]
    assert batch["labels"].tolist() == [letters[:5], letters[:4] + [tokenizer.eos_token_id]]


def test_columns_have_other_names(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(add_bos=True)
    named = DistillationCollator(tokenizer, tokenizer, source_column="code", target_column="doc")
    rows = [{"code": row["source"], "doc": row["target"], "origin": "file.py"} for row in TEXT]
    for name, value in DistillationCollator(tokenizer, tokenizer)(TEXT).items():
        assert torch.equal(named(rows)[name], value)
    with pytest.raises(ValueError, match=r"columns \['source', 'target'\], but needs 'code' and 'doc'"):
        named(TEXT)


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "<|im_end|>"])
def test_masks_come_from_lengths(make_bpe_tokenizer, pad_token):
    """Rows full of EOS, and EOS as pad: nothing real is masked, no pad is read."""
    tokenizer = make_bpe_tokenizer(pad_token=pad_token)
    eos = tokenizer.eos_token_id
    batch = DistillationCollator(tokenizer)(
        [{"input_ids": [eos, 5, eos], "labels": [eos, eos]}, {"input_ids": [eos], "labels": [eos]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[eos, eos], [eos, -100]]


def test_ready_rows_equal_the_ordinary_collator(make_bpe_tokenizer):
    """Ready rows come out of a user's collator as they would without us, text beside them is dropped."""
    tokenizer = make_bpe_tokenizer(add_bos=True)
    theirs = DataCollatorForSeq2Seq(tokenizer, model=make_t5())
    expected = theirs([dict(row) for row in READY])
    assert "decoder_input_ids" in expected
    ours = DistillationCollator(tokenizer, tokenizer, student_collator=theirs)
    batch = ours([{**row, "source": "text", "target": "text", "messages": []} for row in READY])
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value)
    with pytest.raises(ValueError):  # the user asked to have them, and DataCollatorForSeq2Seq can't pad text
        DistillationCollator(tokenizer, tokenizer, student_collator=theirs, keep_text_columns=True)(
            [{**row, "source": "text"} for row in READY]
        )


def test_text_rows_through_an_ordinary_collator(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(add_bos=True)
    student = DataCollatorForSeq2Seq(tokenizer, model=make_t5(), pad_to_multiple_of=16)
    batch = DistillationCollator(None, tokenizer, student_collator=student)(TEXT)
    plain = DistillationCollator(tokenizer, tokenizer)(TEXT)
    assert batch["input_ids"].shape[1] % 16 == batch["labels"].shape[1] % 16 == 0
    assert targets(batch) == targets(plain)
    for name in ("teacher_input_ids", "teacher_attention_mask", "teacher_labels_start"):
        assert torch.equal(batch[name], plain[name])


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_teacher_columns_of_ready_rows(make_bpe_tokenizer, side, as_tensors):
    """Given columns survive, whatever the padding side; labels are padded on the right."""
    tokenizer = make_bpe_tokenizer(add_bos=True)
    tokenizer.padding_side = side
    given = [
        {**READY[0], "teacher_input_ids": [10, 11, 8, 9, 3]},
        {**READY[1], "teacher_input_ids": [0, 12, 3, 0], "teacher_attention_mask": [0, 1, 1, 0]},
    ]
    given[0]["teacher_labels_start"], given[1]["teacher_labels_start"] = 2, 2
    if as_tensors:
        given = [{name: torch.tensor(value) for name, value in row.items()} for row in given]
    batch = DistillationCollator(tokenizer)(given)
    assert batch["teacher_input_ids"].tolist() == [[10, 11, 8, 9, 3], [0, 12, 3, 0, 0]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert batch["teacher_labels_start"].tolist() == [2, 2] and batch["labels"].tolist()[1] == [3, -100, -100]
    for b, row in enumerate(batch["labels"]):
        for t in (row != -100).nonzero().flatten():
            assert batch["teacher_input_ids"][b, batch["teacher_labels_start"][b] + t] == row[t]


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_labels_are_padded_as_labels_are(make_bpe_tokenizer, side, as_tensors):
    tokenizer = make_bpe_tokenizer(add_bos=True)
    tokenizer.padding_side = side
    given = [
        {**READY[0], "teacher_input_ids": [10, 11, 12, 13, 14], "teacher_label_positions": [1, -1, 4]},
        {**READY[1], "teacher_input_ids": [15, 16], "teacher_label_positions": [0]},
    ]
    if as_tensors:
        given = [{name: torch.tensor(value) for name, value in row.items()} for row in given]
    batch = DistillationCollator(tokenizer)(given)
    assert batch["teacher_input_ids"].tolist() == [[10, 11, 12, 13, 14], [15, 16, 0, 0, 0]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [3, -100, -100]
    assert batch["teacher_label_positions"].tolist() == [[1, -1, 4], [0, -1, -1]]
    assert "teacher_labels_start" not in batch


def test_what_a_collator_gives_the_decoder_moves_with_its_labels(make_bpe_tokenizer):
    """A mask says which of the decoder's columns are pads; labels that begin with -100 of their own keep it."""
    tokenizer = make_bpe_tokenizer()
    tokenizer.padding_side = "left"
    rows = [*READY, {"input_ids": [6], "attention_mask": [1], "labels": [-100, 7]}]
    given = {
        "decoder_input_ids": torch.tensor([[1, 8, 9], [0, 0, 1], [0, 1, 4]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
    }

    def collate(rows):
        return {**DataCollatorForSeq2Seq(tokenizer)(rows), **given}

    batch = DistillationCollator(tokenizer, student_collator=collate)(rows)
    assert batch["input_ids"].tolist()[1:] == [[2, 2, 5], [2, 2, 6]]  # what an encoder reads stays where it was
    assert batch["labels"].tolist() == [[8, 9, 3], [3, -100, -100], [-100, 7, -100]]
    assert batch["decoder_input_ids"].tolist() == [[1, 8, 9], [1, 0, 0], [1, 4, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_positions_of_labels_that_do_not_fit(make_bpe_tokenizer):
    collator = DistillationCollator(make_bpe_tokenizer(add_bos=True))
    row = {**READY[0], "teacher_input_ids": [1, 2, 3], "teacher_label_positions": [0, 1, 2]}
    with pytest.raises(ValueError, match="2 teacher_label_positions for 3 labels"):
        collator([{**row, "teacher_label_positions": [0, 1]}])
    with pytest.raises(ValueError, match="teacher_label_positions without teacher_input_ids.*give those too"):
        collator([{**READY[0], "teacher_label_positions": [0, 1, 2]}])
    with pytest.raises(ValueError, match="same columns"):
        collator([row, {**READY[0], "teacher_input_ids": [1, 8, 9, 3]}])


def test_teacher_columns_that_miss_the_labels(make_bpe_tokenizer):
    collator = DistillationCollator(make_bpe_tokenizer(add_bos=True))
    row = {"input_ids": [5], "labels": [8, 3]}
    collator([{**row, "teacher_input_ids": [1, 8, 3]}])
    # A label that is masked on purpose may be anything to the teacher.
    collator([{**row, "labels": [-100, 3], "teacher_input_ids": [1, 9, 3]}])
    for bad in ([1, 8, 4], [8, 3], [1, 3]):
        with pytest.raises(ValueError, match="do not hold the labels"):
            collator([{**row, "teacher_input_ids": bad}])
    with pytest.raises(ValueError, match="teacher_labels_start=2"):
        collator([{**row, "teacher_input_ids": [1, 8, 3], "teacher_labels_start": 2}])


def test_rows_without_a_target_and_mixed_rows(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer(add_bos=True)
    collator = DistillationCollator(tokenizer, tokenizer)
    batch = collator([{"source": s} for s in SOURCES])
    assert set(batch) == {"input_ids", "attention_mask"}
    waiting = collator([{"messages": [{"role": "user", "content": "hi"}]}])
    assert set(waiting) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="same columns"):
        collator([TEXT[0], {"source": "only"}])
    with pytest.raises(ValueError, match="same columns"):
        collator([{**READY[0], "teacher_input_ids": [1, 8, 9, 3]}, READY[1]])


def test_what_is_missing_is_named(make_bpe_tokenizer):
    with pytest.raises(ValueError, match="give processing_class"):
        DistillationCollator()(TEXT)
    tokenizer = make_bpe_tokenizer(add_bos=True)
    with pytest.raises(ValueError, match="source of a row is None"):
        DistillationCollator(tokenizer, tokenizer)([{"source": None, "target": "x"}])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        DistillationCollator(tokenizer, tokenizer)(TEXT)
    without_tokenizer = DistillationCollator()([READY[0], READY[0]])
    assert without_tokenizer["labels"].tolist() == [[8, 9, 3], [8, 9, 3]]


@pytest.mark.parametrize("merged", [False, True])
def test_text_rows_of_a_student_with_other_ids(make_bpe_tokenizer, merged):
    """Each side reads its own ids of the same text; the prompt is in the tokenizer of a merged student."""
    theirs = make_bpe_tokenizer(add_bos=True)
    ids = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(1)).tolist()
    template = "Summarise:\n{source}\nSummary:"
    ours = renumbered(student_tokenizer(theirs, template) if merged else make_bpe_tokenizer(chat_template=None), ids)
    vocabulary = SharedVocabulary.between(len(ids), len(ids), ours, theirs, "id_map")
    prompts = [theirs(template.replace("{source}", s))["input_ids"] for s in SOURCES]
    start = ids[prompts[0][-1]] if merged else None
    options = {"prompt_template": template, "start_token_id": start, "vocabulary": vocabulary}
    batch = DistillationCollator(ours, theirs, **options)(TEXT)
    plain = DistillationCollator(
        None, theirs, prompt_template=template, student_collator=DataCollatorForSeq2Seq(theirs)
    )
    expected = plain(TEXT)
    for name in ("teacher_input_ids", "teacher_attention_mask", "teacher_labels_start"):
        assert torch.equal(batch[name], expected[name])
    assert targets(batch) == [[ids[i] for i in row] for row in targets(expected)]
    read = [p[:-1] for p in prompts] if merged else [theirs(s, add_special_tokens=False)["input_ids"] for s in SOURCES]
    assert unpadded(batch, "input_ids", "attention_mask") == [[ids[i] for i in row] for row in read]
    if merged:
        # A limit is for all that is read before the target: the encoder's part of it is as long as of the same ids.
        limit = len(prompts[0]) - 2
        cut = DistillationCollator(ours, theirs, **options, max_source_length=limit)([TEXT[0]])
        assert len(cut["input_ids"][0]) == limit - 1 and int(cut["teacher_labels_start"][0]) == limit
        assert cut["input_ids"][0].tolist() == [ids[i] for i in cut["teacher_input_ids"][0][: limit - 1].tolist()]
        with pytest.raises(
            ValueError, match=r"decoder_start_token_id is 9, but the teacher's prompt ends in .*ids of"
        ):
            DistillationCollator(ours, theirs, **{**options, "start_token_id": ids[9]})(TEXT)


def test_conversations_of_a_merged_student_with_other_ids(make_bpe_tokenizer):
    """The last token of the prompt is the one that its decoder starts from; the encoder reads the others."""
    theirs = make_bpe_tokenizer(add_bos=True)
    ids = torch.randperm(len(theirs), generator=torch.Generator().manual_seed(1)).tolist()
    ours = renumbered(student_tokenizer(theirs), ids)
    ours.chat_template = theirs.chat_template
    vocabulary = SharedVocabulary.between(len(ids), len(ids), ours, theirs, "id_map")
    before = [{"role": "system", "content": "sys"}, {"role": "user", "content": "hi"}]
    prompt = [ids[i] for i in chat_prompt(theirs, before)]
    collator = DistillationCollator(ours, theirs, start_token_id=prompt[-1], vocabulary=vocabulary)
    batch = collator([{"messages": [*before, {"role": "assistant", "content": "yo"}]}])
    assert batch["input_ids"].tolist() == [prompt[:-1]]


def test_a_ready_row_without_a_target_and_with_other_ids(make_bpe_tokenizer):
    vocabulary = MappedVocabulary.of(280, 280, {140: 139})
    rows = [
        {"input_ids": [5], "labels": [], "teacher_input_ids": [5]},
        {"input_ids": [5], "labels": [140], "teacher_input_ids": [5, 139]},
    ]
    batch = DistillationCollator(make_bpe_tokenizer(), vocabulary=vocabulary)(rows)
    assert batch["labels"].tolist() == [[-100], [140]] and batch["teacher_labels_start"].tolist() == [1, 1]


def test_text_rows_of_a_student_with_another_tokenizer(make_bpe_tokenizer):
    """Positions by hand: bytes of the student, words of the teacher, which drops white space and accents."""
    ours, theirs = make_bpe_tokenizer(chat_template=None), wordpiece()
    vocabulary = SharedVocabulary.between(280, len(theirs), ours, theirs, "universal")
    collator = DistillationCollator(ours, theirs, vocabulary=vocabulary)
    row = {"source": "the sum", "target": "é the"}
    prompt, words = theirs("the sum", add_special_tokens=False)["input_ids"], theirs("é the")["input_ids"]
    labels = ours("é the")["input_ids"]
    batch = collator([row])
    assert batch["input_ids"].tolist() == [ours("the sum")["input_ids"]]
    assert batch["labels"].tolist() == [[*labels, ours.eos_token_id]]
    assert batch["teacher_input_ids"].tolist() == [[*prompt, *words]]
    # The first label; not the second half of é; what follows é; the end.
    cuts = {0: 0, 2: 1, len(labels): len(words)}
    positions = [len(prompt) - 1 + cuts[t] if t in cuts else -1 for t in range(len(labels) + 1)]
    assert theirs.convert_ids_to_tokens(words) == ["e", "the"] and batch["teacher_label_positions"].tolist() == [
        positions
    ]
    for name, value in pickle.loads(pickle.dumps(collator))([row]).items():
        assert torch.equal(value, batch[name])
    # Cut inside of é: nothing behind the first label is asked, so nothing more is read.
    cut = DistillationCollator(ours, theirs, vocabulary=vocabulary, max_target_length=2)([row])
    assert cut["labels"].tolist() == [labels[:2]] and cut["teacher_label_positions"].tolist() == [positions[:2]]
    assert cut["teacher_input_ids"].tolist() == [prompt]
