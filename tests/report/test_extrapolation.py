import numpy as np
import pandas as pd
import pytest

from probe.errors import ProbeError
from probe.report import extrapolation, render_page
from probe.report import scales as drawing
from probe.report.sections import Results, beyond, passkey, temperature
from probe.report.sections.base import parts_of
from probe.report.sections.beyond import perplexity_table
from probe.report.sections.passkey import passkey_table
from probe.report.sections.temperature import temperature_table
from probe.report.variants import matched

NASTY = "<b>x"
L = 256
NONE = [("none", np.nan)]
SCALED = [*NONE, *((v, e) for v in ("uniform", "head") for e in (2.0, 4.0))]
DRAW = {
    "perplexity": extrapolation.plot_perplexity_by_context,
    "loss_by_position": extrapolation.plot_loss_by_position,
    "passkey": extrapolation.plot_passkey_map,
    "passkey_lengths": extrapolation.plot_passkey_by_length,
    "scale_map": drawing.plot_scale_map,
    "scale_law": drawing.plot_scale_law,
    "entropy_by_position": drawing.plot_entropy_by_position,
    "scale_entropy": drawing.plot_scale_against_entropy,
    "temperature": drawing.plot_loss_by_temperature,
}
OF_LENGTHS = ("perplexity", "loss_by_position", "passkey", "passkey_lengths", "entropy_by_position")


def parts(rows):
    return parts_of(Results(rows), {part.__name__: part.PART for part in (beyond, temperature, passkey)})


def extrapolation_figures(rows, train_length=None):
    return {
        name: f for part in parts(rows) for name, f in part.figures(Results(rows, train_length=train_length)).items()
    }


def extrapolation_sections(rows, drawn, train_length=L):
    sections = [part.section(Results(rows, train_length=train_length), drawn) for part in parts(rows)]
    return [section for section in sections if section.figures or section.tables]


def extrapolation_summary(rows, train_length=None):
    return [line for part in parts(rows) for line in part.lines(Results(rows, train_length=train_length))]


def drawn(name, rows):
    return DRAW[name](rows, L) if name in OF_LENGTHS else DRAW[name](rows)


def every(measurement, metric, variants=SCALED, encodings=("none", NASTY), **columns):
    """A row for every encoding, variant and combination of the columns, numbered in ``value``."""
    grid = pd.MultiIndex.from_product(columns.values(), names=list(columns)).to_frame(index=False)
    parts = [grid.assign(model=e, variant=v, extension=s) for e in encodings for v, s in variants]
    rows = pd.concat(parts, ignore_index=True).assign(measurement=measurement, metric=metric)
    value = np.arange(1, len(rows) + 1) / len(rows)
    return rows.assign(value=value, low=value - 0.001, high=value + 0.002, n=40, tokens=100)


def perplexities():
    rows = every("perplexity", "perplexity", context=[128, 256, 512, 1024, 2048])
    # A value that says which row it is: 1002.0256 is that of the extension 2 at 256.
    told = 1000 + rows["extension"].fillna(0) + rows["context"] / 10_000
    return rows.assign(value=told, low=told - 1, high=told + 2)


def passkeys():
    rows = every("passkey", "exact_match", length=[256, 512, 1024], depth=[np.nan, 0.0, 0.5, 1.0])
    return pd.concat([rows, rows.assign(metric="digits", value=0.123)], ignore_index=True)


def scales():
    found = every("head_scale", "scale", SCALED[1:], ("none",), layer=[0, 1], head=[0, 1]).assign(low=np.nan)
    uniform = found["variant"] == "uniform"
    found.loc[uniform, "value"] = 1 + 0.3 * np.log(found["extension"])
    found.loc[~uniform, "value"] = 1.5 + 0.1 * found["head"]
    laws = [("slope", 0.3, 0.25, 0.35), ("r2", 0.95, np.nan, np.nan)]
    law = pd.DataFrame(laws, columns=["metric", "value", "low", "high"])
    rise = found[~uniform].assign(measurement="entropy_rise", metric="entropy_rise", variant=np.nan)
    rise["value"] = 0.25 * rise["layer"] - 0.5 * rise["head"]
    # As a study has them: each head's entropy itself in a row before.
    rise = pd.concat([rise.assign(metric="entropy", value=rise["value"] + 3), rise], ignore_index=True)
    told = pd.DataFrame([{"value": -0.41, "low": -0.8, "high": 0.1, "p": 0.2, "n": 4, "extension": 4.0}])
    told = told.assign(measurement="scale_entropy", metric="spearman", model="none", variant="head")
    law = law.assign(measurement="scale_law", model="none", variant="uniform", n=2)
    return pd.concat([found, law, rise, told], ignore_index=True)


