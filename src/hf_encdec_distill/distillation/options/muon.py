"""`optim="muon"`: Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the hidden matrices of
a student, AdamW for its embeddings, head, norms and biases."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, TrainingArguments


MUON = "muon"


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer, so that one schedule, one file in a checkpoint and
    one clipping are for both.

    Muon's updates are scaled to the size of AdamW's (J. Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both
    take the same learning rate and weight decay.

    Args:
        groups: parameters with their weight decay, as `Trainer` makes them; matrices and others may be mixed.
        others: matrices that are AdamW's all the same.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        others: Collection[nn.Parameter],
    ):
        of_muon, of_adamw = [], []
        for group in groups:
            matrices = [p for p in group["params"] if p.dim() == 2 and p not in others]
            rest = [p for p in group["params"] if p.dim() != 2 or p in others]
            of_muon.append({**group, "params": matrices, "optimizer": MUON})
            of_adamw.append({**group, "params": rest, "optimizer": "adamw"})
        self._parts = {
            MUON: torch.optim.Muon(of_muon, lr=lr, adjust_lr_fn="match_rms_adamw"),
            "adamw": AdamW(of_adamw, lr=lr, betas=betas, eps=eps, fused=True),
        }
        super().__init__([*of_muon, *of_adamw], {})  # each part has filled in its defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group that comes later, such as the projections of hidden states, is AdamW's."""
        if "optimizer" not in param_group:
            self._parts["adamw"].add_param_group(param_group | {"optimizer": "adamw"})
            param_group = self._parts["adamw"].param_groups[-1]
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # Ours are those that a schedule changes and a checkpoint restores.
            part.param_groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.state = self.state
            part.step()
        return loss


def muon_and_kwargs(args: TrainingArguments, model: PreTrainedModel) -> tuple[type[Optimizer], dict[str, Any]]:
    """What `Trainer.get_optimizer_cls_and_kwargs` returns for other values of `optim`."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    others = {parameter for module in (*tables, model.get_output_embeddings()) for parameter in module.parameters()}
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "others": others}


def check_muon() -> None:
    """Raises ValueError where the installed torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"optim='muon' is torch.optim.Muon, which torch {torch.__version__} does not have: install torch 2.9 or "
            "newer, or choose another optimizer."
        )
