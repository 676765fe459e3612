"""Folders that our own `export` wrote are told from Optimum's, before Optimum looks for files that are not there, and
students from those that Optimum has no graph for."""

import functools
from pathlib import Path


def refuse_our_graphs(optimum_class):
    """Makes `optimum_class.from_pretrained` say what such a folder is, or that a student reads images.

    The encoder of our export gives the prompt's keys and values; Optimum's decoders take encoder states and make those
    themselves.
    """
    optimum_class._from_pretrained = _or_say_so(optimum_class._from_pretrained.__func__)
    optimum_class._export = _or_say_so(optimum_class._export.__func__)


def reads_images(model_id: object, who: str) -> str:
    """Why a student that reads images is refused by one of Optimum's."""
    return (
        f"{model_id} reads images, and {who} has no place for the graph that does: export it with hf-encdec-distill "
        "export, to onnx, openvino or coreml."
    )


def _or_say_so(load):
    @functools.wraps(load)
    def load_or_say_so(cls, model_id, config, **options):
        from .manifest import MANIFEST  # when our package is imported after Optimum, it is not whole yet up there

        folder = Path(model_id, options.get("subfolder") or "")
        if (folder / MANIFEST).is_file():
            raise ValueError(
                f"{folder} was written by `hf-encdec-distill export`: its decoder takes the prompt's keys and values, "
                f"where {cls.__name__} expects encoder states: load it with ExportedForConditionalGeneration of "
                "hf_encdec_distill.export.runtime, or export the student with Optimum."
            )
        if config.model_type == "rope_encdec_vision":
            raise ValueError(reads_images(model_id, cls.__name__))
        return load(cls, model_id, config, **options)

    return classmethod(load_or_say_so)
