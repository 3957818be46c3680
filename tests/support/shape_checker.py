"""The types and shapes that the tests check whenever a function of ours is called.

jaxtyping's plugin for pytest decorates every function with ``jaxtyping.jaxtyped(typechecker=shape_checker.check)``.
``install`` puts a faster decorator in its place, which checks the same: each argument, and the result, against its
annotation, with axes of one name of one size within a call. Three things make it faster:

- arguments are bound to names only where an annotation names one (``"{n}"``), and checked once, not twice;
- a function is compiled for beartype when it is first called, not when its module is imported;
- a function within a function is checked argument by argument, since it is defined anew with each call of the outer
  one, and to compile it took most of the time of the suite.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable

#: beartype, for which an int is a float as PEP 484 says.
CONF = BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
check = beartype(conf=CONF)

_theirs = jaxtyping.jaxtyped
_axes = _theirs("context")  # within it, an axis has one size
_hints_of_nested: dict[types.CodeType, dict[str, Any]] = {}


def install() -> None:
    """From now on, modules that jaxtyping's plugin decorates are decorated with ``jaxtyped``."""
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(checked: Any = None, *, typechecker: Any = None) -> Any:
    """The function, method or dataclass with its annotations checked in each call."""
    if checked is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if checked == "context":
        return _axes
    if inspect.isclass(checked):
        if dataclasses.is_dataclass(checked) and not hasattr(checked.__init__, "checks_shapes"):
            checked.__init__ = jaxtyped(checked.__init__)
        return checked
    if isinstance(checked, classmethod | staticmethod):
        return type(checked)(jaxtyped(checked.__func__))
    if isinstance(checked, property):
        return property(*(each and jaxtyped(each) for each in (checked.fget, checked.fset, checked.fdel)))
    # Names of arguments stand for sizes.
    if any("{" in (hint if isinstance(hint, str) else repr(hint)) for hint in checked.__annotations__.values()):
        wrapped = _theirs(checked, typechecker=check)
    elif "<locals>" in checked.__qualname__ or inspect.isgeneratorfunction(checked):
        wrapped = _by_argument(checked)
    else:
        wrapped = _compiled(checked)
    wrapped.checks_shapes = True
    return wrapped


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    run: Callable[..., Any] | None = None

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal run
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if run is None:
            run = check(_with_hints(function))
        with _axes:
            try:
                return run(*args, **kwargs)
            except jaxtyping.TypeCheckError as error:
                _add_shapes(error, function, args, kwargs)
                raise

    return wrapped


def _with_hints(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with types for annotations, where some were strings."""
    same = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    same.__kwdefaults__ = function.__kwdefaults__
    same.__module__, same.__qualname__ = function.__module__, function.__qualname__
    same.__annotations__ = _hints(function)
    return same


def _by_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    code = function.__code__
    hints = _hints_of_nested.get(code)
    if hints is None:
        hints = _hints_of_nested[code] = _hints(function)
    n = code.co_argcount
    names, star = code.co_varnames[:n], code.co_varnames[n + code.co_kwonlyargcount : len(code.co_varnames)]
    has_rest, has_named = bool(code.co_flags & inspect.CO_VARARGS), bool(code.co_flags & inspect.CO_VARKEYWORDS)
    rest = hints.get(star[0], Any) if has_rest else Any
    named = hints.get(star[int(has_rest)], Any) if has_named else Any
    result = hints.get("return", Any)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _axes:
            try:
                for name, value in zip(names, args, strict=False):
                    if name in hints:
                        die_if_unbearable(value, hints[name], conf=CONF)
                if rest is not Any:
                    for value in args[n:]:
                        die_if_unbearable(value, rest, conf=CONF)
                for name, value in kwargs.items():
                    hint = hints.get(name, named)
                    if hint is not Any:
                        die_if_unbearable(value, hint, conf=CONF)
                found = function(*args, **kwargs)
                if result is not Any:
                    die_if_unbearable(found, result, conf=CONF)
                return found
            except jaxtyping.TypeCheckError as error:
                _add_shapes(error, function, args, kwargs)
                raise

    return wrapped


def _add_shapes(
    error: jaxtyping.TypeCheckError, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Name the shapes of all arguments on an error of the innermost function only."""
    if not getattr(error, "__notes__", None):
        shapes = [getattr(value, "shape", type(value).__name__) for value in (*args, *kwargs.values())]
        error.add_note(f"{function.__module__}.{function.__qualname__} was called with {shapes}")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations; Any for what is a string that means nothing here, as jaxtyping has it."""
    hints = {}
    for name, hint in function.__annotations__.items():
        alone = types.SimpleNamespace(__annotations__={"value": hint})
        try:
            hints[name] = get_type_hints(alone, function.__globals__, include_extras=True)["value"]
        except Exception:
            hints[name] = Any
    return hints
