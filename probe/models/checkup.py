"""What holds of a released model, before anything is measured on it."""

from pathlib import Path

import torch

from probe.models.anatomy import d_model_of, layers_of, n_ctx_of, sites_of
from probe.models.decoder import Decoder
from probe.models.open.transformers_model import TransformersModel
from probe.models.pretrained import load_pretrained
from probe.models.protocol import layers_in_words


def checkup(name_or_folder: str | Path, device: str | torch.device | None = None) -> dict[str, str]:
    """What holds of a model, by what it is called: how it is loaded, its layers, how exact it is, its sites.

    Args:
        name_or_folder: as ``load_pretrained`` takes it. The model is loaded and run on 48 random tokens.
        device: the first of CUDA, MPS and CPU that is there, where None.

    Raises:
        ProbeError: as ``load_pretrained``.

    Example:
        >>> checkup("runs/qwen")["layers"]
        '4 rotary'
    """
    model = load_pretrained(name_or_folder, device=device)
    if isinstance(model, TransformersModel):
        by = f"transformers' {type(model.owner).__name__}, through its attention"
    else:
        by = "our decoder" if isinstance(model, Decoder) else f"our {type(model).__name__}"
    said = {
        "loaded as": by,
        "layers": layers_in_words(layers_of(model)),
        "d_model": str(d_model_of(model)),
        "longest sequence": str(n_ctx_of(model) or "no limit of its own"),
    }
    if isinstance(model, TransformersModel) and model.errors is not None:
        errors = model.errors
        said["error of logits"] = f"{errors.logits:.1e} of the largest, against eager attention"
        said["error of patterns"] = (
            f"{errors.patterns:.1e} of the largest, in {errors.n_patterns} layers"
            if errors.n_patterns
            else "unknown: transformers gives out no pattern of each layer"
        )
        said["edits"] = "edited scores give the same logits as the pattern that they make; only z leaves attention"
    else:
        said["exact"] = "the tests hold this kind against its original: `probe models` says which"
    said["sites"] = ", ".join(dict.fromkeys(site.split(".", 2)[-1] for site in sites_of(model)))
    return said
