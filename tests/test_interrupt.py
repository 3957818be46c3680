"""Ctrl-C: one line, exit status 130, no process and no half-written file left, and the same command goes on."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from interrupted import command, finish, group_is_there


def interrupt_at_a_checkpoint(arguments, folder, *, whole_group):
    """Run a command in a process group of its own, and interrupt it, or all of its group as a terminal does, once a
    model is in training; its exit status, and what it said on stderr. Nothing of the group goes on."""
    before = {*folder.glob("models/*/checkpoints/step-*")}
    process = subprocess.Popen(
        [sys.executable, "-m", "probe", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not {*folder.glob("models/*/checkpoints/step-*")} - before:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[1])
        time.sleep(0.005)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    deadline = time.monotonic() + 10
    while group_is_there(process.pid):  # multiprocessing's tracker of resources ends a moment after its parent
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process.returncode, said


def assert_whole(folder):
    """Every file is under its final name, and there is a checkpoint to go on from."""
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    newest = max(folder.glob("models/*/checkpoints/step-*"))
    assert {path.name for path in newest.iterdir()} == {"config.json", "model.safetensors", "optimizer.safetensors"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(command(folder, "study", jobs=1))
    return pd.read_parquet(folder / "study" / "rows.parquet")


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    """Twice: with two processes, all of which are interrupted, and then with one."""
    folder = tmp_path / "study"
    for jobs, whole_group in ((2, True), (1, False)):
        arguments = command(tmp_path, "study", jobs)
        status, said = interrupt_at_a_checkpoint(arguments, folder, whole_group=whole_group)
        assert status == 130
        assert said.startswith("probe: interrupted; what was finished is kept, and this goes on from there: ")
        assert said.endswith(f" -m probe {shlex.join(arguments)}\n") and said.count("\n") == 1
        assert_whole(folder)
        assert not list(folder.glob("rows/maps-*"))  # the last stage of a model: those at work have not come to it

    finish(arguments)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "rows.parquet"), undisturbed)


@pytest.mark.slow
def test_an_interrupted_sweep_ends_its_processes(tmp_path):
    arguments, folder = command(tmp_path, "sweep", jobs=2), tmp_path / "sweep"
    status, said = interrupt_at_a_checkpoint(arguments, folder, whole_group=True)
    assert status == 130
    assert said.startswith("probe: interrupted; what was finished is kept") and said.count("\n") == 1
    assert_whole(folder)
    assert not list(folder.glob("results/*"))
