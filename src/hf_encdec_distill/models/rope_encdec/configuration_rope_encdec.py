"""Configuration of the RoPE encoder-decoder.

This file travels to the Hub beside the weights: it imports only torch, transformers and its own siblings.
"""

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compat_rope_encdec import PreTrainedConfig, RopeConfigMixin


# What each RoPE type needs besides `rope_theta` (modeling_rope_utils.py of transformers v4.57.6 and v5.23.0).
_REQUIRED_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

_LAYER_TYPES = ("full_attention", "sliding_attention")

_AUTO_MAP = {
    "AutoConfig": "configuration_rope_encdec.RopeEncDecConfig",
    "AutoModel": "modeling_rope_encdec.RopeEncDecModel",
    "AutoModelForSeq2SeqLM": "modeling_rope_encdec.RopeEncDecForConditionalGeneration",
    "AutoModelForTextEncoding": "modeling_rope_encdec.RopeEncDecEncoderModel",
}


class RopeEncDecConfig(RopeConfigMixin, PreTrainedConfig):
    r"""Configuration of [`RopeEncDecModel`] and its heads.

    One configuration holds the block of a Llama, Mistral, Qwen2, Qwen3, SmolLM2/3 or Phi-3 as well as that of
    Microsoft's Mu ("Return of the Encoder", arXiv 2501.16273, section 3).

    Args:
        vocab_size (`int`, defaults to 32128): Rows of the one embedding that encoder and decoder share.
        hidden_size (`int`, defaults to 1024): Width of the residual stream.
        intermediate_size (`int`, defaults to 4096): Width of the MLP.
        decoder_intermediate_size (`int`, *optional*): Width of the decoder's MLP; `None` means `intermediate_size`.
        encoder_num_hidden_layers (`int`, defaults to 20): Blocks of the encoder.
        decoder_num_hidden_layers (`int`, defaults to 10): Blocks of the decoder; also readable as `num_hidden_layers`.
        num_attention_heads (`int`, defaults to 16): Query heads.
        num_key_value_heads (`int`, *optional*): Key/value heads; `None` means as many as query heads.
        head_dim (`int`, *optional*): Width of a head; `None` means `hidden_size // num_attention_heads`.
        hidden_act (`str`, defaults to `"silu"`): A key of `transformers.activations.ACT2FN`.
        gated_mlp (`bool`, defaults to `True`): `down(act(gate(x)) * up(x))` if true, `down(act(up(x)))` otherwise.
        attention_bias (`bool` or `"qkv"`, defaults to `False`): Biases on all four projections, on none, or on query,
            key and value alone (Qwen2).
        mlp_bias (`bool`, defaults to `False`): Biases in the MLP.
        qk_norm (`bool`, defaults to `False`): RMSNorm over each head of queries and keys (Qwen3).
        rope_parameters (`dict`, *optional*): `rope_theta`, `rope_type`, `partial_rotary_factor` and what the type
            needs, as in transformers 5. `rope_theta=`, `rope_scaling=` and `partial_rotary_factor=` are accepted too
            and folded in.
        encoder_no_rope_layers, decoder_no_rope_layers (`list[int]`, *optional*): Layers that use no RoPE (SmolLM3).
        max_position_embeddings (`int`, defaults to 2048): Longest sequence that RoPE was trained for.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of every RMSNorm.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention probabilities.
        initializer_range (`float`, defaults to 0.02): Standard deviation of new weights.
        use_cache (`bool`, defaults to `True`): Whether the decoder returns keys and values.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the LM head is the embedding.
        cross_attention (`"separate"` or `"merged"`, defaults to `"separate"`): How the decoder reads the encoder.
            `separate` is the paper's block: a cross-attention of its own, without RoPE. In `merged` each decoder layer
            forms keys and values of the prompt from an encoder state with its own norm and projections, RoPE at prompt
            positions, and takes one softmax over [prompt, own tokens]; own positions go on where each prompt ends.
        cross_attention_layers (`list[int]`, *optional*): For each decoder layer the encoder state that it reads, as an
            index into the encoder's `hidden_states`: `i` is the state that enters encoder layer `i`, and
            `encoder_num_hidden_layers` the one that leaves the last. `None` means the last for `separate`; for
            `merged`, the state that enters the matching layer.
        cross_attention_sharing (`int`, defaults to 1): How many neighbouring decoder layers read the same keys and
            values of the prompt, those that the first of them makes (Cross-Layer Attention, arXiv 2405.12981, section
            3, of the prompt alone); the last group may be smaller. In `separate` the others have no projections for
            keys and values; in `merged` they have them for the target's tokens.
        encoder_attention (`"bidirectional"` or `"causal"`, defaults to `"bidirectional"`): Mask of the encoder.
        encoder_pooling (`int`, defaults to 1): How many neighbouring positions of the prompt become one, their mean,
            on the way through the encoder. The layers above compute, and the decoder reads and caches, that much less.
            Pads are never in a mean; what is left over at a prompt's end is a mean of fewer. For RoPE, position `i`
            then stands at `(i + 1) * encoder_pooling - 1`, where its last token stood.
        encoder_pooling_layer (`int`, *optional*): The first encoder layer that sees the pooled positions; `None` means
            half way up. States that the decoder reads from below it are pooled as they are handed over.
        encoder_layer_types (`list[str]`, *optional*): `"full_attention"` or `"sliding_attention"`, for each encoder
            layer. `None` means full attention, or, where there is an `encoder_sliding_window`, ModernBERT's order: one
            full layer, then two that slide (arXiv 2412.13663, section 2.1).
        encoder_sliding_window (`int`, *optional*): Tokens that a query of a sliding layer sees, its own among them:
            `0 <= i - j < window` in a causal encoder, as in Mistral, and `|i - j| < window` in a bidirectional one.
        encoder_sliding_rope_theta (`float`, *optional*): RoPE base of layers that slide; `None` means that of
            `rope_parameters`, of which all else holds for them too.
        teacher_num_hidden_layers (`int`, *optional*): Depth of the decoder-only model that the layers came from, for
            those who compare costs; nothing is computed from it.
        pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: Special tokens. A decoder start is needed.

    Raises:
        ValueError: if a field cannot work; the message names the field, its value and what to do.
    """

    model_type = "rope_encdec"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_hidden_layers": "decoder_num_hidden_layers"}

    def __init__(
        self,
        vocab_size=32128,
        hidden_size=1024,
        intermediate_size=4096,
        decoder_intermediate_size=None,
        encoder_num_hidden_layers=20,
        decoder_num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="silu",
        gated_mlp=True,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope_parameters=None,
        encoder_no_rope_layers=None,
        decoder_no_rope_layers=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        cross_attention="separate",
        cross_attention_layers=None,
        cross_attention_sharing=1,
        encoder_attention="bidirectional",
        encoder_pooling=1,
        encoder_pooling_layer=None,
        encoder_layer_types=None,
        encoder_sliding_window=None,
        encoder_sliding_rope_theta=None,
        teacher_num_hidden_layers=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **kwargs,
    ):
        # `num_hidden_layers` reaches us in place of the field that it maps to when transformers copies a config.
        decoder_num_hidden_layers = kwargs.pop("num_hidden_layers", decoder_num_hidden_layers)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.decoder_intermediate_size = (
            intermediate_size if decoder_intermediate_size is None else decoder_intermediate_size
        )
        self.encoder_num_hidden_layers = encoder_num_hidden_layers
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.qk_norm = qk_norm
        self.encoder_no_rope_layers = list(encoder_no_rope_layers or [])
        self.decoder_no_rope_layers = list(decoder_no_rope_layers or [])
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.cross_attention = cross_attention
        self.cross_attention_layers = None if cross_attention_layers is None else list(cross_attention_layers)
        self.cross_attention_sharing = cross_attention_sharing
        self.encoder_attention = encoder_attention
        self.encoder_pooling = encoder_pooling
        self.encoder_pooling_layer = encoder_pooling_layer
        self.encoder_layer_types = None if encoder_layer_types is None else list(encoder_layer_types)
        # Not `sliding_window`: the caches of transformers read that, and would forget what the decoder has written.
        self.encoder_sliding_window = encoder_sliding_window
        self.encoder_sliding_rope_theta = encoder_sliding_rope_theta
        self.teacher_num_hidden_layers = teacher_num_hidden_layers
        self._validate_sizes()
        if self.head_dim is None:
            self.head_dim = hidden_size // num_attention_heads
        self.rope_parameters = _fold_rope_parameters(
            rope_parameters,
            rope_theta=kwargs.pop("rope_theta", None),
            rope_scaling=kwargs.pop("rope_scaling", None),
            partial_rotary_factor=kwargs.pop("partial_rotary_factor", None),
        )
        _validate_rope_parameters(self.rope_parameters, self.head_dim)
        self._validate_layers()

        kwargs.pop("is_encoder_decoder", None)
        super().__init__(is_encoder_decoder=True, **kwargs)
        # After the base class: transformers 5 has no such arguments, 4.57 would overwrite them with None.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.decoder_start_token_id = decoder_start_token_id
        self._validate_tokens()

    def __setattr__(self, name, value):
        if name == "rope_parameters":
            # `from_pretrained(folder, rope_parameters=...)` sets it after the constructor. Theta and the rotary width
            # belong to the weights, and stay unless they are given.
            present = self.__dict__.get(name) or {}
            kept = {key: present.get(key) for key in ("rope_theta", "partial_rotary_factor")}
            value = _fold_rope_parameters(value, rope_scaling=None, **kept)
        super().__setattr__(name, value)

    def check_fields(self):
        """What the constructor checks. Models ask again: `from_pretrained(folder, field=value)` sets fields after it.

        Raises:
            ValueError: as the constructor.
        """
        self._validate_sizes()
        _validate_rope_parameters(self.rope_parameters, self.head_dim)
        self._validate_layers()
        self._validate_tokens()

    def get_text_config(self, *args, **kwargs):
        # The flat-config branch upstream deletes every `encoder_*` field from a copy; ours is one text config.
        return self

    def to_dict(self):
        # `save_pretrained` would list only the class being saved; code that exists already asks for any of the four.
        fields = super().to_dict()
        # Of a subclass elsewhere the files beside the weights are others, which `save_pretrained` lists.
        return {**fields, "auto_map": dict(_AUTO_MAP)} if type(self).__name__ == "RopeEncDecConfig" else fields

    @property
    def first_pooled_layer(self) -> int | None:
        """`encoder_pooling_layer` with its default filled in; `None` where nothing is pooled."""
        if self.encoder_pooling == 1:
            return None
        at = self.encoder_pooling_layer
        return self.encoder_num_hidden_layers // 2 if at is None else at

    @property
    def encoder_states_read(self) -> list[int]:
        """Distinct encoder states that the decoder reads, ascending, as indices into `hidden_states`."""
        return sorted(set(self.encoder_state_of_decoder_layer))

    @property
    def encoder_state_of_decoder_layer(self) -> list[int]:
        """`cross_attention_layers` with its default filled in: one encoder state for each decoder layer."""
        if self.cross_attention_layers is not None:
            return self.cross_attention_layers
        encoder, decoder = self.encoder_num_hidden_layers, self.decoder_num_hidden_layers
        if self.cross_attention == "separate":
            return [encoder] * decoder
        return [-(-(layer + 1) * encoder // decoder) - 1 for layer in self.prompt_keys_of_decoder_layer]

    @property
    def prompt_keys_of_decoder_layer(self) -> list[int]:
        """For each decoder layer the one whose keys and values of the prompt it reads: the first of its group."""
        return [layer - layer % self.cross_attention_sharing for layer in range(self.decoder_num_hidden_layers)]

    @property
    def attention_of_encoder_layer(self) -> list[str]:
        """`encoder_layer_types` with its default filled in."""
        if self.encoder_layer_types is not None:
            return self.encoder_layer_types
        every = 1 if self.encoder_sliding_window is None else 3
        return [_LAYER_TYPES[layer % every > 0] for layer in range(self.encoder_num_hidden_layers)]

    def _validate_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "decoder_intermediate_size",
            "encoder_num_hidden_layers",
            "decoder_num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "cross_attention_sharing",
            "encoder_pooling",
        ):
            _check(_is_positive_int(getattr(self, name)), name, getattr(self, name), "a whole number of at least 1")
        for name in ("gated_mlp", "mlp_bias", "qk_norm"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        eps, dropout = self.rms_norm_eps, self.attention_dropout
        _check(_is_positive_number(eps) and eps < 1, "rms_norm_eps", eps, "a number above 0 and below 1")
        _check(
            isinstance(dropout, (int, float)) and 0 <= dropout < 1,
            "attention_dropout",
            dropout,
            "a number from 0 to below 1",
        )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            _check(
                self.hidden_size % heads == 0,
                "num_attention_heads",
                heads,
                f"a divisor of hidden_size={self.hidden_size}, or an explicit head_dim",
            )
        else:
            _check(_is_positive_int(self.head_dim), "head_dim", self.head_dim, "a whole number of at least 1")
        _check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        _check(
            self.attention_bias in (True, False, "qkv"), "attention_bias", self.attention_bias, 'True, False or "qkv"'
        )
        _check(
            self.cross_attention in ("separate", "merged"),
            "cross_attention",
            self.cross_attention,
            '"separate" or "merged"',
        )
        _check(
            self.encoder_attention in ("bidirectional", "causal"),
            "encoder_attention",
            self.encoder_attention,
            '"bidirectional" or "causal"',
        )
        _check(
            self.hidden_act in ACT2FN,
            "hidden_act",
            self.hidden_act,
            f"an activation that transformers knows, one of {sorted(ACT2FN)}",
        )

    def _validate_layers(self):
        encoder, decoder = self.encoder_num_hidden_layers, self.decoder_num_hidden_layers
        if self.cross_attention_layers is not None:
            layers = self.cross_attention_layers
            _check(
                len(layers) == decoder and all(_is_index(i) and i <= encoder for i in layers),
                "cross_attention_layers",
                layers,
                f"one index from 0 to encoder_num_hidden_layers={encoder} for each of the {decoder} decoder layers",
            )
            shared = [layers[first] for first in self.prompt_keys_of_decoder_layer]
            _check(
                layers == shared,
                "cross_attention_layers",
                layers,
                f"one state for all layers of a group of cross_attention_sharing={self.cross_attention_sharing}, such "
                f"as {shared}",
            )
        layer = self.encoder_pooling_layer
        _check(
            layer is None or (isinstance(layer, int) and 0 <= layer <= encoder),
            "encoder_pooling_layer",
            layer,
            f"the index of an encoder layer, or encoder_num_hidden_layers={encoder} to pool what leaves the last",
        )
        for name, count in (("encoder_no_rope_layers", encoder), ("decoder_no_rope_layers", decoder)):
            layers = getattr(self, name)
            _check(
                all(isinstance(i, int) and 0 <= i < count for i in layers),
                name,
                layers,
                f"layer indices from 0 to {count - 1}",
            )
        layers = self.decoder_no_rope_layers
        shared = [layer for layer, first in enumerate(self.prompt_keys_of_decoder_layer) if first in layers]
        _check(
            self.cross_attention == "separate" or sorted(set(layers)) == shared,
            "decoder_no_rope_layers",
            layers,
            f"all layers of a group of cross_attention_sharing={self.cross_attention_sharing} or none, since keys are "
            f"turned once for all of them, such as {shared}",
        )
        types, window, theta = self.encoder_layer_types, self.encoder_sliding_window, self.encoder_sliding_rope_theta
        _check(
            types is None or (len(types) == encoder and all(kind in _LAYER_TYPES for kind in types)),
            "encoder_layer_types",
            types,
            f'"full_attention" or "sliding_attention" for each of the {encoder} encoder layers',
        )
        _check(
            _is_positive_int(window) or (window is None and "sliding_attention" not in (types or ())),
            "encoder_sliding_window",
            window,
            "a whole number of at least 1, for the layers that slide",
        )
        _check(
            theta is None or (isinstance(theta, (int, float)) and theta > 0),
            "encoder_sliding_rope_theta",
            theta,
            "a positive number, or None",
        )
        _check(
            theta is None or "sliding_attention" in self.attention_of_encoder_layer,
            "encoder_sliding_rope_theta",
            theta,
            "None where no encoder layer slides: encoder_sliding_window makes two of three layers slide, or "
            "encoder_layer_types says which do",
        )

    def _validate_tokens(self):
        start = self.decoder_start_token_id
        _check(
            isinstance(start, int) and 0 <= start < self.vocab_size,
            "decoder_start_token_id",
            start,
            f"the token that the decoder starts from, 0 to {self.vocab_size - 1}; "
            "bos_token_id or pad_token_id are common choices",
        )


def _is_positive_int(value) -> bool:
    return _is_index(value) and value >= 1


def _is_index(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive_number(value) -> bool:
    """One that float32 has."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 3e38


def _check(condition, name, value, expected):
    if not condition:
        raise ValueError(f"RopeEncDecConfig: {name}={value!r} does not work; it has to be {expected}.")


def _fold_rope_parameters(rope_parameters, rope_theta, rope_scaling, partial_rotary_factor) -> dict:
    """The one dict of transformers 5, made from it or from the 4.57 fields; what stands in `rope_parameters` wins."""
    parameters = dict(rope_parameters or rope_scaling or {})
    legacy_type = parameters.pop("type", None)
    if parameters.get("rope_type") is None:
        parameters["rope_type"] = legacy_type or "default"
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = 10000.0 if rope_theta is None else rope_theta
    if partial_rotary_factor is not None:
        parameters.setdefault("partial_rotary_factor", partial_rotary_factor)
    return parameters


def _validate_rope_parameters(parameters: dict, head_dim: int):
    rope_type = parameters["rope_type"]
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    _check(rope_type in known, 'rope_parameters["rope_type"]', rope_type, f"one of {known}")
    missing = [key for key in _REQUIRED_ROPE_KEYS.get(rope_type, ()) if parameters.get(key) is None]
    _check(
        not missing, "rope_parameters", parameters, f"given with {missing} too, which rope_type={rope_type!r} needs"
    )
    theta = parameters["rope_theta"]
    _check(_is_positive_number(theta), 'rope_parameters["rope_theta"]', theta, "a positive number")
    for key in _REQUIRED_ROPE_KEYS.get(rope_type, ()):
        values = parameters[key] if isinstance(parameters[key], (list, tuple)) else [parameters[key]]
        _check(all(map(_is_positive_number, values)), f'rope_parameters["{key}"]', parameters[key], "positive")
    factor = parameters.get("partial_rotary_factor", 1.0)
    _check(
        isinstance(factor, (int, float)) and 0 < factor <= 1,
        'rope_parameters["partial_rotary_factor"]',
        factor,
        "more than 0 and at most 1",
    )
    # "proportional" (Gemma 4) keeps the whole width and zeroes frequencies instead.
    width = head_dim if rope_type == "proportional" else int(head_dim * factor)
    _check(
        width >= 2 and width % 2 == 0,
        "head_dim",
        head_dim,
        f"such that the rotary width, head_dim * partial_rotary_factor={factor}, is even and at least 2, not {width}",
    )


__all__ = ["RopeEncDecConfig"]
