"""Nothing runs here: the linter, the formatter and the type checker read the code."""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import probe

ROOT = Path(__file__).resolve().parent.parent


def clean(*command: str) -> None:
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    clean("ruff", *command, "--no-cache", ".")


@pytest.mark.slow
def test_mypy_has_nothing_to_say(tmp_path):
    """Strictly, of both packages: half a minute on one core."""
    clean("mypy", "--cache-dir", str(tmp_path))


def test_type_checkers_see_the_names_that_probe_hands_on():
    """They read imports and run nothing, so the lazy names stand in ``probe/__init__.py`` a second time, and so do the
    packages."""
    (block,) = [node for node in ast.parse(Path(probe.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name: part.module for part in block.body for alias in part.names}
    packages = {found.name: "probe" for found in pkgutil.iter_modules(probe.__path__) if found.ispkg}
    assert seen == probe._HOMES | packages


@pytest.mark.parametrize("package", ["probe", "constructions"])
def test_packages_say_that_they_are_typed(package):
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    assert (Path(folder) / "py.typed").is_file()
