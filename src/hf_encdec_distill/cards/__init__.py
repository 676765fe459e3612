"""Model cards, written from what was measured; everything is imported on first use."""

from typing import TYPE_CHECKING

from .._lazy import on_first_use


if TYPE_CHECKING:
    from .callback import ModelCardCallback as ModelCardCallback
    from .index import model_index as model_index
    from .index import update_model_card as update_model_card
    from .model_card import write_model_card as write_model_card
else:
    __getattr__, __dir__, __all__ = on_first_use(
        __name__,
        {
            ".callback": ["ModelCardCallback"],
            ".index": ["model_index", "update_model_card"],
            ".model_card": ["write_model_card"],
        },
    )
