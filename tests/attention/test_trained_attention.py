"""Decoders whose bias is known: found exactly where attention is nothing else, roughly where content mixes in."""

import numpy as np
import pytest
import scipy.stats
import torch

from probe.attention import TEMPLATES, compare_templates
from probe.attention.comparison import checked_pattern
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.encodings import alibi_slopes, t5_bucket
from probe.tasks import make_task
from probe.tracing import PATTERN, trace
from probe.training import TrainingConfig, encode, exact_match, predict, train

N_HEADS = 4


def fitted(traced, layer, name):
    return TEMPLATES[name](checked_pattern(traced, layer), traced.lengths).parameters


def test_a_t5_decoder_without_queries_has_its_own_buckets():
    config = DecoderConfig(d_vocab=11, n_ctx=40, n_layers=2, d_model=16, n_heads=N_HEADS, encoding="t5")
    decoder = Decoder(config, seed=0)
    with torch.no_grad():
        for block in decoder.layers:
            block.attention.q_proj.weight.zero_()
            block.attention.q_proj.bias.zero_()
        decoder.encoding.weight.normal_(generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(11, (6, 40), generator=torch.Generator().manual_seed(2))
    traced = trace(decoder, tokens, [PATTERN])
    reach = int(t5_bucket(torch.tensor(39), 32)) + 1
    own = decoder.encoding.weight.detach().double().T[:, :reach]
    for layer in range(2):
        biases = fitted(traced, layer, "t5_fitted")["bucket_bias"][:, :reach]
        torch.testing.assert_close(biases, own - own.mean(1, keepdim=True), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def trained():
    """Two small decoders that have begun to copy, by encoding, and their attention on held-out sequences."""
    task = make_task("copy", {"train_length": 8, "test_length": 12, "n_symbols": 8})
    splits = task.splits(n_train=4000, n_validation=100, n_test=1)
    data, held_out = encode(splits.train, task.vocabulary), encode(splits.validation, task.vocabulary)
    found = {}
    for encoding in ("alibi", "t5"):
        config = DecoderConfig(
            d_vocab=len(task.vocabulary), n_ctx=20, n_layers=2, d_model=32, n_heads=N_HEADS, encoding=encoding
        )
        training = TrainingConfig(steps=500, batch_size=32, learning_rate=5e-3, log_every=500)
        decoder = train(config, data, training, device="cpu")
        rows = exact_match(predict(decoder, splits.validation, task.vocabulary))
        assert float(rows.loc[rows["length"].isna(), "value"].iloc[0]) > 0.2  # it has learned something
        found[encoding] = decoder, trace(decoder, held_out.tokens, [PATTERN], lengths=held_out.lengths)
    return found


@pytest.mark.slow
def test_the_slopes_of_a_trained_alibi_decoder_are_in_order(trained):
    """In the first layer. Content bends them (a head of slope 1/256 may come out negative), in the second more so."""
    _, traced = trained["alibi"]
    own = alibi_slopes(N_HEADS)
    for layer, least in ((0, 0.99), (1, 0.5)):
        slopes = fitted(traced, layer, "alibi_fitted")["slope"]
        assert scipy.stats.spearmanr(slopes, own).statistic > least
        assert slopes.argmax() == own.argmax()


@pytest.mark.slow
def test_the_buckets_of_a_trained_t5_decoder_go_with_its_table(trained):
    """In the first layer, over the distances that many rows see. In the second content covers the table."""
    decoder, traced = trained["t5"]
    near = slice(0, 12)
    biases = fitted(traced, 0, "t5_fitted")["bucket_bias"][:, near]
    for head, own in enumerate(decoder.encoding.weight.detach().T[:, near]):
        assert np.corrcoef(biases[head], own)[0, 1] > 0.8


@pytest.mark.slow
def test_what_position_explains_of_trained_heads_stands_above_their_shuffled_null(trained):
    for decoder, traced in trained.values():
        table = decoder.encoding.weight if decoder.config.encoding == "t5" else None
        rows = compare_templates(traced, ["t5_fitted"], t5_table=table, n_bootstrap=200)
        assert (rows["value"] < rows["null_shuffled"]).all()
        first = rows[rows["layer"] == 0]
        assert first["explained"].max() > 0.4 and (rows["explained"] < 1).all()
