"""One GGUF file on llama.cpp, through the C interface that llama-cpp-python declares: tokens, logits, states."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..files import replacing


_LEAST_CONTEXT = 512  # cells
_BATCH = 512  # tokens of one call into llama.cpp, where attention is causal
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_GGML_TYPES = {"float32": 0, "float16": 1}


@dataclass(frozen=True)
class PromptState:
    """Keys and values of one sequence at positions 0, 1, ...: for each layer an array `(positions, G * D)`."""

    keys: Sequence[np.ndarray]
    values: Sequence[np.ndarray]


class LlamaCpp:
    """A model and its context, which grows with what is put into it.

    Args:
        path: a GGUF file.
        threads: that compute.
        dtype: of keys and values, float16 or float32.
        flash: whether with flash attention. On a CPU that reads a prompt faster and takes longer for a step, and it
            computes with float16 whatever the dtype.
        shared: whether sequences share cells. Copies of a sequence then cost none, but each attends past the cells of
            all others: for batches of different prompts it is slower.

    Attributes:
        layers: of the model.
        vocab: llama.cpp's own, for its samplers and grammars.
        vocab_size: V.

    Raises:
        ValueError: llama.cpp cannot read the file.
    """

    def __init__(self, path: Path, threads: int, dtype: DTypeLike, flash: bool, shared: bool = True):
        import llama_cpp.llama_cpp as api

        self._api, self.path, self.threads, self.dtype = api, path, threads, np.dtype(dtype)
        self.flash, self.shared = flash, shared
        self._context = self._model = None
        _quiet(api)
        api.llama_backend_init()
        self._model = _compute(api.llama_model_load_from_file, str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {path}{_error()}: export the model again")
        self.vocab = api.llama_model_get_vocab(self._model)
        self.vocab_size = api.llama_vocab_n_tokens(self.vocab)
        self.layers = api.llama_model_n_layer(self._model)
        self._causal = self.metadata(f"{self.metadata('general.architecture')}.attention.causal") != "false"
        self._sequences = self._cells = self._used = 0
        self.clear()

    @staticmethod
    def has_gpu() -> bool:
        import llama_cpp.llama_cpp as api

        return bool(api.llama_supports_gpu_offload())

    def __del__(self, is_finalizing=sys.is_finalizing):  # bound here: at the end of a program `sys` may be gone, too
        if is_finalizing():  # when what frees them may be gone
            return
        if getattr(self, "_context", None):
            self._api.llama_free(self._context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)

    def metadata(self, key: str) -> str | None:
        """A value of the file's header, as text; `None` where it has none."""
        text = ctypes.create_string_buffer(4096)
        length = self._api.llama_model_meta_val_str(self._model, key.encode(), text, len(text))
        return None if length < 0 else text.value.decode()

    def clear(self, sequences: int = 1) -> None:
        """Forget all, and make room for so many sequences.

        Raises:
            ValueError: they are more than llama.cpp takes.
        """
        if sequences > _MAX_SEQUENCES:
            raise ValueError(f"{sequences} sequences at once: llama.cpp takes {_MAX_SEQUENCES}; use smaller batches")
        self._used = 0
        # Where sequences share no cells, each has as many as it has a part of: one among eight, an eighth.
        if sequences > self._sequences or (sequences != self._sequences and not self.shared):
            self._open(max(self._cells, _LEAST_CONTEXT), sequences)
        else:
            self._api.llama_memory_clear(self._memory, True)

    def evaluate(self, tokens: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Run tokens, each `(sequence, position, id, whether its logits are wanted)`.

        Returns:
            the wanted logits `(wanted, V)`, float32.

        Raises:
            RuntimeError: llama.cpp fails, with what it says.
        """
        self._reserve(len(tokens))
        wanted = []
        size = _BATCH if self._causal else len(tokens)
        for first in range(0, len(tokens), size):
            part = tokens[first : first + size]
            count = sum(token[3] for token in part)
            if _compute(self._api.llama_decode, self._context, self._batch(part)) != 0:
                raise RuntimeError(f"llama.cpp could not run {len(part)} tokens{_error()}")
            if count:
                pointer = self._api.llama_get_logits(self._context)
                wanted.append(np.ctypeslib.as_array(pointer, (count, self.vocab_size)).copy())
        self._used += len(tokens)
        return np.concatenate(wanted) if wanted else np.zeros((0, self.vocab_size), np.float32)

    def state(self, sequence: int) -> PromptState:
        """Keys and values of a sequence.

        Raises:
            ValueError: this llama.cpp writes them in a form that is not known here.
        """
        return _parse(self._state_bytes(sequence), self.layers, self.dtype, transposed=not self.flash)

    def set_state(self, sequence: int, state: PromptState) -> None:
        """Begin a sequence with keys and values.

        Raises:
            ValueError: this llama.cpp does not take them.
        """
        positions = len(state.keys[0])
        self._reserve(positions)
        self._set_state_bytes(sequence, _serialize(state, sequence, self.dtype, transposed=not self.flash))
        self._used += positions

    def copy_sequences(self, sources: Mapping[int, int]) -> None:
        """Sequence `new` becomes what sequence `old` is, for each `new: old`; all others are forgotten."""
        for new, old in sources.items():
            self._api.llama_memory_seq_cp(self._memory, old, new, -1, -1)
        for sequence in range(self._sequences):
            if sequence not in sources:
                self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    @property
    def _memory(self):
        return self._api.llama_get_memory(self._context)

    def _open(self, cells: int, sequences: int) -> None:
        api = self._api
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = cells, sequences
        parameters.n_batch = parameters.n_ubatch = _BATCH if self._causal else cells
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = _GGML_TYPES[self.dtype.name]
        parameters.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        parameters.kv_unified = self.shared
        parameters.no_perf = True
        context = _compute(api.llama_init_from_model, self._model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp could not make a context of {cells} cells{_error()}")
        if self._context:
            api.llama_free(self._context)
        self._context, self._cells, self._sequences = context, cells, sequences

    def _reserve(self, cells: int) -> None:
        """Room for so many more cells. llama.cpp's contexts have a fixed size, so a larger one takes over."""
        if self._used + cells <= self._cells:
            return
        last = {row: self._api.llama_memory_seq_pos_max(self._memory, row) for row in range(self._sequences)}
        kept = {row: self._state_bytes(row) for row in last if last[row] >= 0}
        self._used = sum(last[row] + 1 for row in kept)
        self._open(max(2 * self._cells, 2 * (self._used + cells)), self._sequences)
        for row, content in kept.items():
            self._set_state_bytes(row, content)

    def _state_bytes(self, sequence: int) -> np.ndarray:
        content = np.empty(self._api.llama_state_seq_get_size(self._context, sequence), np.uint8)
        pointer = content.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        size = self._api.llama_state_seq_get_data(self._context, pointer, len(content), sequence)
        return content[:size]

    def _set_state_bytes(self, sequence: int, content: np.ndarray) -> None:
        pointer = content.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not self._api.llama_state_seq_set_data(self._context, pointer, len(content), sequence):
            raise ValueError(f"this llama.cpp does not take the prompt's keys and values{_error()}: {_MEND}")

    def _batch(self, tokens: Sequence[tuple[int, int, int, bool]]):
        api = self._api
        sequences, positions, ids, wanted = (np.array(column, np.int32) for column in zip(*tokens, strict=True))
        counts, wanted = np.ones_like(ids), wanted.astype(np.int8)
        pointers = sequences.ctypes.data + sequences.itemsize * np.arange(len(tokens), dtype=np.uintp)

        def pointer(array, kind):
            return array.ctypes.data_as(ctypes.POINTER(kind))

        batch = api.llama_batch(
            n_tokens=len(tokens),
            token=pointer(ids, ctypes.c_int32),
            pos=pointer(positions, ctypes.c_int32),
            n_seq_id=pointer(counts, ctypes.c_int32),
            seq_id=pointer(pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=pointer(wanted, ctypes.c_int8),
        )
        batch.arrays = sequences, positions, ids, wanted, counts, pointers  # for as long as the batch
        return batch


_MEND = 'pip install "hf-encdec-distill[gguf]" installs a version that fits'


def quantize(path: Path, mixture: str) -> None:
    """Store the matrices of an F32 or F16 file in fewer bits, in its place, by llama.cpp's own quantiser.

    Args:
        mixture: one of its names of `LLAMA_FTYPE_MOSTLY_`, such as Q4_K_M. Rows that are not cut into whole blocks of
            a type get the next finer one (0c1e570, `tensor_type_fallback` of src/llama-quant.cpp).

    Raises:
        RuntimeError: llama.cpp fails, with what it says.
    """
    import llama_cpp.llama_cpp as api

    _quiet(api)
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{mixture}")
    with replacing(path) as temporary:
        if api.llama_model_quantize(str(path).encode(), str(temporary).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not store {path} as {mixture}{_error()}")


def _parse(content: np.ndarray, layers: int, dtype: np.dtype, transposed: bool) -> PromptState:
    """The form is that of `llama_kv_cache::state_write` (src/llama-kv-cache.cpp): a magic number and the sequence,
    streams, cells, for each cell its position and sequences, then the keys of each layer, then the values. Without
    flash attention values are transposed, feature by feature."""

    def unknown(what: str) -> ValueError:
        return ValueError(f"this llama.cpp writes sequence states with {what}, which is not known here: {_MEND}")

    buffer = content.data
    _, _, streams, cells = struct.unpack_from("<IiII", buffer)
    offset = 16
    if streams != 1:
        raise unknown(f"{streams} streams")
    for cell in range(cells):
        position, sequences, _ = struct.unpack_from("<iIi", buffer, offset)
        if (position, sequences) != (cell, 1):
            raise unknown(f"position {position} of {sequences} sequences in cell {cell}")
        offset += 12
    found, count = struct.unpack_from("<II", buffer, offset)
    offset += 8
    if (found, count) != (transposed, layers):
        raise unknown(f"{count} layers, values {'transposed' if found else 'by position'}")
    sides = []
    for is_transposed in (False, transposed):
        arrays = []
        for _ in range(layers):
            kind, *sizes = struct.unpack_from("<iII" if is_transposed else "<iQ", buffer, offset)
            offset += 12
            if kind != _GGML_TYPES[dtype.name]:
                raise unknown(f"numbers of type {kind}")
            size = cells * math.prod(sizes)
            array = content[offset : offset + size].view(dtype)
            arrays.append(array.reshape(-1, cells).T if is_transposed else array.reshape(cells, -1))
            offset += size
        sides.append(arrays)
    if offset != len(content):
        raise unknown(f"{len(content) - offset} bytes more")
    return PromptState(*sides)


def _serialize(state: PromptState, sequence: int, dtype: np.dtype, transposed: bool) -> np.ndarray:
    """What `_parse` reads."""
    cells = len(state.keys[0])
    header = struct.pack("<IiII", _MAGIC, sequence, 1, cells)
    cell = np.stack([np.arange(cells), np.ones(cells), np.full(cells, sequence)], axis=1).astype("<i4")
    parts = [header, cell.tobytes(), struct.pack("<II", transposed, len(state.keys))]
    kind, size = _GGML_TYPES[dtype.name], dtype.itemsize
    for side, is_transposed in ((state.keys, False), (state.values, transposed)):
        for array in side:
            width = array.shape[1]
            parts.append(
                struct.pack("<iII", kind, size, width) if is_transposed else struct.pack("<iQ", kind, width * size)
            )
            parts.append(np.ascontiguousarray(array.T if is_transposed else array, dtype).tobytes())
    return np.frombuffer(b"".join(parts), np.uint8)


_MAGIC = 0xAF143CD8  # `io_magic` of src/llama-context.cpp
_errors: list[str] = []  # of llama.cpp, since the last time that one was told; the first says most


@functools.cache  # which also keeps the callback alive, as ctypes does not
def _quiet(api):
    """llama.cpp says much on stderr; what it says of errors is kept for ours."""

    def keep(level, text, _):
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            _errors.append(text.decode(errors="replace").strip())

    callback = api.llama_log_callback(keep)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


@functools.cache
def _own_thread() -> ThreadPoolExecutor:
    """The one thread that llama.cpp computes in. It sets up a thread's AMX tiles once and relies on them (0c1e570).
    Where torch multiplies in bfloat16 they are others afterwards: numbers are wrong, or the process ends."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="llama.cpp")


def _compute(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in that thread, to load a model too: OpenMP gives each thread that computes a team of its own, and two
    teams have more threads than there are cores. GCC's then sleep between operations, and a step takes five times as
    long (libgomp, `gomp_throttled_spin_count_var`)."""
    return _own_thread().submit(function, *arguments).result()


def _error() -> str:
    text = f" ({_errors[0]})" if _errors else ""
    _errors.clear()
    return text
