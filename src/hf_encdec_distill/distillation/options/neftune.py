"""NEFTune's noise (arXiv 2310.05914) for encoder-decoders whose sides have embeddings of their own on one table."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from .._compat import neftune_post_forward_hook


@contextmanager
def noise_on_tied_embeddings(model: PreTrainedModel, alpha: float | None) -> Iterator[None]:
    """While the block runs, `Trainer`'s noise also on embeddings that are tied to the one `Trainer` puts it on.

    `get_input_embeddings` of BART, and of T5 in transformers 5, is a table that no forward ever calls: encoder and
    decoder have modules of their own with its weight, and without this the noise would be nowhere.

    Args:
        alpha: `neftune_noise_alpha`; None for no noise.
    """
    found = model.get_input_embeddings() if alpha is not None else None
    table = getattr(found, "weight", None)
    own = set() if found is None else set(found.modules())
    tied = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in own and m.weight is table]
    handles = [module.register_forward_hook(neftune_post_forward_hook) for module in tied]
    for module in tied:
        module.neftune_noise_alpha = alpha  # type: ignore[assignment]  # torch's own annotation
    try:
        yield
    finally:
        for module, handle in zip(tied, handles, strict=True):
            handle.remove()
            del module.neftune_noise_alpha
