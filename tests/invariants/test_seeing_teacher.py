"""A teacher that sees in the trainer, live and cached, against transformers' own models called on each row alone."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from distillation_toys import InOrder, arguments, logged_loss, make_rope, make_teacher
from toys import VOCAB
from vision_toys import FEATURES, IMAGE, SEEING, llama_of, make_llava, make_seeing_teacher, pixels, seen, twin_of

from hf_encdec_distill.distillation.alignment.positions import target_positions, teacher_columns, teacher_images
from hf_encdec_distill.distillation.collator import DistillationCollator
from hf_encdec_distill.distillation.decoder_only_student import with_padding_left
from hf_encdec_distill.distillation.teachers.capture import capture
from hf_encdec_distill.distillation.teachers.fingerprints import row_keys
from hf_encdec_distill.distillation.teachers.live import LiveTeacher


COUNTS = (2, 0, 1, 1)  # images of each row


def rows_of(kind, counts=COUNTS):
    """Text alone for the student; text and images for the teacher."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(12, 90, (length,), generator=generator).tolist()

    rows = []
    for number, count in enumerate(counts):
        images, tokens = seen(kind, count)
        prompt, target, source = [*ids(1 + number), *tokens, *ids(2)], ids(2 + number % 3), ids(3 + number % 2)
        if kind == "gemma3":
            images["token_type_ids"] = (torch.tensor([prompt]) == IMAGE).long()
        rows.append(
            {
                "input_ids": source,
                "attention_mask": [1] * len(source),
                "labels": target,
                "teacher_input_ids": [*prompt, *target],
                "teacher_labels_start": len(prompt),
                **{f"teacher_{name}": value for name, value in images.items()},
            }
        )
    return rows


def alone(teacher, row):
    """The teacher's logits at the target tokens of one row, `[T, V]`, without padding."""
    ids = torch.tensor([row["teacher_input_ids"]])
    others = ("teacher_input_ids", "teacher_labels_start")
    images = {
        name.removeprefix("teacher_"): value
        for name, value in row.items()
        if name.startswith("teacher_") and name not in others
    }
    if "token_type_ids" in images:  # of the prompt; the target's are zero
        types = images["token_type_ids"]
        images["token_type_ids"] = F.pad(types, (0, ids.shape[1] - types.shape[1]))
    if "image_grid_thw" in images and hasattr(teacher.model, "compute_3d_position_ids"):  # transformers 5
        images["mm_token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad():
        logits = teacher(input_ids=ids, **images).logits[0]
    return logits[row["teacher_labels_start"] - 1 : -1]


def expected_loss(student, teacher, rows):
    """Half the cross-entropy and half the KL, row by row."""
    ce, kl = [], []
    for row in rows:
        target = torch.tensor(row["labels"])
        with torch.no_grad():
            logits = student(input_ids=torch.tensor([row["input_ids"]]), labels=target[None]).logits[0]
        log_q, log_p = logits.log_softmax(-1), alone(teacher, row).log_softmax(-1)
        ce.append(F.cross_entropy(logits, target, reduction="none"))
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    return 0.5 * torch.cat(ce).mean().item() + 0.5 * torch.cat(kl).mean().item()


def make_trainer(folder, teacher, tokenizer, rows, student=None, **changed):
    settings = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    return InOrder(
        student or make_rope("separate", vocab_size=VOCAB),
        arguments(folder, **{**settings, "max_grad_norm": 0.0, "distill_weight": 0.5, **changed}),
        teacher=teacher,
        train_dataset=rows,
        processing_class=tokenizer,
    )


@pytest.fixture(params=SEEING)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(chat_template=None)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_a_ragged_batch_are_those_of_each_row_alone(kind, side, chunked, tokenizer):
    teacher, rows = make_seeing_teacher(kind), rows_of(kind)
    batch = DistillationCollator(tokenizer)(rows)
    ids, mask, images = batch["teacher_input_ids"], batch["teacher_attention_mask"], teacher_images(batch)
    places, columns = target_positions(batch["labels"])
    columns = teacher_columns(batch["teacher_labels_start"], places, columns)
    if side == "left":
        columns += (mask == 0).sum(dim=1)[places]
        if "token_type_ids" in images:
            images["token_type_ids"], _ = with_padding_left(images["token_type_ids"], mask)
        ids, mask = with_padding_left(ids, mask)
    ours = LiveTeacher(teacher).logits_at(ids, mask, places, columns, chunked, images)(slice(None))
    torch.testing.assert_close(ours, torch.cat([alone(teacher, row) for row in rows]), atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_the_loss_is_that_of_each_row_alone(kind, as_dataset, tokenizer, tmp_path):
    """Rows in memory, and rows that went through Arrow, which knows lists alone."""
    teacher, rows = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind)
    student = make_rope("separate", vocab_size=len(tokenizer))
    expected = expected_loss(student, teacher, rows)
    given = [{**dict.fromkeys(rows[0]), **row} for row in rows]  # None for the row without images
    given = [{name: getattr(value, "numpy", lambda v=value: v)() for name, value in row.items()} for row in given]
    trainer = make_trainer(tmp_path, teacher, tokenizer, Dataset.from_list(given) if as_dataset else rows, student)
    assert logged_loss(trainer) == pytest.approx(expected, rel=1e-3)


def test_evaluation_and_generation_are_those_of_each_row_alone(kind, tokenizer, tmp_path):
    teacher, rows = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind)
    student = make_rope("separate", vocab_size=len(tokenizer))
    options = {"per_device_eval_batch_size": 3, "predict_with_generate": True, "generation_max_length": 4}
    trainer = make_trainer(tmp_path, teacher, tokenizer, rows, student, **options)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_loss"] == pytest.approx(expected_loss(student, teacher, rows), rel=1e-3)


