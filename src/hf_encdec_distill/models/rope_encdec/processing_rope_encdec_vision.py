"""Texts and images -> what a RoPE encoder-decoder with a vision tower reads.

This file travels to the Hub beside the weights: it imports only numpy, Pillow, transformers and its own siblings.
"""

import io
import json
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    load_image,
)


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
# Of pixels, decoded in this process: for some others, such as EPS, Pillow starts another program.
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_SHOWN = 120  # characters of an error of Pillow
# What each kind of tower was trained with.
_COLOURS = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
# In front of a chat template that reads texts alone: what a message consists of becomes its text.
_PARTS_TO_TEXT = """
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set content.text = content.text + (IMAGE_TOKEN if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""
_CONTENT_ALONE = "{{ messages[0]['content'] }}"
_OF_IMAGES = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std", "max_tiles", "max_pixels")
_IMAGE_KEYS = ("image", "url", "path", "base64")  # of a part, in transformers' chats


class RopeEncDecImageProcessor(BaseImageProcessor):
    """Images of any size -> pixels of one size, by Pillow alone.

    An image is made to fit whole and centred, on a ground of `image_mean`; transparent ones on white. With `max_tiles`
    a large one is also cut into as many tiles of that size as come nearest to its shape and do not enlarge it, behind
    the whole image (LLaVA-NeXT; InternVL 1.5, arXiv 2404.16821, section 3.1).

    Args:
        size (`dict`, *optional*): `height` and `width` in pixels, 224 each by default.
        image_mean, image_std (`list` of three numbers, *optional*): Of the colours, 0 to 1; ImageNet's by default.
        max_tiles (`int`, defaults to 1): 1 for the whole image alone.
        max_pixels (`int`, defaults to 89_478_485): Of an image; more are refused before they are decoded, since a
            small file may hold a huge image. The default is the number from which on Pillow warns.

    Raises:
        ValueError: a size or a number that does not work.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=None, image_mean=None, image_std=None, max_tiles=1, max_pixels=89_478_485, **kwargs):
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 224, "width": 224})
        for name, value in (*self.size.items(), ("max_tiles", max_tiles), ("max_pixels", max_pixels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1.")
        if set(self.size) != {"height", "width"}:
            raise ValueError(f"size={self.size}: expected height and width, in pixels.")
        self.image_mean = list(image_mean or IMAGENET_DEFAULT_MEAN)
        self.image_std = list(image_std or IMAGENET_DEFAULT_STD)
        self.max_tiles = max_tiles
        self.max_pixels = max_pixels

    def __call__(self, images, return_tensors=None, **kwargs):
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images, return_tensors=None, **kwargs):
        """
        Args:
            images: an image or a list of them: `PIL.Image.Image`, an array or tensor of shape `(H, W)`, `(H, W, 3 or
                4)` or `(3 or 4, H, W)` with values 0 to 255 (or 0 to 1 in floating point), the path of a file in a
                common format of pixels (PNG, JPEG, WebP, AVIF, GIF, TIFF, BMP, ...), or its bytes.

        Returns:
            [`BatchFeature`]: `pixel_values` of shape `(tiles, 3, height, width)`, and `num_tiles`, a list of one
            number for each image.

        Raises:
            ValueError: an image that cannot be read, is too large, or has a mode that no tower was trained on.
        """
        if kwargs:
            raise ValueError(f"{sorted(kwargs)}: set them on the image processor, they hold for all images.")
        images = images if isinstance(images, (list, tuple)) else [images]
        tiles = [self._tiles(self._opened(image, index)) for index, image in enumerate(images)]
        pixels = [self._pixels(tile) for group in tiles for tile in group]
        if not pixels:
            raise ValueError("no image was given: leave images out, or give at least one.")
        data = {"pixel_values": np.stack(pixels)}
        features = BatchFeature(data=data, tensor_type=return_tensors)
        features["num_tiles"] = [len(group) for group in tiles]
        return features

    def _opened(self, image, index):
        """An image in RGB, as it is meant to be seen."""
        if isinstance(image, (str, os.PathLike, bytes)):
            what = f"image {index}" if isinstance(image, bytes) else f"{os.fspath(image)!r}"
            try:
                Image.init()
                # Here a bomb would be an error of Pillow's before it is one of ours.
                image = Image.open(
                    io.BytesIO(image) if isinstance(image, bytes) else image,
                    formats=[name for name in _FORMATS if name in Image.OPEN],
                )
            except UnidentifiedImageError as error:
                raise ValueError(
                    f"{what} is no image that can be read: its format is none of {', '.join(_FORMATS)}"
                ) from error
            except MemoryError:
                raise
            except Exception as error:  # of whatever the decoder of a format raises
                raise ValueError(f"{what} is no image that can be read: {str(error)[:_SHOWN]}") from error
        else:
            what = f"image {index}"
            if not isinstance(image, Image.Image):
                image = _from_array(image, what)
        width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(
                f"{what} has {width} x {height} pixels, more than max_pixels={self.max_pixels}: make it smaller, or "
                "raise max_pixels of the image processor if you trust it."
            )
        if min(width, height) < 1:
            raise ValueError(f"{what} has {width} x {height} pixels: expected at least one.")
        if image.mode not in _MODES:
            raise ValueError(
                f"{what} has the mode {image.mode!r}: expected one of {', '.join(_MODES)}; what its numbers mean as "
                "colours has to be decided before, for example with image.convert('RGB')."
            )
        try:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # decoded here for the first time
            raise ValueError(f"{what} is no image that can be read: {str(error)[:_SHOWN]}") from error

    def _tiles(self, image):
        height, width = self.size["height"], self.size["width"]
        across, down = _grid(image.width / width, image.height / height, self.max_tiles)
        whole = self._fitted(image, width, height)
        if across * down == 1:
            return [whole]
        large = self._fitted(image, across * width, down * height)
        boxes = [
            (column * width, row * height, (column + 1) * width, (row + 1) * height)
            for row in range(down)
            for column in range(across)
        ]
        return [whole, *(large.crop(box) for box in boxes)]

    def _fitted(self, image, width, height):
        if image.size == (width, height):
            return image
        ground = tuple(round(255 * value) for value in self.image_mean)
        scale = min(width / image.width, height / image.height)
        fitted = (max(1, min(width, round(image.width * scale))), max(1, min(height, round(image.height * scale))))
        canvas = Image.new("RGB", (width, height), ground)
        place = ((width - fitted[0]) // 2, (height - fitted[1]) // 2)
        canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), place)
        return canvas

    def _pixels(self, image):
        values = np.asarray(image, dtype=np.float32) / 255
        values = (values - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


class RopeEncDecVisionProcessor(ProcessorMixin):
    """Tokenizer and image processor as one: `processor(images=..., text=...)`.

    In a text `image_token` stands where an image is to be seen, once for each; it is written out as often as the image
    has tokens.

    Args:
        image_processor ([`RopeEncDecImageProcessor`]): Size and colours.
        tokenizer ([`PreTrainedTokenizerFast`]): The student's.
        patch_size (`int`): Of the vision tower.
        pixel_shuffle (`int`, defaults to 1): `projector_pixel_shuffle` of the student.
        image_token (`str`, defaults to `"<image>"`): One token of the tokenizer.

    Raises:
        ValueError: the tokenizer does not know the image token, or the size of the images does not divide into tokens.
    """

    attributes = ["image_processor", "tokenizer"]
    # transformers 4.57 asks for these, 5.x warns where they stand. Goes when 4.57 is dropped.
    if "attributes" in ProcessorMixin.__dict__:
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=14,
        pixel_shuffle=1,
        chat_template=None,
        image_token="<image>",
        **kwargs,
    ):
        self.patch_size, self.pixel_shuffle, self.image_token = patch_size, pixel_shuffle, image_token
        ids = tokenizer(image_token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"image_token={image_token!r} is {len(ids)} tokens of this tokenizer, or unknown to it: give one that "
                "it knows as one, or add it with tokenizer.add_special_tokens({'additional_special_tokens': [...]})."
            )
        self.image_token_id = ids[0]
        side = patch_size * pixel_shuffle
        height, width = image_processor.size["height"], image_processor.size["width"]
        if height % side or width % side:
            raise ValueError(
                f"size={image_processor.size}: a token is made of {side} x {side} pixels (patch_size={patch_size}, "
                f"pixel_shuffle={pixel_shuffle}); give multiples of {side}."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def tokens_of_tile(self):
        side = self.patch_size * self.pixel_shuffle
        return (self.image_processor.size["height"] // side) * (self.image_processor.size["width"] // side)

    @classmethod
    def for_model(cls, model, tokenizer=None, size=None, max_tiles=1, image_token="<image>"):
        """The processor of a student.

        Args:
            model ([`RopeEncDecForImageTextToText`]): Its vision tower says which colours and, by default, which size.
            tokenizer (*optional*): By default the one that the model carries.
            size (`int` or `tuple`, *optional*): Height and width in pixels.
            max_tiles, image_token: see the classes.

        Raises:
            ValueError: there is no tokenizer, or the image token is another one than the model's.
        """
        config, tokenizer = model.config, tokenizer or model.tokenizer
        if tokenizer is None:
            raise ValueError("the student carries no tokenizer, as one that was loaded: give it as tokenizer=.")
        mean, std = _COLOURS[config.vision_config.model_type]
        size = config.vision_config.image_size if size is None else size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        images = RopeEncDecImageProcessor(
            size={"height": height, "width": width}, image_mean=mean, image_std=std, max_tiles=max_tiles
        )
        processor = cls(
            images,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            pixel_shuffle=config.projector_pixel_shuffle,
            image_token=image_token,
        )
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"image_token={image_token!r} is token {processor.image_token_id} of this tokenizer, and the student "
                f"reads images at token {config.image_token_id}: give the tokenizer that it was made with."
            )
        return processor

    def __call__(self, images=None, text=None, return_tensors=None, **kwargs):
        """
        Args:
            images: one image, a list of them, in the order of their tokens through all texts, or a list of lists, one
                for each text. What an image may be, see [`RopeEncDecImageProcessor`].
            text (`str` or `list` of `str`): With `image_token` once for each image.
            kwargs: for the tokenizer; also as `text_kwargs` and `common_kwargs`. What is done with images is set on
                the image processor.

        Returns:
            [`BatchFeature`]: `input_ids`, `attention_mask` and, where there are images, `pixel_values`.

        Raises:
            ValueError: there are not as many images as image tokens, for a text or in all, a limit of length would cut
                image tokens, an image cannot be read, or an option is for images.
        """
        if text is None:
            raise ValueError("text is missing: a prompt that says where the images stand.")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"text={text!r}: expected a string or a list of strings.")
        for name in ("videos", "audio"):  # which transformers' `apply_chat_template` hands over for each model
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: this student reads texts and images.")
        options = {"return_token_type_ids": False, **kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {})}
        of_images = {**kwargs.pop("images_kwargs", {})}
        of_images |= {name: kwargs.pop(name) for name in list(kwargs) if name in _OF_IMAGES or name.startswith("do_")}
        options |= kwargs
        given = options.pop("return_tensors", None)
        return_tensors = given if return_tensors is None else return_tensors
        images = self._one_by_one(images, texts)
        tiles, data = [], {}
        if images or of_images:
            features = self.image_processor(images, **of_images)
            data["pixel_values"], tiles = features["pixel_values"], features["num_tiles"]
        expected, written, left = [], [], iter(tiles)
        for one in texts:
            first, *others = one.split(self.image_token)
            counts = [self.tokens_of_tile * next(left) for _ in others]
            expected.append(sum(counts))
            parts = (self.image_token * count + other for count, other in zip(counts, others))
            written.append(first + "".join(parts))
        encoded = self.tokenizer(written, **options)
        for ids, count in zip(encoded["input_ids"], expected):
            found = sum(token == self.image_token_id for token in ids)
            if found != count:
                raise ValueError(
                    f"{found} image tokens are left of {count}: a limit of {len(ids)} tokens has cut them. Raise "
                    "max_length, leave truncation out, or make fewer tokens of an image (pixel_shuffle, max_tiles)."
                )
        return BatchFeature(data={**encoded, **data}, tensor_type=return_tensors)

    def _one_by_one(self, images, texts):
        """All images in the order of their tokens."""
        counts = [text.count(self.image_token) for text in texts]
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        if images and all(isinstance(group, (list, tuple)) for group in images):
            found = [len(group) for group in images]
            if found != counts:
                raise ValueError(f"{found} images for {counts} times {self.image_token!r} in the texts.")
            return [image for group in images for image in group]
        if len(images) != sum(counts):
            raise ValueError(
                f"{len(images)} images for {sum(counts)} times {self.image_token!r} in {len(texts)} texts: write it "
                "where each image stands."
            )
        return list(images)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """A chat as text; with `tokenize=True` and `return_dict=True`, what the student reads.

        The template is the given one, the processor's or the tokenizer's. For one that knows no images `image_token`
        stands in a message's text. Without any, the text of a message of the user is all: a student answers a text
        and holds no conversation, and its tokenizer has the prompt built in.

        Args:
            conversation (`list[dict]`, or a list of these): Messages. The content of each is a text, or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, where `url`, `path` and
                `base64` are other keys for the image. An address on the web is fetched, as transformers does it.
            chat_template, kwargs: as in `ProcessorMixin.apply_chat_template`.

        Raises:
            ValueError: without a chat template, there is more than one message of the user; or what `__call__`
                refuses.
        """
        template = chat_template or self.chat_template or self.tokenizer.chat_template or _CONTENT_ALONE
        named = next((own for own in (self.chat_template, self.tokenizer.chat_template) if isinstance(own, dict)), {})
        if isinstance(template, dict) or template in named:
            template = named.get(chat_template or "default")
            if template is None:
                raise ValueError(f"there is no default among the chat templates {', '.join(named)}: name one.")
        is_batch = isinstance(conversation[0], (list, tuple))
        chats = [
            [{**message, "content": _parts(message["content"], kwargs.get("tokenize"))} for message in chat]
            for chat in (conversation if is_batch else [conversation])
        ]
        if template == _CONTENT_ALONE:
            for chat in chats:
                if [message["role"] for message in chat] != ["user"] or kwargs.get("continue_final_message"):
                    raise ValueError(
                        f"a chat of {len(chat)} messages, roles {[message['role'] for message in chat]}: without a "
                        "chat template the student answers one message of the user, and its prompt is built into its "
                        "tokenizer. Set processor.chat_template if it was trained on chats."
                    )
        if "image" not in template:
            template = _PARTS_TO_TEXT.replace("IMAGE_TOKEN", repr(self.image_token)) + template
        return super().apply_chat_template(chats if is_batch else chats[0], chat_template=template, **kwargs)

    @property
    def model_input_names(self):
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def to_json_file(self, json_file_path, **kwargs):
        super().to_json_file(json_file_path, **kwargs)
        # Written here, since `save_pretrained` has pushed all files to the Hub when it returns.
        _write_for_4_57(self, os.path.dirname(json_file_path) or os.curdir)


