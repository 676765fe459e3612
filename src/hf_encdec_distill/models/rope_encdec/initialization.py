"""A student from a decoder-only teacher's own layers."""

import copy
import logging

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..evaluating import evaluating
from ..families import rope_limit
from ..loading import load_merged_teacher, load_tokenizer
from ..prompts import (
    distinct_pad_token,
    frozen_prompt_date,
    prompt_start_token_id,
    student_tokenizer,
)
from ..vocabulary import trim_vocabulary
from ..whole_weights import whole_on_each_process
from .budget import layers_within
from .configuration_rope_encdec import RopeEncDecConfig
from .healing import (
    MEASURED_ROWS,
    best_scale,
    heal_encoder_decoder,
    parted,
    rescale_norm,
    target_logits,
)
from .induction import copying_first
from .layer_choice import (
    LAYER_SELECTIONS,
    GreedyRemoval,
    calibration_batches,
    calibration_rows,
    check_rows_to_measure_on,
    choose_layers,
    measure_teacher,
)
from .layer_paths import measure_gaps
from .modeling_rope_encdec import RopeEncDecForConditionalGeneration
from .narrowing import narrow_decoder
from .teacher_layers import check_family, load_layers, student_config


logger = logging.getLogger(__name__)

HEALING = ("least_squares", None)


