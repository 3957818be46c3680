"""A training step beside those of the libraries that people use, and beside its own matrix products.

    OMP_NUM_THREADS=1 python -m benchmarks.training
    OMP_NUM_THREADS=2 python -m benchmarks.training

On the CPU in float32: 4 layers, d_model 256, 8 heads, a vocabulary of 128, 32 sequences of 64 tokens. A step is the
forward pass, the loss over all tokens, the backward pass and fused AdamW, the same for all. Peers are made from their
configs with their own defaults (GPT-2's and T5's dropout of 0.1 included; where a size must be said, it is ours, and
SwiGLU's hidden layer has the width at which Llama has as many parameters). ``TransformerLens`` is its native model. The
floor is the products that a step cannot do without, forward and backward, as bare ``torch.mm`` and ``torch.bmm`` on
matrices that lie ready.

Then: what ``train`` spends on its batches, how many slots of these are padding, and greedy decoding of 256 tokens with
a cache and without.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import seconds
from probe.models.decoder import Decoder, DecoderConfig
from probe.tasks import make_task
from probe.training import EncodedExamples, TrainingConfig, encode, greedy, train
from probe.training.data import BatchOrder

BATCH, LENGTH, D_VOCAB, D_MODEL, N_LAYERS, N_HEADS = 32, 64, 128, 256, 4, 8
ENCODINGS = ("none", "learned", "sinusoidal", "t5", "alibi", "rotary")
TASKS = ("copy", "addition", "scan", "lego", "pcfg")


def config(**options) -> DecoderConfig:
    size = {"d_vocab": D_VOCAB, "n_ctx": LENGTH, "n_layers": N_LAYERS, "d_model": D_MODEL, "n_heads": N_HEADS}
    return DecoderConfig(**(size | options))


def step_of(model: nn.Module, logits_of=lambda output: output):
    """One training step, to be called again and again."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(D_VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        logits = logits_of(model(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformer_lens(positions: str, n_ctx: int = LENGTH) -> nn.Module:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(
        TransformerBridgeConfig(
            d_model=D_MODEL,
            d_head=D_MODEL // N_HEADS,
            n_layers=N_LAYERS,
            n_ctx=n_ctx,
            n_heads=N_HEADS,
            d_vocab=D_VOCAB,
            act_fn="gelu",
            positional_embedding_type=positions,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": LENGTH, "vocab_size": D_VOCAB}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS}
    return LlamaForCausalLM(LlamaConfig(**size, intermediate_size=683, vocab_size=D_VOCAB))


class T5Decoder(nn.Module):
    """T5's decoder without its encoder, which leaves cross-attention idle, and a head."""

    def __init__(self):
        super().__init__()
        from transformers import T5Config
        from transformers.models.t5.modeling_t5 import T5Stack

        size = {"d_model": D_MODEL, "d_kv": D_MODEL // N_HEADS, "d_ff": 4 * D_MODEL, "num_heads": N_HEADS}
        made = T5Config(**size, num_layers=N_LAYERS, vocab_size=D_VOCAB, is_decoder=True, is_encoder_decoder=False)
        self.stack, self.head = T5Stack(made), nn.Linear(D_MODEL, D_VOCAB, bias=False)

    def forward(self, tokens):
        return self.head(self.stack(tokens).last_hidden_state)


def bare_products():
    """The products of a step: of each forward one x w also the two of its backward, g wᵀ and xᵀ g."""
    n, d, d_head = BATCH * LENGTH, D_MODEL, D_MODEL // N_HEADS
    layer = [(n, d, d)] * 4 + [(n, d, 4 * d), (n, 4 * d, d)]
    plain = [
        (torch.randn(a, b), torch.randn(b, c), torch.randn(a, c)) for a, b, c in layer * N_LAYERS + [(n, d, D_VOCAB)]
    ]
    q = torch.randn(BATCH * N_HEADS, LENGTH, d_head)
    pattern = torch.randn(BATCH * N_HEADS, LENGTH, LENGTH)

    def products() -> None:
        for x, w, g in plain:
            torch.mm(x, w), torch.mm(g, w.T), torch.mm(x.T, g)
        for _ in range(N_LAYERS):
            for x, w, g in ((q, q.mT, pattern), (pattern, q, q)):
                torch.bmm(x, w), torch.bmm(g, w.mT), torch.bmm(x.mT, g)

    return products


def row(name: str, target: str, measured: str) -> None:
    print(f"| {name} | {target} | {measured} |", flush=True)


def steps(repeats: int = 9) -> None:
    def of_output(output):
        return output.logits

    ours = {encoding: step_of(Decoder(config(encoding=encoding))) for encoding in ENCODINGS}
    lens = {
        "TransformerLens, learned": step_of(transformer_lens("standard")),
        "TransformerLens, rotary": step_of(transformer_lens("rotary")),
    }
    others = {
        "GPT2LMHeadModel": step_of(gpt2(), of_output),
        "LlamaForCausalLM": step_of(llama(), of_output),
        "T5's decoder": step_of(T5Decoder()),
    }
    taken = seconds(ours | lens | others | {"products": bare_products()}, repeats=repeats)
    for encoding in ENCODINGS:
        row(f"ours, {encoding}: tokens a second", "", f"{BATCH * LENGTH / taken[encoding]:,.0f}")
    like = {"TransformerLens, rotary": "rotary", "LlamaForCausalLM": "rotary", "T5's decoder": "t5"}
    for name in (*lens, *others):
        encoding = like.get(name, "learned")
        target = "2" if name in lens else "1.7"
        row(f"than {name}, ours ({encoding}) is times faster", target, f"{taken[name] / taken[encoding]:.2f}")
    row("of the speed of the bare products (none)", "≥ 75 %", f"{100 * taken['products'] / taken['none']:.0f} %")
    for encoding in ENCODINGS[1:]:
        slower = 100 * (taken[encoding] / taken["none"] - 1)
        row(f"{encoding} slower than none", "≤ 8 %" if encoding == "rotary" else "≤ 5 %", f"{slower:.1f} %")


def data_of_a_step() -> None:
    tokens = torch.randint(D_VOCAB, (40 * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    n = torch.full((len(tokens),), LENGTH + 1)
    data = EncodedExamples(tokens, torch.ones_like(n), n)
    for name, size, n_steps in (("", {}, 12), (", 2 layers, d_model 32", {"n_layers": 2, "d_model": 32}, 60)):
        entries: list[dict] = []
        training = TrainingConfig(steps=n_steps, batch_size=BATCH, log_every=n_steps // 4)
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


def decoding(n_new: int = 256) -> None:
    decoder = Decoder(config(encoding="rotary", n_ctx=512)).eval()
    prompts = torch.randint(D_VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))

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
        "5",
        f"{taken['without'] / taken['with']:.1f}",
    )


def main() -> None:
    print(f"{torch.get_num_threads()} threads\n\n| | target | measured |\n|---|---|---|")
    steps()
    data_of_a_step()
    padding()
    decoding()


if __name__ == "__main__":
    main()
