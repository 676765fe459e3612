"""Which layers to keep: those between which a linear fit leaves least, found as a shortest path.

A student whose kept layers are fitted to the teacher (`least_squares`) is worth what the fit leaves, not what its
layers did before. That is measured for each pair of layers `l < j` on the teacher's own states: how much of the state
that enters layer `j` is missing when layer `l`, its `down_proj` fitted, takes the place of all layers from `l` to `j`.
A student is then a path from the first layer to the last state. It keeps the product of the shares that are not
missing at each step, so a step costs `-log(1 - gap)`, and the cheapest path of each length is found exactly by dynamic
programming.

Shapes: L layers of the teacher, N positions, H hidden size, W inputs of `down_proj`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm


# A share of the mean of the diagonal of X'X. Weaker than the penalty of the fit itself, with which long steps came out
# too cheap.
_RIDGE = 0.02

# Positions of each side that are measured on: time and memory do not grow with the rows beyond these.
_POSITIONS = 1024


@torch.no_grad()
def measure_gaps(teacher, batches: Sequence[dict], ridge: float = _RIDGE) -> dict[str, Tensor]:
    """What the fit of one layer leaves, for each pair of layers.

    Args:
        teacher ([`PreTrainedModel`]): A decoder-only model of a supported family.
        batches (`Sequence[dict]`): From `calibration_batches`.
        ridge (`float`): What is added to the diagonal of X'X, as a share of its mean.

    Returns:
        `dict`: `"encoder"` and `"decoder"`, on prompt positions but the first and on those that predict the target,
        each `(L, L + 1)`: entry `l, j` is the share of the variance of the state at depth `j` that is left when layer
        `l` hands its output to it. Each position is left out of the fit that it is measured with. Infinite where `j <=
        l`.
    """
    masks: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
    for batch in batches:
        prompts = batch["prompt_tokens"].clone()
        prompts[:, 0] = False  # an attention sink, whose state has another magnitude
        masks["encoder"].append(prompts)
        masks["decoder"].append(batch["predicting"])
    # At even distances over all rows, so that each row has its share.
    masks = {side: _thinned(of_side, _POSITIONS) for side, of_side in masks.items()}
    recorded = _record(teacher, batches, masks)
    return {side: _gaps(states, inputs, ridge) for side, (states, inputs) in recorded.items()}


def shortest_path(cost: Tensor, count: int, end: int) -> tuple[list[int], float]:
    """The path of `count` layers from layer 0 to depth `end` with the least sum of `cost[layer, next]`, and this sum.

    Args:
        cost (`Tensor` of shape `(L, L + 1)`): Infinite where there is no step.
        count (`int`): Layers on the path, `end` at most.
        end (`int`): The depth that the last of them hands its output to.
    """
    least: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}  # by the last layer of a path
    steps = cost.tolist()
    for _ in range(count - 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for last, (total, path) in least.items():
            for layer in range(last + 1, end):
                reached = (total + steps[last][layer], [*path, layer])
                longer[layer] = min(longer.get(layer, reached), reached)
        least = longer
    total, path = min((total + steps[last][end], path) for last, (total, path) in least.items())
    return path, total


def _thinned(masks: list[Tensor], most: int) -> list[Tensor]:
    """`most` of the positions that several masks have together, at even distances, or all where they are fewer."""
    total = sum(int(mask.sum()) for mask in masks)
    if total <= most:
        return masks
    thinned, seen = [], 0
    for mask in masks:
        number = mask.flatten().cumsum(0).view(mask.shape) + seen
        seen += int(mask.sum())
        thinned.append(mask & (number * most // total > (number - 1) * most // total))
    return thinned


def _record(teacher, batches, masks) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """For each side the states `(N, H)` at all L + 1 depths, and the inputs `(N, W)` of all L `down_proj`."""
    depth = len(teacher.model.layers)
    pieces: dict[str, tuple[list, list]] = {
        side: ([[] for _ in range(depth + 1)], [[] for _ in range(depth)]) for side in masks
    }
    at: dict[str, Tensor] = {}

    def keep(kind: int, layer: int):
        def hook(_module, args):
            for side, mask in at.items():
                pieces[side][kind][layer].append(args[0][mask.to(args[0].device)].float().cpu())

        return hook

    layers = [*teacher.model.layers, teacher.model.norm]
    handles = [module.register_forward_pre_hook(keep(0, i)) for i, module in enumerate(layers)]
    handles += [layer.mlp.down_proj.register_forward_pre_hook(keep(1, i)) for i, layer in enumerate(layers[:-1])]
    try:
        for number, batch in enumerate(tqdm(batches, desc="Recording the teacher", disable=None)):
            at.update({side: of_side[number] for side, of_side in masks.items()})
            teacher.model(input_ids=batch["sequence"], attention_mask=batch["sequence_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        side: (list(map(torch.cat, states)), list(map(torch.cat, inputs))) for side, (states, inputs) in pieces.items()
    }


def _gaps(states: list[Tensor], inputs: list[Tensor], ridge: float) -> Tensor:
    """`measure_gaps` of one side."""
    depth = len(inputs)
    gaps = torch.full((depth, depth + 1), torch.inf)
    variances = [(state - state.mean(0)).square().sum() for state in states]
    for layer, entering in enumerate(tqdm(inputs, desc="Measuring gaps", disable=None)):
        gaps[layer, layer + 1] = 0.0
        if layer + 2 > depth:
            continue
        # Ridge regression in its dual form, N x N, serves all depths above at once: with C the inverse of
        # `XX' + penalty I`, what is left of E at positions that the fit has not seen is `C E` over the diagonal of C.
        kernel = (entering @ entering.T).double()
        kernel.diagonal().add_(ridge * kernel.trace() / entering.shape[1])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel)).float()
        missing = torch.cat([state - states[layer + 1] for state in states[layer + 2 :]], dim=1)
        left = (inverse @ missing) / inverse.diagonal()[:, None]
        by_depth = left.square().sum(0).view(depth - layer - 1, -1).sum(1)
        gaps[layer, layer + 2 :] = by_depth / torch.stack(variances[layer + 2 :])
    return gaps


def step_costs(gaps: Tensor) -> Tensor:
    """`-log(1 - gap)`, at most 7: a step with nothing left of the state is as bad as one that is further off."""
    return (-torch.log((1 - gaps).clamp(min=1e-3))).where(gaps.isfinite(), torch.inf)


def decoder_path(gaps: dict[str, Tensor], count: int, merged: bool) -> tuple[list[int], float]:
    """`count` layers for the decoder, and the cost of their path.

    The only layer of a decoder that is merged with its encoder is the last, where it can read one; that costs what the
    first would, which is all that was measured.
    """
    depth = len(gaps["decoder"])
    path, cost = shortest_path(step_costs(gaps["decoder"]), count, depth)
    return [depth - 1] if merged and count == 1 else path, cost


def encoder_path(gaps: dict[str, Tensor], count: int, decoder: Sequence[int] | None) -> tuple[list[int], float]:
    """`count` layers for the encoder of a decoder that is known, and the cost of their path.

    Args:
        decoder (`Sequence[int]`, *optional*): The decoder's layers that read the state at their own depth; `None`
            where they read the last one.
    """
    top = len(gaps["encoder"]) if decoder is None else max(decoder[-1], count)
    return shortest_path(step_costs(gaps["encoder"]), count, top)
