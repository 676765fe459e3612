"""Close the gaps that layers leave behind: a linear fit of those that are kept, no gradient.

Where layers are taken out, a kept one hands its successor another residual stream than the layers between them would
have. The last projection of a layer, `down_proj`, is linear in its inputs, so the change of it that brings the stream
nearest to the teacher's is a ridge regression: with X the inputs of the projection and E what is missing behind the
layer, the change D solves `(X'X + penalty I) D = X'E`. Layers are fitted from the bottom up, each on the inputs that
the fitted ones below it give.

Where the decoder's MLPs are to be narrower, a layer is fitted with all neurons, loses those that the fit misses least,
and is fitted again.

Related: ReplaceMe (arXiv 2505.02819) fits one linear map in the place of a block of layers.

Shapes: B rows and L positions of a batch, N of these fitted, H hidden size, W inputs of a projection.
"""

import heapq
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from tempfile import TemporaryDirectory, mkstemp
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .modeling_rope_encdec import mean_of_neighbours, pooled_attention_mask, pooled_position_ids
from .narrowing import keep_neurons, neurons_to_keep


# The penalty in units of the mean squared norm of an input: the more positions there are, the less it weighs.
RIDGE = 1.0

# Linear submodules of a layer that are fitted, in the order in which it has them. The output of a `separate`
# cross-attention starts at zero: without a fit of its own the prompt would not reach the decoder.
FITTED = ("cross_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Gap:
    """How far the state that a kept layer hands on is from the teacher's.

    Attributes:
        side: `"encoder"` or `"decoder"`.
        layer: the teacher's index of the kept layer.
        goal: the depth of the teacher that its output is fitted to; depth `i` is the state that enters layer `i`.
        before, after: squared distance on the rows of the fit, as a share of the variance of the teacher's state;
            `before` is that of the layer with all its neurons, `after` what the equations leave, before weights are
            rounded to their dtype.
    """

    side: str
    layer: int
    goal: int
    before: float
    after: float


@dataclass(frozen=True)
class Healing:
    """What a fit brought, on calibration rows that it has not seen.

    Attributes:
        taken: whether the student has the fitted weights; they are not taken where they do harm.
        rows, held_out_rows: how many were fitted on, and how many measured on.
        kl_before, kl_after: divergence of student and fitted student from the teacher, in nats per target token, each
            at the scale of its final norm that is best for it.
        gaps: one for each layer that was fitted.
    """

    taken: bool
    rows: int
    held_out_rows: int
    kl_before: float
    kl_after: float
    gaps: list[Gap]

    def to_dict(self) -> dict:
        """Without the gaps."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "gaps"}

    def __str__(self):
        kl = f"{self.kl_before:.3g} nats per token before, {self.kl_after:.3g} after"
        return f"KL from the teacher on {self.held_out_rows} rows that the fit has not seen: {kl}"


@torch.no_grad()
def fit_encoder_decoder(student, teacher, kept, batches, decoder_alone=None) -> list[Gap]:
    """Fit the layers of an encoder-decoder to the teacher's states, in place.

    The encoder is fitted on prompt positions but the first, an attention sink whose state has another magnitude; the
    decoder on the positions that predict the target, reading the fitted encoder, its last layer towards the state that
    enters the teacher's final norm.

    Those positions are few. A `merged` decoder does what a decoder-only model of its layers does, but for the states
    of the prompt that it reads. So that model is fitted as well, as in `fit_decoder_only`, where prompts count too,
    and the decoder then towards its weights.

    Memory does not grow with the rows: their states wait in a temporary folder.

    Args:
        student ([`RopeEncDecForConditionalGeneration`]): With weights of its own. Where its config says that the
            decoder's MLPs are narrower than the teacher's, their neurons are chosen again.
        teacher ([`RopeEncDecEncoder`]): All layers of the teacher, as a causal encoder.
        kept (`dict`): `{"encoder": layers, "decoder": layers}`, by the teacher's indices.
        batches (`list[dict]`): From `calibration_batches`.
        decoder_alone ([`RopeEncDecEncoder`], *optional*): The decoder's layers as a causal encoder, with the teacher's
            weights; for a `merged` student, or one whose decoder's MLPs are narrower. The student's decoder takes its
            MLPs, which are then shared.

    Returns:
        `list[Gap]`: One for each layer of the student that was fitted. Layers that compute just what the teacher's do
        are not, nor are those of an encoder whose output nothing reads. Where the encoder pools, its goals are pooled.

    Raises:
        ValueError: where a state is not finite.
    """
    encoder, decoder, depth = student.model.encoder, student.model.decoder, len(teacher.layers)
    config = student.config
    width = config.decoder_intermediate_size if config.decoder_intermediate_size < config.intermediate_size else None
    goals = _goals(config, kept, depth)
    to_fit = _layers_to_fit(config, kept, goals, width)
    if decoder_alone is not None:
        for layer, alone in zip(decoder.layers, decoder_alone.layers):
            layer.mlp = alone.mlp.requires_grad_()
    fitted_alone = decoder_alone is not None and config.cross_attention == "merged"
    columns = [*kept.values(), kept["decoder"]] if fitted_alone else [*kept.values()]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, _progress(*columns) as progress:
        ascent = _Ascent(teacher, batches, goals["decoder"], folder)
        size, pooled_from = config.encoder_pooling, config.first_pooled_layer
        prompts = [_without_first(batch["attention_mask"]) for batch in batches]
        read_masks = [pooled_attention_mask(batch["attention_mask"], size) for batch in batches]
        pooled_prompts = [_without_first(mask) for mask in read_masks]
        column = _Column(
            encoder,
            (encoder.embed_tokens(batch["input_ids"]) for batch in batches),
            [{"attention_mask": batch["attention_mask"]} for batch in batches],
            folder,
        )

        def is_pooled(goal: int) -> bool:
            return pooled_from is not None and goal >= [*goals["encoder"], math.inf][pooled_from]

        def positions(goal: int) -> list[Tensor]:
            return pooled_prompts if is_pooled(goal) else prompts

        def of_prompt(goal: int, batch: int) -> Tensor:
            # Rows are padded on the right: a prompt's position is the same column for both.
            states = ascent.to(goal)[batch][:, : prompts[batch].shape[1]]
            if is_pooled(goal):
                states = mean_of_neighbours(states, batches[batch]["attention_mask"].cpu(), size)
            return states[positions(goal)[batch].cpu()]

        fits = [_fits("encoder", column, kept, goals, to_fit, positions, of_prompt, progress)]
        if fitted_alone:
            fits.append(
                _fits_of_decoder_only(decoder_alone, kept["decoder"], ascent, batches, folder, progress, width)
            )
        gaps = [gap for gap in _run(fits) if gap.side == "encoder"]
        ascent.to(depth)

        outputs = (encoder(batch["input_ids"], attention_mask=batch["attention_mask"]) for batch in batches)
        read = _on_disk((_read_by_decoder(output) for output in outputs), folder)
        column = _Column(
            decoder,
            (encoder.embed_tokens(batch["decoder_input_ids"]) for batch in batches),
            [
                {
                    "encoder_hidden_states": state,
                    "encoder_attention_mask": mask,
                    "use_cache": False,
                }
                for mask, state in zip(read_masks, read)
            ],
            folder,
        )
        targets = [batch["target_mask"] for batch in batches]

        def of_target(goal: int, batch: int) -> Tensor:
            return ascent.predicting[goal][batch]

        fits = [_fits("decoder", column, kept, goals, to_fit, lambda _: targets, of_target, progress, width)]
        return gaps + _run(fits)


@torch.no_grad()
def fit_decoder_only(student, teacher, kept, batches) -> list[Gap]:
    """Fit the layers of a decoder-only model to the teacher's states, in place.

    As in `fit_encoder_decoder`, on all positions of prompt and target but the first; the last layer, whose output is
    read only there, on the positions that predict the target.

    Args:
        student ([`RopeEncDecEncoder`]): The layers that are kept, as a causal encoder.
        teacher ([`RopeEncDecEncoder`]): All layers, likewise.
        kept (`list[int]`): The teacher's indices of the student's layers.
        batches (`list[dict]`): From `calibration_batches`.

    Returns:
        `list[Gap]`: One for each layer that was fitted, of side `"decoder"`.

    Raises:
        ValueError: where a state is not finite.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, _progress(kept) as progress:
        ascent = _Ascent(teacher, batches, [], folder)
        return _run([_fits_of_decoder_only(student, kept, ascent, batches, folder, progress)])


def _fits_of_decoder_only(
    student, kept: list[int], ascent: "_Ascent", batches: list[dict], folder: str, progress, width: int | None = None
):
    depth = ascent.depth
    layers, goals = {"decoder": kept}, {"decoder": [*kept[1:], depth]}
    to_fit = {"decoder": range(_exact_layers(kept, goals["decoder"]) if width is None else 0, len(kept))}
    inner = [_without_first(batch["sequence_mask"]) for batch in batches]
    predicting = [batch["predicting"] for batch in batches]
    column = _Column(
        student,
        (student.embed_tokens(batch["sequence"]) for batch in batches),
        [{"attention_mask": batch["sequence_mask"]} for batch in batches],
        folder,
    )

    def positions(goal: int) -> list[Tensor]:
        return predicting if goal == depth else inner

    def of_sequence(goal: int, batch: int) -> Tensor:
        return ascent.to(goal)[batch][positions(goal)[batch].cpu()]

    return _fits("decoder", column, layers, goals, to_fit, positions, of_sequence, progress, width)


def _goals(config, kept: dict, depth: int) -> dict[str, list[int]]:
    """The depth of the teacher that the output of each kept layer stands for: where the next kept one is."""
    goals = {side: [*layers[1:], depth] for side, layers in kept.items()}
    top = config.encoder_states_read[-1]
    if config.cross_attention == "merged" and top > 0:
        # Nothing but decoder layers reads the topmost state that is read; of several the last.
        states = config.encoder_state_of_decoder_layer
        last = max(kept["decoder"][i] for i in config.prompt_keys_of_decoder_layer if states[i] == top)
        goals["encoder"][top - 1] = max(last, kept["encoder"][top - 1] + 1)
    return goals


def _layers_to_fit(config, kept: dict, goals: dict, width: int | None) -> dict[str, range]:
    """Of each side, by position: those above the exact ones, up to the last that is read. No layer that loses neurons
    is exact."""
    exact = {"encoder": 0, "decoder": 0}
    if config.encoder_attention == "causal":
        types = [*config.attention_of_encoder_layer, "sliding_attention"]
        exact["encoder"] = min(_exact_layers(kept["encoder"], goals["encoder"]), types.index("sliding_attention"))
    if config.first_pooled_layer is not None:
        exact["encoder"] = min(exact["encoder"], config.first_pooled_layer)
    elif config.cross_attention == "merged" and width is None:
        states = config.encoder_state_of_decoder_layer
        reads_exact = [state == layer <= exact["encoder"] for layer, state in zip(kept["decoder"], states)]
        exact["decoder"] = min(_exact_layers(kept["decoder"], goals["decoder"]), [*reads_exact, False].index(False))
    return {
        "encoder": range(exact["encoder"], config.encoder_states_read[-1]),
        "decoder": range(exact["decoder"], len(kept["decoder"])),
    }


def _exact_layers(kept: Sequence[int], goals: Sequence[int]) -> int:
    """How many layers from the bottom up compute just what the teacher's do: none is missing below or behind them."""
    return next((i for i, (layer, goal) in enumerate(zip(kept, goals)) if layer != i or goal != i + 1), len(kept))


def _progress(*layers: Sequence[int]) -> tqdm:
    return tqdm(total=sum(map(len, layers)), desc="Fitting layers", disable=None)  # None: only on a terminal


def _without_first(attention_mask: Tensor) -> Tensor:
    """The real positions `(B, L)` of right-padded rows but the first of each."""
    mask = attention_mask.bool().clone()
    mask[:, 0] = False
    return mask


def _read_by_decoder(encoder_output) -> Tensor:
    states = encoder_output.cross_attention_states
    return encoder_output.last_hidden_state if states is None else states


def _to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _on_disk(tensors: Iterable[Tensor], folder: str) -> list[Tensor]:
    """Copies in files of `folder`, mapped into memory, which the system may page out."""
    copies = []
    for tensor in tensors:
        handle, path = mkstemp(dir=folder)
        os.close(handle)
        copy = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
    return copies


class _Column:
    """The layers of an encoder or a decoder, run one by one; `states` holds what enters the next one, by batch.

    Args:
        module: the encoder or decoder; its own forward makes masks and positions.
        embedded: what enters the first layer, `(B, L, H)` for each batch.
        inputs: what else the forward takes, for each batch.
        folder: for the states.
    """

    def __init__(self, module: Any, embedded: Iterable[Tensor], inputs: list[dict], folder: str):
        self.module, self.inputs = module, inputs
        self.layers, self.slots = module.layers, getattr(module, "state_slots", None)
        self.pooling_layer = getattr(module, "pooling_layer", None)
        self.states, self._folder = _on_disk(embedded, folder), folder

    def run(self, index: int, batch: int, within: nn.Module | None = None) -> dict[str, Tensor]:
        """What is `leaving` layer `index`, `(B, L, H)`, and what is `entering` its submodule `within`, `(B, L, W)`."""
        layer, module = self.layers[index], self.module
        caught: dict[str, Tensor] = {}
        handles = [layer.register_forward_hook(lambda _m, _args, output: caught.update(leaving=output[0]))]
        if within is not None:
            handles.append(within.register_forward_pre_hook(lambda _m, args: caught.update(entering=args[0])))
        states_read = getattr(module, "states_read", None)
        try:
            hidden_states = self.states[batch].to(next(layer.parameters()).device)
            module.layers = nn.ModuleList([layer])
            if self.slots is not None:
                module.state_slots = [self.slots[index]]
                if self.slots[index] is None:  # the first of its group makes the prompt's keys and values
                    first = module.config.prompt_keys_of_decoder_layer[index]
                    module.layers.insert(0, self.layers[first])
                    module.state_slots.insert(0, self.slots[first])
                    handles.append(layer.register_forward_pre_hook(lambda _m, args: (hidden_states, *args[1:])))
            else:
                module.states_read = ()
                module.pooling_layer = 0 if index == self.pooling_layer else None
            inputs = {name: _to(value, hidden_states.device) for name, value in self.inputs[batch].items()}
            module(inputs_embeds=hidden_states, **inputs)
        finally:
            module.layers = self.layers
            if self.slots is not None:
                module.state_slots = self.slots
            else:
                module.states_read, module.pooling_layer = states_read, self.pooling_layer
            for handle in handles:
                handle.remove()
        return caught

    def climb(self, index: int) -> None:
        leaving = (self.run(index, batch)["leaving"] for batch in range(len(self.states)))
        if index != self.pooling_layer:
            for states, new in zip(self.states, leaving):
                states.copy_(new)
            return
        self.states = _on_disk(leaving, self._folder)
        size = self.module.config.encoder_pooling
        for inputs, states in zip(self.inputs, self.states):
            inputs["attention_mask"] = pooled_attention_mask(inputs["attention_mask"], size)
            inputs["position_ids"] = pooled_position_ids(torch.arange(states.shape[1])[None], size)


class _Ascent:
    """The teacher's states, depth by depth, each layer run once for each batch.

    Args:
        noted: depths where the states at positions that predict the target, `(N, H)`, are kept, in `predicting`.
    """

    def __init__(self, teacher: Any, batches: list[dict], noted: Sequence[int], folder: str):
        self._batches, self._noted, self._folder = batches, noted, folder
        self._column = _Column(
            teacher,
            (teacher.embed_tokens(batch["sequence"]) for batch in batches),
            [{"attention_mask": batch["sequence_mask"]} for batch in batches],
            folder,
        )
        self.depth = len(teacher.layers)
        self._at = 0
        self.predicting: dict[int, list[Tensor]] = {}

    def to(self, depth: int) -> list[Tensor]:
        """Climb to `depth`, not below where it is; the states `(B, L, H)` of each batch there."""
        while self._at < depth:
            self._column.climb(self._at)
            self._at += 1
            if self._at in self._noted:
                states = (state[batch["predicting"].cpu()] for state, batch in zip(self._column.states, self._batches))
                self.predicting[self._at] = _on_disk(states, self._folder)
        return self._column.states


def _fits(
    side: str,
    column: _Column,
    kept: dict,
    goals: dict,
    to_fit: dict,
    positions: Callable[[int], list[Tensor]],
    target: Callable[[int, int], Tensor],
    progress: tqdm,
    width: int | None = None,
) -> list[tuple[int, Callable[[], list[Gap]]]]:
    """For each layer of a column, from the bottom up, the depth of its goal and what fits it on what the fitted ones
    below it give.

    Args:
        kept, goals, to_fit: by side, as above.
        positions: where a fit to this depth looks, `(B, L)` of each batch.
        target: the teacher's states `(N, H)` there, by depth and batch.
        width: of the MLPs afterwards, where neurons are to go.
    """

    def fit(index: int, layer: int, goal: int) -> list[Gap]:
        gaps = []
        if index in to_fit[side]:
            shares = []
            for name, linear in column.layers[index].named_modules():
                if name in FITTED:
                    of_goal = partial(target, goal)
                    shares.append(_fit_projection(column, index, linear, positions(goal), of_goal, width))
            gaps.append(Gap(side, layer, goal, shares[0][0], shares[-1][1]))
        if any(above > index for above in to_fit[side]):
            column.climb(index)
        progress.update()
        return gaps

    return [
        (goal, partial(fit, index, layer, goal)) for index, (layer, goal) in enumerate(zip(kept[side], goals[side]))
    ]


def _run(fits: list[list[tuple[int, Callable[[], list[Gap]]]]]) -> list[Gap]:
    """Those of all columns in the order of their goals, for the teacher climbs once."""
    return [gap for _, fit in heapq.merge(*fits, key=lambda item: item[0]) for gap in fit()]


def _fit_projection(
    column: _Column,
    index: int,
    linear: nn.Linear,
    positions: list[Tensor],
    target: Callable[[int], Tensor],
    width: int | None,
) -> tuple[float, float]:
    """Fit one linear submodule of a layer in place, an MLP of more than `width` neurons without those that go; the
    shares of `Gap` before and after."""
    # Sums are in float64, which Apple's GPUs do not have.
    device = linear.weight.device if linear.weight.is_cuda else torch.device("cpu")
    gram = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=device)
    moment = torch.zeros(linear.in_features, linear.out_features, dtype=torch.float64, device=device)
    total = torch.zeros(linear.out_features, dtype=torch.float64, device=device)
    count, squared, missing_squared = 0, 0.0, 0.0
    for batch, at in enumerate(positions):
        states = column.run(index, batch, linear)
        inputs, leaving = states["entering"][at].float(), states["leaving"][at].float()
        goal = target(batch).to(leaving.device).float()
        missing = goal - leaving
        with torch.autocast(inputs.device.type, enabled=False):
            gram += (inputs.T @ inputs).to(device)
            moment += (inputs.T @ missing).to(device)
        total += goal.sum(0).to(device)
        squared += goal.square().sum().item()
        missing_squared += missing.square().sum().item()
        count += len(goal)
    if not (gram.isfinite().all() and moment.isfinite().all()):
        raise ValueError(
            "heal='least_squares' met states that are not finite, of the teacher or of the student's layers below "
            f"layer {index}: load the teacher in another dtype, such as dtype=torch.float32."
        )
    variance = max(squared - total.square().sum().item() / max(count, 1), torch.finfo(torch.float32).tiny)
    penalty = RIDGE * gram.diagonal().sum().item() / max(count, 1) or 1.0  # no position or no input: nothing changes
    gram.diagonal().add_(penalty)
    change = torch.cholesky_solve(moment, torch.linalg.cholesky(gram))
    weight, mlp, kept = linear.weight.to(device, torch.float64).T, column.layers[index].mlp, None
    if width is not None and linear is mlp.down_proj and linear.in_features > width:
        kept = neurons_to_keep(gram, weight + change, width)
        change = -weight  # of those that go
        change[kept] = 0.0
        of_kept = torch.linalg.cholesky(gram[kept][:, kept])
        change[kept] = torch.cholesky_solve((moment - gram @ change)[kept], of_kept)
    linear.weight.copy_((weight + change).T)
    torch.clear_autocast_cache()  # which would go on with the weights as they were
    if kept is not None:
        keep_neurons(mlp, kept)
    left = missing_squared - (change * (2 * moment - gram @ change)).sum().item()
    left -= penalty * change.square().sum().item()
    return missing_squared / variance, max(left, 0.0) / variance
