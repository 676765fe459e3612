"""The projector first: between a vision tower and a text student that know their work, it alone has to be learnt.

LLaVA trains it before anything else, and on with the language model (arXiv 2304.08485, section 4.2; arXiv 2310.03744).
Here the decoder may come before the encoder (`freeze_encoder`, `unfreeze_encoder_after`); the projector, once it is
trained, stays so.
"""

from torch import nn
from transformers import PreTrainedModel


def projector_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Those of the projector that are trained, by the name that transformers' models with a vision tower give it.

    Raises:
        ValueError: there is none.
    """
    projector = getattr(model.get_encoder(), "multi_modal_projector", None)
    parameters = [] if projector is None else [p for p in projector.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"train_projector_first with {type(model).__name__}, whose encoder has no multi_modal_projector that is "
            "trained: it is for students that read images. Leave it out."
        )
    return parameters
