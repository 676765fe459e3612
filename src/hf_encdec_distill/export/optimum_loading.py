"""Folders that our own `export` wrote are told from Optimum's, before Optimum looks for files that are not there."""

import functools
from pathlib import Path


def refuse_our_graphs(optimum_class):
    """Makes `optimum_class.from_pretrained` say what such a folder is.

    Their encoder gives the prompt's keys and values; Optimum's decoders take encoder states and make those themselves.
    """
    load = optimum_class._from_pretrained.__func__

    @functools.wraps(load)
    def or_say_so(cls, model_id, config, **options):
        from .manifest import MANIFEST  # when our package is imported after Optimum, it is not whole yet up there

        folder = Path(model_id, options.get("subfolder") or "")
        if (folder / MANIFEST).is_file():
            raise ValueError(
                f"{folder} was written by `hf-encdec-distill export`: its decoder takes the prompt's keys and values, "
                f"where {cls.__name__} expects encoder states: load it with ExportedForConditionalGeneration of "
                "hf_encdec_distill.export.runtime, or export the student with Optimum."
            )
        return load(cls, model_id, config, **options)

    optimum_class._from_pretrained = classmethod(or_say_so)
