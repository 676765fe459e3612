"""Differences between transformers versions that the trainer has to know, each with the condition to remove it."""

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.serialization import register_package
from transformers import TrainingArguments


def refuse_legacy_prediction_loop(args: TrainingArguments) -> None:
    """transformers 4.57 can evaluate in `Trainer.prediction_loop`, which 5.0 removed; drop this with 4.57.

    That loop would report a mean of batch means beside our token-weighted numbers.
    """
    if getattr(args, "use_legacy_prediction_loop", False):
        raise ValueError(
            "use_legacy_prediction_loop=True averages over batches, not tokens; DistillationTrainer needs it False."
        )


def let_checkpoints_load_on_many_cpu_processes() -> None:
    """There accelerate names the device "cpu:0", to which transformers 4.57 restores an optimizer's state, and
    `torch.load` knows "cpu" alone. 5.x restores to "cpu"; drop this with 4.57.
    """
    register_package(100, lambda storage: None, lambda storage, location: storage if location == "cpu:0" else None)


def let_fsdp2_generate(model: nn.Module) -> None:
    """Where FSDP2 shards a model, `generate` needs to gather what is outside of its layers, as `forward` does.
    transformers 5.x says so when training begins; drop this with 4.57.
    """
    if isinstance(model, FSDPModule) and "generate" not in vars(model):
        register_fsdp_forward_method(model, "generate")
