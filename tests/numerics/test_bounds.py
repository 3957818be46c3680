"""What float32 costs: every measurement in float32 is held to a bound of its own against what is right.

Right is what a library or a hand says where one does (scipy, scikit-learn, numpy in long double, mpmath), else the same
measurement in float64: the same weights, none of them rounded. An error is absolute, or relative where the number is
above 1; labels, places and what is missing must be the same. Bounds are some 3 to 10 times what was measured.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured as m
import pytest

from probe.attention import DISTANCES, TEMPLATES

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Bound:
    """The largest error in float32 of what ``found`` measures, and what says what is right."""

    error: float
    found: Callable[[m.Inputs], Any]
    wanted: Callable[[m.Inputs], Any] | None = None  # of inputs in float64; the same measurement where None
    against: str = "float64"
    of: str = ""  # which part of a measurement, where there are several


FITTED = {
    "previous_token_leaky": 5e-9,
    "diagonal_leaky": 2e-8,
    "first_token_sink": 5e-9,
    "alibi_fitted": 5e-9,
    "power_law": 1e-8,
    "window": 1e-8,
    "sink_alibi": 5e-9,
    "rotary_fitted": 1e-8,
    "t5_fitted": 2e-8,
    "sink_t5": 2e-8,
}
BOUNDS = {
    "probe.trace": [Bound(2e-4, m.traced)],
    # Attention.
    "probe.attention.DISTANCES": [
        Bound(error, m.distance(name), m.by_rows(m.SCIPY[name]), "mpmath" if name == "symmetric_kl" else "scipy", name)
        for name, error in {
            "jensen_shannon": 1e-7,
            "symmetric_kl": 2e-7,
            "total_variation": 1e-7,
            "hellinger": 1e-7,
            "wasserstein": 5e-7,
            "mcgill_compat": 2e-7,
        }.items()
    ],
    "probe.attention.pattern_distance": [Bound(2e-8, m.pattern_distance, m.pattern_distance_by_row, "scipy")],
    "probe.attention.head_pair_distances": [Bound(5e-7, m.head_pair_distances)],
    "probe.attention.TEMPLATES": [
        Bound(FITTED.get(name, 0.0), m.template(name), of=name)
        for name in TEMPLATES  # those that are not fitted are the same numbers
    ],
    "probe.attention.compare_templates": [Bound(1e-6, m.compare_templates)],
    "probe.attention.nearest_template": [Bound(5e-7, m.nearest_template)],
    "probe.attention.distance_from_template": [Bound(2e-7, m.distance_from_template)],
    "probe.attention.compare_models": [Bound(2e-7, m.compare_models)],
    "probe.attention.compare_to": [Bound(2e-7, m.compare_to)],
    "probe.attention.attention_summary": [Bound(3e-6, m.summary_values, m.summary_by_numpy, "numpy")],
    "probe.attention.attention_maps": [Bound(2e-6, m.attention_maps)],
    "probe.attention.pool": [Bound(1e-7, m.pool, lambda given: m.pooled(given.pattern().numpy()), "numpy")],
    "probe.attention.census": [Bound(1e-6, m.census)],
    "probe.attention.census_table": [Bound(5e-7, m.census_table)],
    "probe.attention.attention_on": [Bound(1e-6, m.attention_on)],
    "probe.attention.by_layer_encoding": [Bound(3e-7, m.by_layer_encoding)],
    "probe.attention.split_scores": [Bound(2e-5, m.split_scores)],
    "probe.attention.split_long_context": [Bound(2e-5, m.split_long_context)],
    "probe.attention.stream_attention": [
        Bound(2e-6, m.streamed_rows("fused"), m.dense_rows(), "numpy", "fused, scores to 10"),
        Bound(2e-6, m.streamed_rows("blocks"), m.dense_rows(), "numpy", "blocks, scores to 10"),
        Bound(1e-4, m.streamed_rows("fused", 200), m.dense_rows(200), "numpy", "fused, scores to 200"),
        Bound(5e-7, m.streamed_rows("auto", 1e4), m.dense_rows(1e4), "numpy", "auto, scores to 10,000"),
    ],
    "probe.attention.stream": [Bound(5e-5, m.stream)],
    "probe.attention.compare_long_context": [Bound(3e-6, m.compare_long_context)],
    # Position.
    "probe.position.fit_position_probe": [
        Bound(2e-6, m.fit_position_probe("ridge"), of="ridge"),
        Bound(0.0, m.fit_position_probe("logistic"), of="logistic"),
    ],
    "probe.position.probe_positions": [Bound(3e-5, m.probe_positions)],
    "probe.position.LinearProbe": [Bound(1e-5, m.ridge_probe, m.sklearn_ridge, "scikit-learn")],
    "probe.position.SoftmaxProbe": [Bound(2e-3, m.softmax_probe, m.sklearn_softmax, "scikit-learn")],
    "probe.position.Moments": [Bound(2e-5, m.moments, m.numpy_moments, "numpy")],
    "probe.position.pair_probe": [Bound(2e-3, m.pair_probe)],
    "probe.position.probe_over_training": [Bound(1e-6, m.probe_over_training)],
    "probe.position.decompose_hidden": [Bound(5e-6, m.geometry("decompose_hidden"))],
    "probe.position.neighbour_similarity": [Bound(1e-6, m.geometry("neighbour_similarity"))],
    "probe.position.variance_by_position": [Bound(2e-6, m.geometry("variance_by_position"))],
    "probe.position.position_channels": [Bound(0.0, m.position_channels)],
    "probe.position.position_table": [Bound(0.0, m.position_table)],
    "probe.position.name_mechanism": [Bound(1e-5, m.name_mechanism)],
    "probe.position.mechanism_table": [Bound(0.0, m.mechanism_table)],
    "probe.position.erase_position": [Bound(2e-6, m.erase_position)],
    "probe.position.steer_position": [Bound(1e-5, m.steer_position)],
    "probe.position.patch_position": [Bound(5e-6, m.patch_position)],
    "constructions.plant": [Bound(2e-3, m.planted)],
    "constructions.widen": [Bound(2e-5, m.widen)],
    # Answers, and beyond the trained length.
    "probe.training.predict": [Bound(0.0, m.predict)],
    "probe.training.exact_match": [Bound(1e-15, m.exact_match, m.wilson, "mpmath")],
    "probe.training.league": [Bound(1e-15, m.league, m.league_by_hand, "by hand")],
    "probe.training.paired_differences": [Bound(5e-16, m.paired_differences, m.differences_by_hand, "by hand")],
    "probe.training.accuracy_by_length": [Bound(2e-15, m.accuracy_by_length, m.students_t, "scipy")],
    "probe.training.shifted_positions": [Bound(1e-6, m.shifted_positions)],
    "probe.training.shifted_texts": [Bound(3e-7, m.shifted_texts)],
    "probe.extrapolation.perplexity": [
        Bound(5e-7, m.perplexity_of_whole_texts, m.perplexity_by_numpy, "numpy", "one window"),
        Bound(3e-7, m.perplexity, of="windows"),
    ],
    "probe.extrapolation.context_losses": [Bound(5e-7, m.context_losses)],
    "probe.extrapolation.perplexity_rows": [Bound(3e-7, m.perplexity_rows)],
    "probe.extrapolation.loss_by_position": [Bound(3e-7, m.loss_by_position)],
    "probe.extrapolation.passkey": [Bound(0.0, m.passkey)],
    "probe.extrapolation.HeadScale": [Bound(2e-5, m.scaled("head"))],
    "probe.extrapolation.UniformScale": [Bound(2e-5, m.scaled("uniform"))],
    "probe.extrapolation.scaled": [Bound(2e-5, m.scaled("folded"))],
    "probe.extrapolation.sweep_scale": [Bound(5e-7, m.sweep_scale)],
    "probe.extrapolation.train_scale": [Bound(2e-5, m.train_scale)],
    "probe.extrapolation.search_scale": [Bound(2e-7, m.search_scale)],
    "probe.extrapolation.fit_log_law": [Bound(2e-15, m.fit_log_law, m.law_by_lstsq, "numpy")],
    "probe.extrapolation.scale_against": [Bound(1e-15, m.scale_against, m.correlations, "scipy")],
}

# What the pages of measurements name and what measures nothing in the dtype of a model, with the reason.
UNMEASURED = {
    "constructions.verify": "holds every claim to a tolerance of its own in each dtype",
    "constructions.CONSTRUCTIONS": "its claims are held by verify",
    "constructions.Construction": "its claims are held by verify",
    "constructions.PROPOSITIONS": "are run in float64 only",
    "constructions.perturbed": "makes weights",
    "constructions.portrait": "shows what verify holds",
    "constructions.Planted": "is what plant returns",
    "probe.attention.AGGREGATES": "all of them are in compare_models",
    "probe.attention.attention_inputs": "hands on what stream reads",
    "probe.attention.check_pattern": "refuses, and returns nothing",
    "probe.attention.Kernel": "makes templates, which are in TEMPLATES",
    "probe.attention.Template": "makes templates, which are in TEMPLATES",
    "probe.attention.ScoreSplit": "is what split_scores returns",
    "probe.attention.StreamTemplate": "is float64 at any dtype of a model",
    "probe.extrapolation.LogLaw": "is what fit_log_law returns",
    "probe.models.layer_encodings": "names",
    "probe.models.untrained_twin": "draws weights",
    "probe.position.CONTROLS": "names and what they mean",
    "probe.position.PAIR_PROBES": "all of them are in pair_probe",
    "probe.position.Split": "deals sequences out",
    "probe.position.TARGETS": "integers, and functions of them in float64",
    "probe.position.attention_follows": "says what follows from rows",
    "probe.position.constant_tokens": "makes tokens",
    "probe.position.patched_position_used": "says what follows from rows",
    "probe.position.random_tokens": "makes tokens",
    "probe.position.has_position_table": "says yes or no",
    "probe.sweep.read_results": "reads",
    "probe.sweep.results_of": "chooses rows",
    "probe.training.checkpoints_of": "reads",
    "probe.training.read_published": "reads",
}

CASES = [(name, bound) for name, bounds in BOUNDS.items() for bound in bounds]


@pytest.mark.parametrize(
    ("name", "bound"), CASES, ids=[f"{name}[{bound.of}]".replace("[]", "") for name, bound in CASES]
)
def test_float32_is_within_its_bound(name, bound):
    error = m.error(bound.found(m.Inputs(m.single)), (bound.wanted or bound.found)(m.Inputs(m.double)))
    assert error <= bound.error, f"{name}: {error:.2g} was measured"


def documented():
    """The public names that the pages of measurements refer to."""
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "measurements").glob("*.md"))
    return set(re.findall(r"\{py:\w+\}`~?([\w.]+)`", text))


def test_no_measurement_is_without_a_bound():
    measured = set(BOUNDS) - {"probe.trace"}  # the door to them all
    assert not measured & set(UNMEASURED)
    assert documented() == measured | set(UNMEASURED)
    assert {bound.of for bound in BOUNDS["probe.attention.DISTANCES"]} == set(DISTANCES)


def linked(name):
    """A name as the documentation links it."""
    home, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(home), attribute)
    role = "class" if isinstance(thing, type) else "func" if callable(thing) else "data"
    return f"{{py:{role}}}`~{name}`"


def test_the_page_on_numerics_holds_these_bounds():
    rows = []
    for name, bound in CASES:
        error = f"{bound.error:.0e}".replace("e-0", "e-") if bound.error else "0"
        rows.append(f"| {linked(name)} | {bound.of} | {error} | {bound.against} |")
    text = (DOCS / "numerics.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| \{py:.*$", text, flags=re.MULTILINE)
    assert told == rows, "the table of docs/numerics.md must read:\n" + "\n".join(rows)
