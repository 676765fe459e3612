"""Caches and every way of `generate`, each against greedy without a cache or a Llama that holds the weights."""

import contextlib
import copy

import pytest
import torch
import transformers
from toys import KINDS, SLIDING, make_llama, make_model, merged_twin, ragged, random_ids
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.rope_encdec.modeling_rope_encdec import pooled_attention_mask


GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(params=[*KINDS, "pooled", "shared"])
def model(request):
    return make_model(request.param)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_that_slides(kind, cache_implementation):
    """Its decoder sees all that it has written, also with a cache of transformers' own making."""
    model = make_model(kind, **SLIDING)
    ids, mask, rows = ragged("left")
    together = generate(model, ids, mask, cache_implementation=cache_implementation)
    for tokens, row in zip(together, rows):
        assert trimmed(tokens, model) == greedy_by_hand(model, row)


def generate(model, ids, mask=None, **settings):
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **settings})


def greedy_by_hand(model, row, steps=10):
    """Argmax of a whole forward pass for each token, no `generate` and no cache."""
    tokens = torch.full((1, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=row, decoder_input_ids=tokens, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=-1)
            if tokens[0, -1] == model.config.eos_token_id:
                break
    return tokens[0].tolist()


def read_of(model, prompt_length):
    """Positions of a prompt that the decoder reads."""
    return -(-prompt_length // model.config.encoder_pooling)


def trimmed(tokens, model):
    """A row without what `generate` fills in after the end."""
    tokens = tokens.tolist()
    ends = [i for i, token in enumerate(tokens) if i and token == model.config.eos_token_id]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_generate_on_ragged_prompts_is_argmax_row_by_row(model, side):
    ids, mask, rows = ragged(side)
    for use_cache in (True, False):
        together = generate(model, ids, mask, use_cache=use_cache)
        for tokens, row in zip(together, rows):
            assert trimmed(tokens, model) == greedy_by_hand(model, row)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # before transformers 5.24 and since
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_token_by_token_in_chunks_and_at_once(model, implementation, name):
    model.set_attn_implementation(implementation)
    ids, mask, _ = ragged("left")
    target = random_ids(3, 8)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        for chunks in ([1] * 8, [3, 1, 4], [8]):
            cache, logits = None, []
            encoded = model.get_encoder()(ids, attention_mask=mask)
            for chunk in target.split(chunks, dim=1):
                outputs = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=chunk, **{name: cache})
                cache = outputs.past_key_values
                logits.append(outputs.logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=2e-5, rtol=1e-5)
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.get_seq_length() == 8
    assert cache.cross_attention_cache.layers[0].keys.shape == (3, 2, read_of(model, 7), 8)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_targets_with_a_cache(model, side):
    """`decoder_attention_mask`, padding on either side, in two chunks: each row as if it were alone."""
    ids, mask, rows = ragged("left")
    target, (_, target_mask, _) = random_ids(3, 6), ragged(side, lengths=(6, 3, 5))
    with torch.no_grad():
        first = model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=target[:, :4],
            decoder_attention_mask=target_mask[:, :4],
        )
        second = model(
            encoder_outputs=(first.encoder_last_hidden_state,) if model.config.cross_attention == "separate" else
            model.get_encoder()(ids, attention_mask=mask),
            attention_mask=mask,
            decoder_input_ids=target[:, 4:],
            decoder_attention_mask=target_mask,
            past_key_values=first.past_key_values,
        )  # fmt: skip
        logits = torch.cat((first.logits, second.logits), dim=1)
        for index, row in enumerate(rows):
            real = target_mask[index].bool()
            alone = model(input_ids=row, decoder_input_ids=target[index : index + 1, real]).logits[0]
            torch.testing.assert_close(logits[index, real], alone, atol=2e-5, rtol=1e-5)


def test_the_prompt_is_projected_once(model):
    """Cross keys and values come out of the cache: the second step does not need what the encoder returned."""
    ids, target = random_ids(2, 6), random_ids(2, 3)
    with torch.no_grad():
        first = model(input_ids=ids, decoder_input_ids=target[:, :2])
        calls = []
        attention = model.model.decoder.layers[0]
        attention = attention.self_attn if model.config.cross_attention == "merged" else attention.cross_attn
        handle = attention.k_proj.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
        embeds = model.get_input_embeddings()(target[:, 2:])
        second = model.model.decoder(embeds, past_key_values=first.past_key_values)
        handle.remove()
        whole = model.model(input_ids=ids, decoder_input_ids=target).last_hidden_state
    assert calls == ([1] if model.config.cross_attention == "merged" else [])
    torch.testing.assert_close(second.last_hidden_state, whole[:, 2:], atol=2e-5, rtol=1e-5)


