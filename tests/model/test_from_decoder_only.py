"""Students from decoder-only models, compared with the transformers models that they come from."""

import copy
import inspect

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from vision_toys import make_seeing_teacher

from hf_encdec_distill import RopeEncDecConfig, RopeEncDecForConditionalGeneration
from hf_encdec_distill.models import SUPPORTED_FAMILIES
from hf_encdec_distill.models.decoder_only import prune_decoder_only
from hf_encdec_distill.models.either_version import save_teacher
from hf_encdec_distill.models.loading import load_tokenizer
from hf_encdec_distill.models.prompts import encode_prompt
from hf_encdec_distill.models.rope_encdec.compat_rope_encdec import ROPE_LIVES_IN_ONE_DICT
from hf_encdec_distill.models.vocabulary import trim_tokenizer, trim_vocabulary


DEPTH, VOCAB = 4, 280
FAMILIES = {
    "llama": {"rope_theta": 500.0, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 12, "sliding_window": None, "attention_bias": True, "mlp_bias": True},  # reads neither
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"original_max_position_embeddings": 2048, "partial_rotary_factor": 0.5},
}
PROMPT_LENGTHS, TARGET_LENGTH = (7, 4, 2), 5


def make_teacher(family="llama", **fields):
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 3,
            "eos_token_id": 2,
            **FAMILIES[family],
            **fields,
        },
    )
    teacher = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms of one and biases of zero would hide what is not copied
        for parameter in teacher.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher


def ragged(side):
    prompts = torch.randint(4, VOCAB, (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)))
    targets = torch.randint(4, VOCAB, (len(PROMPT_LENGTHS), TARGET_LENGTH))
    ids, mask = torch.zeros_like(prompts), torch.zeros_like(prompts)
    for row, length in enumerate(PROMPT_LENGTHS):
        where = slice(0, length) if side == "right" else slice(prompts.shape[1] - length, None)
        ids[row, where], mask[row, where] = prompts[row, :length], 1
    return ids, mask, prompts, targets


@torch.no_grad()
def teacher_logits(teacher, prompts, targets):
    rows = [torch.cat((p[:n], t))[None] for p, t, n in zip(prompts, targets, PROMPT_LENGTHS)]
    return torch.cat([teacher(row).logits[:, n:] for row, n in zip(rows, PROMPT_LENGTHS)])


def test_every_supported_family_is_tested():
    assert set(FAMILIES) == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_at_full_depth_is_the_teacher(family, tied):
    teacher = make_teacher(family, tie_word_embeddings=tied)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    assert student.config.cross_attention == "merged" and student.config.encoder_attention == "causal"
    for side in ("right", "left"):
        ids, mask, prompts, targets = ragged(side)
        expected = teacher_logits(teacher, prompts, targets)
        with torch.no_grad():
            whole = student(input_ids=ids, attention_mask=mask, decoder_input_ids=targets)
            cache, steps = None, []
            for token in targets.split(1, dim=1):
                out = student(
                    encoder_outputs=student.get_encoder()(ids, attention_mask=mask),
                    attention_mask=mask,
                    decoder_input_ids=token,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, steps = out.past_key_values, [*steps, out.logits]
        torch.testing.assert_close(whole.logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not ROPE_LIVES_IN_ONE_DICT, reason="transformers 4.57 does not run such a teacher")
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"phi3"}))
def test_a_rotary_factor_that_the_teacher_does_not_read_is_not_taken_over(family):
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    teacher = make_teacher(family, rope_parameters=rope)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    ids, mask, prompts, targets = ragged("right")
    with torch.no_grad():
        ours = student(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits
    torch.testing.assert_close(ours, teacher_logits(teacher, prompts, targets), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_starts_as_the_teacher_on_the_target_alone(family):
    teacher = make_teacher(family)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, cross_attention="separate", encoder_layers=[0, 3]
    )
    ids, mask, _, targets = ragged("right")
    with torch.no_grad():
        ours = student(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits
        theirs = teacher(targets).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    cross, own = student.model.decoder.layers[1].cross_attn, student.model.decoder.layers[1].self_attn
    for name, parameter in cross.named_parameters():
        if name.startswith("o_proj"):
            assert not parameter.any()
        else:
            torch.testing.assert_close(parameter, dict(own.named_parameters())[name])
    torch.testing.assert_close(
        student.model.decoder.layers[1].cross_attn_layernorm.weight,
        student.model.decoder.layers[1].input_layernorm.weight,
    )


def test_greedy_and_beam_search_give_the_teachers_tokens():
    teacher = make_teacher(pad_token_id=0)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    ids, mask, _, targets = ragged("left")
    targets[:, 0] = student.config.decoder_start_token_id
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        options = {**options, "max_new_tokens": 8, "do_sample": False}
        theirs = teacher.generate(
            torch.cat((ids, targets[:, :1]), dim=1),
            attention_mask=torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1),
            **options,
        )[:, ids.shape[1] + 1 :]
        ours = student.generate(ids, attention_mask=mask, decoder_input_ids=targets[:, :1], **options)[:, 1:]
        assert torch.equal(ours[:, : theirs.shape[1]], theirs[:, : ours.shape[1]])


def test_weights_are_copies():
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, decoder_num_hidden_layers=2, layer_selection="even"
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    encoder, decoder = student.model.encoder.layers[0], student.model.decoder.layers[0]
    assert encoder.mlp.up_proj.weight.data_ptr() != decoder.mlp.up_proj.weight.data_ptr()


def test_chosen_layers_and_the_states_they_read():
    teacher = make_teacher()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_layers=[0, 2], decoder_layers=[0, 1, 3]
    )
    # Layer 0 reads the embeddings, layer 1 what has passed layer 0, layer 3 what has passed layers 0 and 2.
    assert student.config.cross_attention_layers == [0, 1, 2]
    for side, layers in (("encoder", [0, 2]), ("decoder", [0, 1, 3])):
        for ours, layer in zip(getattr(student.model, side).layers, layers):
            theirs = teacher.model.layers[layer].state_dict()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def calibration_rows():
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in (9 + i % 3, 5 + i % 2))
        for i in range(9)
    ]


