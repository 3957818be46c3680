"""Can the construction of absolute position be learned? Small decoders without position encoding are trained to say
where each token stands, from random weights and from the construction's, and are measured before and after.

Learned heads are compared with theory in ``constructions.learning_measures``. The table ``results/learnability.csv`` is
made by

    OMP_NUM_THREADS=1 python -m constructions.learnability

in about 20 minutes on one core; what was found is in ``docs/learnability.md``.
"""

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from constructions.layout import BOS
from constructions.learning_measures import (
    TARGETS,
    Measured,
    error_measures,
    head_measures,
    site_measures,
    weight_measures,
)
from constructions.learning_starts import STARTS, hand_built
from probe.config import check_flag, check_number, check_size
from probe.device import gradients
from probe.errors import ProbeError, unknown_name
from probe.models.config import NORMALIZATIONS
from probe.models.decoder import Decoder, DecoderConfig

RESULTS = Path(__file__).with_name("results")
D_VOCAB = 16  # ids 1…15 are content, 0 is <bos>
STEPS, SEEDS = 1000, (0, 1)


@dataclass(frozen=True)
class LearningConfig:
    """What is trained: the decoder's shape, its start, and what it is asked.

    Where ``start`` is (or is alike) a construction, that gives the shape: one layer without norm, one head, as many
    rows and MLP units as the construction has; ``d_model`` and ``n_heads`` are not used.
    """

    normalization: str = "none"
    bos: bool = True
    target: str = "classification"
    layers: int = 2
    start: str = "random"
    length: int = 64
    d_model: int = 64
    n_heads: int = 4

    def __post_init__(self) -> None:
        for kind, known in (("normalization", NORMALIZATIONS), ("target", TARGETS), ("start", STARTS)):
            if getattr(self, kind) not in known:
                raise unknown_name(kind, getattr(self, kind), known)
        check_flag("bos", self.bos)
        check_size("layers", self.layers)
        check_size("length", self.length, least=3)
        construction = STARTS[self.start].construction
        if construction is not None:
            wanted = {"normalization": "none", "bos": True, "layers": construction.layers}
            for name, value in wanted.items():
                if getattr(self, name) != value:
                    raise ProbeError(f"start {self.start!r} wants {name}={value!r}, got {getattr(self, name)!r}")
        self.decoder_config()  # refuses what is no decoder

    def decoder_config(self) -> DecoderConfig:
        """The shape of the decoder. Its head has a unit for every position and its embedding one for every token, so
        both have max(16, length) rows, of which tokens use the first 16."""
        d_vocab = max(D_VOCAB, self.length)
        construction = STARTS[self.start].construction
        if construction is not None:
            return dataclasses.replace(construction.config(self.length), d_vocab=d_vocab)
        return DecoderConfig(
            d_vocab=d_vocab,
            n_ctx=self.length,
            n_layers=self.layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            activation="relu",
            normalization=self.normalization,
        )

    def tokens(self, batch: int, generator: torch.Generator) -> Int[Tensor, "batch length"]:
        """Sequences of independent content tokens, all equally likely, the first replaced by ``<bos>`` if there is
        one."""
        tokens = torch.randint(1, D_VOCAB, (batch, self.length), generator=generator)
        if self.bos:
            tokens[:, 0] = BOS
        return tokens


# What the table holds: every combination with two layers, from each seed; and from the first seed alone those with one
# and three layers, and the starts from constructions.
GRID: tuple[LearningConfig, ...] = tuple(
    LearningConfig(*values, layers=2) for values in itertools.product(("none", "layer"), (True, False), TARGETS)
)
VARIANTS: tuple[LearningConfig, ...] = (
    *(dataclasses.replace(config, layers=layers) for layers in (1, 3) for config in GRID),
    *(
        LearningConfig(target=target, layers=1, start=start)
        for start, target in itertools.product(list(STARTS)[1:], TARGETS)
        if (start, target) != ("absolute_position_times_noise", "classification")
    ),
)


