"""Mutation testing: change the code in one place, run the tests that pass there, see whether one fails. As a script:

    python tests/support/mutants.py [distances templates encodings constructions] [--sample 30] [--jobs 2]

What cannot matter is left alone: annotations, docstrings, what errors say and what is printed, assertions (``strict``
of zip, too). Mutants that were shown to be the same program stand in ``equivalent_mutants.txt``, each with its reason;
they are counted apart. Tests marked slow are not run.

mutmut will not do here: pytest runs anew in one process for each of its mutants, which jaxtyping's plugin refuses, and
it leaves alone all that stands outside functions, where this house keeps its registries and constants. Each mutant has
a fork of a process that has already imported all that is not ours.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
#: What is mutated, and the tests that have to see it.
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "distances": (["probe/attention/distances.py"], ["tests/attention/test_distances.py"]),
    "templates": (
        ["probe/attention/templates.py"],
        ["tests/attention/test_templates.py", "tests/attention/test_families.py"],
    ),
    "encodings": (
        ["probe/models/encodings/*.py"],
        ["tests/models/test_*encodings.py", "tests/models/test_randomized.py", "tests/models/test_decoder.py"],
    ),
    "constructions": (["constructions/*.py"], ["tests/constructions/test_*.py"]),
}
PYTEST = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_PAIRS = [
    ("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"), ("floor", "ceil"),
    ("sin", "cos"), ("tril", "triu"), ("zeros", "ones"), ("zeros_like", "ones_like"),
]  # fmt: skip
NAMES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
# What is called for its message, or to make a type: nothing in it is mutated, but that it is called at all.
MESSAGES = {"check_number", "check_size", "check_one_of", "unknown_name", "ProbeError", "TypeVar"}
TYPES = {"Float", "Float64", "Int", "Bool", "Literal", "Callable", "Mapping", "Sequence", "dict", "list", "tuple"}
KEY = re.compile(r"[\w.-]+")
PLAIN = (ast.Name, ast.Attribute, ast.Call)  # conditions that are negated as a whole


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    end_line: int
    place: str  # the function or class that it is in
    before: str  # a line of code
    after: str
    source: bytes  # of the whole file
    whole: bool  # whether it acts when the module is imported

    def __str__(self) -> str:
        return f"{self.path} {self.place}: {self.before} → {self.after}"


def mutants(path: str) -> list[Mutant]:
    """Every mutant of a file, in order."""
    raw, found, seen = (ROOT / path).read_bytes(), [], set()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, new, place, lines, whole in changes(ast.parse(raw), "module", (0, 0), True):
        begin, end = (starts[row - 1] + column for row, column in _span(node))
        text = new if isinstance(new, str) else ast.unparse(new)
        text = f"({text})" if isinstance(node, ast.expr) else text
        changed = raw[:begin] + text.encode() + raw[end:]
        first, last = starts[node.lineno - 1], starts[node.end_lineno]
        before, after = (
            " ".join(part.decode().split())
            for part in (raw[first:last], changed[first : last + len(changed) - len(raw)])
        )
        with contextlib.suppress(SyntaxError):
            compile(changed, path, "exec")
            if changed not in seen:
                found.append(Mutant(path, *lines, place, before, after, changed, whole))
            seen.add(changed)
    return found


def _span(node: ast.expr | ast.stmt) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def changes(node: ast.AST, place: str, lines: tuple[int, int], whole: bool) -> Iterator[tuple]:
    """(node, what stands in its place, where that is, the lines to be covered, whether it runs at import)."""
    if isinstance(node, ast.stmt):
        body = getattr(node, "body", None)
        lines = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno)
    for old, new in replacements(node):
        yield old, new, place, lines, whole
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        place = node.name if place == "module" else f"{place}.{node.name}"
    if isinstance(node, ast.FunctionDef):
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            yield from changes(default, place, (node.body[0].lineno, node.end_lineno), False)
        whole = False
    if isinstance(node, ast.Lambda):
        whole = False
    for child in _children(node):
        yield from changes(child, place, lines, whole)


def _children(node: ast.AST) -> list[ast.AST]:
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return node.body
        case ast.AnnAssign():
            return [node.value] if node.value else []
        case ast.Assign(targets=[ast.Name("__all__" | "claim" | "source")]):
            return []
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.arguments():
            return []
        case (
            ast.Expr(value=ast.Constant()) | ast.If(test=ast.Compare(left=ast.Name("__name__")))
        ):  # a docstring; a script
            return []
        case ast.Call(func=ast.Name(name)) if name in {*MESSAGES, "isinstance", "print"}:
            return []
        case ast.keyword(arg="strict"):  # of zip: an assertion
            return []
        case ast.Subscript(value=ast.Name(name)) if name in TYPES:
            return []
    return list(ast.iter_child_nodes(node))


def replacements(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    """What is mutated, and what stands in its place: one mutant each."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                yield (
                    node,
                    ast.Compare(
                        node.left, [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]], node.comparators
                    ),
                )
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield node, ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        case ast.AugAssign() if type(node.op) in OPERATORS:
            other = ast.BinOp(node.target, OPERATORS[type(node.op)](), node.value)
            for value in (other, node.value):
                yield node, f"{ast.unparse(node.target)} = {ast.unparse(value)}"
        case ast.UnaryOp():
            yield node, node.operand
        case ast.BoolOp():
            yield node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=str(value)) if KEY.fullmatch(value):
            yield node, ast.Constant(value + "_")
        case ast.Attribute(attr=name) if name in NAMES:
            yield node, ast.Attribute(node.value, NAMES[name])
        case ast.Call(func=ast.Name(name)) if name in NAMES:
            yield node, ast.Call(ast.Name(NAMES[name]), node.args, node.keywords)
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield node, "return None"
        case ast.Raise() | ast.Delete() | ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield node, "pass"
        case ast.Continue():
            yield node, "break"
        case ast.Break():
            yield node, "continue"
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if isinstance(test, PLAIN):
            yield test, ast.UnaryOp(ast.Not(), test)
        case ast.comprehension():
            yield from ((test, ast.UnaryOp(ast.Not(), test)) for test in node.ifs if isinstance(test, PLAIN))


