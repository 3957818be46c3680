import re
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binomtest
from tokenized import byte_level, write_texts

from probe.errors import ProbeError
from probe.extrapolation import passkey
from probe.models.decoder import Decoder, DecoderConfig
from probe.tasks import make_task
from probe.tasks.passkey import DEPTHS

TASK = make_task("passkey")
NAMED = make_task("passkey", {"n_keys": 4, "train_length": 300, "test_length": 400})


class Reader(Decoder):
    """Says the key that its last ``window`` tokens hold, by reading them; ``as_said`` is how, "<eos>" behind it."""

    def __init__(self, task, window=10**6, wrong_digit=False, as_said=tuple, d_vocab=None):
        d_vocab = d_vocab or len(task.vocabulary)
        super().__init__(DecoderConfig(d_vocab=d_vocab, n_ctx=9, n_layers=1, d_model=8, n_heads=1))
        self.vocabulary, self.window, self.wrong_digit, self.prompts = task.vocabulary, window, wrong_digit, []
        self.as_said = as_said

    def new_cache(self):
        return SimpleNamespace(said=0, keys=None, keep=lambda rows: None)

    def forward(self, tokens, cache):
        if cache.keys is None:
            self.prompts += tokens.tolist()
            cache.keys = [self.as_said(self.read(row)) for row in tokens.tolist()]
        logits = torch.zeros(len(tokens), 1, self.config.d_vocab)
        for row, key in enumerate(cache.keys):
            word = key[cache.said] if cache.said < len(key) else "<eos>"
            logits[row, 0, self.vocabulary.ids[word]] = 1.0
        cache.said += 1
        return logits

    def read(self, ids):
        text = self.vocabulary.text(self.vocabulary.decode(ids[-self.window :])).decode(errors="replace")
        name = re.search(r"What is the pass key( of \w+)?\?", text)[1] or ""
        key = re.search(rf"The pass key{name} is (\d{{5}})\.", text)
        key = key[1] if key else "00000"
        return key[:4] + str((int(key[4]) + 1) % 10) if self.wrong_digit else key


@pytest.mark.parametrize("task", [TASK, NAMED])
def test_a_reader_is_right_everywhere(task):
    rows = passkey(Reader(task), task, (320, 500), n=3)
    assert (rows["value"] == 1).all() and set(rows["n_keys"]) == {task.n_keys}
    assert rows[rows["depth"].notna()]["n"].eq(3).all() and rows[rows["depth"].isna()]["n"].eq(30).all()
    assert len(rows) == 2 * 2 * 11


def test_one_digit_off_is_no_exact_match():
    rows = passkey(Reader(TASK, wrong_digit=True), TASK, (256,), (0.0, 1.0), n=4).set_index("metric")["value"]
    assert rows["exact_match"].tolist() == [0, 0, 0]
    assert rows["digits"].tolist() == pytest.approx([0.8, 0.8, 0.8])


def test_what_lies_outside_a_window_is_not_said():
    rows = passkey(Reader(TASK, window=200), TASK, (200, 600), n=8)
    by = rows[(rows["metric"] == "exact_match") & rows["depth"].notna()].set_index(["length", "depth"])["value"]
    assert (by[200] == 1).all()
    # Of the 516 bytes of filler, 36 + 5 + … behind the sentence fit into the window: from a depth of 0.78 on.
    assert by[600].to_dict() == {depth: float(depth > 0.75) for depth in DEPTHS}
    overall = rows[(rows["length"] == 600) & rows["depth"].isna() & (rows["metric"] == "exact_match")].iloc[0]
    right = round(overall["value"] * 80)
    interval = binomtest(right, 80).proportion_ci(method="wilson")
    assert (overall["low"], overall["high"]) == pytest.approx((interval.low, interval.high))


def test_every_model_gets_the_same_prompts():
    one, other = Reader(TASK), Reader(TASK)
    passkey(one, TASK, (128, 256), (0.2, 0.8), n=2)
    passkey(other, TASK, (256,), (0.8,), n=2)
    assert len(one.prompts) == 8 and all(prompt in one.prompts for prompt in other.prompts)
    assert len({tuple(prompt) for prompt in one.prompts}) == 8
    again = Reader(TASK)
    passkey(again, TASK, (256,), (0.8,), n=2, seed=1)
    assert not any(prompt in one.prompts for prompt in again.prompts)


@pytest.fixture(scope="module")
def in_tokens(tmp_path_factory):
    """A task of GPT-2's kind of tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    byte_level(folder / "tokenizer")
    return make_task("passkey", {"text": write_texts(folder / "text"), "tokenizer": str(folder / "tokenizer")})


def test_a_reader_of_tokens_is_right_everywhere(in_tokens):
    def going_on(key):
        return in_tokens.vocabulary.tokenize(f" {key}. Remember it.")

    rows = passkey(Reader(in_tokens, as_said=going_on, d_vocab=432), in_tokens, (256, 300), n=3)
    assert (rows["value"] == 1).all()
    wrong = passkey(Reader(in_tokens, as_said=going_on, wrong_digit=True), in_tokens, (256,), (0.5,), n=3)
    assert wrong.set_index("metric")["value"].to_dict() == pytest.approx({"exact_match": 0, "digits": 0.8})
    # In other tokens than the tokenizer's own it is the same key, as far as there are as many of them.
    apart = Reader(in_tokens, as_said=lambda key: ("Ġ", *key))
    digits = passkey(apart, in_tokens, (256,), (0.5,), n=20).query("metric == 'digits'")["value"].iloc[0]
    said = [len(p) for p in apart.prompts]
    assert digits == pytest.approx(sum(min(5, 256 - n - 1) for n in said) / 100) and 0.3 < digits < 1


def test_wrong_input_is_refused(in_tokens):
    with pytest.raises(ProbeError, match="length of a passkey prompt must be an integer of at least 84, got 83"):
        passkey(Reader(TASK), TASK, (83,))
    with pytest.raises(ProbeError, match="depth must lie in 0…1, got 2"):
        passkey(Reader(TASK), TASK, (200,), (2.0,))
    decoder = Decoder(DecoderConfig(d_vocab=19, n_ctx=9, n_layers=1, d_model=8, n_heads=1))
    with pytest.raises(ProbeError, match="a model of 260 tokens was wanted, got one of 19"):
        passkey(decoder, TASK, (200,))
    with pytest.raises(ProbeError, match="a model of at least 400 tokens was wanted, got one of 19"):
        passkey(decoder, in_tokens, (200,))
