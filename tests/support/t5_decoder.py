"""McGill's decoder-only T5, whose class is not in transformers, out of T5's own blocks."""

import json

import torch
import transformers
from released import Observed, inputs_of
from safetensors.torch import save_file


@torch.no_grad()
def t5_decoder(folder, kind="none", tied=True, n=40):
    """A tiny model of McGill's in T5's own blocks, saved under its names: a function from tokens to what they make.

    T5's bias of distances, with a bucket for each, is ALiBi's or none; rotary positions are GPT-J's, turned behind T5's
    projections.
    """
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    n_heads, d_head = 3, 16
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=19,
        d_model=32,
        d_kv=d_head,
        d_ff=48,
        num_layers=2,
        num_heads=n_heads,
        relative_attention_num_buckets=2 * n,
        relative_attention_max_distance=4 * n,
        feed_forward_proj="relu",
        attn_implementation="eager",
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise / 4 if parameter.ndim > 1 else parameter + noise / 4)
    head = model.shared.weight if tied else torch.randn_like(model.shared.weight)
    stack = model.decoder
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    state = {f"decoder.{name}": tensor.clone() for name, tensor in stack.state_dict().items()}
    state |= {"shared.weight": model.shared.weight.clone(), "lm_head.weight": head.clone()}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    values = config.to_dict() | {
        "model_type": "custom_decoder_only_t5",
        "is_decoder": True,
        "is_encoder_decoder": False,
        "position_encoding_type": kind,
        "tie_word_embeddings": tied,
        "auto_map": {"AutoModelForCausalLM": "modeling_custom.Custom"},
    }
    (folder / "config.json").write_text(json.dumps(values))
    slopes = _get_alibi_slopes(n_heads, "cpu") if kind == "alibi" else torch.zeros(n_heads)
    table.copy_(-torch.arange(2.0 * n)[:, None] * slopes)
    if "rotary" in kind:
        sin, cos = create_sinusoidal_positions(n, 4)[None].chunk(2, dim=-1)

        def turn(module, inputs, out):
            heads = out.unflatten(-1, (n_heads, d_head))
            turned = apply_rotary_pos_emb(heads[..., :4], sin, cos)
            return torch.cat((turned, heads[..., 4:]), dim=-1).flatten(-2)

        for block in stack.block:
            block.layer[0].SelfAttention.q.register_forward_hook(turn)
            block.layer[0].SelfAttention.k.register_forward_hook(turn)

    @torch.no_grad()
    def run(tokens):
        with inputs_of([block.layer[0].SelfAttention.o for block in stack.block]) as heads:
            out = stack(input_ids=tokens, output_attentions=True, use_cache=False)
        scale = 32**-0.5 if tied else 1.0
        return Observed(out.last_hidden_state * scale @ head.T, out.attentions, heads)

    return run