def dense_influence(teacher, rows, tokens_of):
    """1 - cos(in, out), one row at a time, with hooks instead of `output_hidden_states`."""
    sums, count, states = torch.zeros(DEPTH), 0, {}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, out, i=i: states.__setitem__(i, (args[0], out[0] if isinstance(out, tuple) else out))
        )
        for i, layer in enumerate(teacher.model.layers)
    ]
    for prompt, target in rows:
        with torch.no_grad():
            teacher(torch.tensor([prompt + target]))
        tokens = tokens_of(len(prompt), len(target))
        for i, (entering, leaving) in states.items():
            cosine = F.cosine_similarity(entering[..., tokens, :], leaving.view_as(entering)[..., tokens, :], dim=-1)
            sums[i] += (1 - cosine).sum()
        count += tokens.stop - tokens.start
    for hook in hooks:
        hook.remove()
    return sums / count


def test_influence_keeps_what_turns_its_input_most():
    teacher = make_teacher(num_hidden_layers=DEPTH)
    with torch.no_grad():  # layer 2 does nearly nothing to the residual stream
        for projection in (teacher.model.layers[2].self_attn.o_proj, teacher.model.layers[2].mlp.down_proj):
            projection.weight.mul_(1e-3)
            if projection.bias is not None:
                projection.bias.zero_()
    rows = calibration_rows()
    on_target = dense_influence(teacher, rows, lambda p, t: slice(p - 1, p + t - 1))
    assert on_target.argmin() == 2
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, decoder_num_hidden_layers=3, encoder_num_hidden_layers=DEPTH, calibration=rows
    )
    assert student.config.cross_attention_layers == [0, 1, 3]

    from hf_encdec_distill.models.rope_encdec.layer_choice import calibration_batches, measure_teacher

    logprobs, influence = measure_teacher(teacher, calibration_batches(rows, "cpu"))
    torch.testing.assert_close(torch.tensor(influence["decoder"][:-1]), on_target[:-1], atol=1e-5, rtol=1e-4)
    on_prompt = dense_influence(teacher, rows, lambda p, t: slice(0, p))
    torch.testing.assert_close(torch.tensor(influence["encoder"][:-1]), on_prompt[:-1], atol=1e-5, rtol=1e-4)
    assert sum(len(rows) for rows in logprobs) == sum(len(target) for _, target in rows)


