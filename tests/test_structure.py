"""Imports run downward, in no circle, and files stay short: the imports of every file are read, and nothing is run."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import probe

ROOT = Path(probe.__file__).parent.parent
PACKAGES = ("probe", "constructions")

#: What may import what, from the bottom to the top: a part of the house imports only what stands before its line.
ORDER = (
    ("deprecation", "errors", "options", "processes", "progress", "shown"),
    ("config",),
    ("limits",),
    ("files", "losses", "rows", "sequences"),
    ("device", "digests", "folders", "staged", "statistics"),
    ("runs",),
    ("league", "provenance"),
    ("tasks",),
    ("models",),
    ("tracing",),
    ("training",),
    ("attention", "position", "extrapolation", "report"),
    ("constructions",),
    ("benchmark", "measure"),
    ("study",),
    ("sweep",),
    ("cli",),
    ("probe", "__main__"),
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}

MOST_LINES = 400
#: Files that hold definitions, and a function that looks them up.
DATA = {"probe/report/glossary.py"}


class Import(NamedTuple):
    target: str  # a module
    at_top: bool  # outside of functions: it happens when the file is imported


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The files of the packages, by the names of their modules."""
    found = {}
    for path in (path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: Mapping[str, Path]) -> dict[str, set[Import]]:
    """By module, what of these packages it imports. A function's imports are among them, and a type checker's."""
    return {name: set(_imports(ast.parse(path.read_text("utf-8")), files, True)) for name, path in files.items()}