def from_decoder_only(
    teacher,
    *,
    encoder_num_hidden_layers=None,
    decoder_num_hidden_layers=None,
    encoder_layers=None,
    decoder_layers=None,
    decoder_intermediate_size=None,
    cross_attention="merged",
    cross_attention_sharing=1,
    encoder_attention="causal",
    encoder_pooling=1,
    encoder_pooling_layer=None,
    encoder_layer_types=None,
    encoder_sliding_window=None,
    layer_selection="influence",
    budget=None,
    heal="least_squares",
    calibration=None,
    tokenizer=None,
    trimmed_tokenizer=None,
    prompt_template=None,
    prompt_date=None,
    model_class=RopeEncDecForConditionalGeneration,
    **config_overrides,
):
    """Build an encoder-decoder from a decoder-only model.

    With `cross_attention="merged"`, a causal encoder and all layers kept, the student computes what the teacher
    computes: a target token of a decoder-only model attends, layer by layer, to the keys and values of the prompt, and
    the encoder hands over exactly the states that these are made from. Every layer taken out costs some of that;
    distillation heals it. RoPE of type `"dynamic"` or `"longrope"` turns by the length of a call, which the two sides
    divide between them: there it holds for prompts and targets that fit the length before scaling, and a warning says
    so.

    With `"separate"` (arXiv 2501.16273; initialised as in T5Gemma, arXiv 2504.06225) each decoder layer gets a
    cross-attention copied from the self-attention that it joins, its output projection at zero, so that a decoder of
    full depth starts as the teacher reading the target alone.

    Args:
        teacher ([`PreTrainedModel`] or `str`): A loaded causal LM, a folder or a Hub id, of one of
            `SUPPORTED_FAMILIES`; the adapter in a folder is merged.
        encoder_num_hidden_layers, decoder_num_hidden_layers (`int`, *optional*): How many layers each side keeps;
            `None` keeps all. For `merged`, layers above the last state that the decoder reads would do nothing, so
            unless all are kept the encoder chooses among those below the teacher's last.
        encoder_layers, decoder_layers (`list[int]`, *optional*): The teacher's layers to keep, instead of a number.
        decoder_intermediate_size (`int`, *optional*): Neurons to keep in each MLP of the decoder; `None` keeps all.
            Each layer's are chosen by what the fit cannot make up for, without a fit by what they write on the
            calibration rows, and without rows by their weights
            ([`~hf_encdec_distill.models.rope_encdec.narrowing`]).
        cross_attention (`str`), encoder_attention (`str`): As in [`RopeEncDecConfig`].
        cross_attention_sharing (`int`): Likewise. Layers are chosen as if each made its own keys and values of the
            prompt, and fitted as they are.
        encoder_pooling (`int`), encoder_pooling_layer (`int`, *optional*), encoder_layer_types (`list[str]`,
            *optional*), encoder_sliding_window (`int`, *optional*): Likewise. Layers are chosen as if nothing was
            pooled and all attended in full, and fitted as they are. A teacher's own windows are not taken over.
        layer_selection (`str`): `"influence"` keeps the layers that change their input most, `1 - cos(in, out)` on the
            calibration rows (ShortGPT, arXiv 2403.03853), on prompt tokens for the encoder and on target tokens for
            the decoder, always with the first two and the last; `"induction"` chooses like it, after the layers by
            which the teacher copies ([`~hf_encdec_distill.models.rope_encdec.induction`]); `"greedy"` takes out, one
            by one, the layer whose absence raises the KL divergence from the teacher least, with `merged` attention
            whichever kind is built; `"least_squares"` keeps those that a linear fit joins best
            ([`~hf_encdec_distill.models.rope_encdec.layer_paths`]); `"even"` spaces them evenly; `"first"` keeps the
            first ones and the last. The only layer of a `merged` decoder is the last: layer 0 would read no
            encoder layer.
        budget ([`~hf_encdec_distill.models.rope_encdec.budget.Budget`], *optional*): A request, and how many times
            faster than the teacher the student has to answer it, instead of numbers of layers. Of the splits that are
            fast enough, the three with the best layers by `"least_squares"` are tried, with these layers and with
            those of most influence, and the student nearest to the teacher on held-out calibration rows is taken.
        heal (`str`, *optional*): `"least_squares"` fits the layers that are kept to the teacher's states on the
            calibration rows ([`~hf_encdec_distill.models.rope_encdec.least_squares.fit_encoder_decoder`]), with one
            pass of the teacher and no gradient. A fifth of the rows, 64 at most, is held out; where the fitted student
            is not nearer to the teacher on these than the plain one, a warning says so and the plain one is returned.
            `None` leaves the teacher's weights as they are. A student that computes what its teacher does is never
            fitted.
        calibration (`list` of pairs, *optional*): `(source, target)` texts, or `(prompt ids, target ids)` as lists. By
            default 32 passages of the Python documentation that the standard library carries. The first 64 tokens of a
            target count; rows longer than the teacher's `max_position_embeddings` are left out, with a warning.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): The teacher's; by default the one saved with it.
        trimmed_tokenizer (`PreTrainedTokenizerFast`, *optional*): One whose tokens are all the teacher's, such as
            [`~hf_encdec_distill.models.vocabulary.trim_tokenizer`] makes: the student gets the embedding rows of these
            alone, and is distilled with `vocab_policy="id_map"`.
        prompt_template (`str`, *optional*): See [`~hf_encdec_distill.models.prompts.encode_prompt`].
        prompt_date (`str`, *optional*): `YYYY-MM-DD`, the day that the teacher's chat template is told it is, if it
            names the day (those of Llama 3.2 and SmolLM3 do); by default today. It is `config.prompt_date` of the
            student, whose prompts name that day ever after.
        **config_overrides: Further fields of [`RopeEncDecConfig`], special tokens by the teacher's ids.

    Returns:
        [`RopeEncDecForConditionalGeneration`]: In evaluation mode, in the teacher's dtype, weights its own. With
        `student.tokenizer` where a tokenizer was found, the teacher's generation config without its `max_length` and
        `min_length`, which count the prompt there, and `student.healing`, a
        [`~hf_encdec_distill.models.rope_encdec.least_squares.Healing`] where layers were fitted. A
        `repetition_penalty` counts the tokens of the answer alone, as in any encoder-decoder.

    Raises:
        ValueError: for an unsupported family (the message lists the supported ones), a model with an adapter on it,
            layers, neurons or tokens that are not there, a selection or a budget that needs calibration rows when
            there is no tokenizer, a budget beside layers or one that no student meets, log-probabilities of the
            teacher that are not finite, or a trimmed tokenizer with tokens that the teacher lacks, or without the one
            that the decoder starts from.
    """
    teacher, tokenizer = load_with_tokenizer(teacher, tokenizer)
    check_teacher(teacher, layer_selection, heal)
    if trimmed_tokenizer is not None and tokenizer is None:
        raise ValueError("trimmed_tokenizer needs the teacher's to find its tokens by: pass tokenizer=.")
    if budget is not None:
        given = (encoder_num_hidden_layers, decoder_num_hidden_layers, encoder_layers, decoder_layers)
        _check_budget_decides(given, layer_selection, encoder_layer_types, encoder_pooling_layer)
    depth = teacher.config.num_hidden_layers
    kept = {
        "decoder": requested_layers("decoder_", decoder_num_hidden_layers, decoder_layers, depth),
        "encoder": requested_layers("encoder_", encoder_num_hidden_layers, encoder_layers, depth),
    }
    neurons = teacher.config.intermediate_size
    width = _requested_width(decoder_intermediate_size, neurons)
    special_tokens = _special_tokens(teacher, tokenizer, prompt_template, config_overrides)
    prompt_date = frozen_prompt_date(tokenizer, prompt_template, prompt_date)

    merged = cross_attention == "merged"
    RopeEncDecConfig(cross_attention_sharing=cross_attention_sharing)  # refused before layers are chosen by it
    savings = {
        "cross_attention_sharing": cross_attention_sharing,
        "encoder_pooling": encoder_pooling,
        "encoder_pooling_layer": encoder_pooling_layer,
        "encoder_layer_types": encoder_layer_types,
        "encoder_sliding_window": encoder_sliding_window,
    }

    def build(share_memory=False, savings=savings, cross_attention=cross_attention, **layers):
        config = student_config(
            teacher.config,
            **layers,
            cross_attention=cross_attention,
            encoder_attention=encoder_attention,
            **savings,
            **{**config_overrides, **special_tokens},
        )
        return load_layers(model_class, config, teacher, **layers, share_memory=share_memory)

    def plain(kept):
        student = build(encoder_layers=kept["encoder"], decoder_layers=kept["decoder"])
        if width < neurons:
            narrow_decoder(student, width, batches)
        return student

    def chosen(rows, influence):
        """`kept` with the layers of the sides that have only a number of them."""
        check_rows_to_measure_on(rows, layer_selection)
        every, greedy, gaps = list(range(depth)), None, None
        if layer_selection == "induction":
            influence = copying_first(teacher, influence)
        if layer_selection == "greedy":
            # A `separate` one reads nothing of its encoder before it is trained, and could not tell layers apart.
            full = build(
                encoder_layers=every, decoder_layers=every, share_memory=True, savings={}, cross_attention="merged"
            )
            greedy = GreedyRemoval(full, batches, teacher_logprobs)
        if layer_selection == "least_squares":
            gaps = measure_gaps(teacher, calibration_batches(rows, device))
        choose_layers(kept, layer_selection, depth, merged, influence, greedy, gaps, sharing=cross_attention_sharing)
        return kept

    def within_budget(rows, influence):
        """The layers that the budget leaves: of the splits that it allows, those nearest to the teacher."""
        check_rows_to_measure_on(rows, "least_squares")
        gaps = measure_gaps(teacher, calibration_batches(rows, device))
        every = list(range(depth))
        shape = {"encoder_attention": encoder_attention, **savings, **config_overrides}
        shape["decoder_intermediate_size"] = width
        config = student_config(teacher.config, every, every, cross_attention, **shape)
        held_out = calibration_batches(parted(rows)[0], device)
        held_out_logprobs, _ = measure_teacher(teacher, held_out)

        def by_influence(encoder, decoder):
            kept = {"decoder": decoder, "encoder": encoder}
            choose_layers(kept, "influence", depth, merged, influence, None, sharing=cross_attention_sharing)
            return kept

        def divergence(kept):
            student = plain(kept)
            if heal == "least_squares":
                heal_encoder_decoder(student, teacher, kept, rows, quiet=True)
            return best_scale(target_logits(student, held_out), held_out_logprobs)[1]

        return layers_within(budget, teacher.config, config, gaps, by_influence, divergence)

    is_smaller = (
        encoder_pooling != 1
        or cross_attention_sharing != 1
        or width < neurons
        or any(layers != list(range(depth)) for layers in kept.values())
    )
    device = next(teacher.parameters()).device
    batches = []
    with evaluating(teacher):
        if budget is not None or is_smaller:
            rows = calibration_rows(
                calibration,
                tokenizer,
                prompt_template,
                prompt_date,
                special_tokens["decoder_start_token_id"],
                teacher.config,
            )
            batches = calibration_batches(rows[:MEASURED_ROWS], device)
            teacher_logprobs, influence = measure_teacher(teacher, batches)
            if budget is not None:
                kept = within_budget(rows, influence)
            elif any(isinstance(layers, int) for layers in kept.values()):
                kept = chosen(rows, influence)
        student = plain(kept)
        length = rope_limit(student.config)
        if merged and length is not None:
            logger.warning(
                f"rope_type={student.config.rope_parameters['rope_type']!r} turns by the length of a call, of which "
                "encoder and decoder see a part each: prompt and target together should stay within "
                f"{length} tokens, beyond which the student reads other "
                "positions than its teacher."
            )
        unread = student.config.encoder_num_hidden_layers - student.config.encoder_states_read[-1]
        if unread and encoder_layers is None and len(kept["encoder"]) < depth:
            logger.warning(
                f"The last {unread} of the encoder's {len(kept['encoder'])} layers do nothing: the decoder, of the "
                f"teacher's layers {kept['decoder']}, reads none of their states. Ask for fewer encoder layers, or "
                "for more or other decoder layers."
            )
        student.healing = None
        if batches:
            if heal == "least_squares":
                student.healing = heal_encoder_decoder(student, teacher, kept, rows)
            if student.healing is None or not student.healing.taken:
                rescale_norm(student.model.decoder.norm, target_logits(student, batches), teacher_logprobs)

    student.generation_config = _generation_config(teacher, special_tokens)
    if trimmed_tokenizer is not None:
        trim_vocabulary(student, tokenizer, trimmed_tokenizer)
        tokenizer = trimmed_tokenizer
    if tokenizer is not None and getattr(tokenizer, "is_fast", False):
        size = student.config.vocab_size
        student.tokenizer = student_tokenizer(tokenizer, prompt_template, cross_attention, prompt_date, size)
    if prompt_date is not None:
        student.config.prompt_date = prompt_date
    return student.eval()


