import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from probe.errors import ProbeError
from probe.models.decoder import DecoderConfig
from probe.models.encodings import ENCODINGS
from probe.training.decoding import greedy, greedy_in_groups
from probe.training.evaluation import exact_match, predict


def one_by_one(decoder, prompt, stop, max_new):
    """Greedy decoding with neither cache nor batch."""
    tokens, found = list(prompt), []
    for _ in range(max_new):
        new = int(decoder(torch.tensor([tokens]))[0, -1].argmax())
        if new == stop:
            break
        tokens.append(new)
        found.append(new)
    return found


def acts_in_attention(encoding) -> bool:
    config = DecoderConfig(d_vocab=1, n_ctx=1, n_layers=1, d_model=4, n_heads=1, encoding=encoding)
    return not config.make_encoding().embeds


# Every encoding in both layers and, where it can be, in one alone.
PLACES = [(e, None) for e in ENCODINGS] + [(e, (1,)) for e in ENCODINGS if acts_in_attention(e)]


@pytest.mark.parametrize(("encoding", "position_layers"), PLACES)
def test_greedy_is_decoding_one_by_one(encoding, position_layers, make_decoder, random_tokens):
    decoder = make_decoder(encoding=encoding, position_layers=position_layers, n_kv_heads=2)
    prompts = random_tokens(batch=6, length=7)
    endless = [one_by_one(decoder, p.tolist(), -1, 12) for p in prompts]
    # A token that some continuations come to and others do not, so that they end at different lengths.
    stop = next(token for token in range(19) if 0 < sum(token in e for e in endless) < 6)
    found = greedy(decoder, prompts, stop=stop, max_new=12)
    assert found == [e[: e.index(stop)] if stop in e else e for e in endless]


def test_groups_are_decoded_as_each_alone(make_decoder):
    decoder = make_decoder(encoding="alibi")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 19, (n,), generator=generator).tolist() for n in (3, 9, 3, 4, 9, 9, 1)]
    limits = [5, 9, 6, 7, 8, 4, 9]
    found = greedy_in_groups(decoder, prompts, stop=3, max_new=limits, batch_size=2)
    for prompt, limit, continuation in zip(prompts, limits, found, strict=True):
        assert continuation[:limit] == one_by_one(decoder, prompt, 3, limit)


def test_predictions_are_exact(task, splits, make_decoder):
    decoder = make_decoder(d_vocab=len(task.vocabulary))
    rows = predict(decoder, splits.test[:15], task.vocabulary)
    for row, example in zip(rows.itertuples(), splits.test[:15], strict=True):
        alone = one_by_one(decoder, task.vocabulary.prompt(example), 3, len(example.target) + 1)
        assert row.correct == (task.vocabulary.decode(alone) == list(example.target))
        assert row.target == " ".join(example.target)
    assert decoder.training is False


def test_exact_match_by_length():
    predictions = pd.DataFrame({"length": [3, 3, 3, 5], "correct": [True, True, False, False]})
    rows = exact_match(predictions)
    assert rows["value"].tolist() == [0.5, 2 / 3, 0.0]
    assert rows["n"].tolist() == [4, 3, 1]
    assert rows["length"].isna().tolist() == [True, False, False]
    interval = binomtest(2, 3).proportion_ci(0.95, method="wilson")
    assert (rows["low"][1], rows["high"][1]) == (interval.low, interval.high)


def test_bad_input_is_one_clear_line(make_decoder, random_tokens, task):
    with pytest.raises(ProbeError, match="max_new must be at least 1, got 0"):
        greedy(make_decoder(), random_tokens(), stop=0, max_new=0)
    with pytest.raises(ProbeError, match="at least one example was wanted"):
        predict(make_decoder(), [], task.vocabulary)
