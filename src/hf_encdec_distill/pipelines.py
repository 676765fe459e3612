"""`pipeline("text2text-generation")` for a transformers that no longer has it: 5.0 dropped it.

Imported by `registration` once transformers' pipelines are. It imports only transformers, so that a pipeline that was
saved carries its code along.
"""

from transformers import AutoModelForSeq2SeqLM, GenerationConfig, pipelines
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


TASK = "text2text-generation"


class Text2TextGenerationPipeline(pipelines.Pipeline):
    """Answers texts with an encoder-decoder; what goes in and what comes out are those of transformers v4.57.6
    (`pipelines/text2text_generation.py`).

    `pipe(text)` is `[{"generated_text": ...}]`, with an entry for each of `num_return_sequences`. `pipe([text, ...])`
    is such an entry for each text, or a list of them where there are several. Of a dataset it is an iterator.

    Args:
        return_tensors (`bool`, *optional*): Give `generated_token_ids` in place of `generated_text`.
        return_text (`bool`, *optional*): Without effect, as in 4.57, where `return_tensors` alone decides.
        clean_up_tokenization_spaces (`bool`): Of the tokenizer's `decode`.
        truncation: Of the tokenizer; texts are not cut by default.
        generate_kwargs: All others go to `generate`. Where neither they nor the model's `generation_config` say so,
            answers have at most 256 tokens and are searched with 4 beams.

    Raises:
        ValueError: something that is not a text.
    """

    _pipeline_calls_generate = True
    _load_processor = _load_image_processor = _load_feature_extractor = False  # type: ignore[assignment]  # base: None
    _load_tokenizer = True  # type: ignore[assignment]  # base: None
    _default_generation_config = GenerationConfig(max_new_tokens=256, num_beams=4)

    def _sanitize_parameters(
        self,
        return_tensors=None,
        return_text=None,
        clean_up_tokenization_spaces=None,
        truncation=None,
        stop_sequence=None,
        **generate_kwargs,
    ):
        if stop_sequence is not None:  # its first token, as v4.57.6 has it
            generate_kwargs["eos_token_id"] = self.tokenizer.encode(stop_sequence, add_special_tokens=False)[0]
        if self.assistant_model is not None:
            generate_kwargs["assistant_model"] = self.assistant_model
        if self.assistant_tokenizer is not None:
            generate_kwargs |= {"tokenizer": self.tokenizer, "assistant_tokenizer": self.assistant_tokenizer}
        before = {"truncation": truncation}
        after = {
            "return_tensors": return_tensors,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        # What a call leaves unsaid must not override what was said when the pipeline was made.
        before, after = ({name: x for name, x in said.items() if x is not None} for said in (before, after))
        return before, generate_kwargs, after

    def __call__(self, inputs, **kwargs):
        if isinstance(inputs, list) and not inputs:
            return []
        results = super().__call__(inputs, **kwargs)
        if isinstance(inputs, list) and all(len(answers) == 1 for answers in results):
            return [answers[0] for answers in results]
        return results

    def preprocess(self, inputs, truncation=False):
        if not isinstance(inputs, str):
            raise ValueError(f"{inputs!r} is a {type(inputs).__name__}: {TASK} answers a text or a list of texts")
        encoded = self.tokenizer((self.prefix or "") + inputs, truncation=truncation, return_tensors="pt")
        encoded.pop("token_type_ids", None)  # which `generate` refuses
        return encoded

    def _forward(self, model_inputs, **generate_kwargs):
        if hasattr(self, "_prepare_generate_kwargs"):
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs)
        else:  # transformers 5.0, whose pipelines keep the merged config. Goes when 5.23 is dropped.
            generate_kwargs.setdefault("generation_config", self.generation_config)
        tokens = self.model.generate(**model_inputs, **generate_kwargs)
        rows = len(model_inputs["input_ids"])
        return {"output_ids": tokens.reshape(rows, len(tokens) // rows, -1)}

    def postprocess(self, model_outputs, return_tensors=False, clean_up_tokenization_spaces=False):
        (answers,) = model_outputs["output_ids"]
        if return_tensors:
            return [{"generated_token_ids": ids} for ids in answers]
        options = {
            "skip_special_tokens": True,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        return [{"generated_text": self.tokenizer.decode(ids, **options)} for ids in answers]


if TASK in pipelines.PIPELINE_REGISTRY.supported_tasks:
    # transformers 4.57 logs an error for a class that is neither registered nor named here, as that of exports is not.
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["rope_encdec"] = "ExportedForConditionalGeneration"
else:
    # transformers 5.24 refuses by this list before it asks its registry.
    getattr(pipelines, "REMOVED_TASKS", {}).pop(TASK, None)
    pipelines.PIPELINE_REGISTRY.register_pipeline(
        TASK, Text2TextGenerationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text"
    )