def test_a_decoder_without_prompt_says_so(model):
    with pytest.raises(ValueError, match="encoder_hidden_states, or past_key_values that hold the prompt"):
        model.model.decoder(torch.zeros(1, 1, 32))


def user_cache(model, kind, prompt_length):
    if kind == "dynamic":
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    if kind == "dynamic of a config":
        return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    return EncoderDecoderCache(
        StaticCache(config=model.config, max_cache_len=16),
        StaticCache(config=model.config, max_cache_len=read_of(model, prompt_length)),
    )


@pytest.mark.parametrize("cache", ["dynamic", "dynamic of a config", "static"])
def test_a_cache_of_the_users(model, cache):
    ids, mask, _ = ragged("left")
    expected = generate(model, ids, mask, use_cache=False)
    assert torch.equal(generate(model, ids, mask, past_key_values=user_cache(model, cache, ids.shape[1])), expected)


@pytest.mark.parametrize("implementation", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_cache_formats(model, implementation, monkeypatch):
    if implementation.startswith("offloaded") and not torch.cuda.is_available():
        # Offloaded caches overlap copies with CUDA streams, which a CPU has not: these do nothing.
        class Stream(contextlib.nullcontext):
            def wait_stream(self, other):
                pass

        for module in (torch, torch.cuda):
            for name in ("Stream", "default_stream", "current_stream"):
                monkeypatch.setattr(module, name, lambda *args, **kwargs: Stream(), raising=False)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    ids, mask, _ = ragged("left")
    expected = generate(model, ids, mask, use_cache=False)
    assert torch.equal(generate(model, ids, mask, cache_implementation=implementation), expected)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],  # a minute of C++ compilation
)
def test_a_compiled_decode_step_on_a_static_cache(model, backend):
    """One graph without breaks, compiled once for all steps."""
    ids, mask, _ = ragged("left")
    read = pooled_attention_mask(mask, model.config.encoder_pooling)
    target = random_ids(3, 6)
    takes_positions = transformers.__version__.startswith("4.")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.model.decoder, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        whole = model.model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).last_hidden_state
        cache = user_cache(model, "static", ids.shape[1])
        start = model.model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=target[:, :1], past_key_values=cache
        ).last_hidden_state
        states = [start]
        for step in range(1, 6):
            embeds = model.get_input_embeddings()(target[:, step : step + 1])
            position = torch.tensor([step])  # transformers < 5.0 takes it, later ones read it off the cache
            arguments = {"cache_position": position} if takes_positions else {}
            outputs = compiled(embeds, encoder_attention_mask=read, past_key_values=cache, **arguments)
            states.append(outputs.last_hidden_state)
    torch.testing.assert_close(torch.cat(states, dim=1), whole, atol=5e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_inputs_embeds_encoder_outputs_and_ids_generate_the_same(model):
    ids, mask, _ = ragged("left")
    expected = generate(model, ids, mask)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), expected)
    encoded = model.get_encoder()(ids, attention_mask=mask)
    for outputs in (encoded, encoded.to_tuple()):
        with torch.no_grad():
            start = torch.ones(3, 1, dtype=torch.long)
            torch.testing.assert_close(
                model(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=start).logits,
                model(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits,
            )
    assert torch.equal(model.generate(encoder_outputs=encoded, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(
        model.generate(encoder_outputs=encoded, attention_mask=mask, num_beams=3, **GREEDY),
        generate(model, ids, mask, num_beams=3),
    )


def test_separate_takes_a_plain_base_model_output():
    model = make_model("separate")
    ids, mask, _ = ragged("left")
    encoded = BaseModelOutput(model.get_encoder()(ids, attention_mask=mask).last_hidden_state)
    tokens = model.generate(encoder_outputs=encoded, attention_mask=mask, **GREEDY)
    assert torch.equal(tokens, generate(model, ids, mask))


def test_decoder_inputs_embeds_equal_ids(model):
    ids, target = random_ids(2, 5), random_ids(2, 4)
    with torch.no_grad():
        by_ids = model(input_ids=ids, decoder_input_ids=target).logits
        by_embeds = model(
            inputs_embeds=model.get_input_embeddings()(ids),
            decoder_inputs_embeds=model.get_input_embeddings()(target),
        ).logits
    torch.testing.assert_close(by_embeds, by_ids)


def test_a_target_that_begins_already(model):
    """`decoder_input_ids` of several tokens, ragged and left-padded, with their mask."""
    ids, mask, rows = ragged("left")
    begun, begun_mask, begun_rows = ragged("left", lengths=(4, 2, 3))
    for index, row in enumerate(begun_rows):  # `generate` puts a start token in front unless there is one
        row[0, 0] = begun[index, -row.shape[1]] = model.config.decoder_start_token_id
    tokens = generate(model, ids, mask, decoder_input_ids=begun, decoder_attention_mask=begun_mask, max_new_tokens=5)
    for index, (row, start) in enumerate(zip(rows, begun_rows)):
        alone = generate(model, row, decoder_input_ids=start, max_new_tokens=5)
        assert trimmed(tokens[index, 4:], model) == trimmed(alone[0, start.shape[1] :], model)


def test_logits_to_keep(model):
    ids, target = random_ids(2, 5), random_ids(2, 6)
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=target).logits
        for keep, rows in ((1, [5]), (3, [3, 4, 5]), (torch.tensor([0, 4]), [0, 4])):
            kept = model(input_ids=ids, decoder_input_ids=target, logits_to_keep=keep).logits
            torch.testing.assert_close(kept, whole[:, rows])


def test_sampling_is_seeded_and_cached_equals_not(model):
    ids, mask, _ = ragged("left")
    drawn = []
    for use_cache in (True, True, False):
        torch.manual_seed(7)
        drawn.append(generate(model, ids, mask, do_sample=True, top_k=0, temperature=1.3, use_cache=use_cache))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    torch.manual_seed(8)
    assert not torch.equal(drawn[0], generate(model, ids, mask, do_sample=True, top_k=0, temperature=1.3))


def test_several_sequences_a_prompt(model):
    ids, mask, _ = ragged("left")
    beams = generate(model, ids, mask, num_beams=4, num_return_sequences=3)
    assert beams.shape[0] == 9
    assert torch.equal(beams[::3], torch.nn.functional.pad(
        generate(model, ids, mask, num_beams=4), (0, beams.shape[1] - generate(model, ids, mask, num_beams=4).shape[1])
    ))  # fmt: skip
    sampled = generate(model, ids, mask, do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 9


def test_scores_are_the_logits_of_the_whole_sequence(model):
    ids, mask, _ = ragged("left")
    out = generate(
        model,
        ids,
        mask,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        output_hidden_states=True,
    )
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(out.scores, dim=1), logits, atol=5e-5, rtol=1e-5)
    assert len(out.decoder_hidden_states) == len(out.scores)
    pooled_from = model.config.first_pooled_layer or 0
    assert [state.shape for state in out.encoder_hidden_states] == [
        (3, length if index < pooled_from else read_of(model, length), 32) for index, length in enumerate([7] * 4)
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}]
)
def test_full_depth_merged_generates_what_llama_generates(settings):
    """Greedy and beams, ragged: the prompt of Llama ends in our start token."""
    llama = make_llama(layers=2)
    model = merged_twin(llama)
    ids, mask, _ = ragged("left")
    start = torch.ones(3, 1, dtype=torch.long)
    theirs = llama.generate(
        torch.cat((ids, start), -1), attention_mask=torch.cat((mask, start), -1), **GREEDY, **settings
    )
    ours = generate(model, ids, mask, **settings)
    assert torch.equal(ours, theirs[:, ids.shape[1] :])


