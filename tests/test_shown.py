import pandas as pd
import torch

import probe
from constructions import CONSTRUCTIONS
from constructions.portraits import portrait
from probe.attention import ScoreSplit, compare_long_context, split_scores
from probe.extrapolation.fitting import FittedScale
from probe.tracing import SCORES

NASTY = "<img src=x onerror=alert(1)>"


def test_a_result_is_shown_by_its_tables(make_decoder, random_tokens):
    decoder, tokens = make_decoder(), random_tokens(4, 12)
    split = split_scores(probe.trace(decoder, tokens, [SCORES]), n_bootstrap=5)
    shown = split._repr_html_()
    assert shown.startswith("<b>ScoreSplit</b>")
    assert f"{len(split.rows):,} rows, the first 5" in shown and f"{len(split.curves):,} rows" in shown
    assert shown.count("<table") == 2 and shown.count("<tr") == 2 * 6
    assert "<b>LongContext</b>" in compare_long_context(decoder, tokens)._repr_html_()


def test_tensors_are_shown_by_shape_and_small_ones_whole(make_decoder, random_tokens):
    traced = probe.trace(make_decoder(), random_tokens(3, 16))
    assert "(3, 16), int64" in traced._repr_html_()
    assert "blocks.0.attn.hook_pattern: (3, 4, 16, 16), float32" in traced._repr_html_()
    fitted = FittedScale(torch.tensor([[1.25, 1.0]]), pd.DataFrame({"step": [0]}))
    assert "<td>1.25</td>" in fitted._repr_html_()
    streamed = probe.stream(make_decoder(), random_tokens(2, 16))._repr_html_()
    assert "0: log_normaliser: (2, 4, 16), float32, entropy: (2, 4, 16), float32" in streamed
    assert len(streamed) < 2000 and "tensor(" not in streamed


def test_portraits_are_shown():
    assert portrait(CONSTRUCTIONS["exact_position"], 8)._repr_html_().count("<table") == 4


def test_what_comes_from_outside_is_escaped():
    rows = pd.DataFrame({NASTY: [NASTY]})
    assert NASTY not in ScoreSplit(rows, rows)._repr_html_()
    assert "&lt;img" in ScoreSplit(rows, rows)._repr_html_()
