"""Which of a decoder-only model's layers a student keeps: those that do most on calibration rows, or a pattern."""

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.utils import logging

from ..finite import check_finite
from ..prompts import encode_prompt
from .layer_paths import decoder_path, encoder_path


logger = logging.get_logger(__name__)

_MEASURED = ("influence", "induction", "least_squares", "greedy")  # on calibration rows
LAYER_SELECTIONS = (*_MEASURED, "even", "first")

_CALIBRATION_ROWS = 32
_CALIBRATION_PROMPT, _CALIBRATION_TARGET = 128, 32  # tokens
_CALIBRATION_BATCH = 8
_MOST_TARGET = 64


def calibration_rows(
    calibration, tokenizer, prompt_template, prompt_date, start_token_id, config
) -> list[tuple[list[int], list[int]]]:
    """`(what the teacher reads before the target, target)` as ids. The prompt of a text ends in `start_token_id`.

    Targets are cut to `_MOST_TARGET` tokens, whose distributions over the vocabulary are held in memory. Rows that do
    not fit the positions of the teacher, whose `config` it is, are left out, with a warning.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if calibration is None:
        return [] if tokenizer is None else _documentation_rows(tokenizer)
    rows = []
    for row in calibration:
        if not (isinstance(row, (tuple, list)) and len(row) == 2):
            raise ValueError(
                f"calibration has {row!r:.100}, expected pairs: make them with "
                '[(row["source"], row["target"]) for row in dataset].'
            )
        source, target = row
        if source is None or target is None or isinstance(source, str) != isinstance(target, str):
            raise ValueError(f"calibration has {row!r:.100}, expected two texts, or two lists of token ids.")
        if isinstance(source, str):
            if tokenizer is None:
                raise ValueError("calibration has texts, but there is no tokenizer to encode them; pass tokenizer=.")
            prompt = encode_prompt(tokenizer, source, prompt_template, prompt_date=prompt_date)
            if start_token_id is not None and prompt[-1:] != [start_token_id]:
                prompt = [*prompt, start_token_id]
            rows.append((prompt, tokenizer(target, add_special_tokens=False)["input_ids"]))
        else:
            rows.append((list(source), list(target)))
    rows = [(prompt, target[:_MOST_TARGET]) for prompt, target in rows if len(prompt) > 1 and target]
    for row in rows:
        if foreign := [token for ids in row for token in ids if not 0 <= token < config.vocab_size]:
            raise ValueError(_says_of_a_foreign(foreign[0], config.vocab_size, tokenizer))
    if not rows:
        raise ValueError("calibration has no row with a prompt of two tokens or more and a target; pass some dozen.")
    fitting = [row for row in rows if positions is None or len(row[0]) + len(row[1]) <= positions]
    if not fitting:
        raise ValueError(
            f"calibration has no row that fits the teacher's {positions} positions, the shortest has "
            f"{min(len(prompt) + len(target) for prompt, target in rows)} tokens: cut the prompts."
        )
    if len(fitting) < len(rows):
        logger.warning(
            f"{len(rows) - len(fitting)} of {len(rows)} calibration rows do not fit the teacher's positions."
        )
    return fitting


def _says_of_a_foreign(token: int, vocab_size: int, tokenizer) -> str:
    texts = {} if tokenizer is None else {number: text for text, number in tokenizer.get_vocab().items()}
    if token in texts:
        return (
            f"the tokenizer in {tokenizer.name_or_path} has the token {token}, {texts[token]!r}, and its model has "
            f"embeddings for 0 to {vocab_size - 1}: save the tokenizer there that the model was trained with, or add "
            "rows with model.resize_token_embeddings and train them."
        )
    return (
        f"calibration has the token {token}, and the teacher's are 0 to {vocab_size - 1}: encode it with the "
        "teacher's tokenizer."
    )


def check_rows_to_measure_on(rows, layer_selection) -> None:
    """Raises ValueError where a selection measures and there is nothing to measure on."""
    if layer_selection in _MEASURED and not rows:
        raise ValueError(
            f"layer_selection={layer_selection!r} measures on rows, and there is no tokenizer to make them with: "
            "pass tokenizer=, or calibration= with (prompt ids, target ids) pairs, or choose "
            'layer_selection="even".'
        )


def _documentation_rows(tokenizer):
    """Passages of Python's documentation as the standard library carries it: real text on any machine."""
    from pydoc_data.topics import topics

    rows = []
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name))[:_CALIBRATION_ROWS]:
        ids = tokenizer(topics[topic][:4000], add_special_tokens=False)["input_ids"]
        if len(ids) > 2:
            end = min(_CALIBRATION_PROMPT, max(2, len(ids) * 3 // 4))
            rows.append((ids[:end], ids[end : end + _CALIBRATION_TARGET]))
    return [row for row in rows if row[1]]


def calibration_batches(rows, device) -> list[dict]:
    """Right-padded batches: `sequence` and `prompt_mask`/`target_mask` on its axis for the teacher, and the student's
    inputs, the prompt's last token being where the decoder starts."""
    batches = []
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for begin in range(0, len(rows), _CALIBRATION_BATCH):
        chunk = rows[begin : begin + _CALIBRATION_BATCH]

        def pad(lists):
            rows = [torch.tensor(ids, dtype=torch.long) for ids in lists]
            mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
            return pad_sequence(rows, batch_first=True).to(device), mask.to(device)

        sequence, sequence_mask = pad([[*prompt, *target] for prompt, target in chunk])
        index = torch.arange(sequence.shape[1], device=device)
        prompt_lengths = torch.tensor([[len(prompt)] for prompt, _ in chunk], device=device)
        input_ids, attention_mask = pad([prompt[:-1] for prompt, _ in chunk])
        decoder_input_ids, target_mask = pad([[prompt[-1], *target[:-1]] for prompt, target in chunk])
        batches.append(
            {
                "sequence": sequence,
                "sequence_mask": sequence_mask.long(),
                "prompt_tokens": index < prompt_lengths,
                # The positions that predict the target: from the prompt's last token to the target's last but one.
                "predicting": (index >= prompt_lengths - 1) & (index < sequence_mask.sum(-1, keepdim=True) - 1),
                "input_ids": input_ids,
                "attention_mask": attention_mask.long(),
                "decoder_input_ids": decoder_input_ids,
                "target_mask": target_mask,
            }
        )
    return batches


@torch.no_grad()
def measure_teacher(teacher, batches):
    """One pass of `teacher` over calibration batches: what it predicts, and what each of its L layers does.

    Args:
        teacher ([`PreTrainedModel`]): A decoder-only model of a supported family.
        batches (`list[dict]`): From `calibration_batches`.

    Returns:
        `tuple`: for each batch the log-probabilities `(target tokens, V)`; and the influence of each layer as
        `{"encoder": L numbers, "decoder": L numbers}`, `1 - cos(in, out)` (arXiv 2403.03853, equation 3), mean over
        prompt tokens and over the positions that predict the target. transformers reports the last layer together with
        the final norm.

    Raises:
        ValueError: for log-probabilities that are not finite.
    """
    logprobs, counts = [], {"encoder": 0, "decoder": 0}
    sums = {side: torch.zeros(teacher.config.num_hidden_layers) for side in counts}
    for batch in tqdm(batches, desc="Measuring the teacher", disable=None):  # None: only on a terminal
        outputs = teacher.model(
            input_ids=batch["sequence"],
            attention_mask=batch["sequence_mask"],
            output_hidden_states=True,
            use_cache=False,
        )
        logits = teacher.lm_head(outputs.last_hidden_state[batch["predicting"]])
        logprobs.append(logits.float().log_softmax(-1))
        if not logprobs[-1].isfinite().all():
            check_finite(teacher)
            raise ValueError(
                f"The log-probabilities of the teacher {teacher.name_or_path} on the calibration rows are not finite. "
                f"Its dtype is {teacher.dtype}, which its states overflow: load it with dtype=torch.float32 or "
                "torch.bfloat16."
            )
        states = outputs.hidden_states
        for side, tokens in (("encoder", batch["prompt_tokens"]), ("decoder", batch["predicting"])):
            counts[side] += int(tokens.sum())
            for layer, (entering, leaving) in enumerate(zip(states[:-1], states[1:])):
                cosine = F.cosine_similarity(entering[tokens].float(), leaving[tokens].float(), dim=-1)
                sums[side][layer] += (1 - cosine).sum().item()
    return logprobs, {side: (sums[side] / max(counts[side], 1)).tolist() for side in sums}


def choose_layers(kept, layer_selection, depth, merged, influence, greedy, gaps=None, sharing=1):
    """Layers for each side that has only a number of them, in place.

    Args:
        kept (`dict`): `{"decoder": layers or their number, "encoder": likewise}`, in this order.
        layer_selection (`str`): One of `LAYER_SELECTIONS`.
        depth (`int`): The teacher's number of layers.
        merged (`bool`): Whether the decoder reads the encoder layer by layer.
        influence (`dict`): From `measure_teacher`; for `"induction"` from `copying_first`.
        greedy ([`GreedyRemoval`], *optional*): Needed for `"greedy"`.
        gaps (`dict`, *optional*): From `measure_gaps`, needed for `"least_squares"`.
        sharing (`int`): How many decoder layers read what the first of them makes of the prompt.
    """
    for side in [side for side, layers in kept.items() if isinstance(layers, int)]:
        count, candidates = kept[side], list(range(depth))
        if side == "encoder" and merged:
            # No decoder layer reads what leaves the encoder above the depth of the last one that reads a state.
            readers = kept["decoder"][::sharing]
            candidates = candidates[: max(readers[-1], count)]
        elif merged and count == 1:
            candidates = candidates[-1:]  # layer 0 would read the prompt's embeddings, and no encoder layer
        if layer_selection == "least_squares" and side == "decoder":
            kept[side], _ = decoder_path(gaps, count, merged)
        elif layer_selection == "least_squares":
            kept[side], _ = encoder_path(gaps, count, readers if merged else None)
        elif layer_selection in ("influence", "induction"):
            # What leaves the last layer of a merged encoder is read by the decoder's last alone.
            is_read_once = layer_selection == "induction" and side == "encoder" and merged
            kept[side] = _most_influential(influence[side], candidates, count, with_last=not is_read_once)
        elif layer_selection == "greedy":
            kept[side] = greedy.select(side, candidates, count, kept)
        elif layer_selection == "even":
            kept[side] = _evenly_spaced(candidates, count)
        else:
            kept[side] = [*candidates[: count - 1], candidates[-1]]


def _most_influential(influence, candidates, count, with_last=True):
    """`count` of `candidates`: the first two and the last, then those of most influence."""
    last = candidates[-1:] if with_last else []
    always = list(dict.fromkeys([candidates[0], *last, *candidates[1:2]]))[:count]
    others = sorted((layer for layer in candidates if layer not in always), key=lambda i: (-influence[i], i))
    return sorted([*always, *others[: count - len(always)]])


def _evenly_spaced(candidates, count):
    if count == 1:
        return [candidates[0]]
    return [candidates[round(i * (len(candidates) - 1) / (count - 1))] for i in range(count)]


def remove_greedily(candidates, count, divergence_with, what) -> list[int]:
    """`count` of `candidates`: the one goes, time after time, whose absence leaves the least of `divergence_with`."""
    layers = list(candidates)
    steps = len(layers) - count
    with tqdm(total=steps, desc=f"Taking layers out of {what}", disable=None) as progress:
        for _ in range(steps):
            layers = min(([x for x in layers if x != layer] for layer in layers), key=divergence_with)
            progress.update()
    return layers


def divergence(logits, teacher_logprobs) -> float:
    """KL from the teacher, a mean over the target tokens of all batches; `(target tokens, V)` of each batch."""
    total, tokens = 0.0, 0
    for ours, target in zip(logits, teacher_logprobs):
        total += F.kl_div(ours.float().log_softmax(-1), target, reduction="sum", log_target=True).item()
        tokens += len(target)
    return total / tokens


class GreedyRemoval:
    """Takes layers out of a full student one at a time, always the one whose absence costs least KL to the teacher."""

    def __init__(self, student, batches, teacher_logprobs):
        self.student = student
        self.layers = {side: list(getattr(student.model, side).layers) for side in ("encoder", "decoder")}
        self.batches, self.teacher_logprobs = batches, teacher_logprobs

    def select(self, side, candidates, count, kept):
        kept = {
            name: layers if isinstance(layers, list) else list(range(len(self.layers[name])))
            for name, layers in kept.items()
        }
        kept[side] = list(candidates)
        states = None if side == "encoder" else self._encoder_states(kept["encoder"])
        return remove_greedily(
            candidates, count, lambda layers: self._divergence({**kept, side: layers}, states), f"the {side}"
        )

    @torch.no_grad()
    def _encoder_states(self, layers):
        encoder = self.student.model.encoder
        encoder.layers = torch.nn.ModuleList([self.layers["encoder"][i] for i in layers])
        encoder.states_read = tuple(range(len(layers) + 1))
        return [encoder(batch["input_ids"], attention_mask=batch["attention_mask"]) for batch in self.batches]

    @torch.no_grad()
    def _divergence(self, kept, states):
        states = self._encoder_states(kept["encoder"]) if states is None else states
        decoder = self.student.model.decoder
        decoder.layers = torch.nn.ModuleList([self.layers["decoder"][i] for i in kept["decoder"]])
        if self.student.config.cross_attention == "merged":
            decoder.state_slots = [sum(e < d for e in kept["encoder"]) for d in kept["decoder"]]
        else:
            decoder.state_slots = [len(kept["encoder"])] * len(kept["decoder"])
        return divergence(
            (
                self.student(
                    encoder_outputs=state,
                    attention_mask=batch["attention_mask"],
                    decoder_input_ids=batch["decoder_input_ids"],
                    use_cache=False,
                ).logits[batch["target_mask"]]
                for batch, state in zip(self.batches, states)
            ),
            self.teacher_logprobs,
        )
