"""What a number may depend on besides its settings: versions, the device, the revision of this package."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


PACKAGES = ("position-probe", "torch", "transformer-lens", "numpy", "scipy", "scikit-learn", "pandas", "plotly")


def environment(device: "torch.device | None" = None) -> dict[str, str]:
    """Versions of everything that a number may depend on, the revision where there is one, and the ``torch.device``."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    revision = git_revision()
    if revision is not None:
        found["revision"] = revision
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    if device is not None:
        from probe.device import product_kernels

        found["device"] = f"{device} ({_device_name(device)})"
        found["float32 products of training"] = product_kernels(device)
    return found


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" where files differ from it; None where it runs
    from none, or git cannot say."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed; perhaps into a folder of another repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name(device: "torch.device") -> str:
    if device.type != "cuda":
        return platform.machine()
    import torch

    return torch.cuda.get_device_name(device)
