"""The loss of a batch whose logits at the targets are made a few at a time (`losses.chunked_sum`)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn

from ..losses import chunked_sum
from ..teachers.lm_head import HeadInput, catch_head_input


def logits_of(outputs: Any) -> Tensor:
    """Those in what a model's forward gave, by their name or, in a tuple, in front."""
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


class ChunkedLogits:
    """Whether a student's logits are a plain linear function of what its head is given, and the loss if they are."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self.head_is_last: bool | None = None  # not known yet

    def fit(self, model: nn.Module, student: Mapping[str, Any], tokens: int, return_outputs: bool) -> bool:
        """Whether the batch's logits are made so: `tokens` targets are enough for it to save memory."""
        trainer = self._trainer
        # Below four chunks, their gradient of the head in float32 is as large as what they save.
        few = tokens <= 4 * trainer.args.loss_chunk_size
        # With FSDP2 all processes have to find out in the same step, whatever each has been dealt.
        if (few and not trainer.is_fsdp2) or return_outputs or "labels" in student:
            return False
        # The old FSDP and DeepSpeed keep no head by itself; a compiled model was traced without our hooks.
        if (trainer.is_sharded and not trainer.is_fsdp2) or trainer.args.n_gpu > 1 or is_compiled_module(model):
            return False
        if self.head_is_last is None:
            self.head_is_last = self._find_out(model, student)
        return self.head_is_last and not few

    @torch.no_grad()
    def _find_out(self, model: nn.Module, student: Mapping[str, Any]) -> bool:
        # Unwrapped: DistributedDataParallel would talk to processes that may have nothing to find out yet.
        unwrapped = self._trainer.accelerator.unwrap_model(model)
        head = unwrapped.get_output_embeddings()
        if type(head).forward is not nn.Linear.forward:  # FSDP2 makes a class of its own of nn.Linear
            return False
        devices = [head.weight.device] if head.weight.device.type == "cuda" else []
        zero = torch.zeros(1, dtype=torch.long, device=head.weight.device)
        # One forward more, once; dropout must not draw other numbers because of it, or a resumed run would differ.
        with torch.random.fork_rng(devices), catch_head_input(head, zero, zero) as caught:
            outputs = unwrapped(**student)
        return caught.is_all_of(logits_of(outputs))

    def total(
        self,
        model: nn.Module,
        student: Mapping[str, Any],
        rows: Tensor,
        columns: Tensor,
        score: Callable,
        weights: Mapping[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the terms that `score` gives over all targets, at `rows` and `columns`, with a gradient;
        and the terms, `[N]` each, without."""
        head = self._trainer.accelerator.unwrap_model(model).get_output_embeddings()
        results: list[tuple[Tensor, Tensor]] = []

        def take(caught: HeadInput) -> None:
            assert caught.hidden is not None and caught.logits is not None, "the head was called"
            results.append(
                chunked_sum(
                    lambda student_CV, chunk: torch.stack(list(score(student_CV, chunk).values())),
                    caught.hidden.to(caught.logits.dtype),  # what autocast made of them for the head
                    head.weight,
                    head.bias,
                    chunk_size=self._trainer.args.loss_chunk_size,
                    term_weights=tuple(weights.values()),
                )
            )

        with catch_head_input(head, rows, columns, keep=1, then=take):
            outputs = model(**student)
        ((loss, terms),) = results
        if self._trainer.is_fsdp2:  # it prepares for a backward where a gradient reaches the outputs
            loss = loss + 0.0 * logits_of(outputs).sum()
        return loss, dict(zip(weights, terms, strict=True))
