"""Whether what a config asks for fits what the files hold, found before there is memory for any of it."""

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as registration

from probe.errors import ProbeError
from probe.limits import current
from probe.models.stored import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Modules that a model may have, beside so many for each tensor of its files. A layer has some twenty for a dozen
# tensors; where files hold all experts of a layer in one tensor, a model may still have some hundreds.
MODULES, MODULES_OF_A_TENSOR = 4096, 64


def check_fits(config: "PreTrainedConfig", stored: Mapping[str, Stored], folder: Path) -> None:
    """Refuse a config of which the model would be larger than the files. It is made on the device "meta".

    Raises:
        ProbeError: for more modules than those files can fill, more numbers than they hold, or large tables beside.
    """
    import transformers

    with _at_most(MODULES + MODULES_OF_A_TENSOR * len(stored), folder), torch.device("meta"):
        # Of a copy: the config keeps the attention function that it is given here.
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    weights = dict(model.named_parameters())  # tied ones once
    wanted = sum(weight.numel() for weight in weights.values())
    held = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    if wanted > held:
        missing = sorted(key for key in weights if key not in stored)
        if missing:
            raise ProbeError(f"{folder}: missing keys in its weights: {missing[0]!r} and {len(missing) - 1} more")
        key = next((key for key, weight in weights.items() if tuple(weight.shape) != stored[key].shape), "")
        raise ProbeError(
            f"{folder}: mismatched keys in its weights: {key!r} must have shape {tuple(weights[key].shape)}, got "
            f"{stored[key].shape}"
        )
    others = [*model.buffers(), *(value for module in model.modules() for value in vars(module).values())]
    size = sum(value.numel() * value.element_size() for value in others if isinstance(value, torch.Tensor))
    if size > (most := current().table_bytes):
        raise ProbeError(f"{folder}: the config's tables must take at most {most} bytes, got {size}")


@contextlib.contextmanager
def _at_most(n: int, folder: Path) -> Iterator[None]:
    """Refuse the next module of this thread's after so many."""
    here, made = threading.get_ident(), 0

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == here
        if made > n:
            raise ProbeError(f"{folder}: the config must ask for at most {n} modules, as its weights are, got more")

    handle = registration.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
