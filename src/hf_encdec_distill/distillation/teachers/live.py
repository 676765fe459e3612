"""Where the teacher's distribution comes from."""

import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ...models.either_version import check_rope_is_read
from ...models.loading import load_teacher
from ...models.whole_weights import whole_on_each_process
from ..alignment.vocabularies import SharedVocabulary, vocab_size
from ..checks.limits import check_length, max_positions
from .lm_head import catch_head_input
from .signal import DenseScores, TeacherSignal


if TYPE_CHECKING:
    # A `PreTrainedModel` that is a `GenerationMixin` too.
    from transformers.models.auto.modeling_auto import _BaseModelWithGenerate as GenerativeModel


class LiveTeacher(TeacherSignal):
    """A causal language model that answers batch by batch: frozen, in eval mode, in a dtype of its own.

    It is no `nn.Module`, so nothing that walks, wraps or saves the student ever meets it.

    Args:
        model: a decoder-only model with an output embedding. It is frozen and set to eval mode in place.
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
        self._accepts = inspect.signature(inner.forward).parameters
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
    ) -> DenseScores:
        """See `TeacherSignal`."""
        return DenseScores(self.logits_at(input_ids, attention_mask, rows, columns, chunked), vocabulary)

    @torch.no_grad()
    def logits_at(
        self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor, chunked: bool = False
    ) -> Callable[[slice], Tensor]:
        """Runs the model once; its logits are made at the asked positions only, `[B, L, V]` never is.

        Args:
            input_ids, attention_mask: `[B, L]`; padding may be on either side.
            rows, columns: `[N]` each, the positions whose next-token logits are wanted.
            chunked: keep hidden states and make logits when a slice is asked for, so that `[N, V]` is never made
                either. A model that scales, caps or shifts what its head gives makes all N at once in any case.

        Returns:
            A slice of the N positions -> `[C, V]`, in the teacher's dtype.

        Raises:
            ValueError: a row has more tokens than the model has positions for.
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
        chunked = chunked and self._head_is_last
        with catch_head_input(head, rows, columns, keep=1 if chunked else None) as caught:
            output = self.model(
                input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), **options
            )
        if chunked:
            hidden = caught.hidden
            self._head_is_last = caught.is_all_of(output.logits)
            if hidden is None or not self._head_is_last:
                return self.logits_at(input_ids, attention_mask, rows, columns)
            return torch.no_grad()(lambda chunk: head(hidden[chunk]).to(input_ids.device))
        # A model that multiplies by the head's weight without calling it gives logits everywhere.
        logits = output.logits[0] if caught.hidden is not None else output.logits[rows, columns]
        logits = logits.to(input_ids.device)
        return lambda chunk: logits[chunk]


def _bitsandbytes(quantization: str, dtype: str | None) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f'teacher_quantization={quantization!r} needs bitsandbytes: pip install "hf-encdec-distill[quantization]"'
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    computing = torch.bfloat16 if dtype in (None, "auto") else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computing)