def test_hidden_states_of_a_teacher_that_sees(kind, tokenizer, tmp_path):
    """Its last state at each target token, with a projection that is zero: the mean of their squares."""
    teacher, rows = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind)
    trainer = make_trainer(tmp_path, teacher, tokenizer, rows, distill_weight=0.0, hidden_state_weight=1.0)
    caught = []
    trainer._matching.forward = lambda student, of_teacher, asked=None: caught.append(of_teacher) or 0 * student[
        0
    ].sum(-1)
    trainer.train()
    heads = []
    handle = teacher.get_output_embeddings().register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    logits = [alone(teacher, row) for row in rows]
    handle.remove()
    last = torch.cat([states[0, -len(own) - 1 : -1] for states, own in zip(heads, logits, strict=True)])
    torch.testing.assert_close(caught[0][-1], last, atol=1e-4, rtol=1e-4)


# The student's images ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(image_tokenizer):
    """A LLaVA and the student that computes what it does, for rows with 2, 0 and 1 images."""
    llava = make_llava(image_tokenizer)
    with torch.no_grad():
        llava.lm_head.weight.mul_(10)  # so that a wrong image is seen
    student = twin_of(llava, image_tokenizer)
    rows, image = [], image_tokenizer.convert_tokens_to_ids("<image>")
    for number, count in enumerate((2, 0, 1)):
        prompt = [*range(20, 23 + number), *[image] * FEATURES * count, 30]
        row = {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": [*range(40, 43 - number)]}
        images = {} if count == 0 else {"pixel_values": pixels(count) if count > 1 else pixels(1)[0]}
        rows.append({**row, **images})
    return student, llava, rows


def test_without_tokens_of_its_own_the_teacher_sees_what_the_student_sees(pair, image_tokenizer, tmp_path):
    student, llava, rows = pair
    trainer = make_trainer(tmp_path, llava, image_tokenizer, rows, student, distill_weight=1.0)
    assert logged_loss(trainer, "distill_loss") == pytest.approx(0.0, abs=1e-4)
    metrics = trainer.evaluate([{**row, "pixel_values": -row["pixel_values"]} for row in rows[::2]])
    assert metrics["eval_distill_loss"] == pytest.approx(0.0, abs=0.05)  # it has made a step by now


@pytest.mark.parametrize("of_its_own", [False, True])
def test_on_policy_the_teacher_sees_the_prompts_images(of_its_own, pair, image_tokenizer, tmp_path):
    """The student writes as the teacher would: no divergence at any token, which one without images would have."""
    student, llava, rows = pair
    if of_its_own:
        start = student.config.decoder_start_token_id
        rows = [
            {
                **row,
                "teacher_input_ids": [*row["input_ids"], start, *row["labels"]],
                **({"teacher_pixel_values": row["pixel_values"]} if "pixel_values" in row else {}),
            }
            for row in rows
        ]
    options = {"distill_weight": 1.0, "on_policy_fraction": 1.0, "max_target_length": 5, "replay_buffer_size": 2}
    trainer = make_trainer(tmp_path, llava, image_tokenizer, rows, student, **options)
    assert logged_loss(trainer, "distill_loss") == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_student_and_teacher_each_have_images_of_their_own(frozen, pair, image_tokenizer, tmp_path):
    """Of one weight, and of the same tokens, but the frozen encoder reads none of what the teacher reads."""
    student, llava, rows = pair
    start, terms = student.config.decoder_start_token_id, []
    for row in rows:
        images = {"pixel_values": row["pixel_values"].view(-1, 3, 8, 8)} if "pixel_values" in row else {}
        others = {name: -value for name, value in images.items()}
        row |= {"teacher_input_ids": [*row["input_ids"], start, *row["labels"]]}
        row |= {f"teacher_{name}": value for name, value in others.items()}
        with torch.no_grad():
            labels = torch.tensor([row["labels"]])
            ours = student(input_ids=torch.tensor([row["input_ids"]]), labels=labels, **images).logits[0]
            theirs = llava(input_ids=torch.tensor([row["teacher_input_ids"]]), **others).logits[0, -len(ours) - 1 : -1]
        terms.append(F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1))
    options = {"distill_weight": 1.0, "freeze_encoder": frozen}
    trainer = make_trainer(tmp_path, llava, image_tokenizer, rows, student, **options)
    assert torch.cat(terms).mean() > 0.005
    assert logged_loss(trainer, "distill_loss") == pytest.approx(torch.cat(terms).mean().item(), rel=1e-3)


