import math

import numpy as np
import pytest
import torch

from probe.errors import ProbeError
from probe.position import TARGETS, TargetContext, position_classes, target_values
from probe.position.probes.targets import target_names

TOKENS = torch.tensor([[5, 1, 7, 7, 2, 7], [1, 7, 1, 3, 0, 0], [2, 2, 2, 2, 2, 2]])
LENGTHS = torch.tensor([6, 4, 6])
CONTEXT = TargetContext(separator=1, counted=7).for_length(6)
NAN = math.nan


def values(name, context=CONTEXT):
    return target_values([name], TOKENS, LENGTHS, context).numpy()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("position", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, NAN, NAN], [0, 1, 2, 3, 4, 5]]),
        ("relative_to_separator", [[-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, NAN, NAN], [NAN] * 6]),
        ("relative_to_end", [[-5, -4, -3, -2, -1, 0], [-3, -2, -1, 0, NAN, NAN], [-5, -4, -3, -2, -1, 0]]),
        ("count", [[0, 0, 1, 2, 2, 3], [0, 1, 1, 1, NAN, NAN], [0] * 6]),
    ],
)
def test_targets_written_out(name, wanted):
    np.testing.assert_array_equal(values(name)[..., 0], wanted)


def test_functions_of_the_position():
    p = np.arange(6)
    np.testing.assert_allclose(values("log_position")[0, :, 0], np.log1p(p), rtol=1e-15)
    np.testing.assert_allclose(values("inverse_position")[0, :, 0], 1 / (p + 1), rtol=1e-15)
    names = target_names(["fourier"], CONTEXT)
    assert names == ["fourier.cos_2", "fourier.sin_4", "fourier.cos_4", "fourier.sin_8", "fourier.cos_8"]
    for column, name in zip(values("fourier")[0].T, names, strict=True):
        wave, period = name.removeprefix("fourier.").split("_")
        np.testing.assert_allclose(column, getattr(np, wave)(2 * np.pi * p / int(period)), atol=1e-15)


def test_classes_leave_padding_out():
    assert position_classes(TOKENS, LENGTHS)[1].tolist() == [0, 1, 2, 3, -1, -1]


def test_every_target_has_its_shape_and_is_undefined_at_padding():
    for name, target in TARGETS.items():
        found = target_values([name], TOKENS, LENGTHS, CONTEXT)
        assert found.shape == (3, 6, len(target.columns(CONTEXT))) and found.dtype == torch.float64
        assert found[1, 4:].isnan().all()


def test_bad_input_is_one_clear_line():
    for name, wanted in (("relative_to_separator", "separator"), ("count", "counted")):
        with pytest.raises(
            ProbeError, match=rf"target '{name}' wants TargetContext\({wanted}=<a token id>\), got None"
        ):
            values(name, TargetContext())
    with pytest.raises(ProbeError, match="unknown target 'place'; known: count, fourier"):
        target_names(["place"], CONTEXT)
    with pytest.raises(ProbeError, match="at least one, each once, got \\['count', 'count'\\]"):
        target_names(["count", "count"], CONTEXT)
