"""Do splits of scores return the biases that models were given? Slopes of ALiBi, buckets of T5, of a study's models.

probe study --folder runs/seeds --seeds none=3,t5=3,alibi=3,rotary=3,sinusoidal=3
python docs/attention/slopes.py [FOLDER]    # less than a minute on a CPU; the rows go beside this script
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

import probe
from probe.attention import split_long_context
from probe.files import read_json_object, write_rows
from probe.provenance import environment
from probe.study.config import StudyConfig, StudyData

LONG, SEQUENCES = 4096, 2
COMMAND = "python docs/attention/slopes.py runs/seeds"


def rows_of(metric: str, layer: int, found, given) -> pd.DataFrame:
    """A row for each head (and bucket): what the split found, and what the model was given."""
    return pd.DataFrame({"metric": metric, "layer": layer, "value": found, "given": given})


def slopes(shares: pd.DataFrame, layer: int, metric: str = "slope") -> pd.DataFrame:
    of = shares[(shares["scope"] == "seen") & (shares["metric"] == "slope") & (shares["layer"] == layer)]
    of = of.sort_values("head")
    given = probe.alibi_slopes(len(of)).tolist()
    return rows_of(metric, layer, of["value"].to_numpy(), given).assign(head=range(len(of)))


def buckets(curves: pd.DataFrame, table: torch.Tensor) -> Iterator[pd.DataFrame]:
    """By bucket and head, both less their mean: a constant in every score changes no attention."""
    for head, of in curves[curves["curve"] == "t5_bucket"].groupby("head"):
        found = of.set_index("index")["value"].sort_index()
        given = table[found.index.tolist(), head].double().numpy()
        yield rows_of("bucket", 0, (found - found.mean()).to_numpy(), given - given.mean()).assign(head=head)


def measure(folder: Path) -> Iterator[pd.DataFrame]:
    config = StudyConfig.from_dict(read_json_object(folder / "study.json"))
    data = StudyData.of(config)
    tokens = data.traced(config).tokens
    alibi, t5 = (probe.load(folder / "models" / encoding / "final") for encoding in ("alibi", "t5"))
    for model in (alibi, t5):
        scores = probe.trace(model, tokens, ["attn.hook_attn_scores"])
        split = probe.split_scores(scores, "pair", layers=[0])
        if model is alibi:
            yield slopes(split.rows, 0)
        else:
            yield from buckets(split.curves, t5.encoding.weight.detach())
    random = torch.randint(len(data.task.vocabulary), (SEQUENCES, LONG), generator=torch.Generator().manual_seed(0))
    shares = split_long_context(alibi, random).rows
    for layer in sorted(shares["layer"].unique()):
        yield slopes(shares, layer, "slope_of_long_context")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/seeds")
    rows = pd.concat(measure(folder), ignore_index=True)
    file = Path(__file__).with_name("slopes.parquet")
    write_rows(file, rows, environment(torch.device("cpu")) | {"command": COMMAND})
    print(file)
