import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from probe.errors import ProbeError
from probe.league import (
    accuracy_by_length,
    holm,
    league,
    paired_differences,
    read_published,
    reciprocal_ranks,
    run_scores,
)
from probe.report import (
    league_page,
    plot_league_by_length,
    plot_league_differences,
    plot_league_ranks,
)

# A table of published results, where one lies beside the repository.
PUBLISHED = next((p for up in Path(__file__).parents for p in up.glob("*/reference/published_accuracy.csv")), None)


def results(scores: dict[str, list[float]], lengths=(9, 10)) -> pd.DataFrame:
    """Accuracies by encoding, one number a (task, seed): two seeds a task, the same at every length but for a slope."""
    rows = []
    for encoding, values in scores.items():
        for i, value in enumerate(values):
            for j, length in enumerate(lengths):
                rows.append((f"task{i // 2}", encoding, i % 2, length, value + 0.01 * (j - (len(lengths) - 1) / 2)))
    return pd.DataFrame(rows, columns=["task", "encoding", "seed", "length", "accuracy"]).astype({"length": "Int64"})


THREE = {"a": [0.9, 0.8, 0.7, 0.9], "b": [0.5, 0.85, 0.6, 0.5], "c": [0.1, 0.2, 0.6, 0.1]}


def test_ranks_of_a_table_made_by_hand():
    ranks = reciprocal_ranks(run_scores(results(THREE)))
    tied = (1 / 2 + 1 / 3) / 2  # b and c at the second task's first seed
    np.testing.assert_allclose(ranks, [[1, 1 / 2, 1 / 3], [1 / 2, 1, 1 / 3], [1, tied, tied], [1, 1 / 2, 1 / 3]])
    found = league(results(THREE))
    table = found[found["metric"] == "mean_reciprocal_rank"].set_index("encoding")
    assert list(table.index) == ["a", "b", "c"]
    np.testing.assert_allclose(table["value"], [3.5 / 4, (2 + tied) / 4, (1 + tied) / 4])
    accuracy = found[found["metric"] == "mean_accuracy"].set_index("encoding")["value"]
    np.testing.assert_allclose(accuracy[list(THREE)], [np.mean(v) for v in THREE.values()])
    assert (table["n"] == 4).all() and (table["n_tasks"] == 2).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_ranks_are_scipys_where_nothing_ties(seed, n):
    rng = np.random.default_rng(seed)
    scores = pd.DataFrame(
        rng.random((4, n)), index=pd.MultiIndex.from_product([["t", "u"], [0, 1]], names=["task", "seed"])
    )
    ranks = reciprocal_ranks(scores)
    np.testing.assert_allclose(ranks, 1 / stats.rankdata(-scores, axis=1))
    np.testing.assert_allclose(ranks.sum(axis=1), sum(1 / k for k in range(1, n + 1)))


def test_runs_that_lack_an_encoding_do_not_count():
    rows = results(THREE)
    lacking = rows[~((rows["task"] == "task1") & (rows["seed"] == 0) & (rows["encoding"] == "c"))]
    assert (league(lacking)["n"] == 3).all()
    with pytest.raises(ProbeError, match="ranks want at least one task and seed with all of a, b, got none"):
        league(
            rows[((rows["encoding"] == "a") & (rows["seed"] == 0)) | ((rows["encoding"] == "b") & (rows["seed"] == 1))]
        )


def test_differences_are_those_of_an_exact_sign_flip():
    rng = np.random.default_rng(0)
    scores = {"a": list(rng.random(8)), "b": list(rng.random(8) * 0.3)}
    (found,) = paired_differences(results(scores)).to_dict("records")
    of_runs = np.subtract(scores["a"], scores["b"])
    of_tasks = of_runs.reshape(4, 2).mean(1)
    for column, d in (("p_runs", of_runs), ("p_tasks", of_tasks)):
        flips = np.array([np.mean(d * s) for s in itertools.product((-1, 1), repeat=len(d))])
        wanted = min(1, 2 * min((flips >= d.mean() - 1e-12).mean(), (flips <= d.mean() + 1e-12).mean()))
        assert found[column] == pytest.approx(wanted)
    # Over 4 tasks no difference can be real: 2^(1 - 4) is above .05, however sure these very tasks are.
    assert found["p_holm"] == found["p_tasks"] and not found["real"] and found["p_runs"] < 0.05
    low, high = stats.t.interval(0.95, 3, loc=of_tasks.mean(), scale=stats.sem(of_tasks))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((of_runs.mean(), low, high))
    assert found["interval"] == "tasks"


def test_one_task_has_intervals_over_its_seeds_and_one_run_has_none():
    rows = results({"a": [0.9, 0.7], "b": [0.5, 0.4]})
    found = league(rows).query("metric == 'mean_accuracy'").set_index("encoding")
    low, high = stats.t.interval(0.95, 1, loc=0.8, scale=stats.sem([0.9, 0.7]))
    assert found.loc["a", "interval"] == "trainings"
    assert tuple(found.loc["a", ["low", "high"]]) == pytest.approx((max(0, low), min(1, high)))
    single = league(rows[rows["seed"] == 0])
    assert (single["interval"] == "none").all() and single[["low", "high"]].isna().all(axis=None)


