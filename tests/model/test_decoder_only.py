"""Decoder-only students, compared with the teacher that lets the layers pass which they lack."""

import copy
import inspect

import pytest
import torch
from test_from_decoder_only import DEPTH, FAMILIES, VOCAB, make_teacher
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_encdec_distill.models.decoder_only import prune_decoder_only
from hf_encdec_distill.models.prompts import encode_prompt, with_prompt_as_chat_template
from hf_encdec_distill.models.rope_encdec.teacher_layers import as_causal_encoder


LAYERS = [0, 2, 3]
# With a window of 4 that some layers have, and layers without RoPE among those that stay and those that go.
WINDOWS = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "smollm3": {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0, 0, 1]},
}


def letting_pass(teacher, layers):
    """A copy of the teacher in which all other layers hand on what they are given."""
    reference = copy.deepcopy(teacher)
    for index, layer in enumerate(reference.model.layers):
        if index not in layers:
            layer.forward = lambda hidden_states, **kwargs: hidden_states
    return reference


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(4, VOCAB, (length,), generator=generator).tolist()  # noqa: E731
    return [(draw(4 + row % 3), draw(2 + row % 4)) for row in range(count)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family, fields", [*((family, {}) for family in FAMILIES), *WINDOWS.items()])
def test_it_computes_what_the_teacher_does_without_the_other_layers(family, fields, tied, tmp_path):
    teacher = make_teacher(family, tie_word_embeddings=tied, **fields)
    student = prune_decoder_only(teacher, layers=LAYERS)
    ids = torch.randint(4, VOCAB, (2, 11))
    expected = logits(letting_pass(teacher, LAYERS), ids)
    torch.testing.assert_close(logits(student, ids), expected, atol=1e-5, rtol=1e-5)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == len(student.model.layers) == 3
    assert (expected - logits(teacher, ids)).abs().max() > 0.1

    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(teacher)
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    assert loaded.config.tie_word_embeddings == tied == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)


@pytest.mark.parametrize("family, fields", [("mistral", {"sliding_window": 4}), *WINDOWS.items()])
def test_it_is_fitted_to_states_within_the_teachers_windows(family, fields, caplog):
    teacher, ids = make_teacher(family, **fields), torch.randint(4, VOCAB, (2, 11))
    encoder = as_causal_encoder(teacher, windows=True)
    entering = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda layer, args: entering.append(args[0]))
    with torch.no_grad():
        encoder(ids)
        expected = teacher.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(torch.stack(entering), torch.stack(expected[:-1]), atol=1e-5, rtol=1e-5)

    rows = [(prompt * 3, target) for prompt, target in pairs(40)]
    student = prune_decoder_only(teacher, layers=LAYERS, calibration=rows)
    assert student.healing.gaps and "sliding window" not in caplog.text  # it slides as its teacher does


@pytest.mark.parametrize("family, fields", [*((family, {}) for family in FAMILIES), *WINDOWS.items()])
def test_its_cache_has_the_layers_that_are_left(family, fields):
    student = prune_decoder_only(make_teacher(family, **fields), layers=LAYERS)
    ids = torch.randint(4, VOCAB, (2, 11))
    cache, steps = DynamicCache(config=student.config), []
    # transformers 5.24 renamed it.
    name = "cache" if "cache" in inspect.signature(student.model.forward).parameters else "past_key_values"
    for token in ids.split(1, dim=1):
        with torch.no_grad():
            steps.append(student(input_ids=token, use_cache=True, **{name: cache}).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(student, ids), atol=1e-5, rtol=1e-5)
    assert len(cache.layers) == 3
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = [student.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*both)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_list_of_the_config_that_goes_by_layers_is_cut(family):
    """No field of a supported family that is as long as the model is deep was overlooked."""
    depth = 7  # of nothing else
    teacher = make_teacher(family, num_hidden_layers=depth)
    student = prune_decoder_only(teacher, layers=LAYERS)
    for name, whole in teacher.config.to_dict().items():
        if isinstance(whole, list) and len(whole) == depth:
            assert getattr(student.config, name) == [whole[layer] for layer in LAYERS]


def test_nothing_is_shared_with_the_teacher():
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = prune_decoder_only(teacher, layers=LAYERS)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(not tensor.is_meta for tensor in (*student.parameters(), *student.buffers()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    student.generation_config.eos_token_id = 99
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.config.num_hidden_layers == DEPTH and teacher.generation_config.eos_token_id == 2


def test_influence_keeps_what_turns_the_states_most():
    """A teacher whose layer 2 adds next to nothing loses that one, and one whose layer 1 does that one."""
    for idle in (1, 2):
        teacher = make_teacher(num_hidden_layers=5)
        with torch.no_grad():
            for linear in (
                teacher.model.layers[idle + 1].self_attn.o_proj,
                teacher.model.layers[idle + 1].mlp.down_proj,
            ):
                linear.weight.mul_(1e-3)
                if linear.bias is not None:
                    linear.bias.mul_(1e-3)
        student = prune_decoder_only(teacher, num_hidden_layers=4, calibration=pairs(8), heal=None)
        kept = [layer for layer in range(5) if layer != idle + 1]
        ids = torch.randint(4, VOCAB, (1, 9))
        ratio = logits(student, ids) / logits(letting_pass(teacher, kept), ids)
        torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio), rtol=1e-3, atol=0)


