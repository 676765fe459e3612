"""The card that a training leaves, against the trainer's own record and huggingface_hub's reading."""


import pytest
from datasets import Dataset
from distillation_toys import arguments, make_bart, make_rope, make_teacher, ragged_rows, write_teacher
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.model_card_callback import MARK, ModelCardCallback


@pytest.fixture
def train(tmp_path):
    """Two steps on toys with the callback; returns the trainer."""

    def run(student=None, teacher=None, known=None, hub_model_id=None, compute_metrics=None, **changed):
        rows = Dataset.from_list(ragged_rows(8))
        trainer = DistillationTrainer(
            make_rope("merged") if student is None else student,
            arguments(tmp_path / "run", max_steps=2, hub_model_id=hub_model_id, **changed),
            train_dataset=rows,
            eval_dataset=rows.select(range(6)),
            compute_metrics=compute_metrics,
            teacher=make_teacher() if teacher is None else teacher,
        )
        trainer.add_callback(ModelCardCallback(trainer, **known or {}))
        trainer.train()
        return trainer

    return run


def card_of(trainer):
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def test_it_tells_what_the_trainer_knows(train, tmp_path, make_bpe_tokenizer):
    folder = write_teacher(tmp_path / "big", make_bpe_tokenizer(), layers=2)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    known = {"task": {"name": "echo", "language": "en"}, "data": {"name": "echoes", "license": "cc0-1.0"}}
    trainer = train(
        teacher=AutoModelForCausalLM.from_pretrained(folder),
        known=known,
        hub_model_id="me/tiny",
        distill_weight=0.75,
        learning_rate=2e-3,
        hub_token="hf_secret",
    )
    measured = trainer.evaluate()
    card = card_of(trainer)
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "transformers")
    assert card.data.get("base_model") is None  # a folder's name is no id of the Hub
    found = {result.metric_type: result for result in card.data.eval_results}
    assert set(found) == {"ce", "kl", "teacher_agreement"}
    assert found["ce"].metric_value == pytest.approx(measured["eval_ce_loss"], abs=5e-4)
    assert found["kl"].metric_value == pytest.approx(measured["eval_distill_loss"], abs=5e-4)
    assert (found["ce"].dataset_name, found["ce"].dataset_split) == ("echoes", "validation")
    assert found["ce"].metric_args == {"rows": 6}
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert f"({size / 1e6:.1f} M parameters, 2 encoder and 2 decoder layers)" in card.text
    assert "**Teacher.** big, mit." in card.text and "Rows: 8 train, 6 validation." in card.text
    assert f"`{trainer.train_dataset._fingerprint}`" in card.text and "echoes: cc0-1.0." in card.text
    for row in ("| divergence | forward_kl |", "| distill_weight | 0.75 |", "| learning_rate | 0.002 |"):
        assert row in card.text
    assert "jsd_beta" not in card.text and "hf_secret" not in card.content and str(tmp_path) not in card.content
    seconds = next(row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row)
    assert f"| training | 2 | {seconds:.0f} |" in card.text
    assert "Energy was not measured." in card.text and card.data.get("co2_eq_emissions") is None
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in card.text


def test_a_card_that_it_did_not_write_stays(train):
    trainer = train()
    path = f"{trainer.args.output_dir}/README.md"
    mine = card_of(trainer).content.replace(MARK, "")
    with open(path, "w") as file:
        file.write(mine)
    trainer.evaluate()
    trainer.create_model_card(license="mit")  # as `push_to_hub` calls it
    assert open(path).read() == mine


def test_the_draft_of_transformers_does_not_take_its_place(train):
    trainer = train()
    before = card_of(trainer).content
    trainer.create_model_card(language="fr", tags="draft")
    assert card_of(trainer).content == before and MARK in before


def test_no_card_of_a_student_that_was_not_trained(tmp_path):
    rows = ragged_rows(4)
    options = {"train_dataset": rows, "eval_dataset": rows, "teacher": make_teacher()}
    trainer = DistillationTrainer(make_rope("merged"), arguments(tmp_path / "run"), **options)
    trainer.add_callback(ModelCardCallback(trainer))
    trainer.evaluate()
    assert not (tmp_path / "run" / "README.md").exists()


def test_numbers_of_other_scales_are_given_as_they_were_logged(train):
    """88 is no share of 1, and nothing that a metric gives may end a training."""
    trainer = train(
        student=make_bart(),
        compute_metrics=lambda _: {"f1": 88.25, "rougeL": float("nan")},
        eval_strategy="steps",
        eval_steps=1,
    )
    card = card_of(trainer)
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["f1"] == 88.25 and "rougeL" not in values and "- f1: 88.25\n" in card.text
    assert "An encoder-decoder of type `bart`" in card.text and "2 encoder and 2 decoder layers" in card.text
    assert "trust_remote_code" not in card.text and "bart" in card.data.tags
