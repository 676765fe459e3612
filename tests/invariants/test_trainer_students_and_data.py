"""Which scripts, students, teachers and data sets the trainer takes, and what it refuses."""

import pickle

import pytest
import torch
from datasets import Dataset
from distillation_toys import (
    EOS,
    KeepLogs,
    arguments,
    make_bart,
    make_t5,
    make_teacher,
    ragged_rows,
    spread,
    token_terms,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from hf_encdec_distill import (
    DistillationTrainer,
    DistillationTrainingArguments,
    RopeEncDecForConditionalGeneration,
)
from hf_encdec_distill.distillation import LiveTeacher


ROWS = ragged_rows(6)
TEXT = [
    {"source": "def f(x): return x", "target": "Identity."},
    {"source": "def add(a, b): return a + b", "target": "Return the sum of two numbers."},
    {"source": "z", "target": "Zed"},
    {"source": "def g(): pass", "target": "Nothing at all."},
]


@pytest.fixture
def tokenizer(make_bpe_tokenizer):
    return make_bpe_tokenizer(add_bos=True, pad_token="<|endoftext|>")


def make_t5gemma():
    side = {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 3,
        "eos_token_id": EOS,
    }
    config = T5GemmaConfig(encoder=dict(side), decoder=dict(side), vocab_size=280, dropout_rate=0.0)
    return spread(T5GemmaForConditionalGeneration(config))


@pytest.mark.parametrize("make_student", [make_t5, make_bart, make_t5gemma])
def test_any_seq2seq_model_is_a_student(tmp_path, tokenizer, make_student):
    student = make_student()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=3),
        teacher=make_teacher(),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
    )
    ce, kl, agree = token_terms(student, make_teacher(), ROWS)
    metrics = trainer.evaluate()
    names = ("eval_ce_loss", "eval_distill_loss", "eval_teacher_agreement")
    assert [metrics[n] for n in names] == pytest.approx([x.mean().item() for x in (ce, kl, agree)], rel=1e-4)
    before = [p.clone() for p in student.parameters()]
    trainer.train()
    moved = [not torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_adapters_on_both_sides(tmp_path, tokenizer):
    """A LoRA teacher answers with its adapter; of a LoRA student only the adapter moves, and only it is saved."""
    teacher = get_peft_model(make_teacher(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    student = get_peft_model(make_t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))
    before = {name: value.clone() for name, value in student.named_parameters()}
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=2),
        teacher=teacher,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
    )
    _, kl, _ = token_terms(make_t5(), teacher, ROWS)
    assert trainer.evaluate()["eval_distill_loss"] == pytest.approx(kl.mean().item(), rel=1e-4)
    trainer.train()
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert all("lora_" in name for name in load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))


@pytest.mark.parametrize("quantization, error", [("8bit", 0.1), ("4bit", 0.6)])
def test_a_quantised_teacher(tmp_path, tokenizer, quantization, error):
    """It stays as it was loaded, its logits are near those of the whole one, and a student learns from it."""
    whole = make_teacher(hidden_size=64)
    whole.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    settings = {"max_steps": 2, "learning_rate": 1e-2, "teacher_dtype": "float32"}
    trainer = DistillationTrainer(
        make_t5(),
        arguments(tmp_path, teacher_quantization=quantization, **settings),
        teacher=tmp_path / "teacher",
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
    )
    teacher = trainer.teacher.model
    assert teacher.is_quantized and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.model.layers[0].mlp.up_proj.weight.dtype == {"8bit": torch.int8, "4bit": torch.uint8}[quantization]
    ids = torch.arange(4, 24)[None]
    ours, theirs = (model(ids).logits.detach() for model in (teacher, whole))
    assert 0 < (ours - theirs).norm() / theirs.norm() < error
    trainer.train()
    before = make_t5()
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), trainer.model.parameters(), strict=True))
    assert trainer.evaluate()["eval_distill_loss"] > 0
    with pytest.raises(ValueError, match="teacher_quantization='8bit', but the teacher is loaded already"):
        DistillationTrainer(
            make_t5(), arguments(tmp_path, teacher_quantization="8bit"), teacher=make_teacher(), train_dataset=ROWS
        )


