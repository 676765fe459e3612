"""Images in the encoder's prompt, against transformers' own towers, its LLaVA and its Idefics3."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from toys import make_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from vision_toys import FEATURES, TOWERS, make_llava, make_tower, pixels, twin_of
from without_package import HIDE

from hf_encdec_distill import (
    RopeEncDecForImageTextToText,
    RopeEncDecVisionConfig,
    RopeEncDecVisionModel,
    RopeEncDecVisionProcessor,
)
from hf_encdec_distill.models.rope_encdec.modeling_rope_encdec_vision import RopeEncDecProjector


@pytest.fixture
def llava(image_tokenizer):
    return make_llava(image_tokenizer)


@pytest.fixture
def twin(llava, image_tokenizer):
    return twin_of(llava, image_tokenizer)


@pytest.fixture
def image_id(image_tokenizer):
    return image_tokenizer.convert_tokens_to_ids("<image>")


def prompt_of(image_id, *parts):
    """Ids `(1, S)`: numbers are so many text tokens, "image" is an image."""
    rows = [torch.full((FEATURES,), image_id) if part == "image" else torch.randint(5, 90, (part,)) for part in parts]
    return torch.cat(rows)[None]


def padded(rows, side="left"):
    length = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[index, place], mask[index, place] = row[0], 1
    return ids, mask


# The same numbers as others ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_a_student_of_full_depth_has_the_logits_of_its_llava(layer, image_tokenizer, image_id):
    llava = make_llava(image_tokenizer, vision_feature_layer=layer)
    twin = twin_of(llava, image_tokenizer)
    prompt, target, images = prompt_of(image_id, 3, "image", 2, "image", 1), torch.randint(5, 90, (1, 4)), pixels(2)
    whole = torch.cat((prompt, target), dim=1)
    expected = llava(input_ids=whole, pixel_values=images, attention_mask=torch.ones_like(whole)).logits
    found = twin(input_ids=prompt, pixel_values=images, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected[:, prompt.shape[1] :], rtol=2e-4, atol=2e-4)
    # And the images are what it looks at.
    other = twin(input_ids=prompt, pixel_values=-images, decoder_input_ids=target).logits
    assert (other - found).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize(("kind", "normed"), [*((kind, False) for kind in TOWERS), ("siglip", True), ("dinov2", True)])
def test_features_are_the_states_of_the_tower(kind, layer, normed, make_bpe_tokenizer):
    tower, text = make_tower(kind), make_model("separate", vocab_size=300)
    model = RopeEncDecForImageTextToText.from_parts(
        text,
        tower,
        tokenizer=make_bpe_tokenizer(),
        vision_feature_layer=layer,
        vision_final_norm=normed,
    )
    images = pixels(3)
    inner, states = getattr(tower, "vision_model", tower), []
    layers = inner.encoder.layer if kind.startswith("dinov2") else inner.encoder.layers
    # Not from `hidden_states`, whose last SigLIP passes its norm in transformers 4.57.0 and not in 4.57.6.
    layers[layer].register_forward_hook(lambda _module, _inputs, output: states.append(output))
    tower(images)
    (state,) = states
    state = state[0] if isinstance(state, tuple) else state
    norm = inner.layernorm if kind.startswith("dinov2") else inner.post_layernorm
    if normed:
        state = norm(state)
    projector = model.model.encoder.multi_modal_projector
    patches = state[:, -FEATURES:]
    expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(patches)))
    torch.testing.assert_close(model.get_image_features(images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pixel_shuffle_is_that_of_idefics3():
    config = RopeEncDecVisionConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 4, "num_attention_heads": 1},
        projector_pixel_shuffle=2,
        hidden_size=32,
        num_attention_heads=4,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        vocab_size=8,
    )
    projector, features = RopeEncDecProjector(config), torch.randn(2, 36, 4)
    shuffled = Idefics3Connector.pixel_shuffle(None, features, 2)
    expected = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(shuffled)))
    torch.testing.assert_close(projector(features, 6, 6), expected)


@torch.no_grad()
def test_an_image_that_is_no_square_and_of_another_size_than_the_tower_was_trained_with(make_bpe_tokenizer):
    tower, text = make_tower("dinov2"), make_model("separate", vocab_size=300)
    model = RopeEncDecForImageTextToText.from_parts(text, tower, tokenizer=make_bpe_tokenizer())
    images = torch.randn(1, 3, 4, 12)
    assert model.get_image_features(images).shape == (1, 12, 32)
    clip = RopeEncDecForImageTextToText.from_parts(text, make_tower("clip"), tokenizer=make_bpe_tokenizer())
    assert clip.get_image_features(torch.randn(1, 3, 12, 12)).shape == (1, 36, 32)


# Batches and generation ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_as_they_are_alone(side, twin, image_id):
    """One image, none, two."""
    rows = [prompt_of(image_id, 3, "image", 2), prompt_of(image_id, 4), prompt_of(image_id, "image", "image")]
    of_row, target = [pixels(1), None, pixels(2)], torch.randint(5, 90, (3, 3))
    ids, mask = padded(rows, side)
    images = torch.cat([image for image in of_row if image is not None])
    found = twin(input_ids=ids, attention_mask=mask, pixel_values=images, decoder_input_ids=target).logits
    for index, row in enumerate(rows):
        alone = twin(input_ids=row, pixel_values=of_row[index], decoder_input_ids=target[index : index + 1]).logits
        torch.testing.assert_close(found[index], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_llava(beams, twin, llava, image_id):
    """Without padding, from the start token on, which stands behind LLaVA's prompt."""
    prompt, images = prompt_of(image_id, 2, "image", 3), pixels(1)
    start = torch.full((1, 1), twin.config.decoder_start_token_id)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = twin.generate(input_ids=prompt, pixel_values=images, **options)
    whole = torch.cat((prompt, start), dim=1)
    expected = llava.generate(input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=images, **options)
    assert found[0, 1:].tolist() == expected[0, whole.shape[1] :].tolist()


