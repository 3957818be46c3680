"""All pairs of heads of two models against a loop over pairs and rows, as the released code of the paper has it.

    OMP_NUM_THREADS=1 python -m benchmarks.head_pairs

One layer of one sequence, 12 × 12 heads, float64, one thread: the symmetric Kullback-Leibler divergence and the second
distance (theirs: what they call JSD, ours: the true one) of all 144 pairs. The loop is written anew in the form of
``src/analyzers/attention_kl_analyzer.py`` in McGill-NLP/length-generalization: for a pair, one walk over the query rows
for each distance; for a row, copies of both, a ``KLDivLoss``, two calls of it. (The released code leaves out pairs with
h ≥ h′.) The "lean loop" is the kindest that does the same: one walk, no copies, each logarithm once, the functional
form of the loss.
"""

import itertools

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.timing import seconds
from probe.attention import head_pair_distances

N_HEADS = 12
TARGETS = {48: 400, 256: 150}  # by length: how many times faster than the loop


def symmetric_kl_of_rows(p, q):
    p, q = p.clone(), q.clone()
    kl = torch.nn.KLDivLoss(reduction="sum")
    return kl(p.log(), q) + kl(q.log(), p)


def released_jsd_of_rows(p, q):
    p, q = p.clone(), q.clone()
    m = 0.5 * (p + q)
    kl = torch.nn.KLDivLoss(reduction="sum")
    return 0.5 * (kl(p.log(), m) + kl(q.log(), m))


def loop(a, b):
    """Both distances of all pairs, "distance head_a head_b"."""
    found = torch.empty(2, len(a), len(b), dtype=torch.float64)
    for h, k in itertools.product(range(len(a)), range(len(b))):
        for i, of_rows in enumerate((symmetric_kl_of_rows, released_jsd_of_rows)):
            rows = [of_rows(a[h, t, : t + 1], b[k, t, : t + 1]).numpy() for t in range(a.shape[-1])]
            found[i, h, k] = float(np.mean(rows))
    return found


def lean_loop(a, b):
    found = torch.empty(2, len(a), len(b), dtype=torch.float64)
    for h, k in itertools.product(range(len(a)), range(len(b))):
        kl = jsd = torch.zeros((), dtype=torch.float64)
        for t in range(a.shape[-1]):
            p, q = a[h, t, : t + 1], b[k, t, : t + 1]
            ln_p, ln_q, m = p.log(), q.log(), (p + q) / 2
            kl = kl + F.kl_div(ln_p, q, reduction="sum") + F.kl_div(ln_q, p, reduction="sum")
            jsd = jsd + F.kl_div(ln_p, m, reduction="sum") + F.kl_div(ln_q, m, reduction="sum")
        found[:, h, k] = torch.stack([kl, jsd / 2]) / a.shape[-1]
    return found


def ours(a, b):
    return head_pair_distances(a, b, "symmetric_kl"), head_pair_distances(a, b, "jensen_shannon")


def random_pattern(length: int, seed: int) -> torch.Tensor:
    scores = 2 * torch.randn(1, N_HEADS, length, length, generator=torch.Generator().manual_seed(seed)).double()
    return scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def check(a, b) -> None:
    """The three agree, the second distance by ``jensen_shannon = symmetric_kl / 4 - released``."""
    kl, jsd = (x[0] for x in ours(a, b))
    for found in (loop(a[0], b[0]), lean_loop(a[0], b[0])):
        torch.testing.assert_close(found[0], kl, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[0] / 4 - found[1], jsd, rtol=1e-10, atol=1e-12)


def main() -> None:
    torch.set_num_threads(1)
    print("| length | released loop, s | lean loop, s | ours, ms | target | times faster | than the lean loop |")
    print("|---|---|---|---|---|---|---|")
    for length, target in TARGETS.items():
        a, b = random_pattern(length, 1), random_pattern(length, 2)
        check(a, b)
        slow = {"loop": lambda a=a, b=b: loop(a[0], b[0]), "lean": lambda a=a, b=b: lean_loop(a[0], b[0])}
        # Ours runs fifty times in each turn, so that its part is no shorter than what a clock and a scheduler disturb.
        taken = seconds(slow | {"ours": lambda a=a, b=b: [ours(a, b) for _ in range(50)]}, repeats=5)
        fast = taken["ours"] / 50
        print(
            f"| {length} | {taken['loop']:.2f} | {taken['lean']:.2f} | {1000 * fast:.2f} | {target} | "
            f"{taken['loop'] / fast:.0f} | {taken['lean'] / fast:.0f} |"
        )


if __name__ == "__main__":
    main()
