"""What the other benchmarks measure, on a CUDA device, in one run of a few minutes.

    python -m benchmarks.gpu

Training under bfloat16 autocast, every encoding, TransformerLens' native model and the bare products: the small model
of ``benchmarks.training``, and the size of Kazemnejad et al. 2023 (12 layers, d_model 768, 12 heads, 107M parameters
with a vocabulary of 14,000), 64 sequences of 128 tokens. Then a trace beside the bare forward pass, greedy decoding
with a cache and without, one forward pass of 16,384 tokens beside that without an encoding, and the streaming
statistics of 32,768 tokens beside one fused attention. Every time includes the wait for the device.

``--tiny --device cpu`` goes through all of it in seconds and measures nothing: it is for trying the script.
"""

import argparse
import sys
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from benchmarks.timing import seconds
from benchmarks.training import ENCODINGS, SMALL, Size, bare_products, config, decoding, row, step_of, transformer_lens
from probe.attention import StreamTemplate, stream_attention
from probe.models.decoder import Decoder
from probe.models.encodings import alibi_slopes
from probe.tracing import PATTERN, RESID_POST, trace

PAPER = Size(12, 768, 12, batch=64, n_ctx=128, length=128, d_vocab=14_000)
TINY = Size(2, 32, 2, batch=4, n_ctx=16, length=16)
Work = Callable[[], object]


def timed(works: Mapping[str, Work], device: str, repeats: int) -> dict[str, float]:
    def waited(work: Work) -> Work:
        def run() -> None:
            work()
            if device != "cpu":
                torch.cuda.synchronize()

        return run

    return seconds({name: waited(work) for name, work in works.items()}, repeats=repeats, warm_up=3)


def training(name: str, size: Size, device: str, repeats: int) -> None:
    def step(model: torch.nn.Module) -> Work:
        return step_of(model.to(device), size, torch.bfloat16)

    # One at a time beside the model without an encoding: seven large models with their moments would fill a device.
    peers = {"TransformerLens, learned": "standard", "TransformerLens, rotary": "rotary"}
    products = bare_products(size, torch.bfloat16, device)
    plain = step(Decoder(config(size, encoding="none")))
    taken = timed({"none": plain, "products": products}, device, repeats)
    row(f"{name}: ours, none: tokens a second", "", f"{size.batch * size.length / taken['none']:,.0f}")
    row(f"{name}: of the speed of the bare products (none)", "", f"{100 * taken['products'] / taken['none']:.0f} %")
    for encoding in ENCODINGS[1:]:
        taken = timed({"none": plain, encoding: step(Decoder(config(size, encoding=encoding)))}, device, repeats)
        row(f"{name}: {encoding} slower than none", "", f"{100 * (taken[encoding] / taken['none'] - 1):.1f} %")
    for peer, positions in peers.items():
        encoding = "rotary" if positions == "rotary" else "learned"
        works = {"ours": step(Decoder(config(size, encoding=encoding))), peer: step(transformer_lens(positions, size))}
        taken = timed(works, device, repeats)
        row(f"{name}: than {peer}, ours is times faster", "", f"{taken[peer] / taken['ours']:.2f}")


@torch.no_grad()
def looking(size: Size, device: str, repeats: int) -> None:
    tokens = torch.randint(size.d_vocab, (size.batch, size.length)).to(device)
    decoder = Decoder(config(size, encoding="learned")).to(device).eval()
    works = {
        "bare": lambda: decoder(tokens),
        "bare, patterns made": lambda: decoder(tokens, attention="explicit"),
        "residual stream": lambda: trace(decoder, tokens, [RESID_POST]),
        "residual stream and patterns": lambda: trace(decoder, tokens, [RESID_POST, PATTERN]),
    }
    taken = timed(works, device, repeats)
    for name in list(works)[1:]:
        row(f"trace: {name}, times the bare pass", "", f"{taken[name] / taken['bare']:.2f}")


@torch.no_grad()
def long_context(size: Size, n: int, device: str, repeats: int) -> None:
    tokens = torch.randint(size.d_vocab, (1, n)).to(device)
    decoders = {
        encoding: Decoder(config(size, encoding=encoding, n_ctx=n)).to(device).eval()
        for encoding in ("none", "rotary", "alibi", "t5")
    }

    def forward(decoder: Decoder) -> None:
        with torch.autocast(device, torch.bfloat16):
            decoder(tokens)

    works = {encoding: lambda decoder=decoder: forward(decoder) for encoding, decoder in decoders.items()}
    taken = timed(works, device, repeats)
    row(f"forward pass of {n:,} tokens, none: seconds", "", f"{taken['none']:.3f}")
    for encoding in list(works)[1:]:
        row(f"forward pass of {n:,} tokens: {encoding}, times none", "", f"{taken[encoding] / taken['none']:.2f}")


@torch.no_grad()
def streaming(n: int, n_heads: int, d_head: int, device: str, repeats: int) -> None:
    q, k, v = torch.randn(3, n_heads, n, d_head, generator=torch.Generator().manual_seed(0)).to(device)
    alibi = {"alibi": StreamTemplate.alibi(alibi_slopes(n_heads))}
    t5 = {"t5": StreamTemplate.t5(torch.randn(32, n_heads))}
    asked = {"entropy, distance, ALiBi": alibi, "entropy, distance, ALiBi, T5": alibi | t5}
    works: dict[str, Work] = {
        "fused": lambda: F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
    }
    for name, templates in asked.items():
        works[name] = lambda templates=templates: stream_attention(q, k, scale=d_head**-0.5, templates=templates)
    taken = timed(works, device, repeats)
    for name in asked:
        ratio = f"{taken[name] / taken['fused']:.2f}"
        row(f"streaming at {n:,} tokens: {name}, times one fused attention in float32", "", ratio)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for trying the script")
    asked = parser.parse_args()
    device, tiny = asked.device, asked.tiny
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("a CUDA device is wanted, got none")
    if device == "cpu" and not tiny:
        sys.exit("these sizes are for a CUDA device: --tiny tries the script on a CPU")
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, torch {torch.__version__}, bfloat16\n")
    print("| | target | measured |\n|---|---|---|")
    for name, size in {"tiny": TINY}.items() if tiny else {"4 layers": SMALL, "107M": PAPER}.items():
        training(name, size, device, 2 if tiny else 15)
        looking(size, device, 2 if tiny else 15)
    decoding(TINY if tiny else PAPER, 8 if tiny else 256, device, target="")
    long_context(TINY if tiny else PAPER, 64 if tiny else 16_384, device, 2 if tiny else 7)
    streaming(64 if tiny else 32_768, 2 if tiny else 8, 64, device, 2 if tiny else 7)


if __name__ == "__main__":
    main()
