"""Makes `AutoProcessor` and `AutoImageProcessor` know the processors of the vision student; see `registration`."""

from typing import Any

from transformers.utils import is_vision_available


if is_vision_available():  # Pillow, without which nobody has images
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    from .configuration_rope_encdec_vision import RopeEncDecVisionConfig
    from .processing_rope_encdec_vision import RopeEncDecImageProcessor, RopeEncDecVisionProcessor

    AutoImageProcessor.register(
        RopeEncDecVisionConfig, slow_image_processor_class=RopeEncDecImageProcessor, exist_ok=True
    )
    # Each pipeline of transformers 5.24 looks for a video processor, guesses its name by that of the image processor,
    # and would ask whether the code that it suspects in the folder may be run.
    no_video: Any = {"torchvision": None}
    VIDEO_PROCESSOR_MAPPING.register(RopeEncDecVisionConfig, no_video, exist_ok=True)
    AutoProcessor.register(RopeEncDecVisionConfig, RopeEncDecVisionProcessor, exist_ok=True)
    RopeEncDecImageProcessor.register_for_auto_class("AutoImageProcessor")
    RopeEncDecVisionProcessor.register_for_auto_class("AutoProcessor")
