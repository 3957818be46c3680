"""Which changes are made of a file."""

from mutants import GROUPS, ROOT, mutants

FILE = '''"""What is said of it is left alone, and so are types, assertions and what errors say."""

from torch import Tensor

SIZES: dict[str, int] = {"a": 1}


def f(x: "Tensor", n: int = 2, flag: bool = False) -> float | None:
    """No number 3."""
    assert n > 0
    if not flag and n >= 1:
        raise ValueError(f"n is {n}, not 7")
    x[0] -= -n
    return [max(y, 0.5) for y in x if y.ok]
'''

CHANGES = {
    'SIZES: dict[str, int] = {"a": 1}': ["{('a_'): 1}", '{"a": (2)}'],
    'def f(x: "Tensor", n: int = 2, flag: bool = False) -> float | None:': ["n: int = (3)", "flag: bool = (True)"],
    "if not flag and n >= 1:": ["if (not flag or n >= 1):", "if (flag) and", "(n > 1):", "n >= (2):"],
    'raise ValueError(f"n is {n}, not 7")': ["pass"],
    "x[0] -= -n": ["x[0] = x[0] + -n", "x[0] = -n", "x[(1)]", "-= (n)"],
    "return [max(y, 0.5) for y in x if y.ok]": ["return None", "(min(y, 0.5))", "max(y, (1.5))", "if (not y.ok)]"],
}


def test_every_place_is_changed_that_can_matter(tmp_path, monkeypatch):
    monkeypatch.setattr("mutants.ROOT", tmp_path)
    (tmp_path / "file.py").write_text(FILE)
    found = mutants("file.py")
    for before, changes in CHANGES.items():
        after = [mutant.after for mutant in found if mutant.before == before]
        assert len(after) == len(changes)
        assert all(any(change in line for line in after) for change in changes), (after, changes)
    assert len(found) == sum(map(len, CHANGES.values()))
    for mutant in found:
        lines = zip(FILE.splitlines(), mutant.source.decode().splitlines(), strict=True)
        assert [before.strip() for before, after in lines if before != after] == [mutant.before]
        assert mutant.whole == mutant.before.startswith("SIZES")
        assert mutant.place == ("module" if mutant.whole else "f")


def test_there_is_something_to_mutate_and_to_run_in_every_group():
    for patterns in GROUPS.values():
        assert all(list(ROOT.glob(pattern)) for each in patterns for pattern in each)
