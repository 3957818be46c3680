"""How long it takes until something happens: imports and ``--help`` beside ``import torch``.

    python -m benchmarks.start

CPU time (user and system) of processes of their own, which take turns; medians of nine.
"""

import resource
import statistics
import subprocess
import sys

PYTHON = [sys.executable, "-c"]
ALL = "import probe; [getattr(probe, name) for name in probe.__all__]"
TRACED = """import probe, torch
decoder = probe.Decoder(probe.DecoderConfig(d_vocab=9, n_ctx=8, n_layers=1, d_model=16, n_heads=2, encoding="t5"))
probe.trace(decoder, torch.ones(1, 4).long())"""
TARGETS = {
    "import probe": ("≤ 1.15", [*PYTHON, "import probe"]),
    "import probe, a decoder and its trace": ("≤ 1.15", [*PYTHON, "import probe; probe.Decoder, probe.trace"]),
    "import probe, a T5 decoder made and traced": ("", [*PYTHON, TRACED]),
    "import probe, and all that its names stand for": ("", [*PYTHON, ALL]),
    "probe --help": ("< 2", [sys.executable, "-m", "probe", "--help"]),
    "probe study --help": ("", [sys.executable, "-m", "probe", "study", "--help"]),
}  # fmt: skip


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(repeats: int = 9) -> None:
    commands = {"torch": [*PYTHON, "import torch"], **{name: command for name, (_, command) in TARGETS.items()}}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(repeats + 1):
        for name, command in commands.items():
            time = cpu_seconds(command)
            if round_:
                taken[name].append(time)
    print("| CPU time as a multiple of `import torch` | target | measured |\n|---|---|---|")
    for name, (target, _) in TARGETS.items():
        print(f"| {name} | {target} | {statistics.median(taken[name]) / statistics.median(taken['torch']):.2f} |")


if __name__ == "__main__":
    main()