def temperatures():
    rows = every("temperature", "loss", NONE, split=["trained", "longer"], scale=[1.0, 1.2, 1.4])
    change = rows.assign(metric="loss_change", value=-0.5, low=-0.6, high=-0.4)
    return pd.concat([rows, rows.assign(metric="exact_match"), change], ignore_index=True)


@pytest.fixture(scope="module")
def rows():
    losses = every("loss_by_position", "loss", position=[1.0, 255.0, 511.0, 800.0])
    entropy = every("scaled_entropy", "entropy", layer=[0, 1], head=[0, 1], query=[0, 1, 255, 511])
    return pd.concat([perplexities(), passkeys(), scales(), temperatures(), losses, entropy], ignore_index=True)


def named(figure, name):
    return [t for t in figure.data if t.name == name]


def test_each_context_has_the_shortest_extension_that_reaches_it(rows):
    figure = extrapolation.plot_perplexity_by_context(rows, L)
    head = named(figure, "head scale")
    assert len(head) == 2 and [t.showlegend for t in head] == [True, False]
    # 2048 is 8 times the trained length, which nothing was made for.
    assert list(head[0].y) == pytest.approx([1002.0128, 1002.0256, 1002.0512, 1004.1024])
    assert [text.split(":")[0] for text in head[0].customdata] == [f"context {n}" for n in (128, 256, 512, 1024)]
    assert "1002 [1001, 1004], 40 texts, 100 tokens each, made for 2×" in head[0].customdata[0]
    assert head[0].error_y.array == pytest.approx([2] * 4) and head[0].error_y.arrayminus == pytest.approx([1] * 4)
    unchanged = named(figure, "no change")[0]
    assert len(unchanged.y) == 5 and unchanged.line.color == "#000000"
    for extension in (2.0, 4.0):
        other = named(figure, f"head scale, made for {extension:g}×")[0]
        assert len(other.y) == 5 and not other.showlegend and other.line.color == head[0].line.color
    assert {shape.x0 for shape in figure.layout.shapes} == {L} and len(figure.layout.shapes) == 2
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext)[:3] == ["128<br>(0.5×)", "256<br>(1×)", "512<br>(2×)"]


def test_a_variant_made_for_one_length_has_no_other_lines():
    rows = every("perplexity", "perplexity", [("head", 8.0)], ("none",), context=[256, 512])
    figure = extrapolation.plot_perplexity_by_context(rows, L)
    assert [t.name for t in figure.data] == ["head scale", "trained length"]


def test_rows_from_several_tables_may_share_their_index(rows):
    again = rows.set_axis(np.zeros(len(rows), dtype=int))
    for name in ("perplexity", "passkey", "passkey_lengths"):
        assert drawn(name, again) == drawn(name, rows)
    assert extrapolation_summary(again, L) == extrapolation_summary(rows, L)
    assert temperature_table(again).equals(temperature_table(rows))


def test_extensions_are_matched_at_the_edge():
    rows = every("perplexity", "perplexity", SCALED, ("none",), context=[512, 513, 1025])
    fits = matched(rows, L, "context")
    found = fits[fits["variant"] == "head"].set_index("context")["extension"].to_dict()
    assert found == {512: 2.0, 513: 4.0}
    assert len(fits[fits["variant"] == "none"]) == 3
    # The token at position 511 sees 512.
    at = matched(rows.rename(columns={"context": "position"}).assign(position=511), L, "position")
    assert set(at["extension"].dropna()) == {2.0}


