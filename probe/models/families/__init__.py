"""Families of released models, by the ``model_type`` of their ``config.json``, or a name that only a caller gives."""

from probe.models.families.base import Family, Weight
from probe.models.families.bloom import Bloom
from probe.models.families.custom_t5 import CustomT5
from probe.models.families.falcon import Falcon, RefinedWeb
from probe.models.families.fields import Fields
from probe.models.families.gpt2 import GPT2
from probe.models.families.gpt_neox import GPTNeoX
from probe.models.families.llama import Llama
from probe.models.families.llama_nope import LlamaNoPE
from probe.models.families.mpt import MPT
from probe.models.families.opt import OPT
from probe.models.families.smollm3 import SmolLM3

__all__ = ["FAMILIES", "Family", "Fields", "Weight"]


#: Families whose models become our decoder, by ``model_type``; the last by a name that only a caller gives.
FAMILIES: dict[str, type[Family]] = {
    "llama": Llama,
    "smollm3": SmolLM3,
    "gpt2": GPT2,
    "gpt_neox": GPTNeoX,
    "bloom": Bloom,
    "mpt": MPT,
    "opt": OPT,
    "falcon": Falcon,
    "RefinedWebModel": Falcon,
    "RefinedWeb": RefinedWeb,
    "custom_decoder_only_t5": CustomT5,
    "llama_nope": LlamaNoPE,
}