def test_greedy_takes_out_what_costs_least():
    teacher = make_teacher(tie_word_embeddings=False)
    rows = pairs(6)

    def divergence(layers):
        model, total, tokens = letting_pass(teacher, layers), 0.0, 0
        for prompt, target in rows:
            ids, where = torch.tensor([prompt + target]), slice(len(prompt) - 1, -1)
            ours, theirs = (logits(m, ids)[0, where].log_softmax(-1) for m in (model, teacher))
            total += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
            tokens += len(target)
        return total / tokens

    expected = list(range(DEPTH))
    for _ in range(2):
        expected = min(([x for x in expected if x != layer] for layer in expected), key=divergence)
    student = prune_decoder_only(teacher, num_hidden_layers=2, layer_selection="greedy", calibration=rows)
    by_hand = prune_decoder_only(teacher, layers=expected, calibration=rows)
    ids = torch.randint(4, VOCAB, (1, 9))
    assert torch.equal(logits(student, ids), logits(by_hand, ids))


def test_the_final_norm_is_rescaled_to_less_divergence():
    teacher, rows = make_teacher(), pairs(12)
    plain = prune_decoder_only(teacher, layers=[0, 3])
    scaled = prune_decoder_only(teacher, layers=[0, 3], calibration=rows)
    ratio = scaled.model.norm.weight / plain.model.norm.weight
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    assert ratio[0] < 1

    def divergence(model):
        total = 0.0
        for prompt, target in rows:
            ids, where = torch.tensor([prompt + target]), slice(len(prompt) - 1, -1)
            ours, theirs = (logits(m, ids)[0, where].log_softmax(-1) for m in (model, teacher))
            total += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        return total

    assert divergence(scaled) < divergence(plain)


def test_a_whole_model_is_a_copy():
    teacher = make_teacher()
    student = prune_decoder_only(teacher)
    ids = torch.randint(4, VOCAB, (1, 9))
    assert torch.equal(logits(student, ids), logits(teacher, ids))


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", ["Shorten: {source}\n", "{source} »{{x}}« \"'\\n'\" and {source}:\n", None])
def test_its_tokenizer_knows_the_prompt(make_bpe_tokenizer, template, add_bos, tmp_path):
    tokenizer = make_bpe_tokenizer(add_bos=add_bos)
    teacher = make_teacher(vocab_size=len(tokenizer))
    student = prune_decoder_only(
        teacher, num_hidden_layers=2, tokenizer=tokenizer, prompt_template=template, calibration=[("add(a)", "b")] * 4
    )
    student.tokenizer.save_pretrained(tmp_path)
    for own in (student.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for source in ("def add(a, b)", "{source}", "two\nlines "):
            expected = encode_prompt(tokenizer, source, template)
            assert encode_prompt(own, source) == expected
            message = [{"role": "user", "content": source}]
            ids = own.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            if template is not None:
                assert ids == ("<s>" if add_bos else "") + template.replace("{source}", source)
    assert tokenizer.chat_template == make_bpe_tokenizer().chat_template


def test_an_answer_in_a_chat_ends_in_eos(make_bpe_tokenizer):
    own = with_prompt_as_chat_template(make_bpe_tokenizer(), "Q: {source}\n")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert own.apply_chat_template(chat, tokenize=False) == "Q: a\nb<|im_end|>"


def test_from_a_folder_in_its_dtype(make_bpe_tokenizer, tmp_path):
    tokenizer = make_bpe_tokenizer()
    teacher = make_teacher(vocab_size=len(tokenizer)).to(torch.bfloat16)
    teacher.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = prune_decoder_only(str(tmp_path), num_hidden_layers=2)
    assert student.dtype == torch.bfloat16 and student.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert student.name_or_path == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": [3, 1]}, r"layers=\[3, 1\] does not work: ascending"),
        ({"num_hidden_layers": 9}, "num_hidden_layers=9 does not work: the teacher has 4 layers"),
        ({"num_hidden_layers": 2, "layers": [0]}, r"num_hidden_layers=2 and layers=\[0\] disagree"),
        ({"num_hidden_layers": 2, "layer_selection": "last"}, "layer_selection='last' is not one of influence"),
        ({"num_hidden_layers": 2}, "measures on rows, and there is no tokenizer"),
        ({"num_hidden_layers": 2, "prompt_template": "no place", "tokenizer": "toy"}, "has no {source}"),
    ],
)
def test_what_cannot_work_is_a_value_error(make_bpe_tokenizer, arguments, message):
    if "tokenizer" in arguments:
        arguments = {**arguments, "tokenizer": make_bpe_tokenizer(), "calibration": [("a", "b")]}
    with pytest.raises(ValueError, match=message):
        prune_decoder_only(make_teacher(), **arguments)


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported.*llama"):
        prune_decoder_only(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2)), num_hidden_layers=1)