def _imports(node: ast.AST, files: Mapping[str, Path], at_top: bool) -> Iterable[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"an absolute import is needed, got {ast.unparse(child)!r}"
            whole = [f"{child.module}.{alias.name}" for alias in child.names]
            names = [name if name in files else str(child.module) for name in whole]
        else:
            names = [alias.name for alias in child.names] if isinstance(child, ast.Import) else []
        yield from (Import(name, at_top) for name in names if name.split(".")[0] in PACKAGES)
        yield from _imports(child, files, at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: a package of ``probe``, a module beside them, or ``probe``'s own
    list of names; ``constructions`` as a whole."""
    first, *rest = module.split(".")
    return rest[0] if first == "probe" and rest else first


def upward(graph: Mapping[str, set[Import]]) -> list[str]:
    """The imports of what stands on the same line of ``ORDER`` or a later one."""
    return sorted(
        f"{module} imports {target}"
        for module, found in graph.items()
        for target, _ in found
        if (ours := part_of(module)) != (theirs := part_of(target)) and LEVEL[ours] <= LEVEL[theirs]
    )


def circle(graph: Mapping[str, set[Import]]) -> list[str]:
    """Modules that import each other in a circle, the first one a second time at the end; none where there is none."""
    tops = {module: {target for target, at_top in found if at_top} - {module} for module, found in graph.items()}
    try:
        graphlib.TopologicalSorter(tops).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def too_long(files: Mapping[str, Path], root: Path = ROOT) -> list[str]:
    lengths = {str(path.relative_to(root)): len(path.read_text("utf-8").splitlines()) for path in files.values()}
    return [f"{name} has {n} lines" for name, n in lengths.items() if n > MOST_LINES and name not in DATA]


def shadowing(files: Mapping[str, Path]) -> list[str]:
    """Modules whose name is that of something else in their package: after an import of both, one of them is gone."""
    found = []
    for package in (name for name, path in files.items() if path.name == "__init__.py"):
        for node in ast.parse(files[package].read_text("utf-8")).body:
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [a.asname or a.name for a in node.names if f"{node.module}.{a.name}" not in files]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [f"{package}.{name}" for name in names if f"{package}.{name}" in files]
    return found


FILES = modules()
GRAPH = imports(FILES)


def test_every_part_of_the_house_has_its_place():
    assert {part_of(name) for name in FILES} == set(LEVEL)


def test_what_is_imported_stands_in_the_house():
    assert {target for found in GRAPH.values() for target, _ in found} <= set(FILES)


def test_imports_run_downward():
    assert upward(GRAPH) == []


def test_modules_import_each_other_in_no_circle():
    assert circle(GRAPH) == []


def test_the_report_knows_rows_only():
    """It imports none of what makes them."""
    reached = {target for name, found in GRAPH.items() if part_of(name) == "report" for target, _ in found}
    assert reached and not {
        part for part in map(part_of, reached) if part != "report" and LEVEL[part] >= LEVEL["tasks"]
    }


def test_files_are_short():
    assert too_long(FILES) == []
    assert all((ROOT / name).is_file() for name in DATA)


def test_data_files_hold_little_but_definitions():
    for name in DATA:
        nodes = ast.parse((ROOT / name).read_text("utf-8")).body
        code = [node for node in nodes if not isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr)]
        assert sum(node.end_lineno - node.lineno + 1 for node in code) <= 30


def test_no_module_has_the_name_of_something_else_in_its_package():
    assert shadowing(FILES) == []
    assert not {f"probe.{name}" for name in probe._HOMES} & set(FILES)


@pytest.mark.parametrize("name", sorted(set(LEVEL) - {"constructions", "probe", "__main__"}))
def test_a_module_can_be_reached_after_import_probe(name):
    assert probe.__getattr__(name).__name__ == f"probe.{name}" and name in dir(probe)


def test_import_probe_imports_none_of_its_modules():
    code = """
import sys, probe
assert not [name for name in sys.modules if name.startswith("probe.")] and "torch" not in sys.modules
print(probe.tasks.TASKS is probe.TASKS, probe.errors.ProbeError is probe.ProbeError, "torch" in sys.modules)
probe.nowhere
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True False\n", done.stderr
    assert done.stderr.endswith("AttributeError: module 'probe' has no attribute 'nowhere'\n")


# What the tests above would find, in a house of a few files.


@pytest.fixture
def house(tmp_path):
    def build(**files: str) -> dict[str, Path]:
        """A house of these files: ``models__a`` is the text of ``probe.models.a``."""
        for name, text in files.items():
            path = tmp_path / Path("probe", *name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            for folder in path.relative_to(tmp_path).parents[:-1]:
                (tmp_path / folder / "__init__.py").touch()
        return modules(tmp_path)

    return build


@pytest.mark.parametrize(
    "text",
    ["from probe.study import x", "import probe.study.x", "def f():\n    from probe import study", "import probe"],
)
def test_an_import_upward_is_found(house, text):
    found = upward(imports(house(models__a=text, study__x="")))
    assert len(found) == 1 and found[0].startswith("probe.models.a imports probe")


def test_an_import_downward_is_none(house):
    files = house(
        study__x="from probe.models.a import x\ndef f():\n    import probe.tasks.x", models__a="", tasks__x=""
    )
    assert upward(imports(files)) == []


def test_packages_of_one_line_do_not_know_each_other(house):
    files = house(attention__a="from probe.position.b import x", position__b="", position__c="import probe.position.b")
    assert upward(imports(files)) == ["probe.attention.a imports probe.position.b"]


def test_a_circle_is_found(house):
    files = house(models__a="from probe.models import b", models__b="if True:\n    import probe.models.c", models__c="")
    assert circle(imports(files)) == []
    files["probe.models.c"].write_text("from probe.models.a import x")
    assert set(circle(imports(files))) == {"probe.models.a", "probe.models.b", "probe.models.c"}
    files["probe.models.c"].write_text("def f():\n    from probe.models.a import x")  # when all are imported
    assert circle(imports(files)) == []


def test_a_long_file_and_a_shadowed_module_are_found(house, tmp_path):
    files = house(models__long="x = 1\n" * 401, models__short="x = 1\n" * 400, models__f="def f(): ...", models__g="")
    assert too_long(files, tmp_path) == ["probe/models/long.py has 401 lines"]
    init = files["probe.models"]
    for text, found in (
        ("from probe.models.f import f", ["probe.models.f"]),
        ("def g(): ...", ["probe.models.g"]),
        ("g: dict = {}", ["probe.models.g"]),
        ("from probe.models import f, g", []),
        ("from probe.models.f import f as another", []),
    ):
        init.write_text(text)
        assert shadowing(files) == found
