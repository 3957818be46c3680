import pytest
import torch

from constructions import CONSTRUCTIONS
from probe.models.checkpoint import load, save


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_construction_goes_through_a_checkpoint(name, tmp_path):
    construction = CONSTRUCTIONS[name]
    dtype = next(iter(construction.max_length))
    built = construction.build(40, dtype)
    save(built, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), loaded.parameters(), strict=True))
    assert construction.check(40, dtype, decoder=loaded)["holds"].all()
