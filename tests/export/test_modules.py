"""The two modules that are traced, against the model that they run."""

import pytest
import torch
from architectures import OPTIONS
from toys import KINDS, make_model, ragged, random_ids

from hf_encdec_distill.export.modules import ExportedDecoder, ExportedEncoder


def empty_cache(config, batch, slots=0):
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    return [torch.zeros(shape) for _ in range(2 * config.decoder_num_hidden_layers)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_all_target_tokens_at_once(option, side):
    model = make_model(**OPTIONS[option])
    prompt, mask, _ = ragged(side)
    target = random_ids(prompt.shape[0], 5)
    expected = model(input_ids=prompt, attention_mask=mask, decoder_input_ids=target).logits
    pooling = model.config.encoder_pooling
    if pooling > 1:  # pads behind the prompt; the decoder is told of each pooled position whether its first token is
        order = mask.argsort(dim=1, descending=True, stable=True)
        prompt, mask = prompt.gather(1, order), mask.gather(1, order)
    cross = ExportedEncoder(model)(prompt, mask)
    mask = mask[:, ::pooling]
    logits, *own = ExportedDecoder(model)(target, mask, *empty_cache(model.config, len(prompt)), *cross)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert len(own) == len(cross) == 2 * model.config.decoder_num_hidden_layers
    assert {key.shape[2] for key in own} == {5}


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_target_token_after_the_other(kind, fixed):
    model = make_model(kind)
    prompt, mask, _ = ragged("left")
    target = random_ids(prompt.shape[0], 6)
    expected = model(input_ids=prompt, attention_mask=mask, decoder_input_ids=target).logits
    cross = ExportedEncoder(model)(prompt, mask)
    decoder = ExportedDecoder(model, fixed=fixed)
    own = empty_cache(model.config, len(prompt), slots=8 if fixed else 0)
    if fixed:  # what an earlier answer has left in the slots is not read
        own = [torch.full_like(slots, 7.0) for slots in own]
    for step in range(target.shape[1]):
        position = [torch.tensor([step])] if fixed else []
        logits, *own = decoder(target[:, step : step + 1], mask, *position, *own, *cross)
        torch.testing.assert_close(logits[:, 0], expected[:, step], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prompt_without_any_real_token_stays_finite(kind):
    model = make_model(kind, encoder_attention="causal")
    prompt, mask, _ = ragged("left")
    mask[-1] = 0
    cross = ExportedEncoder(model)(prompt, mask)
    logits, *_ = ExportedDecoder(model)(random_ids(3, 2), mask, *empty_cache(model.config, 3), *cross)
    assert logits.isfinite().all() and all(key.isfinite().all() for key in cross)
