"""A released checkpoint from a package of a package registry, made ready for ``probe examine``, and sequences for it.

pip download --no-deps microformer-mgm==0.5.8
python docs/released/mgm.py microformer_mgm-0.5.8-py3-none-any.whl FOLDER

FOLDER/model then holds config.json and safetensors, FOLDER/tokens.npy 64 sequences of 64 tokens that the model says by
itself: each token is drawn from what the model predicts after ``<bos>`` and the tokens before it.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import probe

PLACE = "mgm/resources/general_model"
BOS, SEQUENCES, LENGTH = 2, 64, 64


def unpack(wheel: Path, folder: Path) -> None:
    """The checkpoint as safetensors. The pickle is read with nothing but tensors allowed in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as package:
        (folder / "config.json").write_bytes(package.read(f"{PLACE}/config.json"))
        weights = torch.load(io.BytesIO(package.read(f"{PLACE}/pytorch_model.bin")), "cpu", weights_only=True)
    save_file({name: w.clone().contiguous() for name, w in weights.items()}, folder / "model.safetensors")


@torch.no_grad()
def sequences(folder: Path) -> np.ndarray:
    """Integers of shape (64, 64), the first of each row ``<bos>``."""
    model = probe.load_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((SEQUENCES, 1), BOS)
    while tokens.shape[1] < LENGTH:
        predicted = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(predicted, 1, generator=generator)], dim=1)
    return tokens.numpy()


if __name__ == "__main__":
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    unpack(wheel, folder / "model")
    np.save(folder / "tokens.npy", sequences(folder / "model"))
    print(folder)