def load_with_tokenizer(teacher, tokenizer):
    """A model, of a folder or the Hub unless it is one already, and its tokenizer where one is found.

    Raises:
        ValueError: as `load_merged_teacher`, or for a model with an adapter on it.
    """
    if isinstance(teacher, nn.Module) and (
        not isinstance(teacher, PreTrainedModel) or any(hasattr(module, "base_layer") for module in teacher.modules())
    ):
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, has other modules around its layers, as an adapter does: merge "
            "that first, teacher = model.merge_and_unload() of PEFT, or give the adapter's folder."
        )
    if not isinstance(teacher, PreTrainedModel):
        path = teacher
        with whole_on_each_process():
            teacher = load_merged_teacher(path, dtype="auto")
        return teacher, tokenizer if tokenizer is not None else load_tokenizer(path)
    if tokenizer is None and teacher.name_or_path:
        try:
            tokenizer = load_tokenizer(teacher.name_or_path)
        except (OSError, ValueError):
            logger.info("There is no tokenizer at %s; pass tokenizer= to carry one along.", teacher.name_or_path)
    return teacher, tokenizer


def check_teacher(teacher, layer_selection, heal) -> None:
    """Raises ValueError where no student can be made of this teacher, or not in this way."""
    check_family(teacher.config)
    if any(parameter.is_meta for parameter in teacher.parameters()):
        raise ValueError(
            f"The teacher {teacher.name_or_path} has weights that are not in memory, as device_map offloads them: "
            "load it without device_map."
        )
    if layer_selection not in LAYER_SELECTIONS:
        raise ValueError(f"layer_selection={layer_selection!r} is not one of {', '.join(LAYER_SELECTIONS)}.")
    if heal not in HEALING:
        raise ValueError(f"heal={heal!r} is not one of {', '.join(map(repr, HEALING))}.")


