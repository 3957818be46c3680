"""Position erased, exchanged and moved in every model of a study: what docs/position.md says beyond the study's rows.

probe study --folder runs/seeds --seeds none=3,t5=3,alibi=3,rotary=3,sinusoidal=3
python docs/position/edits.py [FOLDER]    # two minutes on a CPU; the rows go beside this script

The study erases position in the first model of each encoding; ``erase`` is the same call, for all of them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

import probe
from probe.files import read_json_object, write_rows
from probe.position import erase_position, patch_position, steer_position
from probe.provenance import environment
from probe.study.config import StudyConfig, StudyData, run_name

SITE = "blocks.1.hook_resid_pre"
SHIFTS = (0, 4)
COMMAND = "python docs/position/edits.py runs/seeds"


def erase(model, traced, **options) -> pd.DataFrame:
    return erase_position(model, traced.tokens, ["hook_resid_pre"], scored=traced.scored, **options)


def patch(model, traced, **options) -> pd.DataFrame:
    return patch_position(model, traced.tokens, SITE, SHIFTS, scored=traced.scored, **options)


def steer(model, traced, **options) -> pd.DataFrame:
    rows = steer_position(model, traced.tokens, SITE, **options)
    return rows[rows["metric"] == "attention_moved"]


MEASURED = {"erase": erase, "patch": patch, "steer": steer}


def measure(folder: Path, **options) -> Iterator[pd.DataFrame]:
    """The rows of each model, on the sequences on which the study looks at it."""
    config = StudyConfig.from_dict(read_json_object(folder / "study.json"))
    traced = StudyData.of(config).traced(config)
    for encoding in config.encodings:
        for replica in range(config.n_seeds(encoding)):
            model = probe.load(folder / "models" / run_name(encoding, replica) / "final")
            for name, edit in MEASURED.items():
                keys = {"measurement": name, "encoding": encoding, "seed": config.seed + replica}
                yield edit(model, traced, seed=config.seed, **options).assign(**keys)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/seeds")
    rows = pd.concat(measure(folder), ignore_index=True)
    file = Path(__file__).with_name("edits.parquet")
    write_rows(file, rows, environment(torch.device("cpu")) | {"command": COMMAND})
    print(file)
