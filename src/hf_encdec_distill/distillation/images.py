"""Images in rows of a data set, and in a batch of them.

The processors of transformers make of a batch what they make of each row alone, one after another along the first
dimension. A row has as many there as it has images (LLaVA), or patches of them (Qwen2-VL), or one (Idefics3,
SmolVLM): then its images are along the second, as the tiles of an image are (LLaVA-NeXT). What other rows have more of
is filled up with zeros, which these models leave out (`Idefics3Model.get_image_features`, `image_sizes`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainingArguments


_ALONE = {"pixel_values": 3, "token_type_ids": 1}  # dimensions of one image, and of one row's tokens


def images_of(row: Mapping[str, Any], *names: str) -> dict[str, Tensor]:
    """Those columns of a row that are there and not empty; floating-point numbers in float32, integers in int64.

    One image alone, `(3, H, W)`, becomes `(1, 3, H, W)`.

    Raises:
        ValueError: a column is not an array of numbers.
    """
    images = {}
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        try:
            if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
                value = torch.stack(list(value))
            image = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name} of a row is not an array of numbers ({error}): give it as a processor does."
            ) from error
        if image.dtype != torch.bool:
            image = image.float() if image.is_floating_point() else image.long()
        if image.dim() == _ALONE.get(name.removeprefix("teacher_")):
            image = image[None]
        if image.numel():
            images[name] = image
    return images


def one_after_another(rows: Sequence[Mapping[str, Tensor]], width: int = 0) -> dict[str, Tensor]:
    """Images of each row, from `images_of` -> of a batch.

    Args:
        rows: one without images lacks the names that others have.
        width: of the tokens, which `token_type_ids` describe one by one.

    Raises:
        ValueError: rows differ in dimensions, in the size of pixels with nothing beside them that says where an image
            ends, or in having `token_type_ids`.
    """
    batch = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        images = [row[name] for row in rows if name in row]
        shapes = [tuple(image.shape) for image in images]
        sizes = {shape[-2:] for shape in shapes} if name.endswith("pixel_values") and len(shapes[0]) > 3 else set()
        if len({len(shape) for shape in shapes}) > 1 or (len(sizes) > 1 and all(len(row) < 2 for row in rows)):
            raise ValueError(
                f"{name} in a batch have the shapes {', '.join(map(str, shapes))}: give each row what the same "
                "processor makes of it, images of one size."
            )
        longest = [max(lengths) for lengths in zip(*(shape[1:] for shape in shapes), strict=True)]
        if name.endswith("token_type_ids"):
            if len(images) < len(rows) or longest[0] > width:
                raise ValueError(
                    f"{len(images)} of {len(rows)} rows have {name}, up to {longest[0]} of them for up to {width} "
                    "tokens: give them for the prompt of each row."
                )
            longest = [width]
        filled = [image.new_zeros(len(image), *longest) for image in images]
        for there, image in zip(filled, images, strict=True):
            corner = (slice(None), *map(slice, image.shape[1:]))
            there[corner] = image
        batch[name] = torch.cat(filled)
    return batch


def refuse_images_of_text(row: Mapping[str, Any], image_token: str | None = None) -> None:
    """Raises ValueError where a row of texts has images, or what stands for one in the student's."""
    images = [name for name in row if "pixel_values" in name and row[name] is not None]
    if image_token is not None:
        texts = {name: str(value) for name, value in row.items() if isinstance(value, str | list)}
        images += [f"{image_token!r} in its {name}" for name, text in texts.items() if image_token in text]
    if images:
        raise ValueError(
            f"a row has {images[0]} and no input_ids: nothing says where in its text the image stands. Make such rows "
            "with the processors of student and teacher: input_ids, labels, teacher_input_ids, and all that they make "
            "of images."
        )


def read_streams_in_each_process(args: TrainingArguments, accelerator: Accelerator) -> None:
    """accelerate reads a stream in one process, by default, and hands out its batches in slices of as many as there
    are rows, by which it cuts off images of rows that have several.

    Raises:
        ValueError: that was asked for.
    """
    config: Any = args.accelerator_config
    if config.dispatch_batches:
        raise ValueError(
            "accelerator_config has dispatch_batches, which cuts batches up by their rows, and of images a row may "
            "have several or none: leave it out."
        )
    config.dispatch_batches = accelerator.dataloader_config.dispatch_batches = False


def let_processes_have_no_image(args: TrainingArguments, accelerator: Accelerator) -> None:
    """For gradient checkpointing, with which `Trainer` lets DistributedDataParallel look for no unused parameters.

    A batch of texts alone gives the vision tower no gradient. If others have images, they would wait for it for ever.
    """
    given: Any = args.gradient_checkpointing_kwargs  # a string only until `TrainingArguments` has read it
    options = {"use_reentrant": False, **(given or {})}
    if args.ddp_find_unused_parameters is None and not options["use_reentrant"]:  # the two exclude each other
        args.gradient_checkpointing_kwargs, args.ddp_find_unused_parameters = options, True
        if accelerator.ddp_handler is not None:  # transformers 4.57 makes it later, from the arguments
            accelerator.ddp_handler.find_unused_parameters = True
