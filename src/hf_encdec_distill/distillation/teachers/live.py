"""The teacher as a model that runs here."""

import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ...models.either_version import check_rope_is_read
from ...models.loading import load_teacher
from ...models.whole_weights import whole_on_each_process
from ..alignment.positions import IMAGES_DIGEST, OF_TEACHER
from ..alignment.vocabularies import SharedVocabulary, vocab_size
from ..checks.limits import check_length, max_positions
from .lm_head import catch_head_input
from .signal import DenseScores, TeacherSignal


if TYPE_CHECKING:
    # A `PreTrainedModel` that is a `GenerationMixin` too.
    from transformers.models.auto.modeling_auto import _BaseModelWithGenerate as GenerativeModel

# What the forward of a language model takes, with or without eyes: all else is about what it sees.
_OF_ANY_TEACHER = {
    *("input_ids", "attention_mask", "position_ids", "cache_position", "inputs_embeds", "labels", "logits_to_keep"),
    *("past_key_values", "cache", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "kwargs"),
}


class LiveTeacher(TeacherSignal):
    """A causal language model, perhaps one that sees, that answers batch by batch: frozen, in eval mode, in a dtype of
    its own.

    It is no `nn.Module`, so nothing that walks, wraps or saves the student ever meets it.

    Args:
        model: a decoder-only model with an output embedding, such as `AutoModelForCausalLM` or, if it sees,
            `AutoModelForImageTextToText` loads. It is frozen and set to eval mode in place.
        dtype: "float32", "bfloat16" or "float16" casts it in place; None or "auto" leaves it as it is.

    Raises:
        ValueError: the model is an encoder-decoder, has no output embedding, or was saved by a version of
            transformers whose RoPE this one does not read.
    """

    def __init__(self, model: "PreTrainedModel | nn.Module", dtype: str | None = None):
        # What is no `PreTrainedModel` is a wrapper, such as PEFT's, that passes on what it is asked.
        lm = cast("GenerativeModel", model)
        config = lm.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"the teacher is an encoder-decoder ({config.model_type}); it has to be a decoder-only model, one "
                "that AutoModelForCausalLM loads."
            )
        check_rope_is_read(config)
        if lm.get_output_embeddings() is None:
            raise ValueError(
                f"the teacher {type(model).__name__} has no language-model head; load it with AutoModelForCausalLM."
            )
        if dtype not in (None, "auto"):
            lm = lm.to(getattr(torch, dtype))
        self.model = lm.requires_grad_(False).eval()
        self.vocab_size = vocab_size(config)
        self.max_positions = max_positions(config)
        base = getattr(lm, "get_base_model", None)  # of PEFT's
        inner = lm if base is None else base()
        self._accepts = set(inspect.signature(inner.forward).parameters)
        sees = "pixel_values" in self._accepts
        self.input_names = tuple(sorted(self._accepts - _OF_ANY_TEACHER)) if sees else ()
        if sees:  # not all of them name it, but hand it on to their language model
            self._accepts.add("use_cache")
        self._has_mrope = any(hasattr(module, "get_rope_index") for module in inner.modules())
        self._head_is_last = True  # until a forward shows that the model does something to its head's output

    @classmethod
    @whole_on_each_process()
    def load(
        cls, teacher: "nn.Module | str | os.PathLike", dtype: str | None = None, quantization: str | None = None
    ) -> "LiveTeacher":
        """From a loaded model, a folder or a Hub id; code from a repository is never run.

        Args:
            teacher: a folder may hold a PEFT adapter, whose base model is then loaded too.
            dtype: see the class; for a folder or Hub id None is the dtype of the checkpoint.
            quantization: "8bit" or "4bit", with bitsandbytes; of a folder or Hub id.

        Raises:
            OSError: there is no such folder, and no such model on the Hub.
            ValueError: it is none of these, or cannot be loaded; see `models.loading`.
            ImportError: bitsandbytes is missing.
        """
        if isinstance(teacher, nn.Module):
            if quantization is not None:
                raise ValueError(
                    f"teacher_quantization={quantization!r}, but the teacher is loaded already: give its folder or "
                    "Hub id, or load it with a quantization_config."
                )
            return cls(teacher, dtype)
        if not isinstance(teacher, str | os.PathLike):
            raise ValueError(
                f"teacher={teacher!r} is a {type(teacher).__name__}; give a loaded causal language model, a folder or "
                "a Hub id."
            )
        options = {} if quantization is None else {"quantization_config": _bitsandbytes(quantization, dtype)}
        return cls(load_teacher(teacher, dtype=dtype or "auto", **options))

    def to(self, device: torch.device) -> "LiveTeacher":
        # A model spread over devices by accelerate, or quantised, stays where it was loaded.
        if getattr(self.model, "hf_device_map", None) is None and not getattr(self.model, "is_quantized", False):
            self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where it takes its inputs."""
        return self.model.get_input_embeddings().weight.device

    def check(
        self, prompt_template: str | None, divergence: str, temperature: float, prompt_date: str | None = None
    ) -> None:
        """A model can be asked for anything."""

    def scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        vocabulary: SharedVocabulary,
        chunked: bool = False,
        images: Mapping[str, Tensor] | None = None,
    ) -> DenseScores:
        """See `TeacherSignal`."""
        return DenseScores(self.logits_at(input_ids, attention_mask, rows, columns, chunked, images), vocabulary)

    @torch.no_grad()
    def logits_at(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        chunked: bool = False,
        images: Mapping[str, Tensor] | None = None,
    ) -> Callable[[slice], Tensor]:
        """Runs the model once; its logits are made at the asked positions only, `[B, L, V]` never is.

        Args:
            input_ids, attention_mask: `[B, L]`; padding may be on either side.
            rows, columns: `[N]` each, the positions whose next-token logits are wanted.
            chunked: keep hidden states and make logits when a slice is asked for, so that `[N, V]` is never made
                either. A model that scales, caps or shifts what its head gives makes all N at once in any case.
            images: from `positions.teacher_images`; those of all rows, one after another.

        Returns:
            A slice of the N positions -> `[C, V]`, in the teacher's dtype.

        Raises:
            ValueError: a row has more tokens than the model has positions for, image tokens come without images, or
                the model reads no images or none of this form.
        """
        check_length("teacher", self.max_positions, "prompt and target", attention_mask)
        self.model.eval()
        head = self.model.get_output_embeddings()
        options = {
            # Left padding moves the first token away from column 0; models count columns unless they are told.
            "position_ids": (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0).to(self.device),
            "use_cache": False,
            "return_dict": True,
        }
        options = {name: value for name, value in options.items() if name in self._accepts}
        seen = self._seen(input_ids, images or {})
        if seen and self._has_mrope:  # it counts an image's tokens along rows and columns, and pads as above
            del options["position_ids"]
        chunked = chunked and self._head_is_last
        with catch_head_input(head, rows, columns, keep=1 if chunked else None) as caught:
            try:
                output = self.model(
                    input_ids=input_ids.to(self.device),
                    attention_mask=attention_mask.to(self.device),
                    **options,
                    **seen,
                )
            except ValueError as error:
                if not seen:
                    raise
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in seen.items())
                raise ValueError(
                    f"the teacher {type(self.model).__name__} does not read what it is given of a batch to see "
                    f"({shapes}): {error}. In teacher_<name> give each row what the teacher's processor makes of that "
                    "row alone, nothing taken off."
                ) from error
        if chunked:
            hidden = caught.hidden
            self._head_is_last = caught.is_all_of(output.logits)
            if hidden is None or not self._head_is_last:
                return self.logits_at(input_ids, attention_mask, rows, columns, images=images)
            return torch.no_grad()(lambda chunk: head(hidden[chunk]).to(input_ids.device))
        # A model that multiplies by the head's weight without calling it gives logits everywhere.
        logits = output.logits[0] if caught.hidden is not None else output.logits[rows, columns]
        logits = logits.to(input_ids.device)
        return lambda chunk: logits[chunk]

    def _seen(self, input_ids: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the forward is given beside tokens, where and in the dtype in which the model computes."""
        given = {name: value for name, value in images.items() if name != IMAGES_DIGEST}
        unknown = [name for name in given if name not in self.input_names]
        if unknown:
            raise ValueError(
                f"the teacher {type(self.model).__name__} reads no {unknown[0]}, which the batch has for it: "
                f"{OF_TEACHER}{unknown[0]}, or the student's where rows have no teacher_input_ids. Give a teacher "
                "that sees (AutoModelForImageTextToText), or leave that column out and say in teacher_input_ids, in "
                "words, what there is to see."
            )
        if not self.input_names:
            return {}
        types = torch.zeros_like(input_ids)
        for number, kind in enumerate(("image", "video"), start=1):
            token = getattr(self.model.config, f"{kind}_token_id", None)
            if token is not None:
                types = types.masked_fill(input_ids == token, number)
        if not given:
            if types.any():
                raise ValueError(
                    f"teacher_input_ids have image tokens, but the batch has no images for the teacher "
                    f"{type(self.model).__name__}: give teacher_pixel_values, and whatever else its processor makes."
                )
            return {}
        if "mm_token_type_ids" in self.input_names:  # as ProcessorMixin.create_mm_token_type_ids of transformers 5
            given["mm_token_type_ids"] = types
        return {
            name: value.to(self.device, self.model.dtype if "pixel_values" in name else None)
            for name, value in given.items()
        }


def _bitsandbytes(quantization: str, dtype: str | None) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f'teacher_quantization={quantization!r} needs bitsandbytes: pip install "hf-encdec-distill[quantization]"'
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    computing = torch.bfloat16 if dtype in (None, "auto") else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computing)
