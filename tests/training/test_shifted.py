import dataclasses
import tempfile

import pytest
import torch
from torch.nn.functional import cross_entropy

from probe.errors import ProbeError
from probe.measure import Case, TracedSequences
from probe.measure.shifted import shifted
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.pretrained import load_pretrained
from probe.study import StudyData
from probe.training import encode, exact_match, predict, train
from probe.training.shifted import SHIFTS, shifted_positions, shifted_texts

UNMOVED, MOVED = ("none", "t5", "alibi", "rotary"), ("learned", "sinusoidal")


def decoder(encoding, task):
    config = DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=64, n_layers=2, d_model=32, n_heads=4, encoding=encoding)
    model = Decoder(config, seed=0).eval()
    if encoding == "learned":
        torch.nn.init.normal_(model.encoding.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("encoding", [*UNMOVED, *MOVED])
def test_only_absolute_positions_move(encoding, task, splits):
    data = encode(splits.validation, task.vocabulary)
    rows = shifted_positions(decoder(encoding, task), data, (0, 1, 5, 30), n_bootstrap=20).set_index(
        ["metric", "shift"]
    )
    change = rows.loc["loss_change", "value"]
    assert change[0] == 0
    if encoding in UNMOVED:
        assert change.abs().max() < 1e-6
        assert (rows.loc["exact_match_change", "value"] == 0).all()
    else:
        assert (change[change.index > 0].abs() > 1e-3).all()
        assert ((rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])).all()


def test_numbers_are_those_of_one_example_at_a_time(task, splits):
    model, examples = decoder("sinusoidal", task), splits.validation[:9]
    rows = shifted_positions(model, encode(examples, task.vocabulary), (7,), n_bootstrap=10)
    found = rows.set_index("metric")["value"]
    losses, right, exact = [], [], []
    for example in examples:
        prompt, completion = task.vocabulary.prompt(example), task.vocabulary.completion(example)
        tokens = torch.tensor([prompt + completion])
        logits = model(tokens[:, :-1], positions=torch.arange(7, 6 + tokens.shape[1]))[0, len(prompt) - 1 :].double()
        losses += cross_entropy(logits, torch.tensor(completion), reduction="none").tolist()
        right += (logits.argmax(-1) == torch.tensor(completion)).tolist()
        exact.append(all(right[-len(completion) :]))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["exact_match"] == pytest.approx(sum(exact) / len(exact))


def test_unshifted_exact_match_is_that_of_greedy_decoding(task, splits, data, small, quick):
    trained = train(small, data, dataclasses.replace(quick, steps=400), device="cpu")
    rows = shifted_positions(trained, encode(splits.validation, task.vocabulary), (0,), n_bootstrap=2)
    greedy = exact_match(predict(trained, splits.validation, task.vocabulary)).iloc[0]["value"]
    assert 0 < greedy < 1
    assert rows.set_index("metric").loc["exact_match", "value"] == pytest.approx(greedy)


def test_a_clock_comes_round(task, splits):
    """A clockwork RNN is back where it was when its slowest module is."""
    model = ClockworkRNN(ClockworkConfig(d_vocab=len(task.vocabulary), d_model=33, n_modules=3), seed=0).eval()
    rows = shifted_positions(model, encode(splits.validation, task.vocabulary), (1, 2, 3, 4, 8), n_bootstrap=2)
    change = rows[rows["metric"] == "loss_change"].set_index("shift")["value"].abs()
    assert (change[[4, 8]] < 1e-6).all() and (change[[1, 2, 3]] > 1e-4).all()


def test_a_study_shifts_a_clockwork_rnn_too(task, splits):
    """It knows any position: every shift is looked at."""
    model = ClockworkRNN(ClockworkConfig(d_vocab=len(task.vocabulary), d_model=33, n_modules=3), seed=0).eval()
    data = StudyData(task, splits, *(encode(part, task.vocabulary) for part in (splits.train, splits.validation)))
    assert [
        *shifted(Case("a", [model], TracedSequences(data.held_out.tokens), examples=data), most=4)["shift"].unique()
    ] == [*SHIFTS]


def test_bad_input_is_one_clear_line(task, splits):
    data = encode(splits.validation, task.vocabulary)
    with pytest.raises(ProbeError, match="shifts must be an integer of at least 0, got -1"):
        shifted_positions(decoder("none", task), data, (-1,))
    with pytest.raises(ProbeError, match="the learned position table has 64 positions"):
        shifted_positions(decoder("learned", task), data, (60,))


def test_texts_are_examples_of_which_all_but_the_first_token_is_said(make_decoder, random_tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = random_tokens(batch=5)
    decoder = make_decoder(encoding="learned")  # n_ctx 32, texts of 16
    rows = shifted_texts(decoder, texts)
    assert rows["shift"].unique().tolist() == [0, 1, 2, 4, 8, 16]
    by_shift = rows[rows["metric"] == "loss"].set_index("shift")["value"]
    for shift in (0, 4):
        with torch.no_grad():
            logits = decoder(texts, positions=torch.arange(16) + shift)
        wanted = cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
        assert by_shift[shift] == pytest.approx(float(wanted), rel=1e-6)
    # As transformers shifts them.
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=19, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
    with torch.no_grad():
        loss = theirs(texts, position_ids=torch.arange(8, 24)[None], labels=texts).loss
    found = shifted_texts(ours, texts, [8])
    assert found[found["metric"] == "loss"]["value"].item() == pytest.approx(float(loss), rel=1e-5)