def mean_divergence(teacher, student, rows):
    """KL(teacher || student) over target tokens, one row at a time."""
    total, tokens = 0.0, 0
    for prompt, target in rows:
        with torch.no_grad():
            theirs = teacher(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            ours = student(
                input_ids=torch.tensor([prompt[:-1]]), decoder_input_ids=torch.tensor([[prompt[-1], *target[:-1]]])
            ).logits[0]
        total += F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
        tokens += len(target)
    return float(total / tokens)


def test_greedy_takes_out_what_costs_least():
    teacher, rows = make_teacher(), calibration_rows()
    greedy = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, decoder_num_hidden_layers=DEPTH - 1, layer_selection="greedy", calibration=rows
    )
    kept = greedy.config.cross_attention_layers
    costs = {}
    for out in range(DEPTH):
        layers = [layer for layer in range(DEPTH) if layer != out]
        trial = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, decoder_layers=layers)
        with torch.no_grad():  # undo the rescaling, which comes after the choice
            trial.model.decoder.norm.weight.copy_(teacher.model.norm.weight)
        costs[out] = mean_divergence(teacher, trial, rows)
    assert kept == [layer for layer in range(DEPTH) if layer != min(costs, key=costs.get)]


def test_greedy_measures_what_a_separate_student_would_read():
    """Its new cross-attention adds nothing to the logits yet, which are the same whichever encoder layer is gone."""
    teacher, rows = make_teacher(), calibration_rows()
    greedy = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher,
        encoder_num_hidden_layers=DEPTH - 1,
        cross_attention="separate",
        layer_selection="greedy",
        calibration=rows,
    )
    costs = {}
    for out in range(DEPTH):
        layers = [layer for layer in range(DEPTH) if layer != out]
        trial = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, encoder_layers=layers)
        with torch.no_grad():
            trial.model.decoder.norm.weight.copy_(teacher.model.norm.weight)
        costs[out] = mean_divergence(teacher, trial, rows)
    expected = [layer for layer in range(DEPTH) if layer != min(costs, key=costs.get)]
    queries = [layer.self_attn.q_proj.weight for layer in greedy.model.encoder.layers]
    assert all(
        torch.equal(query, teacher.model.layers[layer].self_attn.q_proj.weight)
        for query, layer in zip(queries, expected, strict=True)
    )


def test_the_final_norm_is_rescaled_to_less_divergence():
    teacher, rows = make_teacher(), calibration_rows()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_layers=[0, 1], decoder_layers=[0, 3], calibration=rows, heal=None
    )
    scale = (student.model.decoder.norm.weight / teacher.model.norm.weight).detach()
    torch.testing.assert_close(scale, scale[:1].expand_as(scale))
    assert 0 < scale[0] < 1
    rescaled = mean_divergence(teacher, student, rows)
    for factor in (1 / 1.2, 1.2, 1 / float(scale[0])):
        other = copy.deepcopy(student)
        with torch.no_grad():
            other.model.decoder.norm.weight.mul_(factor)
        assert rescaled < mean_divergence(teacher, other, rows)


@pytest.mark.parametrize(("selection", "decoder"), [("even", [0, 3]), ("first", [0, 3])])
def test_selection_without_measuring(selection, decoder):
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        make_teacher(), encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, layer_selection=selection
    )
    assert len(student.model.encoder.layers) == 2
    assert student.config.cross_attention_layers == [0, 2]


