"""A model in eval mode for a while, in one thread or in several."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from probe.errors import ProbeError


@dataclass
class _Held:
    """A module that is evaluated: by how many callers, and the mode in which it was before the first of them."""

    callers: int
    training: bool


_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_change = threading.Lock()  # for these two dictionaries and the modes


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped inside. Afterwards every module of the model is in the mode in which it was, in any case.

    Several threads may be inside with the same model: it is in eval mode until the last of them has left. A
    ``TransformerBridge`` keeps its hooks in its modules, where another thread's run would call them, so threads that
    look at the same bridge take turns.
    """
    if not isinstance(model, nn.Module):
        raise ProbeError(f"model must be a torch module, got {type(model).__name__}")
    with _turn(model):
        modules = list(model.modules())
        with _change:
            for module in modules:
                held = _held.setdefault(module, _Held(0, module.training))
                held.callers += 1
            if any(module.training for module in modules):
                model.eval()
        try:
            yield
        finally:
            with _change:
                for module in modules:
                    _held[module].callers -= 1
                left = {module: _held.pop(module).training for module in modules if not _held[module].callers}
                if left.get(model):  # some layers do more than set a flag when the mode changes: they are asked, too
                    model.train()
                for module in modules:
                    module.training = left.get(module, False)  # what others still look at stays in eval mode


def _turn(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    if not hasattr(model, "run_with_hooks"):
        return contextlib.nullcontext()
    return lock_of(model)


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of a model that has one pass at a time, because a pass leaves its mark on the model."""
    with _change:
        return _locks.setdefault(model, threading.RLock())
