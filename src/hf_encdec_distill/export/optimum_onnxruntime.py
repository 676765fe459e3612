"""The sizes of our key/value heads for Optimum's ONNX Runtime models, and what those say of our exports. Imported by
`registration`."""

import functools

from optimum.onnxruntime import modeling_seq2seq

from .optimum_loading import refuse_our_graphs


def _know_key_value_heads(init):
    """`ORTDecoderForSeq2Seq.__init__` (optimum-onnx v0.1.0) takes each query head for a key/value head, of width
    `hidden_size // num_attention_heads`. It makes the empty cache of a merged decoder's first call with these, and
    with I/O binding all output buffers."""

    @functools.wraps(init)
    def with_key_value_heads(self, config, *args, **kwargs):
        init(self, config, *args, **kwargs)
        if config.model_type == "rope_encdec":
            self.num_attention_heads = config.num_key_value_heads
            self.embed_size_per_head = config.head_dim

    return with_key_value_heads


modeling_seq2seq.ORTDecoderForSeq2Seq.__init__ = _know_key_value_heads(modeling_seq2seq.ORTDecoderForSeq2Seq.__init__)
refuse_our_graphs(modeling_seq2seq.ORTModelForSeq2SeqLM)
