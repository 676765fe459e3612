"""What a frozen encoder says of each row, computed once and kept on disk.

A folder has a subfolder for each encoder, named by a hash of its weights, its config and the precision in which it
computes; other weights have another one, so that no state of theirs is ever read. In it are `states-*.safetensors`,
whose tensors are named by the key of a row (`teachers.fingerprints.row_keys` of its prompt) and hold what the decoder
reads of its real tokens: `cross_attention_states`, or `last_hidden_state` where there are none, `[S, width]`, or of
fewer positions where the encoder pools.

A file is written under another name and appears in one rename, under a name that nobody else gives: any number of
processes and runs may use a folder at once, and what a killed one left behind is never read.

float32 states are kept in float16, whose 11 bits of precision are more than bfloat16's 8. A row with a number that
float16 cannot hold is kept in float32.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from ...models.families import RULED_BY_LENGTH
from ...models.rope_encdec.modeling_rope_encdec import pooled_attention_mask
from ..collator import DistillationCollator
from ..teachers.fingerprints import config_digest, row_keys, weights_digest
from ..teachers.shards import file_digest, partial_name, remove_left_behind
from .rollouts import as_it_was


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

_FORMAT = 2
_SUFFIX = ".safetensors"
_KEPT_IN = torch.float16  # what is float32, where it fits
_BYTES_PER_FILE = 64_000_000  # at most so much is lost in an interruption
# Fields of a config that an encoder does not compute with.
_NO_PART_OF_AN_ENCODER = (
    *("decoder", "num_decoder", "prompt_date", "use_cache", "architectures", "auto_map", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "forced_", "num_beams", "max_length", "task_specific_params"),
)
# What of the student's input the encoder reads besides the tokens would have to be part of a row's key.
_OF_THE_DECODER = ("decoder_", "cross_", "labels", "use_cache")


class EncoderStates(TrainerCallback):
    """`encoder_outputs` for the forward of a student with a frozen encoder.

    Rows that are not there yet are computed by the encoder, in eval mode, and kept. What is handed out is always what
    is kept, so that a row's first step sees the numbers that its later steps do.

    Args:
        folder: made if it is not there.
        accelerator: has the precision that the encoder computes in.
    """

    def __init__(self, folder: str | os.PathLike, accelerator: Accelerator):
        self.folder = Path(folder)
        self._accelerator = accelerator
        self._worker = uuid4().hex
        self._place: Path | None = None
        self._new: dict[str, Tensor] = {}
        self.forget()

    def check(self, trainer) -> None:
        """Raises ValueError where a `DistillationTrainer` has no whole encoder on each process."""
        if trainer.is_sharded or trainer.get_tp_size() > 1:
            raise ValueError(
                f"encoder_states={str(self.folder)!r} with FSDP, DeepSpeed or tensor parallelism: no process has the "
                "whole encoder to run by itself. Use DistributedDataParallel, or leave it out."
            )

    def forget(self) -> None:
        """The encoder may be another one: whose states these are is found out again."""
        self.flush()
        self._place = None
        self._files: dict[str, Any] = {}
        self._file_of_key: dict[str, str] = {}

    def on_epoch_end(self, args, state, control, **kwargs):
        self.flush()
        self._accelerator.wait_for_everyone()  # each process then finds the rows of all others

    def on_save(self, args, state, control, **kwargs):
        self.flush()

    def on_evaluate(self, args, state, control, **kwargs):
        self.flush()

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.flush()

    def encoder_outputs(self, student: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`encoder_outputs` for the student's forward on a batch; empty where its encoder is trained.

        Args:
            student: unwrapped.
            inputs: those of its forward, `input_ids` and perhaps `attention_mask` `[B, S]` among them.

        Raises:
            ValueError: the encoder reads something else, its states depend on the batch, or a file is cut.
        """
        encoder = student.get_encoder()
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            return {}
        keys, mask = self.ensure(student, inputs)
        width = student.config.hidden_size * max(len(getattr(encoder, "states_read", ())), 1)
        lengths = mask.sum(dim=1).tolist()
        found = [(row, self._read(key, lengths[row], width)) for row, key in enumerate(keys) if key is not None]
        if not found:
            return {}
        states = torch.zeros(*mask.shape, width, dtype=next(encoder.parameters()).dtype)
        for row, state in found:
            states[row, mask[row]] = state.to(states.dtype)
        states = states.to(inputs["input_ids"].device)
        if getattr(encoder, "states_read", ()):
            # The last hidden state, which no decoder layer reads, is not kept; the first state stands in for it.
            return {"encoder_outputs": (states[..., : student.config.hidden_size], states)}
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}

    def ensure(self, student: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[list[str | None], Tensor]:
        """Computes and keeps what is not there of a batch; the key of each row, None for an empty prompt, and the
        mask of the positions that its encoder hands over, `[B, S]` or fewer where it pools, on the CPU."""
        if self._place is None:
            self._open(student)
        others = [name for name in inputs if name not in ("input_ids", "attention_mask")]
        others = [name for name in others if not name.startswith(_OF_THE_DECODER)]
        if others or inputs.get("input_ids") is None:
            raise ValueError(
                f"encoder_states={str(self.folder)!r}, but the batch has {', '.join(others) or 'no input_ids'}: "
                "states are known by the tokens of the prompt alone. Leave encoder_states or that column out."
            )
        ids = inputs["input_ids"]
        given = inputs.get("attention_mask")
        given = torch.ones_like(ids) if given is None else given
        mask = given.bool().cpu()
        keys = _keys(ids, mask, relative=student.config.model_type == "rope_encdec")
        missing = self._missing(keys)
        if missing and self._look():  # another process has written
            missing = self._missing(keys)
        mask = pooled_attention_mask(mask, getattr(student.config, "encoder_pooling", 1))
        if missing:
            self._compute(student.get_encoder(), ids, given, mask, keys, missing)
        return keys, mask

    def _missing(self, keys: list[str | None]) -> list[int]:
        there = (self._new, self._file_of_key)
        return [row for row, key in enumerate(keys) if key is not None and not any(key in part for part in there)]

    @torch.no_grad()
    def _compute(
        self,
        encoder: PreTrainedModel,
        ids: Tensor,
        given: Tensor,
        mask: Tensor,
        keys: list[str | None],
        rows: list[int],
    ) -> None:
        # Without dropout: kept, one draw of it would be in every epoch.
        with as_it_was(encoder, seed=0), self._accelerator.autocast():
            outputs = encoder(input_ids=ids[rows], attention_mask=given[rows], return_dict=True)
        states = getattr(outputs, "cross_attention_states", None)
        states = outputs.last_hidden_state if states is None else states
        for row, state in zip(rows, states.cpu(), strict=True):
            key = keys[row]
            assert key is not None  # only rows with a prompt are missing
            self._new[key] = _as_kept(state[mask[row]])
        if sum(state.nbytes for state in self._new.values()) >= _BYTES_PER_FILE:
            self.flush()

    # --- files ---

    def rows(self, student: PreTrainedModel) -> int:
        """How many rows there are of this student's encoder, those of other processes among them."""
        if self._place is None:
            self._open(student)
        self._look()
        return len(self._file_of_key.keys() | self._new.keys())

    def _open(self, student: PreTrainedModel) -> None:
        rope = getattr(student.config, "rope_parameters", None) or getattr(student.config, "rope_scaling", None) or {}
        if rope.get("rope_type") in RULED_BY_LENGTH:
            raise ValueError(
                f"encoder_states={str(self.folder)!r} with rope_type={rope['rope_type']!r}, with which the states of "
                "a row depend on the longest row of its batch: leave encoder_states out."
            )
        self._place = self.folder / fingerprint(student, self._accelerator.mixed_precision)
        if not self._place.exists() and any(self.folder.glob(f"*/*{_SUFFIX}")):
            logger.warning(
                f"{self.folder} has states of other encoders, weights or precisions, and none of this one: they are "
                f"computed in the first pass, in {self._place}."
            )
        self._place.mkdir(parents=True, exist_ok=True)
        remove_left_behind(self._place, self._worker)
        self._look()
        logger.info(f"{self._place} has the encoder's states of {len(self._file_of_key)} rows.")

    def _look(self) -> bool:
        """Opens the files that have come since; whether there were any."""
        assert self._place is not None
        fresh = sorted(file for file in self._place.glob(f"*{_SUFFIX}") if file.name not in self._files)
        for file in fresh:
            if not file.stem.endswith(f"-{file_digest(file)}"):
                raise ValueError(
                    f"{file} is not what was written, it was cut or altered: delete it; its rows are computed again."
                )
            try:
                # Maps the file; a tensor is read when it is asked for.
                self._files[file.name] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} holds no states ({error}): delete it; they are computed again.") from error
            self._file_of_key.update(dict.fromkeys(self._files[file.name].keys(), file.name))
        return bool(fresh)

    def _read(self, key: str, length: int, width: int) -> Tensor:
        """
        Raises:
            ValueError: the file has something else under this key than the states `(length, width)` of a row.
        """
        new = self._new.get(key)
        if new is not None:
            return new
        name = self._file_of_key[key]
        state = self._files[name].get_tensor(key)
        if not state.is_floating_point() or state.shape != (length, width) or not state.isfinite().all():
            assert self._place is not None
            raise ValueError(
                f"{self._place / name} is not what was written, it has {state.dtype} of shape {tuple(state.shape)}, "
                f"perhaps not finite, for a row of {length} positions and {width} numbers: delete it; its rows are "
                "computed again."
            )
        return state

    def flush(self) -> None:
        """Writes what has been computed since."""
        if not self._new:
            return
        assert self._place is not None
        name = uuid4().hex
        partial = self._place / partial_name(self._worker)
        try:
            save_file(self._new, partial)
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            # By the hash of its own bytes one that was cut or altered is found, as shards of a teacher's cache are.
            os.replace(partial, self._place / f"states-{name}-{file_digest(partial)}{_SUFFIX}")
        except SafetensorError as error:
            raise OSError(f"states of the encoder could not be written to {self._place}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        self._new = {}
        self._look()


def fingerprint(student: PreTrainedModel, precision: str) -> str:
    """What the states of an encoder are known by: its weights, its config, what it hands over, and `precision`,
    `"no"`, `"bf16"` or `"fp16"` as in accelerate."""
    encoder = student.get_encoder()
    parts = [
        str(_FORMAT),
        precision,
        str(list(getattr(encoder, "states_read", ()))),
        config_digest(student, but=_NO_PART_OF_AN_ENCODER),
        weights_digest(encoder),
    ]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _keys(ids: Tensor, mask: Tensor, relative: bool) -> list[str | None]:
    """Of each row of `[B, S]`, from its first real token to its last; from the first column where padding in front
    moves positions (`relative` is false)."""
    columns = torch.arange(mask.shape[1])
    first = mask.int().argmax(dim=1, keepdim=True) if relative else torch.zeros(len(mask), 1, dtype=torch.long)
    last = (mask * columns).amax(dim=1, keepdim=True)
    span = (columns >= first) & (columns <= last)
    rows, asked = mask.nonzero(as_tuple=True)
    return [None if key is None else key.hex() for key in row_keys(ids, span, rows, asked)]


def _as_kept(state: Tensor) -> Tensor:
    if state.dtype != torch.float32:
        return state
    small = state.to(_KEPT_IN)
    return small if torch.isfinite(small).all() else state


def capture_encoder_states(
    student: PreTrainedModel,
    dataset: "datasets.Dataset | datasets.DatasetDict | list[dict]",
    folder: str | os.PathLike,
    collator: DistillationCollator,
    *,
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> int:
    """Keep the states of all rows of `dataset` that are not in `folder` yet, for `encoder_states` of a training.

    Called again after an interruption it goes on where it stopped. Under `accelerate launch` each process takes its
    share of the rows.

    Args:
        student: on the device where it is to run.
        dataset: rows as `DistillationCollator` takes them; all splits of a `DatasetDict`.
        folder: for `encoder_states`.
        collator: with the tokenizers, template and limits of the training.
        batch_size: rows that the encoder reads at once.
        accelerator: has the precision of the training; by default the one of this process.
        progress: show a bar.

    Returns:
        How many rows the folder then has for this encoder.

    Raises:
        ValueError: the student has no encoder; and see `EncoderStates.encoder_outputs`.
    """
    if not student.config.is_encoder_decoder:
        raise ValueError(
            f"the student is a decoder-only model ({student.config.model_type}), which has no encoder states to keep: "
            "record its teacher alone."
        )
    accelerator = accelerator or Accelerator()
    splits = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    numbered = [(rows, number) for rows in splits for number in range(len(rows))]
    share = numbered[accelerator.process_index :: accelerator.num_processes]
    states = EncoderStates(folder, accelerator)
    progress = progress and accelerator.is_main_process
    with tqdm(total=len(share), unit=" rows", desc="encoder states", disable=not progress) as bar:
        for first in range(0, len(share), batch_size):
            names = share[first : first + batch_size]
            batch = collator([rows[number] for rows, number in names])
            read = ("input_ids", "attention_mask", "pixel_values")
            states.ensure(student, {name: batch[name].to(student.device) for name in read if name in batch})
            bar.update(len(names))
    states.flush()
    accelerator.wait_for_everyone()
    return states.rows(student)
