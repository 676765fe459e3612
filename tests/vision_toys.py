"""Toy vision students and teachers. Images are 8 x 8 pixels, patches 2 x 2: 16 features."""

import torch
from toys import make_llama, merged_twin, stir
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
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