def test_the_loss_has_bands(rows):
    figure = extrapolation.plot_loss_by_position(rows, L)
    line = named(figure, "uniform scale")[0]
    of = rows.query("measurement == 'loss_by_position' and model == 'none' and variant == 'uniform'")
    want = [of.query("extension == @e and position == @p")["value"].item() for e, p in
            ((2, 1.0), (2, 255.0), (2, 511.0), (4, 800.0))]  # fmt: skip
    assert list(line.x) == [1.0, 255.0, 511.0, 800.0] and list(line.y) == want
    band = next(t for t in figure.data if t.fill == "toself" and t.legendgroup == "uniform")
    assert list(band.y)[:4] == pytest.approx([v + 0.002 for v in want])
    assert list(band.y)[:3:-1] == pytest.approx([v - 0.001 for v in want])
    assert list(figure.layout.xaxis.ticktext) == ["1", "4", "16", "64", "256<br>(1×)", "512<br>(2×)"]


def test_passkeys_are_a_map_of_length_and_depth(rows):
    figure = extrapolation.plot_passkey_map(rows, L)
    titles = [a.text for a in figure.layout.annotations]
    assert titles[:3] == ["none<br>no change", "none<br>uniform scale", "none<br>head scale"]
    assert titles[3] == "&lt;b&gt;x<br>no change" and len(figure.data) == 6
    head = figure.data[2]
    assert list(head.x) == ["256<br>(1×)", "512<br>(2×)", "1024<br>(4×)"]
    assert list(head.y) == ["0 = start", "0.5", "1 = end"] and figure.layout.yaxis3.autorange == "reversed"
    of = rows.query("measurement == 'passkey' and metric == 'exact_match' and model == 'none' and variant == 'head'")
    for column, made in enumerate(({"length": 256, "extension": 2.0}, {"length": 512, "extension": 2.0},
                                   {"length": 1024, "extension": 4.0})):  # fmt: skip
        want = of[of["depth"].notna() & (of[list(made)] == pd.Series(made)).all(axis=1)].sort_values("depth")["value"]
        assert np.asarray(head.z)[:, column] == pytest.approx(want.to_numpy())
    assert "40 prompts, made for 4×" in np.asarray(head.customdata)[0, 2]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert {shape.x0 for shape in figure.layout.shapes} == {0.5}  # between 256 and 512


def test_passkeys_by_length_are_those_of_all_depths(rows):
    figure = extrapolation.plot_passkey_by_length(rows, L)
    of = rows.query("measurement == 'passkey' and metric == 'exact_match' and model == 'none' and variant == 'none'")
    line = named(figure, "no change")[0]
    assert list(line.y) == of[of["depth"].isna()]["value"].tolist() and len(line.y) == 3
    assert figure.layout.yaxis.range == (-0.03, 1.05)


def test_every_head_has_its_scale(rows):
    figure = drawing.plot_scale_map(rows)
    assert [a.text for a in figure.layout.annotations] == ["none, made for 2×", "none, made for 4×"]
    for panel in figure.data:
        np.testing.assert_allclose(np.asarray(panel.z), [[1.5, 1.6], [1.5, 1.6]])
    assert figure.layout.coloraxis.cmin == 1 and figure.layout.coloraxis.cmax == 1.6


def test_the_law_goes_beside_the_published_one(rows):
    figure = drawing.plot_scale_law(rows)
    published, band, curve, uniform, head = figure.data
    at = np.asarray(curve.x)
    np.testing.assert_allclose(published.y, 1 + 0.3973 * np.log(at))
    np.testing.assert_allclose(curve.y, 1 + 0.3 * np.log(at))
    np.testing.assert_allclose(np.asarray(band.y)[: len(at)], 1 + 0.35 * np.log(at))
    np.testing.assert_allclose(np.asarray(band.y)[: len(at) - 1 : -1], 1 + 0.25 * np.log(at))
    assert uniform.name == "uniform scale: 1 + 0.30 [0.25, 0.35] ln s, R² 0.950"
    np.testing.assert_allclose(uniform.y, 1 + 0.3 * np.log([2, 4]))
    assert uniform.error_y.array == pytest.approx([0, 0], abs=1e-12)
    assert head.name == "head scale"  # no law of it was fitted
    alone = rows.assign(low=np.nan, high=rows["value"] * np.nan)
    alone.loc[alone["metric"] == "r2", "value"] = np.nan
    names = [t.name for t in drawing.plot_scale_law(alone).data if t.name]
    assert names[1] == "uniform scale: 1 + 0.30 ln s"
    assert list(head.y) == pytest.approx([1.55, 1.55]) and head.error_y.array == pytest.approx([0.05, 0.05])