class Tests:
    """The tests that a group is for: how long each takes, and which lines of which file it runs. A pytest plugin."""

    def __init__(self, files: list[str]) -> None:
        self.files = {str(ROOT / file): file for file in files}
        self.now: dict[str, set[int]] = defaultdict(set)
        self.lines: dict[str, dict[str, set[int]]] = {}
        self.shared: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.seconds: dict[str, float] = {}

    def _call(self, frame, event, arg):
        file = self.files.get(frame.f_code.co_filename)
        if file is None:
            return None
        add = self.now[file].add

        def line(frame, event, arg):
            add(frame.f_lineno)
            return line

        return line(frame, event, arg)

    def begin(self) -> None:
        """Before pytest: a conftest.py is imported before anything is collected."""
        sys.settrace(self._call)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self):
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.imported, self.now = self.now, defaultdict(set)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.now, began = defaultdict(set), time.process_time()
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.lines[item.nodeid], self.seconds[item.nodeid] = self.now, time.process_time() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        """What fixtures of a file run belongs to all of its tests."""
        before, self.now = self.now, defaultdict(set)
        try:
            return (yield)
        finally:
            for file, lines in self.now.items():
                before[file] |= lines
                if fixturedef.scope != "function":
                    self.shared[request.path.name][file] |= lines
            self.now = before

    def found(self) -> dict:
        lines = {
            test: {
                file: sorted(ran[file] | self.shared[Path(test.split("::")[0]).name][file])
                for file in self.files.values()
            }
            for test, ran in self.lines.items()
        }
        imported = {file: sorted(self.imported[file]) for file in self.files.values()}
        return {"lines": lines, "imported": imported, "seconds": self.seconds}


class Chosen:
    """Runs these tests in this order, and ends the process with what came of them. A pytest plugin."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )

    def pytest_runtest_logreport(self, report):
        if report.failed:
            os._exit(1)

    def pytest_sessionfinish(self, exitstatus):
        # Nothing is tidied up: that takes half a second. Where no test is left none has failed.
        os._exit(0 if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED else int(exitstatus))


def in_a_fork(act: Callable[[], int]) -> int:
    """The id of a process that does this and ends; what it says is not heard."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        sys.dont_write_bytecode = True
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        os._exit(act())
    except BaseException:
        os._exit(9)


def arguments(tests: list[str]) -> list[str]:
    return [*PYTEST, *dict.fromkeys(test.split("::")[0] for test in tests)]


