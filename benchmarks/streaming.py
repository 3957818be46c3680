"""Streaming statistics against one fused attention of the same queries and keys.

    python -m benchmarks.streaming

8,192 tokens, 8 heads, d_head 64, float32, CPU, on one thread and on two, each in a process of its own. The statistics
are entropy, attended distance, the masses on the first, previous and own key, and both Kullback-Leibler divergences
from ALiBi's template, then from T5's too. Memory is the highest that the process held while the statistics were taken,
less what it held before, queries and keys included.
"""

import os
import resource
import subprocess
import sys

import torch
from torch.nn import functional as F

from benchmarks.timing import seconds
from probe.attention import StreamTemplate, stream_attention
from probe.models.encodings import alibi_slopes

N_TOKENS, N_HEADS, D_HEAD = 8192, 8, 64
TARGETS = {"entropy, distance, ALiBi": 1.35, "entropy, distance, ALiBi, T5": 1.5}  # times one fused attention
MEMORY_TARGET = 100  # MiB above the inputs


def measure(n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(N_HEADS, N_TOKENS, D_HEAD, generator=generator) for _ in range(2))
    alibi = {"alibi": StreamTemplate.alibi(alibi_slopes(N_HEADS))}
    both = alibi | {"t5": StreamTemplate.t5(torch.randn(32, N_HEADS, generator=generator))}
    stream_attention(q[:, :256], k[:, :256], scale=D_HEAD**-0.5, templates=both)  # loads what is loaded at first use

    memory, before = {}, _resident()
    for name, templates in zip(TARGETS, (alibi, both), strict=True):
        # The mark cannot be set back: what the second shows is the higher of both.
        stream_attention(q, k, scale=D_HEAD**-0.5, templates=templates)
        memory[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before

    v = torch.randn(N_HEADS, N_TOKENS, D_HEAD, generator=generator)
    functions = {
        "fused attention": lambda: F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True),
        **{
            name: lambda templates=templates: stream_attention(q, k, scale=D_HEAD**-0.5, templates=templates)
            for name, templates in zip(TARGETS, (alibi, both), strict=True)
        },
    }
    taken = seconds(functions)
    print(f"threads: {n_threads}{'time':>28}{'ratio':>9}{'target':>9}{'memory':>12}{'target':>10}")
    print(f"{'fused attention':<30}{taken['fused attention']:>6.3f} s")
    for name, target in TARGETS.items():
        ratio = taken[name] / taken["fused attention"]
        print(
            f"{name:<30}{taken[name]:>6.3f} s{ratio:>9.2f}{target:>9.2f}{memory[name]:>8.0f} MiB{MEMORY_TARGET:>6} MiB"
        )


def _resident() -> float:
    """What this process holds now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(int(sys.argv[1]))
    else:
        for n in ("1", "2"):
            subprocess.run([sys.executable, "-m", "benchmarks.streaming", n], env=os.environ | {"OMP_NUM_THREADS": n})
