"""A decoder of transformers from a folder in its format. No code of a checkpoint's own is run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probe.errors import ProbeError
from probe.files import read_json_object
from probe.models import checkpoint
from probe.models.config import MOST
from probe.models.families import FAMILIES
from probe.models.open.fits import check_fits
from probe.models.open.quiet import quiet_transformers
from probe.models.open.wrapping import one_line
from probe.models.stored import INDEX_FILE, stored_tensors, weight_files
from probe.staged import staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys of configs that transformers isn't told of: with labels no decoder does anything, and it would make a list of so
# many; which code computes attention and experts is not the checkpoint's to choose.
UNSAID = (
    *("num_labels", "id2label", "label2id", "problem_type", "attn_implementation", "experts_implementation"),
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation_internal"),
)


def load_transformers(folder: Path, device: torch.device, dtype: torch.dtype | None) -> "PreTrainedModel":
    """The model in a folder of transformers' format, as transformers' class for it, in evaluation mode.

    Args:
        folder: with ``config.json`` and safetensors.
        device: where the weights go.
        dtype: that of the weights; None: as they are stored.

    Raises:
        ProbeError: for a kind of model that transformers does not know, a config that names code of its own, an
            encoder-decoder, quantised weights, or weights that are missing or unknown.
    """
    import transformers

    path = folder / checkpoint.CONFIG_FILE
    values = read_json_object(path)
    name = values.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        raise ProbeError(
            f"{path}: unknown model_type {name!r}; known: {', '.join(sorted(FAMILIES))}, and all that "
            "transformers knows"
        )
    if values.get("auto_map") is not None:
        raise ProbeError(
            f"{path}: 'auto_map' must be absent, got code of the checkpoint's own, which is never run; where "
            "transformers' own class is meant, take it out of a copy"
        )
    with one_line(str(path)):
        _check_layers(values, path)
    if values.get("is_encoder_decoder"):
        raise ProbeError(
            f"{path}: 'is_encoder_decoder' must be false: a decoder alone was wanted, whose tokens know their position "
            "from those before them only, and not from an encoder too"
        )
    if values.get("quantization_config") is not None:
        raise ProbeError(f"{path}: 'quantization_config' must be absent: quantised weights can't be looked at")
    files = weight_files(folder)
    stored = {tensor.key: tensor for tensor in stored_tensors(files)}
    said = {key: value for key, value in values.items() if key not in UNSAID}
    places = {key: path.name for path, keys in files.items() for key in keys or ()}
    index = {INDEX_FILE: {"metadata": {}, "weight_map": places}} if places else {}
    with (
        staged([*files], {checkpoint.CONFIG_FILE: said, **index}) as place,
        quiet_transformers(),
        one_line(f"{folder}: transformers cannot load it", place, folder),
    ):
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        check_fits(config, stored, folder)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
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
    ready: PreTrainedModel = model.to(device).eval()
    return ready


def _check_layers(values: Any, path: Path) -> None:
    """Refuse more layers than any model has, wherever a config says so: transformers makes lists of them."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            _check_layers(value, path)
        elif isinstance(key, str) and "layer" in key and isinstance(value, int) and not -1 <= value <= MOST["n_layers"]:
            raise ProbeError(f"{path}: {key!r} must be an integer of at most {MOST['n_layers']}, got {value}")
