import numpy as np
import pytest
import torch
from scipy.fft import dct
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from probe.errors import ProbeError
from probe.models.lens import to_bridge
from probe.position import has_position_table, position_table


def wave(decoder, n=32):
    """A circle: one frequency in two dimensions, and a mean that is not 0."""
    angle = 2 * torch.pi * torch.arange(n) / n
    with torch.no_grad():
        decoder.encoding.weight.fill_(3.0)
        decoder.encoding.weight[:, 0] += angle.cos()
        decoder.encoding.weight[:, 1] += angle.sin()
    return decoder


def numbers(rows, control="none"):
    part = rows[(rows["control"] == control) & rows["position"].isna() & rows["lag"].isna()]
    return part.set_index("metric")["value"]


def test_numbers_are_those_of_numpy_scipy_and_scikit_learn(make_decoder):
    decoder = make_decoder(encoding="learned")
    table = decoder.encoding.weight.detach().double().numpy()
    found = position_table(decoder, n_shuffles=3)
    norm = found.rows[(found.rows["metric"] == "norm") & (found.rows["control"] == "none")]
    assert norm["position"].tolist() == list(range(32))
    assert norm["value"].to_numpy() == pytest.approx(np.linalg.norm(table, axis=1))
    pca = PCA().fit(table)
    ratio = pca.explained_variance_ratio_
    value = numbers(found.rows)
    assert value["participation_ratio"] == pytest.approx(1 / (ratio**2).sum())
    assert value["components_95"] == np.searchsorted(ratio.cumsum(), 0.95) + 1
    power = (dct(table - table.mean(0), axis=0, norm="ortho") ** 2).sum(1)[1:]
    assert value["low_frequencies_90"] == (np.searchsorted(power.cumsum() / power.sum(), 0.9) + 1) / 31
    cosines = cosine_similarity(table - table.mean(0))
    similarity = found.rows[(found.rows["metric"] == "similarity") & (found.rows["control"] == "none")]
    assert similarity["value"].to_numpy() == pytest.approx([cosines.diagonal(k).mean() for k in range(1, 17)])
    assert found.similarity.pivot(index="position", columns="other", values="value").to_numpy() == pytest.approx(
        cosines
    )
    first = found.basis[(found.basis["control"] == "none") & (found.basis["component"] == 0)]
    assert np.abs(first["value"]).to_numpy() == pytest.approx(np.abs(pca.transform(table)[:, 0]))
    assert first["share"].iloc[0] == pytest.approx(ratio[0])


def test_a_circle_is_two_dimensions_and_one_frequency(make_decoder):
    found = position_table(wave(make_decoder(encoding="learned")), n_shuffles=50)
    value = numbers(found.rows)
    assert value["participation_ratio"] == pytest.approx(2) and value["components_95"] == 2
    assert value["low_frequencies_90"] < 0.15
    similarity = found.rows[(found.rows["metric"] == "similarity") & (found.rows["control"] == "none")]
    assert similarity["value"].to_numpy() == pytest.approx(np.cos(2 * np.pi * np.arange(1, 17) / 32), abs=1e-6)
    # Positions dealt out anew: as many dimensions, no smoothness, no neighbours.
    shuffled = found.rows[found.rows["control"] == "shuffled"].set_index("metric")
    assert shuffled.loc["participation_ratio", "value"] == pytest.approx(2)
    assert shuffled.loc["low_frequencies_90", "low"] > 0.5
    lag_one = shuffled.loc["similarity"].iloc[0]
    assert lag_one["low"] < 0 < lag_one["high"] and lag_one["n"] == 50


def test_what_has_a_table(make_decoder):
    assert has_position_table(make_decoder(encoding="sinusoidal"))
    assert has_position_table(to_bridge(make_decoder(encoding="learned")))
    smooth, drawn = (
        numbers(position_table(make_decoder(encoding=encoding), n_shuffles=2).rows)["low_frequencies_90"]
        for encoding in ("sinusoidal", "learned")
    )
    assert smooth < drawn
    for encoding in ("none", "rotary", "t5"):
        assert not has_position_table(make_decoder(encoding=encoding))
        with pytest.raises(ProbeError, match="a model with a learned or sinusoidal table of positions was wanted"):
            position_table(make_decoder(encoding=encoding))
    with pytest.raises(ProbeError, match="a table of at least 4 positions was wanted, got 3"):
        position_table(make_decoder(encoding="learned", n_ctx=3))


def test_long_tables_are_pooled_in_their_map(make_decoder):
    found = position_table(make_decoder(encoding="learned", n_ctx=300), n_shuffles=2)
    starts = found.similarity["position"].unique().tolist()
    assert starts == list(range(0, 300, 3))
    table = make_decoder(encoding="learned", n_ctx=300).encoding.weight.detach().numpy()
    cosines = cosine_similarity(table - table.mean(0))
    one = found.similarity[(found.similarity["position"] == 3) & (found.similarity["other"] == 297)]["value"]
    assert one.item() == pytest.approx(cosines[3:6, 297:].mean(), abs=1e-6)
