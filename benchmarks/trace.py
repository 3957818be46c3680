"""What it costs to look: a trace beside the bare forward pass, and TransformerLens beside both.

    OMP_NUM_THREADS=1 python -m benchmarks.trace

CPU, float32: 4 layers, d_model 256, 8 heads, 32 sequences of 128 tokens, no gradients. The bare forward pass is ours
with nobody looking. TransformerLens' ``run_with_cache`` is that of its native model, with learned positions, as ours.
"""

import torch

from benchmarks.timing import seconds
from benchmarks.training import SMALL, config, row, transformer_lens
from probe.models.decoder import Decoder
from probe.tracing import PATTERN, RESID_POST, trace

BATCH, LENGTH, D_VOCAB = 32, 128, 128


def main() -> None:
    print(f"{torch.get_num_threads()} threads\n\n| | target | measured |\n|---|---|---|")
    tokens = torch.randint(D_VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(config(n_ctx=LENGTH, encoding="learned")).eval()
    lens = transformer_lens("standard", SMALL._replace(n_ctx=LENGTH)).eval()

    def in_lens(*ends: str) -> None:
        lens.run_with_cache(tokens, names_filter=lambda name: name.endswith(ends))

    with torch.no_grad():
        taken = seconds(
            {
                "bare": lambda: decoder(tokens),
                "residual stream": lambda: trace(decoder, tokens, [RESID_POST]),
                "residual stream and patterns": lambda: trace(decoder, tokens, [RESID_POST, PATTERN]),
                "lens, bare": lambda: lens(tokens),
                "lens, residual stream": lambda: in_lens(RESID_POST),
                "lens, residual stream and patterns": lambda: in_lens(RESID_POST, "hook_pattern"),
            },
            repeats=15,
        )
    row("trace of the residual stream, times the bare pass", "", f"{taken['residual stream'] / taken['bare']:.2f}")
    both = "residual stream and patterns"
    row(f"trace of {both}, times the bare pass", "≤ 1.05", f"{taken[both] / taken['bare']:.2f}")
    for name in ("bare", "residual stream", both):
        row(f"TransformerLens, {name}, times our bare pass", "", f"{taken[f'lens, {name}'] / taken['bare']:.2f}")


if __name__ == "__main__":
    main()
