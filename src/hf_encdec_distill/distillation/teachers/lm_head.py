"""What a language model hands its head at chosen positions, so that logits need not be made anywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class HeadInput:
    """What `catch_head_input` caught: `hidden` `[N, H]`, and `logits`, what the head made of the rows it was left.

    Both stay None where a model multiplies by the head's weight without calling the head.
    """

    hidden: Tensor | None = None
    logits: Tensor | None = None

    def is_all_of(self, output_logits: Tensor) -> bool:
        """Whether the model's logits are the head's output, if in another dtype: no scale, no soft cap after it."""
        return self.logits is not None and torch.equal(self.logits.to(output_logits.dtype), output_logits)


@contextmanager
def catch_head_input(
    head: nn.Module,
    rows: Tensor,
    columns: Tensor,
    keep: int | None = None,
    then: Callable[[HeadInput], None] | None = None,
) -> Iterator[HeadInput]:
    """While the block runs, `head` gets `[1, N, H]`, its input at `[rows, columns]`, in place of `[B, T, H]`.

    What a model does around its head (soft-capping, scaling) stays with the model, and it works for models without
    `logits_to_keep`, which also cannot pick by row.

    Args:
        head: the output embedding of the model that is about to run.
        rows, columns: `[N]` each.
        keep: how many of the N the head is left; all by default.
        then: called with what was caught while the weights of the head are whole, even where FSDP2 shards them.
    """
    caught = HeadInput()

    def pick(_module: nn.Module, args: tuple) -> tuple:
        hidden_BTH = args[0]
        caught.hidden = hidden_BTH[rows.to(hidden_BTH.device), columns.to(hidden_BTH.device)]
        return (caught.hidden[:keep].unsqueeze(0), *args[1:])

    def note(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        caught.logits = output
        if then is not None:
            then(caught)

    # Ours come between those of FSDP2: it gathers the weights in its first hook and frees them in its last.
    handles = head.register_forward_pre_hook(pick), head.register_forward_hook(note, prepend=True)
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
