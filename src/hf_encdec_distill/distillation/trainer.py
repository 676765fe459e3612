"""`DistillationTrainer`: a `Seq2SeqTrainer` whose loss also follows a teacher."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import CONFIG_NAME, logging

from ..models.families import is_merged, merged_start_token_id
from ..models.loading import reads_images
from ..models.prompts import (
    PreTrainedTokenizerFast,
    frozen_prompt_date,
    reads_bare_source,
    with_prompt_as_chat_template,
)
from ..models.tied import share_tied_embeddings
from ..models.whole_weights import check_same_on_each_process
from ._compat import (
    let_checkpoints_load_on_many_cpu_processes,
    let_fsdp2_generate,
    let_gradients_reach_adapters,
    refuse_legacy_prediction_loop,
)
from .alignment.positions import (
    IGNORED,
    OF_TEACHER,
    TEACHER_COLUMNS,
    asked_positions,
    target_positions,
    teacher_images,
    with_teacher_inputs,
)
from .alignment.tokenizers import tokenizer_beside, tokenizer_with_prompt
from .alignment.vocabularies import SharedVocabulary, vocab_size
from .arguments import DistillationTrainingArguments, steps_in_backward, with_distillation_defaults
from .checks.empty_targets import EmptyTargets
from .checks.finite_training import FiniteTraining, explain_loss
from .checks.lengths import row_sizes, with_lengths
from .checks.limits import check_length, max_positions
from .checks.packing import refuse_packed
from .checks.trials import check_trial, default_objective, own_fields
from .collator import MESSAGES, DistillationCollator, tokenizer_of
from .decoder_only_student import (
    answers_alone,
    columns_from_right,
    is_decoder_only,
    logits_of_labels,
    refuse_encoder_options,
    refuse_prompt_learning,
    sequence_inputs,
)
from .images import let_processes_have_no_image, read_streams_in_each_process
from .losses import cross_entropy, select_divergence, token_mean, universal_logit_distance
from .options.asked_ahead import AskedAhead, RemembersLast
from .options.chunked_logits import ChunkedLogits, logits_of
from .options.cross_attention_warmup import check_cross_attention_warmup, keep_cross_attention_gradients
from .options.encoder_states import EncoderStates
from .options.fake_quantization import fake_quantized
from .options.frozen_encoder import (
    Unfreeze,
    freeze,
    freeze_encoder,
    freeze_prompt_keys,
    tell_of_frozen_encoder,
    unfrozen,
)
from .options.hidden_states import HiddenStateTraining, catch_hidden_states
from .options.muon import MUON, muon_and_kwargs
from .options.neftune import noise_on_tied_embeddings
from .options.projector_first import UnfreezeBehindProjector, projector_parameters
from .options.rollouts import OnPolicy, as_it_was
from .options.schedules import EncoderAnnealing, ProgressiveDepth
from .options.shared_prompt import SharedPrompt
from .options.token_batches import TokenBatches
from .saving import SavesForBothVersions
from .teachers.live import LiveTeacher
from .teachers.recorded import CachedTeacher, is_cache
from .teachers.served import ServedTeacher, is_served
from .teachers.signal import PartialScores, TeacherScores
from .teachers.targets import end_tokens


if TYPE_CHECKING:
    from .teachers.live import GenerativeModel

logger = logging.get_logger(__name__)

# What a loader of batches by tokens takes over from that of batches by rows.
_KEPT_OF_A_LOADER = (
    "dataset",
    "collate_fn",
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "prefetch_factor",
    "worker_init_fn",
    "multiprocessing_context",
)

let_checkpoints_load_on_many_cpu_processes()


class DistillationTrainer(SavesForBothVersions, HiddenStateTraining, FiniteTraining, Seq2SeqTrainer):
    """Trains a student on labels and on a decoder-only teacher's distribution over each target token.

    The student is an encoder-decoder or a decoder-only model. Both are given the same rows, a prompt and a target; a
    decoder-only student reads them in one, as its teacher does. Predictions are in either case about the labels: the
    logits that `compute_metrics` gets, and generated tokens, are without the prompt.

    loss = `distill_weight * T**2 * divergence + (1 - distill_weight) * cross-entropy
    + hidden_state_weight * hidden_state_loss`, T being `distill_temperature`.
    All are sums over target tokens (labels that are not -100) divided by the number of target tokens of the whole
    accumulated, distributed batch, so that the loss does not depend on how a batch is cut up.

    The last term, off by default, is the distance of the student's decoder states, linearly projected, from the
    teacher's, a mean over `hidden_state_layers` (`hidden_states`). The projections are trained with the student and
    are in its checkpoints, never in its weights.

    Of a share of steps, `on_policy_fraction`, the student writes the targets itself (`rollouts`); their loss has no
    cross-entropy.

    Logs `loss`, `ce_loss`, `distill_loss` (with its T**2) and `hidden_state_loss` (`loss` is their weighted sum, and
    `ce_loss` a mean over the steps that are not on-policy) in training, and in evaluation, each with `eval_` in front,
    also `eval_teacher_agreement`, the share of target tokens where student and teacher put the same id first. All
    evaluation numbers are means over the target tokens of the whole set, whatever the batch size or the number of
    processes. What a subclass's `compute_loss` makes of the loss is in `eval_loss` too.

    Where `teacher_label_positions` say that the teacher is not asked about a label, its divergence and the distance of
    its states are 0, and all terms remain means over all target tokens. The agreement is a share of those that the
    teacher was asked about.

    With `vocab_policy="universal"` the divergence is `losses.universal_logit_distance`, and evaluation reports
    `eval_teacher_asked`, the share of target tokens with a divergence, in place of the agreement.

    Takes what `Seq2SeqTrainer` takes, in the same order, so that a script only swaps the class and names a teacher.
    Plain `Seq2SeqTrainingArguments` are given the distillation fields at their defaults.

    Args:
        model: any `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM` model.
        args: `DistillationTrainingArguments`.
        data_collator: pads ready rows; text rows are encoded before it sees them. See `DistillationCollator`.
        processing_class: the student's tokenizer; `model.tokenizer` where the model brings one. A merged student keeps
            its own, which has the prompt template built in, where this one has the same tokens without a template, as
            the teacher's has.
        teacher: a causal language model, perhaps one that sees (it is frozen in place), a folder or a Hub id; or the
            folder of a cache that `capture` made of one, or `hf://datasets/user/name`, and then no teacher is in
            memory; or a `ServedTeacher`, or the address of a server for one (`http://...`).
        teacher_processing_class: the teacher's tokenizer; by default the one at the teacher's path, and if there is
            none, the student's. For a server the one found under the name of its model.

    Raises:
        ValueError: no teacher, one that shares parameters with the student, tokenizers that disagree, or a
            `compute_loss_func` (this class computes the loss: override `compute_loss`).
    """

    # What the base class leaves open. Arguments of another class have all fields of these; a wrapped model, such as
    # PEFT's, passes on what it is asked.
    args: DistillationTrainingArguments
    model: "GenerativeModel"
    data_collator: DistillationCollator
    teacher: LiveTeacher | CachedTeacher | ServedTeacher
    _signature_columns: list[str] | None  # type: ignore[assignment]  # base: None
    waiting_parameters: Mapping[str, Sequence[nn.Parameter]] = {}  # by the option that says when they are trained

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *remaining,
        teacher: "PreTrainedModel | nn.Module | ServedTeacher | str | os.PathLike | None" = None,
        teacher_processing_class=None,
        **kwargs,
    ):
        args = with_distillation_defaults(args or DistillationTrainingArguments(output_dir="tmp_trainer"))
        refuse_legacy_prediction_loop(args)
        if teacher is None:
            raise ValueError(
                "DistillationTrainer needs teacher=: a causal language model, a folder or a Hub id. To train on "
                "labels alone use Seq2SeqTrainer."
            )
        if processing_class is None:
            processing_class = kwargs.pop("tokenizer", getattr(model, "tokenizer", None))
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, *remaining, **kwargs
        )
        if self.processing_class is None and self.model_init is not None:
            self.processing_class = getattr(self.model, "tokenizer", None)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would replace the distillation loss; leave it out, or override compute_loss."
            )
        # The loss is already divided by the tokens of the whole step, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False  # as transformers 5 takes that of a decoder-only model to do
        # Smoothing is part of our cross-entropy; the base class would put its own loss in place of ours.
        self.label_smoother = None
        self._check_options(self.model)
        if self.model_init is None:
            self.waiting_parameters = self._freeze(self.model)
        if self.is_fsdp_enabled:
            share_tied_embeddings(self.model)
        self._set_up_teacher(teacher, teacher_processing_class)
        self._set_up_prompt()
        self.data_collator = self._collator(data_collator)
        self._set_up_options()
        self._chunked_logits = ChunkedLogits(self)
        self._on_own_targets = False
        self._empty_targets = EmptyTargets()
        self._train_sums: dict[str, Tensor] = {}
        self._train_steps: Counter[str] = Counter()
        self._eval_sums: dict[str, Tensor] | None = None
        self._last_evaluated: tuple[Tensor, Tensor] | None = None

    # --- setting up ---

    def _check_options(self, model: "GenerativeModel") -> None:
        if getattr(model.config.get_text_config(decoder=True), "output_router_logits", False):
            raise ValueError(
                "the student's config has output_router_logits=True, for a load-balancing loss that the model adds to "
                "its own loss, which distillation does not use: set it to False."
            )
        self._is_decoder_only = is_decoder_only(model.config)
        if self._is_decoder_only:
            refuse_encoder_options(self.args, getattr(model.config, "model_type", type(model).__name__))
            refuse_prompt_learning(model)

    def _set_up_teacher(self, teacher: "nn.Module | ServedTeacher | str | os.PathLike", tokenizer) -> None:
        """The teacher, its tokenizer, and the ids that it has in common with the student."""
        args = self.args
        if isinstance(teacher, nn.Module):
            _check_nothing_shared(self.model, teacher)
        if is_cache(teacher):
            self.teacher = CachedTeacher(teacher)
            teacher = self.teacher.folder
            if self._has_targets_only and args.distill_weight > 0:
                raise ValueError(f"distill_weight={args.distill_weight}: {self.teacher.how_to_train()}")
        elif is_served(teacher) or isinstance(teacher, ServedTeacher):
            self.teacher = self._served(teacher, tokenizer)
            tokenizer = self.teacher.tokenizer
        else:
            self.teacher = LiveTeacher.load(teacher, args.teacher_dtype, args.teacher_quantization)
            check_same_on_each_process(self.teacher.model, self.accelerator)
            self.teacher.to(args.device)
        if tokenizer is None and not (self._has_targets_only or isinstance(teacher, ServedTeacher)):
            tokenizer = tokenizer_beside(teacher, "using the student's for both")
        own_size = vocab_size(self.model.config)
        self._vocabulary = SharedVocabulary.between(
            own_size,
            own_size if self._has_targets_only else self.teacher.vocab_size,
            tokenizer_of(self.processing_class),
            tokenizer_of(tokenizer),
            args.vocab_policy,
        )
        self.teacher_processing_class = self.processing_class if tokenizer is None else tokenizer
        self._is_universal = args.vocab_policy == "universal"

    def _served(self, teacher: str | ServedTeacher, tokenizer) -> ServedTeacher:
        args = self.args
        if args.teacher_dtype is not None or args.teacher_quantization is not None:
            raise ValueError(
                f"teacher_dtype={args.teacher_dtype!r}, teacher_quantization={args.teacher_quantization!r} with a "
                "teacher on a server, which decides that: leave them out."
            )
        if isinstance(teacher, ServedTeacher):
            return teacher
        served = ServedTeacher(teacher, tokenizer_of(tokenizer))
        if args.vocab_policy == "mask_padding":
            # Models have some ids more than their tokenizers; what a server's has can be told by its student's.
            served.vocab_size = max(served.vocab_size, vocab_size(self.model.config))
        return served

    def _set_up_prompt(self) -> None:
        """The day that prompts name, and the student's tokenizer, with the prompt built in if it is merged."""
        args, config, given = self.args, self.model.config, self.processing_class
        tokenizer = tokenizer_of(self.teacher_processing_class)
        day = args.prompt_date or getattr(config, "prompt_date", None) or getattr(self.teacher, "prompt_date", None)
        self.prompt_date = frozen_prompt_date(tokenizer, args.prompt_template, day)
        self._choose_divergence()
        # A merged student's decoder starts with the last token of the teacher's prompt, which its encoder leaves out.
        self._start_token_id = merged_start_token_id(config)
        self._max_positions = max_positions(config)
        own = given
        if is_merged(config) and isinstance(given, PreTrainedTokenizerBase) and reads_bare_source(given):
            student = self.accelerator.unwrap_model(self.model)
            own = tokenizer_with_prompt(given, student, tokenizer, args.prompt_template, self.prompt_date)
        elif self._is_decoder_only and isinstance(given, PreTrainedTokenizerBase):
            own = with_prompt_as_chat_template(given, args.prompt_template)
        self.processing_class = self.callback_handler.processing_class = own

    def _choose_divergence(self) -> None:
        args = self.args
        if self._is_universal:
            self._divergence, name = universal_logit_distance, universal_logit_distance.__name__
        else:
            self._divergence = select_divergence(args.divergence, args.jsd_beta, args.skew_alpha)
            name = args.divergence
        self.teacher.check(args.prompt_template, name, args.distill_temperature, self.prompt_date)

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As the base class; without `compute_objective` the terms of our loss are no measures to be summed."""
        return super().hyperparameter_search(hp_space, compute_objective or default_objective, *args, **kwargs)

    def _hp_search_setup(self, trial) -> None:
        """As the base class; refuses what a trial sets without effect."""
        before = own_fields(self.args)
        super()._hp_search_setup(trial)
        check_trial(before, self.args)
        self._choose_divergence()

    def _collator(self, data_collator) -> DistillationCollator:
        args = self.args
        cls = RemembersLast if isinstance(self.teacher, ServedTeacher) else DistillationCollator
        collator = cls(
            self.processing_class,
            self.teacher_processing_class,
            source_column=args.source_column,
            target_column=args.target_column,
            prompt_template=args.prompt_template,
            prompt_date=self.prompt_date,
            max_source_length=args.max_source_length,
            max_target_length=args.max_target_length,
            start_token_id=self._start_token_id,
            decoder_only=self._is_decoder_only,
            student_collator=data_collator,
            keep_text_columns=data_collator is not None and not args.remove_unused_columns,
            vocabulary=self._vocabulary,
            image_token=self._image_token(),
        )
        if self.prompt_date is not None and (self._start_token_id is None or collator.reads_prompt()):
            self.model.config.prompt_date = self.prompt_date  # in each checkpoint, and in what is saved
        return collator

    def _image_token(self) -> str | None:
        """What stands for an image in the texts of a student that reads images."""
        token, tokenizer = getattr(self.model.config, "image_token_id", None), tokenizer_of(self.processing_class)
        if token is None or tokenizer is None or self._is_decoder_only:
            return None
        return tokenizer.convert_ids_to_tokens(token)

    def _set_up_options(self) -> None:
        args = self.args
        if reads_images(self.model.config) or (isinstance(self.teacher, LiveTeacher) and self.teacher.input_names):
            read_streams_in_each_process(args, self.accelerator)
        if args.cross_attention_warmup_steps > 0:
            whole = not (self.is_sharded or steps_in_backward(args))
            check_cross_attention_warmup(self.model, args.cross_attention_warmup_steps, whole)
        self._on_policy = OnPolicy(self)
        if args.gradient_checkpointing and reads_images(self.model.config):
            let_processes_have_no_image(args, self.accelerator)
        if args.qat is not None and (self.is_sharded or hasattr(self.model, "peft_config")):
            raise ValueError(
                f"qat={args.qat!r} rounds weights that are whole and exported as they are: use one device or "
                "DistributedDataParallel instead of FSDP or DeepSpeed, and train all weights instead of an adapter."
            )
        if args.optim == MUON and self.is_sharded:
            raise ValueError(
                "optim='muon' needs whole matrices: use one device or DistributedDataParallel instead of FSDP or "
                "DeepSpeed, or another optimizer."
            )
        self._depth = ProgressiveDepth(self) if args.progressive_depth_steps else None
        self._annealing = EncoderAnnealing(self) if args.bidirectional_warmup_steps else None
        for schedule in (self._depth, self._annealing):
            if schedule is not None:
                self.add_callback(schedule)
        self._match_hidden_states()
        if args.train_projector_first > 0:
            others = "the decoder" if args.freeze_encoder else "all but the projector"
            self.add_callback(UnfreezeBehindProjector(self, "train_projector_first", others))
        if args.unfreeze_encoder_after > 0:
            self.add_callback(Unfreeze(self, "unfreeze_encoder_after", "the encoder"))
        self._encoder_states = None
        if args.encoder_states is not None:
            self._encoder_states = EncoderStates(args.encoder_states, self.accelerator)
            self._encoder_states.check(self)
            self.add_callback(self._encoder_states)
        # States that are kept need no pass at all, so that none is shared.
        can_share = not (self.is_sharded or args.bidirectional_warmup_steps or args.encoder_states)
        runs_the_prompt = self.teacher.model if isinstance(self.teacher, LiveTeacher) else None
        self._shared_prompt = SharedPrompt(runs_the_prompt if can_share else None)
        self._asked_ahead: AskedAhead | None = None
        if isinstance(self.teacher, ServedTeacher):
            assert isinstance(self.data_collator, RemembersLast)  # `_collator` saw to it
            self._asked_ahead = AskedAhead(self.teacher, self.data_collator, self._vocabulary)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed divide the student among processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _has_targets_only(self) -> bool:
        """Whether nothing is known of the teacher but answers that it wrote."""
        return isinstance(self.teacher, CachedTeacher) and self.teacher.has_targets_only

    @property
    def is_fsdp2(self) -> bool:
        """Whether it is FSDP2 that does, which gathers the weights of a module for each of its forwards."""
        return self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 2

    def as_exported(self) -> AbstractContextManager[None]:
        """While the block runs, the student has the weights that it is trained for: rounded, with `qat`."""
        return fake_quantized(self.model, self.args.qat)

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The distillation loss of one batch, and the student's outputs (with that loss) if `return_outputs`.

        Args:
            model: the student, perhaps wrapped.
            inputs: a batch on the training device: what the student's forward takes, `labels` `[B, T]`, and the
                `teacher_*` of `alignment` (derived from `input_ids` and `labels` if absent).
            num_items_in_batch: target tokens of the whole accumulated, distributed batch; None: of this batch.
        """
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"the batch has no labels, only {sorted(inputs)}; distillation needs targets.")
        rows, columns = target_positions(labels)
        refuse_packed(inputs)
        self._check_lengths(inputs, labels)
        student = self._student_inputs(model, inputs)
        if self._encoder_states is not None and not return_outputs:  # of which the encoder's last state is one
            student |= self._encoder_states.encoder_outputs(self.accelerator.unwrap_model(model), student)
        predicting = columns_from_right(labels, rows, columns) if self._is_decoder_only else columns
        chunked = self._chunked_logits.fit(model, student, len(rows), return_outputs)
        # Asked here, where a run that is resumed has its weights.
        shares = model.training and not return_outputs
        shares = shares and self._shared_prompt.is_exact_for(self.accelerator.unwrap_model(model))
        with self._shared_prompt.listening() if shares else nullcontext():
            score, teacher_states, asked = self._score(labels[rows, columns], rows, columns, inputs, chunked)
        if shares:
            student |= self._shared_prompt.encoder_outputs(student)
        with catch_hidden_states(model, self._matching.student_layers, rows, predicting) as student_states:
            if chunked:
                total, terms = self._chunked_logits.total(
                    model, student, rows, predicting, score, self._term_weights()
                )
            else:
                outputs = model(**student)
                logits_BTV = logits_of(outputs)
                terms = score(logits_BTV[rows, predicting])
                total = self._combine({name: values.sum() for name, values in terms.items()})
        if student_states:
            terms["hidden_state_loss"] = self._matching(student_states, teacher_states, asked)
            total = total + self.args.hidden_state_weight * terms["hidden_state_loss"].sum()
        self.check_loss(total, lambda: explain_loss(terms, rows, self.state.global_step))
        count = len(rows) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, but the tokens were counted over all of them.
        scale = self._token_processes() if num_items_in_batch is not None else 1
        loss = token_mean(total.unsqueeze(0), count) * scale
        if self._eval_sums is not None:
            self._record_evaluation(self._eval_sums, rows, len(labels), terms, loss)
        elif model.training:
            self._record_training({name: token_mean(values, count) * scale for name, values in terms.items()})
        if not return_outputs:
            return loss
        if self._is_decoder_only:
            logits_BTV = logits_of_labels(logits_BTV, labels)
        if isinstance(outputs, Mapping):
            return loss, type(outputs)(**{**outputs, "loss": loss, "logits": logits_BTV})
        return loss, (loss, logits_BTV, *outputs[1:])

    def _check_lengths(self, inputs: Mapping[str, Any], labels: Tensor) -> None:
        ids, target = inputs.get("input_ids"), labels != IGNORED
        if ids is None:  # sound or images, which are not counted in tokens
            return
        mask = inputs.get("attention_mask")
        source = torch.ones_like(ids) if mask is None else mask
        if self._start_token_id is not None or self._is_decoder_only:
            check_length("student", self._max_positions, "prompt and target", source, target)
        else:
            check_length("student", self._max_positions, "source", source)
            check_length("student", self._max_positions, "target", target)

    def _student_inputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the student's forward gets: no `teacher_*`, no cache, its decoder's input in place of the labels."""
        if self._is_decoder_only:
            student = sequence_inputs(inputs, self._forward_columns())
        else:
            student = {name: value for name, value in inputs.items() if not name.startswith(OF_TEACHER)}
        if "use_cache" in self._forward_columns():
            student["use_cache"] = False
        if self._is_decoder_only:
            return student
        if student.get("decoder_input_ids") is None and student.get("decoder_inputs_embeds") is None:
            shift = getattr(self.accelerator.unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
            if shift is None:  # the model shifts labels itself, and computes a loss that nobody looks at
                return student
            student["decoder_input_ids"] = shift(labels=student["labels"])
        del student["labels"]
        return student

    def _score(
        self, labels_N: Tensor, rows: Tensor, columns: Tensor, inputs: Mapping[str, Any], chunked: bool
    ) -> tuple[Callable[..., dict[str, Tensor]], list[Tensor], Tensor | None]:
        """What turns the student's logits at a slice of the N target tokens, `[C, V]`, into `[C]` for each term of the
        loss (and of the evaluation); the teacher's hidden states; and `[N]`, which of the tokens have one (None: all).
        """
        evaluating = self._eval_sums is not None
        temperature, smoothing = self.args.distill_temperature, self.args.label_smoothing_factor
        teacher: TeacherScores | None = None
        states: list[Tensor] = []
        asked = None
        # Autocast is left: the teacher has a dtype of its own and the divergences are at least float32.
        without_autocast = torch.autocast(labels_N.device.type, enabled=False)
        compared = self._compares
        layers = self._matching.teacher_layers
        if compared or layers:
            inputs = with_teacher_inputs(inputs, self._start_token_id, self._vocabulary)
            ids = inputs["teacher_input_ids"]
            rows, columns, asked = asked_positions(inputs, rows, columns)
            self._vocabulary.check(labels_N if asked is None else labels_N[asked], ids)
            # A cache has no states, and is not asked for any.
            caught = (
                catch_hidden_states(self.teacher.model, layers, rows, columns)
                if isinstance(self.teacher, LiveTeacher)
                else nullcontext(states)
            )
            with without_autocast, caught as states:
                teacher = self.teacher.scores(
                    ids,
                    inputs["teacher_attention_mask"],
                    rows,
                    columns,
                    self._vocabulary,
                    chunked or not compared,
                    teacher_images(inputs),
                )
            if not compared:
                teacher = None
            elif asked is not None:
                teacher = PartialScores(teacher, asked)

        def score(student_CV: Tensor, chunk: slice = slice(None)) -> dict[str, Tensor]:
            with without_autocast:
                terms = {"ce_loss": cross_entropy(student_CV, labels_N[chunk], smoothing)}
                if teacher is None:
                    return terms
                divergence = teacher.divergence(student_CV, chunk, self._divergence, temperature)
                terms["distill_loss"] = divergence * temperature**2
                if evaluating:
                    first = self._vocabulary.restrict_student(student_CV).argmax(dim=-1)
                    teacher_first = teacher.top(chunk)
                    terms["teacher_agreement"] = (first == teacher_first).float()
                    terms["teacher_asked"] = (teacher_first >= 0).float()
            return terms

        return score, states, asked

    def _term_weights(self) -> dict[str, float]:
        """The terms that `_score` gives, in their order, and what each counts in the loss."""
        weight, evaluating = self.args.distill_weight, self._eval_sums is not None
        compared = self._compares
        # Its own targets are no answers that the student should be more certain of.
        weights = {"ce_loss": 0.0 if self._on_own_targets and not evaluating else 1 - weight}
        if compared:
            weights["distill_loss"] = weight
        if compared and evaluating:
            weights |= {"teacher_agreement": 0.0, "teacher_asked": 0.0}
        return weights

    @property
    def _compares(self) -> bool:
        """Whether the student is compared with the teacher: in evaluation wherever that has distributions."""
        return self.args.distill_weight > 0 or (self._eval_sums is not None and not self._has_targets_only)

    def _combine(self, means: Mapping[str, Any]):
        return sum(weight * means[name] for name, weight in self._term_weights().items())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # With DataParallel the loss is taken once, on the gathered logits, so the count is that of the whole batch.
        if self.args.n_gpu > 1 and batch_samples and batch_samples[0].get("labels") is not None:
            return sum(batch["labels"].ne(IGNORED).sum() for batch in batch_samples).to(device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _token_processes(self) -> int:
        """Over how many processes with batches of their own the target tokens were counted."""
        if not self.args.average_tokens_across_devices or self.args.n_gpu > 1:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    # --- the batches of a step ---

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As the base class; for an on-policy step the student's own targets, counted as those of any step."""
        self._on_own_targets = False
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, the base class would make one more
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._empty_targets.see(batches, self.state.epoch, self.accelerator)
        if self._depth is not None and batches and self._depth.is_due():
            self._depth.remove_best(self._loss_in_each(self._depth.without_each(), batches))
            self.forget_encoder()
        step = self.state.global_step
        self._on_own_targets = bool(batches) and self._on_policy.is_due(step)
        if self._on_own_targets:
            batches = self._on_policy.batches(batches, device)
            count = self._get_num_items_in_batch(batches, device)
        if self._asked_ahead is not None and self.args.distill_weight > 0:
            self._asked_ahead(batches, and_next=not self._on_policy.is_due(step + 1))
        return batches, count

    # --- what is trained when ---

    def call_model_init(self, trial=None) -> "GenerativeModel":
        model: GenerativeModel = super().call_model_init(trial)  # type: ignore[assignment]  # base: any module
        self._check_options(model)
        self.waiting_parameters = self._freeze(model)
        return model

    def _freeze(self, model: "GenerativeModel") -> dict[str, list[nn.Parameter]]:
        """Takes the gradient from what is trained later, which is returned, or never."""
        args, waiting = self.args, {}
        if args.freeze_prompt_keys:
            freeze_prompt_keys(model)
        if not args.freeze_encoder:
            tell_of_frozen_encoder(model)
        projector = projector_parameters(model) if args.train_projector_first > 0 else []
        if args.freeze_encoder:
            waiting["unfreeze_encoder_after"] = freeze_encoder(model, but=projector)
        if projector:
            waiting["train_projector_first"] = freeze(model, but=projector)
        return {option: parameters for option, parameters in waiting.items() if getattr(args, option) > 0}

    def create_optimizer(self, *args, **kwargs):
        """As the base class, with the parameters that are going to be trained later."""
        waiting = [parameter for parameters in self.waiting_parameters.values() for parameter in parameters]
        with unfrozen(waiting):
            return super().create_optimizer(*args, **kwargs)

    def forget_encoder(self) -> None:
        """The encoder may no longer be what it was: whose states others have is found out again."""
        self._shared_prompt.forget()
        if self._encoder_states is not None:
            self._encoder_states.forget()

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """As the base class; raises ValueError where training ends before it has begun to train all of the student."""
        steps, max_steps = self.args.cross_attention_warmup_steps, num_training_steps
        if max_steps < steps:
            raise ValueError(
                f"cross_attention_warmup_steps={steps}, but training ends at step {max_steps}: give fewer."
            )
        ramp = self.args.on_policy_warmup_steps
        if self.args.on_policy_fraction > 0 and max_steps < ramp:
            logger.warning(
                "on_policy_warmup_steps=%d, but training ends at step %d: on_policy_fraction is never reached.",
                ramp,
                max_steps,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, *args, **kwargs) -> Tensor:
        """As the base class; during the warm-up of the cross-attention the other gradients are dropped."""
        with self.as_exported():
            loss = super().training_step(*args, **kwargs)
        if self.state.global_step < self.args.cross_attention_warmup_steps:
            keep_cross_attention_gradients(self.model)
        return loss

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        if args.optim == MUON and model is not None:
            return muon_and_kwargs(args, model)
        return Seq2SeqTrainer.get_optimizer_cls_and_kwargs(args, model)

    @torch.no_grad()
    def _loss_in_each(self, contexts: list[Callable[[], AbstractContextManager]], batches: list) -> Tensor:
        """The loss of a step's batches, of all processes, inside each of the N contexts, in eval mode: `[N]`."""
        student = self.accelerator.unwrap_model(self.model)
        totals, tokens = [0.0] * len(contexts), 0
        with self.as_exported(), as_it_was(student, seed=0):
            for batch in map(self._prepare_inputs, batches):
                labels = batch["labels"]
                rows, columns = target_positions(labels)
                inputs = self._student_inputs(student, batch)
                score, *_ = self._score(labels[rows, columns], rows, columns, batch, chunked=False)
                tokens += len(rows)
                for number, context in enumerate(contexts):
                    with context():
                        logits_BTV = student(**inputs)["logits"]
                    terms = score(logits_BTV[rows, columns])
                    totals[number] += self._combine({name: values.sum() for name, values in terms.items()}).item()
        sums = self.accelerator.reduce(torch.tensor([*totals, tokens], device=self.args.device), reduction="sum")
        return sums[:-1] / sums[-1].clamp(min=1)

    # --- checkpoints ---

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._depth is not None:
            self._depth.shrink_to(resume_from_checkpoint)
        self._go_back_to_day_of(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _go_back_to_day_of(self, checkpoint: str) -> None:
        """Prompts name the day that those of the checkpoint do: a script that makes its student again names today."""
        config = Path(checkpoint) / CONFIG_NAME
        day = json.loads(config.read_text(encoding="utf-8")).get("prompt_date") if config.is_file() else None
        if day in (None, self.prompt_date) or self.prompt_date is None or self.args.prompt_date is not None:
            return
        logger.warning(f"prompts name {day}, the day of {checkpoint}, instead of {self.prompt_date}.")
        self.prompt_date = self.data_collator.prompt_date = self.model.config.prompt_date = day
        if self._start_token_id is not None and not reads_bare_source(self.data_collator.tokenizer):
            own = PreTrainedTokenizerFast.from_pretrained(checkpoint)
            self.processing_class = self.callback_handler.processing_class = self.data_collator.tokenizer = own

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._on_policy.replay.save(output_dir, self.accelerator.process_index)
        # trainer_state.json comes next and says that a checkpoint is whole: it has to be, on every process.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._on_policy.replay.load(checkpoint, self.accelerator.process_index)

    # --- training log ---

    def train(self, *args, **kwargs):
        if has_length(self.train_dataset) and not len(self.train_dataset):
            raise ValueError("train_dataset has no rows, so there is nothing to train on.")
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._on_own_targets = False
            if self._annealing is not None:
                self._annealing.end()
        self._empty_targets.report(self.state.epoch, self.accelerator)
        return output

    def _inner_training_loop(self, *args, **kwargs):
        # Made again each time: `auto_find_batch_size` comes here again after a batch that did not fit.
        self.forget_encoder()
        self._train_sums, self._train_steps = {}, Counter()
        self._on_policy = OnPolicy(self)
        student = self.accelerator.unwrap_model(self.model)
        self._empty_targets = EmptyTargets(end_tokens(student, tokenizer_of(self.processing_class)))
        let_gradients_reach_adapters(self.model, self.args)
        with noise_on_tied_embeddings(self.model, self.neftune_noise_alpha):
            return super()._inner_training_loop(*args, **kwargs)

    def _record_training(self, means: Mapping[str, Tensor]) -> None:
        for name, value in means.items():
            if name == "ce_loss" and self._on_own_targets:
                continue
            self._train_sums[name] = self._train_sums.get(name, 0) + value.detach()
            self._train_steps[name] += int(self.accelerator.sync_gradients)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the loss, averaged over the same steps and processes, where the base class logs `loss`."""
        if "loss" in logs and self._train_steps:
            for name, total in self._train_sums.items():
                logs[name] = self.accelerator.gather(total.reshape(1)).mean().item() / self._train_steps[name]
            self._train_sums, self._train_steps = {}, Counter()
        super().log(logs, start_time)

    # --- evaluation ---

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the base class, with every loss a mean over the target tokens of the whole set."""
        rows = getattr(dataloader, "dataset", None)  # what a subclass makes may be no DataLoader
        if has_length(rows) and not len(rows):
            raise ValueError(f"the data set to evaluate ({metric_key_prefix}) has no rows.")
        if not self.is_in_train:
            self.forget_encoder()
        outer, self._eval_sums = self._eval_sums, {}  # `compute_metrics` may evaluate other rows
        try:
            with torch.no_grad(), self.as_exported():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            sums = {name: total.item() for name, total in self._eval_sums.items()}
            if sums and output.metrics is not None:
                tokens, added = sums.pop("tokens"), sums.pop("added", 0.0)
                if not tokens:
                    logger.warning(
                        "no row of the data set to evaluate (%s) has a target token, so that its loss is nan: are "
                        "targets cut off behind long prompts, or all labels %d?",
                        metric_key_prefix,
                        IGNORED,
                    )
                means = {name: total / tokens if tokens else float("nan") for name, total in sums.items()}
                means["loss"] = self._combine(means)
                means["loss"] += self.args.hidden_state_weight * means.get("hidden_state_loss", 0.0)
                means["loss"] += added / (tokens or 1)
                if self._is_universal:  # ids of the two are not to be compared
                    means.pop("teacher_agreement", None)
                elif "teacher_agreement" in means:
                    means["teacher_agreement"] /= means.pop("teacher_asked") or 1
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        finally:
            self._eval_sums = outer
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs,
    ):
        """As the base class: loss, logits or generated tokens, labels; `generate` never sees the teacher's inputs."""
        self._last_evaluated = None
        loss, outputs, labels = self._predict(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        if loss is not None:
            self._record_what_was_added(loss)
        return loss, outputs, labels

    def _predict(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None,
        **gen_kwargs,
    ):
        student = {n: value for n, value in inputs.items() if not n.startswith(OF_TEACHER) and value is not None}
        if self._asked_ahead is not None:
            self._asked_ahead([inputs])
        if self._encoder_states is not None and prediction_loss_only and "labels" in student:
            # The base class would ask for outputs too, which have the encoder's last state.
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(inputs)), None, None
        if not self.args.predict_with_generate or prediction_loss_only:
            given = inputs if "labels" in student else student
            return super().prediction_step(model, given, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        let_fsdp2_generate(self.model)

        # The base class generates with self.model, and calls `model` only for a loss: it gets ours.
        def with_our_loss(**_student_inputs) -> dict[str, Any]:
            return {"loss": self.compute_loss(model, inputs)}

        with answers_alone(self.model) if self._is_decoder_only else nullcontext():
            return super().prediction_step(
                with_our_loss,  # type: ignore[arg-type]  # is only called
                student,
                prediction_loss_only,
                ignore_keys,
                **gen_kwargs,
            )

    def _record_evaluation(
        self, sums: dict[str, Tensor], rows: Tensor, batch_size: int, per_token: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Adds a batch to the sums over the whole set, without the rows that fill up the last distributed batch."""
        terms = {"tokens": torch.ones_like(per_token["ce_loss"]), **per_token}
        by_row = torch.stack(
            [values.new_zeros(batch_size).index_add_(0, rows, values) for values in terms.values()], dim=1
        )
        totals = self.accelerator.gather_for_metrics(by_row).cpu().double().sum(dim=0)
        for name, total in zip(terms, totals, strict=True):
            sums[name] = sums.get(name, 0) + total
        self._last_evaluated = loss, by_row[:, 0]

    def _record_what_was_added(self, loss: Tensor) -> None:
        """What the `compute_loss` of a subclass made of our loss of a batch is in the evaluation's loss too."""
        overridden = getattr(self.compute_loss, "__func__", None) is not DistillationTrainer.compute_loss
        if self._eval_sums is None or self._last_evaluated is None or not overridden:
            return
        own, tokens_of_row = self._last_evaluated
        added = torch.where(tokens_of_row > 0, tokens_of_row * (loss - own).detach(), 0.0)
        total = self.accelerator.gather_for_metrics(added).cpu().double().sum()
        self._eval_sums["added"] = self._eval_sums.get("added", 0) + total

    # --- rows and columns ---

    def get_train_dataloader(self) -> DataLoader:
        """As the base class, or with batches of `max_tokens_per_batch`."""
        limit = self.args.max_tokens_per_batch
        if limit is None:
            return super().get_train_dataloader()
        sizes = row_sizes(self.train_dataset, self.data_collator)
        processes = self.accelerator.num_processes // self.get_tp_size()
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = TokenBatches(sizes, limit, processes, seed, epoch=lambda: int(self.state.epoch or 0))
        by_rows = super().get_train_dataloader()
        kept = {name: getattr(by_rows, name) for name in _KEPT_OF_A_LOADER}
        # They are of different sizes, and already as many for each process: accelerate only deals them.
        even_batches, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return self.accelerator.prepare(DataLoader(batch_sampler=batches, **kept))
        finally:
            self.accelerator.even_batches = even_batches

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(with_lengths(dataset, self.args, self.data_collator))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(with_lengths(eval_dataset, self.args, self.data_collator))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [
                *(self._signature_columns or ()),
                self.args.source_column,
                self.args.target_column,
                MESSAGES,
                *TEACHER_COLUMNS,
                # A teacher that reads only text has to say so of images.
                *(OF_TEACHER + name for name in sorted({"pixel_values", *self.teacher.input_names})),
            ]

    def _forward_columns(self) -> list[str]:
        self._set_signature_columns_if_needed()
        return self._signature_columns or []


def _check_nothing_shared(student: nn.Module, teacher: nn.Module) -> None:
    frozen = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in frozen]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameters, {shared[0]} among them; the teacher is frozen, so "
            "they would be too. Load the teacher a second time, or copy it."
        )