# Cached --------------------------------------------------------------------------------------------------------------


def test_a_cache_gives_the_live_loss(kind, tokenizer, tmp_path):
    teacher, rows = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind)
    student = make_rope("separate", vocab_size=len(tokenizer))
    expected = expected_loss(student, teacher, rows)
    folder = tmp_path / "cache"
    options = {"kind": "dense", "batch_size": 3, "progress": False}
    assert capture(LiveTeacher(teacher), rows, folder, tokenizer, **options) == len(rows)
    assert capture(LiveTeacher(teacher), rows[::-1], folder, tokenizer, **options) == 0
    trainer = make_trainer(tmp_path / "run", folder, tokenizer, rows[::-1], student)
    assert logged_loss(trainer) == pytest.approx(expected, rel=2e-3)


def test_the_key_of_a_row_covers_its_images(kind, tokenizer, tmp_path):
    """Rows with the same tokens and other images have records of their own; one whose image is changed has none."""
    teacher, (row,) = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind, (1,))
    other = {**row, "teacher_pixel_values": -row["teacher_pixel_values"]}
    folder = tmp_path / "cache"
    assert capture(LiveTeacher(teacher), [row, other], folder, tokenizer, kind="dense", progress=False) == 2
    student = make_rope("separate", vocab_size=len(tokenizer))
    for rows in ([row], [other]):
        trainer = make_trainer(tmp_path / "run", folder, tokenizer, rows, student, learning_rate=0.0)
        assert logged_loss(trainer) == pytest.approx(expected_loss(student, teacher, rows), rel=2e-3)
    changed = {**row, "teacher_pixel_values": row["teacher_pixel_values"].clone()}
    changed["teacher_pixel_values"].view(-1)[-1] += 1e-3
    trainer = make_trainer(tmp_path / "run", folder, tokenizer, [changed], student)
    with pytest.raises(ValueError, match="1 of 1 rows of the batch are not in the cache.*same template, images"):
        trainer.train()