def requested_layers(prefix, count, layers, depth) -> list[int] | int:
    """The layers to keep where that is settled, else their number; `prefix` is that of the arguments' names."""
    if layers is not None:
        layers = list(layers)
        if not layers or any(not 0 <= layer < depth for layer in layers) or sorted(set(layers)) != layers:
            raise ValueError(
                f"{prefix}layers={layers} does not work: ascending, distinct indices from 0 to {depth - 1} are needed."
            )
        if count not in (None, len(layers)):
            raise ValueError(
                f"{prefix}num_hidden_layers={count} and {prefix}layers={layers} disagree; pass one of them."
            )
        return layers
    if count is None or count == depth:
        return list(range(depth))
    if not isinstance(count, int) or not 1 <= count <= depth:
        raise ValueError(
            f"{prefix}num_hidden_layers={count} does not work: the teacher has {depth} layers, keep 1 to {depth}."
        )
    return count


def _check_budget_decides(layers, layer_selection, encoder_layer_types, encoder_pooling_layer) -> None:
    """Raises ValueError where what a budget decides is given beside it."""
    if any(given is not None for given in layers):
        raise ValueError("budget= decides which layers are kept: leave their numbers and lists out, or the budget.")
    if layer_selection not in ("influence", "least_squares"):
        raise ValueError(f'budget= chooses layers by "least_squares": leave layer_selection={layer_selection!r} out.')
    for name, value, enough in (
        ("encoder_layer_types", encoder_layer_types, "encoder_sliding_window"),
        ("encoder_pooling_layer", encoder_pooling_layer, "encoder_pooling"),
    ):
        if value is not None:
            raise ValueError(
                f"budget= decides how many layers the encoder has: leave {name} out, {enough} alone is enough."
            )


