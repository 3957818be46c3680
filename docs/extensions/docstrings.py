"""Docstrings as they are written here, for Sphinx: text in which only ``code``, lists and sections mean anything."""

import importlib
import inspect
import re
from collections.abc import Collection, Sequence
from typing import Any

from public_names import public_paths
from sphinx.application import Sphinx

CODE = re.compile(r"(``.+?``)")
MARKS = re.compile(r"([\\|*`]|(?<=\w)_(?!\w))")  # what reStructuredText would take for markup
LIST_ITEM = re.compile(r"\s*(- |\d+\. )")


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _linked(code: str, own: Collection[str]) -> str:
    """A link where the code is the name of something public, with its package or without, and none of one's own."""
    name = code.strip("`")
    path = name if name in public_paths().values() else public_paths().get(name)
    return code if path is None or name in own else f":py:obj:`{name} <{path}>`"


def _line(line: str, own: Collection[str]) -> str:
    pieces = CODE.split(line)
    return "".join(_linked(p, own) if p.startswith("``") else MARKS.sub(r"\\\1", p) for p in pieces)


def _returned(lines: Sequence[str]) -> list[str]:
    """The section "Returns:" as a field of its own: napoleon would take what stands before a colon for a type."""
    text: list[str] = []
    inside = None  # the depth of the section's heading
    for line in lines:
        if line.strip() in ("Returns:", "Rows:"):
            inside = _depth(line)
            text.append(f"{' ' * inside}:returns:")
        elif inside is not None and line.strip() and _depth(line) <= inside:
            inside = None
            text.append(line)
        else:
            text.append(line)
    return text


def as_rst(lines: Sequence[str], own: Collection[str] = ()) -> list[str]:
    """The lines, what is no markup escaped, names linked but for one's own, and indented formulas as they stand."""
    text: list[str] = []
    last, formula = "", None  # the last line that was not blank; the depth of the text before a formula
    for i, line in enumerate(lines):
        if formula is not None and line.strip() and _depth(line) <= formula:
            formula = None
        starts = last and line.strip() and not lines[i - 1].strip() and _depth(line) >= _depth(last) + 4
        if formula is None and starts and not LIST_ITEM.match(last):
            formula = _depth(last)
            text += [f"{' ' * formula}::", ""]
        text.append(line if formula is not None else _line(line, own))
        last = line if line.strip() else last
    return _returned(text)


def _own_names(obj: Any) -> Collection[str]:
    """What is meant by a name in a docstring before anything public is: parameters, members."""
    if isinstance(obj, type):
        return dir(obj)
    try:
        return list(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return ()


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    own = set(_own_names(obj))
    if what in ("method", "property", "attribute"):
        module, _, cls = name.rpartition(".")[0].rpartition(".")
        own |= set(dir(getattr(importlib.import_module(module), cls)))
    lines[:] = as_rst(lines, own)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}
