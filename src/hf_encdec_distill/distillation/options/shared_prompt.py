"""One prompt pass for teacher and student, where a frozen encoder is the teacher's own first layers.

The causal encoder of a `merged` student computes of a prompt, state by state, what the teacher computes on its way up,
as long as its weights are the teacher's and it holds all of the teacher's layers up to its depth. The teacher's
forward, prompt and target in one, then brings the states that the student's decoder reads, and the encoder rests.

Exact up to the rounding of sums. Not shared are the teacher's layers above: its target tokens need the prompt's keys
and values of each.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...models.families import RULED_BY_LENGTH, is_merged
from ...models.rope_encdec.teacher_layers import encoder_is_first_layers_of


class SharedPrompt:
    """What a student's encoder would say, from the teacher's forward.

    Args:
        teacher: a causal language model; None where nothing can be shared.
    """

    def __init__(self, teacher: PreTrainedModel | None):
        self._teacher = teacher
        self.forget()

    def forget(self) -> None:
        """Weights or layers of the student have changed: whether it can share is found out again."""
        self._exact: bool | None = None
        self._states: dict[int, Tensor] = {}
        self._mask: Tensor | None = None

    def is_exact_for(self, student: PreTrainedModel) -> bool:
        """Whether a student's frozen, causal encoder is the teacher's first layers, weight by weight, without dropout.

        Weights are compared once, until `forget`.
        """
        if self._exact is None:
            teacher = self._teacher
            self._exact = teacher is not None and self._is_exact(student, teacher)
            if teacher is not None and self._exact:
                self._encoder = student.get_encoder()
                decoder: Any = teacher.model  # of one of the supported families, which have no class in common
                blocks = [*decoder.layers, decoder.norm]
                # State i enters block i; state 0, the embedded tokens, shows whether both read the same prompt.
                self._blocks = {index: blocks[index] for index in (0, *self._encoder.states_read)}
        return self._exact

    @staticmethod
    def _is_exact(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
        config = student.config
        return (
            is_merged(config)
            and config.encoder_attention == "causal"
            # Whose frequencies depend on the length that is read: the teacher reads the target too.
            and config.rope_parameters.get("rope_type") not in RULED_BY_LENGTH
            and not config.attention_dropout
            and not any(parameter.requires_grad for parameter in student.get_encoder().parameters())
            and encoder_is_first_layers_of(student, teacher)
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keeps what the teacher computes while the block runs, for a student that `is_exact_for` was asked about."""
        self._states, self._mask = {}, None

        def note_mask(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
            self._mask = kwargs["attention_mask"]

        def note_state(index: int):
            def note(_module: nn.Module, args: tuple) -> None:
                self._states[index] = args[0]

            return note

        handles = [block.register_forward_pre_hook(note_state(index)) for index, block in self._blocks.items()]
        if self._teacher is not None:
            handles.append(self._teacher.register_forward_pre_hook(note_mask, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def encoder_outputs(self, student_inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`encoder_outputs` for the student's forward on a batch that the teacher has just read; handed out once.

        Empty where the teacher did not run, or read other prompts than the student: the encoder then has to.
        """
        states, teacher_mask, self._states, self._mask = self._states, self._mask, {}, None
        input_ids = student_inputs.get("input_ids")
        if student_inputs.get("pixel_values") is not None:  # not to be told from placeholders in the teacher's prompt
            return {}
        if not states or teacher_mask is None or input_ids is None or student_inputs.get("position_ids") is not None:
            return {}
        mask = student_inputs.get("attention_mask")
        mask = torch.ones_like(input_ids).bool() if mask is None else mask.bool()
        # The n-th token that the student reads is the n-th that the teacher reads, wherever either is padded.
        real_first = (~teacher_mask.bool()).int().argsort(dim=1, stable=True).to(input_ids.device)
        nth = (mask.long().cumsum(dim=1) - 1).clamp(min=0, max=real_first.shape[1] - 1)
        columns = real_first.gather(1, nth).unsqueeze(-1)
        states = {index: state.to(input_ids.device).take_along_dim(columns, dim=1) for index, state in states.items()}
        if not torch.equal(states[0][mask], self._encoder.embed_tokens(input_ids)[mask]):
            return {}
        read = torch.cat([states[index] for index in self._encoder.states_read], dim=-1)
        return {"encoder_outputs": (states[max(states)], read)}