def test_prompt_lookup_equals_greedy(model):
    for _ in range(3):
        ids = random_ids(1, 9)
        expected = generate(model, ids, max_new_tokens=20)
        # transformers 4.57 goes on for one token more than asked if a guess reaches that far.
        looked_up = generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up[:, : expected.shape[1]], expected)


def test_assisted_generation_equals_greedy(model):
    smaller = make_model(model.config.cross_attention, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1)
    close = copy.deepcopy(model)  # a helper that is right at times, so that both branches are walked
    with torch.no_grad():
        close.lm_head.weight.add_(0.02 * torch.randn_like(close.lm_head.weight))
    for assistant in (smaller, close):
        for _ in range(2):
            ids = random_ids(1, 7)
            expected = generate(model, ids, max_new_tokens=16)
            assisted = generate(model, ids, max_new_tokens=16, assistant_model=assistant)
            assert torch.equal(assisted[:, : expected.shape[1]], expected)


def test_contrastive_controls_reach_us(model):
    """Processors that read the prompt, and stops, work as for every encoder-decoder."""
    ids = random_ids(1, 6)
    tokens = generate(model, ids, min_new_tokens=10, no_repeat_ngram_size=2, repetition_penalty=1.3)
    pairs = list(zip(tokens[0, 1:-1].tolist(), tokens[0, 2:].tolist()))
    assert len(pairs) == len(set(pairs))
    assert tokens.shape == (1, 11)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_train_mode_with_gradient_checkpointing_generates_what_eval_mode_does(model, reentrant, beams):
    """Of a row alone, argmax by hand; the cache is used and filled once."""
    ids, mask, rows = ragged()
    expected = generate(model, ids, mask, num_beams=beams)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    lengths = []
    hook = model.model.decoder.layers[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    assert torch.equal(generate(model, ids, mask, num_beams=beams), expected)
    assert set(lengths) == {1}
    hook.remove()
    if beams == 1:
        for row, tokens in zip(rows, expected, strict=True):
            assert trimmed(generate(model, row)[0], model) == trimmed(tokens, model)
        model.eval()
        assert trimmed(expected[0], model) == greedy_by_hand(model, rows[0])


def test_train_mode_has_a_cache_where_it_is_asked_for(model):
    """Token by token, by hand, as T5 and BART; without a word of it training keeps none."""
    ids, target = random_ids(2, 6), random_ids(2, 4)
    model.train()
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=target)
        assert whole.past_key_values is None
        cache, logits = None, []
        for token in target.split(1, dim=1):
            outputs = model(input_ids=ids, decoder_input_ids=token, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=2e-5, rtol=1e-5)


