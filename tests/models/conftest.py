import pytest
import torch


@pytest.fixture
def make_decoder(make_decoder):
    """As everywhere, but CoPE, which starts as NoPE, has embeddings that a test sees."""

    def make(**options):
        decoder = make_decoder(**options)
        if decoder.config.encoding == "cope":
            torch.nn.init.normal_(decoder.encoding.embedding, generator=torch.Generator().manual_seed(1))
        return decoder

    return make
