"""Modules whose weights take no memory and are not drawn yet."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Modules made within this block are on the device "meta", and torch's layers draw no weights of their own."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves the calls of ``torch.nn.init`` out: there is nothing to write to, and on "meta" the first one would import
    torch's compiler, which takes longer than torch itself."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
