"""Every way in: which class looks at which model."""

from typing import Any, cast

from torch import nn

from probe.errors import ProbeError
from probe.models.protocol import Model

# The view of a model lies on the model itself, so both are freed together.
_VIEW = "_probe_view"


def as_model(model: nn.Module) -> Model:
    """The model, or the view of it, that answers what measurements ask.

    A ``Decoder``, a ``ClockworkRNN`` and what ``probe.wrap`` returns answer by themselves. A TransformerBridge and a
    model of transformers get a view, which is made once; the latter is checked then.

    Raises:
        ProbeError: for anything else, and for a model of transformers that fails the check.
    """
    if hasattr(type(model), "attention_inputs"):
        return cast(Model, model)
    view: Model | None = vars(model).get(_VIEW) if isinstance(model, nn.Module) else None
    if view is None:
        view = _view_of(model)
        object.__setattr__(model, _VIEW, view)  # past torch, which would take it for a part of the model
    return view


def _view_of(model: Any) -> Model:
    if hasattr(model, "run_with_cache") and hasattr(model, "cfg"):
        from probe.models.open.bridge import BridgeModel

        return BridgeModel(model)
    if is_transformers(model):
        from probe.models.open.wrapping import wrap_transformers

        return wrap_transformers(model)
    raise ProbeError(
        "model must be a Decoder, a ClockworkRNN, a causal language model of transformers, a TransformerBridge, or "
        f"what probe.wrap makes of another module, got {type(model).__name__}"
    )


def is_transformers(model: object) -> bool:
    """Whether a module is a model of transformers, without importing it."""
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)
