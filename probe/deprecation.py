"""Old public names. Each works for one more release, with a ``DeprecationWarning`` that gives the new name.

A package lists its old names in ``old_names``, a function the old names of its arguments in ``old_arguments``, and a
result the old name of a field in ``old_field``. What each of them returns has the dict ``renamed``, new name by old.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def old_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module: for an old name the object that has the new name.

    Args:
        module: the module's ``__name__``.
        names: the new name by the old one, both in that module.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    __getattr__.renamed = dict(names)  # type: ignore[attr-defined]
    return __getattr__


def old_arguments(**names: str) -> Callable[[F], F]:
    """A decorator: the function also takes keyword arguments by their old names.

    The old name of one argument may be the new name of another, as in ``train(model, data, config)``, which became
    ``train(config, data, training)``. Such a keyword is the old name exactly where the argument that has the name now
    is given in another way.

    Args:
        names: the new name by the old one.
    """

    def decorate(function: F) -> F:
        parameters = [*inspect.signature(function).parameters]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if names.keys().isdisjoint(kwargs):
                return function(*args, **kwargs)
            given = {*parameters[: len(args)], *(new for old, new in names.items() if old in kwargs)}
            renamed: dict[str, Any] = {}
            for name, value in kwargs.items():
                is_new = name not in names or (name in parameters and name not in given)
                new = name if is_new else names[name]
                if new in renamed:
                    raise TypeError(f"{function.__name__}() got two values for {new!r}, one by the old name")
                if not is_new:
                    _warn(f"the argument {name!r} of {function.__name__}", repr(new))
                renamed[new] = value
            return function(*args, **renamed)

        call.renamed = names  # type: ignore[attr-defined]
        return cast(F, call)

    return decorate


def old_field(old: str, new: str) -> property:
    """A property that reads a result's field by its old name.

    Args:
        old: the name of the property.
        new: the name of the field.
    """

    def read(self: object) -> Any:
        _warn(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        return getattr(self, new)

    read.__doc__ = f"The old name of ``{new}``, which works for one more release."
    read.renamed = {old: new}  # type: ignore[attr-defined]
    return property(read)


def _warn(old: str, new: str) -> None:
    """Warn the caller of the caller, who used the old name."""
    warnings.warn(f"{old} is now {new}; the old name works for one more release", DeprecationWarning, stacklevel=3)
