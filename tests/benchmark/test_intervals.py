import dataclasses

import pandas as pd
import pytest

from probe.benchmark import SIMULATIONS, interval_coverage
from probe.benchmark import intervals as module
from probe.cli import main
from probe.errors import ProbeError

CHEAP = ("losses", "readout", "probes", "law")


@pytest.fixture(scope="module")
def rows():
    """The short form of the benchmark: the simulations that take a second."""
    return interval_coverage(CHEAP, n_simulations=200)


def test_intervals_hold_the_truth_as_often_as_they_say(rows):
    """From 10 sequences and 3 trainings on, 0.95 lies in Wilson's interval of the coverage, or the interval is
    conservative."""
    assert set(rows["simulation"]) == set(CHEAP)
    enough = (rows["n_sequences"].isna() | (rows["n_sequences"] >= 10)) & (
        rows["n_trainings"].isna() | (rows["n_trainings"] >= 3)
    )
    held = rows[enough]
    # 99.9 % limits of 200 data sets at a coverage of .93: the worst that the table allows.
    assert (held["value"] >= 0.87).all(), held.to_string()
    assert (rows["n"] == 200).all() and (rows["width"] > 0).all()


def test_a_simulation_is_the_same_whatever_else_is_simulated(rows):
    again = interval_coverage(["law"], n_simulations=200, jobs=2)
    pd.testing.assert_frame_equal(again, rows[rows["simulation"] == "law"].reset_index(drop=True))
    other = interval_coverage(["law"], n_simulations=200, seed=1)
    assert not other["width"].equals(again["width"])


def test_an_interval_that_never_holds_the_truth_is_found_out(monkeypatch):
    off = dataclasses.replace(SIMULATIONS["law"], draw=lambda rng, size: {"x": (1.0, 2.0, 3.0)})
    missing = dataclasses.replace(off, draw=lambda rng, size: {"x": (float("nan"), float("nan"), 3.0)})
    monkeypatch.setitem(module.SIMULATIONS, "off", off)
    monkeypatch.setitem(module.SIMULATIONS, "missing", missing)
    assert (interval_coverage(["off", "missing"], n_simulations=5)["value"] == 0).all()


def test_bad_input_is_one_clear_line(capsys):
    with pytest.raises(ProbeError, match="unknown simulation 'lows'; known: .*did you mean 'law'|unknown simulation"):
        interval_coverage(["lows"])
    with pytest.raises(ProbeError, match="n_simulations must be"):
        interval_coverage(["law"], n_simulations=0)
    assert main(["benchmark", "intervals", "--only", "nothing"]) == 2
    assert "unknown simulation 'nothing'" in capsys.readouterr().err


def test_the_command_writes_rows(tmp_path, capsys):
    out = tmp_path / "rows.parquet"
    assert main(["benchmark", "intervals", "--only", "law", "--simulations", "50", "--out", str(out)]) == 0
    found = pd.read_parquet(out)
    assert len(found) == len(SIMULATIONS["law"].sizes) and "torch" in found.attrs
    assert "slope" in capsys.readouterr().out