def test_generation_leaves_no_trace(model):
    ids = random_ids(2, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = generate(model, ids), generate(model, ids)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_generation_config_is_saved_with_the_model(model, tmp_path):
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = RopeEncDecForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.decoder_start_token_id == 1
    tokens = loaded.generate(random_ids(1, 4), min_new_tokens=3)
    assert tokens.shape[1] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_the_prompt_that_are_given_are_those_that_are_counted(kind):
    """transformers 4.57 cuts `position_ids` to the length of the decoder's input."""
    model = make_model(kind)
    ids = random_ids(1, 7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, position_ids=torch.arange(7)[None], **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_that_cannot_be_used_are_told(kind):
    model, ids = make_model(kind), random_ids(1, 5)
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    with pytest.raises(ValueError, match="of type DynamicCache: an encoder-decoder takes an EncoderDecoderCache"):
        model(**inputs, past_key_values=DynamicCache())
    two = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    with pytest.raises(ValueError, match="Two caches"):
        model(**inputs, past_key_values=two[0], cache=two[1])
    with torch.no_grad():
        model(**inputs, past_key_values=two[0])
        model(**inputs, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), cache=two[0])
    assert two[0].get_seq_length() == 2 * 5  # the empty one is left aside
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Gradient checkpointing runs layers twice"):
        model(**inputs, past_key_values=two[0])
    model(**inputs, past_key_values=two[1])  # an empty one is left so


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_another_shape_is_told(kind):
    model, ids = make_model(kind), random_ids(2, 5)
    for shape in ((2, 3), (2, 8), (2, 1, 5, 5), (2, 5, 5)):
        with pytest.raises(ValueError, match=r"attention_mask of shape .* for prompts of shape \(2, 5\)"):
            model(input_ids=ids, attention_mask=torch.ones(shape, dtype=torch.long), decoder_input_ids=ids)


def test_a_mask_of_another_width_than_encoder_outputs_is_told(model):
    ids, mask, _ = ragged()
    prompt = model.get_encoder()(ids, attention_mask=mask)
    inputs = {"encoder_outputs": prompt, "decoder_input_ids": ids}
    pools = model.config.encoder_pooling > 1
    tokens = ", 7 to 9 of them" if pools else ""
    for width in (1, 3, 6, 10):  # 3 positions once 7 tokens are pooled
        with pytest.raises(ValueError, match=rf"attention_mask of .*: give one number for each token{tokens}\."):
            model(**inputs, attention_mask=torch.ones(3, width, dtype=torch.long))
    expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    torch.testing.assert_close(model(**inputs, attention_mask=mask).logits, expected)


def test_a_cross_attention_cache_of_another_length_is_told(model):
    ids = random_ids(1, 7)
    read = read_of(model, 7)
    for length in (read - 1, read + 5):
        cross = StaticCache(config=model.config, max_cache_len=length)
        cache = EncoderDecoderCache(StaticCache(config=model.config, max_cache_len=16), cross)
        with pytest.raises(ValueError, match=rf"would have {length} keys for a prompt of length {read}, "):
            model(input_ids=ids, decoder_input_ids=ids, past_key_values=cache)
    filled = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids, past_key_values=filled)
    filled.is_updated.clear()
    with pytest.raises(ValueError, match=rf"would have {2 * read} keys"):
        model(input_ids=ids, decoder_input_ids=ids, past_key_values=filled)


def test_chunks_of_a_prefill_are_refused(model):
    with pytest.raises(ValueError, match="prefill_chunk_size=2: .* Leave it out"):
        generate(model, *ragged()[:2], prefill_chunk_size=2)


def test_a_pad_token_that_is_none_fills_nothing():
    model, ids = make_model("separate"), random_ids(1, 5)
    labels = torch.tensor([[4, 5, -100]])
    expected = model(input_ids=ids, labels=labels).loss
    model.config.pad_token_id = -1
    assert torch.equal(model(input_ids=ids, labels=labels).loss, expected)
