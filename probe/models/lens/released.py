"""Released models that our decoder cannot be: Hugging Face's own class under a ``TransformerBridge``, checked first."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.errors import ProbeError
from probe.files import read_json_object
from probe.models import checkpoint
from probe.models.config import MOST
from probe.models.families import FAMILIES
from probe.models.lens.check import Witness, check_bridge
from probe.models.lens.fits import check_fits
from probe.models.open.quiet import quiet_transformers
from probe.models.stored import INDEX_FILE, stored_tensors, weight_files
from probe.staged import staged

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


# Keys of configs that transformers isn't told of: with labels no decoder does anything, and it would make a list of so
# many; which code computes attention and experts is not the checkpoint's to choose.
UNSAID = (
    *("num_labels", "id2label", "label2id", "problem_type", "attn_implementation", "experts_implementation"),
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation_internal"),
)


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
    with _one_line(str(path)):
        _check_layers(values, path)
    if values.get("is_encoder_decoder"):
        raise ProbeError(
            f"{path}: 'is_encoder_decoder' must be false: a decoder alone was wanted, whose tokens know their position "
            "from those before them only, and not from an encoder too"
        )
    files = weight_files(folder)
    stored = {tensor.key: tensor for tensor in stored_tensors(files)}
    said = {key: value for key, value in values.items() if key not in UNSAID}
    places = {key: path.name for path, keys in files.items() for key in keys or ()}
    index = {INDEX_FILE: {"metadata": {}, "weight_map": places}} if places else {}
    with (
        staged([*files], {checkpoint.CONFIG_FILE: said, **index}) as place,
        quiet_transformers(),
        _one_line(f"{folder}: transformers cannot load it", place, folder),
    ):
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        check_fits(config, stored, folder)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=dtype or "auto",
            output_loading_info=True,
        )
    model, info = loaded  # a pair, as output_loading_info asks for
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            key = sorted(map(str, info[what]))[0]
            raise ProbeError(
                f"{folder}: {what.replace('_', ' ')} in its weights: {key!r} and {len(info[what]) - 1} more"
            )
    return _bridge(model.to(device).eval(), str(folder))


def _check_layers(values: Any, path: Path) -> None:
    """Refuse more layers than any model has, wherever a config says so: transformers makes lists of them."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            _check_layers(value, path)
        elif isinstance(key, str) and "layer" in key and isinstance(value, int) and not -1 <= value <= MOST["n_layers"]:
            raise ProbeError(f"{path}: {key!r} must be an integer of at most {MOST['n_layers']}, got {value}")


@contextlib.contextmanager
def _one_line(what: str, place: Path | None = None, folder: Path | None = None) -> Iterator[None]:
    """Whatever transformers or TransformerLens makes of a config, as one line of ours."""
    try:
        yield
    except ProbeError:
        raise
    except Exception as error:  # of many kinds; what the checkpoint makes of them is the user's to mend
        line = _first_line(error)
        raise ProbeError(f"{what}: {line if place is None else line.replace(str(place), str(folder))}") from None


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
    with _one_line(f"{whose}: transformers cannot run it"):
        witness = Witness.of(model, whose)
    bridge = _wrap(model, model.config, whose)
    with _one_line(f"{whose}: the bridge cannot be checked"):
        check_bridge(bridge, witness, whose)
    return bridge


def _wrap(model: "PreTrainedModel", config: Any, whose: str = "") -> "TransformerBridge":
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with _one_line(f"{whose}: TransformerLens cannot bridge a {type(model).__name__}"):
        return build_bridge_from_module(model, type(model).__name__, hf_config=config)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
