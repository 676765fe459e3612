"""The teacher's distributions: from a model here or on a server, or from a record of one. `signal` has what the
trainer asks of each."""

from typing import TYPE_CHECKING

from ..._lazy import on_first_use


if TYPE_CHECKING:
    from .live import LiveTeacher as LiveTeacher
    from .recorded import CachedTeacher as CachedTeacher
    from .recorded import is_cache as is_cache
    from .served import ServedTeacher as ServedTeacher
    from .signal import TeacherScores as TeacherScores
    from .signal import TeacherSignal as TeacherSignal
    from .targets import TargetGeneration as TargetGeneration
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".signal": ["TeacherScores", "TeacherSignal"],
            ".live": ["LiveTeacher"],
            ".recorded": ["CachedTeacher", "is_cache"],
            ".served": ["ServedTeacher"],
            ".targets": ["TargetGeneration"],
        },
    )