def test_a_replica_computes_the_same(twin, image_id):
    """As `nn.DataParallel` makes it of a model on each GPU: weights are attributes there, no parameters."""
    inputs = {
        "input_ids": prompt_of(image_id, 2, "image"),
        "pixel_values": pixels(1),
        "labels": torch.tensor([[5, 6]]),
    }
    replica = copy.deepcopy(twin)
    for module in replica.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter.detach())
    assert not list(replica.parameters())
    with torch.no_grad():
        assert torch.equal(replica(**inputs).loss, twin(**inputs).loss)


class Rounded(torch.nn.Linear):
    """A weight in 8 bits, as quantising libraries keep it: an int8 parameter and a scale."""

    def __init__(self, of):
        super().__init__(of.in_features, of.out_features)
        self.scale = of.weight.detach().abs().max() / 127
        weight = (of.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = torch.nn.Parameter(weight, requires_grad=False), of.bias

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.weight * self.scale, self.bias)


def test_quantised_weights_of_a_projector(twin, image_id):
    """They are integers; features are of the dtype of the tokens all the same."""
    images, projector = pixels(1), twin.model.encoder.multi_modal_projector
    with torch.no_grad():
        expected = twin.model.encoder.get_image_features(images)
        for name, module in list(projector.named_children()):
            if isinstance(module, torch.nn.Linear):
                setattr(projector, name, Rounded(module))
        found = twin.model.encoder.get_image_features(images)
    assert found.dtype == expected.dtype
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_the_tower_runs_once_for_an_answer(twin, image_id):
    calls = []
    twin.model.encoder.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    twin.generate(input_ids=prompt_of(image_id, 2, "image"), pixel_values=pixels(1), max_new_tokens=5, num_beams=2)
    assert len(calls) == 1


