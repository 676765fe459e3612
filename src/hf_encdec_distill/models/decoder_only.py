"""A decoder-only student: a decoder-only model with some of its layers.

It is a model of transformers, of the teacher's own class, and needs nothing of this package to be loaded.
"""

import copy

import torch
from transformers import PreTrainedModel

from .cost import model_cost
from .evaluating import evaluating
from .prompts import frozen_prompt_date, with_prompt_as_chat_template
from .rope_encdec.healing import MEASURED_ROWS, heal_decoder_only, predicting_logits, rescale_norm
from .rope_encdec.induction import copying_first
from .rope_encdec.initialization import check_teacher, load_with_tokenizer, requested_layers
from .rope_encdec.layer_choice import (
    calibration_batches,
    calibration_rows,
    check_rows_to_measure_on,
    choose_layers,
    divergence,
    measure_teacher,
    remove_greedily,
)
from .rope_encdec.layer_paths import measure_gaps


_PER_LAYER = ("layer_types", "no_rope_layers")  # lists in the configs of the supported families


def prune_decoder_only(
    teacher,
    *,
    num_hidden_layers=None,
    layers=None,
    layer_selection="influence",
    heal="least_squares",
    calibration=None,
    tokenizer=None,
    prompt_template=None,
    prompt_date=None,
) -> PreTrainedModel:
    """Build a smaller decoder-only model from some of a decoder-only model's layers.

    Args:
        teacher ([`PreTrainedModel`] or `str`): A loaded causal LM, a folder or a Hub id, of one of
            `SUPPORTED_FAMILIES`; the adapter in a folder is merged.
        num_hidden_layers (`int`, *optional*): How many layers to keep; `None` keeps all.
        layers (`list[int]`, *optional*): The teacher's layers to keep, instead of a number.
        layer_selection (`str`): As in
            [`~hf_encdec_distill.RopeEncDecForConditionalGeneration.from_decoder_only`]; `"influence"` is measured on
            target tokens.
        heal (`str`, *optional*): As there; `student.healing` says what it brought.
        calibration, tokenizer, prompt_template, prompt_date: As there.

    Returns:
        [`PreTrainedModel`]: Of the teacher's class, in evaluation mode, in the teacher's dtype, weights its own, with
        the teacher's generation config. Its final norm is rescaled if it lacks layers. With `student.tokenizer` where
        a tokenizer was found; `prompt_template` is its chat template.

    Raises:
        ValueError: for an unsupported family (the message lists the supported ones), a model with an adapter on it,
            layers that are not there, a selection that needs calibration rows when there is no tokenizer, or
            log-probabilities of the teacher that are not finite.
    """
    teacher, tokenizer = load_with_tokenizer(teacher, tokenizer)
    check_teacher(teacher, layer_selection, heal)
    depth = teacher.config.num_hidden_layers
    kept = requested_layers("", num_hidden_layers, layers, depth)
    prompt_date = frozen_prompt_date(tokenizer, prompt_template, prompt_date)

    with evaluating(teacher):
        batches = []
        if kept != list(range(depth)):
            rows = calibration_rows(calibration, tokenizer, prompt_template, prompt_date, None, teacher.config)
            if isinstance(kept, int):
                check_rows_to_measure_on(rows, layer_selection)
            batches = calibration_batches(rows[:MEASURED_ROWS], next(teacher.parameters()).device)
            teacher_logprobs, influence = measure_teacher(teacher, batches)
            if isinstance(kept, int):
                kept = _choose(teacher, kept, layer_selection, rows, batches, teacher_logprobs, influence)
        student = _with_layers(teacher, kept)
        student.healing = heal_decoder_only(student, teacher, kept, rows) if batches and heal else None
        if batches and not (student.healing and student.healing.taken):
            rescale_norm(student.model.norm, predicting_logits(student, batches), teacher_logprobs)

    if tokenizer is not None:
        student.tokenizer = with_prompt_as_chat_template(tokenizer, prompt_template)
    if prompt_date is not None:
        student.config.prompt_date = prompt_date
    return student


def config_of_size(config, parameters):
    """The config of the largest model of a decoder-only model's own layers, as many of them as it takes, that has no
    more than so many parameters.

    Returns:
        A copy; None if not even one layer fits.

    Raises:
        ValueError: for an unsupported family.
    """
    config = copy.deepcopy(config)
    totals = []
    for config.num_hidden_layers in (1, 2):
        totals.append(model_cost(config, prompt_length=2).parameters["total"])
    layer = totals[1] - totals[0]
    layers = (parameters - totals[0]) // layer + 1
    if layers < 1:
        return None
    for name in _PER_LAYER:
        if getattr(config, name, None) is not None:
            pattern = getattr(config, name)
            setattr(config, name, [pattern[index % len(pattern)] for index in range(layers)])
    config.num_hidden_layers = layers
    return config


def _choose(teacher, count, layer_selection, rows, batches, teacher_logprobs, influence) -> list[int]:
    depth = teacher.config.num_hidden_layers
    if layer_selection != "greedy":
        kept, gaps = {"decoder": count}, None
        if layer_selection == "induction":
            influence = copying_first(teacher, influence, alone=True)
        if layer_selection == "least_squares":
            gaps = measure_gaps(teacher, calibration_batches(rows, teacher.device))
        choose_layers(kept, layer_selection, depth, False, influence, None, gaps)
        return kept["decoder"]

    def divergence_with(layers):
        return divergence(
            predicting_logits(_with_layers(teacher, layers, share_memory=True), batches), teacher_logprobs
        )

    return remove_greedily(range(depth), count, divergence_with, "the model")


def _with_layers(teacher, layers, share_memory=False):
    """A model of the teacher's class with these of its layers, which holds the teacher's tensors or copies of them."""
    config = copy.deepcopy(teacher.config)
    config._name_or_path = ""
    for name in _PER_LAYER:
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[layer] for layer in layers])
    if getattr(config, "max_window_layers", None) is not None:  # layers below it have full attention
        config.max_window_layers = sum(layer < config.max_window_layers for layer in layers)
    config.num_hidden_layers = len(layers)
    state = _state(teacher, layers)
    if not share_memory:
        state = {name: tensor.clone() for name, tensor in state.items()}
    with torch.device("meta"):
        student = type(teacher)(config)
    student.load_state_dict(state, assign=True)
    student.model.rotary_emb = type(teacher.model.rotary_emb)(config).to(teacher.device)
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _state(teacher, layers) -> dict:
    """Student tensors by name, views of the teacher's."""
    positions = {layer: position for position, layer in enumerate(layers)}
    state = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith("model.layers."):
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            if int(layer) not in positions:
                continue
            name = f"model.layers.{positions[int(layer)]}.{rest}"
        state[name] = tensor.detach()
    return state
