"""The card that a training leaves, against the trainer's own record and huggingface_hub's reading."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from distillation_toys import arguments, make_bart, make_rope, make_teacher, ragged_rows, write_teacher
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_encdec_distill import DistillationTrainer
from hf_encdec_distill.bench import EnergyMeter
from hf_encdec_distill.cards.callback import MARK, ModelCardCallback
from hf_encdec_distill.distillation import LiveTeacher, capture


@pytest.fixture
def train(tmp_path, make_bpe_tokenizer):
    """Two steps on toys with the callback; returns the trainer."""

    def run(
        student=None,
        teacher=None,
        known=None,
        resume=None,
        compute_metrics=None,
        rows=None,
        optimizers=(None, None),
        **changed,
    ):
        rows = Dataset.from_list(ragged_rows(8)) if rows is None else rows
        trainer = DistillationTrainer(
            make_rope("merged") if student is None else student,
            arguments(tmp_path / "run", **{"max_steps": 2, **changed}),
            train_dataset=rows,
            eval_dataset=rows.select(range(6)),
            processing_class=make_bpe_tokenizer(),
            compute_metrics=compute_metrics,
            optimizers=optimizers,
            teacher=make_teacher() if teacher is None else teacher,
        )
        trainer.add_callback(ModelCardCallback(trainer, **known or {}))
        trainer.train(resume_from_checkpoint=resume)
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
        freeze_encoder=True,
        encoder_states=str(tmp_path / "states"),
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
    teacher_size = sum(parameter.numel() for parameter in trainer.teacher.model.parameters())
    sizes = f"| Parameters, M | {teacher_size / 1e6:.1f} | {size / 1e6:.1f} | {size / teacher_size:.2f} |"
    assert sizes in card.text and "First token, ms" not in card.text  # counted; no time was measured


def test_the_learning_rate_is_that_of_the_optimizer(train):
    """A script may bring its own; that of the arguments is not used then."""
    student = make_rope("merged")
    halves = list(student.parameters())[::2], list(student.parameters())[1::2]
    optimizer = torch.optim.AdamW([{"params": p, "lr": lr} for p, lr in zip(halves, (3e-3, 1e-3), strict=True)])
    trainer = train(student=student, optimizers=(optimizer, None), learning_rate=7e-5)
    assert optimizer.param_groups[0]["lr"] < 3e-3  # has fallen; the card has the peak
    assert "| learning_rate | 0.003 |" in card_of(trainer).text


def test_a_card_that_it_did_not_write_stays(train):
    trainer = train()
    path = Path(trainer.args.output_dir) / "README.md"
    mine = path.read_text().replace(MARK, "")
    path.write_text(mine)
    trainer.evaluate()
    trainer.create_model_card(license="mit")  # as `push_to_hub` calls it
    assert path.read_text() == mine


def test_the_draft_of_transformers_does_not_take_its_place(train):
    trainer = train()
    before = card_of(trainer).content
    trainer.create_model_card(language="fr", tags="draft")
    assert card_of(trainer).content == before and MARK in before


def test_no_card_of_a_student_that_was_not_trained(tmp_path, make_bpe_tokenizer):
    rows = ragged_rows(4)
    options = {"train_dataset": rows, "eval_dataset": rows, "teacher": make_teacher()}
    options["processing_class"] = make_bpe_tokenizer()
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


def test_a_resumed_run_says_which_part_its_time_is_of(train):
    trainer = train(max_steps=1, save_strategy="steps", save_steps=1)
    resumed = train(max_steps=3, resume=f"{trainer.args.output_dir}/checkpoint-1")
    assert "continued from step 1; earlier time not included" in card_of(resumed).text
    seconds = next(row["train_runtime"] for row in resumed.state.log_history if "train_runtime" in row)
    assert f"| training | 2 | {seconds:.0f} | continued" in card_of(resumed).text


def test_data_of_the_hub_are_named_with_their_commit(train):
    """As `load_dataset` leaves it: the files it read, with the commit that they were read at."""
    rows = Dataset.from_list(ragged_rows(8))
    rows.info.download_checksums = {"hf://datasets/someone/echoes@0123abcd/data/train.parquet": {"num_bytes": 1}}
    rows.info.license = "cc-by-4.0"
    card = card_of(train(rows=rows))
    assert card.data.datasets == ["someone/echoes"]
    assert "Commit `0123abcd`" in card.text and "The data, someone/echoes: cc-by-4.0." in card.text


def test_a_cache_names_the_teacher_that_it_was_made_of(train, tmp_path, make_bpe_tokenizer):
    folder = write_teacher(tmp_path / "big", make_bpe_tokenizer(), layers=2)
    rows = Dataset.from_list(ragged_rows(8))
    capture(LiveTeacher.load(folder), rows, tmp_path / "cache", make_bpe_tokenizer(), k=4)
    card = card_of(train(make_rope("separate"), tmp_path / "cache", rows=rows, eval_strategy="steps", eval_steps=2))
    assert "**Teacher.** big, license not stated." in card.text
    # of 4 tokens and a tail the divergence is an estimate
    assert {result.metric_type for result in card.data.eval_results} == {"ce", "teacher_agreement"}


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Counters as Linux shows them: each reading of the package finds it 0.9 kJ further on, with a range of 1.5 kJ."""
    folder = tmp_path / "powercap"
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys")):
        (folder / zone).mkdir(parents=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "max_energy_range_uj").write_text("1500000000\n")
        (folder / zone / "energy_uj").write_text("1000000000\n")
    read_text = Path.read_text

    def reading(path, *args, **kwargs):
        text = read_text(path, *args, **kwargs)
        if path.name == "energy_uj":
            path.write_text(f"{(int(text) + 900_000_000) % 1_500_000_000}\n")
        return text

    monkeypatch.setattr(Path, "read_text", reading)
    monkeypatch.setattr(EnergyMeter.__init__, "__defaults__", (folder,))
    return folder