def test_gradients_reach_tower_and_projector_with_checkpointing_too(twin, image_id):
    inputs = {
        "input_ids": prompt_of(image_id, 2, "image"),
        "pixel_values": pixels(1),
        "labels": torch.tensor([[7, 8]]),
    }
    gradients = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = copy.deepcopy(twin).train()
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model(**inputs).loss.backward()
        encoder = model.model.encoder
        read = [*encoder.vision_tower.parameters(), *encoder.multi_modal_projector.parameters()]
        # CLIP's class token is no patch, but patches look at it.
        assert all(parameter.grad is not None for parameter in read)
        gradients.append([parameter.grad for parameter in read])
    plain, *checkpointed = gradients
    for found in checkpointed:
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(one, other)


def ragged(image_id):
    """Three prompts with one image, none and two, padded on the left, and the images."""
    rows = [prompt_of(image_id, 3, "image", 2), prompt_of(image_id, 4), prompt_of(image_id, "image", "image")]
    ids, mask = padded(rows)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(3)}


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_argmax_of_whole_forwards(cache, twin, image_id):
    inputs = ragged(image_id)
    tokens = torch.full((3, 1), twin.config.decoder_start_token_id)
    for _ in range(6):
        logits = twin(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    assert torch.equal(twin.generate(**inputs, **options), tokens)
    beams = {"num_beams": 3, **options}
    assert torch.equal(twin.generate(**inputs, **beams), twin.generate(**inputs, **{**beams, "use_cache": False}))


@torch.no_grad()
def test_compiled_it_is_one_graph_with_the_same_logits(twin, image_id):
    inputs = {**ragged(image_id), "decoder_input_ids": torch.randint(5, 90, (3, 4))}
    expected = twin(**inputs).logits
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision_stays_close(twin, image_id):
    inputs = {**ragged(image_id), "decoder_input_ids": torch.randint(5, 90, (3, 4))}
    exact = twin(**inputs).logits
    half = copy.deepcopy(twin).to(torch.bfloat16)
    rough = half(**inputs).logits  # pixels are as the processor makes them
    assert rough.dtype == torch.bfloat16 and {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert (rough.float() - exact).abs().max() < 0.15 * exact.abs().max()
    del inputs["decoder_input_ids"]
    assert half.generate(**inputs, max_new_tokens=3, eos_token_id=None).shape == (3, 4)


def test_autocast_trains_all_parts(twin, image_id):
    twin.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = twin(**ragged(image_id), labels=torch.randint(5, 90, (3, 2))).loss
    assert loss.dtype == torch.float32
    loss.backward()
    for part in ("vision_tower", "multi_modal_projector", "encoder.layers", "decoder.layers"):
        gradients = [
            weight.grad for name, weight in twin.named_parameters() if part in name and weight.grad is not None
        ]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients), part


# Errors ----------------------------------------------------------------------------------------------------


def test_tokens_and_features_have_to_be_as_many(twin, image_id):
    target = torch.tensor([[7]])
    prompt = prompt_of(image_id, 2, "image")
    with pytest.raises(ValueError, match=r"16 image tokens \(id \d+\) for 32 image features \(2 images of 16\)"):
        twin(input_ids=prompt, pixel_values=pixels(2), decoder_input_ids=target)
    with pytest.raises(ValueError, match="16 image tokens .* and no pixel_values: give the images"):
        twin(input_ids=prompt, decoder_input_ids=target)
    with pytest.raises(ValueError, match="15 image tokens"):
        twin(input_ids=prompt[:, :-1], pixel_values=pixels(1), decoder_input_ids=target)
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        embedded = twin.get_input_embeddings()(prompt)
        twin(inputs_embeds=embedded, pixel_values=pixels(1), decoder_input_ids=target)
    with pytest.raises(ValueError, match=r"pixel_values of shape \(3, 8, 8\): expected \(images, channels"):
        twin(input_ids=prompt, pixel_values=pixels(1)[0], decoder_input_ids=target)
    with pytest.raises(ValueError, match="7 x 8 pixels: a token is made of 2 x 2"):
        twin(input_ids=prompt, pixel_values=torch.randn(1, 3, 7, 8), decoder_input_ids=target)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, "vision_config.model_type='siglip2_vision_model'"),
        ({"vision_config": {"model_type": "qwen2_vl"}}, "vision_config.model_type='qwen2_vl' does not work"),
        ({"image_token_id": 97}, "image_token_id=97 does not work; it has to be a token, 0 to 96"),
        ({"projector_pixel_shuffle": 0}, "projector_pixel_shuffle=0"),
        ({"vision_final_norm": True}, "vision_final_norm=True does not work; it has to be False for CLIP"),
    ],
)
def test_a_configuration_that_does_not_work(fields, problem):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=problem):
        RopeEncDecVisionConfig(**{**sizes, **fields})


