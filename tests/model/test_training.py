"""The loss, gradients with and without checkpointing, and half precision."""

import pytest
import torch
from torch.nn import functional as F
from toys import KINDS, SLIDING, make_model, ragged, random_ids


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(request.param).train()


def batch():
    ids, mask, _ = ragged("right")
    labels = random_ids(3, 6)
    labels[1, 4:] = labels[2, 2:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_the_loss_is_the_mean_over_target_tokens(model):
    inputs = batch()
    outputs = model(**inputs)
    labels = inputs["labels"]
    # The decoder reads the start token, then all but the last label.
    shifted = torch.cat((torch.ones(3, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)), dim=1)
    logits = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], decoder_input_ids=shifted
    ).logits
    torch.testing.assert_close(outputs.logits, logits)
    real = labels != -100
    per_token = -logits.log_softmax(-1)[real].gather(-1, labels[real][:, None])
    torch.testing.assert_close(outputs.loss, per_token.mean())
    for count in (24, torch.tensor(24)):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=count).loss, per_token.sum() / 24)


def test_halves_of_a_batch_add_up_to_the_whole(model):
    """Gradient accumulation: with the count of the whole batch, two halves give its loss and gradient."""
    inputs = batch()
    whole = gradients(model, **inputs)
    count = (inputs["labels"] != -100).sum()
    model.zero_grad(set_to_none=True)
    for rows in (slice(0, 1), slice(1, 3)):
        model(**{name: value[rows] for name, value in inputs.items()}, num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_no_target_at_all_gives_zero_and_finite_gradients(model, count):
    inputs = batch()
    inputs["labels"].fill_(-100)
    extra = {} if count is None else {"num_items_in_batch": count}
    assert model(**inputs, **extra).loss.item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model, **inputs, **extra).values())


def test_what_follows_the_last_target_changes_nothing(model):
    inputs = batch()
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    assert decoder_input_ids[:, 0].tolist() == [1, 1, 1] and decoder_input_ids.min() >= 0
    other = decoder_input_ids.masked_fill(F.pad(inputs["labels"], (1, 0))[:, :-1] == -100, 77)
    losses = [model(**inputs, decoder_input_ids=ids).loss for ids in (decoder_input_ids, other)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_gets_a_gradient(kind, tied):
    model = make_model(
        kind, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, qk_norm=True, encoder_num_hidden_layers=4
    ).train()
    for name, gradient in gradients(model, **batch()).items():
        # A softmax does not see what moves all its scores alike; rotated keys see half of it.
        if "cross_attn.k_proj.bias" not in name:
            assert gradient is not None and gradient.abs().max() > 1e-6, name
        else:
            assert gradient is not None, name
    frozen = {name.split(".layers.")[-1].split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    # `merged` reads states 1 and 3: layer 3 and the final norm of the encoder feed nothing.
    assert frozen == ({"3", "model"} if kind == "merged" else set())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(model, reentrant):
    inputs = batch()
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    handle = model.model.encoder.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    got = gradients(model, **inputs)
    handle.remove()
    assert len(calls) == 2  # once more in the backward pass
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got, expected)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(gradients(model, **inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_layers_that_slide(reentrant):
    model, inputs = make_model("merged", encoder_attention="causal", **SLIDING).train(), batch()
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, **inputs), expected)
    assert all(gradient is not None for gradient in expected.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_frozen_embeddings(model, reentrant):
    """What PEFT does: nothing at the entrance needs a gradient until `enable_input_require_grads`."""
    model.get_input_embeddings().requires_grad_(False)
    expected = gradients(model, **batch())
    torch.manual_seed(1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    inputs = batch()
    got = gradients(model, **inputs)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(got, gradients(model, **inputs))
    assert got.keys() == expected.keys() and all(gradient is not None for gradient in got.values())


def test_dropout_is_for_training_alone():
    model = make_model("merged", attention_dropout=0.5)
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, atol=0, rtol=0)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_close(kind, dtype, implementation):
    model = make_model(kind, attn_implementation=implementation)
    inputs = batch()
    with torch.no_grad():
        exact = model(**inputs)
        half = model.to(dtype)
        rough = half(**inputs)
        assert rough.logits.dtype == dtype and rough.loss.dtype == torch.float32
        tolerance = 0.02 if dtype == torch.float16 else 0.15
        assert (rough.logits.float() - exact.logits).abs().max() < tolerance * exact.logits.abs().max()
        torch.testing.assert_close(rough.loss, exact.loss, atol=tolerance, rtol=tolerance)
        tokens = half.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
        )
    assert tokens.shape[1] <= 6
    assert half.model.encoder.rotary_emb(torch.zeros(1), torch.tensor([[9]]))[0].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains(kind):
    model = make_model(kind).train()
    inputs = batch()
    exact = gradients(model, **inputs)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cosine = F.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0)
            assert cosine > 0.95, name