def test_a_quantisation_that_cannot_be_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="teacher_quantization='2bit'.*8bit, 4bit"):
        arguments(tmp_path, teacher_quantization="2bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ImportError, match=r'pip install "hf-encdec-distill\[quantization\]"'):
        LiveTeacher.load(tmp_path, quantization="4bit")


@pytest.mark.parametrize("template", [None, "Code:\n{source}\nSummary:"])
def test_merged_student_of_full_depth_is_its_teacher(tmp_path, tokenizer, template):
    """The exact start, from text rows: no divergence, full agreement; a wrong position or prompt would show."""
    teacher = make_teacher()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, tokenizer=tokenizer, prompt_template=template, layer_selection="first"
    )
    assert student.config.cross_attention == "merged"
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, prompt_template=template, per_device_eval_batch_size=3, learning_rate=1e-2, max_steps=1),
        teacher=teacher,
        train_dataset=TEXT,
        eval_dataset=TEXT,
        teacher_processing_class=tokenizer,
    )
    assert trainer.processing_class is student.tokenizer
    start = trainer.evaluate()
    assert start["eval_distill_loss"] < 1e-6 and start["eval_teacher_agreement"] == 1.0
    nll, tokens = 0.0, 0
    for row in TEXT:
        if template is None:
            messages = [{"role": "user", "content": row["source"]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = template.replace("{source}", row["source"])
        prompt = tokenizer(text)["input_ids"]
        target = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        loss = teacher(torch.tensor([prompt + target]), labels=torch.tensor([[-100] * len(prompt) + target])).loss
        nll, tokens = nll + loss.item() * len(target), tokens + len(target)
    assert start["eval_ce_loss"] == pytest.approx(nll / tokens, rel=1e-4)
    # Ready rows: the teacher reads the start token between the two, as the student's decoder does.
    ready = [{k: row[k] for k in ("input_ids", "labels")} for row in map(trainer.data_collator.encode, TEXT)]
    again = trainer.evaluate(ready)
    assert again["eval_distill_loss"] < 1e-6
    assert again["eval_ce_loss"] == pytest.approx(start["eval_ce_loss"], rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_distill_loss"] > 1e-4


@pytest.mark.parametrize("kind", ["list", "dataset", "iterable", "messages"])
def test_text_data_sets_need_no_preparation(tmp_path, tokenizer, kind):
    """Columns that no forward takes survive `remove_unused_columns`, others go; every kind gives the same numbers."""
    rows = [{**row, "origin": "file.py", "line": 3} for row in TEXT]
    if kind == "messages":
        rows = [
            {"messages": [{"role": role, "content": row[name]} for role, name in zip(("user", "assistant"), row)]}
            for row in TEXT
        ]
    data = rows if kind == "list" else Dataset.from_list(rows)
    training = data.to_iterable_dataset() if kind == "iterable" else data
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=2)
    assert args.remove_unused_columns
    plain = tokenizer if kind != "messages" else type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    plain.bos_token, plain.eos_token, plain.pad_token = "<s>", "<|im_end|>", "<|endoftext|>"
    trainer = DistillationTrainer(
        make_t5(),
        args,
        teacher=make_teacher(),
        train_dataset=training,
        eval_dataset={"one": data, "two": Dataset.from_list(TEXT[:2])},
        processing_class=plain,
        teacher_processing_class=tokenizer,
    )
    trainer.train()
    trainer.model = make_t5()
    metrics = trainer.evaluate()
    ready = []
    for row in TEXT:
        target = [*tokenizer(row["target"], add_special_tokens=False)["input_ids"], EOS]
        ready.append({"input_ids": tokenizer(row["source"])["input_ids"], "labels": target})
    ce, _, _ = token_terms(make_t5(), make_teacher(), ready)
    assert metrics["eval_one_ce_loss"] == pytest.approx(ce.mean().item(), rel=1e-5)
    few = sum(len(row["labels"]) for row in ready[:2])
    assert metrics["eval_two_ce_loss"] == pytest.approx(ce[:few].mean().item(), rel=1e-5)
    assert metrics["eval_two_loss"] != metrics["eval_two_ce_loss"]


def test_a_seq2seq_script_only_swaps_the_class(tmp_path, tokenizer):
    """Plain arguments, a mapped data set, the script's own collator, metrics, callbacks, keyword names."""

    def preprocess(examples):
        inputs = tokenizer(examples["source"], max_length=12, truncation=True)
        inputs["labels"] = tokenizer(text_target=examples["target"], max_length=9, truncation=True)["input_ids"]
        return inputs

    data = Dataset.from_list(TEXT).map(preprocess, batched=True)  # text columns stay beside the ids
    model, keeper = make_t5(), KeepLogs()
    args = arguments(
        tmp_path,
        Seq2SeqTrainingArguments,
        eval_strategy="epoch",
        num_train_epochs=2,
        per_device_train_batch_size=2,
        predict_with_generate=True,
        generation_max_length=8,
        load_best_model_at_end=True,
        save_strategy="epoch",
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    shapes = []
    trainer = DistillationTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=lambda p: shapes.append((p.predictions.shape, p.label_ids.shape)) or {"f1": 0.5},
        callbacks=[keeper],
        teacher=make_teacher(),
    )
    assert trainer.args is args and (args.divergence, args.distill_weight) == ("forward_kl", 0.9)
    trainer.train()
    evaluations = [log for log in keeper.logs if "eval_loss" in log]
    assert len(evaluations) == len(shapes) == 2 and all(log["eval_f1"] == 0.5 for log in evaluations)
    wanted = {"eval_loss", "eval_ce_loss", "eval_distill_loss", "eval_teacher_agreement"}
    assert all(wanted <= set(log) for log in evaluations)
    training = [log for log in keeper.logs if "loss" in log]
    assert len(training) == 4 and all({"ce_loss", "distill_loss"} <= set(log) for log in training)
    assert trainer.state.best_metric == pytest.approx(min(log["eval_loss"] for log in evaluations))


def test_the_teacher_never_reaches_a_checkpoint(tmp_path, tokenizer):
    """Not among the student's modules, weights or optimizer states, not moved by training; files are the student's."""
    teacher, student = make_teacher(), make_t5()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2),
        teacher=teacher.train(),
        train_dataset=ROWS,
        processing_class=tokenizer,
    )
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) <= set(make_t5().state_dict())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in teacher.parameters()}
    assert not any(module is teacher for module in trainer.model.modules())
    assert not teacher.training and all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in student.parameters())


