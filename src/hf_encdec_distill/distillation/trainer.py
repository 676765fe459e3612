"""`DistillationTrainer`: a `Seq2SeqTrainer` whose loss also follows a teacher."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, Seq2SeqTrainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from ..models.whole_weights import check_same_on_each_process
from ._compat import (
    let_checkpoints_load_on_many_cpu_processes,
    let_fsdp2_generate,
    let_gradients_reach_adapters,
    refuse_legacy_prediction_loop,
)
from .alignment import (
    IGNORED,
    TEACHER_COLUMNS,
    SharedVocabulary,
    asked_positions,
    target_positions,
    with_teacher_inputs,
)
from .arguments import DistillationTrainingArguments, steps_in_backward, with_distillation_defaults
from .cache import CachedTeacher, is_cache
from .collator import MESSAGES, DistillationCollator, tokenizer_of
from .cross_attention_warmup import check_cross_attention_warmup, keep_cross_attention_gradients
from .empty_targets import EmptyTargets
from .frozen_encoder import freeze_encoder
from .heads import catch_head_input
from .hidden_states import HiddenStateMatching, catch_hidden_states, layer_pairs, refuse_hidden_states, widths
from .lengths import with_lengths
from .losses import chunked_sum, cross_entropy, select_divergence, token_mean, universal_logit_distance
from .neftune import noise_on_tied_embeddings
from .packing import refuse_packed
from .positions import check_length, max_positions
from .rollouts import ReplayBuffer, as_it_was, draw, on_policy_fraction_at, roll_out
from .schedules import EncoderAnnealing, ProgressiveDepth
from .shared_prompt import SharedPrompt
from .teachers import LiveTeacher, PartialScores, check_scores, vocab_size
from .tied import share_tied_embeddings, share_tied_weights


logger = logging.get_logger(__name__)

let_checkpoints_load_on_many_cpu_processes()


class DistillationTrainer(Seq2SeqTrainer):
    """Trains an encoder-decoder student on labels and on a decoder-only teacher's distribution over each target token.

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
    processes.

    Where `teacher_label_positions` say that the teacher is not asked about a label, its divergence and the distance of
    its states are 0, and all terms remain means over all target tokens. The agreement is a share of those that the
    teacher was asked about.

    With `vocab_policy="universal"` the divergence is `losses.universal_logit_distance`, and evaluation reports
    `eval_teacher_asked`, the share of target tokens with a divergence, in place of the agreement.

    Takes what `Seq2SeqTrainer` takes, in the same order, so that a script only swaps the class and names a teacher.
    Plain `Seq2SeqTrainingArguments` are given the distillation fields at their defaults.

    Args:
        model: any `AutoModelForSeq2SeqLM` model.
        args: `DistillationTrainingArguments`.
        data_collator: pads ready rows; text rows are encoded before it sees them. See `DistillationCollator`.
        processing_class: the student's tokenizer; `model.tokenizer` where the model brings one.
        teacher: a causal language model (it is frozen in place), a folder or a Hub id; or the folder of a cache
            that `cache.capture` made of one, or `hf://datasets/user/name`, and then no teacher is in memory.
        teacher_processing_class: the teacher's tokenizer; by default the one at the teacher's path, and if there is
            none, the student's.

    Raises:
        ValueError: no teacher, one that shares parameters with the student, tokenizers that disagree, or a
            `compute_loss_func` (this class computes the loss: override `compute_loss`).
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *remaining,
        teacher: "PreTrainedModel | nn.Module | str | os.PathLike | None" = None,
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
        if args.freeze_encoder:
            freeze_encoder(self.model)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would replace the distillation loss; leave it out, or override compute_loss."
            )
        if isinstance(teacher, nn.Module):
            _check_nothing_shared(self.model, teacher)
        if self.is_fsdp_enabled:
            share_tied_embeddings(self.model)
        if is_cache(teacher):
            self.teacher = CachedTeacher(teacher)
            teacher = self.teacher.folder
        else:
            self.teacher = LiveTeacher.load(teacher, args.teacher_dtype, args.teacher_quantization)
            check_same_on_each_process(self.teacher.model, self.accelerator)
            self.teacher.to(args.device)
        self._is_universal = args.vocab_policy == "universal"
        divergence = universal_logit_distance.__name__ if self._is_universal else args.divergence
        self.teacher.check(args.prompt_template, divergence, args.distill_temperature)
        if teacher_processing_class is None:
            teacher_processing_class = _teacher_tokenizer(teacher)
        self._vocabulary = SharedVocabulary.between(
            vocab_size(self.model.config),
            self.teacher.vocab_size,
            tokenizer_of(processing_class),
            tokenizer_of(teacher_processing_class),
            args.vocab_policy,
        )
        if teacher_processing_class is None:
            teacher_processing_class = processing_class
        self.teacher_processing_class = teacher_processing_class

        config = self.model.config
        # A merged student's decoder starts with the last token of the teacher's prompt, which its encoder leaves out.
        merged = getattr(config, "cross_attention", None) == "merged"
        self._start_token_id = config.decoder_start_token_id if merged else None
        self._max_positions = max_positions(config)
        if self._is_universal:
            self._divergence = universal_logit_distance
        else:
            self._divergence = select_divergence(args.divergence, args.jsd_beta, args.skew_alpha)
        self.data_collator = DistillationCollator(
            processing_class,
            teacher_processing_class,
            source_column=args.source_column,
            target_column=args.target_column,
            prompt_template=args.prompt_template,
            max_source_length=args.max_source_length,
            max_target_length=args.max_target_length,
            start_token_id=self._start_token_id,
            student_collator=data_collator,
            keep_text_columns=data_collator is not None and not args.remove_unused_columns,
            vocabulary=self._vocabulary,
        )
        # The loss is already divided by the tokens of the whole step, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        # Smoothing is part of our cross-entropy; the base class would put its own loss in place of ours.
        self.label_smoother = None
        self._student_head_is_last: bool | None = None  # not known yet
        self._shared: list[SharedPrompt] | None = None  # not known yet
        if args.cross_attention_warmup_steps > 0:
            whole = not (self.is_sharded or steps_in_backward(args))
            check_cross_attention_warmup(self.model, args.cross_attention_warmup_steps, whole)
        if args.on_policy_fraction > 0:
            self._check_on_policy()
        self._depth = ProgressiveDepth(self) if args.progressive_depth_steps else None
        for schedule in (self._depth, EncoderAnnealing(self) if args.bidirectional_warmup_steps else None):
            if schedule is not None:
                self.add_callback(schedule)
        self._matching = HiddenStateMatching({})
        if args.hidden_state_weight > 0:
            refuse_hidden_states(self)
            student, teacher = self.accelerator.unwrap_model(self.model), self.teacher.model
            layers = layer_pairs(student, teacher, args.hidden_state_layers)
            self._matching = HiddenStateMatching(
                layers, *widths(student, teacher), args.hidden_state_loss, student.dtype
            ).to(args.device)
            if self.optimizer is not None:
                self.optimizer.add_param_group(self._projection_group())
        self._replay = ReplayBuffer(args.replay_buffer_size)
        self._on_own_targets = False
        self._empty_targets = EmptyTargets()
        self._train_sums: dict[str, Tensor] = {}
        self._train_steps: Counter[str] = Counter()
        self._eval_sums: dict[str, Tensor] | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed divide the student among processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # --- the loss ---

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
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
        chunked = self._goes_in_chunks(model, student, len(rows), return_outputs)
        shared = None if return_outputs else self._shared_prompt(model)
        with nullcontext() if shared is None else shared.listening():
            score, of_teacher = self._score(labels[rows, columns], rows, columns, inputs, chunked)
        if shared is not None:
            student |= shared.encoder_outputs(student)
        with catch_hidden_states(model, self._matching.student_layers, rows, columns) as of_student:
            if chunked:
                total, terms = self._chunked_total(model, student, rows, columns, score)
            else:
                outputs = model(**student)
                logits_BTV = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
                terms = score(logits_BTV[rows, columns])
                total = self._combine({name: values.sum() for name, values in terms.items()})
        if of_student:
            terms["hidden_state_loss"] = self._matching(of_student, *of_teacher)
            total = total + self.args.hidden_state_weight * terms["hidden_state_loss"].sum()
        check_scores(total, terms, rows, self.state.global_step)
        count = len(rows) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, but the tokens were counted over all of them.
        scale = self._token_processes() if num_items_in_batch is not None else 1
        loss = token_mean(total.unsqueeze(0), count) * scale
        if self._eval_sums is not None:
            self._record_evaluation(rows, len(labels), terms)
        elif model.training:
            self._record_training({name: token_mean(values, count) * scale for name, values in terms.items()})
        if not return_outputs:
            return loss
        if isinstance(outputs, Mapping):
            return loss, type(outputs)(**{**outputs, "loss": loss})
        return loss, (loss, *outputs)

    def _check_lengths(self, inputs: Mapping[str, Any], labels: Tensor) -> None:
        ids, target = inputs.get("input_ids"), labels != IGNORED
        if ids is None:  # sound or images, which are not counted in tokens
            return
        mask = inputs.get("attention_mask")
        source = torch.ones_like(ids) if mask is None else mask
        if self._start_token_id is not None:
            check_length("student", self._max_positions, "prompt and target", source, target)
        else:
            check_length("student", self._max_positions, "source", source)
            check_length("student", self._max_positions, "target", target)

    def _student_inputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the student's forward gets: no `teacher_*`, no cache, its decoder's input in place of the labels."""
        student = {name: value for name, value in inputs.items() if name not in TEACHER_COLUMNS}
        if "use_cache" in self._forward_columns():
            student["use_cache"] = False
        if student.get("decoder_input_ids") is None and student.get("decoder_inputs_embeds") is None:
            shift = getattr(self.accelerator.unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
            if shift is None:  # the model shifts labels itself, and computes a loss that nobody looks at
                return student
            student["decoder_input_ids"] = shift(labels=student["labels"])
        del student["labels"]
        return student

    def _score(
        self, labels_N: Tensor, rows: Tensor, columns: Tensor, inputs: Mapping[str, Any], chunked: bool
    ) -> tuple[Callable[..., dict[str, Tensor]], tuple[list[Tensor], Tensor | None]]:
        """What turns the student's logits at a slice of the N target tokens, `[C, V]`, into `[C]` for each term of the
        loss (and of the evaluation); and the teacher's hidden states with the places that have one."""
        evaluating = self._eval_sums is not None
        temperature, smoothing = self.args.distill_temperature, self.args.label_smoothing_factor
        teacher, states, asked = None, [], None
        # Autocast is left: the teacher has a dtype of its own and the divergences are at least float32.
        without_autocast = torch.autocast(labels_N.device.type, enabled=False)
        compared = self.args.distill_weight > 0 or evaluating
        layers = self._matching.teacher_layers
        if compared or layers:
            inputs = with_teacher_inputs(inputs, self._start_token_id, self._vocabulary)
            ids = inputs["teacher_input_ids"]
            rows, columns, asked = asked_positions(inputs, rows, columns)
            self._vocabulary.check(labels_N if asked is None else labels_N[asked], ids)
            model = getattr(self.teacher, "model", None)
            with without_autocast, catch_hidden_states(model, layers, rows, columns) as states:
                teacher = self.teacher.scores(
                    ids, inputs["teacher_attention_mask"], rows, columns, self._vocabulary, chunked or not compared
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
                of_teacher = teacher.divergence(student_CV, chunk, self._divergence, temperature)
                terms["distill_loss"] = of_teacher * temperature**2
                if evaluating:
                    first = self._vocabulary.restrict_student(student_CV).argmax(dim=-1)
                    of_teacher = teacher.top(chunk)
                    terms["teacher_agreement"] = (first == of_teacher).float()
                    terms["teacher_asked"] = (of_teacher >= 0).float()
            return terms

        return score, (states, asked)

    def _goes_in_chunks(self, model: nn.Module, student: Mapping[str, Any], tokens: int, return_outputs: bool) -> bool:
        """Whether the student's logits at the targets are made a few at a time, by `losses.chunked_sum`."""
        # Below four chunks, their gradient of the head in float32 is as large as what they save.
        if tokens <= 4 * self.args.loss_chunk_size or return_outputs or "labels" in student:
            return False
        # A sharded head is whole inside its module's forward only; a compiled model was traced without our hooks.
        if self.is_sharded or self.args.n_gpu > 1 or is_compiled_module(model):
            return False
        if self._student_head_is_last is None:
            self._student_head_is_last = self._find_out_about_head(model, student)
        return self._student_head_is_last

    @torch.no_grad()
    def _find_out_about_head(self, model: nn.Module, student: Mapping[str, Any]) -> bool:
        """Whether logits are a plain linear function of what the student's head is given."""
        # Unwrapped: DistributedDataParallel would talk to processes that may have nothing to find out yet.
        model = self.accelerator.unwrap_model(model)
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return False
        devices = [head.weight.device] if head.weight.device.type == "cuda" else []
        zero = torch.zeros(1, dtype=torch.long, device=head.weight.device)
        # One forward more, once; dropout must not draw other numbers because of it, or a resumed run would differ.
        with torch.random.fork_rng(devices), catch_head_input(head, zero, zero) as caught:
            outputs = model(**student)
        return caught.is_all_of(outputs["logits"] if isinstance(outputs, Mapping) else outputs[0])

    def _chunked_total(
        self, model: nn.Module, student: Mapping[str, Any], rows: Tensor, columns: Tensor, score: Callable
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over all targets, with a gradient, and its terms, `[N]` each, without."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with catch_head_input(head, rows, columns, keep=1) as caught:
            model(**student)
        weights = self._term_weights()
        loss, terms = chunked_sum(
            lambda student_CV, chunk: torch.stack(list(score(student_CV, chunk).values())),
            caught.hidden.to(caught.logits.dtype),  # what autocast made of them for the head
            head.weight,
            head.bias,
            chunk_size=self.args.loss_chunk_size,
            term_weights=tuple(weights.values()),
        )
        return loss, dict(zip(weights, terms, strict=True))

    def _term_weights(self) -> dict[str, float]:
        """The terms that `_score` gives, in their order, and what each counts in the loss."""
        weight, evaluating = self.args.distill_weight, self._eval_sums is not None
        # Its own targets are no answers that the student should be more certain of.
        weights = {"ce_loss": 0.0 if self._on_own_targets and not evaluating else 1 - weight}
        if weight > 0 or evaluating:
            weights["distill_loss"] = weight
        if evaluating:
            weights |= {"teacher_agreement": 0.0, "teacher_asked": 0.0}
        return weights

    def _combine(self, means: Mapping[str, Any]):
        return sum(weight * means[name] for name, weight in self._term_weights().items())

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        # With DataParallel the loss is taken once, on the gathered logits, so the count is that of the whole batch.
        if self.args.n_gpu > 1 and batch_samples and batch_samples[0].get("labels") is not None:
            return sum(batch["labels"].ne(-100).sum() for batch in batch_samples).to(device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _token_processes(self) -> int:
        """Over how many processes with batches of their own the target tokens were counted."""
        if not self.args.average_tokens_across_devices or self.args.n_gpu > 1:
            return 1
        return self.accelerator.num_processes // self.get_tp_size()

    # --- hidden states ---

    def _projection_group(self) -> dict[str, Any]:
        return {"params": list(self._matching.parameters()), "weight_decay": self.args.weight_decay}

    def create_optimizer(self, *args, **kwargs):
        """As the base class, with a group for the projections of the hidden states."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self._matching.student_layers:
            self._matching.reset()  # `model_init` has made a new student too
            self.optimizer.add_param_group(self._projection_group())
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.hidden_state_weight == 0:
            return
        clip = self.accelerator.clip_grad_norm_

        # The base class clips what it finds in the student; the norm is that of all that is trained.
        def clip_with_projections(parameters, *args, **kwargs):
            return clip([*parameters, *self._matching.parameters()], *args, **kwargs)

        self.accelerator.clip_grad_norm_ = clip_with_projections

    # --- on-policy steps ---

    def _check_on_policy(self) -> None:
        if isinstance(self.teacher, CachedTeacher):
            raise ValueError(
                f"on_policy_fraction={self.args.on_policy_fraction} with the cache {self.teacher.folder}: nobody can "
                "have recorded what the student is going to write. Give a live teacher."
            )
        if self.is_sharded:
            raise ValueError(
                f"on_policy_fraction={self.args.on_policy_fraction} needs the whole student on each process to "
                "generate with: use DistributedDataParallel instead of FSDP or DeepSpeed."
            )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As the base class; for an on-policy step the student's own targets, counted as those of any step."""
        self._matching.zero_grad()  # a step begins
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._empty_targets.see(batches, self.state.epoch, self.accelerator)
        seed, step, args = self.args.seed, self.state.global_step, self.args
        share = on_policy_fraction_at(step, args.on_policy_fraction, args.on_policy_warmup_steps)
        self._on_own_targets = False
        if self._depth is not None and batches and self._depth.is_due():
            self._depth.remove_best(self._loss_in_each(self._depth.without_each(), batches))
            self._shared = None  # the encoder may no longer be what it was
        self._on_own_targets = bool(batches) and draw(seed, step, 0) < share
        if not self._on_own_targets:
            return batches, count
        if len(self._replay) and draw(seed, step, 1) < args.replay_fraction:
            batches = [self._replay.pick(draw(seed, step, 2 + i), device) for i in range(len(batches))]
        else:
            batches = [self._roll_out(batch, step, i) for i, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _roll_out(self, batch: Mapping[str, Any], step: int, number: int) -> dict[str, Any]:
        batch = self._prepare_inputs(batch)
        # Each process and each batch of a step draws tokens of its own.
        process = self.accelerator.process_index
        rolled = roll_out(
            self.accelerator.unwrap_model(self.model),
            batch,
            max_new_tokens=self.args.max_target_length or batch["labels"].shape[1],
            temperature=self.args.sampling_temperature,
            forbidden=self._vocabulary.missing_below(vocab_size(self.model.config)),
            vocabulary=self._vocabulary,
            seed=int(draw(self.args.seed, step, 1000 + 1000 * process + number) * (1 << 62)),
        )
        self._replay.add(rolled)
        return rolled

    # --- what is trained when ---

    def call_model_init(self, trial=None) -> nn.Module:
        model = super().call_model_init(trial)
        if self.args.freeze_encoder:
            freeze_encoder(model)
        return model

    def training_step(self, *args, **kwargs) -> Tensor:
        """As the base class, and then what the backward leaves to be done with gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._matching.average_gradients(self.accelerator)
        if self.state.global_step < self.args.cross_attention_warmup_steps:
            keep_cross_attention_gradients(self.model)
        return loss

    def _shared_prompt(self, model: nn.Module) -> SharedPrompt | None:
        """What the student takes from the teacher's forward in training, if anything."""
        if not model.training:
            return None
        if self._shared is None:  # here, where a run that is resumed has its weights
            student = self.accelerator.unwrap_model(model)
            can = isinstance(self.teacher, LiveTeacher)
            can = can and not (self.is_sharded or self.args.bidirectional_warmup_steps)
            exact = can and SharedPrompt.is_exact(student, self.teacher.model)
            self._shared = [SharedPrompt(student, self.teacher.model)] if exact else []
        return self._shared[0] if self._shared else None

    @torch.no_grad()
    def _loss_in_each(self, contexts: list[Callable[[], AbstractContextManager]], batches: list) -> Tensor:
        """The loss of a step's batches, of all processes, inside each of the N contexts, in eval mode: `[N]`."""
        student = self.accelerator.unwrap_model(self.model)
        totals, tokens = [0.0] * len(contexts), 0
        with as_it_was(student, seed=0):
            for batch in map(self._prepare_inputs, batches):
                labels = batch["labels"]
                rows, columns = target_positions(labels)
                inputs = self._student_inputs(student, batch)
                score, _ = self._score(labels[rows, columns], rows, columns, batch, chunked=False)
                tokens += len(rows)
                for number, context in enumerate(contexts):
                    with context():
                        logits_BTV = student(**inputs)["logits"]
                    terms = score(logits_BTV[rows, columns])
                    totals[number] += self._combine({name: values.sum() for name, values in terms.items()}).item()
        sums = self.accelerator.reduce(torch.tensor([*totals, tokens], device=self.args.device), reduction="sum")
        return sums[:-1] / sums[-1].clamp(min=1)

    # --- checkpoints ---

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._matching.save(output_dir)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not self.args.save_only_model:
            self._matching.load(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._depth is not None:
            self._depth.shrink_to(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = share_tied_weights(self.model, state_dict)
        super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._replay.save(output_dir, self.accelerator.process_index)
        # trainer_state.json comes next and says that a checkpoint is whole: it has to be, on every process.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._matching.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._replay.load(checkpoint, self.accelerator.process_index)

    # --- training log ---

    def train(self, *args, **kwargs):
        if has_length(self.train_dataset) and not len(self.train_dataset):
            raise ValueError("train_dataset has no rows, so there is nothing to train on.")
        try:
            output = super().train(*args, **kwargs)
        finally:
            self._on_own_targets = False
        self._empty_targets.report(self.accelerator, whole_pass=(self.state.epoch or 0) >= 1)
        return output

    def _inner_training_loop(self, *args, **kwargs):
        # Anew each time: `auto_find_batch_size` comes here again after a batch that did not fit.
        self._shared = None
        self._train_sums, self._train_steps = {}, Counter()
        self._replay = ReplayBuffer(self.args.replay_buffer_size)
        self._empty_targets = EmptyTargets(getattr(tokenizer_of(self.processing_class), "eos_token_id", None))
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

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As the base class, with every loss a mean over the target tokens of the whole set."""
        if has_length(dataloader.dataset) and not len(dataloader.dataset):
            raise ValueError(f"the data set to evaluate ({metric_key_prefix}) has no rows.")
        self._eval_sums = {}
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = {name: total.item() for name, total in self._eval_sums.items()}
            if sums:
                tokens = max(sums.pop("tokens"), 1)
                means = {name: total / tokens for name, total in sums.items()}
                means["loss"] = self._combine(means)
                means["loss"] += self.args.hidden_state_weight * means.get("hidden_state_loss", 0.0)
                if self._is_universal:  # ids of the two are not to be compared
                    del means["teacher_agreement"]
                else:
                    means["teacher_agreement"] /= means.pop("teacher_asked") or 1
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        finally:
            self._eval_sums = None
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs,
    ):
        """As the base class: loss, logits or generated tokens, labels; `generate` never sees the teacher's inputs."""
        student = {name: value for name, value in inputs.items() if name not in TEACHER_COLUMNS and value is not None}
        if "labels" not in student:
            return super().prediction_step(model, student, prediction_loss_only, ignore_keys, **gen_kwargs)
        if not self.args.predict_with_generate or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        let_fsdp2_generate(self.model)

        # The base class generates with self.model, and calls `model` only for a loss: it gets ours.
        def with_our_loss(**_student_inputs) -> dict[str, Tensor]:
            return {"loss": self.compute_loss(model, inputs)}

        return super().prediction_step(with_our_loss, student, prediction_loss_only, ignore_keys, **gen_kwargs)

    def _record_evaluation(self, rows: Tensor, batch_size: int, per_token: Mapping[str, Tensor]) -> None:
        """Adds a batch to the sums over the whole set, without the rows that fill up the last distributed batch."""
        terms = {"tokens": torch.ones_like(per_token["ce_loss"]), **per_token}
        by_row = torch.stack(
            [values.new_zeros(batch_size).index_add_(0, rows, values) for values in terms.values()], dim=1
        )
        totals = self.accelerator.gather_for_metrics(by_row).cpu().double().sum(dim=0)
        for name, total in zip(terms, totals, strict=True):
            self._eval_sums[name] = self._eval_sums.get(name, 0) + total

    # --- rows and columns ---

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(with_lengths(dataset, self.args, self.data_collator))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(with_lengths(eval_dataset, self.args, self.data_collator))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += [
                self.args.source_column,
                self.args.target_column,
                MESSAGES,
                *TEACHER_COLUMNS,
            ]

    def _forward_columns(self) -> list[str]:
        self._set_signature_columns_if_needed()
        return self._signature_columns


def _teacher_tokenizer(teacher: "nn.Module | str | os.PathLike"):
    """The tokenizer beside the teacher's weights, or None if there is none to be had."""
    where = getattr(teacher.config, "_name_or_path", None) if isinstance(teacher, nn.Module) else teacher
    if not where:
        return None
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, AttributeError) as error:  # the last is how 4.57 misses a Llama's files
        logger.warning(f"no tokenizer at the teacher's {where!r} ({error}); using the student's for both.")
        return None


def _check_nothing_shared(student: nn.Module, teacher: nn.Module) -> None:
    frozen = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in frozen]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameters, {shared[0]} among them; the teacher is frozen, so "
            "they would be too. Load the teacher a second time, or copy it."
        )
