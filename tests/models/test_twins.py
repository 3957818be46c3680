import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from probe.cli import main
from probe.measure import measure_models
from probe.models import Decoder, DecoderConfig, checkpoint, twin_seed, untrained_like, untrained_twin
from probe.models.lens import to_bridge
from probe.position import fit_position_probe
from probe.study import StudyData
from probe.study.examine import ExamineConfig
from probe.study.examine import case_of as examined_case
from probe.study.results import case_of as study_case
from tests.support.small_study import untrained_study

KEYS = ["layer", "head", "template", "metric", "scope", "site", "target"]


NAMES = ["probe", "fit", "templates"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows that commands, a study and an examination have of two models on the same tokens."""
    folder = tmp_path_factory.mktemp("twins")
    task = {"task": "copy", "task_options": {"train_length": 5, "test_length": 10, "n_symbols": 6}}
    config = untrained_study(folder / "made", **task, encodings=("none", "t5"), seeds={}, trace_length=10)
    places = {encoding: str(folder / "made" / "models" / encoding / "final") for encoding in config.encodings}
    models = {encoding: checkpoint.load(place) for encoding, place in places.items()}
    data = StudyData.of(config)
    tokens = data.traced(config).tokens
    np.save(folder / "tokens.npy", tokens)
    looked_at = ExamineConfig(tokens=str(folder / "tokens.npy"), length=10, sequences=12)
    cases = {
        "study": [study_case(config, data, name, [model]) for name, model in models.items()],
        "examine": [examined_case(name, model, places[name], looked_at) for name, model in models.items()],
    }
    rows = {name: measure_models(of, folder / name, NAMES) for name, of in cases.items()}
    named = [f"{encoding}={place}" for encoding, place in reversed(places.items())]  # in another order
    for command, options in (("compare", []), ("fit", []), ("measure", ["--only", ",".join(NAMES)])):
        out = folder / command
        on = ["--tokens", str(folder / "tokens.npy"), "--folder", str(out), "--device", "cpu"]
        assert main([command, *named, *on, *options]) == 0
        rows[command] = pd.read_parquet(out / "rows.parquet")
    return rows, places, tokens


def untrained(rows, measurement, encoding):
    found = rows[(rows["measurement"] == measurement) & (rows["model"] == encoding)]
    found = found[found["control"] == "untrained"]
    keys = [key for key in KEYS if key in found]
    return found[[*keys, "value"]].sort_values([*keys, "value"]).reset_index(drop=True)[[*keys, "value"]]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["none", "t5"])
@pytest.mark.parametrize(
    ("measurement", "commands"),
    [("templates", ("study", "compare", "examine", "measure")), ("fit", ("study", "fit", "examine", "measure")),
     ("probe", ("study", "examine", "measure"))],
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
    found = found.assign(measurement="probe", model="t5")
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
