"""SmolLM3: a Llama in which some layers see no position."""

from typing import Any

from probe.errors import ProbeError
from probe.models.config import MOST
from probe.models.families.fields import Fields
from probe.models.families.llama import Llama


class SmolLM3(Llama):
    """Rotary positions but in every fourth layer, which has none (Yang et al. 2025's "RNoPE"). Bakouch et al. 2025."""

    positions = "rotary, none in every fourth layer"
    tied = True
    base = 2000000.0

    def position(self, fields: Fields, d_head: int, n_ctx: int) -> dict[str, Any]:
        fields.size("num_key_value_heads")  # absent it would be 4, and not the number of heads
        n_layers = fields.size("num_hidden_layers", most=MOST["n_layers"])
        interval = fields.size("no_rope_layer_interval", default=4)
        seen = fields.get("no_rope_layers", default=[int((i + 1) % interval != 0) for i in range(n_layers)])
        if not isinstance(seen, list) or len(seen) < n_layers or any(flag not in (0, 1) for flag in seen):
            raise ProbeError(
                f"{fields.path}: 'no_rope_layers' must be a list of 0 and 1 for each of {n_layers} layers, got {seen!r}"
            )
        layers = tuple(layer for layer in range(n_layers) if seen[layer])
        position = super().position(fields, d_head, n_ctx)
        return position if len(layers) == n_layers else position | {"position_layers": layers}