def test_teacher_from_a_folder_brings_its_tokenizer(tmp_path, tokenizer):
    """Also a loaded teacher that knows where it came from; one that does not is given the student's tokenizer."""
    make_teacher().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<s>")
    folder = str(tmp_path / "teacher")
    for teacher in (folder, tmp_path / "teacher", LlamaForCausalLM.from_pretrained(folder)):
        trainer = DistillationTrainer(
            make_t5(), arguments(tmp_path), teacher=teacher, train_dataset=TEXT, processing_class=plain
        )
        assert trainer.teacher_processing_class.chat_template == tokenizer.chat_template
        prompt = trainer.data_collator(TEXT)["teacher_input_ids"][0]
        assert tokenizer.decode(prompt).startswith("<s><|im_start|>user\ndef f(x)")
    trainer = DistillationTrainer(
        make_t5(), arguments(tmp_path), teacher=make_teacher(), train_dataset=TEXT, processing_class=plain
    )
    assert trainer.teacher_processing_class is plain
    with pytest.raises(OSError, match="there is no folder .*nowhere"):
        DistillationTrainer(make_t5(), arguments(tmp_path), teacher=str(tmp_path / "nowhere"), train_dataset=ROWS)


def test_what_is_refused_and_why(tmp_path, tokenizer, make_bpe_tokenizer):
    def trainer(model=None, **options):
        options = {"teacher": make_teacher(), "train_dataset": ROWS, "processing_class": tokenizer} | options
        return DistillationTrainer(model or make_t5(), arguments(tmp_path), **options)

    with pytest.raises(ValueError, match="needs teacher="):
        trainer(teacher=None)
    with pytest.raises(ValueError, match="override compute_loss"):
        trainer(compute_loss_func=lambda *args, **kwargs: 0)
    with pytest.raises(ValueError, match="the teacher is an encoder-decoder"):
        trainer(teacher=make_t5())
    student, teacher = make_t5(), make_teacher(280)
    teacher.lm_head.weight = student.shared.weight
    with pytest.raises(ValueError, match=r"share 1 parameters, shared.weight among them"):
        trainer(student, teacher=teacher)
    assert student.shared.weight.requires_grad
    other = make_bpe_tokenizer()
    vocabulary = other.get_vocab()
    other.get_vocab = lambda: {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    with pytest.raises(ValueError, match="different tokenizers: 2 of"):
        trainer(teacher_processing_class=other)


@pytest.mark.parametrize(
    "field, value",
    [
        ("divergence", "kl"),
        ("vocab_policy", "mask"),
        ("teacher_dtype", "int8"),
        ("distill_weight", 1.5),
        ("distill_weight", -0.1),
        ("distill_weight", float("nan")),
        ("distill_temperature", 0.0),
        ("distill_temperature", float("inf")),
        ("jsd_beta", 0.0),
        ("jsd_beta", 1.0),
        ("skew_alpha", 1.0),
        ("skew_alpha", -0.5),
        ("max_source_length", 1),
        ("max_target_length", 0),
        ("prompt_template", "no place"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        arguments(tmp_path, **{field: value})


def test_column_names_have_to_differ(tmp_path):
    with pytest.raises(ValueError, match="both 'text'"):
        arguments(tmp_path, source_column="text", target_column="text")


def test_arguments_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --divergence skew_kl --distill_weight 0.5 --max_source_length 64 --use_cpu true"
    (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(line.split())
    assert (args.divergence, args.distill_weight, args.max_source_length) == ("skew_kl", 0.5, 64)
    assert args.teacher_dtype is None and args.prompt_template is None
    with pytest.raises(SystemExit):
        HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--divergence", "kl"]
        )


def test_the_collator_travels_to_loader_workers(tmp_path, tokenizer):
    trainer = DistillationTrainer(
        make_t5(), arguments(tmp_path), teacher=make_teacher(), train_dataset=TEXT, processing_class=tokenizer
    )
    expected = trainer.data_collator(TEXT)
    for name, value in pickle.loads(pickle.dumps(trainer.data_collator))(TEXT).items():
        assert torch.equal(value, expected[name])
