"""Distillation of a decoder-only teacher into an encoder-decoder student; everything is imported on first use."""

from typing import TYPE_CHECKING

from .._lazy import on_first_use


if TYPE_CHECKING:
    from .alignment.vocabularies import SharedVocabulary as SharedVocabulary
    from .arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from .collator import DistillationCollator as DistillationCollator
    from .options.encoder_states import capture_encoder_states as capture_encoder_states
    from .teachers.capture import capture as capture
    from .teachers.live import LiveTeacher as LiveTeacher
    from .teachers.recorded import CachedTeacher as CachedTeacher
    from .teachers.recorded import is_cache as is_cache
    from .teachers.served import ServedTeacher as ServedTeacher
    from .teachers.served_targets import write_targets as write_targets
    from .teachers.signal import TeacherSignal as TeacherSignal
    from .teachers.targets import TargetGeneration as TargetGeneration
    from .teachers.workers import merge_caches as merge_caches
    from .trainer import DistillationTrainer as DistillationTrainer
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".arguments": ["DistillationTrainingArguments"],
            ".collator": ["DistillationCollator"],
            ".trainer": ["DistillationTrainer"],
            ".options.encoder_states": ["capture_encoder_states"],
            ".alignment.vocabularies": ["SharedVocabulary"],
            ".teachers.signal": ["TeacherSignal"],
            ".teachers.live": ["LiveTeacher"],
            ".teachers.recorded": ["CachedTeacher", "is_cache"],
            ".teachers.served": ["ServedTeacher"],
            ".teachers.capture": ["capture"],
            ".teachers.served_targets": ["write_targets"],
            ".teachers.targets": ["TargetGeneration"],
            ".teachers.workers": ["merge_caches"],
        },
    )