def _write_for_4_57(processor, folder):
    """What transformers 4.57 reads in a folder that 5.x wrote. Goes when 4.57 is dropped."""
    # 5.x has the image processor in processor_config.json alone.
    processor.image_processor.save_pretrained(folder)
    # The class that `AutoTokenizer` of 5.x gives; it reads the older name too.
    path, config = os.path.join(folder, "tokenizer_config.json"), {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            json.dump({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, file, indent=2, ensure_ascii=False)
        os.replace(f"{path}.partial", path)


def _parts(content, loaded):
    """The content of a message as parts, each image under one key; read from where it is, if `loaded`."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = []
    for part in content:
        given = [part[key] for key in _IMAGE_KEYS if key in part] if part["type"] == "image" else []
        if given and loaded:
            image = given[0]
            if isinstance(image, str) and not os.path.isfile(image):
                image = load_image(image)  # an address or base64
            part = {"type": "image", "image": image}
        parts.append(part)
    return parts


def _from_array(image, what):
    if hasattr(image, "numpy"):
        image_of_numpy = image.float() if image.is_floating_point() else image  # bfloat16 is unknown to it
        values = image_of_numpy.numpy(force=True)
    else:
        values = np.asarray(image)
    if values.ndim == 3 and values.shape[0] in (3, 4) and values.shape[2] not in (3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(
            f"{what} is a {type(image).__name__} of shape {values.shape}: expected an image, (H, W), (H, W, 3 or 4) "
            "or (3 or 4, H, W)."
        )
    if values.dtype == bool:
        values = values * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise ValueError(f"{what} is an array of {values.dtype}: expected whole numbers, or floating point.")
    if values.dtype.kind == "f":
        if values.size and (not np.isfinite(values).all() or values.min() < 0 or values.max() > 1):
            raise ValueError(
                f"{what} has values from {values.min():.3g} to {values.max():.3g}: expected 0 to 1 in floating point, "
                "or 0 to 255 as whole numbers; not pixels that are normalised already."
            )
        values = np.round(values * 255)
    elif values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"{what} has values from {values.min()} to {values.max()}: expected 0 to 255.")
    return Image.fromarray(values.astype(np.uint8))


def _grid(wide, high, most):
    """Tiles across and down: those whose shape is nearest to the image's, of those the most that do not enlarge it."""
    fits = [
        (across, down)
        for across in range(1, most + 1)
        for down in range(1, most // across + 1)
        if across * down == 1 or (across <= np.ceil(wide) and down <= np.ceil(high))
    ]

    def shown(grid):  # the share of the tiles that the image covers, once it is fitted into them, and its pixels
        scale = min(grid[0] / wide, grid[1] / high)
        return min(scale, 1.0), wide * high * scale * scale / (grid[0] * grid[1])

    return max(fits, key=lambda grid: (*shown(grid), -grid[0] * grid[1]))


__all__ = ["RopeEncDecImageProcessor", "RopeEncDecVisionProcessor"]
