"""Tied weights where FSDP2 shards the model: one module for one table, and one copy of it in a saved student.

torch 2.13's `fully_shard` refuses a parameter that two of its groups hold. accelerate 1.15 puts input embedding and LM
head into one group; in transformers 5 encoder and decoder of T5, BART and their kin have tied embeddings of their own.
"""

from torch import Tensor, nn


def share_tied_embeddings(model: nn.Module) -> None:
    """Puts the first of the embeddings that have the same weight, and so give the same, in the place of the others."""
    first: dict[tuple, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            one = first.setdefault((id(module.weight), type(module), getattr(module, "embed_scale", None)), module)
            if one is not module:
                model.set_submodule(name, one)


def share_tied_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict`, gathered from shards one name at a time, with a single tensor for all names of a parameter:
    `save_pretrained` writes those once.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: state_dict[names.get(name, name)] for name in state_dict}
