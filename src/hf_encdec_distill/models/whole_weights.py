"""Models that every process of a distributed run has to have whole: a teacher, and what a student is made of.

Where FSDP or ZeRO-3 is going to shard the model to train, `from_pretrained` saves memory: with FSDP's
`cpu_ram_efficient_loading` only the first process of a machine reads weights, with ZeRO-3 each process keeps its part.
That is right for a student, which is wrapped and filled afterwards. Nobody wraps a teacher.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations import deepspeed


_FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # asked by transformers.modeling_utils, 4.57 and 5.24


@contextmanager
def whole_on_each_process() -> Iterator[None]:
    """Inside, `from_pretrained` gives each process all weights, whatever is said about the model to train."""
    fsdp, zero3 = os.environ.pop(_FSDP, None), deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if fsdp is not None:
            os.environ[_FSDP] = fsdp


def check_same_on_each_process(model: nn.Module, accelerator: Accelerator) -> None:
    """Compares the norm of each parameter.

    Raises:
        ValueError: on every process, if any process has other weights than the first, or none.
    """
    if accelerator.num_processes == 1:
        return
    names, parameters = zip(*model.named_parameters(), strict=True)
    norms = torch.tensor([_norm(parameter) for parameter in parameters], device=accelerator.device)
    norms_PN = accelerator.gather(norms[None])
    # Devices of several kinds sum in several orders; NaN is close to nothing.
    wrong = (~torch.isclose(norms_PN, norms_PN[0], rtol=1e-3)).nonzero().tolist()
    if wrong:
        process, number = wrong[0]
        raise ValueError(
            f"the teacher of process {process} has not got the weights that process 0 has, {names[number]!r} among "
            "them: drawn at random, or divided among processes as those of a student are. Give the teacher's folder "
            "or Hub id, or load it before the training arguments are made."
        )


def _norm(parameter: Tensor) -> float:
    if parameter.is_meta or not parameter.numel():  # with FSDP and ZeRO-3
        return math.nan
    return torch.linalg.vector_norm(parameter.detach().float()).item()
