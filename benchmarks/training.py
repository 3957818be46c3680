"""A training step beside those of the libraries that people use, and beside its own matrix products.

    OMP_NUM_THREADS=1 python -m benchmarks.training
    OMP_NUM_THREADS=2 python -m benchmarks.training

On the CPU, in float32 and under bfloat16 autocast, a vocabulary of 128: 4 layers, d_model 256, 8 heads, 32 sequences of
64 tokens; and 12 layers, d_model 768, 12 heads, 8 sequences of 64. A step is the forward pass, the loss over all
tokens, the backward pass and fused AdamW, the same for all. Peers are made from their configs with their own defaults
(GPT-2's and T5's dropout of 0.1 included; where a size must be said, it is ours, and SwiGLU's hidden layer has the
width at which Llama has as many parameters). ``TransformerLens`` is its native model; x-transformers, which nothing
else here wants, is left out where it is not installed (``pip install x-transformers``). Ours takes float32 products as
``train`` does (``probe.device.fast_products``), the others torch's default; then all of them take ours. The floor is
the products that a step cannot do without, forward and backward, as bare ``torch.mm`` and ``torch.bmm`` on matrices
that lie ready, taken as ours.

Then: what ``train`` spends on its batches, how many slots of these are padding, and greedy decoding of 256 tokens with
a cache and without.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import seconds
from probe.device import fast_products, product_kernels
from probe.models.decoder import Decoder, DecoderConfig
from probe.tasks import make_task
from probe.training import EncodedExamples, TrainingConfig, encode, greedy, train
from probe.training.data import BatchOrder

LENGTH, D_VOCAB = 64, 128


class Size(NamedTuple):
    """Of a model, and of a batch of it."""

    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 8
    batch: int = 32
    n_ctx: int = LENGTH
    length: int = LENGTH  # of the sequences of a step
    d_vocab: int = D_VOCAB


SMALL, LARGE = Size(), Size(12, 768, 12, 8)
ENCODINGS = ("none", "learned", "sinusoidal", "t5", "alibi", "rotary")
TASKS = ("copy", "addition", "scan", "lego", "pcfg")


def config(size: Size = SMALL, **options) -> DecoderConfig:
    shape = {"n_ctx": size.n_ctx, "n_layers": size.n_layers, "d_model": size.d_model, "n_heads": size.n_heads}
    return DecoderConfig(d_vocab=size.d_vocab, **(shape | options))


def step_of(model: nn.Module, size: Size, dtype: torch.dtype, logits_of=lambda output: output):
    """One training step, to be called again and again, where the model is."""
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    drawn = torch.randint(size.d_vocab, (size.batch, size.length + 1), generator=torch.Generator().manual_seed(0))
    tokens = drawn.to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = logits_of(model(tokens[:, :-1]))
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformer_lens(positions: str, size: Size = SMALL) -> nn.Module:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(
        TransformerBridgeConfig(
            d_model=size.d_model,
            d_head=size.d_model // size.n_heads,
            n_layers=size.n_layers,
            n_ctx=size.n_ctx,
            n_heads=size.n_heads,
            d_vocab=size.d_vocab,
            act_fn="gelu",
            positional_embedding_type=positions,
        )
    )


def gpt2(size: Size) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": size.d_model, "n_layer": size.n_layers, "n_head": size.n_heads, "n_positions": size.length}
    return GPT2LMHeadModel(GPT2Config(**shape, vocab_size=size.d_vocab, bos_token_id=0, eos_token_id=0))


def llama(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": size.d_model, "num_hidden_layers": size.n_layers, "num_attention_heads": size.n_heads}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=8 * size.d_model // 3, vocab_size=size.d_vocab))


class T5Decoder(nn.Module):
    """T5's decoder without its encoder, which leaves cross-attention idle, and a head."""

    def __init__(self, size: Size):
        super().__init__()
        from transformers import T5Config
        from transformers.models.t5.modeling_t5 import T5Stack

        shape = {"d_model": size.d_model, "d_kv": size.d_model // size.n_heads, "d_ff": 4 * size.d_model}
        shape |= {"num_heads": size.n_heads, "num_layers": size.n_layers}
        made = T5Config(**shape, vocab_size=size.d_vocab, is_decoder=True, is_encoder_decoder=False)
        self.stack, self.head = T5Stack(made), nn.Linear(size.d_model, size.d_vocab, bias=False)

    def forward(self, tokens):
        return self.head(self.stack(tokens).last_hidden_state)


def x_transformers(size: Size) -> dict[str, nn.Module]:
    """Its decoder, or nothing where it is not installed."""
    try:
        from x_transformers import Decoder as Layers
        from x_transformers import TransformerWrapper
    except ModuleNotFoundError as error:
        print(f"without x-transformers: {error}", file=sys.stderr)
        return {}
    layers = Layers(
        dim=size.d_model, depth=size.n_layers, heads=size.n_heads, attn_dim_head=size.d_model // size.n_heads
    )
    return {"x-transformers": TransformerWrapper(num_tokens=size.d_vocab, max_seq_len=size.n_ctx, attn_layers=layers)}


def bare_products(size: Size, dtype: torch.dtype, device: str = "cpu"):
    """The products of a step: of each forward one x w also the two of its backward, g wᵀ and xᵀ g."""
    n, d, d_head = size.batch * size.length, size.d_model, size.d_model // size.n_heads
    layer = [(n, d, d)] * 4 + [(n, d, 4 * d), (n, 4 * d, d)]

    def drawn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    plain = [(drawn(a, b), drawn(b, c), drawn(a, c)) for a, b, c in layer * size.n_layers + [(n, d, size.d_vocab)]]
    q = drawn(size.batch * size.n_heads, size.length, d_head)
    pattern = drawn(size.batch * size.n_heads, size.length, size.length)

    def products() -> None:
        for x, w, g in plain:
            torch.mm(x, w), torch.mm(g, w.T), torch.mm(x.T, g)
        for _ in range(size.n_layers):
            for x, w, g in ((q, q.mT, pattern), (pattern, q, q)):
                torch.bmm(x, w), torch.bmm(g, w.mT), torch.bmm(x.mT, g)

    return products


def fast(work: Callable[[], None]) -> Callable[[], None]:
    def with_fast_products() -> None:
        with fast_products(torch.device("cpu")):
            work()

    return with_fast_products


def row(name: str, target: str, measured: str) -> None:
    print(f"| {name} | {target} | {measured} |", flush=True)


def steps(size: Size, dtype: torch.dtype, repeats: int) -> None:
    def of_output(output):
        return output.logits

    def step(model: nn.Module, **options):
        return step_of(model, size, dtype, **options)

    ours = {encoding: fast(step(Decoder(config(size, encoding=encoding)))) for encoding in ENCODINGS}
    lens = {
        "TransformerLens, learned": step(transformer_lens("standard", size)),
        "TransformerLens, rotary": step(transformer_lens("rotary", size)),
    }
    others = {
        "GPT2LMHeadModel": step(gpt2(size), logits_of=of_output),
        "LlamaForCausalLM": step(llama(size), logits_of=of_output),
        "T5's decoder": step(T5Decoder(size)),
    } | {name: step(model) for name, model in x_transformers(size).items()}
    works = ours | lens | others | {"products": fast(bare_products(size, dtype))}
    if dtype == torch.float32:
        works |= {f"{name}, our products": fast(work) for name, work in (lens | others).items()}
    taken = seconds(works, repeats=repeats)
    half, what = dtype != torch.float32, f"{size.n_layers} layers, {str(dtype).removeprefix('torch.')}: "
    for encoding in ENCODINGS:
        row(f"{what}ours, {encoding}: tokens a second", "", f"{size.batch * size.length / taken[encoding]:,.0f}")
    like = {"TransformerLens, rotary": "rotary", "LlamaForCausalLM": "rotary", "T5's decoder": "t5"}
    for name in (*lens, *others):
        encoding = like.get(name, "learned")
        target = ("1.4" if half else "2") if name in lens else ("" if half else "1.7")
        row(f"{what}than {name}, ours ({encoding}) is times faster", target, f"{taken[name] / taken[encoding]:.2f}")
        same = taken.get(f"{name}, our products")
        if same is not None:
            row(
                f"{what}than {name} with our products, ours ({encoding}) is times faster",
                "",
                f"{same / taken[encoding]:.2f}",
            )
    share = f"{100 * taken['products'] / taken['none']:.0f} %"
    row(f"{what}of the speed of the bare products (none)", "" if half else "≥ 75 %", share)
    for encoding in ENCODINGS[1:]:
        slower = 100 * (taken[encoding] / taken["none"] - 1)
        row(f"{what}{encoding} slower than none", "≤ 8 %" if encoding == "rotary" else "≤ 5 %", f"{slower:.1f} %")


def data_of_a_step() -> None:
    tokens = torch.randint(D_VOCAB, (40 * SMALL.batch, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    n = torch.full((len(tokens),), LENGTH + 1)
    data = EncodedExamples(tokens, torch.ones_like(n), n)
    for name, size, n_steps in (("", {}, 12), (", 2 layers, d_model 32", {"n_layers": 2, "d_model": 32}, 60)):
        entries: list[dict] = []
        training = TrainingConfig(steps=n_steps, batch_size=SMALL.batch, log_every=n_steps // 4)
        train(config(**size), data, training, device="cpu", on_log=entries.append)
        shares = [entry["data_share"] for entry in entries[1:]]
        row(f"share of a step spent on its batch{name}", "< 5 %", f"{100 * sum(shares) / len(shares):.2f} %")


def padding() -> None:
    for name in TASKS:
        task = make_task(name)
        lengths = encode(task.splits(n_train=20_000, n_validation=50, n_test=50).train, task.vocabulary).lengths - 1
        order = BatchOrder(lengths, 64, seed=0)
        batches = [lengths[order.rows(step)] for step in range(order.batches_per_epoch)]
        padded = 1 - sum(int(b.sum()) for b in batches) / sum(len(b) * int(b.max()) for b in batches)
        row(f"padding in batches of 64, {name}", "≤ 3 %", f"{100 * padded:.1f} %")


def decoding(size: Size = SMALL, n_new: int = 256, device: str = "cpu", target: str = "5") -> None:
    decoder = Decoder(config(size, encoding="rotary", n_ctx=2 * n_new)).to(device).eval()
    prompts = torch.randint(size.d_vocab, (4, 8), generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def without_cache():
        tokens = prompts
        for _ in range(n_new):
            tokens = torch.cat((tokens, decoder(tokens)[:, -1:].argmax(-1)), dim=1)
        return tokens[:, prompts.shape[1] :].tolist()

    def with_cache():
        return greedy(decoder, prompts, stop=-1, max_new=n_new)

    assert with_cache() == without_cache()
    taken = seconds({"with": with_cache, "without": without_cache}, repeats=3)
    row(
        f"greedy decoding of {n_new} tokens, times faster with the cache",
        target,
        f"{taken['without'] / taken['with']:.1f}",
    )


def main() -> None:
    products = product_kernels(torch.device("cpu"))
    print(
        f"{torch.get_num_threads()} threads; our float32 products: {products}\n\n| | target | measured |\n|---|---|---|"
    )
    for size, repeats in ((SMALL, 9), (LARGE, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            steps(size, dtype, repeats)
    data_of_a_step()
    padding()
    decoding()


if __name__ == "__main__":
    main()