def _requested_width(width, neurons) -> int:
    if width is None:
        return neurons
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= neurons:
        raise ValueError(
            f"decoder_intermediate_size={width!r} does not work: the teacher's MLPs have {neurons} neurons, keep 1 to "
            f"{neurons}."
        )
    return width


def _special_tokens(teacher, tokenizer, prompt_template, given) -> dict:
    """Those that are `given`, the others from tokenizer and teacher."""
    config = teacher.config
    eos = teacher.generation_config.eos_token_id if teacher.generation_config else None
    eos = given.get("eos_token_id", config.eos_token_id if eos is None else eos)
    bos, pad, start = config.bos_token_id, config.pad_token_id, None
    if tokenizer is not None:
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else bos
        own_pad = distinct_pad_token(tokenizer, config.vocab_size) if tokenizer.eos_token else None
        pad = pad if own_pad is None else tokenizer.convert_tokens_to_ids(own_pad)
        start = prompt_start_token_id(tokenizer, prompt_template)
    first_eos = eos[0] if isinstance(eos, list) else eos
    if start is None:
        start = bos if bos is not None else first_eos
    start = given.get("decoder_start_token_id", start)
    if start is None:
        raise ValueError(
            "There is no token to start the decoder from: the teacher has neither a prompt template nor a bos or eos "
            "token. Pass tokenizer= and prompt_template=, or decoder_start_token_id=."
        )
    return {
        "decoder_start_token_id": start,
        "bos_token_id": given.get("bos_token_id", bos),
        "eos_token_id": eos,
        "pad_token_id": given.get("pad_token_id", first_eos if pad is None else pad),
    }


def _generation_config(teacher, special_tokens) -> GenerationConfig:
    """The teacher's, without lengths: those of prompt and answer there, of the answer alone here."""
    config = copy.deepcopy(teacher.generation_config)
    config._from_model_config = False
    for name in ("max_length", "min_length"):
        setattr(config, name, getattr(GenerationConfig(), name))
    for name, value in special_tokens.items():
        setattr(config, name, value)
    return config
