"""Sizes against the parameter counts that the Hub shows of these models."""

import pytest
from transformers import AutoModelForCausalLM

from hf_encdec_distill import RopeEncDecForConditionalGeneration
from hf_encdec_distill.models.cost import model_cost
from hf_encdec_distill.models.sizes import count, split_config, typical_config


PUBLISHED = {
    "135m": ("SmolLM2-135M", 134_515_008),
    "360m": ("SmolLM2-360M", 361_821_120),
    "1b": ("Llama-3.2-1B", 1_235_814_400),
    "1.7b": ("SmolLM2-1.7B", 1_711_376_384),
    "3b": ("Llama-3.2-3B", 3_212_749_824),
    "8B": ("Llama-3.1-8B", 8_030_261_248),
    "14b": ("Qwen3-14B", 14_768_307_200),
    "32b": ("Qwen3-32B", 32_762_123_264),
    "70b": ("Llama-3.1-70B", 70_553_706_496),
    "405b": ("Llama-3.1-405B", 405_853_388_800),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_size_is_the_published_model_nearest_to_it(size):
    name, config = typical_config(count(size))
    assert (name, model_cost(config, 2, 2).parameters["total"]) == PUBLISHED[size]


def test_a_size_between_two_models_is_not_guessed():
    assert typical_config(count("7b"))[0] == "Llama-3.1-8B"
    with pytest.raises(ValueError, match="near 200 B parameters.*Llama-3.1-70B"):
        typical_config(count("200b"))
    with pytest.raises(ValueError, match="near 0 B"):
        typical_config(0)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1B", 10**9), ("1.5b", 1_500_000_000), ("300M", 3 * 10**8), ("2k", 2000), ("12,000", 12_000), ("7", 7)],
)
def test_numbers_as_people_write_them(text, number):
    assert count(text) == number


@pytest.mark.parametrize("text", ["student", "user/70b", "70 billion", "", "-1b", "1e9"])
def test_what_is_no_number(text):
    assert count(text) is None


def test_a_split_is_what_from_decoder_only_makes():
    config = typical_config(135_000_000)[1]
    config.vocab_size, config.num_hidden_layers = 200, 6
    teacher = AutoModelForCausalLM.from_config(config)
    made = RopeEncDecForConditionalGeneration.from_decoder_only(
        teacher, encoder_num_hidden_layers=3, decoder_num_hidden_layers=2, layer_selection="even", heal=None
    )
    split = split_config(config, 3, 2)
    assert split.cross_attention_layers == made.config.cross_attention_layers
    assert model_cost(split, 20, 5) == model_cost(made.config, 20, 5)
    with pytest.raises(ValueError, match="encoder_layers=7.*6 layers"):
        split_config(config, 7, 2)
