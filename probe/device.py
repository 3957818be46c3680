"""The device that is used where nobody says which."""

import torch

from probe.errors import ProbeError

DEVICES = ("cuda", "mps", "cpu")


def find_device(name: str | None = None) -> torch.device:
    """The named device, or the first of CUDA, MPS and CPU that is there.

    Raises:
        ProbeError: where the named one is unknown or not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind in DEVICES if there[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ProbeError(f"device must be one of {', '.join(DEVICES)}, got {name!r}") from None
    if not there.get(device.type, False):
        raise ProbeError(
            f"device {name!r} was wanted, but this machine has {', '.join(k for k in DEVICES if there[k])}"
        )
    return device
