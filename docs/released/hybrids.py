"""Which layers of a hybrid retrieve? Small decoders in which every second layer sees rotary positions, trained to copy.

python docs/released/hybrids.py FOLDER    # twelve runs, a minute or two each on a CPU; rows go into FOLDER
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import probe
from probe.attention import attention_on
from probe.models import untrained_like

TRAIN_LENGTH, SHORTEST = 16, 12
ROTARY_LAYERS = ((0, 2), (1, 3))


def retrieval(model, examples: Sequence, vocabulary) -> pd.DataFrame:
    """What heads attend to from a symbol of the copy, drawn in each example: the key is the symbol that comes next."""
    encoded = probe.encode(examples, vocabulary)
    n_symbols = torch.tensor([example.length for example in examples])
    drawn = torch.rand(len(examples), generator=torch.Generator().manual_seed(0))
    asked = 1 + (drawn * (n_symbols - 2)).long()  # neither the first nor the last
    position = torch.arange(encoded.tokens.shape[1])
    queries = position == (encoded.prompt_lengths + asked - 1)[:, None]
    source = torch.tensor([_source(example, vocabulary) for example in examples])
    keys = position == (source + asked)[:, None]
    return attention_on(model, encoded.tokens, keys, queries, lengths=encoded.lengths, window=4)


def _source(example, vocabulary) -> int:
    """Where in the prompt the symbols stand that are to be said."""
    prompt, said = vocabulary.prompt(example), vocabulary.encode(example.target)
    return next(i for i in range(len(prompt)) if prompt[i : i + len(said)] == said)


def measure(folder: Path, *, steps: int = 1200, seeds: int = 6, n_train: int = 20_000) -> pd.DataFrame:
    """Train each hybrid and look at it and at its untrained twin; a run that is there is not done again."""
    task = probe.make_task("copy", {"train_length": TRAIN_LENGTH, "test_length": 2 * TRAIN_LENGTH})
    splits = task.splits(n_train=n_train, n_validation=400, n_test=400)
    data = probe.encode(splits.train, task.vocabulary)
    held_out = [example for example in splits.validation if example.length >= SHORTEST][:200]
    parts = []
    for layers in ROTARY_LAYERS:
        for seed in range(seeds):
            config = probe.DecoderConfig(
                d_vocab=len(task.vocabulary), n_ctx=128, n_layers=4, d_model=96, n_heads=4, encoding="rotary",
                position_layers=layers,
            )  # fmt: skip
            training = probe.TrainingConfig(steps=steps, batch_size=64, learning_rate=1.5e-3, seed=seed)
            model = probe.train(config, data, training, folder / f"rotary-{layers[0]}{layers[1]}-{seed}")
            right = probe.exact_match(probe.predict(model, held_out, task.vocabulary))
            keys = {"rotary_layers": f"{layers[0]}, {layers[1]}", "seed": seed}
            keys["exact_match"] = right[right["length"].isna()]["value"].item()
            for control, each in (("none", model), ("untrained", untrained_like(model, seed + 100))):
                parts.append(retrieval(each, held_out, task.vocabulary).assign(control=control, **keys))
    return pd.concat(parts, ignore_index=True)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    measure(out).to_parquet(out / "hybrids.parquet", index=False)
    print(out / "hybrids.parquet")
