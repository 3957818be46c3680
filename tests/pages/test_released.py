"""What docs/released.md says of hybrids is in its rows, and its script makes such rows."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probe.attention import by_layer_encoding

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "released.md").read_text(encoding="utf-8")


def trained(metric):
    rows = pd.read_parquet(DOCS / "released" / "hybrids.parquet")
    return rows[(rows["control"] == "none") & (rows["metric"] == metric)]


def test_the_table_is_that_of_the_rows():
    mean = trained("on_keys").groupby(["rotary_layers", "layer", "seed"])["value"].mean()
    over_seeds = mean.groupby(["rotary_layers", "layer"]).agg(["mean", "min", "max"])
    for layers, told in re.findall(r"^\| (\d) and \d \| (.*) \|$", TEXT, flags=re.MULTILINE):
        layers = {"0": "0, 2", "1": "1, 3"}[layers]
        for layer, cell in enumerate(told.split(" | ")):
            value, *around = re.findall(r"\.\d+", cell)
            found = over_seeds.loc[(layers, layer)]
            assert float(value) == pytest.approx(found["mean"], abs=0.006)
            if around:
                assert [float(x) for x in around] == pytest.approx([found["min"], found["max"]], abs=0.006)


def test_the_layer_that_retrieves_most_is_rotary_in_eleven_runs_of_twelve():
    mean = (
        trained("on_keys").groupby(["rotary_layers", "seed", "layer", "layer_encoding"])["value"].mean().reset_index()
    )
    most = mean.loc[mean.groupby(["rotary_layers", "seed"])["value"].idxmax()]
    assert (most["layer_encoding"] == "rotary").sum() == 11 and len(most) == 12


def test_the_differences_by_seed():
    found = {
        key: by_layer_encoding(rows).set_index("layer_encoding").loc["none - rotary", "value"]
        for key, rows in trained("on_keys").groupby(["rotary_layers", "seed"])
    }
    later = np.array([value for (layers, _), value in found.items() if layers == "1, 3"])
    assert (later < 0).all() and later.mean() == pytest.approx(-0.31, abs=0.006)
    earlier = sorted(value for (layers, _), value in found.items() if layers == "0, 2")
    assert [round(x, 2) for x in (earlier[0], earlier[-2], earlier[-1])] == [-0.26, -0.06, 0.28]
    untrained = pd.read_parquet(DOCS / "released" / "hybrids.parquet").query("control == 'untrained'")
    assert untrained[untrained["metric"] == "on_keys"]["value"].mean() == pytest.approx(0.05, abs=0.005)


@pytest.mark.slow
def test_its_script_makes_such_rows(tmp_path):
    spec = importlib.util.spec_from_file_location("hybrids", DOCS / "released" / "hybrids.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = script.measure(tmp_path, steps=2, seeds=1, n_train=600)
    kept = pd.read_parquet(DOCS / "released" / "hybrids.parquet")
    assert set(rows.columns) == set(kept.columns)
    assert set(rows["rotary_layers"]) == set(kept["rotary_layers"]) and set(rows["metric"]) == set(kept["metric"])
