"""`DistillationTrainingArguments`: `Seq2SeqTrainingArguments` and what distillation adds to them."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..models.prompts import check_template
from ._compat import take_share_of_steps
from .alignment.vocabularies import VOCAB_POLICIES, check_vocab_policy
from .losses import DIVERGENCES, HIDDEN_STATE_LOSSES
from .options.fake_quantization import QAT
from .options.muon import MUON, check_muon


logger = logging.get_logger(__name__)

TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
TEACHER_QUANTIZATIONS = ("8bit", "4bit")
_CUT_BATCHES = ("split_batches", "dispatch_batches")  # of accelerate: one process makes them for all


_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_NOT_NEGATIVE = (lambda value: 0 <= value < float("inf"), "a finite number, at least 0")
_STEPS = (lambda value: value >= 0, "at least 0")
_STEPS_OR_SHARE = (_NOT_NEGATIVE[0], "a number of steps, or a share of them below 1")
_LAYERS = (lambda value: value is None or value >= 1, "at least 1, or None for all")
# What holds for a number, and the same in words.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "distill_weight": _SHARE,
    "distill_temperature": (lambda value: 0 < value < float("inf"), "a finite number above 0"),
    "jsd_beta": (
        lambda value: 0 < value < 1,
        "strictly between 0 and 1 (at the ends the divergence vanishes: use forward_kl in place of 0, reverse_kl in "
        "place of 1)",
    ),
    "skew_alpha": (
        lambda value: 0 <= value < 1,
        "at least 0 and below 1 (at 1 the divergence is 0 for every student)",
    ),
    "hidden_state_weight": _NOT_NEGATIVE,
    "on_policy_fraction": _SHARE,
    "on_policy_warmup_steps": _NOT_NEGATIVE,
    "replay_fraction": _SHARE,
    "replay_buffer_size": _NOT_NEGATIVE,
    "sampling_temperature": _NOT_NEGATIVE,
    "unfreeze_encoder_after": _STEPS_OR_SHARE,
    "train_projector_first": _STEPS_OR_SHARE,
    "cross_attention_warmup_steps": _NOT_NEGATIVE,
    "progressive_depth_steps": _STEPS,
    "final_encoder_layers": _LAYERS,
    "final_decoder_layers": _LAYERS,
    "bidirectional_warmup_steps": _STEPS,
    "loss_chunk_size": (lambda value: value >= 1, "at least 1"),
    "max_source_length": (lambda value: value is None or value >= 2, "at least 2, or None for no cut"),
    "max_target_length": (lambda value: value is None or value >= 1, "at least 1, or None for no cut"),
}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "divergence": tuple(DIVERGENCES),
    "teacher_dtype": (*TEACHER_DTYPES, None),
    "teacher_quantization": (*TEACHER_QUANTIZATIONS, None),
    "hidden_state_loss": tuple(HIDDEN_STATE_LOSSES),
    "qat": (*QAT, None),
}


@dataclass
class DistillationTrainingArguments(Seq2SeqTrainingArguments):
    """Arguments of `DistillationTrainer`, all those of `Seq2SeqTrainingArguments` among them.

    The loss is `distill_weight * distill_temperature**2 * divergence + (1 - distill_weight) * cross-entropy`, each a
    mean over the target tokens of the whole accumulated, distributed batch; `hidden_state_weight` adds a third.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and what is allowed.
    """

    # Parsed by the base class where it comes from a command line.
    _VALID_DICT_FIELDS = [*Seq2SeqTrainingArguments._VALID_DICT_FIELDS, "hidden_state_layers"]

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence between the teacher's and the student's distributions.",
            "choices": list(DIVERGENCES),
        },
    )
    distill_weight: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the divergence in the loss, 0 to 1; the rest is cross-entropy on the labels. At 0 the "
            "teacher runs in evaluation only."
        },
    )
    distill_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of student and teacher in the divergence; above 0. The cross-entropy always has "
            "temperature 1."
        },
    )
    jsd_beta: float = field(
        default=0.5,
        metadata={
            "help": "generalized_jsd mixes jsd_beta * teacher + (1 - jsd_beta) * student; strictly between 0 and 1."
        },
    )
    skew_alpha: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the first distribution in the mixture of skew_kl (teacher) and skew_reverse_kl "
            "(student); at least 0 and below 1."
        },
    )
    hidden_state_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a loss on the distance between the student's decoder states and the teacher's at the "
            "target tokens, through learned projections. Above 0, it needs a live teacher and an unsharded student."
        },
    )
    hidden_state_loss: str = field(
        default="mse",
        metadata={
            "help": "Distance of hidden states: mse, or cosine (1 - cosine similarity).",
            "choices": list(HIDDEN_STATE_LOSSES),
        },
    )
    hidden_state_layers: dict | str | None = field(
        default=None,
        metadata={
            "help": "Which layers to compare, as {\"student's\": teacher's}, numbered as in hidden_states: 0 is the "
            "embedding, 1 the output of the first layer. By default evenly spaced, the last with the last."
        },
    )
    on_policy_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of steps, 0 to 1, with targets that the student generates; the teacher scores them, "
            "and the loss of such a step is distill_weight * distill_temperature**2 * divergence alone."
        },
    )
    on_policy_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which on_policy_fraction rises linearly from 0."}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature at which the student generates targets; 0 is greedy."}
    )
    replay_buffer_size: int = field(
        default=0, metadata={"help": "Number of batches of generated targets to keep per process."}
    )
    replay_fraction: float = field(
        default=0.0,
        metadata={"help": "Fraction of on-policy steps, 0 to 1, that reuse a batch from the replay buffer."},
    )
    freeze_encoder: bool = field(
        default=False,
        metadata={
            "help": "Train the decoder alone. The encoder is frozen with its embedding, and so is an LM head that is "
            "tied to the embedding."
        },
    )
    freeze_prompt_keys: bool = field(
        default=False,
        metadata={
            "help": "Of a merged student, leave the projections that make the prompt's keys and values as they are "
            "wherever an encoder layer and a decoder layer have them in common: a gguf export computes these keys and "
            "values once."
        },
    )
    unfreeze_encoder_after: float = field(
        default=0.0,
        metadata={
            "help": "With freeze_encoder, train the encoder too after this many steps or, below 1, this share of all "
            "steps; 0 keeps it frozen."
        },
    )
    train_projector_first: float = field(
        default=0.0,
        metadata={
            "help": "Of a student that reads images, train the projector alone in this many steps or, below 1, this "
            "share of all steps; then all else too, but what freeze_encoder freezes. The projector is then trained to "
            "the end, with freeze_encoder too."
        },
    )
    encoder_states: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which freeze_encoder keeps the encoder's states of each row, in float16: the encoder, "
            "without its dropout, reads a row once, and later steps read the folder instead."
        },
    )
    cross_attention_warmup_steps: int = field(
        default=0,
        metadata={"help": "Steps at the start in which only the cross-attentions and their norms are trained."},
    )
    progressive_depth_steps: int = field(
        default=0,
        metadata={
            "help": "Remove one layer of the student every this many steps, the one whose removal raises the loss "
            "least, until final_encoder_layers and final_decoder_layers are left; 0 removes none."
        },
    )
    final_encoder_layers: int | None = field(
        default=None, metadata={"help": "Encoder layers that progressive_depth_steps leaves; by default all."}
    )
    final_decoder_layers: int | None = field(
        default=None, metadata={"help": "Decoder layers that progressive_depth_steps leaves; by default all."}
    )
    bidirectional_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which a causal encoder becomes bidirectional: the weight of later tokens in its "
            "attention rises linearly from 0 to 1. 0 does not change the encoder."
        },
    )
    qat: str | None = field(
        default=None,
        metadata={
            "help": "Quantization-aware training: round linear layers and embeddings to 4 bits in every forward pass, "
            "so that the exported student loses little. 'int4': as `export --variant int4` to ONNX and OpenVINO. "
            "'q4_0': as llama.cpp. The saved weights are not rounded.",
            "choices": list(QAT),
        },
    )
    warmup_steps: float = field(
        default=0,
        metadata={
            "help": "Steps in which the learning rate rises from 0 to its peak; below 1, a share of all steps: 0.05 "
            "is the first twentieth of however many there are."
        },
    )
    optim: str | None = field(  # type: ignore[assignment]  # the base class has an enum
        default=None,
        metadata={
            "help": "Optimizer: any that transformers knows by name, by default its AdamW, or 'muon': Muon for hidden "
            "matrices and AdamW for all other weights, with one learning rate."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Make training batches of rows of similar length with at most this many tokens each (source, "
            "target and padding), in place of per_device_train_batch_size rows."
        },
    )
    vocab_policy: str = field(
        default="mask_padding",
        metadata={
            "help": "How to compare two vocabularies. 'mask_padding': by id; ids that only one side has get "
            "probability 0 in the divergence. 'strict': by id; such ids are an error. 'id_map': by token, for a "
            "student with a trimmed vocabulary. 'universal': for different tokenizers; the divergence is then a "
            "distance between sorted probabilities where both tokenizers split the target's text at the same place "
            "(arXiv 2402.12030).",
            "choices": list(VOCAB_POLICIES),
        },
    )
    loss_chunk_size: int = field(
        default=128,
        metadata={
            "help": "Target tokens whose logits are in memory at once. A batch with more than four times as many "
            "computes its training loss in chunks, each with its backward pass before the next: the same result in a "
            "fraction of the memory. With DeepSpeed, torch.compile, or a model that changes the output of its head, "
            "all logits are in memory."
        },
    )
    max_source_length: int | None = field(
        default=None,
        metadata={
            "help": "Truncate the source text so that the student's input, and the teacher's whole prompt, have at "
            "most this many tokens. By default nothing is truncated."
        },
    )
    max_target_length: int | None = field(
        default=None,
        metadata={
            "help": "Truncate target texts to this many tokens. A truncated target does not end in EOS, since the "
            "text did not end there. By default nothing is truncated."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The teacher's prompt, with {source} where the text goes. By default the teacher's chat "
            "template, or the bare source if it has none."
        },
    )
    prompt_date: str | None = field(
        default=None,
        metadata={
            "help": "The date (YYYY-MM-DD) for a chat template that contains one. By default that of the student "
            "(config.prompt_date), of the cache, or today."
        },
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The teacher's dtype, independent of bf16/fp16 training. By default a loaded teacher keeps its "
            "dtype, and a path or Hub id is loaded in its checkpoint's dtype.",
            "choices": list(TEACHER_DTYPES),
        },
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the teacher's path or Hub id in 8 bit (LLM.int8) or 4 bit (NF4) with bitsandbytes. For "
            "other quantizations, load the teacher yourself and pass the model.",
            "choices": list(TEACHER_QUANTIZATIONS),
        },
    )
    source_column: str = field(default="source", metadata={"help": "Column with the source text."})
    target_column: str = field(default="target", metadata={"help": "Column with the target text."})

    def __post_init__(self):
        optim = Seq2SeqTrainingArguments.optim if self.optim is None else self.optim
        if optim == MUON:
            check_muon()
        take_share_of_steps(self)
        self.optim = OptimizerNames.ADAMW_TORCH if optim == MUON else optim  # the base class knows no Muon
        super().__post_init__()
        if optim == MUON:
            self.optim = MUON
        check_training_arguments(self)
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(choice for choice in allowed if choice is not None)
                raise ValueError(f"{name}={value!r} is unknown; choose one of {choices}.")
        for name, (holds, expected) in _RANGES.items():
            _within(name, getattr(self, name), holds(getattr(self, name)), expected)
        check_vocab_policy(self.vocab_policy)
        if self.hidden_state_layers is not None:
            self.hidden_state_layers = _layer_map(self.hidden_state_layers)
        if self.encoder_states is not None:
            self.encoder_states = os.path.expanduser(self.encoder_states)  # as the base class does with its folders
        if self.prompt_template is not None:
            check_template(self.prompt_template)
        if self.max_tokens_per_batch is not None:
            _check_token_batches(self)
        self._check_teacher_and_policy()
        self._check_schedules()
        self._check_frozen_parts()
        if self.source_column == self.target_column:
            raise ValueError(
                f"source_column and target_column are both {self.source_column!r}; name two different columns."
            )

    def _check_teacher_and_policy(self) -> None:
        """Raises ValueError where what teaches does not go with what the student reads."""
        if self.qat is not None and (self.fp16_full_eval or self.bf16_full_eval):
            raise ValueError(
                f"qat={self.qat!r} with {'bf16' if self.bf16_full_eval else 'fp16'}_full_eval=True, which casts "
                "the weights while they are rounded: leave it out."
            )
        if self.on_policy_fraction > 0 and self.distill_weight == 0:
            raise ValueError(
                f"on_policy_fraction={self.on_policy_fraction} with distill_weight=0: the student's own targets teach "
                "nothing without the teacher. Raise distill_weight."
            )
        if self.replay_fraction > 0 and not (self.replay_buffer_size and self.on_policy_fraction):
            raise ValueError(
                f"replay_fraction={self.replay_fraction} needs replay_buffer_size and on_policy_fraction above 0, got "
                f"{self.replay_buffer_size} and {self.on_policy_fraction}."
            )
        if self.vocab_policy != "universal":
            return
        if self.divergence != "forward_kl":
            raise ValueError(
                f"divergence={self.divergence!r} with vocab_policy='universal', which has a distance of its own "
                "(sorted probabilities, L1): leave divergence out."
            )
        if self.on_policy_fraction > 0:
            raise ValueError(
                f"on_policy_fraction={self.on_policy_fraction} with vocab_policy='universal': where the teacher would "
                "cut what the student is going to write is not known in a batch. Set it to 0."
            )
        if self.hidden_state_weight > 0:
            raise ValueError(
                f"hidden_state_weight={self.hidden_state_weight} with vocab_policy='universal': student and teacher "
                "read other tokens, so that no state of the one stands where one of the other does. Set it to 0."
            )

    def _check_schedules(self) -> None:
        """Raises ValueError where a schedule lacks its goal, or two of them meet."""
        final = (self.final_encoder_layers, self.final_decoder_layers)
        if bool(self.progressive_depth_steps) == (final == (None, None)):
            raise ValueError(
                f"progressive_depth_steps={self.progressive_depth_steps} with final_encoder_layers={final[0]} and "
                f"final_decoder_layers={final[1]}: set the steps and at least one of the others, or none of the three."
            )
        for name in ("unfreeze_encoder_after", "train_projector_first"):
            if getattr(self, name) > 0 and self.progressive_depth_steps > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} with progressive_depth_steps={self.progressive_depth_steps}, which "
                    "may take out what is to be trained. Leave one of them out."
                )
        first, later = self.train_projector_first, self.unfreeze_encoder_after
        if 0 < later < first and (later < 1) == (first < 1):
            raise ValueError(
                f"unfreeze_encoder_after={later} with train_projector_first={first}: the encoder would be trained "
                "before the decoder. Give unfreeze_encoder_after more steps."
            )

    def _check_frozen_parts(self) -> None:
        """Raises ValueError where what is frozen would change; sets the checkpointing that gradients pass."""
        for name in ("unfreeze_encoder_after", "encoder_states"):
            if getattr(self, name) and not self.freeze_encoder:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} without freeze_encoder: the encoder is trained from the first "
                    "step. Set freeze_encoder=True, or leave it out."
                )
        for name in ("encoder_states", "cross_attention_warmup_steps"):
            if self.train_projector_first > 0 and getattr(self, name):
                raise ValueError(
                    f"train_projector_first={self.train_projector_first} with {name}={getattr(self, name)!r}: the "
                    "projector, which the encoder reads through, is trained from the first step. Leave one of them "
                    "out."
                )
        for name in ("neftune_noise_alpha", "bidirectional_warmup_steps"):
            if self.encoder_states is not None and getattr(self, name):
                raise ValueError(
                    f"encoder_states={self.encoder_states!r} with {name}={getattr(self, name)}, with which the "
                    "encoder's states of a row change from step to step. Leave one of them out."
                )
        frozen = "freeze_encoder" if self.freeze_encoder else "train_projector_first"
        if getattr(self, frozen) and self.gradient_checkpointing:
            given = cast(dict, self.gradient_checkpointing_kwargs or {})  # the base class has parsed it
            self.gradient_checkpointing_kwargs = {"use_reentrant": False, **given}
            if given.get("use_reentrant"):
                raise ValueError(
                    f"use_reentrant=True in gradient_checkpointing_kwargs with {frozen}={getattr(self, frozen)}: the "
                    "first decoder layer reads a frozen embedding, and reentrant checkpointing would give it no "
                    "gradient. Set it to False, or leave it out."
                )

    def __getstate__(self) -> dict:
        return _without_tokens(self)


_OF_BASE = {spec.name for spec in dataclasses.fields(Seq2SeqTrainingArguments)}
# What distillation adds, each field with its default.
OWN_FIELDS = {
    spec.name: spec.default for spec in dataclasses.fields(DistillationTrainingArguments) if spec.name not in _OF_BASE
}


def keep_tokens_out_of_pickles(cls: type[TrainingArguments]) -> None:
    """The same for a class of transformers: a trainer pickles its arguments beside each checkpoint, and pushes them.

    No token of the Hub is in that file then; nor has a copy of the arguments one.
    """
    cls.__getstate__ = _without_tokens  # type: ignore[attr-defined]  # new before 3.11


def _without_tokens(args: TrainingArguments) -> dict:
    # transformers 4.57 has the second too, under its older name.
    return {name: value for name, value in vars(args).items() if name not in ("hub_token", "push_to_hub_token")}


def check_training_arguments(args: TrainingArguments) -> None:
    """Raises ValueError for what transformers takes, and stumbles over once data and models are loaded."""
    steps, epochs, smoothing = args.gradient_accumulation_steps, args.num_train_epochs, args.label_smoothing_factor
    _within("gradient_accumulation_steps", steps, steps >= 1, "1 or more")
    _within("num_train_epochs", epochs, abs(epochs) < float("inf"), "a finite number")
    _within("label_smoothing_factor", smoothing, 0 <= smoothing <= 1, "between 0 and 1")
    noise = args.neftune_noise_alpha
    _within("neftune_noise_alpha", noise, noise is None or 0 <= noise < float("inf"), "a finite number, at least 0")
    kind, kwargs = args.lr_scheduler_type, args.lr_scheduler_kwargs
    if not (kwargs is None or isinstance(kwargs, dict)):
        raise ValueError(f'lr_scheduler_kwargs={kwargs!r} has to be a mapping, as {{"power": 2}}.')
    try:
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, 1, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={kwargs!r} do not go with {SchedulerType(kind).value!r}: {error}"
        ) from error
    available = get_available_reporting_integrations()
    for name in args.report_to or ():
        if name not in available:
            raise ValueError(
                f"report_to={name!r} is unknown or not installed here (there is {', '.join(available) or 'none'}): "
                "install its package, or give report_to none."
            )


def with_distillation_defaults(args: TrainingArguments) -> DistillationTrainingArguments:
    """Gives plain `Seq2SeqTrainingArguments` the fields of `DistillationTrainingArguments` at their defaults.

    In place, so that a script that swaps only the trainer class keeps its own object and its own subclass of it.
    """
    if isinstance(args, DistillationTrainingArguments):
        return args
    check_training_arguments(args)
    keep_tokens_out_of_pickles(type(args))
    added = {}
    for spec in dataclasses.fields(DistillationTrainingArguments):
        if not hasattr(args, spec.name):
            added[spec.name] = spec.default
            setattr(args, spec.name, spec.default)
    logger.warning(
        f"{type(args).__name__} has no distillation fields; using the defaults of DistillationTrainingArguments: "
        + ", ".join(f"{name}={value!r}" for name, value in added.items())
    )
    return cast(DistillationTrainingArguments, args)  # all but the class of one


def steps_in_backward(args: TrainingArguments) -> bool:
    """Whether the optimizer updates weights in their backward, so that nobody else ever sees their gradients."""
    return any(kind in args.optim for kind in ("layerwise", "lomo"))


def _check_token_batches(args: DistillationTrainingArguments) -> None:
    """Raises ValueError where `max_tokens_per_batch` is out of range, or something else decides on the batches."""
    limit = args.max_tokens_per_batch
    assert limit is not None
    _within("max_tokens_per_batch", limit, limit >= 1, "at least 1, or None for batches by rows")
    strategy, accelerator = getattr(args, "train_sampling_strategy", "random"), args.accelerator_config
    for name, value, agrees in (
        ("auto_find_batch_size", args.auto_find_batch_size, not args.auto_find_batch_size),
        ("train_sampling_strategy", strategy, strategy in ("random", "group_by_length")),
        *((name, getattr(accelerator, name), not getattr(accelerator, name)) for name in _CUT_BATCHES),
    ):
        if not agrees:
            raise ValueError(
                f"max_tokens_per_batch={limit} with {name}={value!r}, which makes batches in another way: leave one "
                "of them out."
            )


def _layer_map(layers) -> dict[int, int]:
    # JSON, which arguments are saved as, has no numbers as keys.
    try:
        return {int(ours): int(theirs) for ours, theirs in layers.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"hidden_state_layers={layers!r}: give a mapping of layers of the student's decoder to layers of the "
            'teacher, as {1: 5, 2: 10}, or \'{"1": 5, "2": 10}\' on a command line.'
        ) from None


def _within(name: str, value, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} is out of range; it has to be {expected}.")
