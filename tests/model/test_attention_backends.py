"""Every attention implementation that the classes declare gives what the plain formula gives.

Flash attention has no CPU kernels. Its calling contract is shown with a plain-torch implementation of the functions
that the flash packages export, put in their place: packed rows with boundaries, causal masks aligned bottom right.
"""

import functools
import importlib.machinery
import sys
import types

import pytest
import torch
from toys import KINDS, SLIDING, make_llama, make_model, merged_twin, ragged, random_ids
from transformers import StaticCache, modeling_flash_attention_utils
from transformers.cache_utils import EncoderDecoderCache

from hf_encdec_distill import RopeEncDecEncoderModel


SIDES = ("right", "left")


def switched(model, implementation):
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def forward(model, ids, mask, target, target_mask=None):
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=target_mask
        ).logits


@pytest.mark.parametrize("encoder_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_eager_equals_sdpa(kind, side, encoder_attention):
    model = make_model(kind, encoder_attention=encoder_attention)
    ids, mask, _ = ragged(side)
    target, (_, target_mask, _) = random_ids(3, 5), ragged(side, lengths=(5, 3, 4))
    for prompt_mask, decoder_mask in ((mask, None), (mask, target_mask), (None, None), (None, target_mask)):
        eager, sdpa = (
            forward(switched(model, name), ids, prompt_mask, target, decoder_mask) for name in ("eager", "sdpa")
        )
        real = slice(None) if decoder_mask is None else decoder_mask.bool()
        torch.testing.assert_close(sdpa[real], eager[real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_a_ragged_batch_equals_its_rows_alone(kind, side, implementation):
    model = switched(make_model(kind), implementation)
    ids, mask, rows = ragged(side)
    target, (_, target_mask, _) = random_ids(3, 5), ragged(side, lengths=(5, 3, 4))
    together = forward(model, ids, mask, target, target_mask)
    junk = ids.masked_fill(mask == 0, 50)
    torch.testing.assert_close(
        forward(model, junk, mask, target, target_mask)[target_mask.bool()], together[target_mask.bool()]
    )
    for index, row in enumerate(rows):
        real = target_mask[index].bool()
        alone = forward(model, row, None, target[index : index + 1, real])
        torch.testing.assert_close(together[index, real], alone[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_the_encoder_alone_ignores_padding(side):
    model = make_model(cls=RopeEncDecEncoderModel)
    ids, mask, rows = ragged(side)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).last_hidden_state
        for index, row in enumerate(rows):
            alone = model(input_ids=row).last_hidden_state[0]
            torch.testing.assert_close(together[index, mask[index].bool()], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_prompt_of_pads_alone_stays_finite(implementation):
    for kind in KINDS:
        model = switched(make_model(kind), implementation)
        ids, mask, _ = ragged("right")
        mask[1] = 0
        assert forward(model, ids, mask, random_ids(3, 4)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_can_be_chosen_at_construction_and_on_load(kind, tmp_path):
    model = make_model(kind, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert {module.config._attn_implementation for module in loaded.modules() if hasattr(module, "config")} == {
            name
        }


@pytest.mark.parametrize("kind", KINDS)
def test_attention_probabilities(kind):
    model = make_model(kind, attn_implementation="eager")
    ids, mask, _ = ragged("left")
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask, decoder_input_ids=random_ids(3, 5), output_attentions=True)
    assert [tuple(w.shape) for w in outputs.encoder_attentions] == [(3, 4, 7, 7)] * 3
    assert [tuple(w.shape) for w in outputs.decoder_attentions] == [(3, 4, 5, 5)] * 2
    assert [tuple(w.shape) for w in outputs.cross_attentions] == [(3, 4, 5, 7)] * 2
    for own, cross in zip(outputs.decoder_attentions, outputs.cross_attentions):
        own_mass, cross_mass = own.sum(-1), cross.sum(-1)
        if kind == "merged":  # one softmax over both
            torch.testing.assert_close(own_mass + cross_mass, torch.ones(3, 4, 5))
            assert cross_mass.min() > 0 and own_mass.min() > 0 and 0.1 < cross_mass.mean() < 0.9
        else:
            torch.testing.assert_close(own_mass, torch.ones(3, 4, 5))
            torch.testing.assert_close(cross_mass, torch.ones(3, 4, 5))
        assert own.triu(1).abs().max() == 0
        assert cross.masked_select(mask[:, None, None, :] == 0).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_are_handed_out_get_gradients(kind):
    """What attribution methods read: the derivative of a logit by each probability."""
    model = make_model(kind, attn_implementation="eager")
    outputs = model(input_ids=random_ids(1, 6), decoder_input_ids=random_ids(1, 4), output_attentions=True)
    layers = [*outputs.decoder_attentions, *outputs.cross_attentions, outputs.encoder_attentions[0]]
    for probabilities in layers:
        probabilities.retain_grad()
    outputs.logits[0, -1].amax().backward()
    assert all(probabilities.grad.abs().max() > 0 for probabilities in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_follow_the_upstream_formula(kind):
    """Merged at full depth: our two parts, side by side, are the rows that Llama gives."""
    if kind == "separate":
        model = make_model(kind, attn_implementation="eager", num_key_value_heads=4)
        reference = torch.nn.MultiheadAttention(32, 4, batch_first=True, bias=False).eval()
        cross = model.model.decoder.layers[0].cross_attn
        with torch.no_grad():
            reference.in_proj_weight.copy_(torch.cat([getattr(cross, f"{p}_proj").weight for p in "qkv"]))
            targets, prompt = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
            expected = reference(targets, prompt, prompt, average_attn_weights=False)[1]
            torch.testing.assert_close(cross(targets, prompt, None)[1], expected)
        return
    llama = make_llama(layers=2, attn_implementation="eager")
    model = merged_twin(llama, attn_implementation="eager")
    prompt, target = random_ids(2, 6), random_ids(2, 4)
    with torch.no_grad():
        ours = model(input_ids=prompt, decoder_input_ids=target, output_attentions=True)
        theirs = llama(torch.cat((prompt, target), -1), output_attentions=True).attentions
    for own, cross, rows in zip(ours.decoder_attentions, ours.cross_attentions, theirs):
        torch.testing.assert_close(torch.cat((cross, own), -1), rows[:, :, 6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_flex_equals_eager(kind, side):
    """Our block masks, under torch's own uncompiled flex attention."""
    model = make_model(kind)
    for length in (1, 5, 9):
        ids, mask, _ = ragged(side)
        target, (_, target_mask, _) = random_ids(3, length), ragged(side, lengths=(length, max(1, length - 2), 1))
        real = target_mask.bool()
        eager = forward(switched(model, "eager"), ids, mask, target, target_mask)
        with torch.compiler.set_stance("force_eager"):
            flex = forward(switched(model, "flex_attention"), ids, mask, target, target_mask)
        torch.testing.assert_close(flex[real], eager[real], atol=2e-5, rtol=1e-5)


@pytest.mark.slow  # a minute of C++ compilation
def test_compiled_flex_equals_eager():
    """Static shapes: with dynamic ones, inductor's CPU template replaces the text `ks1` inside `ks10` (torch 2.13,
    codegen/cpp_flex_attention_template.py) and its C++ does not compile. GPUs use another template."""
    model = make_model("merged", encoder_num_hidden_layers=2, decoder_num_hidden_layers=1)
    ids, mask, _ = ragged("left")
    target = random_ids(3, 5)
    eager = forward(switched(model, "eager"), ids, mask, target)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        flex = forward(switched(model, "flex_attention"), ids, mask, target)
    torch.testing.assert_close(flex, eager, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_that_slides(kind, side, encoder_attention):
    """Alike in each implementation, padded or alone; a window of the prompt's length is none."""
    model = make_model(kind, encoder_attention=encoder_attention, **SLIDING)
    ids, mask, rows = ragged(side)
    target = random_ids(3, 5)
    for prompt_mask in (mask, None):
        eager = forward(switched(model, "eager"), ids, prompt_mask, target)
        sdpa = forward(switched(model, "sdpa"), ids, prompt_mask, target)
        with torch.compiler.set_stance("force_eager"):
            flex = forward(switched(model, "flex_attention"), ids, prompt_mask, target)
        torch.testing.assert_close(sdpa, eager, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(flex, eager, atol=2e-5, rtol=1e-5)
    together = forward(switched(model, "sdpa"), ids, mask, target)
    for index, row in enumerate(rows):
        alone = forward(model, row, None, target[index : index + 1])
        torch.testing.assert_close(together[index], alone[0], atol=2e-5, rtol=1e-5)
    wide, none = (
        make_model(kind, encoder_attention=encoder_attention, encoder_sliding_window=window) for window in (7, None)
    )
    wide.load_state_dict(model.state_dict())
    none.load_state_dict(model.state_dict())
    torch.testing.assert_close(forward(wide, ids, mask, target), forward(none, ids, mask, target), atol=0, rtol=0)


@pytest.mark.parametrize("encoder_attention", ["bidirectional", "causal"])
def test_a_compiled_encoder_that_slides(encoder_attention):
    """One graph without breaks for prompts of any length."""
    model = make_model(cls=RopeEncDecEncoderModel, encoder_attention=encoder_attention, **SLIDING)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for lengths in ((7, 4, 2), (9, 3)):
            ids, mask, _ = ragged("left", lengths=lengths)
            states = compiled(input_ids=ids, attention_mask=mask).last_hidden_state
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(states[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


def _one_row(query, key, value, scale, causal, window):
    """Rows `(T, N, D)` on `(K, G, D)`; a causal query `i` of `T` sees the keys up to `K - T + i`, and of a window
    `(left, right)` those from `left` below that to `right` above it, -1 being all."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qnd,knd->nqk", query, key) * scale
    left, right = window[0], 0 if causal else window[1]
    length, keys = scores.shape[-2:]
    ahead = torch.arange(keys)[None] - (torch.arange(length)[:, None] + keys - length)
    unseen = ((ahead > right) & (right >= 0)) | ((ahead < -left) & (left >= 0))
    scores = scores.masked_fill(unseen, -torch.inf)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1).nan_to_num(), value)  # no key in sight: zero


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
):  # fmt: skip
    return torch.stack([_one_row(*row, softmax_scale, causal, window_size) for row in zip(q, k, v)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    assert q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == q.shape[0] and cu_seqlens_k[-1] == k.shape[0] == v.shape[0]
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max(lengths_q) <= max_seqlen_q and max(lengths_k) <= max_seqlen_k
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    return torch.cat([_one_row(*row, softmax_scale, causal, window_size) for row in rows])


@pytest.fixture(params=["flash_attention_2", "flash_attention_3"])
def flash(request, monkeypatch):
    """The name of an implementation whose package is played by the functions above."""
    functions = {
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": None,
    }
    padding = {
        "pad_input": modeling_flash_attention_utils._pad_input,
        "unpad_input": modeling_flash_attention_utils._unpad_input,
    }
    packages = {"flash_attn": functions, "flash_attn.bert_padding": padding, "flash_attn_interface": functions}
    for name, members in packages.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    # Forget what was loaded before, and after this test what it loaded.
    forgotten = {"_loaded_implementation", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"}
    forgotten |= {"_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"}
    for name in forgotten & set(vars(modeling_flash_attention_utils)):
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)
    version = request.param[-1]
    monkeypatch.setattr(modeling_flash_attention_utils, f"is_flash_attn_{version}_available", lambda: True)
    return request.param


def flashed(model, implementation):
    # `set_attn_implementation` would ask for a GPU.
    model.config._attn_implementation = implementation
    return model


@pytest.mark.parametrize("sliding", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("encoder_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_flash_equals_eager(kind, encoder_attention, sliding, flash):
    model = make_model(kind, encoder_attention=encoder_attention, **sliding)
    cases = [(side, length) for side in SIDES for length in (1, 5, 7, 9)]  # below, at and above the prompt's length
    for side, length in cases:
        ids, mask, _ = ragged(side)
        target = random_ids(3, length)
        for prompt_mask in (mask, None):
            eager = forward(flashed(model, "eager"), ids, prompt_mask, target)
            with_flash = forward(flashed(model, flash), ids, prompt_mask, target)
            torch.testing.assert_close(with_flash, eager, atol=2e-5, rtol=1e-5)
        _, target_mask, _ = ragged(side, lengths=(length, max(1, length - 2), max(1, length - 1)))
        real = target_mask.bool()
        eager = forward(flashed(model, "eager"), ids, mask, target, target_mask)
        with_flash = forward(flashed(model, flash), ids, mask, target, target_mask)
        torch.testing.assert_close(with_flash[real], eager[real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_flash_generates_what_eager_generates(kind, flash):
    model = make_model(kind)
    ids, mask, _ = ragged("left")
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    for extra in ({}, {"num_beams": 3}, {"use_cache": False}):
        eager = flashed(model, "eager").generate(ids, **settings, **extra)
        with_flash = flashed(model, flash).generate(ids, **settings, **extra)
        assert torch.equal(with_flash, eager)


@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
def test_flash_trains_like_eager(kind, flash):
    model = make_model(kind).train()
    ids, mask, _ = ragged("right")
    labels = random_ids(3, 5)
    gradients = []
    for implementation in ("eager", flash):
        model.zero_grad()
        flashed(model, implementation)(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-4, rtol=1e-4)


def test_flash_refuses_what_would_not_keep_to_a_window(flash, monkeypatch):
    model = flashed(make_model(**SLIDING), flash)
    ids, mask, target = random_ids(1, 7), torch.ones(1, 7, dtype=torch.long), random_ids(1, 2)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="pads between real tokens.*set_attn_implementation"):
        forward(model, ids, mask, target)
    # As on an NPU (integrations/npu_flash_attention.py of transformers v5.24.0).
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    monkeypatch.setattr(modeling_flash_attention_utils, "_flash_fn", None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_process_flash_kwargs_fn", None)
    for package in ("flash_attn", "flash_attn_interface"):
        without = functools.partial(
            lambda function, *args, **kwargs: function(*args, **kwargs), flash_attn_varlen_func
        )
        monkeypatch.setattr(sys.modules[package], "flash_attn_varlen_func", without)
    with pytest.raises(ValueError, match="knows no window on this device.*set_attn_implementation"):
        forward(model, ids, None, target)
    forward(model, ids[:, :2], None, target)  # which the window spans


def test_flash_refuses_a_static_cache(flash):
    """Only a mask hides the slots that are not filled yet, and flash attention takes none."""
    model = flashed(make_model("merged"), flash)
    cache = EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=9) for _ in range(2)))
    with pytest.raises(ValueError, match="static cache.*set_attn_implementation"):
        model(input_ids=random_ids(1, 9), decoder_input_ids=random_ids(1, 2), past_key_values=cache)
