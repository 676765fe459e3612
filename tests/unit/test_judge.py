"""The judge: a model rigged so that its distribution after a prompt can be worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_encdec_distill.evaluation import judge as judging
from hf_encdec_distill.evaluation.judge import Judge, load_template, score_digits


WIDTH = 16
ROWS = [
    {"source": "red {reference} 7", "target": "It is red."},
    {"source": "a source that is a good deal longer than the other one", "target": "blue"},
    *({"source": f"row {number}", "target": "b" * number} for number in range(1, 18)),
]
ANSWERS = ["It is {source}.", "", *("ab" * number for number in range(17))]


def rigged_judge(vocabulary):
    """A Llama that sees its prompt's mean embedding: attention is uniform, MLP nothing, projections identities.

    Hidden state at the last token: e(last) + mean over the prompt of rms(e), then the final norm and the head.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
            if "v_proj" in name or "o_proj" in name:
                parameter.copy_(torch.eye(WIDTH))
            if "embed" in name or "lm_head" in name:
                parameter.normal_(generator=generator)
    return model


def by_hand(model, prompt, digits):
    """Expected digit, given a digit, and the probability of one."""
    embeddings, head = (x.detach().double().numpy() for x in (model.model.embed_tokens.weight, model.lm_head.weight))

    def rms(x):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.config.rms_norm_eps)

    tokens = embeddings[prompt]
    logits = head @ rms(tokens[-1] + rms(tokens).mean(axis=0))
    probabilities = np.exp(logits) / np.exp(logits).sum()
    of_digits = probabilities[digits]
    return of_digits @ [1, 2, 3, 4, 5] / of_digits.sum(), of_digits.sum()


@pytest.fixture
def save(tmp_path, make_bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(judging, "working_dtype", lambda: torch.float32)

    def save(**options):
        tokenizer = make_bpe_tokenizer(**options)
        model = rigged_judge(len(tokenizer))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path), model, tokenizer

    return save


@pytest.mark.parametrize("chat", [True, False])
def test_the_score_is_the_expected_digit(save, chat, capsys):
    path, model, tokenizer = save(**({} if chat else {"chat_template": None, "add_bos": True}))
    template = "In: {source}\nRef: {reference}\nOut: {prediction}\nRating: "
    judge = Judge(path, template, ROWS)
    scores, of_digits = judge.rate({"one": ANSWERS, "other": ANSWERS[::-1]})
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "12345"]
    expected = []
    for row, answer in zip(ROWS, ANSWERS):
        text = f"In: {row['source']}\nRef: {row['target']}\nOut: {answer}\nRating: "
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        expected.append(by_hand(model, tokenizer(text)["input_ids"], digits))
    values, mass = zip(*expected)
    np.testing.assert_allclose(scores["one"], values, atol=1e-4)
    assert of_digits["one"] == pytest.approx(np.mean(mass), rel=1e-3)
    assert np.ptp(values) > 0.3 and not np.allclose(scores["one"], scores["other"])
    assert "a probability of 0.0" in capsys.readouterr().err  # nothing taught this model to answer with a digit


def test_a_distribution_over_digits_done_by_hand():
    """.1 .2 .3 .25 .05 on 1 to 5 and .1 on another token: 2.65 / .9 of the digits, which get .9."""

    class Fixed(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, logits_to_keep, **inputs):
            logits = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.05, 0.1]).log()
            return type("Output", (), {"logits": logits.expand(len(input_ids), logits_to_keep, 6)})

    scores, of_digits = score_digits(Fixed(), [{"prompt": [0], "digits": [0, 1, 2, 3, 4]}])
    assert scores == pytest.approx([(0.1 + 0.4 + 0.9 + 1.0 + 0.25) / 0.9])
    assert of_digits == pytest.approx([0.9])
    reverse, _ = score_digits(Fixed(), [{"prompt": [0], "digits": [4, 3, 2, 1, 0]}])
    assert reverse == pytest.approx(6 - scores)


def test_a_digit_may_bring_the_space_before_it(make_bpe_tokenizer):
    """As with GPT-2: the space that ends the prompt belongs to the digit's token, and is not read twice."""
    tokenizer = make_bpe_tokenizer(chat_template=None)
    tokenizer.add_tokens([f" {digit}" for digit in range(1, 6)])
    judge = Judge.__new__(Judge)
    judge.path, judge.template, judge.tokenizer, judge.max_length = "x", "{prediction}: ", tokenizer, None
    judge.rows = ROWS[:1]
    (found,) = judge.prompts(["add"])
    assert found["digits"] == [tokenizer.convert_tokens_to_ids(f" {digit}") for digit in range(1, 6)]
    assert found["prompt"] == tokenizer("add:")["input_ids"]


def test_templates(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("{prediction}\nRating: \n")
    assert load_template(str(file)) == "{prediction}\nRating: "
    assert load_template("rate {prediction}") == "rate {prediction}"
    default = load_template(None)
    assert f"```\n{default}\n```" in (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert all(f"{{{name}}}" in default for name in ("source", "reference", "prediction"))
    file.write_text("rate it")
    with pytest.raises(ValueError, match=r"has no \{prediction\}"):
        load_template(str(file))
    with pytest.raises(ValueError, match="'rate it' is no file, nor has it {prediction}"):
        load_template("rate it")


def test_a_judge_that_cannot_be_asked(save, tmp_path):
    path, model, tokenizer = save(chat_template=None)
    tokenizer.add_tokens(["g1", "g2", "g3"])  # "rating1" is then cut before the g, "rating4" behind it
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match="no token for each of the digits 1 to 5 after .*rating"):
        Judge(path, "{prediction} rating", ROWS)
    model.config.max_position_embeddings = 30
    model.config.save_pretrained(path)
    with pytest.raises(ValueError, match=r"reads 30 tokens and would get \d+: leave \{source\} out"):
        Judge(path, "{source} {prediction} ", ROWS)
