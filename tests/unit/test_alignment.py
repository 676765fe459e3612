"""Positions and vocabularies of student and teacher, against transformers models run row by row without padding."""

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import make_t5, make_teacher, spread
from tokenizer_toys import renumbered, wordpiece
from tokenizers import pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_encdec_distill.distillation.alignment.positions import (
    asked_positions,
    target_positions,
    teacher_columns,
    teacher_inputs,
    with_teacher_inputs,
)
from hf_encdec_distill.distillation.alignment.vocabularies import MappedVocabulary, SharedVocabulary
from hf_encdec_distill.distillation.teachers.live import LiveTeacher
from hf_encdec_distill.models.vocabulary import same_tokens, trim_tokenizer


EOS = 3
PROMPTS = [[5, 6, 7, 8, 9], [10, EOS, 11], [12, 13], [EOS]]
TARGETS = [[20, 21, EOS], [22, EOS, 23, EOS], [EOS], [24, 25]]


def padded(rows, side, fill):
    """Ragged rows -> ids and mask, `[B, width]`; the pad is an ordinary id (EOS), so only the mask tells."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


def gpt2():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=3)
    return spread(GPT2LMHeadModel(config))


def gemma2():
    """Caps its logits after the head, at a value that shows."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        sliding_window=16,
    )
    return spread(Gemma2ForCausalLM(config))


@pytest.mark.parametrize("labels_side", ["right", "left"])
@pytest.mark.parametrize("prompt_side", ["right", "left"])
@pytest.mark.parametrize("start", [None, 30])
def test_derived_inputs_are_prompt_then_target(prompt_side, labels_side, start):
    input_ids, attention_mask = padded(PROMPTS, prompt_side, EOS)
    labels, _ = padded(TARGETS, labels_side, -100)
    batch = teacher_inputs(input_ids, attention_mask, labels, start)
    rows, columns = target_positions(labels)
    predicting = teacher_columns(batch["teacher_labels_start"], rows, columns)
    for b, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        prompt = prompt if start is None else [*prompt, start]
        length = int(batch["teacher_attention_mask"][b].sum())
        width = 8 if start is None else 9  # of the longest row, the first
        assert batch["teacher_attention_mask"][b].tolist() == [1] * length + [0] * (width - length)
        assert batch["teacher_input_ids"][b, :length].tolist() == prompt + target
        # Target t is predicted where the token before it stands: columns P - 1 to P - 1 + T - 1.
        assert predicting[rows == b].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(target)))