def test_tokenizer_generation_config_and_special_tokens_come_along(make_bpe_tokenizer, tmp_path):
    tokenizer = make_bpe_tokenizer()
    teacher = make_teacher(pad_token_id=2)
    teacher.generation_config.update(temperature=0.7, top_p=0.9, do_sample=True, max_length=77, min_length=70)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        str(tmp_path / "teacher"), encoder_num_hidden_layers=3, decoder_num_hidden_layers=2
    )
    prompt = encode_prompt(tokenizer, "def add(a, b): return a")
    assert student.config.decoder_start_token_id == prompt[-1]
    assert (
        student.config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") != student.config.eos_token_id
    )
    assert (student.generation_config.temperature, student.generation_config.top_p) == (0.7, 0.9)
    # The teacher's count the prompt.
    ours, default = student.generation_config, GenerationConfig()
    assert (ours.max_length, ours.min_length) == (default.max_length, default.min_length)

    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "student")("def add(a, b): return a", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [prompt[:-1]]
    assert loaded.generation_config.decoder_start_token_id == prompt[-1]
    ours = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, student.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_a_pad_token_without_an_embedding_is_not_taken(make_bpe_tokenizer, tmp_path):
    """As where [PAD] was added to a tokenizer, and the model not resized."""
    tokenizer = make_bpe_tokenizer()
    teacher = make_teacher(vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    save_teacher(teacher, tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, tokenizer=tokenizer)
    assert student.tokenizer.pad_token == "<|endoftext|>"
    assert student.config.pad_token_id == student.generation_config.pad_token_id == student.tokenizer.pad_token_id
    rows = ["a", "def add(a, b):"]
    batch = student.tokenizer(rows, padding=True, return_tensors="pt")
    answers = student.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    alone = student.generate(**student.tokenizer(rows[:1], return_tensors="pt"), max_new_tokens=3, eos_token_id=None)
    assert answers[0].tolist() == alone[0].tolist()
    with pytest.raises(ValueError, match=rf"'\[PAD\]', and its model has embeddings for 0 to {len(tokenizer) - 2}:"):
        trim_vocabulary(teacher, tokenizer, trim_tokenizer(tokenizer, rows))


def test_any_field_of_the_config_may_be_given():
    """Those too that come from teacher or tokenizer otherwise."""
    teacher = make_teacher()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    fields = [
        name for name in inspect.signature(RopeEncDecConfig.__init__).parameters if name not in ("self", "kwargs")
    ]
    assert {"decoder_start_token_id", "eos_token_id", "vocab_size", "rope_parameters", "use_cache"} <= set(fields)
    given = {name: getattr(student.config, name) for name in fields}
    for name, value in given.items():
        again = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, **{name: value})
        assert again.config.to_dict() == student.config.to_dict(), name
    again = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, **given)
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in student.named_parameters())


def test_special_tokens_that_are_given_are_those_that_generate_takes(make_bpe_tokenizer):
    """What the teacher writes after the prompt and a token 7, up to a token of one's own."""
    teacher, prompt = make_teacher(), torch.randint(4, VOCAB, (1, 6))
    behind = torch.cat((prompt, torch.tensor([[7]])), dim=1)
    expected = teacher.generate(behind, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    last = expected[4]
    given = {"decoder_start_token_id": 7, "eos_token_id": last, "pad_token_id": 5, "bos_token_id": 6}
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, tokenizer=make_bpe_tokenizer(), **given)
    for config in (student.config, student.generation_config):
        assert {name: getattr(config, name) for name in given} == given
    found = student.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    assert found == expected[: expected.index(last, 1) + 1]


def test_a_teacher_without_special_tokens_may_be_told_where_to_start():
    teacher = make_teacher(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with pytest.raises(ValueError, match=r"no token to start the decoder from.*decoder_start_token_id="):
        RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher, decoder_start_token_id=7)
    assert student.config.decoder_start_token_id == student.generation_config.decoder_start_token_id == 7


def test_the_dtype_is_the_teachers(tmp_path):
    teacher = make_teacher().to(torch.bfloat16)
    teacher.save_pretrained(tmp_path)
    student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert not student.training


def test_a_sliding_window_bounds_where_the_student_is_exact(caplog):
    teacher = make_teacher("mistral", sliding_window=8)
    assert RopeEncDecForConditionalGeneration.from_decoder_only(teacher).config.max_position_embeddings == 8
    assert "sliding window of 8" in caplog.text


def test_a_sliding_window_is_told_of_where_rope_is_scaled_by_the_positions(caplog):
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 512}
    theirs = {"rope_parameters": scaled} if ROPE_LIVES_IN_ONE_DICT else {"rope_scaling": scaled, "rope_theta": 500.0}
    teacher = make_teacher("mistral", head_dim=8, sliding_window=8, **theirs)
    assert RopeEncDecForConditionalGeneration.from_decoder_only(teacher).config.max_position_embeddings == 2048
    assert "sliding window of 8" in caplog.text and "keep prompt and target together within it" in caplog.text


