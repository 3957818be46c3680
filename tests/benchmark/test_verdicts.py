import pandas as pd
import pytest

from constructions.known import KNOWN
from probe.benchmark import VERDICTS, confusion, verdict_rows, verdict_scores
from probe.errors import ProbeError

#: Of each kind that once was told wrongly: a sink that counts, decaying variance, a bag of words; and heads that follow
#: a position in the stream.
SHORT = ("bos_counter_sink_used", "variance_decay_used", "bag_of_words_behind_bos", "place_back_used")


@pytest.fixture(scope="module")
def rows():
    return verdict_rows(SHORT, n_seeds=2)


def test_verdicts_are_true_of_models_whose_answer_is_known(rows):
    assert set(rows["verdict"]) == set(VERDICTS) and set(rows["generator"]) == set(SHORT)
    wrong = rows[~rows["right"].astype(bool)]
    # Erasure and patching are linear: they do not see a position that is the size of a state.
    linear = wrong["verdict"].isin(["erasure_used", "patching_used"])
    missed = linear & (wrong["generator"] == "variance_decay_used")
    # Where states hold little beside position, the random subspaces that erasure is compared with hold the rest of it.
    missed |= (wrong["verdict"] == "erasure_used") & (wrong["generator"] == "place_back_used")
    assert wrong[~missed].empty, wrong.to_string()
    follows = rows[(rows["verdict"] == "steering_follows") & (rows["said"] == "follows")]
    assert (follows["truth"] == "follows").all() and len(follows) == 2
    uses = rows[rows["verdict"] == "used_for"]
    assert {"content", "position", "nothing"} <= set(uses["said"])
    used = rows[(rows["verdict"] == "mechanism_used") & (rows["said"] == "used")]
    assert (used["truth"] == "used").all() and len(used) >= 6


def test_each_seed_has_a_variant_and_half_are_scored(rows):
    models = rows.drop_duplicates(["generator", "seed"])
    assert models.groupby("seed")["half"].unique().map(list).to_dict() == {0: ["thresholds"], 1: ["scored"]}
    assert models["variant"].nunique() >= 4
    assert all(v in KNOWN[g].variants for g, v in zip(models["generator"], models["variant"], strict=True))


def test_precision_recall_and_confusion_are_counted():
    said = ["used"] * 6 + ["not used"] * 4
    truth = ["used"] * 5 + ["not used"] + ["used"] * 2 + ["not used"] * 2
    table = pd.DataFrame({"said": said, "truth": truth, "verdict": "mechanism_used", "about": "position"})
    table = table.assign(right=table["said"] == table["truth"], half="scored")
    scores = verdict_scores(table).query("about == ''").set_index("metric")
    assert scores["value"].to_dict() == pytest.approx({"precision": 5 / 6, "recall": 5 / 7, "accuracy": 7 / 10})
    assert scores["n"].to_dict() == {"precision": 6, "recall": 7, "accuracy": 10}
    # Wilson 1927 by hand for 5 of 6: (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n).
    p, n, z = 5 / 6, 6, 1.959964
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    limits = [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert scores.loc["precision", ["low", "high"]].tolist() == pytest.approx(limits, abs=1e-6)
    assert confusion(table, "mechanism_used").loc["used", "not used"] == 2
    assert verdict_scores(table, "thresholds").empty


def test_bad_input_is_one_clear_line():
    with pytest.raises(ProbeError, match="unknown generator 'bag'"):
        verdict_rows(["bag"])
    with pytest.raises(ProbeError, match="unknown verdict 'mechanism'"):
        verdict_rows(["bag_of_words"], ["mechanism"])
    with pytest.raises(ProbeError, match="n_seeds must be"):
        verdict_rows(["bag_of_words"], n_seeds=0)
