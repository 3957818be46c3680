"""What is planned and run: what cannot be measured is told, what fails leaves the others alone."""

import dataclasses
import html
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from probe.cli import main
from probe.errors import ProbeError
from probe.measure import MEASUREMENTS, Case, Measurement, Texts, TracedSequences, measure_models, measurements
from probe.measure.run import Plan
from probe.models.checkpoint import save
from probe.report.sections import table_part
from probe.tasks import make_task


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


def test_what_is_skipped_is_on_the_page_of_a_run_that_asks_for_nothing(folder, monkeypatch):
    for name in {*MEASUREMENTS} - {"accuracy", "entropy", "model_distance", "perplexity"}:
        monkeypatch.setitem(MEASUREMENTS, name, dataclasses.replace(MEASUREMENTS[name], asked=True))
    assert measure("a") == 0
    skipped = pd.read_parquet("out/rows.parquet").query("metric == 'skipped'").set_index("measurement")["reason"]
    assert skipped["accuracy"] == "it needs labelled examples of a task"
    assert skipped["model_distance"] == "it needs at least 2 models, got 1"
    assert len(skipped) == 2  # perplexity is measured only where it is asked for
    page = (folder / "out" / "report.html").read_text()
    assert page.count("Not measured</h2>") == 1 and "it needs labelled examples of a task" in page


def made_again(folder):
    """The command on the page, as words."""
    page = html.unescape((folder / "out" / "report.html").read_text())
    return shlex.split(re.search(r"probe measure [^<\n]*", page)[0])


def test_the_page_names_the_command_that_makes_all_of_it_again(folder, capsys):
    assert measure("a", "--only", "split,table") == 0
    assert made_again(folder)[3:5] == ["--only", "split,table"]
    assert measure("a", "--onl=entropy") == 0
    rows = pd.read_parquet("out/rows.parquet")
    assert set(rows["measurement"]) == {"split", "entropy", "table"}
    assert rows[rows["metric"] == "skipped"][["measurement", "reason"]].to_numpy().tolist() == [
        ["table", "it needs a table of positions"]
    ]
    words = made_again(folder)
    assert words[-2:] == ["--only", "split,entropy,table"] and "--onl=entropy" not in words
    shutil.rmtree("out")
    assert main(words[1:]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet("out/rows.parquet"), rows)


def test_a_changed_stage_is_one_that_failed_and_the_others_stand(folder, capsys):
    assert measure("a", "b", "--only", "entropy,split") == 0
    stage = folder / "out" / "rows" / "entropy-a.parquet"
    stage.write_bytes(stage.read_bytes() + b"x")
    for only in ("entropy,split", "split"):  # asked for or not
        assert measure("a", "b", "--only", only) == 1
        rows = pd.read_parquet("out/rows.parquet")
        failed = rows[rows["metric"] == "failed"]
        assert failed[["measurement", "model"]].to_numpy().tolist() == [["entropy", "a"]]
        assert "must be as it was written" in failed["reason"].item()
        assert set(rows[rows["metric"] != "failed"]["measurement"]) == {"entropy", "split"}


def test_a_failure_of_an_earlier_run_is_told_until_it_is_mended(folder, monkeypatch):
    whole = MEASUREMENTS["geometry"]
    with monkeypatch.context() as patched:
        patched.setitem(MEASUREMENTS, "geometry", dataclasses.replace(whole, measure=broken))
        assert measure("a", "--only", "geometry,entropy") == 1
    assert measure("a", "--only", "entropy") == 1
    assert measure("a", "--only", "geometry") == 0
    assert "failed" not in set(pd.read_parquet("out/rows.parquet")["metric"])


def test_what_is_said_of_comparing_models_names_what_was_not_made(folder, capsys):
    assert measure("a", "b", "--only", "model_distance,model_order") == 0
    said = capsys.readouterr().err.splitlines()
    assert "model_order skipped: it needs at least 3 models, got 2" in said
    assert not any("not compared" in line for line in said)
    shutil.rmtree("out")
    assert measure("a", "b", "--only", "model_order,entropy") == 0
    assert "models not compared with each other: it needs at least 3 models, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (pd.DataFrame({"value": [1.0]}), "rows must have the column 'metric', got value"),
        (pd.DataFrame({"metric": ["a"], "value": [1.0], "norm": [1]}), "columns of the schema, got 'norm'"),
        ([1.0], "rows must be a pandas.DataFrame, got list"),
    ],
)
def test_rows_that_the_schema_does_not_describe_are_one_that_failed(rows, message, folder, monkeypatch):
    own = Measurement("ours", "nothing", lambda case: rows, table_part("own", "Own"))
    monkeypatch.setitem(MEASUREMENTS, "own", own)
    assert measure("a", "--only", "own,entropy") == 1
    failed = pd.read_parquet("out/rows.parquet").query("metric == 'failed'")
    assert failed["measurement"].tolist() == ["own"] and message in failed["reason"].item()


def test_where_nothing_is_scored_in_the_second_half_it_is_said_before_anything_runs(make_decoder, random_tokens):
    tokens = random_tokens(batch=8, length=8)
    scored = torch.ones(8, 8, dtype=torch.bool)
    scored[4:] = False
    scored[:, 0] = True  # a first token is never predicted
    case = Case("a", [make_decoder()], TracedSequences(tokens, scored))
    plan = Plan.make([case], ["use", "census", "geometry"])
    assert plan.of == {"a": ["geometry"]}
    reason = "it needs a scored token in the second half of the distinct sequences"
    assert {(m.measurement, m.metric, m.reason) for m in plan.missing} == {
        ("use", "skipped", reason),
        ("census", "skipped", reason),
    }
    scored[7, 5] = True
    case = Case("a", case.models, TracedSequences(tokens, scored))
    assert Plan.make([case], ["use", "census"]).of == {"a": ["use", "census"]}


def test_the_second_half_is_that_of_the_distinct_sequences(make_decoder, random_tokens):
    tokens = random_tokens(batch=6, length=8)
    scored = torch.zeros(6, 8, dtype=torch.bool)
    scored[2, 3] = True
    seen = [
        Case("a", [make_decoder()], TracedSequences(tokens[which], scored[which])).scores_later
        for which in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 3, 3], [0, 0, 0, 1, 2, 3])
    ]
    assert seen == [False, True, True]


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("trained_t5", "a model with T5's encoding among them"),
        ("needle", "a model that knows the positions of the shortest prompt (84 bytes"),
        ("mechanism", "at least 10 distinct sequences; sequences of at least 8 tokens"),
        ("model_order", "at least 3 models of one shape, on the same tokens"),
        ("census", "a scored token in the second half of the distinct sequences"),
    ],
)
def test_the_list_says_what_a_measurement_needs(name, needs):
    listed = measurements().set_index("name")["needs"]
    assert needs in listed[name] and "too large" not in listed[name]


def test_a_needle_needs_no_more_positions_than_its_shortest_prompt(make_decoder):
    task = make_task("passkey")
    for n_ctx, made in ((task.least_length, True), (task.least_length - 1, False)):
        model = make_decoder(encoding="learned", n_ctx=n_ctx, d_vocab=len(task.vocabulary))
        tokens = torch.zeros(2, 4, dtype=torch.long)
        case = Case("a", [model], TracedSequences(tokens), texts=Texts(task))
        assert (MEASUREMENTS["needle"].missing(case) is None) == made
        assert not made or len(MEASUREMENTS["needle"].measure(case, n=2))