def test_derived_inputs_without_a_mask_and_without_targets():
    input_ids = torch.tensor([[5, 6], [7, 8]])
    labels = torch.tensor([[9, -100], [-100, -100]])
    batch = teacher_inputs(input_ids, None, labels)
    assert batch["teacher_input_ids"].tolist() == [[5, 6, 9], [7, 8, 0]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["teacher_labels_start"].tolist() == [2, 2]


def test_a_hole_in_the_labels_is_an_error():
    with pytest.raises(ValueError, match=r"row 1 .*\[9, -100, 8\].*teacher_input_ids"):
        teacher_inputs(torch.ones(2, 2, dtype=torch.long), None, torch.tensor([[9, 8, -100], [9, -100, 8]]))


def test_labels_that_the_teacher_is_asked_about():
    labels = torch.tensor([[20, 21, 22, -100], [-100, 23, 24, 25]])
    batch = {"labels": labels, "teacher_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])}
    rows, columns = target_positions(labels)
    # What stands beside a label that is none is not looked at.
    given = torch.tensor([[0, -1, 3, 99], [-7, 2, 3, -1]])
    asked_rows, asked_columns, asked = asked_positions({**batch, "teacher_label_positions": given}, rows, columns)
    assert asked_rows.tolist() == [0, 0, 1, 1] and asked_columns.tolist() == [0, 3, 2, 3]
    assert asked.tolist() == [True, False, True, True, True, False]
    every = asked_positions({**batch, "teacher_labels_start": torch.tensor([2, 1])}, rows, columns)
    assert every[0] is rows and every[1].tolist() == [1, 2, 3, 1, 2, 3] and every[2] is None


@pytest.mark.parametrize(
    "second", [[-1, 2, 3, 5], [-1, 1, 2, 3], [-1, 3, 3, 4], [-1, 4, -1, 2], [-1, -2, 2, 3]], ids=str
)
def test_positions_that_cannot_be(second):
    """Beyond the sequence, in its padding, the same twice, backwards, negative."""
    labels = torch.tensor([[20, 21, 22, -100], [-100, 23, 24, 25]])
    batch = {"labels": labels, "teacher_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])}
    positions = torch.tensor([[0, -1, 3, -1], second])
    with pytest.raises(ValueError, match=r"of row 1 are \[-1, .*of 5 columns it reads 3"):
        asked_positions({**batch, "teacher_label_positions": positions}, *target_positions(labels))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and labels \(2, 4\)"):
        asked_positions({**batch, "teacher_label_positions": positions[:, :3]}, *target_positions(labels))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_live_teacher_equals_each_row_alone(family, side):
    """Ragged rows, both padding sides, pad == EOS: logits at the target positions equal an unpadded forward."""
    model = {"llama": lambda: make_teacher(64), "gpt2": gpt2, "gemma2": gemma2}[family]()
    sequences = [p + t for p, t in zip(PROMPTS, TARGETS, strict=True)]
    ids, mask = padded(sequences, side, EOS)
    labels, _ = padded(TARGETS, "right", -100)
    offset = torch.tensor([ids.shape[1] - len(s) if side == "left" else 0 for s in sequences])
    start = offset + torch.tensor([len(p) for p in PROMPTS])
    rows, columns = target_positions(labels)
    ours = LiveTeacher(model).logits_at(ids, mask, rows, teacher_columns(start, rows, columns))(slice(None))
    theirs, losses = [], 0.0
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        sequence = torch.tensor([prompt + target])
        with torch.no_grad():
            theirs.append(model(sequence).logits[0, len(prompt) - 1 : len(prompt) - 1 + len(target)])
            masked = torch.tensor([[-100] * len(prompt) + target])
            losses += model(sequence, labels=masked).loss.item() * len(target)
    assert ours.shape == (10, 64)
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-5)
    # The model's own loss shifts by itself: the same target tokens under the same logits.
    assert F.cross_entropy(ours, labels[rows, columns], reduction="sum").item() == pytest.approx(losses, rel=1e-5)


def test_only_target_positions_reach_the_head():
    model = make_teacher(64)
    seen = []
    model.lm_head.register_forward_hook(lambda _module, args, out: seen.append((args[0].shape, out.shape)))
    ids = torch.arange(4, 40).reshape(3, 12)
    rows, columns = torch.tensor([0, 2]), torch.tensor([4, 11])
    ours = LiveTeacher(model).logits_at(ids, torch.ones_like(ids), rows, columns)(slice(None))
    assert seen == [(torch.Size([1, 2, 32]), torch.Size([1, 2, 64]))]
    # The hook is gone: an ordinary call gives logits everywhere again.
    torch.testing.assert_close(ours, model(ids).logits[rows, columns])
    none = LiveTeacher(model).logits_at(ids, torch.ones_like(ids), rows[:0], columns[:0])(slice(None))
    assert none.shape == (0, 64)


def test_model_that_never_calls_its_head():
    class OwnProjection(type(make_teacher(64))):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
            return type("Output", (), {"logits": F.linear(hidden, self.lm_head.weight)})()

    model = make_teacher(64)
    other = OwnProjection(model.config)
    other.load_state_dict(model.state_dict())
    ids = torch.arange(4, 24).reshape(2, 10)
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 9])
    ours = LiveTeacher(other).logits_at(ids, torch.ones_like(ids), rows, columns)(slice(None))
    torch.testing.assert_close(ours, model(ids).logits[rows, columns])


def test_live_teacher_is_frozen_and_in_its_own_dtype():
    model = make_teacher(64).train()
    teacher = LiveTeacher(model, "bfloat16")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(4, 10).reshape(1, 6)
    with torch.enable_grad():
        logits = teacher.logits_at(ids, torch.ones_like(ids), torch.tensor([0]), torch.tensor([2]))(slice(None))
    assert logits.dtype == torch.bfloat16 and not logits.requires_grad
    model.train()  # somebody's callback
    teacher.logits_at(ids, torch.ones_like(ids), torch.tensor([0]), torch.tensor([2]))(slice(None))
    assert not model.training


def test_live_teacher_from_a_folder(tmp_path):
    model = make_teacher(64).to(torch.float16)
    model.save_pretrained(tmp_path)
    assert LiveTeacher.load(str(tmp_path)).model.dtype == torch.float16
    loaded = LiveTeacher.load(tmp_path, "float32").model
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight.float())


def test_unfit_teachers_are_named():
    with pytest.raises(ValueError, match="encoder-decoder .*t5"):
        LiveTeacher(make_t5())
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        LiveTeacher(make_teacher().model)
    with pytest.raises(ValueError, match="teacher=7 is a int"):
        LiveTeacher.load(7)