def test_the_key_covers_the_students_images_where_the_teacher_reads_those(pair, image_tokenizer, tmp_path):
    student, llava, rows = pair
    changed = {**rows[2], "pixel_values": rows[2]["pixel_values"] + 1}
    folder, start = tmp_path / "cache", student.config.decoder_start_token_id
    options = {"kind": "dense", "progress": False, "start_token_id": start}
    assert capture(LiveTeacher(llava), rows, folder, image_tokenizer, **options) == 3
    trainer = make_trainer(tmp_path / "run", folder, image_tokenizer, rows, student, distill_weight=1.0)
    assert logged_loss(trainer, "distill_loss") == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(ValueError, match="1 of 3 rows of the batch are not in the cache"):
        trainer.evaluate([*rows[:2], changed])
    assert capture(LiveTeacher(llava), [*rows[:2], changed], folder, image_tokenizer, **options) == 1


def test_rows_without_images_keep_the_keys_that_they_had(tokenizer):
    """A cache that was made before is still good, and what else is in a batch does not matter."""
    rows = rows_of("llava")
    batch = DistillationCollator(tokenizer)(rows)
    places, columns = target_positions(batch["labels"])
    where = (places, teacher_columns(batch["teacher_labels_start"], places, columns))
    tokens = (batch["teacher_input_ids"], batch["teacher_attention_mask"])
    with_images, without = row_keys(*tokens, *where, batch["teacher_images_digest"]), row_keys(*tokens, *where)
    assert [one == two for one, two in zip(with_images, without, strict=True)] == [count == 0 for count in COUNTS]


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_teacher_that_reads_only_text_says_so(tokenizer, pair, image_tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, make_teacher(len(tokenizer)), tokenizer, rows_of("llava"))
    with pytest.raises(ValueError, match="LlamaForCausalLM reads no pixel_values.*Give a teacher"):
        trainer.train()
    student, llava, rows = pair
    trainer = make_trainer(tmp_path, llama_of(llava), image_tokenizer, rows, student)
    with pytest.raises(ValueError, match="LlamaForCausalLM reads no pixel_values.*or the student's"):
        trainer.train()


def test_images_that_are_missing_or_of_another_form_are_refused(kind, tokenizer, tmp_path):
    teacher, rows = make_seeing_teacher(kind, len(tokenizer)), rows_of(kind)
    blind = [{name: value for name, value in row.items() if name.startswith("teacher_input")} for row in rows]
    blind = [{**few, "input_ids": row["input_ids"], "labels": row["labels"]} for few, row in zip(blind, rows)]
    with pytest.raises(ValueError, match="teacher_input_ids have image tokens, but the batch has no images"):
        make_trainer(tmp_path, teacher, tokenizer, blind).train()
    row = rows[0]
    if kind in ("idefics3", "smolvlm"):  # an image processor's only row, as one takes the only row of input_ids
        wrong = {"teacher_pixel_values": row["teacher_pixel_values"][0]}
    elif kind == "llava_next":
        wrong = {name: row[f"teacher_{name}"][:1] for name in ("pixel_values", "image_sizes")}
        wrong = {f"teacher_{name}": value for name, value in wrong.items()}
    elif kind in ("llava", "gemma3"):
        wrong = {"teacher_pixel_values": row["teacher_pixel_values"][:1]}
    else:
        wrong = {"teacher_pixel_values": row["teacher_pixel_values"][:16], "teacher_image_grid_thw": [[1, 4, 4]]}
    with pytest.raises(ValueError, match="does not read what it is given of a batch to see.*nothing taken off"):
        make_trainer(tmp_path, teacher, tokenizer, [{**row, **wrong}]).train()


def test_an_answer_that_is_not_written_yet_has_no_token_types(tokenizer, tmp_path):
    rows = [{**row, "teacher_token_type_ids": [0]} for row in rows_of("llava", (1,))]
    trainer = make_trainer(tmp_path, make_llava(tokenizer), tokenizer, rows, on_policy_fraction=1.0)
    trainer._signature_columns = None
    trainer.args.remove_unused_columns = False
    with pytest.raises(ValueError, match="teacher_token_type_ids with on_policy_fraction above 0"):
        trainer.train()
