"""Numbers about texts, how far they can be trusted, and how they are called; everything is imported on first use."""

from typing import TYPE_CHECKING

from .._lazy import on_first_use


if TYPE_CHECKING:
    from .measures import METRICS as METRICS
    from .measures import estimate as estimate
    from .measures import measure_texts as measure_texts
    from .measures import pareto_front as pareto_front
    from .significance import Sums as Sums
    from .significance import calibration_error as calibration_error
    from .significance import interval as interval
    from .significance import mean as mean
    from .significance import p_value as p_value
    from .texts import Bleu as Bleu
    from .texts import ChrF as ChrF
    from .texts import DistinctShare as DistinctShare
    from .texts import Rouge as Rouge
    from .texts import Squad as Squad
    from .texts import bleu as bleu
    from .texts import chrf as chrf
    from .texts import decode_texts as decode_texts
    from .texts import distinct_share as distinct_share
    from .texts import exact_match as exact_match
    from .texts import f1 as f1
    from .texts import generation_metrics as generation_metrics
    from .texts import rouge as rouge
    from .texts import rouge_l as rouge_l
    from .texts import squad as squad
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".texts": [
                "Bleu",
                "ChrF",
                "DistinctShare",
                "Rouge",
                "Squad",
                "bleu",
                "chrf",
                "decode_texts",
                "distinct_share",
                "exact_match",
                "f1",
                "generation_metrics",
                "rouge",
                "rouge_l",
                "squad",
            ],
            ".measures": ["METRICS", "estimate", "measure_texts", "pareto_front"],
            ".significance": ["Sums", "calibration_error", "interval", "mean", "p_value"],
        },
    )
