import numpy as np
import torch

from constructions import CONSTRUCTIONS
from constructions.portrait import portrait
from probe.report import construction_matrices, construction_portrait


def test_a_portrait_shows_what_the_construction_does():
    seen = portrait(CONSTRUCTIONS["absolute_position"], 32)
    assert set(seen.matrices["matrix"]) == {"head 0, W_V", "head 0, W_O", "MLP, W_in", "MLP, W_out"}
    row = seen.attention[seen.attention["query"] == 9]
    np.testing.assert_allclose(row["weight"], 0.1)  # uniform over the ten visible keys
    t = np.arange(1, 33)
    by_site = seen.stream.pivot(index="t", columns="site", values="value")
    np.testing.assert_allclose(by_site["blocks.0.hook_resid_mid"], 1 / t)
    np.testing.assert_allclose(by_site["blocks.0.hook_resid_post"], t)
    assert seen.errors.groupby("quantity")["error"].max().max() < 1e-8


def test_matrices_are_the_decoders():
    construction = CONSTRUCTIONS["absolute_position"]
    rows = portrait(construction, 16).matrices
    W_out = construction.build(16).layers[0].mlp.down_proj.weight.T
    drawn = rows[rows["matrix"] == "MLP, W_out"]
    rebuilt = torch.zeros_like(W_out)
    rebuilt[drawn["row"].tolist(), drawn["column"].tolist()] = torch.tensor(drawn["weight"].tolist()).to(W_out)
    assert torch.equal(rebuilt, W_out)
    assert (drawn["n_rows"].iloc[0], drawn["n_columns"].iloc[0]) == W_out.shape


def test_it_can_be_drawn():
    for name in ("absolute_position", "exact_position", "relative_position"):
        seen = portrait(CONSTRUCTIONS[name], 24)
        figure = construction_portrait(seen.attention, seen.stream, seen.errors)
        heads = seen.attention.groupby(["layer", "head"]).ngroups
        assert sum(trace.type == "heatmap" for trace in figure.data) == min(5, heads)
        matrices = construction_matrices(seen.matrices)
        assert len(matrices.data) == seen.matrices.groupby(["layer", "matrix"]).ngroups
        drawn = sum(int(np.isfinite(np.asarray(trace.z, dtype=float)).sum()) for trace in matrices.data)
        assert drawn == len(seen.matrices)