def examine(files: list[str], test_files: list[str]) -> dict:
    """Which test runs which lines; third-party modules that they import are imported here, for the forks to come."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")

        def act() -> int:
            plugin = Tests(files)
            plugin.begin()
            code = int(pytest.main([*PYTEST, *test_files], plugins=[plugin]))
            told.write_text(json.dumps(plugin.found() | {"modules": list(sys.modules)}))
            return code

        _, status = os.waitpid(in_a_fork(act), 0)
        if status:
            raise SystemExit(f"the tests must pass before anything is mutated: {' '.join(test_files)}")
        found = json.loads(told.read_text())
    for name in found["modules"]:
        if not re.match(r"(probe|constructions|tests|test_\w+|conftest|__main__|__mp_main__)(\.|$)", name):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return found


def tests_of(mutant: Mutant, found: dict, budget: float) -> list[str]:
    """Those that run the mutated lines, the quickest first, as many as take no longer than the budget in all. What acts
    at import may be seen by any test; those of the file's own stand before all others then."""
    wanted, seconds = set(range(mutant.line, mutant.end_line + 1)), found["seconds"]
    ran = {test for test, lines in found["lines"].items() if wanted & set(lines[mutant.path])}
    at_import = mutant.whole or bool(wanted & set(found["imported"][mutant.path]))
    own = f"test_{Path(mutant.path).stem}.py"
    chosen = sorted(seconds if at_import else ran, key=lambda test: (at_import and own not in test, seconds[test]))
    total, kept = 0.0, []
    for test in chosen:
        total += seconds[test]
        if total > budget and kept:
            break
        kept.append(test)
    return kept


def run(mutant: Mutant, tests: list[str]) -> int:
    """The id of the process that runs the tests on the mutant: it ends with 0 if it survives."""

    def act() -> int:
        path, get_data, path_stats = str(ROOT / mutant.path), SourceFileLoader.get_data, SourceFileLoader.path_stats

        def stats(loader, asked):
            if asked == path:
                raise OSError("no bytecode, please")
            return path_stats(loader, asked)

        SourceFileLoader.get_data = lambda loader, asked: mutant.source if asked == path else get_data(loader, asked)
        SourceFileLoader.path_stats = stats
        return int(pytest.main(arguments(tests), plugins=[Chosen(tests)]))

    return in_a_fork(act)


def judge(all_mutants: list[Mutant], found: dict, jobs: int, budget: float) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether it was killed (one that never ends was); as they end."""
    waiting, running = list(reversed(all_mutants)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            tests = tests_of(mutant, found, budget)
            if not tests:
                yield mutant, False
                continue
            limit = 20 + 5 * sum(found["seconds"][test] for test in tests)
            running[run(mutant, tests)] = (mutant, time.monotonic() + limit)
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            yield running.pop(child)[0], status != 0
        for late in [child for child, (_, end) in running.items() if time.monotonic() > end]:
            os.killpg(late, signal.SIGKILL)
        time.sleep(0.01)


def equivalent() -> set[str]:
    """Those in the list, each a line, its reason on the lines after it."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    return {line for line in lines if line and not line.startswith((" ", "#"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="group", help=", ".join(GROUPS))
    parser.add_argument("--sample", type=int, help="as many mutants of a file, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=30, help="seconds of tests for a mutant; default: 30")
    parser.add_argument("--only", default="", help="mutants whose line in the report matches this pattern")
    options = parser.parse_args()
    os.chdir(ROOT)
    known = equivalent()
    for group in options.groups:
        patterns, test_patterns = GROUPS[group]
        files, test_files = (
            [str(path.relative_to(ROOT)) for pattern in each for path in sorted(ROOT.glob(pattern))]
            for each in (patterns, test_patterns)
        )
        chosen = []
        for file in files:
            these = mutants(file)
            if options.sample and len(these) > options.sample:
                these = random.Random(f"{options.seed} {file}").sample(these, options.sample)
            chosen += [mutant for mutant in these if re.search(options.only, str(mutant))]
        found, began, count = examine(files, test_files), time.monotonic(), Counter()
        unchanged = Mutant(files[0], 0, 0, "", "", "", (ROOT / files[0]).read_bytes(), True)
        if any(killed for _, killed in judge([unchanged], found, 1, options.budget)):
            raise SystemExit("tests fail in a fork without any change")
        for mutant, killed in judge([m for m in chosen if str(m) not in known], found, options.jobs, options.budget):
            count[killed] += 1
            if not killed:
                print(f"survived  {mutant.path}:{mutant.line}  {mutant}", flush=True)
        same = len(chosen) - count.total()
        print(
            f"{group}: {len(chosen)} mutants, {count[True]} killed, {same} equivalent, {count[False]} survived: "
            f"{count[True] / max(1, count.total()):.1%} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
