import subprocess
import sys

import pytest
import torch
from torch import nn

from probe.models.encodings import ENCODINGS
from probe.models.undrawn import undrawn

RUN_ALL = """
import sys, torch
from probe import Decoder, DecoderConfig, trace
for encoding in sys.argv[1:]:
    decoder = Decoder(DecoderConfig(d_vocab=9, n_ctx=8, n_layers=1, d_model=16, n_heads=2, encoding=encoding))
    trace(decoder, torch.ones(1, 4, dtype=torch.long))
print("torch._dynamo" in sys.modules)
"""


def test_a_decoder_is_made_and_traced_without_the_compiler():
    """It takes longer to import than torch itself."""
    done = subprocess.run([sys.executable, "-c", RUN_ALL, *ENCODINGS], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 2),
        lambda: nn.Embedding(5, 3),
        lambda: nn.LayerNorm(3),
        lambda: nn.Bilinear(2, 2, 2),
        lambda: nn.init.normal_(tensor=torch.empty(3)),
    ],
)
def test_nothing_is_drawn_and_torchs_generator_stays(make):
    state = torch.get_rng_state()
    with undrawn():
        made = make()
    tensors = [made] if isinstance(made, torch.Tensor) else [*made.parameters()]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = nn.init.ones_(torch.empty(2))
    assert drawn.tolist() == [1, 1]
