"""100,000 examples beside the scripts of Kazemnejad et al. 2023.

    python -m benchmarks.data

The scripts' loops are written anew in the form of ``scripts/dataset_builders/make_addition_dataset.py`` and
``make_copy_dataset.py`` in McGill-NLP/length-generalization: one example at a time, a dict of numbers or texts, nothing
looked at twice. Ours are drawn without repeats, put into their split by a hash, and encoded into ids.
"""

import numpy as np

from benchmarks.timing import seconds
from benchmarks.training import row
from probe.tasks import make_task
from probe.training import encode

N, DIGITS, LENGTH = 100_000, 8, 20
SYMBOLS = "abcdefghijklmnopqrstuvwxyz"


def scripts_addition() -> list[dict]:
    examples = []
    for first in range(1, DIGITS + 1):
        for second in range(1, DIGITS + 1):
            for _ in range(N // DIGITS**2):
                a, b = (np.random.randint(10 ** (n - 1) if n > 1 else 0, 10**n) for n in (first, second))
                examples.append({"a": a, "b": b, "sum": a + b, "cat": f"{first}-by-{second}"})
    return examples


def scripts_copy() -> list[dict]:
    examples = []
    for length in range(1, LENGTH + 1):
        for _ in range(N // LENGTH):
            tokens = [SYMBOLS[i] for i in np.random.randint(0, len(SYMBOLS), length)]
            text = " ".join(tokens)
            examples.append({"repeat": length, "src_seq": text, "tgt_seq": " ".join(tokens), "cat": length})
    return examples


def main() -> None:
    print("| | target | measured |\n|---|---|---|")
    for name, script, target in (("addition", scripts_addition, "7"), ("copy", scripts_copy, "15")):
        task = make_task(name)

        def drawn(task=task):
            return task.splits(n_train=N, n_validation=0, n_test=0).train

        examples = drawn()
        works = {"script": script, "drawn": drawn, "encoded": lambda task=task, e=examples: encode(e, task.vocabulary)}
        taken = seconds(works, repeats=3)
        for what in works:
            row(f"{name}, {what}: seconds for {N:,}", "", f"{taken[what]:.2f}")
        row(f"{name}, drawing is times faster than the script", target, f"{taken['script'] / taken['drawn']:.2f}")


if __name__ == "__main__":
    main()
