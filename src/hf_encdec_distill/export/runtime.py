"""An exported folder as a model: `generate` of transformers on the runtime of its target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import PreTrainedModel

from ..models.loading import check_generation, load_config, load_generation_config
from ..models.rope_encdec import RopeEncDecConfig, RopeEncDecForConditionalGeneration
from ..models.rope_encdec.compat_rope_encdec import CACHE_FIELD
from .graphs import Graphs
from .manifest import load_graphs, read_manifest


class ExportedForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """What [`RopeEncDecForConditionalGeneration`] or [`RopeEncDecForImageTextToText`] answers, from exported graphs:
    `model(...)` without gradients, and `model.generate(...)` with all that transformers offers for it.

    Args:
        graphs: the graphs of an exported folder.
    """

    config_class = RopeEncDecConfig
    main_input_name = "input_ids"
    manifest: dict[str, Any]  # of a folder

    def __init__(self, config: PretrainedConfig, graphs: Graphs):
        super().__init__(config)
        self.graphs = graphs
        self.generation_config = GenerationConfig.from_model_config(config)
        self.anchor = torch.nn.Parameter(torch.zeros(()), requires_grad=False)  # gives `device` and `dtype`
        self.encoder = _Encoder(graphs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # of folders alone
        cls, folder: str | Path
    ) -> ExportedForConditionalGeneration:
        """
        Raises:
            ValueError: the folder holds no export, one of a newer version, or a file that is not as it was written.
            ImportError: the runtime is missing; the message has the line that installs it.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        config = load_config(folder)
        model = cls(config, load_graphs(folder, manifest, config))
        model.generation_config = load_generation_config(folder)
        check_generation(folder, model.generation_config, config.vocab_size)
        model.manifest = manifest
        return model.eval()

    def get_encoder(self, modality=None):
        return self.encoder if modality is None else self

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes a cache of its own

    def save_pretrained(self, save_directory, **kwargs):
        """
        Raises:
            ValueError: the graphs are in the folder that this was loaded from, and only there.
        """
        raise ValueError(
            f"an export is the folder that it was loaded from: copy that to {save_directory}, or push its student "
            "with hf-encdec-distill push"
        )

    def prepare_decoder_input_ids_from_labels(self, labels):
        return RopeEncDecForConditionalGeneration.prepare_decoder_input_ids_from_labels(self, labels)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, encoder_outputs=None, **kwargs):
        cache = kwargs.get(CACHE_FIELD)
        seen = 0 if cache is None else cache.get_seq_length()
        return {
            "decoder_input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "encoder_outputs": encoder_outputs,
            CACHE_FIELD: cache,
        }

    def _assisted_decoding(self, *args, **kwargs):
        """What `generate` does with `prompt_lookup_num_tokens` or an `assistant_model`.

        Raises:
            ValueError: a runtime takes no tokens back.
        """
        raise ValueError(
            "prompt_lookup_num_tokens and assistant_model guess tokens and take back the wrong ones, which the cache "
            "of an export cannot: leave them out, or take the student in PyTorch"
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        encoder_outputs=None,
        past_key_values=None,
        cache=None,
        pixel_values=None,
        labels=None,
        return_dict=None,
        **kwargs,
    ) -> Seq2SeqLMOutput | tuple:
        """
        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(B, S)`): Prompt, or `encoder_outputs`.
            pixel_values (`torch.FloatTensor` of shape `(I, 3, height, width)`, *optional*): The images of the prompt.
            decoder_input_ids (`torch.LongTensor` of shape `(B, T)`): Target tokens that follow those of the cache.
            past_key_values ([`GraphCache`], *optional*): From an earlier call; `cache` is transformers 5.24's name.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): Target tokens, -100 where there is none; the
                decoder's input, shifted, where there is no other.

        Returns:
            [`Seq2SeqLMOutput`], `logits` of shape `(B, T, V)`, with `labels` also `loss`, their cross-entropy

        Raises:
            ValueError: neither prompt nor encoder's outputs, neither decoder's input nor labels, or what no graph
                takes: embeddings, pads in the decoder's input.
        """
        _refuse(kwargs)
        if input_ids is None and encoder_outputs is None:
            raise ValueError("the encoder needs input_ids, or give encoder_outputs")
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("the decoder needs decoder_input_ids, or labels, from which they are made")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        cache = past_key_values if cache is None else cache
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, pixel_values)
        *cross, mask = (tensor.numpy() for tensor in encoder_outputs.values())
        if cache is None:
            cache = self.graphs.new_cache(len(decoder_input_ids))
        logits = self.graphs.decode(decoder_input_ids.long().numpy(), mask, cross, cache)
        scores, loss = torch.from_numpy(logits), None
        if labels is not None:
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        output = Seq2SeqLMOutput(loss=loss, logits=scores, **{CACHE_FIELD: cache})
        return output.to_tuple() if return_dict is False else output


def _refuse(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for what PyTorch's model reads and the graphs do not."""
    for name in ("inputs_embeds", "decoder_inputs_embeds"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: an export takes token ids alone")
    mask = kwargs.get("decoder_attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError("decoder_attention_mask has zeros, and an export reads every token of the decoder's input")


class _Encoder(torch.nn.Module):
    """As `generate` calls an encoder. All that the decoder needs is in the output, since `generate` repeats it, tensor
    by tensor, for beams."""

    main_input_name = "input_ids"

    def __init__(self, graphs: Graphs):
        super().__init__()
        self.graphs = graphs

    def forward(self, input_ids, attention_mask=None, pixel_values=None, **kwargs) -> BaseModelOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        pixels = None if pixel_values is None else pixel_values.numpy()
        cross, mask = self.graphs.encode(input_ids.long().numpy(), mask.numpy(), pixels)
        first, *others = (torch.from_numpy(array) for array in (*cross, mask))
        outputs = BaseModelOutput(last_hidden_state=first)
        for index, tensor in enumerate(others):
            outputs[f"cross_{index}"] = tensor
        return outputs
