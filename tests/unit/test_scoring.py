"""Sums of each row and answers, and the loss of a teacher's tuning, against transformers and written-out formulas."""

import pytest
import torch
import torch.nn.functional as F
from distillation_toys import logged_loss, ragged_rows, spread
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from hf_encdec_distill.cli.quickstart.tuning import CompletionTrainer, completion_loss
from hf_encdec_distill.evaluation import scoring


def toy_rows(count):
    rows = ragged_rows(count)
    return [{"prompt": row["input_ids"], "inputs": row["input_ids"][:-1], "labels": row["labels"]} for row in rows]


def test_the_completion_loss_is_that_of_transformers(teacher_folder):
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    rows = toy_rows(5)
    batch = scoring.completion_batch(rows, pad_token_id=0)
    labels = batch.pop("labels")
    tokens = sum(len(row["labels"]) for row in rows)
    ours = completion_loss(model(**batch), labels, torch.tensor(tokens))
    sums = []
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["labels"]])
        masked = torch.tensor([[-100] * len(row["prompt"]) + row["labels"]])
        sums.append(model(input_ids=ids, labels=masked).loss * len(row["labels"]))
    torch.testing.assert_close(ours, sum(sums) / tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_teacher_is_tuned_on_every_token_of_its_targets(teacher_folder, tmp_path, smoothing):
    """transformers 5 leaves the first label of a causal model out of its count: of these there would be none."""
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    rows = [{**row, "labels": row["labels"][:1]} for row in toy_rows(4)]
    losses = []
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["labels"]])
        masked = torch.tensor([[-100] * len(row["prompt"]) + row["labels"]])
        output = model(input_ids=ids, labels=masked)
        losses.append(LabelSmoother(smoothing)(output, masked, shift_labels=True) if smoothing else output.loss)
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "remove_unused_columns": False}
    options |= {"max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, "label_smoothing_factor": smoothing}
    trainer = CompletionTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), per_device_train_batch_size=len(rows), **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=scoring.completion_batch,
    )
    expected = torch.stack(losses).mean().item()
    assert logged_loss(trainer) == pytest.approx(expected, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_only_a_target_that_is_whole_ends_in_eos(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    target = "It is red and green."
    ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    for most, expected in ((len(ids) + 1, [*ids, tokenizer.eos_token_id]), (len(ids), ids), (len(ids) - 1, ids[:-1])):
        pairs = [{"source": "red", "target": target}, {"source": "red", "target": ""}]
        rows = scoring.encode_rows(pairs, tokenizer, "{source}\n#", 256, most)
        assert [row["labels"] for row in rows] == [expected, [tokenizer.eos_token_id]]
        assert rows[0]["target"] == target


def test_scores_are_the_sums_of_each_row(teacher_folder, student_folder):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    student = spread(AutoModelForSeq2SeqLM.from_pretrained(student_folder), seed=4)
    start = student.config.decoder_start_token_id
    rows = [{**row, "prompt": [*row["inputs"], start]} for row in toy_rows(2 * scoring.BATCH_SIZE + 3)]
    measures = ("ce", "kl", "teacher_agreement", "entropy_gap", "ece")
    sums = scoring.score({"student": student, "teacher": teacher}, rows, teacher, measures=measures)
    for index, row in enumerate(rows):
        target = torch.tensor(row["labels"])
        with torch.no_grad():
            theirs = teacher(torch.tensor([row["prompt"] + row["labels"]])).logits[0, len(row["prompt"]) - 1 : -1]
            ours = student(
                input_ids=torch.tensor([row["inputs"]]), decoder_input_ids=torch.tensor([[start, *row["labels"][:-1]]])
            ).logits[0]
        expected = {
            "ce": F.cross_entropy(ours, target, reduction="sum"),
            "kl": F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True),
            "teacher_agreement": (ours.argmax(-1) == theirs.argmax(-1)).sum(),
            "entropy_gap": sum(
                sign * torch.distributions.Categorical(logits=x).entropy().sum()
                for sign, x in ((1, ours), (-1, theirs))
            ),
        }
        confidence, likeliest = ours.softmax(-1).max(-1)
        for bin in range(15):
            inside = (confidence > bin / 15) & (confidence <= (bin + 1) / 15)
            gap = (confidence[inside] - (likeliest == target)[inside].float()).sum().item()
            assert sums["student"]["ece"][index, bin] == pytest.approx(gap, abs=1e-4)
        for name, value in expected.items():
            assert sums["student"][name][index] == pytest.approx(value.item(), rel=1e-3, abs=1e-4)
        assert sums["teacher"]["kl"][index] == pytest.approx(0.0, abs=1e-5)
        assert sums["teacher"]["teacher_agreement"][index] == len(row["labels"])


def test_a_teacher_among_the_models_is_run_once(teacher_folder, monkeypatch):
    teacher, rows, runs = AutoModelForCausalLM.from_pretrained(teacher_folder).eval(), toy_rows(5), []
    alone = scoring.score({"teacher": teacher}, rows)["teacher"]["ce"]
    target_logits = scoring.target_logits
    monkeypatch.setattr(scoring, "target_logits", lambda *args: runs.append(args) or target_logits(*args))
    sums = scoring.score({"teacher": teacher}, rows, teacher)["teacher"]
    assert len(runs) == 1
    assert sums["ce"].tolist() == alone.tolist() and sums["kl"] == pytest.approx(0, abs=1e-6)
    assert sums["teacher_agreement"].tolist() == [len(row["labels"]) for row in rows]


def test_an_answer_ends_at_any_end_of_the_generation_config(student_folder, make_bpe_tokenizer):
    """Of which chat models have several, and the tokenizer knows one."""
    tokenizer = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    student = spread(AutoModelForSeq2SeqLM.from_pretrained(student_folder), seed=4)
    prompt = tokenizer("def area(r)")["input_ids"]
    row, ids = {"prompt": prompt, "inputs": prompt, "labels": [5]}, torch.tensor([prompt])
    whole = student.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 1:].tolist()
    student.generation_config.eos_token_id = [tokenizer.eos_token_id, whole[0]]
    [answer] = scoring.generate(student, tokenizer, [row], 6)
    assert answer == tokenizer.decode(whole[:1], skip_special_tokens=True).strip() != tokenizer.decode(whole).strip()


def test_answers_are_those_of_the_teacher_on_each_row_alone(teacher_folder, student_folder, make_bpe_tokenizer):
    """A student of full depth answers as its teacher does; neither the prompt nor a start token is in the answer."""
    tokenizer = make_bpe_tokenizer(chat_template=None, pad_token="<|endoftext|>")
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    student = AutoModelForSeq2SeqLM.from_pretrained(student_folder).eval()
    rows = [{**row, "prompt": [*row["inputs"], student.config.decoder_start_token_id]} for row in toy_rows(6)]
    alone = []
    for row in rows:
        ids = torch.tensor([row["prompt"]])
        tokens = teacher.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        alone.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert len(set(alone)) > 1
    for model in (teacher, student):
        assert scoring.generate(model, tokenizer, rows, 5) == alone
