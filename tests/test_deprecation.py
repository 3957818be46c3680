"""Every old public name still works, warns with the new name, and stands in the table of CHANGELOG.md."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pandas as pd
import pytest

import constructions
import probe
from probe.deprecation import old_arguments, old_names

PACKAGES = [
    importlib.import_module(name)
    for root in (probe, constructions)
    for name in (root.__name__, *(m.name for m in pkgutil.walk_packages(root.__path__, f"{root.__name__}.") if m.ispkg))
]


def public():
    """Every public function and class by its path, each once."""
    found = {}
    for package in PACKAGES:
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found[id(value)] = (f"{package.__name__}.{name}", value)  # the deepest package that has it
    return dict(found.values())


def renamed(value):
    return getattr(value, "renamed", {}).items()


PUBLIC = public()
NAMES = [(p, old, new) for p in PACKAGES for old, new in renamed(vars(p).get("__getattr__"))]
ARGUMENTS = [(path, old, new) for path, value in PUBLIC.items() for old, new in renamed(value)]
FIELDS = [
    (path, old, new)
    for path, value in PUBLIC.items()
    if inspect.isclass(value)
    for member in vars(value).values()
    if isinstance(member, property)
    for old, new in renamed(member.fget)
]


@pytest.mark.parametrize(("package", "old", "new"), NAMES, ids=lambda value: getattr(value, "__name__", value))
def test_an_old_name_is_the_new_object(package, old, new):
    with pytest.warns(DeprecationWarning, match=rf"\.{old} is now .*\.{new};"):
        assert getattr(package, old) is getattr(package, new)
    assert old not in package.__all__ and new in package.__all__


@pytest.mark.parametrize(("path", "old", "new"), FIELDS)
def test_an_old_field_reads_the_new_one(path, old, new):
    result = object.__new__(PUBLIC[path])
    object.__setattr__(result, new, value := object())
    with pytest.warns(DeprecationWarning, match=rf"\.{old} is now .*\.{new};"):
        assert getattr(result, old) is value


@pytest.mark.parametrize("path", sorted({path for path, *_ in ARGUMENTS}))
def test_an_old_argument_is_the_new_one(path):
    """Called with nothing else, the function refuses the value, or lacks another argument than the given ones."""
    function = PUBLIC[path]
    with pytest.warns(DeprecationWarning) as warned, pytest.raises(TypeError, match="missing|violates") as raised:
        function(**dict.fromkeys(function.renamed))
    for old, new in function.renamed.items():
        assert any(f"argument {old!r} of {function.__name__} is now {new!r};" in str(w.message) for w in warned)
        assert repr(new) not in str(raised.value)


@old_arguments(model="config", config="training")
def give(config, data, training, *, device=None):
    """The arguments, as the function got them."""
    return config, data, training, device


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((), {"model": 1, "data": 2, "config": 3}),
        ((), {"config": 3, "data": 2, "model": 1}),
        ((), {"model": 1, "data": 2, "training": 3}),
        ((1, 2), {"config": 3}),
        ((1,), {"config": 3, "data": 2}),
    ],
)
def test_old_keywords_reach_their_arguments(positional, named):
    with pytest.warns(DeprecationWarning, match="the argument '(model|config)' of give is now '(config|training)'"):
        assert give(*positional, **named, device=4) == (1, 2, 3, 4)


def test_new_keywords_do_not_warn():
    assert give(1, 2, 3) == give(1, 2, training=3) == give(training=3, config=1, data=2) == (1, 2, 3, None)
    assert [*inspect.signature(give).parameters] == ["config", "data", "training", "device"]


@pytest.mark.filterwarnings("ignore:the argument")
@pytest.mark.parametrize(
    ("positional", "named"),
    [((), {"model": 1, "config": 1, "training": 3, "data": 2}), ((1, 2, 3), {"model": 1}), ((1, 2, 3), {"config": 3})],
)
def test_two_values_of_one_argument_are_refused(positional, named):
    with pytest.raises(TypeError, match=r"give\(\) got (two|multiple) values for"):
        give(*positional, **named)


def test_results_with_tables_keep_the_main_one_in_rows():
    tables = {
        path: [field.name for field in dataclasses.fields(value) if field.type is pd.DataFrame]
        for path, value in PUBLIC.items()
        if dataclasses.is_dataclass(value)
    }
    assert sum(map(bool, tables.values())) >= 5
    assert [path for path, names in tables.items() if names and "rows" not in names] == []


def test_the_changelog_lists_every_old_name():
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", text, flags=re.MULTILINE)
    names = [(f"{package.__name__}.{old}", new) for package, old, new in NAMES]
    arguments = [(f"{path}({old}=)", f"{new}=") for path, old, new in ARGUMENTS]
    fields = [(f"{path}.{old}", new) for path, old, new in FIELDS]
    assert sorted(listed) == sorted([*names, *arguments, *fields])


def test_an_unknown_name_is_no_old_name():
    with pytest.raises(AttributeError, match="module 'probe.report' has no attribute 'plot_nothing'"):
        probe.report.plot_nothing  # noqa: B018
    getattr_of = old_names("probe", {"lade": "load"})
    with pytest.warns(DeprecationWarning, match="probe.lade is now probe.load"):
        assert getattr_of("lade") is probe.load


def test_figures_and_nothing_else_begin_with_plot():
    import plotly.graph_objects as go

    import probe.report

    for name in probe.report.__all__:
        value = getattr(probe.report, name)
        figure = inspect.isroutine(value) and inspect.signature(value).return_annotation is go.Figure
        assert figure == name.startswith("plot_"), name
