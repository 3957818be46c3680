import re
from pathlib import Path

import pandas as pd
import pytest
from defined import undefined

from probe.attention.distances import DISTANCES
from probe.attention.model_distance import AGGREGATES
from probe.attention.templates import TEMPLATES
from probe.league import accuracy_by_length, league, paired_differences
from probe.models.encodings import ENCODINGS
from probe.position.mechanism.findings import MECHANISMS
from probe.position.mechanism.interventions import INTERVENTIONS
from probe.position.probes.targets import TARGETS
from probe.report.glossary import DEFINITIONS, IN_WORDS, SHOWN_AS, VALUES_OF, definition_of
from probe.report.variants import VARIANTS

ROOT = Path(__file__).parents[2]
SOURCE = "\n".join(
    path.read_text()
    for package in ("probe", "constructions")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "glossary.py"
)


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("template", TEMPLATES),
        ("metric", DISTANCES),
        ("aggregate", AGGREGATES),
        ("encoding", ENCODINGS),
        ("mechanism", MECHANISMS),
        ("intervention", INTERVENTIONS),
        ("target", TARGETS),
        ("variant", VARIANTS),
    ],
)
def test_every_registered_name_is_defined(column, names):
    assert [name for name in names if definition_of(name, column) is None] == []


def test_every_number_of_a_league_is_defined():
    cells = [("t", e, s, n, 0.1 * s + 0.01 * n) for e in ("none", "t5") for s in (0, 1) for n in (pd.NA, 5)]
    results = pd.DataFrame(
        [(*c[:3], c[3], 0.5 if c[1] == "t5" else 0.2 + 0.1 * c[2]) for c in cells],
        columns=["task", "encoding", "seed", "length", "accuracy"],
    ).astype({"length": "Int64"})
    for rows in (league(results), paired_differences(results), accuracy_by_length(results)):
        assert undefined(rows) == []


def test_no_definition_is_of_something_that_is_not_there():
    dead = []
    for key in DEFINITIONS:
        name = re.sub(r" \((\w+)\)$", "", key) if key not in SOURCE else key
        name = name.removesuffix("_change").removeprefix("used for ")  # made of others
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", SOURCE):
            dead.append(key)
    assert dead == []
    assert [name for name in (*SHOWN_AS, *IN_WORDS) if name not in SOURCE] == []


def test_other_names_lead_to_definitions():
    assert {*SHOWN_AS.values(), *IN_WORDS.values()} <= set(DEFINITIONS)
    columns = {key.rpartition(" (")[2].rstrip(")") for key in DEFINITIONS if key.endswith(")")}
    assert set(VALUES_OF.values()) <= columns


def test_a_name_is_defined_by_its_column():
    assert definition_of("uniform", "template") == "uniform (template)"
    assert definition_of("uniform", "label") == "uniform (label)"
    assert definition_of("uniform") is None  # of what, nobody said
    assert definition_of("rotary", "layer sees") == "rotary (encoding)"
    assert definition_of("bos counter", "mechanism") == "bos_counter (mechanism)"
    assert definition_of("fourier.cos_4", "target") == "fourier (target)"
    assert definition_of("uniform scale", "variant") == "uniform (variant)"
    assert definition_of("exact match") == "exact_match"
    assert definition_of("<script>", "template") is None


def test_definitions_are_sentences():
    for key, text in DEFINITIONS.items():
        assert text == text.strip() and text[-1] in ".)?" and len(text) < 400, key