def test_equal_encodings_do_not_differ():
    same = paired_differences(results({"a": [0.5, 0.6, 0.7, 0.8], "b": [0.5, 0.6, 0.7, 0.8]}))
    assert same["p_tasks"].tolist() == [1.0] and not same["real"].any()


def test_differences_by_chance_are_seldom_real():
    """Of encodings that differ by nothing but by luck with a task, which all seeds of it share, fewer than one table in
    ten has a difference that is called real."""
    rng, false = np.random.default_rng(1), 0
    for _ in range(60):
        of_task = {name: np.repeat(rng.random(7), 2) for name in "ab"}
        rows = results({name: list(luck + 0.01 * rng.random(14)) for name, luck in of_task.items()}, lengths=(9,))
        found = paired_differences(rows)
        false += found["real"].any()
    assert false <= 6


def test_holm():
    # Holm 1979 by hand: .01 · 4, .02 · 3, .03 · 2, .04 · 1, none below the one before it.
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.04, 0.02])), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])


def test_accuracy_by_length_has_students_interval_over_seeds():
    rows = pd.DataFrame(
        [("t", "a", s, 9, v) for s, v in enumerate((0.2, 0.4, 0.6))] + [("t", "b", 0, 9, 0.5)],
        columns=["task", "encoding", "seed", "length", "accuracy"],
    ).astype({"length": "Int64"})
    found = accuracy_by_length(rows).set_index("encoding")
    low, high = stats.t.interval(0.95, 2, loc=0.4, scale=stats.sem([0.2, 0.4, 0.6]))
    np.testing.assert_allclose(found.loc["a", ["low", "high"]].astype(float), [max(0, low), high])
    assert found.loc["b", ["low", "high"]].isna().all() and found.loc["b", "n"] == 1


# ---- published tables

HEAD = "dataset,split,encoding,seed,length,accuracy\n"


def test_a_published_table_is_read(tmp_path):
    (tmp_path / "p.csv").write_text(HEAD + "s2s_copy,rsc,none,3,21,0.5\ns2s_copy,rsc,none,3,overall,0.75\n")
    rows = read_published(tmp_path / "p.csv")
    assert rows["task"].tolist() == ["s2s_copy/rsc"] * 2
    assert rows["length"].isna().tolist() == [False, True]
    assert run_scores(rows).to_numpy().tolist() == [[0.5]]
    assert run_scores(rows, "overall").to_numpy().tolist() == [[0.75]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.csv: a table with .* was wanted, got an empty file"),
        ("dataset,split\n", "p.csv, line 1: the columns .* were wanted, without encoding, seed, length, accuracy"),
        (HEAD, "p.csv: at least one accuracy was wanted, got none"),
        (HEAD + "d,s,none,1,21,0.5\nd,s,none,1,22,1.5\n", "line 3: accuracy must be a number in 0…1, got '1.5'"),
        (HEAD + "d,s,none,1,0,0.5\n", "line 2: length must be a positive integer or \"overall\", got '0'"),
        (HEAD + "d,s,none,one,21,0.5\n", "line 2: seed must be an integer, got 'one'"),
        (HEAD + "d,s,none,1,21,0.5\nd,s,none,1,21,0.6\n", "d/s, none, seed 1, length 21 is there twice"),
    ],
)
def test_a_bad_table_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ProbeError, match=message) as caught:
        read_published(tmp_path / "p.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(PUBLISHED is None, reason="no table of published accuracies lies beside the repository")
def test_the_published_order_comes_out():
    rows = read_published(PUBLISHED)
    ranks = league(rows).query("metric == 'mean_reciprocal_rank'").set_index("encoding")["value"]
    # All 12 splits of four data sets; over all of its tasks the paper has .69, .55, .50, .33, .22.
    assert list(ranks.index[:3]) == ["none", "t5", "alibi"]
    whole = rows[rows["length"].notna()].groupby(["task", "seed", "encoding"])["accuracy"].mean().unstack()
    best = whole.rank(axis=1, ascending=False)
    untied = best[whole.apply(lambda row: row.is_unique, axis=1)]
    assert len(untied) > 10
    np.testing.assert_allclose(reciprocal_ranks(whole).loc[untied.index], 1 / untied)


def test_figures_and_page():
    rows = results(THREE)
    ranks, differences, by_length = league(rows), paired_differences(rows), accuracy_by_length(rows)
    figure = plot_league_ranks({"ours": ranks, "published": ranks})
    assert [trace.name for trace in figure.data] == ["ours", "ours", "published", "published"]
    np.testing.assert_allclose(figure.data[0].x, ranks["value"][:3])
    assert plot_league_differences(differences).data[0].z.shape == (3, 3)
    assert {trace.name for trace in plot_league_by_length(by_length).data if trace.name} == {"a", "b", "c"}
    page = league_page({"ours": ranks}, {"ours": differences}, {"ours": by_length}, said=["One run failed."])
    assert "One run failed." in page and "Which differences are real?" in page
