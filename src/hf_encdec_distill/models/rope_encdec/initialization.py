"""A student out of a decoder-only teacher's own layers."""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from .. import SUPPORTED_FAMILIES
from ..either_version import check_rope_is_read, rope_parameters
from ..families import biases_of, rope_limit, sliding_window_of
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
from .least_squares import FITTED, Healing, fit_decoder_only, fit_encoder_decoder
from .modeling_rope_encdec import RopeEncDecForConditionalGeneration, RopeEncDecRotaryEmbedding
from .narrowing import narrow_decoder


logger = logging.getLogger(__name__)

HEALING = ("least_squares", None)

_NORM_SCALES = [1.15**step for step in range(-28, 8)]  # 0.02 to 2.7, each 15 % above the last
MEASURED_ROWS = 64  # their log-probabilities over the vocabulary are in memory
_HELD_OUT_EVERY = 5
_FITTED_WEIGHTS = tuple(f"{name}.weight" for name in FITTED)


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
            fast enough, the three with the best layers by `"least_squares"` are tried, and the one nearest to the
            teacher on held-out calibration rows is taken.
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
    given = (encoder_num_hidden_layers, decoder_num_hidden_layers, encoder_layers, decoder_layers)
    if budget is not None and any(layers is not None for layers in given):
        raise ValueError("budget= decides which layers are kept: leave their numbers and lists out, or the budget.")
    if budget is not None and layer_selection not in ("influence", "least_squares"):
        raise ValueError(f'budget= chooses layers by "least_squares": leave layer_selection={layer_selection!r} out.')
    if budget is not None and encoder_layer_types is not None:
        raise ValueError(
            "budget= decides how many layers the encoder has: leave encoder_layer_types out, encoder_sliding_window "
            "alone is enough."
        )
    if budget is not None and encoder_pooling_layer is not None:
        raise ValueError(
            "budget= decides how many layers the encoder has: leave encoder_pooling_layer out, encoder_pooling alone "
            "is enough."
        )
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
        return _load(model_class, config, teacher, **layers, share_memory=share_memory)

    def plain(kept):
        student = build(encoder_layers=kept["encoder"], decoder_layers=kept["decoder"])
        if width < neurons:
            narrow_decoder(student, width, batches)
        return student

    with evaluating(teacher):
        batches = []
        is_smaller = (
            encoder_pooling != 1
            or cross_attention_sharing != 1
            or width < neurons
            or any(layers != list(range(depth)) for layers in kept.values())
        )
        if budget is not None or is_smaller:
            rows = calibration_rows(
                calibration,
                tokenizer,
                prompt_template,
                prompt_date,
                special_tokens["decoder_start_token_id"],
                teacher.config,
            )
            open_sides = [side for side, layers in kept.items() if isinstance(layers, int)]
            if budget is not None or open_sides:
                check_rows_to_measure_on(rows, layer_selection if budget is None else "least_squares")
            device = next(teacher.parameters()).device
            batches = calibration_batches(rows[:MEASURED_ROWS], device)
            teacher_logprobs, influence = measure_teacher(teacher, batches)
            if open_sides and layer_selection == "induction":
                influence = copying_first(teacher, influence)
            greedy = None
            if open_sides and layer_selection == "greedy":
                every = list(range(depth))
                # A `separate` one reads nothing of its encoder before it is trained, and could not tell layers apart.
                full = build(
                    encoder_layers=every, decoder_layers=every, share_memory=True, savings={}, cross_attention="merged"
                )
                greedy = GreedyRemoval(full, batches, teacher_logprobs)
            gaps = None
            if budget is not None or (open_sides and layer_selection == "least_squares"):
                gaps = measure_gaps(teacher, calibration_batches(rows, device))
            if budget is None:
                choose_layers(
                    kept, layer_selection, depth, merged, influence, greedy, gaps, sharing=cross_attention_sharing
                )
            else:
                every = list(range(depth))
                shape = {"encoder_attention": encoder_attention, **savings, **config_overrides}
                shape["decoder_intermediate_size"] = width
                config = student_config(teacher.config, every, every, cross_attention, **shape)
                held_out = calibration_batches(_parted(rows)[0], device)
                held_out_logprobs, _ = measure_teacher(teacher, held_out)

                def by_influence(encoder, decoder):
                    kept = {"decoder": decoder, "encoder": encoder}
                    choose_layers(kept, "influence", depth, merged, influence, None, sharing=cross_attention_sharing)
                    return kept

                def divergence(kept):
                    student = plain(kept)
                    if heal == "least_squares":
                        heal_encoder_decoder(student, teacher, kept, rows, quiet=True)
                    return _best_scale(_target_logits(student, held_out), held_out_logprobs)[1]

                kept = layers_within(budget, teacher.config, config, gaps, by_influence, divergence)
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
                rescale_norm(student.model.decoder.norm, _target_logits(student, batches), teacher_logprobs)

    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.generation_config._from_model_config = False
    for name in ("max_length", "min_length"):  # of prompt and answer there, of the answer alone here
        setattr(student.generation_config, name, getattr(GenerationConfig(), name))
    for name, value in special_tokens.items():
        setattr(student.generation_config, name, value)
    if trimmed_tokenizer is not None:
        if tokenizer is None:
            raise ValueError("trimmed_tokenizer needs the teacher's to find its tokens by: pass tokenizer=.")
        trim_vocabulary(student, tokenizer, trimmed_tokenizer)
        tokenizer = trimmed_tokenizer
    if tokenizer is not None and getattr(tokenizer, "is_fast", False):
        student.tokenizer = student_tokenizer(tokenizer, prompt_template, cross_attention, prompt_date)
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; module by module as before outside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_family(config) -> None:
    """Raises ValueError where a student cannot hold the layers of a teacher of this config."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}  # of 5.x and of 4.57
    if "mrope_section" in rope:
        raise ValueError(
            f"A teacher of model_type={config.model_type!r} has M-RoPE (mrope_section={rope['mrope_section']}), three "
            "positions for each token of an image, of which a student's layers know one: they cannot be its. Make the "
            f"student from a model of {', '.join(SUPPORTED_FAMILIES)}, and let this one teach it: DistillationTrainer "
            "takes it as teacher=."
        )
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"A teacher of model_type={config.model_type!r} is not supported: its block has to be one of those that a "
            f"student can hold, {', '.join(SUPPORTED_FAMILIES)}."
        )
    check_rope_is_read(config)


def check_teacher(teacher, layer_selection, heal) -> None:
    """Raises ValueError where no student can be made of this teacher, or not in this way."""
    check_family(teacher.config)
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
        pad = tokenizer.convert_tokens_to_ids(distinct_pad_token(tokenizer)) if tokenizer.eos_token else pad
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


def student_config(config, encoder_layers, decoder_layers, cross_attention, **fields) -> RopeEncDecConfig:
    """Of a student with these layers, numbered as in the decoder-only model that `config` is of."""
    family = config.model_type
    biases = biases_of(config)
    no_rope = [i for i, rope in enumerate(getattr(config, "no_rope_layers", None) or []) if not rope]
    kept_without_rope = {
        side: [position for position, layer in enumerate(layers) if layer in no_rope]
        for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers))
    }
    made = RopeEncDecConfig(
        **{
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "encoder_num_hidden_layers": len(encoder_layers),
            "decoder_num_hidden_layers": len(decoder_layers),
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "hidden_act": config.hidden_act,
            "attention_bias": biases.attention,
            "mlp_bias": biases.mlp,
            "qk_norm": family == "qwen3",
            "rope_parameters": rope_parameters(config),
            "encoder_no_rope_layers": kept_without_rope["encoder"],
            "decoder_no_rope_layers": kept_without_rope["decoder"],
            "max_position_embeddings": _max_positions(config),
            "rms_norm_eps": config.rms_norm_eps,
            "attention_dropout": config.attention_dropout,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_word_embeddings,
            "cross_attention": cross_attention,
            "teacher_num_hidden_layers": config.num_hidden_layers,
            "attn_implementation": config._attn_implementation,
            **fields,
        }
    )
    if cross_attention == "merged" and made.cross_attention_layers is None:
        # The state that enters teacher layer d has passed every kept encoder layer below d.
        states = [sum(e < d for e in encoder_layers) for d in decoder_layers]
        made.cross_attention_layers = [states[first] for first in made.prompt_keys_of_decoder_layer]
    return made


def _max_positions(config) -> int:
    """Positions up to which the student is the teacher: within a sliding window, attention is full."""
    window = sliding_window_of(config)
    if window is not None and rope_parameters(config).get("rope_type", "default") == "default":
        logger.warning(
            "The teacher attends within a sliding window of %d tokens, the student to all of them: it is exact up to "
            "that length, which becomes its max_position_embeddings.",
            window,
        )
        return window
    return config.max_position_embeddings


def _load(model_class, config, teacher, encoder_layers, decoder_layers, share_memory):
    """A model of `config` that holds the teacher's tensors, or copies of them."""
    state = _student_state(teacher, config, encoder_layers, decoder_layers)
    if not share_memory:
        state = {name: tensor.clone() for name, tensor in state.items()}
    with torch.device("meta"):
        student = model_class(config)
    missing, unexpected = student.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(
            f"The teacher's tensors do not fit the student: missing {sorted(missing)}, unexpected "
            f"{sorted(unexpected)}."
        )
    device = next(iter(state.values())).device
    for side in (student.model.encoder, student.model.decoder):
        for name, module in side.named_children():
            if isinstance(module, RopeEncDecRotaryEmbedding):
                setattr(side, name, RopeEncDecRotaryEmbedding(module.config, device))
    student.tie_weights()
    return student.eval()