def test_energy_is_what_the_counters_say(train, powercap):
    """Read at the beginning, after each of 2 steps and at the end: three times 900 J, over the end of the range."""
    trainer = train(known={"energy": {"grid_g_per_kwh": 50.0, "location": "Somewhere"}})
    kwh = 3 * 900 / 3.6e6
    card = card_of(trainer)
    assert f"{kwh:.3g} kWh by the counters of 1 CPU (RAPL)" in card.text
    emissions = card.data.co2_eq_emissions
    assert emissions["emissions"] == pytest.approx(50 * kwh, abs=1e-3)
    assert (emissions["geographical_location"], emissions["training_type"]) == ("Somewhere", "fine-tuning")
    assert "1 CPU (RAPL), 50.0 g per kWh" in emissions["source"] and emissions["hardware_used"]
    trainer.evaluate()  # is no part of the training
    assert card_of(trainer).data.co2_eq_emissions == emissions


def test_energy_without_the_grid_is_no_emission(train, powercap):
    card = card_of(train())
    assert "0.00075 kWh" in card.text and card.data.get("co2_eq_emissions") is None


def test_counters_that_may_not_be_read_are_no_counters(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert EnergyMeter().result() is None


def test_gpus_are_read_in_millijoules(tmp_path, monkeypatch):
    """The names are nvidia-ml-py's; there is no GPU here to read."""
    readings = iter([5_000, 7_500, 12_500])
    names = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid, "NVMLError": RuntimeError}
    names["nvmlDeviceGetTotalEnergyConsumption"] = lambda uuid: next(readings) if uuid == "GPU-0123" else 0
    pynvml = ModuleType("pynvml")
    vars(pynvml).update(names, __spec__=ModuleSpec("pynvml", None))
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="0123"))
    meter = EnergyMeter(tmp_path)
    meter.update()
    meter.update()
    assert meter.result() == {"kwh": pytest.approx(7.5 / 3.6e6), "counters": "1 GPU (NVML)"}


def test_numbers_are_of_the_weights_as_they_are(train):
    """Not of those of an evaluation before, nor of other rows."""
    trainer = train(max_steps=3, eval_strategy="steps", eval_steps=2)
    trainer.state.log_history = [row for row in trainer.state.log_history if "eval_loss" not in row]
    card = trainer.callback_handler.callbacks[-1]
    assert isinstance(card, ModelCardCallback)
    measured = trainer.evaluate()
    assert card.metrics()["models"]["student_kd"]["ce"] == measured["eval_ce_loss"]
    trainer.evaluate(trainer.train_dataset)
    assert card.metrics()["models"]["student_kd"]["ce"] == measured["eval_ce_loss"]
    assert f"| {measured['eval_ce_loss']:.3f} |" in card_of(trainer).text
    card.on_step_end(trainer.args, trainer.state, trainer.control)  # of one more, with other weights
    assert "models" not in card.metrics()


def test_the_best_weights_have_the_numbers_of_their_own_step(train):
    trainer = train(
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls: the first is kept
    )
    first = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    text = card_of(trainer).text
    assert f"| {first['eval_ce_loss']:.3f} |" in text
    assert trainer.evaluate()["eval_ce_loss"] == pytest.approx(first["eval_ce_loss"])


@pytest.mark.parametrize(
    "known",
    [
        {"teacher": "big"},
        {"data": {"train_rows": "8"}},
        {"stages": [{"seconds": "10"}]},
        {"energy": {"grid_g_per_kwh": 56}},
        {"energy": {"grid_g_per_kwh": "56", "location": "France"}},
    ],
)
def test_what_cannot_be_written_is_said_before_the_training(train, tmp_path, known):
    with pytest.raises((ValueError, TypeError)):
        train(known=known)
    assert not any((tmp_path / "run").rglob("*.safetensors"))


def test_a_card_in_another_encoding_stays(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/README.md").write_bytes("Über das Modell".encode("latin-1"))
    train(save_strategy="steps", save_steps=1)
    assert (tmp_path / "run/README.md").read_bytes().startswith(b"\xdcber")


def test_what_contradicts_itself_is_said_before_the_training(train, tmp_path):
    with pytest.raises(ValueError, match="published='student' is not among models"):
        train(known={"models": {"student_kd": {"n": 3}}, "seeds": [0], "published": "student"})
    assert not (tmp_path / "run" / "README.md").exists()
