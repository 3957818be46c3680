"""What no decoder without position encoding can do, whatever its weights: statements that are run, in float64.

Each is checked on random decoders with every parameter drawn, with LayerNorm, RMSNorm and none. Where a statement says
that something *can* be done after all, its quantity counts the draws in which it was not. To add one: write its check,
add it to ``PROPOSITIONS``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from constructions.construction import short
from constructions.observing import observe
from constructions.weights import write_head, zero_weights
from probe.device import gradients
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.encodings import alibi_slopes, t5_bucket

EXACT = 1e-12
D_VOCAB = 11
LAYERS = 3
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"normalization": "rms", "activation": "swiglu", "bias": False},
    {"normalization": "none", "activation": "relu"},
)

Found = dict[str, tuple[float, float]]  # by quantity: the largest error and its tolerance


@dataclass(frozen=True)
class Proposition:
    """A statement, its proof (the docstring of ``find``), and the check of it."""

    name: str  #: its key in ``PROPOSITIONS``
    claim: str  #: one sentence
    source: str  #: paper and section
    find: Callable[[int], Found]  #: from a seed to the largest error and the tolerance of each quantity
    length: int  #: tokens of the longest sequence that is looked at

    def check(self, seed: int = 0) -> pd.DataFrame:
        """Rows with the columns of ``Construction.check``; ``seed`` draws the decoders and tokens."""
        rows = [
            {
                "construction": self.name,
                "claim": self.claim,
                "quantity": quantity,
                "source": self.source,
                "length": self.length,
                "dtype": short(torch.float64),
                "attention": "explicit",
                "largest_error": error,
                "tolerance": tolerance,
                "holds": error <= tolerance,
                "attention_layers": LAYERS,
                "mlp_layers": LAYERS,
                "width": 96,
                "first_failure": None,
                "positions_checked": self.length,
            }
            for quantity, (error, tolerance) in self.find(seed).items()
        ]
        return pd.DataFrame(rows).astype({"first_failure": "Int64"})


def random_decoders(seed: int) -> Iterator[Decoder]:
    """A decoder without position encoding for each of OPTIONS, every parameter drawn at random, biases too."""
    for options in OPTIONS:
        config = DecoderConfig(d_vocab=D_VOCAB, n_ctx=64, n_layers=LAYERS, d_model=24, n_heads=3, d_mlp=96, **options)
        decoder = Decoder(config, seed=seed).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        yield decoder


def constant_string(seed: int) -> Found:
    """Without ``<bos>`` equal tokens have equal hidden states at every position and layer, so nothing can tell t.

    By induction over layers: if all rows of the stream are equal, so are all values, and a mean of equal values, with
    any weights that sum to 1, is that value; norm and MLP act on each row alone. With ``<bos>`` first they differ.
    """
    tokens = torch.full((1, 40), 1 + seed % (D_VOCAB - 1))
    spread, alike = 0.0, 0
    for decoder in random_decoders(seed):
        sites = [site for site in decoder.config.sites() if "resid" in site]
        for hidden in observe(decoder, tokens, sites).values():
            spread = max(spread, ((hidden - hidden[:, :1]).abs().max() / hidden.abs().max()).item())
        marked = tokens.clone()
        marked[:, 0] = 0
        hidden = observe(decoder, marked, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"][0]
        alike += bool(torch.pdist(hidden).min() <= 1e-7 * hidden.abs().max())
    return {"spread over positions": (spread, EXACT), "draws alike with <bos>": (alike, 0)}


def order_of_the_prefix(seed: int) -> Found:
    """Layer 1 does not see the order of the tokens before the last: permuting them permutes the last row of its pattern
    and leaves its output there as it was. Layer 2 sees it.

    A NoPE score of layer 1 is a function of the two tokens; the last row's softmax and weighted mean are sums over the
    prefix, in which the order does not occur. But layer 1's output at an earlier position p depends on which tokens
    came before p, and those are layer 2's keys and values.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, D_VOCAB, (1, 30), generator=generator)
    tokens[:, 0] = 0
    order = torch.cat((torch.tensor([0]), 1 + torch.randperm(28, generator=generator), torch.tensor([29])))
    pattern, output, blind = 0.0, 0.0, 0
    for decoder in random_decoders(seed):
        sites = ["blocks.0.attn.hook_pattern", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
        before, after = observe(decoder, tokens, sites), observe(decoder, tokens[:, order], sites)
        change = after[sites[0]][:, :, -1] - before[sites[0]][:, :, -1, order]
        pattern = max(pattern, change.abs().max().item())
        changes = [
            (after[site][:, -1] - before[site][:, -1]).abs().max() / before[site].abs().max() for site in sites[1:]
        ]
        output = max(output, changes[0].item())
        blind += bool(changes[1] <= 1e-7)
    return {
        "first layer's pattern": (pattern, EXACT),
        "first layer's output": (output, EXACT),
        "draws whose second layer is blind": (blind, 0),
    }


def equal_tokens_in_layer_one(seed: int) -> Found:
    """On [<bos>, x, x] no head of layer 1 gives either x half of the last row: no diagonal, no previous-token head.

    The keys of the two x are equal, so are their scores and weights α, and 2α < 1 as <bos> has some.
    """
    unequal, half = 0.0, 0
    for decoder in random_decoders(seed):
        for x in range(1, D_VOCAB):
            seen = observe(decoder, torch.tensor([[0, x, x]]), ["blocks.0.attn.hook_pattern"])
            last = seen["blocks.0.attn.hook_pattern"][0, :, -1]
            unequal = max(unequal, (last[:, 1] - last[:, 2]).abs().max().item())
            half += int((last[:, 1:] >= 0.5).sum())
    return {"difference of the two weights": (unequal, EXACT), "weights of half or more": (half, 0)}


def least_distance(wanted: Float[Tensor, "key"]) -> tuple[float, float]:
    """The least total variation between a row of a pattern and any that one ``<bos>`` logit makes, and ``<bos>``'s
    weight a there: a for the first key, (1 - a)/(t - 1) for each other. An infimum if a is 0 or 1."""
    # ½ |a - q_1| + ½ Σ_{i>1} |(1-a)/(t-1) - q_i| is convex and piecewise linear in a, so least at an end or a kink.
    n = len(wanted) - 1
    kinks = torch.cat((wanted[:1], 1 - n * wanted[1:], torch.tensor([0.0, 1.0], dtype=torch.float64)))
    a = kinks[(kinks >= 0) & (kinks <= 1)]
    rows = torch.cat((a[:, None], ((1 - a) / n)[:, None].expand(-1, n)), dim=1)
    distance = (rows - wanted).abs().sum(-1) / 2
    best = distance.argmin()
    return distance[best].item(), a[best].item()


def one_bos_logit(seed: int) -> Found:
    """A head of layer 1 that does not look at content has one freedom, ``<bos>``'s logit c; the best it can do is
    known.

    Its scores are c on <bos> and one number elsewhere, so row t is a = e^c/(e^c + t - 1) on <bos> and 1/(e^c + t - 1)
    on every other key. The distance to a wanted row is least at a kink (``least_distance``). Previous token: it stays
    above (t - 2)/(t - 1), the limit c → -∞, at t = 64 98 %: 63 keys share evenly what one should have.
    """
    t = 64
    key = torch.arange(t, dtype=torch.float64)
    targets = {"previous": torch.nn.functional.one_hot(torch.tensor(t - 2), t).double()}
    targets |= {f"slope {m:g}": (m * key).softmax(0) for m in alibi_slopes(8).tolist()}
    config = DecoderConfig(
        d_vocab=2, n_ctx=t, n_layers=1, d_model=2, n_heads=1, d_head=1, d_mlp=1, normalization="none"
    )
    tokens = torch.ones(1, t, dtype=torch.long)
    tokens[:, 0] = 0

    def row(c: float) -> Tensor:
        decoder = Decoder(config, seed=None).double()
        zero_weights(decoder)
        with torch.no_grad():
            decoder.token_embedding.weight[:, 0] = 1
            decoder.token_embedding.weight[0, 1] = 1
        write_head(decoder, 0, 0, query={(0, 0): c}, key={(1, 0): 1.0})
        return observe(decoder, tokens, ["blocks.0.attn.hook_pattern"])["blocks.0.attn.hook_pattern"][0, 0, -1]

    grid = torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    rows = [row(c) for c in grid.tolist()]
    below, off = 0.0, 0.0
    for wanted in targets.values():
        least, a = least_distance(wanted)
        below = max(below, *(least - ((reached - wanted).abs().sum() / 2).item() for reached in rows))
        a = min(max(a, 1e-15), 1 - 1e-15)
        best = row(math.log((t - 1) * a / (1 - a)))
        off = max(off, abs(((best - wanted).abs().sum() / 2).item() - least))
    previous = abs(least_distance(targets["previous"])[0] - (t - 2) / (t - 1))
    return {"nearer than the best": (below, EXACT), "best not reached": (off, 1e-11), "previous": (previous, EXACT)}


def no_gradient(seed: int) -> Found:
    """On equal tokens without ``<bos>`` every pattern is uniform, and no gradient reaches W_Q and W_K: position cannot
    be learned from there. (Any loss; here Σ logits².)

    Equal keys have equal scores. As all values are equal the output does not depend on the weights given to them, so
    its derivative with respect to the scores, and with it to W_Q and W_K, is 0. With <bos> both are gone.
    """
    tokens = torch.full((1, 20), 1 + seed % (D_VOCAB - 1))
    uniform = (1 / torch.arange(1, 21, dtype=torch.float64))[:, None].expand(20, 20).tril()
    uneven, share, without = 0.0, 0.0, 0
    for decoder in random_decoders(seed):
        sites = [f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS)]
        patterns = observe(decoder, tokens, sites).values()
        uneven = max(uneven, *((pattern - uniform).abs().max().item() for pattern in patterns))
        share = max(share, _gradient_share(decoder, tokens))
        marked = tokens.clone()
        marked[:, 0] = 0
        without += _gradient_share(decoder, marked) <= 1e-6
    return {
        "pattern not uniform": (uneven, 1e-10),
        "gradient to W_Q, W_K": (share, 1e-10),
        "draws without one with <bos>": (without, 0),
    }


