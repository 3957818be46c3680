"""Rotary positions as Hugging Face's configs write them, as options of ours."""

import math
from collections.abc import Callable
from typing import Any

from probe.errors import ProbeError
from probe.models.families.fields import Fields

TRAINED = "original_max_position_embeddings"


def rotary_options(
    fields: Fields,
    *,
    d_head: int,
    n_ctx: int,
    base: float = 10000.0,
    fraction: float = 1.0,
    base_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
) -> dict[str, Any]:
    """The ``encoding_options`` of a model with rotary positions.

    Newer files have all in ``rope_parameters``, older ones the base beside ``rope_scaling``. ``base`` and ``fraction``
    are the family's own, where the file has neither. Where a key stands twice, transformers' choice is followed: the
    base and the fraction in the dict count, but ``original_max_position_embeddings`` beside it.
    """
    rope = fields.mapping("rope_scaling" if fields.get("rope_scaling", default=None) else "rope_parameters")
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise ProbeError(f"{rope.path}: {name!r} must be one value for all layers, got a JSON object")
    fields.only("head_dim", d_head)  # transformers makes the planes of it, in families too whose heads have no such key
    trained = fields.get(TRAINED, default=None)
    if trained is not None:
        rope = Fields({**rope.values, TRAINED: trained}, rope.path)
    base = rope.number("rope_theta", default=None) or fields.number(base_key, default=base)
    fraction = rope.number("partial_rotary_factor", default=None) or fields.number(fraction_key, default=fraction)
    options: dict[str, Any] = {"base": base}
    width = int(d_head * min(fraction, 2))  # no more than is refused
    if width != d_head:
        if width < 2 or width % 2 or width > d_head:
            raise ProbeError(
                f"{fields.path}: {fraction_key!r} must turn an even number of the {d_head} dimensions, got {fraction:g}"
            )
        options["fraction"] = width / d_head
    kind = "rope_type" if rope.get("rope_type", default=None) else "type"
    return options | rope.choice(kind, SCALINGS, default="default")(rope, n_ctx)


def default(rope: Fields, n_ctx: int) -> dict[str, Any]:
    return {}


def linear(rope: Fields, n_ctx: int) -> dict[str, Any]:
    return {"scaling": "linear", "factor": rope.number("factor")}


def yarn(rope: Fields, n_ctx: int) -> dict[str, Any]:
    trained = rope.size(TRAINED, default=n_ctx)
    factor = rope.number("factor")
    rope.only("truncate", True)
    if rope.values.get("truncate", True) is None:  # the one key here of which null is not what absent is
        raise ProbeError(f"{rope.path}: 'truncate' must be True or absent, got None")
    if rope.get("attention_factor", default=None) is None and rope.get("mscale", default=None):
        rope.only("mscale_all_dim", None)
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(factor) + 1}
    given = {name: rope.number(name, default=None) or value for name, value in usual.items()}
    own = {name: value for name, value in given.items() if not math.isclose(value, usual[name], rel_tol=1e-12)}
    return {"scaling": "yarn", "factor": factor, "trained_length": trained} | own


def llama3(rope: Fields, n_ctx: int) -> dict[str, Any]:
    rope.number("low_freq_factor"), rope.number("high_freq_factor")  # transformers has no defaults of them
    for name, value in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
        rope.only(name, value)
    trained = rope.size(TRAINED, default=n_ctx)
    return {"scaling": "llama3", "factor": rope.number("factor"), "trained_length": trained}


SCALINGS: dict[str, Callable[[Fields, int], dict[str, Any]]] = {
    "default": default,
    "linear": linear,
    "yarn": yarn,
    "llama3": llama3,
}
