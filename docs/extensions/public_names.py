"""Which names are public, where each is described, and which say nothing of themselves."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

LOGGER = logging.getLogger(__name__)
OURS = ("probe", "constructions")
BESIDE = ("probe.limits",)  # modules that are in no package with public names
METHODS = (types.FunctionType, classmethod, staticmethod, property, functools.cached_property)


@functools.cache
def packages() -> tuple[str, ...]:
    """The packages with public names: those that have an ``__all__``, and the modules of ``BESIDE``."""
    names = [*OURS, *BESIDE]
    for root in OURS:
        paths = importlib.import_module(root).__path__
        names += [found.name for found in pkgutil.walk_packages(paths, f"{root}.") if found.ispkg]
    return tuple(name for name in sorted(names) if hasattr(importlib.import_module(name), "__all__"))


class Public(NamedTuple):
    """A public name: the object, and the module in which it was made."""

    name: str
    value: Any
    module: str

    @property
    def kind(self) -> str:
        """What Sphinx calls it."""
        if inspect.ismodule(self.value):
            return "module"
        if isinstance(self.value, type):
            return "exception" if issubclass(self.value, BaseException) else "class"
        return "function" if inspect.isroutine(self.value) else "data"


def _made_in(module: str, name: str) -> str:
    """The module that a name comes from: imports are followed to where it is assigned."""
    source = Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            return _made_in(node.module, name)
    return module


@functools.cache
def names_of(package: str) -> tuple[Public, ...]:
    """The public names of a package."""
    module = importlib.import_module(package)
    homes = getattr(module, "_HOMES", {})  # of those that are imported when they are asked for
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            made_in = value.__name__
        elif isinstance(value, type) or inspect.isroutine(value):
            made_in = value.__module__
        else:
            made_in = _made_in(homes.get(name, package), name)
        found.append(Public(name, value, made_in))
    return tuple(found)


@functools.cache
def home_of(name: str, module: str) -> str:
    """The package on whose page a name is described: of those that hand it on the one that it was made in."""
    hand_on = [p for p in packages() if any((each.name, each.module) == (name, module) for each in names_of(p))]
    return max(hand_on, key=lambda p: (len(p) if f"{module}.".startswith(f"{p}.") else 0, -len(p)))


@functools.cache
def public_paths() -> dict[str, str]:
    """Where a name stands in the documentation, by the name alone; names that two objects have are left out."""
    found: dict[str, set[str]] = {}
    for package in packages():
        for each in names_of(package):
            if each.kind != "module":
                found.setdefault(each.name, set()).add(f"{home_of(each.name, each.module)}.{each.name}")
    return {name: path for name, (path, *more) in found.items() if not more}


def undocumented(public: Iterable[Public]) -> list[str]:
    """Those of the names, and of the members of their classes, that say nothing of themselves, and what is wanted."""
    found: dict[str, None] = {}
    for each in public:
        path = f"{each.module}.{each.name}"
        if each.kind == "data":
            if not data_doc(each):
                found[f"{path} wants a comment #: above it"] = None
            continue
        if not (each.value.__doc__ or "").strip():
            found[f"{path} wants a docstring"] = None
        if each.kind == "class":
            found |= dict.fromkeys(_undocumented_members(each.value))
    return list(found)


def data_doc(public: Public) -> str:
    """What stands in the comment ``#:`` above a constant."""
    docs = ModuleAnalyzer.for_module(public.module).find_attr_docs()
    return "\n".join(docs.get(("", public.name), [])).strip()


def _undocumented_members(cls: type) -> Iterator[str]:
    """Methods and properties want a docstring, their own or that of what they override; fields stand in the class's."""
    for owner in cls.__mro__:
        if not owner.__module__.startswith(OURS):
            continue
        path, fields = f"{owner.__module__}.{owner.__qualname__}", vars(owner).get("__annotations__", {})
        for name, member in vars(owner).items():
            is_method = isinstance(member, METHODS) and name not in fields  # a field's default may be a function
            if is_method and not name.startswith("_") and not _doc_of(cls, name):
                yield f"{path}.{name} wants a docstring"
        for name in fields:
            if not name.startswith("_") and not _says(cls, name):
                yield f"{path}.{name} wants a comment #: above it, or its name in the docstring of its class"


