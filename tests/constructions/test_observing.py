"""What is looked at in pieces and in windows is what would be seen of the whole."""

import pytest
import torch

from constructions import observing as module
from constructions.observing import observe, query_windows
from probe.models.decoder import Decoder, DecoderConfig

SITES = ("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(DecoderConfig(d_vocab=9, n_ctx=600, n_layers=2, d_model=8, n_heads=2), seed=0).double().eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(9, (1, length), generator=torch.Generator().manual_seed(1))


def test_wide_layers_see_long_sequences_in_pieces(decoder, monkeypatch):
    passes, forward = [], decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda part, **k: passes.append(part.shape[1]) or forward(part, **k))
    sites = ("hook_embed", "blocks.1.hook_resid_post")
    whole = observe(decoder, tokens(10), sites)
    assert module.MAX_HIDDEN == 2**27 and passes == [10]  # a GiB of float64
    monkeypatch.setattr(module, "MAX_HIDDEN", 4 * decoder.config.d_mlp + 1)
    for path in ("explicit", "fused"):
        passes.clear()
        pieces = observe(decoder, tokens(10), sites, attention=path)
        assert passes == [4, 4, 2] and pieces.keys() == whole.keys()
        for site in sites:
            torch.testing.assert_close(pieces[site], whole[site], atol=1e-12, rtol=0)
    passes.clear()
    observe(decoder, tokens(4), sites), observe(decoder, tokens(10), SITES[:1]), observe(decoder, tokens(10), SITES[1:])
    observe(decoder, tokens(10), sites, edits={"hook_embed": lambda value: value})
    assert passes == [4, 10, 10, 10]
    monkeypatch.setattr(module, "MAX_HIDDEN", 1)
    passes.clear()
    observe(decoder, tokens(3), sites)
    assert passes == [1, 1, 1]


def test_edits_reach_what_is_seen_and_what_is_seen_is_float64(decoder):
    after = "blocks.0.hook_resid_pre"
    seen = observe(decoder, tokens(5), [after], edits={"hook_embed": lambda value: value + 1})[after]
    torch.testing.assert_close(seen, observe(decoder, tokens(5), [after])[after] + 1)
    assert seen.dtype == torch.float64 and not seen.requires_grad


@pytest.mark.parametrize("path", ["explicit", "fused"])
def test_windows_are_rows_of_the_whole(decoder, path):
    whole = observe(decoder, tokens(600), SITES)
    starts = [592 * n // 31 for n in range(32)]
    found = list(query_windows(decoder, tokens(600), SITES, path))
    assert [query.tolist() for query, _ in found] == [list(range(start, start + 8)) for start in starts]
    for query, seen in found:
        for site in SITES:
            end = int(query[-1]) + 1
            torch.testing.assert_close(seen[site], whole[site][:, :, query, :end], atol=1e-12, rtol=0)
    assert len(list(query_windows(decoder, tokens(513), SITES, path))) == 32


def test_up_to_512_tokens_all_queries_are_looked_at(decoder):
    ((query, seen),) = query_windows(decoder, tokens(512), SITES, "fused")
    assert query.tolist() == list(range(512))
    for site, value in observe(decoder, tokens(512), SITES).items():
        torch.testing.assert_close(seen[site], value)
