"""A student whose decoder alone is trained."""

from transformers import PreTrainedModel


def freeze_encoder(model: PreTrainedModel) -> None:
    """Takes the gradient from all that the encoder reads, so that what it says of a prompt stays what it was.

    An embedding that the decoder shares is among it, and with it an LM head that is tied to that; an untied one is
    trained. Dropout in the encoder is left as it is.

    Raises:
        ValueError: nothing of the model is left to train.
    """
    for parameter in model.get_encoder().parameters():
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"freeze_encoder=True leaves nothing to train of {type(model).__name__}: its decoder is frozen, or "
            "is its encoder."
        )