def test_padded_rows_of_either_side_do_not_count():
    student, teacher = torch.randn(3, 10), torch.randn(3, 16)
    vocabulary = SharedVocabulary.between(10, 16)
    assert torch.equal(vocabulary.restrict_student(student), student)
    assert torch.equal(vocabulary.restrict_student(teacher), teacher[:, :10])
    vocabulary = SharedVocabulary.between(16, 10)
    assert torch.equal(vocabulary.restrict_student(teacher), teacher[:, :10])
    with pytest.raises(ValueError, match="student has 10 output rows and the teacher 16.*mask_padding"):
        SharedVocabulary.between(10, 16, policy="strict")
    with pytest.raises(ValueError, match="vocab_policy='none' is unknown; choose one of mask_padding, strict, id_map"):
        SharedVocabulary.between(16, 16, policy="none")
    assert SharedVocabulary.between(16, 16, policy="strict").size == 16


def test_tokens_of_one_tokenizer_get_probability_zero(make_bpe_tokenizer):
    plain, extended = make_bpe_tokenizer(), make_bpe_tokenizer()
    extended.add_tokens(["<extra>", "<more>"])
    first = len(plain)
    assert extended.get_vocab()["<extra>"] == first
    for ours, theirs in ((plain, extended), (extended, plain)):
        vocabulary = SharedVocabulary.between(288, 288, ours, theirs)
        assert vocabulary.one_sided == (first, first + 1)
        probabilities = vocabulary.restrict_student(torch.randn(4, 288)).softmax(-1)
        assert torch.equal(probabilities[:, first : first + 2], torch.zeros(4, 2))
        assert (probabilities[:, :first] > 0).all() and (probabilities[:, first + 2 :] > 0).all()
        with pytest.raises(ValueError, match=rf"ids \[{first}, {first + 1}\] are in one tokenizer only"):
            SharedVocabulary.between(288, 288, ours, theirs, "strict")
        with pytest.raises(ValueError, match=f"labels hold id {first + 1}, which is not"):
            vocabulary.check(torch.tensor([4, first + 1]), torch.tensor([[4]]))
    assert SharedVocabulary.between(first, 288, plain, extended).one_sided == ()


def test_different_tokenizers_are_named(make_bpe_tokenizer):
    class Vocabulary(dict):
        get_vocab = dict.copy

    ours = make_bpe_tokenizer()
    swapped = Vocabulary(ours.get_vocab())
    a, b = swapped["a"], swapped["b"]
    swapped["a"], swapped["b"] = b, a
    with pytest.raises(
        ValueError, match=f"2 of {len(ours)} tokens do not match.*'a' is {a} for the student and {b} for the"
    ):
        SharedVocabulary.between(280, 280, ours, swapped)
    renamed = Vocabulary(ours.get_vocab())
    renamed["<turn>"] = renamed.pop("<|im_start|>")
    with pytest.raises(ValueError, match=r"1 is '<\|im_start\|>' for the student and '<turn>' for the teacher"):
        SharedVocabulary.between(280, 280, ours, renamed)


def test_ids_that_the_teacher_does_not_have():
    vocabulary = SharedVocabulary.between(20, 10)
    vocabulary.check(torch.tensor([9]), torch.tensor([[9, 0]]))
    with pytest.raises(ValueError, match="labels hold id 12, .* share \\(10 ids\\)"):
        vocabulary.check(torch.tensor([3, 12]), torch.tensor([[3]]))
    with pytest.raises(ValueError, match="teacher_input_ids hold id 11, but the teacher has 10 ids"):
        vocabulary.check(torch.tensor([3]), torch.tensor([[3, 11]]))


def test_ids_that_are_mapped():
    """Ours 0 1 2 3 are theirs 4 - 0 2, of 6; the shared ones in the teacher's order are 0 2 4."""
    vocabulary = MappedVocabulary.of(4, 6, {0: 4, 2: 0, 3: 2, 9: 1, 1: 6})
    assert vocabulary.size == 3 and vocabulary.by_mass and vocabulary.missing_below(4) == [1]
    student, teacher = torch.arange(4.0)[None], torch.arange(6.0)[None]
    assert vocabulary.restrict_student(student).tolist() == [[2, 3, 0]]
    assert vocabulary.restrict_teacher(teacher).tolist() == [[0, 2, 4]]
    assert vocabulary.places(torch.arange(6)).tolist() == [0, 3, 1, 3, 2, 3]
    assert vocabulary.to_teacher(torch.tensor([[3, 0], [-100, 2]])).tolist() == [[2, 4], [-100, 0]]
    vocabulary.check(torch.tensor([0, 2, 3]), torch.tensor([[5]]))
    with pytest.raises(ValueError, match="labels hold id 1, which is not in the vocabulary"):
        vocabulary.check(torch.tensor([0, 1]), torch.tensor([[5]]))
    with pytest.raises(ValueError, match="the student's id 1 stands for a token that the teacher does not"):
        vocabulary.to_teacher(torch.tensor([0, 1]))
    whole = MappedVocabulary.of(3, 3, {0: 2, 1: 0, 2: 1})
    assert not whole.by_mass and whole.restrict_teacher(teacher[:, :3]).tolist() == [[0, 1, 2]]
    assert whole.restrict_student(student[:, :3]).tolist() == [[1, 2, 0]]


