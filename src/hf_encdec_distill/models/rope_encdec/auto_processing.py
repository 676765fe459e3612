"""Makes `AutoProcessor` and `AutoImageProcessor` know the processors of the vision student; see `registration`."""

from transformers.utils import is_vision_available


if is_vision_available():  # Pillow, without which nobody has images
    from transformers import AutoImageProcessor, AutoProcessor

    from .configuration_rope_encdec_vision import RopeEncDecVisionConfig
    from .processing_rope_encdec_vision import RopeEncDecImageProcessor, RopeEncDecVisionProcessor

    AutoImageProcessor.register(
        RopeEncDecVisionConfig, slow_image_processor_class=RopeEncDecImageProcessor, exist_ok=True
    )
    AutoProcessor.register(RopeEncDecVisionConfig, RopeEncDecVisionProcessor, exist_ok=True)
    RopeEncDecImageProcessor.register_for_auto_class("AutoImageProcessor")
    RopeEncDecVisionProcessor.register_for_auto_class("AutoProcessor")
