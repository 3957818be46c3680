"""TinyLlama-NoPE: a Llama whose rotation is switched off."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from probe.models.config import DecoderConfig
from probe.models.families.base import Shape, Weight
from probe.models.families.fields import Fields
from probe.models.families.llama import Llama


class LlamaNoPE(Llama):
    """A Llama without positions; with HeadScale its queries are multiplied by a number for each head, folded into W_Q.

    Wang et al. 2024. Its authors' code takes the rotation out of Hugging Face's Llama, so that the config
    is that of a Llama with rotary positions: nobody but the user can tell that it is this.
    """

    positions = "none"
    oracle = "Llama without its rotation"
    own_code = True

    def position(self, fields: Fields, d_head: int, n_ctx: int) -> dict[str, Any]:
        return {"encoding": "none"}

    def weights(self, config: DecoderConfig, ours: Mapping[str, Shape]) -> Iterator[Weight]:
        for weight in super().weights(config, ours):
            module, found, _ = weight.key.partition("q_proj")
            yield dataclasses.replace(weight, factor=(f"{module}scale_param", config.n_heads)) if found else weight
