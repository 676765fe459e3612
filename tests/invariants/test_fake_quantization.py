"""`qat`: the student computes with rounded weights, its float weights learn, and they alone are saved.

That the rounded weights are those of an export is in `tests/export/test_quantization_aware.py`.
"""

import copy

import numpy as np
import pytest
import torch
from distillation_toys import STUDENTS, InOrder, arguments, make_rope, make_teacher, ragged_rows
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import nn

from hf_encdec_distill import DistillationTrainer, RopeEncDecForConditionalGeneration
from hf_encdec_distill.distillation.options.fake_quantization import fake_quantize, fake_quantized


ROWS = ragged_rows(8)


def make_trainer(folder, student, tokenizer, cls=DistillationTrainer, **settings):
    return cls(
        student,
        arguments(folder, **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, **settings}),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
        teacher=make_teacher(),
    )


def rounded(student, qat="int4"):
    """A copy whose parameters are the rounded ones, those of norms as they were."""
    student = copy.deepcopy(student)
    quantized = [m for m in student.modules() if isinstance(m, nn.Linear)] + [student.get_input_embeddings()]
    with torch.no_grad():
        for weight in {module.weight for module in quantized}:
            weight.copy_(fake_quantize(weight, qat))
    return student


def step(folder, student, tokenizer, **settings):
    """What one step of plain gradient descent adds to each parameter: its gradient, negative."""
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    settings |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    make_trainer(folder, student, tokenizer, InOrder, max_steps=1, **settings).train()
    return {name: parameter.detach() - before[name] for name, parameter in student.named_parameters()}


def test_q4_0_is_that_of_llama_cpp():
    """gguf's own quantizer, which stores the scale in half precision."""
    weight = torch.randn(48, 96)
    weight[0, :32], weight[1, :32] = 0.0, weight[1, :32].abs()
    theirs = dequantize(quantize(weight.numpy(), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    np.testing.assert_allclose(fake_quantize(weight, "q4_0").numpy(), theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("qat", ["int4", "q4_0"])
def test_blocks_of_32_have_16_values(qat):
    """The error is a step at most, half of one but at the ends; the last block may be shorter; zero stays zero."""
    weight = torch.randn(5, 40)
    weight[:, 3] = 0.0
    result = fake_quantize(weight, qat)
    for ours, row in zip(result, weight, strict=True):
        assert len(ours.unique()) > 16
        for rounded_block, block in zip(ours.split(32), row.split(32), strict=True):
            assert len(rounded_block.unique()) <= 16
            step = (block.max() - block.min()) / 15 if qat == "int4" else block.abs().max() / 8
            error = (rounded_block - block).abs().sort().values
            assert error[-1] <= step * 1.001 and (error <= step * 0.501).sum() >= len(block) - 3
    assert (result[:, 3] == 0).all() and (fake_quantize(torch.zeros(2, 32), qat) == 0).all()
    assert fake_quantize(weight.bfloat16(), qat).dtype == torch.bfloat16
    assert not torch.isfinite(fake_quantize(torch.full((1, 32), torch.nan), qat)).any()


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("way", ["plain", "checkpointed", "chunked", "compiled"])
def test_the_gradient_goes_straight_through(tmp_path, tokenizer, kind, way):
    """To each float weight the gradient that its rounded value has in a student made of rounded weights."""
    if way == "compiled" and kind != "t5":
        return  # tracing takes longer than all else here
    settings = {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "chunked": {"loss_chunk_size": 3},
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    }[way]
    student = STUDENTS[kind]()
    expected = step(tmp_path, rounded(student), tokenizer)
    plain = step(tmp_path, copy.deepcopy(student), tokenizer)
    ours = step(tmp_path, student, tokenizer, qat="int4", **settings)
    for name, change in expected.items():
        torch.testing.assert_close(ours[name], change, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.allclose(ours[name], change, rtol=1e-2) for name, change in plain.items())


def test_evaluation_and_rollouts_see_rounded_weights(tmp_path, tokenizer):
    """Before training and in it: losses, generated answers and an on-policy step are those of the rounded student."""
    settings = {"predict_with_generate": True, "generation_max_length": 6, "on_policy_fraction": 1.0}
    settings |= {"max_target_length": 4, "max_steps": 1, "learning_rate": 0.0, "sampling_temperature": 0.0}
    student = make_rope("merged", cross_attention_layers=[1, 2])
    runs = [
        make_trainer(tmp_path, model, tokenizer, InOrder, **settings, **extra)
        for model, extra in ((student, {"qat": "int4"}), (rounded(student), {}), (copy.deepcopy(student), {}))
    ]
    results = []
    for trainer in runs:
        metrics = trainer.evaluate()
        answers = trainer.predict(ROWS).predictions
        trainer.train()
        results.append((metrics["eval_loss"], answers.tolist(), trainer.state.log_history[-2]["distill_loss"]))
    for mine, theirs in zip(*(results[:2]), strict=True):
        assert mine == (theirs if isinstance(theirs, list) else pytest.approx(theirs, rel=1e-5))
    assert results[0][0] != pytest.approx(results[2][0], rel=1e-3) and results[0][1] != results[2][1]


@pytest.mark.parametrize("kind", STUDENTS)
def test_what_is_saved_are_the_float_weights(tmp_path, tokenizer, kind):
    """Under the names of a plain run; tied weights stay one tensor; and a resumed run is the same, bit for bit."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "qat": "int4"}
    whole = make_trainer(tmp_path, STUDENTS[kind](), tokenizer, **settings)
    ids = [id(parameter) for parameter in whole.model.parameters()]
    whole.train()
    assert [id(parameter) for parameter in whole.model.parameters()] == ids
    assert all(isinstance(parameter, nn.Parameter) for parameter in whole.model.parameters())
    assert whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight
    resumed = make_trainer(tmp_path, STUDENTS[kind](), tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    whole.save_model(str(tmp_path / "saved"))
    loaded = type(whole.model).from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == STUDENTS[kind]().state_dict().keys()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(loaded[name], weight), name
        if weight.dim() == 2 and "bias" not in name:
            assert not torch.equal(weight, fake_quantize(weight, "int4")), name


def test_frozen_rounded_encoder_is_not_the_teachers(tmp_path, tokenizer):
    """The teacher's own first layers are not what a rounded encoder computes with: nothing is shared."""
    teacher = make_teacher()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_layers=[0, 1], decoder_layers=[0, 1], calibration=[([5, 6, 7], [8, 9])]
    )
    for qat, shares in (("int4", False), (None, True)):
        trainer = make_trainer(tmp_path, student, tokenizer, freeze_encoder=True, max_steps=1, qat=qat)
        trainer.train()
        assert trainer._shared_prompt._exact is shares


def test_what_cannot_be_rounded_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="qat='int3' is unknown; choose one of int4, q4_0"):
        arguments(tmp_path, qat="int3")
    with pytest.raises(ValueError, match="qat='int4' with bf16_full_eval=True"):
        arguments(tmp_path, qat="int4", bf16_full_eval=True)
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(make_rope("separate"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="qat='int4' rounds weights that are whole"):
        make_trainer(tmp_path, student, tokenizer, qat="int4")


def test_a_block_that_ends_early_puts_the_weights_back():
    student = make_rope("separate")
    weights = [id(parameter) for parameter in student.parameters()]
    with pytest.raises(KeyboardInterrupt), fake_quantized(student, "int4"):
        assert [id(p) for p in student.parameters()] != weights
        raise KeyboardInterrupt
    assert [id(parameter) for parameter in student.parameters()] == weights