def test_a_window_that_no_layer_slides_in_bounds_nothing(caplog):
    """Qwen2 slides in layers from `max_window_layers` on, and has 28 of those by default."""
    for layers, positions in ((28, 2048), (DEPTH - 1, 8)):
        teacher = make_teacher("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=layers)
        student = RopeEncDecForConditionalGeneration.from_decoder_only(teacher)
        assert student.config.max_position_embeddings == positions
        assert ("sliding window of 8" in caplog.text) == (positions == 8)


def smaller(kind, teacher, **options):
    """A student of either kind with half of the layers."""
    if kind == "decoder-only":
        return prune_decoder_only(teacher, num_hidden_layers=2, **options)
    return RopeEncDecForConditionalGeneration.from_decoder_only(teacher, encoder_num_hidden_layers=2, **options)


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_each_module_of_the_teacher_is_in_the_mode_that_it_was_in(kind):
    teacher = make_teacher().train()
    teacher.model.layers[0].eval()
    before = [module.training for module in teacher.modules()]
    smaller(kind, teacher, calibration=calibration_rows(), heal=None)
    assert [module.training for module in teacher.modules()] == before
    with pytest.raises(ValueError, match="calibration has no row"):
        smaller(kind, teacher, calibration=[([5], [])])
    with pytest.raises(ValueError, match=f"has the token {teacher.config.vocab_size}, and the teacher's are 0 to"):
        smaller(kind, teacher, calibration=[([5, 6], [teacher.config.vocab_size])])
    assert [module.training for module in teacher.modules()] == before


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
@pytest.mark.parametrize("options", [{"heal": None}, {"layer_selection": "least_squares"}, {}], ids=str)
def test_a_teacher_that_overflows_is_refused(kind, options):
    """Its final norm would be scaled by the first factor that was tried, for none compares with NaN."""
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    smaller(kind, teacher, calibration=calibration_rows(), heal=None)
    teacher.half()
    with pytest.raises(ValueError, match=r"not finite.*torch.float16.*dtype=torch.float32 or torch.bfloat16"):
        smaller(kind, teacher, calibration=calibration_rows(), **options)
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj.weight' is not finite"):
        smaller(kind, teacher, calibration=calibration_rows(), **options)


def test_an_adapter_is_merged_or_refused(make_bpe_tokenizer, tmp_path):
    """One in a folder is merged, by hand here; a model that has one is left alone."""
    tokenizer = make_bpe_tokenizer()
    base = make_teacher(vocab_size=len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for layer, adapted in zip(base.model.layers, model.get_base_model().model.layers, strict=True):
        lora = adapted.self_attn.q_proj
        layer.self_attn.q_proj.weight.data += 3 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight

    for kind in ("encoder-decoder", "decoder-only"):
        expected, student = (
            smaller(kind, teacher, layer_selection="first", heal=None, calibration=calibration_rows())
            for teacher in (base, tmp_path / "adapter")
        )
        assert student.state_dict().keys() == expected.state_dict().keys()
        for name, weight in expected.state_dict().items():
            torch.testing.assert_close(student.state_dict()[name], weight)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        for teacher in (model, model.get_base_model()):
            with pytest.raises(ValueError, match=r"as an adapter does.*merge_and_unload\(\).*adapter's folder"):
                smaller(kind, teacher, calibration=calibration_rows())
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    merged = model.merge_and_unload()
    assert smaller("decoder-only", merged, calibration=calibration_rows(), tokenizer=tokenizer).num_parameters()


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_a_teacher_with_weights_on_disk_is_refused(kind, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(ValueError, match="weights that are not in memory.*load it without device_map"):
        smaller(kind, offloaded, calibration=calibration_rows())


@pytest.mark.parametrize("selection", ["influence", "greedy"])
def test_an_encoder_that_slides(selection):
    """Its layers are those that would be chosen otherwise; within the window nothing changes."""
    teacher, rows = make_teacher(), calibration_rows()
    types = ["full_attention", "sliding_attention"]
    plain, student = (
        RopeEncDecForConditionalGeneration.from_decoder_only(
            teacher,
            encoder_num_hidden_layers=2,
            layer_selection=selection,
            calibration=rows,
            heal=None,
            **fields,
        )
        for fields in ({}, {"encoder_layer_types": types, "encoder_sliding_window": 4})
    )
    assert student.config.attention_of_encoder_layer == types
    for name, weight in plain.named_parameters():
        if name != "model.decoder.norm.weight":
            assert torch.equal(weight, student.get_parameter(name))
    short, long = torch.randint(4, VOCAB, (1, 4)), torch.randint(4, VOCAB, (1, 9))
    with torch.no_grad():
        for ids, equal in ((short, True), (long, False)):
            states = [model.get_encoder()(ids).last_hidden_state for model in (plain, student)]
            assert torch.allclose(*states, atol=1e-5) == equal


def test_m_rope_is_refused_by_name():
    """Of a whole Qwen2-VL, and of a language model with it that goes by the name of a family that students know."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    for teacher in (make_seeing_teacher("qwen2_vl"), make_teacher("qwen2", rope_scaling=rope)):
        with pytest.raises(ValueError, match=r"has M-RoPE \(mrope_section=\[1, 1, 2\]\).*takes it as teacher="):
            RopeEncDecForConditionalGeneration.from_decoder_only(teacher)


def test_other_families_are_refused_by_name():
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=20))
    with pytest.raises(ValueError, match="gpt2.*llama, mistral, qwen2, qwen3, smollm3, phi3"):
        RopeEncDecForConditionalGeneration.from_decoder_only(teacher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_num_hidden_layers": DEPTH + 1}, "encoder_num_hidden_layers=5.*4 layers"),
        ({"decoder_layers": [0, DEPTH]}, r"decoder_layers=\[0, 4\]"),
        ({"decoder_layers": [1, 0]}, "ascending"),
        ({"decoder_layers": [0, 1], "decoder_num_hidden_layers": 3}, "disagree"),
        ({"layer_selection": "magic"}, "layer_selection='magic'"),
        ({"decoder_num_hidden_layers": 2}, "tokenizer="),
        ({"decoder_num_hidden_layers": 2, "calibration": [("text", "target")]}, "tokenizer="),
        ({"decoder_num_hidden_layers": 2, "calibration": [([1], [])]}, "calibration"),
        # Refused before anything is measured.
        (
            {"decoder_num_hidden_layers": 2, "calibration": [([1], [])], "trimmed_tokenizer": object()},
            "needs the teacher's",
        ),
        ({"decoder_num_hidden_layers": 2, "calibration": [{"source": [4, 5], "target": [6]}]}, "expected pairs"),
        ({"decoder_num_hidden_layers": 2, "calibration": [([4] * 99, [6])], "positions": 90}, "fits .* 90 positions"),
    ],
)
def test_what_cannot_work_is_a_value_error(arguments, message):
    teacher = make_teacher(max_position_embeddings=arguments.pop("positions", 512))
    with pytest.raises(ValueError, match=message):
        RopeEncDecForConditionalGeneration.from_decoder_only(teacher, **arguments)


def test_rows_beyond_the_teachers_positions_count_for_nothing(caplog):
    teacher = make_teacher(max_position_embeddings=64)

    def student(rows):
        return RopeEncDecForConditionalGeneration.from_decoder_only(
            teacher, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, calibration=rows
        )

    rows = calibration_rows()
    expected, found = student(rows), student([*rows, ([5] * 60, [6] * 5)])
    assert all(torch.equal(weight, found.get_parameter(name)) for name, weight in expected.named_parameters())
    assert f"1 of {len(rows) + 1} calibration rows do not fit" in caplog.text


@pytest.mark.parametrize("selection", ["influence", "least_squares", "greedy", "even", "first"])
def test_the_only_layer_of_a_merged_decoder_reads_the_encoder(selection, caplog):
    """The states of a layer 0 are the embeddings, and no encoder layer would matter."""
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        make_teacher(),
        encoder_num_hidden_layers=3,
        decoder_num_hidden_layers=1,
        layer_selection=selection,
        calibration=calibration_rows(),
    )
    assert student.config.cross_attention_layers == [3] and "do nothing" not in caplog.text
    inputs = {"input_ids": torch.randint(4, VOCAB, (1, 6)), "decoder_input_ids": torch.randint(4, VOCAB, (1, 3))}
    student(**inputs).logits.sum().backward()
    assert all(layer.self_attn.k_proj.weight.grad.abs().max() > 0 for layer in student.model.encoder.layers)


def test_encoder_layers_that_nothing_reads_are_named(caplog):
    RopeEncDecForConditionalGeneration.from_decoder_only(
        make_teacher(), encoder_num_hidden_layers=3, decoder_layers=[0, 1], calibration=calibration_rows()
    )
    assert "The last 2 of the encoder's 3 layers do nothing" in caplog.text


def test_without_the_layer_that_nothing_reads_it_is_the_teacher_still():
    teacher = make_teacher()
    student = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_layers=list(range(DEPTH - 1)), calibration=calibration_rows()
    )
    assert torch.equal(student.model.decoder.norm.weight, teacher.model.norm.weight)
