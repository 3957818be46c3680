import numpy as np
import pytest
import torch

from constructions import CONSTRUCTIONS
from constructions.observing import observe
from constructions.portraits import portrait
from constructions.weights import head_weights
from probe.report import plot_construction_matrices, plot_construction_portrait

HEAD = ("W_Q", "W_K", "W_V", "W_O")


def test_a_portrait_shows_what_the_construction_does():
    seen = portrait(CONSTRUCTIONS["absolute_position"], 32)
    assert set(seen.matrices["matrix"]) == {"head 0, W_V", "head 0, W_O", "MLP, W_in", "MLP, W_out"}
    row = seen.attention[seen.attention["query"] == 9]
    np.testing.assert_allclose(row["weight"], 0.1)  # uniform over the ten visible keys
    t = np.arange(1, 33)
    by_site = seen.stream.pivot(index="t", columns="site", values="value")
    np.testing.assert_allclose(by_site["blocks.0.hook_resid_mid"], 1 / t)
    np.testing.assert_allclose(by_site["blocks.0.hook_resid_post"], t)
    assert seen.rows.groupby("quantity")["error"].max().max() < 1e-8


def test_matrices_are_the_decoders():
    construction = CONSTRUCTIONS["absolute_position"]
    rows = portrait(construction, 16).matrices
    W_out = construction.build(16).layers[0].mlp.down_proj.weight.T
    drawn = rows[rows["matrix"] == "MLP, W_out"]
    rebuilt = torch.zeros_like(W_out)
    rebuilt[drawn["row"].tolist(), drawn["column"].tolist()] = torch.tensor(drawn["weight"].tolist()).to(W_out)
    assert torch.equal(rebuilt, W_out)
    assert (drawn["n_rows"].iloc[0], drawn["n_columns"].iloc[0]) == W_out.shape


@pytest.mark.parametrize("name", ["relative_position", "newton"])
def test_every_number_is_the_decoders(name):
    construction, n = CONSTRUCTIONS[name], 7
    seen, decoder, tokens = portrait(construction, n), construction.build(n), construction.tokens(n)
    layers, heads = range(construction.layers), range(decoder.config.n_heads)
    matrices = {}
    for layer in layers:
        for head in heads:
            for kind, matrix in head_weights(decoder, layer, head)._asdict().items():
                matrices[layer, f"head {head}, {kind}"] = matrix
        mlp = decoder.layers[layer].mlp
        matrices[layer, "MLP, W_in"], matrices[layer, "MLP, W_out"] = mlp.up_proj.weight.T, mlp.down_proj.weight.T
    drawn = {key: rows for key, rows in seen.matrices.groupby(["layer", "matrix"])}
    assert drawn.keys() == {key for key, matrix in matrices.items() if matrix.any()}
    for key, rows in drawn.items():
        rebuilt = torch.zeros_like(matrices[key])
        rebuilt[rows["row"].tolist(), rows["column"].tolist()] = torch.tensor(
            rows["weight"].tolist(), dtype=torch.float64
        )
        assert torch.equal(rebuilt, matrices[key].detach()) and (rows["weight"] != 0).all()
        assert {*rows["n_rows"]} == {len(rebuilt)} and {*rows["n_columns"]} == {rebuilt.shape[1]}

    sites = [f"blocks.{layer}.hook_resid_{at}" for layer in layers for at in ("mid", "post")]
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    values = observe(decoder, tokens, [*sites, *patterns])
    at_work = {(layer, h) for layer in layers for h in heads if any((layer, f"head {h}, {w}") in drawn for w in HEAD)}
    visible = [(query, key) for query in range(n) for key in range(query + 1)]
    for (layer, head), rows in seen.attention.groupby(["layer", "head"]):
        at_work.remove((layer, head))
        assert list(zip(rows["query"], rows["key"], strict=True)) == visible
        pattern = values[f"blocks.{layer}.attn.hook_pattern"][0, head]
        assert rows["weight"].tolist() == pytest.approx([float(pattern[at]) for at in visible], abs=1e-12)
    assert not at_work
    assert seen.stream["site"].unique().tolist() == sites
    for site, rows in seen.stream.groupby("site"):
        assert rows["t"].tolist() == list(range(1, n + 1))
        assert rows["value"].tolist() == pytest.approx(values[site][0, :, 2].tolist(), abs=1e-12)
    t, errors = construction.errors(decoder, tokens, "explicit")
    assert seen.rows["quantity"].unique().tolist() == list(errors)
    for quantity, rows in seen.rows.groupby("quantity"):
        assert rows["t"].tolist() == t.tolist() and rows["error"].tolist() == pytest.approx(errors[quantity].tolist())


def test_what_is_shown_if_nothing_is_said():
    assert portrait(CONSTRUCTIONS["closed_form"]).stream["t"].max() == 64
    assert portrait(CONSTRUCTIONS["closed_form"], 8, torch.float32).matrices["weight"].dtype == np.float64


def test_it_can_be_drawn():
    for name in ("absolute_position", "exact_position", "relative_position"):
        seen = portrait(CONSTRUCTIONS[name], 24)
        figure = plot_construction_portrait(seen.attention, seen.stream, seen.rows)
        heads = seen.attention.groupby(["layer", "head"]).ngroups
        assert sum(trace.type == "heatmap" for trace in figure.data) == min(5, heads)
        matrices = plot_construction_matrices(seen.matrices)
        assert len(matrices.data) == seen.matrices.groupby(["layer", "matrix"]).ngroups
        drawn = sum(int(np.isfinite(np.asarray(trace.z, dtype=float)).sum()) for trace in matrices.data)
        assert drawn == len(seen.matrices)
