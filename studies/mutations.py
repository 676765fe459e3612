"""Every property that has to be exact, broken on purpose: which line was broken, and which test caught it.

    python studies/mutations.py

For each entry of `MUTATIONS` the package is copied, one line of the copy is broken, and the test that is to guard the
property runs on the copy; it has to fail there, and to pass on the package as it is. The table is the
last section of docs/design.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/hf_encdec_distill"
OUTPUT = ROOT / "docs" / "design.md"
HEADING = "## What has to be exact, broken on purpose"

PROPERTIES = {
    1: "Pads never enter a mean; the denominator is the target tokens of the whole accumulated, distributed batch",
    2: "Teacher logits `[P-1 : P-1+T]` against unshifted labels; ragged prompts, either padding side, pad == EOS",
    3: "One BOS in the teacher's prompt, its own chat template",
    4: "Divergences in float32, never negative, zero when equal, temperature squared",
    5: "Ids that only one side has get probability 0, or an error",
    6: "Chunked loss equals dense loss and never holds all logits",
    7: "Top-k records carry their tail, sampled records are unbiased",
    8: "A cache knows what made it; torn shards are found; captures go on",
    9: "`teacher_*` columns survive; rollouts in eval mode, train mode restored; a seeded coin",
    10: "A batch without any target: loss 0, finite gradients",
    11: "Stopped and resumed equals never stopped",
    12: "A merged, causal student of full depth has its teacher's logits",
    13: "Generation with cache equals without, ragged equals one by one, and without the package",
}


@dataclass(frozen=True)
class Mutation:
    """`old` occurs once in `file` of the package; with `new` in its place `test` fails."""

    number: int  # of the property
    what: str
    file: str
    old: str
    new: str
    test: str


_LOSS, _RESUME = "invariants/test_trainer_loss.py", "invariants/test_trainer_resume.py"
_SEEING = "invariants/test_seeing_teacher.py"
_CHUNKED = "distillation/options/chunked_logits.py"
_TRAINER, _LOSSES = "distillation/trainer.py", "distillation/losses.py"
_POSITIONS, _VOCABULARIES = "distillation/alignment/positions.py", "distillation/alignment/vocabularies.py"
_CAPTURE, _RECORDED = "distillation/teachers/capture.py", "distillation/teachers/recorded.py"
_EVALUATING = "models/evaluating.py"
_FINGERPRINTS, _ROLLOUTS = "distillation/teachers/fingerprints.py", "distillation/options/rollouts.py"
_STATES = "distillation/options/encoder_states.py"
_MODELING = "models/rope_encdec/modeling_rope_encdec.py"

MUTATIONS = [
    Mutation(
        1,
        "the mean is over the micro-batch, not over the step",
        _TRAINER,
        "count = len(rows) if num_items_in_batch is None else num_items_in_batch",
        "count = len(rows)",
        f"{_LOSS}::test_a_step_is_the_same_however_it_is_cut",
    ),
    Mutation(
        1,
        "pads count as targets",
        _TRAINER,
        'return sum(batch["labels"].ne(IGNORED).sum() for batch in batch_samples).to(device)',
        'return sum(batch["labels"].numel() for batch in batch_samples)',
        f"{_LOSS}::test_several_devices_in_one_process_count_the_whole_batch",
    ),
    Mutation(
        1,
        "gradients of two processes are averaged, their tokens added",
        _TRAINER,
        "return self.accelerator.num_processes // self.get_tp_size()",
        "return 1",
        "invariants/test_trainer_distributed.py::test_weights_and_logs_of_two_processes",
    ),
    Mutation(
        1,
        "evaluation counts the rows that fill up the last distributed batch",
        _TRAINER,
        "self.accelerator.gather_for_metrics(by_row)",
        "self.accelerator.gather(by_row)",
        "invariants/test_trainer_distributed.py::test_evaluation_of_two_processes",
    ),
    Mutation(
        1,
        "each process trains an encoder that is unfrozen by itself",
        "distillation/options/frozen_encoder.py",
        "if isinstance(trainer.model_wrapped, DistributedDataParallel):",
        "if False:",
        "invariants/test_encoder_states.py::test_two_processes_share_the_states",
    ),
    Mutation(
        2,
        "the teacher is read one column late",
        _POSITIONS,
        "return labels_start[rows] - 1 + columns",
        "return labels_start[rows] + columns",
        f"{_LOSS}::test_loss_and_gradient_of_a_padded_batch",
    ),
    Mutation(
        2,
        "the teacher counts columns, not tokens",
        "distillation/teachers/live.py",
        "(attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)",
        "torch.arange(attention_mask.shape[1]).expand_as(attention_mask)",
        "unit/test_alignment.py::test_live_teacher_equals_each_row_alone",
    ),
    Mutation(
        2,
        "a teacher with M-RoPE counts the tokens of an image one by one",
        "distillation/teachers/live.py",
        "if seen and self._has_mrope:",
        "if False:",
        f"{_SEEING}::test_logits_of_a_ragged_batch_are_those_of_each_row_alone",
    ),
    Mutation(
        2,
        "padding inside the teacher's sequence stays there",
        _POSITIONS,
        "order = (~mask).int().argsort(dim=1, stable=True)",
        "order = torch.arange(mask.shape[1]).expand_as(mask)",
        "unit/test_alignment.py::test_derived_inputs_are_prompt_then_target",
    ),
    Mutation(
        2,
        "a decoder-only student is read one column late",
        "distillation/decoder_only_student.py",
        "return columns - _ends(labels)[rows] - 1",
        "return columns - _ends(labels)[rows]",
        "invariants/test_decoder_only_student.py::test_loss_and_gradient_of_a_ragged_batch",
    ),
    Mutation(
        2,
        "the log-probabilities of a server are those of the token before",
        "distillation/teachers/wire.py",
        '[(value["logprob"], int(token)) for token, value in predicted[column + 1].items()]',
        '[(value["logprob"], int(token)) for token, value in (predicted[column] or predicted[1]).items()]',
        "unit/test_served.py::test_scores_are_those_of_the_model",
    ),
    Mutation(
        3,
        "no BOS where the chat template has none",
        "models/prompts.py",
        "        return [bos, *ids]\n",
        "        return ids\n",
        "unit/test_prompts.py::test_there_is_exactly_one_bos",
    ),
    Mutation(
        3,
        "a BOS beside that of the chat template",
        "models/prompts.py",
        "if bos is not None and ids[:1] != [bos] and",
        "if bos is not None and",
        "unit/test_prompts.py::test_there_is_exactly_one_bos",
    ),
    Mutation(
        4,
        "half precision stays half precision",
        _LOSSES,
        "    dtype = at_least_float32(student_logits.dtype)\n    return (\n",
        "    dtype = student_logits.dtype\n    return (\n",
        "unit/test_losses.py::test_half_precision_is_computed_in_float32",
    ),
    Mutation(
        4,
        "rounding may leave a divergence below 0",
        _LOSSES,
        "return torch.where(kl < 0, kl - kl.detach(), kl)",
        "return kl",
        "unit/test_losses.py::test_never_negative_and_zero_when_equal",
    ),
    Mutation(
        4,
        "no temperature squared",
        _TRAINER,
        'terms["distill_loss"] = divergence * temperature**2',
        'terms["distill_loss"] = divergence',
        f"{_LOSS}::test_loss_and_gradient_of_a_padded_batch",
    ),
    Mutation(
        4,
        "the sides of the Jensen-Shannon divergence change places",
        _LOSSES,
        "return beta * of_teacher + (1.0 - beta) * of_student",
        "return (1.0 - beta) * of_teacher + beta * of_student",
        "unit/test_losses.py::test_equals_torch_distributions",
    ),
    Mutation(
        5,
        "ids of one tokenizer keep their mass",
        _VOCABULARIES,
        "logits = logits.index_fill(-1, torch.tensor(self.one_sided, device=logits.device), -torch.inf)",
        "pass",
        "unit/test_alignment.py::test_tokens_of_one_tokenizer_get_probability_zero",
    ),
    Mutation(
        5,
        "padded rows of the vocabulary keep their mass",
        _VOCABULARIES,
        "logits = logits[..., : self.size]",
        "pass",
        f"{_LOSS}::test_loss_is_the_same_for_a_padded_vocabulary",
    ),
    Mutation(
        5,
        "`strict` looks at sizes alone",
        _VOCABULARIES,
        'if policy == "strict" and (student_size != teacher_size or one_sided):',
        'if policy == "strict" and student_size != teacher_size:',
        "unit/test_alignment.py::test_tokens_of_one_tokenizer_get_probability_zero",
    ),
    Mutation(
        6,
        "only the last chunk reaches the head's gradient",
        _LOSSES,
        "of_weight += of_logits.T @ hidden[chunk]",
        "of_weight = of_logits.T @ hidden[chunk]",
        "unit/test_losses.py::test_chunked_equals_dense",
    ),
    Mutation(
        6,
        "terms are not weighed",
        _LOSSES,
        "total = (values * values.new_tensor(term_weights)[:, None]).sum()",
        "total = values.sum()",
        "unit/test_losses.py::test_chunked_terms_are_weighed",
    ),
    Mutation(
        6,
        "all logits are made at once",
        _LOSSES,
        "for first in range(0, len(hidden), chunk_size):",
        "for first in range(0, len(hidden), chunk_size := len(hidden)):",
        "unit/test_losses.py::test_chunked_never_holds_all_logits",
    ),
    Mutation(
        7,
        "the tail has no mass",
        _CAPTURE,
        "tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)",
        "tail = torch.full(ids.shape[:-1], -torch.inf)",
        "unit/test_cache.py::test_part_of_the_distribution_gives_the_loss_by_hand",
    ),
    Mutation(
        7,
        "importance weights forget from what was drawn",
        _CAPTURE,
        'weights = counts / recorded["rounds"] * (log_probs - log_proposal).exp()',
        'weights = counts / recorded["rounds"]',
        "unit/test_cache.py::test_samples_are_drawn_from_the_teacher",
    ),
    Mutation(
        7,
        "a token that came up twice counts once",
        _CAPTURE,
        "counts = torch.zeros_like(log_probs).scatter_add_(",
        "counts = torch.zeros_like(log_probs).scatter_(",
        "unit/test_cache.py::test_samples_are_drawn_from_the_teacher",
    ),
    Mutation(
        8,
        "the weights of the teacher are no part of what a cache is",
        _RECORDED,
        '    "teacher_weights",\n)',
        ")",
        "unit/test_cache.py::test_another_teacher_tokenizer_template_or_kind_is_refused",
    ),
    Mutation(
        8,
        "a row is known by its tokens alone, not by where it was asked",
        _FINGERPRINTS,
        "digest.update(np.flatnonzero(is_asked[is_read])",
        "digest.update(np.flatnonzero(is_asked[is_read][:0])",
        "invariants/test_trainer_positions.py::test_a_cache_holds_what_was_asked",
    ),
    Mutation(
        8,
        "a row is known by its tokens alone, not by its images",
        _FINGERPRINTS,
        "if of_images.any():",
        "if False:",
        f"{_SEEING}::test_the_key_of_a_row_covers_its_images",
    ),
    Mutation(
        8,
        "a shard's hash is not looked at",
        "distillation/teachers/shards.py",
        'if not shard.stem.endswith(f"-{digest}"):',
        "if not digest:",
        "unit/test_cache.py::test_a_damaged_shard_is_found_and_captured_again",
    ),
    Mutation(
        8,
        "a shard is written under its own name",
        "distillation/teachers/shards.py",
        "partial = self.folder / partial_name(self.worker)",
        'partial = self.folder / f"{self.prefix}-{self.worker}-{self._number:05}-new.parquet"',
        "unit/test_cache.py::test_killed_at_any_file_operation_it_goes_on",
    ),
    Mutation(
        8,
        "what another worker is writing is removed",
        "distillation/teachers/shards.py",
        'if not partial.name.startswith(f"{PARTIAL}{worker}-") and',
        'if not partial.name.startswith(f"{PARTIAL}") and',
        "unit/test_workers.py::test_only_what_nobody_writes_any_more_is_removed",
    ),
    Mutation(
        8,
        "the manifest is that of whoever comes last",
        "distillation/teachers/workers.py",
        "os.link(file, place)",
        "os.replace(file, place)",
        "unit/test_workers.py::test_a_manifest_that_came_in_between_stays",
    ),
    Mutation(
        8,
        "merging takes the shards away from the folders that are merged",
        "distillation/teachers/workers.py",
        "_put(shard.resolve(), output / shard.name, _MERGING)",
        "os.replace(shard.resolve(), output / shard.name)",
        "unit/test_workers.py::test_folders_are_merged_without_a_rewrite",
    ),
    Mutation(
        8,
        "rows that are there are captured again",
        _CAPTURE,
        "if key is not None and key not in known:",
        "if key is not None:",
        "unit/test_cache.py::test_a_capture_goes_on_where_it_was_stopped",
    ),
    Mutation(
        8,
        "rows of a server are kept before it is known which model gave them",
        _CAPTURE,
        "        teacher.confirm()\n",
        "        pass\n",
        "unit/test_served.py::test_another_model_half_way_is_noticed_before_its_rows_are_kept",
    ),
    Mutation(
        8,
        "a training learns from whichever model comes to be behind the address of a server",
        "distillation/options/asked_ahead.py",
        "self._teacher.confirm()",
        "pass",
        "unit/test_served.py::test_a_training_ends_where_the_model_is_another",
    ),
    Mutation(
        8,
        "the weights of the encoder are no part of what its states are known by",
        _STATES,
        "        weights_digest(encoder),\n",
        "",
        "invariants/test_encoder_states.py::test_other_weights_precision_and_states_are_others",
    ),
    Mutation(
        8,
        "states are written under their own name",
        _STATES,
        "partial = self._place / partial_name(self._worker)",
        'partial = self._place / f"states-{name}{_SUFFIX}"',
        "invariants/test_encoder_states.py::test_a_file_is_whole_or_not_there",
    ),
    Mutation(
        9,
        "the trainer drops the teacher's columns as unused",
        _TRAINER,
        "                *TEACHER_COLUMNS,\n",
        "",
        "invariants/test_trainer_positions.py::test_training_keeps_the_column",
    ),
    Mutation(
        9,
        "`generate` gets the teacher's columns",
        _TRAINER,
        "if not n.startswith(OF_TEACHER) and value is not None}",
        "if value is not None}",
        f"{_LOSS}::test_predictions_equal_those_of_seq2seq_trainer",
    ),
    Mutation(
        9,
        "a rollout loses the teacher's images",
        _ROLLOUTS,
        "rolled |= {OF_TEACHER + name: value for name, value in images.items()}",
        "",
        f"{_SEEING}::test_on_policy_the_teacher_sees_the_prompts_images",
    ),
    Mutation(
        9,
        "the student writes with dropout",
        _EVALUATING,
        "    model.eval()\n",
        "",
        "invariants/test_on_policy.py::test_a_rollout_is_what_generate_gives",
    ),
    Mutation(
        9,
        "the student stays in eval mode",
        _EVALUATING,
        "module.training = True",
        "module.training = False",
        "invariants/test_on_policy.py::test_a_rollout_is_what_generate_gives",
    ),
    Mutation(
        9,
        "the student writes without its cache",
        _ROLLOUTS,
        "use_cache=True,",
        "use_cache=False,",
        "invariants/test_on_policy.py::test_a_rollout_is_what_generate_gives",
    ),
    Mutation(
        9,
        "the coin comes from the process's random numbers",
        _ROLLOUTS,
        "return float(np.random.default_rng((seed, step, purpose)).random())",
        "return float(np.random.random())",
        "invariants/test_on_policy.py::test_the_coin_is_the_same_for_all_and_fair",
    ),
    Mutation(
        10,
        "a mean over no token",
        _LOSSES,
        "(count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))",
        "count",
        f"{_LOSS}::test_a_batch_without_any_target_changes_nothing",
    ),
    Mutation(
        11,
        "the replay buffer is not in the checkpoint",
        _TRAINER,
        "self._on_policy.replay.save(output_dir, self.accelerator.process_index)",
        "pass",
        "invariants/test_on_policy.py::test_resumed_equals_never_stopped_with_replay",
    ),
    Mutation(
        9,
        "a rollout draws from the process's random numbers",
        _ROLLOUTS,
        "with torch.random.fork_rng(devices), evaluating(model):\n        torch.manual_seed(seed)\n",
        "with evaluating(model):\n",
        "invariants/test_on_policy.py::test_sampling_is_seeded_and_in_proportion_to_its_temperature",
    ),
    Mutation(
        11,
        "finding out about the head draws random numbers",
        _CHUNKED,
        "with torch.random.fork_rng(devices), catch_head_input(head, zero, zero) as caught:",
        "with catch_head_input(head, zero, zero) as caught:",
        f"{_LOSS}::test_finding_out_about_the_head_draws_no_random_numbers",
    ),
    Mutation(
        11,
        "the projections of the hidden states begin again",
        "distillation/options/hidden_states.py",
        "self._matching.load(checkpoint)",
        "pass",
        "invariants/test_hidden_states.py::test_resumed_equals_never_stopped",
    ),
    Mutation(
        11,
        "a deep student is given the weights of a shallower one",
        _TRAINER,
        "self._depth.shrink_to(resume_from_checkpoint)",
        "pass",
        "invariants/test_schedules.py::test_resumed_equals_never_stopped",
    ),
    Mutation(
        11,
        "batches by tokens come in the order of the first epoch",
        _TRAINER,
        "epoch=lambda: int(self.state.epoch or 0)",
        "epoch=lambda: 0",
        "invariants/test_token_batches.py::test_resumed_equals_never_stopped",
    ),
    Mutation(
        12,
        "the target's positions begin at 0",
        _MODELING,
        "position_ids = position_ids + encoder_attention_mask.long().sum(-1, keepdim=True) * pooling",
        "pass",
        "model/test_from_decoder_only.py::test_merged_at_full_depth_is_the_teacher",
    ),
    Mutation(
        12,
        "prompts are counted with their padding",
        _MODELING,
        "return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
        "return torch.arange(attention_mask.shape[1], device=device).expand_as(attention_mask)",
        "model/test_from_decoder_only.py::test_merged_at_full_depth_is_the_teacher",
    ),
    Mutation(
        12,
        "the class token of a tower is taken for a patch",
        "models/rope_encdec/modeling_rope_encdec_vision.py",
        "patches = states[:, -rows * columns :]",
        "patches = states[:, : rows * columns]",
        "model/test_vision.py::test_a_student_of_full_depth_has_the_logits_of_its_llava",
    ),
    Mutation(
        12,
        "a teacher that reads the same tokens stands in for images",
        "distillation/options/shared_prompt.py",
        'if student_inputs.get("pixel_values") is not None:',
        "if False:",
        "invariants/test_vision_student.py::test_images_count_where_the_teacher_reads_the_same_tokens",
    ),
    Mutation(
        13,
        "a cached step begins at position 0",
        _MODELING,
        "past_length = 0 if past_key_values is None else past_key_values.get_seq_length()",
        "past_length = 0",
        "model/test_cache_and_generation.py::test_token_by_token_in_chunks_and_at_once",
    ),
    Mutation(
        13,
        "a row's padding moves its positions",
        _MODELING,
        "return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
        "return torch.arange(attention_mask.shape[1], device=device).expand_as(attention_mask)",
        "model/test_cache_and_generation.py::test_generate_on_ragged_prompts_is_argmax_row_by_row",
    ),
    Mutation(
        13,
        "pads enter the means of a pooled prompt",
        _MODELING,
        "for x in (hidden_states.transpose(1, 2) * real, real)",
        "for x in (hidden_states.transpose(1, 2), real)",
        "model/test_cache_and_generation.py::test_generate_on_ragged_prompts_is_argmax_row_by_row",
    ),
    Mutation(
        13,
        "the first cached step of a layer that shares the prompt's keys makes its own",
        _MODELING,
        "key, value = shared or project()",
        "key, value = project()",
        "model/test_sharing.py::test_answers_are_those_of_the_formula",
    ),
    Mutation(
        13,
        "what travels to the Hub imports the package",
        _MODELING,
        "from .compat_rope_encdec import",
        "from hf_encdec_distill.models.rope_encdec.compat_rope_encdec import",
        "hub/test_remote_code.py::test_a_folder_loads_where_the_package_is_not",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="properties to look at; writes no table")
    chosen = parser.parse_args().only
    mutations = [mutation for mutation in MUTATIONS if chosen is None or mutation.number in chosen]
    escaped = []
    for mutation in mutations:
        caught = is_caught(mutation)
        print(f"{'caught ' if caught else 'ESCAPED'} {mutation.number:2} {mutation.what}: {mutation.test}", flush=True)
        if not caught:
            escaped.append(mutation)
    tests = list(dict.fromkeys(mutation.test for mutation in mutations))
    if run_tests(ROOT, *tests) != 0:
        raise SystemExit("the tests do not pass on the package as it is")
    if escaped:
        raise SystemExit(f"{len(escaped)} of {len(mutations)} were not caught")
    if chosen is None:
        before = OUTPUT.read_text(encoding="utf-8").partition(HEADING)[0]
        OUTPUT.write_text(before + table(), encoding="utf-8")


def is_caught(mutation: Mutation) -> bool:
    """Whether the test fails, and does so by itself, on a copy of the package with the line broken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests", "pyproject.toml"):
            path = ROOT / name
            (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / name)
        file = copy / PACKAGE / mutation.file
        file.write_text(broken(file.read_text(encoding="utf-8"), mutation), encoding="utf-8")
        return run_tests(copy, mutation.test) == 1  # 1: tests failed; others: pytest could not run them


def broken(text: str, mutation: Mutation) -> str:
    """`text` with the mutation in it; ValueError where the line is not there, or there twice."""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, expected once.")
    return text.replace(mutation.old, mutation.new)


def run_tests(root: Path, *tests: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *(f"tests/{test}" for test in tests)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True).returncode


def table() -> str:
    lines = [
        f"{HEADING}\n",
        "Output of `python studies/mutations.py`: with the line changed as it says, the test on the right failed.\n",
    ]
    for number, title in PROPERTIES.items():
        lines += [f"### {number}. {title}\n", "| broken | line | caught by |", "|---|---|---|"]
        for mutation in (mutation for mutation in MUTATIONS if mutation.number == number):
            old, new = (re.sub(r"\s+", " ", code).strip().replace("|", "\\|") for code in (mutation.old, mutation.new))
            change = f"`{old}` → `{new}`" if new else f"without `{old}`"
            lines.append(f"| {mutation.what} | `{mutation.file}`: {change} | `{mutation.test}` |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
