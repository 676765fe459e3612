"""Toy vision students and teachers. Images are 8 x 8 pixels, patches 2 x 2: 16 features.

Teachers of other kinds are in `SEEING`, with what their processors make of images: there, image tokens are `IMAGE`.
"""

import copy

import torch
from toys import VOCAB, make_llama, merged_twin, stir
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from hf_encdec_distill import RopeEncDecForImageTextToText


FEATURES = 16
_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
_MLP = {"intermediate_size": 40}
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**_SIZES, **_MLP)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**_SIZES, **_MLP)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**_SIZES)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**_SIZES, num_register_tokens=3)
    ),
}


def make_tower(kind):
    model = TOWERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def make_llava(tokenizer, layers=3, vision_feature_layer=-2):
    """A LLaVA with CLIP's tower whose tokenizer knows `<image>`."""
    text = make_llama(layers=layers, vocab_size=len(tokenizer)).config
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_SIZES, **_MLP),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
        model.model.multi_modal_projector.linear_2.weight.mul_(5)  # so that a wrong image is seen
    return stir(model).eval()


def llama_of(llava):
    """The language model of a LLaVA as a causal language model."""
    llama = make_llama(
        layers=llava.config.text_config.num_hidden_layers, vocab_size=llava.config.text_config.vocab_size
    )
    llama.model.load_state_dict(llava.model.language_model.state_dict())
    llama.lm_head.load_state_dict(llava.lm_head.state_dict())
    return llama


def twin_of(llava, tokenizer):
    """A merged student of full depth with the weights of a LLaVA."""
    text = merged_twin(llama_of(llava), vocab_size=len(tokenizer), decoder_start_token_id=4)
    text.tokenizer = tokenizer
    return RopeEncDecForImageTextToText.from_parts(
        text,
        llava.model.vision_tower,
        projector=llava.model.multi_modal_projector,
        vision_feature_layer=llava.config.vision_feature_layer,
    )


def pixels(*images, size=8):
    return 5 * torch.randn(*images, 3, size, size)  # so that positions do not drown them


IMAGE, IMAGE_START, VIDEO = 7, 6, 8
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
_QWEN2_VL = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2}


def _llava(vocab_size):
    vision, text = CLIPVisionConfig(**_SIZES, **_MLP), make_llama(layers=2, vocab_size=vocab_size).config
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))


def _llava_next(vocab_size):
    text = make_llama(layers=2, vocab_size=vocab_size, max_position_embeddings=256).config
    vision = CLIPVisionConfig(**_SIZES, **_MLP)
    tiles = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **tiles)
    )


def _idefics3(vocab_size, image_token_id=IMAGE, smolvlm=False):
    config = (SmolVLMConfig if smolvlm else Idefics3Config)(
        vision_config={**_SIZES, **_MLP},
        text_config={"model_type": "llama", "vocab_size": vocab_size, **_TEXT, "max_position_embeddings": 2048},
        image_token_id=image_token_id,
        scale_factor=2,
    )
    return (SmolVLMForConditionalGeneration if smolvlm else Idefics3ForConditionalGeneration)(config)


def _smolvlm(vocab_size):
    return _idefics3(vocab_size, smolvlm=True)


def _gemma3(vocab_size):
    config = Gemma3Config(
        text_config={
            "vocab_size": vocab_size,
            **_TEXT,
            "head_dim": 8,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
        },
        vision_config={**_SIZES, **_MLP, "model_type": "siglip_vision_model"},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen2_vl(vocab_size):
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={"vocab_size": vocab_size, **_TEXT, "rope_scaling": rope, "rope_theta": 100.0},
        vision_config=_QWEN2_VL,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
    )
    return Qwen2VLForConditionalGeneration(config)


SEEING = {
    "llava": _llava,
    "llava_next": _llava_next,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
}


def make_seeing_teacher(kind, vocab_size=VOCAB):
    """Of random weights, in eval mode; wrong images and wrong positions move its logits a lot."""
    model = SEEING[kind](vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
        model.lm_head.weight.mul_(5)
    return stir(model).eval()


def write_smolvlm(folder, tokenizer):
    """A folder with an Idefics3 that reads the tokens of `tokenizer`, and its processor; one tile of each image."""
    tokenizer = copy.deepcopy(tokenizer)
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    size = {"size": {"longest_edge": 8}, "max_image_size": {"longest_edge": 8}}
    images = Idefics3ImageProcessor(do_image_splitting=False, **size)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(folder)
    _idefics3(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")).save_pretrained(folder)


def seen(kind, count):
    """`count` images as the processor of this kind of teacher gives those of one row, and the tokens that stand for
    them, each image between text tokens of its own."""
    if not count:
        return {}, []
    if kind == "llava":
        return {"pixel_values": pixels(count)}, [10, *[IMAGE] * FEATURES, 11] * count
    if kind == "llava_next":  # the whole image, then the tiles of a grid, of which a token ends each line
        sizes = torch.tensor([[8, 16], [16, 16], [16, 8]])[:count]
        tiles = 1 + sizes.prod(dim=-1) // 64
        images = pixels(count, int(tiles.max()))
        for image, number in zip(images, tiles.tolist()):
            image[number:] = 0
        lengths = [FEATURES + height // 2 * (width // 2 + 1) for height, width in sizes.tolist()]
        tokens = [token for length in lengths for token in (10, *[IMAGE] * length, 11)]
        return {"pixel_values": images, "image_sizes": sizes}, tokens
    if kind == "gemma3":
        return {"pixel_values": pixels(count)}, [10, *[IMAGE] * 4, 11] * count
    if kind in ("idefics3", "smolvlm"):
        mask = torch.ones(1, count, 8, 8, dtype=torch.long)
        return {"pixel_values": pixels(1, count), "pixel_attention_mask": mask}, [10, *[IMAGE] * 4, 11] * count
    grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 2, 4]])[:count]  # patches; an image token is of 2 x 2 of them
    tokens = [token for t, h, w in grids.tolist() for token in (IMAGE_START, *[IMAGE] * (t * h * w // 4), 11)]
    return {"pixel_values": 5 * torch.randn(int(grids.prod(-1).sum()), 24), "image_grid_thw": grids}, tokens
