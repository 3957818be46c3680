"""Linear maps whose rows are multiplied while others read them: how a temperature is put on W_Q."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probe.errors import ProbeError

#: From the rows of a weight, or of a bias, to what they are multiplied with, of the shape of the first dimension.
Factor = Callable[[Tensor], Tensor]

# Held while maps are scaled or are no longer: of two threads that scale one model, one is refused.
LOCK = threading.RLock()


def scale_rows(maps: Mapping[nn.Linear, Factor]) -> None:
    """Multiply the rows of these maps' weights and biases from now on, until ``restore_rows``.

    ``weight`` and ``bias`` read as multiplied, and so does ``state_dict``; a deep copy is an ordinary map with the
    products in its weights. The parameters themselves stay what they are. Other threads see a map before or after.

    Raises:
        ProbeError: where one of them is scaled already; then none is scaled anew.
    """
    with LOCK:
        if any(map(is_scaled, maps)):
            raise ProbeError("the model is scaled already: fold or remove that first")
        for linear, factor in maps.items():
            linear.__class__ = _scaled_class(type(linear), factor)


def restore_rows(maps: Sequence[nn.Linear], keep: bool) -> None:
    """Take the factors off; with ``keep`` the parameters hold the products from then on."""
    with LOCK, torch.no_grad():
        for linear in maps:
            products = {name: getattr(linear, name) for name in _parameters(linear)} if keep else {}
            linear.__class__ = type(linear).__mro__[1]
            for name, product in products.items():
                _parameters(linear)[name].copy_(product)


def is_scaled(model: nn.Module) -> bool:
    """Whether a map in a model is multiplied just now."""
    return any(hasattr(type(module), "_is_scaled") for module in model.modules())


def check_not_scaled(model: nn.Module, what: str) -> None:
    """Refuse a model that is scaled just now.

    Raises:
        ProbeError: for such a model, saying what for it can't be.
    """
    if is_scaled(model):
        raise ProbeError(
            f"{what} needs a model with weights of its own; a scale is on its attention: fold or remove it first"
        )


def _parameters(linear: nn.Linear) -> dict[str, nn.Parameter]:
    """What is multiplied, by the names under which the products are read."""
    return {name: rows for name, rows in linear._parameters.items() if rows is not None}


def _scaled_class(base: type[nn.Linear], factor: Factor) -> type[nn.Linear]:
    """A class of which the attributes read as multiplied. The factor is the class's, so that to change a map's class is
    all that is to be done, and no other thread can see a half of it."""

    def product(linear: nn.Linear, name: str) -> Tensor | None:
        rows = linear._parameters[name]
        if rows is None:
            return None
        return (rows * factor(rows).view(-1, *[1] * (rows.ndim - 1))).to(rows.dtype)

    def save(linear: nn.Linear, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(linear, destination, prefix, keep_vars)
        for name in _parameters(linear):
            value = getattr(linear, name)
            destination[prefix + name] = value if keep_vars else value.detach()

    def load(linear: nn.Linear, *args: Any) -> None:
        check_not_scaled(linear, "loading weights")

    def copied(linear: nn.Linear, memo: dict[int, Any]) -> nn.Linear:
        twin = base.__new__(base)
        memo[id(linear)] = twin
        for name, parameter in _parameters(linear).items():
            memo[id(parameter)] = nn.Parameter(getattr(linear, name).detach().clone(), parameter.requires_grad)
        twin.__dict__.update(copy.deepcopy(linear.__dict__, memo))
        return twin

    members = {
        "_is_scaled": True,
        "weight": property(lambda linear: product(linear, "weight")),
        "bias": property(lambda linear: product(linear, "bias")),
        "_save_to_state_dict": save,
        "_load_from_state_dict": load,
        "__deepcopy__": copied,
    }
    return type(base.__name__, (base,), members)
