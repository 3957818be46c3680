import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from probe.cli import main
from probe.models import Decoder, DecoderConfig, checkpoint, twin_seed, untrained_like, untrained_twin
from probe.models.lens import to_bridge
from probe.position import fit_position_probe
from probe.study import run_study
from probe.study.config import StudyData
from tests.support.small_study import untrained_study

KEYS = ["layer", "head", "template", "metric", "scope", "site", "target"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows that four commands have of two models on the same tokens, and from Python, by command."""
    folder = tmp_path_factory.mktemp("twins")
    task = {"task": "copy", "task_options": {"train_length": 5, "test_length": 10, "n_symbols": 6}}
    settings = {**task, "encodings": ("none", "t5"), "seeds": {}, "verify_lengths": (4,), "trace_length": 10}
    made = untrained_study(folder / "made", **settings)
    places = {encoding: str(folder / "made" / "models" / encoding / "final") for encoding in made.encodings}
    config = dataclasses.replace(made, load=places)
    study = run_study(config, folder / "study", device="cpu", jobs=1)

    tokens = StudyData.of(config).traced(config).tokens
    np.save(folder / "tokens.npy", tokens)
    named = [f"{encoding}={place}" for encoding, place in reversed(places.items())]  # in another order
    rows = {"study": study}
    for command, options in (("compare", []), ("fit", []), ("examine", ["--length", "10", "--sequences", "12"])):
        out = folder / command
        on = ["--tokens", str(folder / "tokens.npy"), "--folder", str(out), "--device", "cpu"]
        assert main([command, *named, *on, *options]) == 0
        rows[command] = pd.read_parquet(out / "rows.parquet")
    return rows, places, tokens


def untrained(rows, measurement, encoding):
    found = rows[(rows["measurement"] == measurement) & (rows["encoding"] == encoding)]
    found = found[found["control"] == "untrained"]
    keys = [key for key in KEYS if key in found]
    return found[[*keys, "value"]].sort_values([*keys, "value"]).reset_index(drop=True)[[*keys, "value"]]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["none", "t5"])
@pytest.mark.parametrize(
    ("measurement", "commands"),
    [("templates", ("study", "compare", "examine")), ("fit", ("study", "fit", "examine")),
     ("probe", ("study", "examine"))],
)  # fmt: skip
def test_all_commands_agree_on_the_untrained_twin(measured, encoding, measurement, commands):
    rows, _, _ = measured
    first = untrained(rows[commands[0]], measurement, encoding)
    assert len(first) > 4 and first["value"].std() > 0
    for command in commands[1:]:
        other = untrained(rows[command], measurement, encoding)
        pd.testing.assert_frame_equal(other.dropna(axis=1, how="all"), first.dropna(axis=1, how="all"), atol=1e-12)


@pytest.mark.slow
def test_python_has_the_twin_of_the_commands(measured):
    rows, places, tokens = measured
    found = fit_position_probe(checkpoint.load(places["t5"]), tokens)
    found = found.assign(measurement="probe", encoding="t5")
    wanted = untrained(rows["study"], "probe", "t5").dropna(axis=1, how="all")
    pd.testing.assert_frame_equal(untrained(found, "probe", "t5").dropna(axis=1, how="all"), wanted, atol=1e-12)


def test_a_twin_belongs_to_its_model_and_seed():
    config = DecoderConfig(d_vocab=11, n_ctx=8, n_layers=1, d_model=8, n_heads=2)
    model = Decoder(config, seed=3)
    twin = untrained_twin(model)
    weights = untrained_like(model, twin_seed(model)).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in twin.state_dict().items())
    others = [Decoder(config, seed=4), Decoder(dataclasses.replace(config, encoding="t5"), seed=3)]
    changed = Decoder(config, seed=3)
    with torch.no_grad():
        changed.head.weight[0, 0] += 1e-3
    seeds = {twin_seed(model), twin_seed(model, 1), *map(twin_seed, [*others, changed])}
    assert len(seeds) == 5
    assert twin_seed(Decoder(config, seed=3)) == twin_seed(model) == twin_seed(to_bridge(model))
    assert twin_seed(Decoder(config, seed=3).double()) == twin_seed(model)