def test_parts_that_do_not_fit(twin, make_bpe_tokenizer):
    text, tower = make_model("separate", vocab_size=300), make_tower("clip")
    build = RopeEncDecForImageTextToText.from_parts
    with pytest.raises(ValueError, match="carries no tokenizer"):
        build(text, tower)
    text.tokenizer = make_bpe_tokenizer()
    with pytest.raises(ValueError, match="vision_feature_layer=-5: the vision model has 3 layers"):
        build(text, tower, vision_feature_layer=-5)
    with pytest.raises(ValueError, match="vision_model of type RopeEncDecForConditionalGeneration"):
        build(text, text)
    with pytest.raises(ValueError, match="text_student of type RopeEncDecForImageTextToText .'rope_encdec_vision'"):
        build(twin, tower)
    projector = twin.model.encoder.multi_modal_projector
    with pytest.raises(ValueError, match=r"linear_1.weight: \(32, 24\), expected \(32, 96\)"):
        build(text, tower, projector=projector, projector_pixel_shuffle=2)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    whole = Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=8, patch_size=2))
    with pytest.raises(ValueError, match="Dinov2ForImageClassification has no embeddings.* give the vision model"):
        build(text, whole)
    with pytest.raises(ValueError, match="build the text student with"):
        RopeEncDecForImageTextToText.from_decoder_only(text)


def test_a_new_image_token_is_the_mean_of_the_others(make_bpe_tokenizer):
    tokenizer = make_bpe_tokenizer()
    text = make_model("separate", vocab_size=len(tokenizer), tie_word_embeddings=True)
    text.tokenizer = tokenizer
    model = RopeEncDecForImageTextToText.from_parts(text, make_tower("clip"))
    assert len(tokenizer) == len(model.tokenizer) - 1  # a copy has it
    assert model.config.image_token_id == len(tokenizer) and model.config.vocab_size == len(tokenizer) + 1
    embedding, before = model.get_input_embeddings().weight, text.get_input_embeddings().weight
    assert torch.equal(embedding[:-1], before)
    torch.testing.assert_close(embedding[-1], before.mean(0))
    assert model.lm_head.weight is embedding


# Saved and loaded ----------------------------------------------------------------------------------------------------


def test_saved_and_loaded_by_the_auto_classes(twin, image_id, tmp_path):
    RopeEncDecVisionProcessor.for_model(twin).save_pretrained(tmp_path)
    twin.save_pretrained(tmp_path)
    inputs = {
        "input_ids": prompt_of(image_id, 2, "image"),
        "pixel_values": pixels(1),
        "decoder_input_ids": torch.tensor([[7, 8]]),
    }
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is RopeEncDecForImageTextToText and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(**inputs).logits, twin(**inputs).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RopeEncDecVisionConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), RopeEncDecVisionModel)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is RopeEncDecVisionProcessor
    assert (processor.patch_size, processor.tokens_of_tile) == (2, FEATURES)
    assert processor.image_processor.size == {"height": 8, "width": 8}


ELSEWHERE = (
    HIDE
    + """
import json

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
image = Image.linear_gradient("L")
inputs = processor(images=image, text="a <image> b", return_tensors="pt", return_token_type_ids=False)
print(json.dumps(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()))
"""
)


@pytest.mark.process
def test_a_folder_works_where_the_package_is_not(twin, tmp_path, monkeypatch):
    processor = RopeEncDecVisionProcessor.for_model(twin)
    twin.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "student")], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    inputs = processor(
        images=Image.linear_gradient("L"), text="a <image> b", return_tensors="pt", return_token_type_ids=False
    )
    expected = twin.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    assert json.loads(run.stdout.splitlines()[-1]) == expected