def test_entropy_is_the_mean_over_heads_of_the_longest_extension(rows):
    figure = drawing.plot_entropy_by_position(rows, L)
    of = rows.query("measurement == 'scaled_entropy' and model == 'none' and layer == 0")
    line = named(figure, "head scale, made for 4×")[0]
    want = of.query("variant == 'head' and extension == 4").groupby("query")["value"].mean()
    assert list(line.x) == [1, 2, 256, 512] and list(line.y) == want.tolist()
    assert not named(figure, "head scale, made for 2×")
    assert len(named(figure, "no change: its single heads")) == 2 * 2 * 2  # encodings, layers, heads
    bound = named(figure, "uniform attention, ln(query + 1)")[0]
    assert list(bound.y) == pytest.approx(np.log([1, 2, 256, 512]))
    assert len([s for s in figure.layout.shapes if s.x0 == L]) == 4


def test_long_entropy_curves_are_thinned():
    rows = every("scaled_entropy", "entropy", NONE, ("none",), layer=[0], head=[0], query=range(3000))
    x = named(drawing.plot_entropy_by_position(rows, L), "no change")[0].x
    assert len(x) <= 128 and (x[0], x[-1]) == (1, 3000)


def test_scales_stand_beside_the_rise_of_entropy(rows):
    figure = drawing.plot_scale_against_entropy(rows)
    assert [a.text for a in figure.layout.annotations] == [
        "none, 2×, n = 4 heads<br>",
        "none, 4×, n = 4 heads<br>Spearman −0.41 [−0.80, 0.10]",
    ]
    first, second = named(figure, "layer 1")
    assert list(first.x) == [0.25, -0.25] and list(first.y) == pytest.approx([1.5, 1.6])
    assert first.marker.symbol != figure.data[0].marker.symbol and first.showlegend and not second.showlegend


def test_temperatures_are_of_trained_and_longer(rows):
    figure = drawing.plot_loss_by_temperature(rows)
    assert [a.text for a in figure.layout.annotations] == [
        "trained lengths: loss, nats a token", "trained lengths: exact match",
        "longer sequences: loss, nats a token", "longer sequences: exact match",
    ]  # fmt: skip
    lines = named(figure, "none")
    of = rows.query("measurement == 'temperature' and model == 'none' and metric == 'loss' and split == 'longer'")
    assert len(lines) == 4 and list(lines[2].y) == of["value"].tolist()
    assert list(lines[2].x) == pytest.approx([1.0, 1.2, 1.4], abs=0.02)


@pytest.mark.parametrize("name", DRAW)
def test_names_from_outside_are_text_not_markup(rows, name):
    rows = rows.assign(model=NASTY, variant=rows["variant"].replace("uniform", NASTY))
    if name == "temperature":
        rows = rows.assign(split=NASTY)
    rows = rows.drop_duplicates([c for c in rows if c not in ("value", "low", "high")])
    text = drawn(name, rows).to_json()
    assert "&lt;b&gt;x" in text
    for part in ("name", "text", "hovertemplate", "customdata"):
        for found in _strings(drawn(name, rows).to_dict(), part):
            assert NASTY not in found


def _strings(tree, key, inside=False):
    """Every text below ``key``."""
    if isinstance(tree, str):
        return [tree] if inside else []
    if isinstance(tree, dict):
        return [s for k, v in tree.items() for s in _strings(v, key, inside or k == key)]
    if isinstance(tree, list | tuple | np.ndarray):
        return [s for v in tree for s in _strings(v, key, inside)]
    return []


@pytest.mark.parametrize("name", ["perplexity", "loss_by_position", "passkey", "passkey_lengths"])
def test_variants_may_be_missing_or_unknown(rows, name):
    rows = rows[(rows["model"] == "none") | (rows["variant"] == "none")]  # the other encoding has one variant
    figure = drawn(name, rows.assign(variant=rows["variant"].replace("head", "my own")))
    told = figure.to_json()
    assert "my own" in told and "head scale" not in told
    assert len(drawn(name, rows[rows["variant"] == "head"]).data) > 0  # without the model as it is


