"""A small study and a small sweep as commands, for tests that break them off."""

import json
import os
import subprocess
import sys

SMALL = {
    "encodings": ["none", "alibi"],
    "task": "copy",
    "task_options": {"train_length": 4, "test_length": 8, "n_symbols": 5},
    "seeds": {},
    "n_train": 300,
    "n_validation": 40,
    "n_test": 40,
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2},
    "training": {"steps": 200, "batch_size": 8, "learning_rate": 0.003, "checkpoint_every": 20, "log_every": 50},
    "trace_sequences": 12,
    "trace_length": 7,
    "verify_lengths": [16],
}
SWEEP = {
    "tasks": {"copy": SMALL["task_options"]},
    "encodings": ["none", "alibi"],
    "seeds": [0],
    **{name: SMALL[name] for name in ("n_train", "n_validation", "n_test", "model", "training")},
}


def command(folder, what, jobs):
    """Of a study or a sweep; its settings lie beside its folder."""
    (folder / f"{what}.json").write_text(json.dumps({"study": SMALL, "sweep": SWEEP}[what]))
    options = {"config": folder / f"{what}.json", "folder": folder / what, "jobs": jobs, "device": "cpu"}
    return [what, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def finish(arguments):
    done = subprocess.run([sys.executable, "-m", "probe", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def group_is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
