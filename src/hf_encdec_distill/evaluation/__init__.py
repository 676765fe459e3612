"""Models on held-out rows: scores from logits, answers, closeness to a teacher, a judge; imported on first use."""

from typing import TYPE_CHECKING

from .._lazy import on_first_use


if TYPE_CHECKING:
    from .fidelity import CalibrationError as CalibrationError
    from .fidelity import Fidelity as Fidelity
    from .fidelity import token_calibration as token_calibration
    from .fidelity import token_fidelity as token_fidelity
    from .judge import Judge as Judge
    from .scoring import encode_rows as encode_rows
    from .scoring import generate as generate
    from .scoring import read_by_encoder as read_by_encoder
    from .scoring import score as score
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".scoring": ["encode_rows", "generate", "read_by_encoder", "score"],
            ".fidelity": ["CalibrationError", "Fidelity", "token_calibration", "token_fidelity"],
            ".judge": ["Judge"],
        },
    )
