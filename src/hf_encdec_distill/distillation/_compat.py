"""Differences between transformers versions that the trainer has to know, each with the condition to remove it."""

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.serialization import register_package
from transformers import PreTrainedModel, TrainingArguments


try:
    from transformers.integrations.neftune import neftune_post_forward_hook  # noqa: F401
except ImportError:  # transformers 4.57, drop this with it
    from transformers.trainer_utils import (  # type: ignore[attr-defined, no-redef]  # noqa: F401  # where 4.57 has it
        neftune_post_forward_hook,
    )


def refuse_legacy_prediction_loop(args: TrainingArguments) -> None:
    """transformers 4.57 can evaluate in `Trainer.prediction_loop`, which 5.0 removed; drop this with 4.57.

    That loop would report a mean of batch means beside our token-weighted numbers.
    """
    if getattr(args, "use_legacy_prediction_loop", False):
        raise ValueError(
            "use_legacy_prediction_loop=True averages over batches, not tokens; DistillationTrainer needs it False."
        )


def take_share_of_steps(args: TrainingArguments) -> None:
    """`warmup_steps` below 1 is a share of all steps since transformers 5.0. In 4.57 that is `warmup_ratio`, and steps
    have to be an integer; drop this with 4.57.
    """
    if TrainingArguments.__dataclass_fields__["warmup_steps"].type is not int:
        return
    if 0 < args.warmup_steps < 1:
        args.warmup_ratio, args.warmup_steps = args.warmup_steps, 0  # type: ignore[attr-defined]  # where 4.57 has it
    if args.warmup_steps >= 0 and args.warmup_steps == int(args.warmup_steps):  # others are its own to refuse
        args.warmup_steps = int(args.warmup_steps)


def let_gradients_reach_adapters(model: PreTrainedModel, args: TrainingArguments) -> None:
    """A PEFT student with gradient checkpointing has only frozen parameters below its first adapter; drop with 4.57.

    transformers 4.57 checkpoints reentrantly, and then a block gets gradients only if its input has one. 5.0 does
    this itself in `gradient_checkpointing_enable`.
    """
    if args.gradient_checkpointing and hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def samples_by_length(args: TrainingArguments) -> bool:
    """Whether a sampler will ask how long rows are; `group_by_length` is a strategy since transformers 5.0."""
    by_length = ("group_by_length", "batch_rebalance")
    return getattr(args, "group_by_length", False) or getattr(args, "train_sampling_strategy", None) in by_length


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