def test_the_teacher_reads_mapped_rows():
    """The student's pads need no id of the teacher."""
    vocabulary = MappedVocabulary.of(4, 6, {0: 4, 2: 0, 3: 2})
    batch = {
        "input_ids": torch.tensor([[3, 2], [0, 1]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "labels": torch.tensor([[0, 2], [3, -100]]),
    }
    derived = with_teacher_inputs(batch, 3, vocabulary)
    assert derived["teacher_input_ids"].tolist() == [[2, 0, 2, 4, 0], [4, 2, 2, 0, 0]]
    assert derived["teacher_attention_mask"].sum(dim=1).tolist() == [5, 3]
    assert derived["teacher_labels_start"].tolist() == [3, 2]


def test_tokens_that_are_written_the_same(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randperm(len(tokenizer), generator=generator).tolist()
    other = renumbered(tokenizer, ids)
    assert same_tokens(tokenizer, other) == dict(enumerate(ids))
    small = trim_tokenizer(other, ["Return the sum of two numbers."])
    pairs = same_tokens(small, tokenizer)
    assert len(pairs) == len(small) < len(tokenizer)
    for ours, theirs in pairs.items():
        assert small.convert_ids_to_tokens(ours) == tokenizer.convert_ids_to_tokens(theirs)
    text = "Return the sum"
    assert [pairs[i] for i in small(text)["input_ids"]] == tokenizer(text)["input_ids"]
    with pytest.raises(ValueError, match="WordPiece.*ByteLevel"):
        same_tokens(wordpiece(), tokenizer)


def test_a_trimmed_tokenizer_puts_a_space_in_front_of_a_text_as_the_other_does(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    small = trim_tokenizer(tokenizer, ["Return the sum"])
    assert small.tokenize("Return the sum") == tokenizer.tokenize("Return the sum")
    assert tokenizer.tokenize("Return the sum")[0].startswith("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")


def test_a_trimmed_tokenizer_puts_the_same_tokens_around_a_text(make_bpe_tokenizer):
    tokenizer = renumbered(make_bpe_tokenizer(), range(279, -1, -1))  # special tokens last
    around = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_end|>", "<s>")]
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(*around)
    small = trim_tokenizer(tokenizer, ["Return"])
    tokens = [one.convert_ids_to_tokens(one("Return")["input_ids"]) for one in (small, tokenizer)]
    assert tokens[0] == tokens[1] == ["<s>", *tokenizer.tokenize("Return"), "<|im_end|>"]


def test_a_vocabulary_of_a_given_size(make_bpe_tokenizer):
    """What is frequent stays, then what the tokenizer learnt first, and every text can still be written."""
    tokenizer = make_bpe_tokenizer()
    texts = ["Return the sum", "Return", "Return"]
    least = 256 + 4  # bytes and special tokens
    count = len(tokenizer)
    assert trim_tokenizer(tokenizer, texts, count).get_vocab().keys() == tokenizer.get_vocab().keys()
    [learnt_first] = (
        trim_tokenizer(tokenizer, [], least + 1).get_vocab().keys()
        - trim_tokenizer(tokenizer, [], least).get_vocab().keys()
    )
    assert learnt_first == min(
        (token for token in tokenizer.get_vocab() if len(token) == 2), key=tokenizer.get_vocab().get
    )
    for size in (least, least + 4, least + 9):
        small = trim_tokenizer(tokenizer, texts, size)
        assert least <= len(small) <= size
        for text in (*texts, "def ünï(x): return 7"):
            assert small.decode(small(text)["input_ids"]) == text
    assert small.tokenize("Return") == ["Return"] != trim_tokenizer(tokenizer, [], size).tokenize("Return")
    with pytest.raises(
        ValueError, match=f"a vocabulary of 9 tokens is too small.* {least} already. Give at least {least}"
    ):
        trim_tokenizer(tokenizer, texts, 9)


def test_an_end_that_is_spelt_in_another_way():
    class Tokenizer(dict):
        get_vocab, bos_token = dict.copy, None

        def __init__(self, eos_token, **vocabulary):
            super().__init__(vocabulary)
            self.eos_token = eos_token

    theirs = Tokenizer("end", a=0, b=1, end=2)
    assert same_tokens(Tokenizer("stop", b=0, stop=1), theirs) == {0: 1, 1: 2}
    # The other's end has a token of its own already, or ours is an ordinary token there: no second guess.
    assert same_tokens(Tokenizer("stop", b=0, stop=1, end=2), theirs) == {0: 1, 2: 2}
    assert same_tokens(Tokenizer("a", b=0, a=1), theirs) == {0: 1, 1: 0}
    with pytest.raises(ValueError, match="no token in common"):
        same_tokens(Tokenizer("x", x=0), theirs)