def _doc_of(cls: type, name: str) -> str:
    return next((doc for owner in cls.__mro__ if (doc := getattr(vars(owner).get(name), "__doc__", None))), "")


def _says(cls: type, field: str) -> bool:
    """Whether a class, or one that it is made from, says what a field is."""
    for owner in cls.__mro__:
        if not owner.__module__.startswith(OURS):
            continue
        docs = ModuleAnalyzer.for_module(owner.__module__).find_attr_docs()
        if (owner.__qualname__, field) in docs:
            return True
        text = f"{owner.__doc__ or ''} {owner.__init__.__doc__ or ''}"
        if re.search(rf"``{field}\b|^\s*(\w+, )*{field}(, \w+)*:|\"{field}\"", text, flags=re.MULTILINE):
            return True
    return False


class PublicNames(SphinxDirective):
    """Describes the public names of a package: ``{public} probe.attention``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from docstrings import as_rst  # which links the names of here

        package = self.arguments[0]
        self.env.domaindata.setdefault("public_names", {}).setdefault("described", set()).add(package)
        about = inspect.getdoc(importlib.import_module(package)) or ""
        text, elsewhere = [*as_rst(about.splitlines()), ""], []
        for each in sorted(names_of(package), key=lambda each: (each.kind == "data", each.name.lower())):
            home = home_of(each.name, each.module)
            if each.kind == "module":
                text += [f".. automodule:: {package}.{each.name}", "   :no-index:", ""]
            elif home != package:
                elsewhere.append(f":py:obj:`{each.name} <{home}.{each.name}>`")
            elif each.kind == "data":
                text += _describe_data(package, each, as_rst(data_doc(each).splitlines()))
            else:
                members = ["   :members:"] if each.kind == "class" else []
                text += [f".. auto{each.kind}:: {package}.{each.name}", *members, ""]
        if elsewhere:
            text += [f"Also here: {', '.join(elsewhere)}.", ""]
        return self.parse_text_to_nodes("```{eval-rst}\n" + "\n".join(text) + "\n```")


def _describe_data(package: str, each: Public, doc: Sequence[str]) -> list[str]:
    text = [f".. py:data:: {package}.{each.name}", "", *(f"   {line}" for line in doc)]
    if isinstance(each.value, dict) and all(isinstance(key, str) for key in each.value):
        text += ["", "   " + ", ".join(f"``{key}``" for key in each.value)]
    return [*text, ""]


def _check_documented(app: Sphinx) -> None:
    for fault in undocumented(each for package in packages() for each in names_of(package)):
        LOGGER.warning("undocumented public name: %s", fault, type="public_names")


def _find_type(app: Sphinx, env, node: nodes.Element, content: nodes.Element) -> nodes.Element | None:
    """Where a type in a signature stands, which Sphinx knows by the module that it was made in. Types that are not
    public stand there without a link."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("reftype") not in ("class", "obj", "exc") or not module.startswith(OURS):
        return None
    path = public_paths().get(name)
    if path is not None and path != node["reftarget"]:
        args = (env, node["refdoc"], app.builder, node["reftype"], path, node, content)
        return env.domains.python_domain.resolve_xref(*args)
    return content if hasattr(sys.modules.get(module), name) else None


def _check_described(app: Sphinx, env) -> None:
    """Every package has its page, where this is the whole documentation and no part of it."""
    described = env.domaindata.get("public_names", {}).get("described", set())
    for package in packages() if described else ():
        if package not in described:
            LOGGER.warning("no page describes the public names of %s", package, type="public_names")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public", PublicNames)
    app.connect("builder-inited", _check_documented)
    app.connect("env-check-consistency", _check_described)
    app.connect("missing-reference", _find_type)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
