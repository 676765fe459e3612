"""An exported folder's graphs as two calls, whatever runs them: `encode` a prompt, with its images, and `decode` some
target tokens."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from .recipe import Graph, Port, Shapes


class GraphCache:
    """The target's keys and values of one generation.

    `rows` are groups of arrays in the order of the recipe: one group for all rows of the batch where the graphs take a
    batch, else one for each row.
    """

    def __init__(self, rows: list[list[np.ndarray]]):
        self.rows = rows
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx) -> None:
        """What beam search asks of a cache: row i goes on from row `beam_idx[i]`. Arrays are never written to, so that
        rows may share one."""
        order = np.asarray(beam_idx)
        if len(self.rows) == 1:
            self.rows = [[array[order] for array in self.rows[0]]]
        else:
            self.rows = [self.rows[index] for index in order]


class Graphs(ABC):
    """
    Args:
        graphs: from [`recipe.graphs`].
        shapes: which lengths they take.
        dtype: of keys and values.
    """

    def __init__(self, graphs: Mapping[str, Graph], shapes: Shapes, dtype: DTypeLike = np.float32):
        self.graphs, self.shapes, self.dtype = graphs, shapes, np.dtype(dtype)
        ports = graphs["decoder"].inputs
        self._own = [port for port in ports if port.name in graphs["decoder"].cache]
        self._cross = [port.name for port in ports if port.name.startswith("past") and port not in self._own]

    @abstractmethod
    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """Outputs of `vision`, the `encoder` or the `decoder`, in the order of the recipe."""

    def encode(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, pixel_values: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """`(B, S)` ids and mask to the cross keys and values `(B, G, S', D)`, and the mask `(B, S')`, where `S'` is
        what the graphs pad to, or what the encoder leaves of that where it pools.

        Args:
            pixel_values: `(I, 3, height, width)` of all images, in the order of their tokens through all prompts.

        Raises:
            ValueError: the prompt is longer than the graphs take, the images are not as many as its image tokens are
                for or of another size, or the graphs read no images.
        """
        features = self._features_of_rows(input_ids, pixel_values)
        missing = self.shapes.padded(input_ids.shape[1]) - input_ids.shape[1]
        if missing:
            input_ids, attention_mask = (np.pad(x, ((0, 0), (0, missing))) for x in (input_ids, attention_mask))
        pooling = self.graphs["encoder"].pooling
        if pooling > 1:  # such graphs take pads behind the prompt alone
            order = np.argsort(attention_mask == 0, axis=1, kind="stable")
            input_ids, attention_mask = (np.take_along_axis(x, order, 1) for x in (input_ids, attention_mask))
        # A group of neighbours is real where its first is.
        left = np.ascontiguousarray(attention_mask[:, ::pooling])
        if self.shapes.targets is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            if features is not None:
                inputs["image_features"] = np.concatenate(features)
            return list(self.run("encoder", inputs)), left
        outputs = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            inputs = {"input_ids": ids[None], "attention_mask": mask[None]}
            if features is not None:
                empty = np.zeros(self.graphs["encoder"].inputs[-1].shape({}), self.dtype)  # what no token looks up
                inputs["image_features"] = np.concatenate((features[row], empty[len(features[row]) :]))
            outputs.append(self.run("encoder", inputs))
        return [np.concatenate(tensors) for tensors in zip(*outputs, strict=True)], left

    def image_features(self, pixel_values: np.ndarray | None) -> np.ndarray:
        """`(I, 3, height, width)` pixels to `(I, F, H)`; `None` is no image.

        Raises:
            ValueError: the images are of another size than the graph takes.
        """
        [port], [output] = self.graphs["vision"].inputs, self.graphs["vision"].outputs
        if pixel_values is None or not len(pixel_values):
            return np.zeros(output.shape({"images": 0}), self.dtype)[:0]
        if pixel_values.shape[1:] != port.axes[1:]:
            raise ValueError(
                f"pixel_values of shape {pixel_values.shape}: this export takes (images, "
                f"{', '.join(map(str, port.axes[1:]))}), as the processor in its folder makes them"
            )
        images = pixel_values.astype(self.dtype)
        batches = [images] if port.axes[0] == "images" else np.split(images, len(images))
        return np.concatenate([self.run("vision", {port.name: batch})[0] for batch in batches])

    def _features_of_rows(self, input_ids: np.ndarray, pixel_values: np.ndarray | None) -> list[np.ndarray] | None:
        """The image features of each prompt; `None` where the graphs read none."""
        if "vision" not in self.graphs:
            if pixel_values is not None:
                raise ValueError("pixel_values are given, but this export reads text alone: leave them out")
            return None
        features, token = self.image_features(pixel_values), self.graphs["encoder"].image_token_id
        counts = (input_ids == token).sum(axis=1)
        images, each = len(features), features.shape[1]
        if counts.sum() != images * each or (counts % each).any():
            raise ValueError(
                f"{counts.tolist()} image tokens (id {token}) in the prompts for {images} images of {each}: the "
                "processor writes as many tokens as an image needs; limits of length must not cut them"
            )
        return np.split(features, np.cumsum(counts // each)[:-1])

    def room_for_target(self, prompt: int) -> int | None:
        """Target tokens that there are slots for behind a prompt of so many tokens; `None` where there is no limit."""
        return self.shapes.targets

    def new_cache(self, batch: int) -> GraphCache:
        if self.shapes.targets is None:
            return GraphCache([[self._empty(port, batch) for port in self._own]])
        return GraphCache([[self._empty(port, 1) for port in self._own]] * batch)

    def _empty(self, port: Port, batch: int) -> np.ndarray:
        return np.zeros(port.shape({"batch": batch, "past": 0}), self.dtype)

    def decode(
        self, input_ids: np.ndarray, encoder_mask: np.ndarray, cross: Sequence[np.ndarray], cache: GraphCache
    ) -> np.ndarray:
        """Logits `(B, T, V)` of `(B, T)` target tokens that follow those in the cache, which then holds these too.

        Raises:
            ValueError: the cache has not so many slots.
        """
        length = input_ids.shape[1]
        slots = self.shapes.targets
        if slots is None:
            logits = self._step(slice(None), input_ids, encoder_mask, cross, cache, 0)
        else:
            if cache.length + length > slots:
                raise ValueError(
                    f"{cache.length + length} target tokens: this export ({self.shapes}) has {slots} slots; ask for "
                    "fewer with max_new_tokens, or export again with more"
                )
            rows = [
                np.concatenate(
                    [
                        self._step(slice(row, row + 1), input_ids[:, t : t + 1], encoder_mask, cross, cache, row, t)
                        for t in range(length)
                    ],
                    axis=1,
                )
                for row in range(len(input_ids))
            ]
            logits = np.concatenate(rows)
        cache.length += length
        return logits.astype(np.float32)

    def _step(self, part, input_ids, encoder_mask, cross, cache: GraphCache, row: int, ahead: int = 0) -> np.ndarray:
        """One call of the decoder for the rows `part`, whose keys and values are the group `row` of the cache."""
        inputs = {"input_ids": input_ids[part], "encoder_attention_mask": encoder_mask[part]}
        if self.shapes.targets is not None:
            inputs["position"] = np.array([cache.length + ahead])
        inputs |= dict(zip(self._cross, (array[part] for array in cross), strict=True))
        logits, cache.rows[row] = self.step(inputs, cache.rows[row])
        return logits

    def step(self, inputs: dict[str, np.ndarray], own: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The decoder with its keys and values as inputs and outputs; a stateful target has its own way."""
        inputs |= {port.name: array for port, array in zip(self._own, own, strict=True)}
        logits, *own = self.run("decoder", inputs)
        return logits, own


def threads() -> int:
    """How many a runtime computes with: as many as torch, which a user may have told; without torch as many as torch
    would begin with, `OMP_NUM_THREADS` or the cores that this process may run on."""
    if "torch" in sys.modules:
        return sys.modules["torch"].get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if told.isdecimal() and int(told):
        return int(told)
    try:  # two hardware threads of one core count once
        topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(topology.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    except (AttributeError, OSError):  # Linux alone tells
        return os.cpu_count() or 1


@contextmanager
def quiet():
    """Without the converters' warnings and remarks, on versions, on torchvision, on every node that they pass."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