@gradients()
def train_from(
    decoder: Decoder,
    config: LearningConfig,
    *,
    steps: int,
    generator: torch.Generator,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.0,
) -> None:
    """Train a decoder in place: AdamW, fresh random sequences from ``generator`` at every step, gradients clipped to
    norm 1, the rate rising over the first twentieth of the steps and falling linearly to 0 after it.

    Without decay by default, so that what moves a weight is the loss.
    """
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, weight_decay=weight_decay)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    loss_of = TARGETS[config.target].loss
    decoder.train()
    for _ in range(steps):
        loss = loss_of(decoder(config.tokens(batch_size, generator)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    decoder.eval()


def measure(decoder: Decoder, config: LearningConfig, start: Decoder, sequences: int = 256) -> list[Measured]:
    """All measures of a decoder on the same ``sequences`` new sequences, whatever the run."""
    tokens = config.tokens(sequences, torch.Generator().manual_seed(2**31))
    found = error_measures(decoder, tokens, config.target)
    found += head_measures(decoder, tokens) + site_measures(decoder, tokens)
    begun = STARTS[config.start]
    if begun.construction is not None and begun.perturb is not None:
        exact = hand_built(config.decoder_config(), config.target, begun.construction)
        found += weight_measures(decoder, start, exact, begun.construction.layout(config.length))
    return found


def learnability(
    configs: Iterable[LearningConfig] = GRID,
    *,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.0,
    report: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """Train each config from each seed and measure it before and after. The same call gives the same rows on a CPU.

    Args:
        seeds: each draws the start's weights (or noise) and the training sequences.
        steps: of AdamW, see ``train_from``.
        report: called with the rows of each run when it is done, to show progress.

    Returns:
        One row a number: run, normalization, bos, target, layers, seed, start, stage ("initial" or "trained"), site,
        layer, head, metric, value; metrics as in ``constructions.learning_measures``. Where there is no ``<bos>`` the
        same is measured of the first token, as a control. Missing: site, layer or head where a number has none.

    Raises:
        ProbeError: for no config, no seed, or numbers that are no sizes or rates.
    """
    configs = list(configs)
    if not configs or not seeds:
        raise ProbeError(f"learnability wants at least one config and one seed, got {len(configs)} and {len(seeds)}")
    for name, value, least in (("steps", steps, 0), ("batch_size", batch_size, 1)):
        check_size(name, value, least)
    for seed in seeds:
        check_size("seed", seed, 0)
    check_number("learning_rate", learning_rate)
    check_number("weight_decay", weight_decay, closed=True)
    tables = []
    for run, (config, seed) in enumerate(itertools.product(configs, seeds)):
        decoder = STARTS[config.start].build(config.decoder_config(), config.target, seed)
        start = copy.deepcopy(decoder)
        stages = {"initial": measure(decoder, config, start)}
        train_from(
            decoder,
            config,
            steps=steps,
            generator=torch.Generator().manual_seed(seed),
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )
        stages["trained"] = measure(decoder, config, start)
        keys = {name: getattr(config, name) for name in ("normalization", "bos", "target", "layers")}
        keys = {"run": run, **keys, "seed": seed, "start": config.start}
        rows = [{**keys, "stage": stage, **each._asdict()} for stage, found in stages.items() for each in found]
        tables.append(pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"}))
        if report is not None:
            report(tables[-1])
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small decoders of the table and write it.")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        rows = learnability(GRID, seeds=options.seeds, steps=options.steps, report=_show)
        others = learnability(VARIANTS, seeds=options.seeds[:1], steps=options.steps, report=_show)
    except ProbeError as error:
        parser.error(str(error))
    rows = pd.concat((rows, others.assign(run=others.run + rows.run.max() + 1)), ignore_index=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.folder / "learnability.csv", index=False, float_format="%.6g")


def _show(rows: pd.DataFrame) -> None:
    keys = " ".join(str(value) for value in rows.iloc[0]["run":"start"])
    shown = rows[rows.metric.isin(("mean_absolute_error", "accuracy"))]
    print(keys, *(f"{row.stage} {row.metric} {row.value:.4g}" for row in shown.itertuples()), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