@pytest.mark.parametrize("name", DRAW)
def test_no_rows_are_one_clear_line(rows, name):
    with pytest.raises(ProbeError, match="at least one row, got none"):
        drawn(name, rows[:0])
    with pytest.raises(ProbeError, match="at least one row, got none"):
        drawn(name, pd.DataFrame(columns=["measurement", "model", "metric"]))


def test_what_was_not_measured_is_not_there(rows):
    empty = pd.DataFrame([{"measurement": "accuracy", "model": "none", "metric": "exact_match", "value": 1.0}])
    for nothing in (empty, rows[:0]):
        assert extrapolation_figures(nothing, L) == {}
        assert extrapolation_sections(nothing, {}) == [] and extrapolation_summary(nothing) == []
        assert perplexity_table(nothing).empty and passkey_table(nothing).empty and temperature_table(nothing).empty
    only = extrapolation_figures(perplexities(), L)
    assert list(only) == ["perplexity"]
    assert [s.title for s in extrapolation_sections(perplexities(), only)] == ["Beyond the trained length"]


def test_tables_have_a_row_a_setting(rows):
    table = perplexity_table(rows)
    assert list(table.columns[:4]) == ["model", "variant", "made for", "128 tokens"] and len(table) == 2 * 5
    assert table.iloc[1].tolist()[:3] == ["none", "uniform scale", "2×"]
    assert table["2048 tokens"].map(str).tolist()[:2] == ["1000 [999.2, 1002]", "1002 [1001, 1004]"]
    keys = passkey_table(rows)
    of = rows.query("measurement == 'passkey' and metric == 'exact_match' and length == 512")
    first = of[of["depth"].isna()].iloc[0]
    assert str(keys["512 tokens"][0]) == f"{first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}]"
    told = temperature_table(rows).iloc[0].map(str).tolist()
    assert told == ["none", "trained lengths", "1", "-0.500 [-0.600, -0.400]", ""]
    assert keys["512 tokens"][0].numbers == {"": first["value"], "low": first["low"], "high": first["high"]}


def test_the_summary_has_the_model_as_it_is_and_the_best_that_reaches_so_far():
    rows = perplexities().query("context <= 1024 and model == 'none'")
    rows.loc[(rows["variant"] == "head") & (rows["extension"] == 2), "value"] = 1.0  # best, but not made for 1024
    rows.loc[(rows["variant"] == "uniform") & (rows["extension"] == 4), "value"] = 900.0
    (line,) = extrapolation_summary(rows, L)
    assert line.lead == "Perplexity" and line.text.endswith("trained length 256.")
    assert line.items == [
        "none 1000 [999.0, 1002] at 256, 1000 [999.1, 1002] at 1024 tokens as it is, 900.0 [1003, 1006] at 1024 with "
        "the best of 2 (uniform scale, made for 4×)"
    ]
    ((said,),) = [line.items for line in extrapolation_summary(rows)]
    assert "none 1000 [999.0, 1002] at 128" in said and "best of 4 (head scale, made for 2×)" in said
    (keys,) = extrapolation_summary(passkeys(), L)
    assert keys.lead == "Passkeys" and "with the best of 2 (head scale, made for 4×)" in keys.items[0]
    (alone,) = extrapolation_summary(rows[rows["variant"] == "none"], L)
    assert alone.items[0].endswith("at 1024 tokens as it is")


def test_the_page_holds_the_numbers(rows):
    figures = extrapolation_figures(rows, L)
    assert set(figures) == set(DRAW)
    sections = extrapolation_sections(rows, figures)
    assert [s.title for s in sections] == ["Beyond the trained length", "Attention temperature", "Passkeys"]
    assert sum(len(s.figures) for s in sections) == len(DRAW)
    page = render_page("t", extrapolation_summary(rows, L), sections)
    assert "1002 [1001, 1004]" in page and "-0.500 [-0.600, -0.400]" in page and "0.3973" in page
    assert "&lt;b&gt;x" in page and "<b>x" not in page


def test_perplexities_of_any_size_are_told():
    assert extrapolation.told(5.1234, 0.98765, 15234.5) == "5.123 [0.988, 15234]"
    assert extrapolation.told(2.5e8, 12.345, np.inf) == "2.50e+08 [12.35, inf]"
