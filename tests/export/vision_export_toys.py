"""Students that read images, for tests of their exports: 8 x 8 pixels, words of a small vocabulary."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import make_model
from transformers import PreTrainedTokenizerFast
from vision_toys import make_tower

from hf_encdec_distill import RopeEncDecForImageTextToText, RopeEncDecVisionProcessor


DIGITS = 10
WORDS = [f"w{i}" for i in range(DIGITS)]
FIRST_WORD = 3


def make_tokenizer():
    """One of `WORDS`, as tokens from `FIRST_WORD` on."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: FIRST_WORD + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": FIRST_WORD + DIGITS}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_student(tower="clip", kind="merged", shuffle=1, size=None, **fields):
    """An untrained student whose answers do not end, and its processor."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "decoder_start_token_id": 1, **fields}
    text = make_model(kind, vocab_size=len(tokenizer), pad_token_id=0, **sizes)
    text.generation_config.eos_token_id = None
    model = RopeEncDecForImageTextToText.from_parts(
        text, make_tower(tower), tokenizer=tokenizer, projector_pixel_shuffle=shuffle
    )
    return model, RopeEncDecVisionProcessor.for_model(model, size=size)


def batch(processor, rows, side="right", seed=0):
    """Ids and mask `(B, S)`, padded on a side, and pixels of prompts such as `[2, "image", 1]`: two words, an image, a
    word, all drawn; images are far from alike."""
    generator = torch.Generator().manual_seed(seed)
    image, prompts, images = [processor.image_token_id] * processor.tokens_of_tile, [], 0
    for row in rows:
        prompts.append([])
        for part in row:
            drawn = 0 if part == "image" else part
            words = torch.randint(FIRST_WORD, FIRST_WORD + DIGITS, (drawn,), generator=generator)
            prompts[-1] += image if part == "image" else words.tolist()
            images += part == "image"
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    size = processor.image_processor.size["height"], processor.image_processor.size["width"]
    return inputs | ({"pixel_values": 5 * torch.randn(images, 3, *size, generator=generator)} if images else {})
