"""What is planned and run: what cannot be measured is told, what fails leaves the others alone."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from probe.cli import main
from probe.errors import ProbeError
from probe.measure import MEASUREMENTS, Case, TracedSequences, measure_models, measurements
from probe.measure.run import Plan
from probe.models.checkpoint import save


def broken(case, **options):
    raise ZeroDivisionError("no such luck")


@pytest.fixture
def folder(make_decoder, tmp_path, monkeypatch):
    """Two models and token ids, in the working directory."""
    for name, encoding in (("a", "none"), ("b", "t5")):
        save(make_decoder(encoding=encoding), tmp_path / name)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 19, (12, 10)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measure(*words):
    return main(["measure", *words, "--tokens", "ids.npy", "--folder", "out", "--device", "cpu"])


def test_a_failure_is_one_row_and_one_line_and_is_tried_again(folder, monkeypatch, capsys):
    whole = MEASUREMENTS["geometry"]
    monkeypatch.setitem(MEASUREMENTS, "geometry", dataclasses.replace(whole, measure=broken))
    assert measure("a", "b", "--only", "geometry,entropy") == 1
    told = capsys.readouterr().err.splitlines()
    assert "probe: geometry of a failed: ZeroDivisionError: no such luck" in told
    rows = pd.read_parquet("out/rows.parquet")
    failed = rows[rows["metric"] == "failed"]
    assert failed[["measurement", "model"]].to_numpy().tolist() == [["geometry", "a"], ["geometry", "b"]]
    assert set(failed["reason"]) == {"ZeroDivisionError: no such luck"}
    assert set(rows[rows["metric"] != "failed"]["measurement"]) == {"entropy"}
    page = (folder / "out" / "report.html").read_text()
    assert "geometry of a: ZeroDivisionError: no such luck" in page and "Not measured" in page
    # Mended, it is measured by the same command, and what was finished is not done again.
    monkeypatch.setitem(MEASUREMENTS, "geometry", whole)
    before = (folder / "out" / "rows" / "entropy-a.parquet").stat().st_mtime_ns
    assert measure("a", "b", "--only", "geometry,entropy") == 0
    assert (folder / "out" / "rows" / "entropy-a.parquet").stat().st_mtime_ns == before
    assert set(pd.read_parquet("out/rows.parquet")["measurement"]) == {"geometry", "entropy"}


def test_where_all_fail_there_is_one_line_and_no_folder(folder, monkeypatch, capsys):
    monkeypatch.setitem(MEASUREMENTS, "geometry", dataclasses.replace(MEASUREMENTS["geometry"], measure=broken))
    assert measure("a", "--only", "geometry") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "probe: ZeroDivisionError: no such luck"
    assert not (folder / "out").exists()


def test_what_a_model_cannot_give_is_skipped_with_the_reason(folder):
    assert measure("a", "--only", "entropy,table,perplexity,model_distance") == 0
    rows = pd.read_parquet("out/rows.parquet")
    reasons = rows[rows["metric"] == "skipped"].set_index("measurement")["reason"]
    assert reasons.to_dict() == {
        "table": "it needs a table of positions",
        "perplexity": "it needs texts in the model's tokens",
        "model_distance": "it needs at least 2 models, got 1",
    }
    assert "it needs a table of positions" in (folder / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--only", "entropi"], "did you mean 'entropy'?"),
        (["a", "a"], "two models are called 'a'"),
        (["a", "--only", "table"], "nothing can be measured of these models (table: it needs a table of positions)"),
        ([], "probe measure needs at least one model"),
    ],
)
def test_bad_input_is_one_line(folder, words, message, capsys):
    assert measure(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "out").exists()


def test_the_list_has_every_measurement(capsys):
    assert main(["measure", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: {each.what}." in printed for name, each in MEASUREMENTS.items())
    assert measurements()["name"].tolist() == [*MEASUREMENTS]


def test_two_models_of_one_name_are_refused(make_decoder, random_tokens, tmp_path):
    cases = [Case("a", [make_decoder()], TracedSequences(random_tokens())) for _ in range(2)]
    with pytest.raises(ProbeError, match="each its own, got \\['a', 'a'\\]"):
        measure_models(cases, tmp_path / "out")
    with pytest.raises(ProbeError, match="at least one"):
        Plan.make([])
