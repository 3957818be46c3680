"""TinyLlama-NoPE: a Llama whose rotation is switched off."""

import dataclasses

from probe.models.families.llama import Llama


class LlamaNoPE(Llama):
    """A Llama without positions; with HeadScale its queries are multiplied by a number for each head, folded into W_Q.

    Wang et al. 2024. Its authors' code takes the rotation out of Hugging Face's Llama, so that the config
    is that of a Llama with rotary positions: nobody but the user can tell that it is this.
    """

    positions = "none"
    oracle = "Llama without its rotation"
    own_code = True

    def position(self, fields, d_head, n_ctx):
        return {"encoding": "none"}

    def weights(self, config, ours):
        for weight in super().weights(config, ours):
            module, found, _ = weight.key.partition("q_proj")
            yield dataclasses.replace(weight, factor=(f"{module}scale_param", config.n_heads)) if found else weight
