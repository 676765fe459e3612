"""One module for one embedding table, where FSDP2 is going to shard the model.

torch 2.13's `fully_shard` refuses a parameter that two of its groups hold. accelerate 1.15 puts input embedding and LM
head into one group; in transformers 5 encoder and decoder of T5, BART and their kin have tied embeddings of their own.
"""

from torch import nn


def share_tied_embeddings(model: nn.Module) -> None:
    """Puts the first of the embeddings that have the same weight, and so give the same, in the place of the others."""
    first: dict[tuple, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            one = first.setdefault((id(module.weight), type(module), getattr(module, "embed_scale", None)), module)
            if one is not module:
                model.set_submodule(name, one)
