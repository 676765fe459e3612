"""The projector first: between a vision tower and a text student that know their work, it alone has to be learnt.

LLaVA trains it before anything else, and on with the language model (arXiv 2304.08485, section 4.2; arXiv 2310.03744).
Here the decoder may come before the encoder (`freeze_encoder`, `unfreeze_encoder_after`); the projector, once it is
trained, stays so.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .frozen_encoder import Unfreeze


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


class UnfreezeBehindProjector(Unfreeze):
    """As [`Unfreeze`]; until then texts alone have a gradient too."""

    _hook: RemovableHandle | None = None

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hook()

    def _set(self, trained: bool) -> None:
        super()._set(trained)
        self._remove_hook()
        if not trained:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            self._hook = give_texts_a_gradient(model, projector_parameters(model))

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def give_texts_a_gradient(model: PreTrainedModel, projector: Sequence[nn.Parameter]) -> RemovableHandle:
    """Where the projector alone is trained, a batch without images has a gradient of zero in place of none.

    Without one `backward` raises, and where others have images, DistributedDataParallel would wait for it for ever.
    """

    def with_gradient(_, __, output):
        if torch.is_grad_enabled() and not output.last_hidden_state.requires_grad:
            output.last_hidden_state = output.last_hidden_state + 0 * sum(part.sum() for part in projector)
        return output

    return model.get_decoder().register_forward_hook(with_gradient)