def _gradient_share(decoder: Decoder, tokens: Tensor) -> float:
    """The largest gradient to any W_Q or W_K, as a share of the largest to any W_V."""
    decoder.zero_grad()
    with gradients():
        decoder(tokens).pow(2).sum().backward()
    attention = [layer.attention for layer in decoder.layers]
    largest = max(_largest_gradient(p) for each in attention for p in (each.q_proj, each.k_proj))
    return largest / max(_largest_gradient(each.v_proj) for each in attention)


def _largest_gradient(projection: nn.Linear) -> float:
    assert projection.weight.grad is not None  # a backward pass has gone by
    return projection.weight.grad.abs().max().item()


def weights_depend_on_length(seed: int) -> Found:
    """On <bos> and equal tokens, with weights that do not know T, neighbouring positions come together as 1/t²:
    whatever is read off with fixed weights that tells t from t + 1 by a fixed amount, t itself or its parity, ends at
    some t.

    In layer 1 the two kinds of tokens have one score each, so the output is v + a_t (v_bos - v) with
    a_t = e^c/(e^c + t - 1): a_t - a_{t+1} = e^c/((e^c + t - 1)(e^c + t)) < e^c/t² for e^c >= 1 (and for t large else).
    Norm and MLP are Lipschitz there; a mean over positions of states that move by O(1/t²) a step, around a limit that
    they approach as 1/t, moves by O(ln t/t²) a step: the same for every further layer, up to logarithms.
    So the weights of all constructions here grow with T, or their number does.

    Quantities: by how much a step of any head of layer 1 exceeds the formula, (a_t - a_{t+1}) |v_bos - v|; and the
    slope of ln |x_{t+1} - x_t| over ln t from t = 256 to 2048 at the last layer, where the queries are divided by
    1000, as large scores of <bos> put off where the fall begins, to t of the order of e^c. It tends to -2 (measured at
    these t: mostly -1.6 to -1.8, once -.8); -1/2 is what is asked for, enough for the steps to vanish.
    """
    slowest, beyond = -math.inf, 0.0
    tokens = torch.full((1, 2049), 1 + seed % (D_VOCAB - 1))
    tokens[:, 0] = 0
    t = torch.arange(1, tokens.shape[1], dtype=torch.float64)[:, None]
    for decoder in random_decoders(seed):
        scores, v, z = (f"blocks.0.attn.hook_{name}" for name in ("attn_scores", "v", "z"))
        row = observe(decoder, tokens[:, :2], [scores, v])
        e_c = (row[scores][0, :, 1, 0] - row[scores][0, :, 1, 1]).exp()
        apart = (row[v][0, 0] - row[v][0, 1]).norm(dim=-1)
        allowed = e_c / ((e_c + t - 1) * (e_c + t)) * apart
        steps = observe(decoder, tokens, [z], attention="fused")[z][0].diff(dim=0).norm(dim=-1)
        beyond = max(beyond, ((steps - allowed) / apart).max().item())
        with torch.no_grad():
            for layer in decoder.layers:
                for parameter in layer.attention.q_proj.parameters():
                    parameter.div_(1000)
        site = f"blocks.{LAYERS - 1}.hook_resid_post"
        step = observe(decoder, tokens, [site], attention="fused")[site][0].diff(dim=0).norm(dim=-1)
        slowest = max(slowest, math.log(step[2047] / step[255]) / math.log(2048 / 256))
    # The scores of some of these decoders reach 10⁶, so e^c is known to 1e-9.
    return {"steps beyond the formula": (beyond, 1e-8), "slope of the steps": (slowest, -0.5)}


