"""Released models that our decoder cannot be: Hugging Face's own class under a ``TransformerBridge``, checked first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.errors import ProbeError
from probe.files import read_json_object
from probe.models import checkpoint
from probe.models.config import MOST
from probe.models.families import FAMILIES, Fields
from probe.models.lens.check import Witness, check_bridge
from probe.models.lens.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

# Families that the tests load in this way and hold against Hugging Face's, by ``model_type``: where they have their
# positions from. Others are tried, and refused where ``check_bridge`` finds anything wrong.
BRIDGED = {
    "qwen2": "rotary",
    "qwen3": "rotary, queries and keys normalised",
    "mistral": "rotary, a window in some releases",
    "gemma": "rotary",
    "gemma2": "rotary, a window in every second layer",
    "gemma3_text": "rotary, a window in five layers of six",
    "phi": "rotary in a part of each head",
    "phi3": "rotary",
    "stablelm": "rotary in a part of each head",
    "olmo": "rotary",
    "olmo2": "rotary, queries and keys normalised",
    "starcoder2": "rotary",
    "gpt_bigcode": "learned",
    "granite": "rotary",
    "cohere": "rotary",
    "cohere2": "rotary with a window, none in every fourth layer",
    "nemotron": "rotary in a part of each head",
    "glm": "rotary in a part of each head",
}


# Under which keys configs say how many layers there are.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def load_bridge(folder: Path, device: torch.device, dtype: torch.dtype | None) -> "TransformerBridge":
    """The model in a folder of Hugging Face's format, as Hugging Face's class for it under a ``TransformerBridge``.

    Nothing is believed of it: ``check_bridge`` compares it with the class itself before it is handed out. There is no
    tokenizer; tokens are ids.

    Raises:
        ProbeError: for a kind of model that Hugging Face or TransformerLens does not know, a config that names code of
            its own, weights that are missing or unknown, or a bridge that is not exact.
    """
    import transformers

    path = folder / checkpoint.CONFIG_FILE
    values = read_json_object(path)
    name = values.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        raise ProbeError(
            f"{path}: unknown model_type {name!r}; known: {', '.join(sorted({*FAMILIES, *BRIDGED}))}, and others that "
            "transformers knows"
        )
    if values.get("auto_map") is not None:
        raise ProbeError(
            f"{path}: 'auto_map' must be absent, got code of the checkpoint's own, which is never run; where "
            "transformers' own class is meant, take it out of a copy"
        )
    for key in LAYERS:  # transformers would make each of them before it sees that the files hold fewer
        Fields(values, path).size(key, default=None, most=MOST["n_layers"])
    if values.get("is_encoder_decoder"):
        raise ProbeError(
            f"{path}: 'is_encoder_decoder' must be false: a decoder alone was wanted, whose tokens know their position "
            "from those before them only, and not from an encoder too"
        )
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="eager",
                dtype=dtype or "auto",
                output_loading_info=True,
            )
    except Exception as error:  # of many kinds; what the checkpoint makes of them is the user's to mend
        raise ProbeError(f"{folder}: transformers cannot load it: {_first_line(error)}") from None
    model, said = loaded  # a pair, as output_loading_info asks for
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if said.get(what):
            key = sorted(map(str, said[what]))[0]
            raise ProbeError(
                f"{folder}: {what.replace('_', ' ')} in its weights: {key!r} and {len(said[what]) - 1} more"
            )
    return _bridge(model.to(device).eval(), str(folder))


def untrained_bridge(bridge: "TransformerBridge", seed: int) -> "TransformerBridge":
    """The same architecture with fresh weights, as Hugging Face draws them: the control of what training did."""
    import transformers

    old = bridge.original_model
    if not isinstance(getattr(old, "config", None), transformers.PreTrainedConfig):
        raise ProbeError(
            f"a model of Hugging Face's was wanted, to draw another like it, got {type(old).__name__}: "
            "hand one over as untrained="
        )
    parameter = next(old.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(old.config, attn_implementation="eager")
    return _wrap(model.to(parameter.device, parameter.dtype).eval(), old.config)


def _bridge(model: "PreTrainedModel", whose: str) -> "TransformerBridge":
    # What the class itself does is seen before TransformerLens puts its own modules into it.
    witness = Witness.of(model, whose)
    bridge = _wrap(model, model.config, whose)
    check_bridge(bridge, witness, whose)
    return bridge


def _wrap(model: "PreTrainedModel", config: Any, whose: str = "") -> "TransformerBridge":
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        return build_bridge_from_module(model, type(model).__name__, hf_config=config)
    except Exception as error:
        raise ProbeError(
            f"{whose}: TransformerLens cannot bridge a {type(model).__name__}: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
