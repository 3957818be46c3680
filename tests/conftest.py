import os

# One core a process: the suite runs in several, and so do the commands and notebooks that it starts.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is downloaded in tests: who tries fails.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from threadpoolctl import threadpool_limits

from probe.models.decoder import Decoder, DecoderConfig

torch.set_num_threads(1)
threadpool_limits(1)


@pytest.fixture
def make_decoder():
    """A small random decoder; any option of its config can be set."""

    def make(seed=0, **options) -> Decoder:
        defaults = {"d_vocab": 19, "n_ctx": 32, "n_layers": 2, "d_model": 32, "n_heads": 4}
        return Decoder(DecoderConfig(**(defaults | options)), seed=seed).eval()

    return make


@pytest.fixture
def random_tokens():
    def make(batch=3, length=16, d_vocab=19, seed=0) -> torch.Tensor:
        return torch.randint(0, d_vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make