def dimensions_of_a_bias(seed: int) -> Found:
    """A bias that is constant beyond a distance D, and another at a largest δ < D, wants d_head >= ⌊T/D⌋ - 1.

    The proof is at ``constructions.kernels.FourierBias``. Here T5's buckets with a random table (constant from D = 113
    on):
    the rank of the scores between the queries and keys of the proof, the future filled with random numbers, less a
    random g(t) of each query, which the softmax does not see.
    """
    generator = torch.Generator().manual_seed(seed)
    T, missing = 2048, 0
    table = torch.randn(32, generator=generator, dtype=torch.float64)
    bias = table[t5_bucket(torch.arange(T))]
    D = int((bias != bias[-1]).nonzero().max()) + 1
    apart = D - 1  # the largest distance with another value
    n = (T - 1 - apart) // D + 1
    query, key = apart + D * torch.arange(n), D * torch.arange(n)
    distance = query[:, None] - key
    for _ in range(8):
        future = torch.randn(n, n, generator=generator, dtype=torch.float64)
        scores = torch.where(distance >= 0, bias[distance.clamp(min=0)], future)
        scores = scores + torch.randn(n, 1, generator=generator, dtype=torch.float64)
        missing = max(missing, T // D - 1 - int(torch.linalg.matrix_rank(scores)))
    return {"dimensions too few": (missing, 0), "bound below 17": (abs(T // D - 1 - 17), 0)}


#: Every statement of what cannot be done, by its name.
PROPOSITIONS: dict[str, Proposition] = {
    each.name: each
    for each in (
        Proposition(
            "constant_string",
            "without <bos> equal tokens have one hidden state at every position; with it they have many",
            "Kazemnejad et al. 2023, section 6; Chi et al. 2023",
            constant_string,
            40,
        ),
        Proposition(
            "order_of_the_prefix",
            "one layer without position encoding is blind to the order of the prefix, two are not",
            "Irie 2025",
            order_of_the_prefix,
            30,
        ),
        Proposition(
            "equal_tokens_in_layer_one",
            "no head of layer 1 attends to itself or to the previous token on [<bos>, x, x]",
            "Barbero et al. 2025, Proposition 5.2",
            equal_tokens_in_layer_one,
            3,
        ),
        Proposition(
            "one_bos_logit",
            "a positional head of layer 1 comes no nearer to a wanted pattern than the best <bos> logit",
            "Barbero et al. 2025, Proposition 5.2, made exact",
            one_bos_logit,
            64,
        ),
        Proposition(
            "no_gradient",
            "equal tokens without <bos> give uniform patterns and no gradient to W_Q and W_K",
            "Kazemnejad et al. 2023, section 6",
            no_gradient,
            20,
        ),
        Proposition(
            "weights_depend_on_length",
            "with fixed weights neighbouring positions come together as 1/t²",
            "Lipschitz argument, after Chi et al. 2023",
            weights_depend_on_length,
            2049,
        ),
        Proposition(
            "dimensions_of_a_bias",
            "a bias that is constant beyond a distance D wants d_head >= T/D - 1",
            "rank argument; Raffel et al. 2020 for the buckets",
            dimensions_of_a_bias,
            2048,
        ),
    )
}