def _student_state(teacher, config, encoder_layers, decoder_layers) -> dict:
    """Student tensors by name, views of the teacher's. Phi-3's fused projections are split."""
    source = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}
    state = {
        "model.encoder.embed_tokens.weight": source["model.embed_tokens.weight"],
        "model.encoder.norm.weight": source["model.norm.weight"],
        "model.decoder.norm.weight": source["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = source["lm_head.weight"]
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in source.items():
        if not name.startswith("model.layers."):
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        block = blocks.setdefault(int(layer), {})
        if "qkv_proj" in rest:
            parts = tensor.split([query_width, key_value_width, key_value_width])
            block.update({rest.replace("qkv_proj", f"{p}_proj"): part for p, part in zip("qkv", parts)})
        elif "gate_up_proj" in rest:
            parts = tensor.chunk(2)
            block.update({rest.replace("gate_up_proj", f"{p}_proj"): part for p, part in zip(("gate", "up"), parts)})
        elif "rotary_emb" not in rest:
            block[rest] = tensor
    for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        for position, layer in enumerate(layers):
            block = dict(blocks[layer])
            if side == "decoder" and config.cross_attention == "separate":
                shares = config.prompt_keys_of_decoder_layer[position] != position
                for rest, tensor in blocks[layer].items():
                    if shares and rest.startswith(("self_attn.k_", "self_attn.v_")):
                        continue
                    if rest.startswith("self_attn.o_proj"):
                        block[rest.replace("self_attn", "cross_attn")] = torch.zeros_like(tensor)
                    elif rest.startswith("self_attn."):
                        block[rest.replace("self_attn", "cross_attn")] = tensor
                block["cross_attn_layernorm.weight"] = block["input_layernorm.weight"]
            state.update({f"model.{side}.layers.{position}.{rest}": tensor for rest, tensor in block.items()})
    return state


# What a state of the encoder depends on besides weights.
_ENCODER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "qk_norm",
    "rope_parameters",
    "max_position_embeddings",
    "rms_norm_eps",
    "encoder_pooling",
)


def encoder_is_first_layers_of(student, teacher) -> bool:
    """Whether a student's encoder layers are the teacher's first ones in all that its decoder reads, bit for bit.

    The embedding is not compared: a student with a trimmed vocabulary has other rows for the same tokens. A teacher
    with an adapter or quantised weights is another model than those that its layers came from.
    """
    config, depth = student.config, student.config.encoder_states_read[-1]
    if not isinstance(teacher, PreTrainedModel) or teacher.config.model_type not in SUPPORTED_FAMILIES:
        return False
    if depth > teacher.config.num_hidden_layers:
        return False
    layers = list(range(config.encoder_num_hidden_layers))
    of_teacher = student_config(teacher.config, layers, [0], "merged")
    without_rope = [layer for layer in of_teacher.encoder_no_rope_layers if layer < depth]
    if [layer for layer in config.encoder_no_rope_layers if layer < depth] != without_rope:
        return False
    if any(getattr(config, name) != getattr(of_teacher, name) for name in _ENCODER_FIELDS):
        return False
    if "sliding_attention" in config.attention_of_encoder_layer[:depth]:
        return False
    within = tuple(f"model.encoder.layers.{layer}." for layer in range(depth))
    ours, theirs = (
        {name: tensor for name, tensor in state.items() if name.startswith(within)}
        for state in (student.state_dict(), _student_state(teacher, of_teacher, list(range(depth)), []))
    )
    return set(ours) == set(theirs) and all(_same(tensor, theirs[name]) for name, tensor in ours.items())


def _same(one, other) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or other.is_meta:
        return False
    return torch.equal(one, other.to(one.device))


def heal_encoder_decoder(student, teacher, kept, rows, quiet=False) -> Healing | None:
    """Fit the layers that are kept to the teacher's states, in place, unless held-out rows say that it does harm.

    The final norm of a student that was fitted is rescaled on the held-out rows, see `rescale_norm`.

    Args:
        student ([`RopeEncDecForConditionalGeneration`]): Just built, with the layers `kept` of `teacher`; the MLPs
            of its decoder may be narrower.
        teacher ([`PreTrainedModel`]): A decoder-only model of a supported family.
        kept (`dict`): `{"encoder": layers, "decoder": layers}`.
        rows (`list`): From `calibration_rows`; a fifth of them, 64 at most, is held out.

    Returns:
        [`Healing`]: What it brought; `None` where there are too few rows to tell, or no layer had to be fitted.

    Raises:
        ValueError: where a state is not finite.
    """

    def fit(batches):
        config, alone = student.config, None
        if config.cross_attention == "merged" or config.decoder_intermediate_size < config.intermediate_size:
            alone = _as_causal_encoder(teacher, kept["decoder"], share_memory=False)
        return fit_encoder_decoder(student, _as_causal_encoder(teacher), kept, batches, alone)

    return _unless_it_harms(student, student.model.decoder.norm, teacher, fit, _target_logits, rows, quiet)


def heal_decoder_only(student, teacher, kept, rows) -> Healing | None:
    """As `heal_encoder_decoder`, of a decoder-only student with the layers `kept` (`list[int]`) of `teacher`."""

    def fit(batches):
        return fit_decoder_only(_as_causal_encoder(student), _as_causal_encoder(teacher), kept, batches)

    return _unless_it_harms(student, student.model.norm, teacher, fit, predicting_logits, rows)


def _as_causal_encoder(model, layers=None, share_memory=True):
    """Layers of a decoder-only model, all by default, as an encoder of ours."""
    if layers is None:
        layers = list(range(model.config.num_hidden_layers))
    config = student_config(model.config, layers, layers[-1:], "merged", encoder_attention="causal")
    whole = _load(RopeEncDecForConditionalGeneration, config, model, layers, layers[-1:], share_memory=share_memory)
    return whole.model.encoder


def _parted(rows) -> tuple[list, list]:
    """Calibration rows that are held out, a fifth and `MEASURED_ROWS` at most, and those to fit on.

    Each row once, or one that is held out would be fitted too.
    """
    rows = list({(tuple(prompt), tuple(target)): (prompt, target) for prompt, target in rows}.values())
    last = _HELD_OUT_EVERY * MEASURED_ROWS
    fitted = [row for place, row in enumerate(rows) if place % _HELD_OUT_EVERY or place >= last]
    return rows[:last:_HELD_OUT_EVERY], fitted


@torch.no_grad()
def _unless_it_harms(student, norm, teacher, fit, logits, rows, quiet=False) -> Healing | None:
    """Run `fit` on calibration batches; if the student's `logits` are no nearer to the teacher's then, undo it.

    `quiet` is for one among several students, of which the others are thrown away.
    """
    held_out, fitted = _parted(rows)
    if not fitted and quiet:
        return None
    if not fitted:
        logger.warning("heal='least_squares' is not taken: one calibration row says nothing. Pass some hundred.")
        return None
    checks = calibration_batches(held_out, student.device)
    teacher_logprobs, _ = measure_teacher(teacher, checks)
    tokens = sum(map(len, teacher_logprobs))
    _, before = _best_scale(logits(student, checks), teacher_logprobs)
    # A fit writes into these weights alone; where neurons go, it makes new ones.
    plain = {
        name: tensor.clone() if name.endswith(_FITTED_WEIGHTS) else tensor
        for name, tensor in student.state_dict().items()
    }
    gaps = fit(calibration_batches(fitted, student.device))
    if not gaps:
        return None
    scale, after = _best_scale(logits(student, checks), teacher_logprobs)
    healing = Healing(after < before, len(fitted), len(held_out), before / tokens, after / tokens, gaps)
    if healing.taken:
        norm.weight.mul_(scale)
        logger.info("Fitted %d layers by least squares. %s.", len(gaps), healing)
    else:
        student.load_state_dict(plain)
        torch.clear_autocast_cache()
        say = logger.debug if quiet else logger.warning
        say(
            "heal='least_squares' is not taken: it does harm. %s. Pass more calibration rows, or rows of the task.",
            healing,
        )
    return healing


@torch.no_grad()
def _target_logits(student, batches):
    """Of an encoder-decoder, `(target tokens, V)` for each batch."""
    for batch in batches:
        yield student(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            use_cache=False,
        ).logits[batch["target_mask"]]


@torch.no_grad()
def predicting_logits(student, batches):
    """Of a decoder-only model, `(target tokens, V)` for each batch."""
    for batch in batches:
        inputs = {"input_ids": batch["sequence"], "attention_mask": batch["sequence_mask"]}
        states = student.model(**inputs, use_cache=False).last_hidden_state
        yield student.lm_head(states[batch["predicting"]])


@torch.no_grad()
def rescale_norm(norm, logits, teacher_logprobs) -> None:
    """Scale a student's final norm, and so the logits, to the least KL from the teacher on the calibration rows.

    A model that lost layers is wrong with the old confidence, one that was fitted to mean states is not confident
    enough; what is scaled is only that, no argmax changes.

    Args:
        logits: An iterable of the student's, `(target tokens, V)` for each batch.
        teacher_logprobs (`list`): From `measure_teacher`.

    Raises:
        ValueError: the student's logits are not finite.
    """
    scale, least = _best_scale(logits, teacher_logprobs)
    if least == math.inf:
        raise ValueError(
            "The student's logits on the calibration rows are not finite, as where layers are gone that kept float16 "
            "in its range: load the teacher in float32 or bfloat16, which is then the student's dtype too."
        )
    norm.weight.mul_(scale)


def _best_scale(logits, teacher_logprobs) -> tuple[float, float]:
    """The factor on the logits with the least KL from the teacher, and this KL summed over all target tokens; infinite
    where logits are not finite."""
    totals = [0.0] * len(_NORM_SCALES)
    for ours, target in zip(logits, teacher_logprobs):
        for index, scale in enumerate(_NORM_SCALES):
            logprobs = (ours.float() * scale).log_softmax(-1)
            totals[index] += F.kl_div(logprobs, target, reduction="sum", log_target=True).item()
    totals = [total if math.isfinite(total) else math.inf for total in totals]
    least = min(totals)
    return _NORM_SCALES[totals.index(least)], least
