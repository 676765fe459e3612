"""MLPs with some of their neurons: a row of `up_proj`, and of `gate_proj`, and a column of `down_proj` each.

Which neurons stay is said by what they write, as in Minitron (arXiv 2407.14679), or, where `down_proj` is fitted
afterwards, by what the fit cannot make up for: optimal brain surgeon, with a neuron in the place of a weight, as in
ZipLM (arXiv 2302.04089).

Shapes: W neurons, H hidden size.
"""

import torch
from torch import Tensor, nn


_ROUNDS = 24  # in which neurons go, chosen again in each


@torch.no_grad()
def narrow_decoder(student, width: int, batches: list[dict]) -> None:
    """Leave each MLP of a student's decoder the `width` neurons that write most, in place.

    Args:
        student ([`RopeEncDecForConditionalGeneration`]): Its config says the new width then.
        width (`int`): At most what there is.
        batches (`list[dict]`): From `calibration_batches`. A neuron writes its mean square on target positions times
            the squared norm of its column of `down_proj`; where there is no batch, the product of the norms of its
            weights is taken.
    """
    mlps = [layer.mlp for layer in student.model.decoder.layers]
    squares: dict[nn.Module, Tensor] = {}

    def note(down_proj, args):
        squares[down_proj] = squares.get(down_proj, 0) + args[0][at].float().square().sum(0)

    handles = [mlp.down_proj.register_forward_pre_hook(note) for mlp in mlps]
    for batch in batches:
        at = batch["target_mask"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        student.model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    for mlp in mlps:
        score = mlp.down_proj.weight.float().norm(dim=0)
        if batches:
            score = score.square() * squares[mlp.down_proj]
        else:
            for linear in _made_by(mlp):
                score = score * linear.weight.float().norm(dim=1)
        keep_neurons(mlp, score.argsort(descending=True, stable=True)[:width].sort().values)
    student.config.decoder_intermediate_size = width


def neurons_to_keep(hessian: Tensor, weight: Tensor, count: int) -> Tensor:
    """The neurons without which a least-squares problem gets worse least, once all that stay are fitted again.

    Without neuron i the error is larger by `|weight[i]|^2 / inverse(hessian)[i, i]`. The least go first, a few at a
    time, and what stays is fitted to their absence before the next are chosen.

    Args:
        hessian (`Tensor`): `(W, W)` in float64, X'X and the penalty.
        weight (`Tensor`): `(W, H)` in float64, the solution with all neurons.
        count (`int`): How many stay.

    Returns:
        `Tensor`: Their indices, ascending.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    kept = torch.arange(len(weight), device=weight.device)
    at_once = max(1, len(weight) // _ROUNDS)
    while len(kept) > count:
        errors = weight.square().sum(1) / inverse.diagonal()
        order = errors.argsort(stable=True)
        going = min(at_once, len(kept) - count)
        gone, stay = order[:going], order[going:].sort().values
        lost = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight = weight[stay] - lost[:, stay].T @ weight[gone]
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ lost[:, stay]
        kept = kept[stay]
    return kept


@torch.no_grad()
def keep_neurons(mlp, kept: Tensor) -> None:
    """Leave an MLP of ours these neurons, in place; its parameters are new ones, and the old ones stay as they are."""
    for linear in _made_by(mlp):
        for name, parameter in list(linear.named_parameters()):
            _replace(linear, name, parameter, 0, kept)
        linear.out_features = len(kept)
    _replace(mlp.down_proj, "weight", mlp.down_proj.weight, 1, kept)
    mlp.down_proj.in_features = len(kept)


def _made_by(mlp) -> list[nn.Linear]:
    """The projections whose rows are the neurons."""
    return [mlp.gate_proj, mlp.up_proj] if mlp.gated else [mlp.up_proj]


def _replace(module: nn.Module, name: str, parameter: nn.Parameter, dim: int, kept: Tensor) -> None:
    part = parameter.index_select(dim, kept.to(parameter.device))
    setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
