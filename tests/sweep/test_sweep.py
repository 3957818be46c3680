import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import psutil
import pytest

from probe.cli import main
from probe.errors import ProbeError
from probe.league import league
from probe.limits import current, limits
from probe.sweep import PRESETS, SweepConfig, read_results, results_of, run_sweep
from probe.sweep.work import work
from probe.training import TrainingConfig

NAMES = [f"{task}-{e}-3" for task in ("copy", "sums", "sums-steps") for e in ("none", "hybrid", "clock")]


def test_the_grid(tiny):
    assert sorted(run.name for run in tiny.runs()) == sorted(NAMES)
    of = {run.name: run for run in tiny.runs()}
    task = of["sums-steps-none-3"].make_task(tiny)
    assert type(task).__name__ == "Summation" and task.scratchpad == ("computation", "output")
    config = of["copy-hybrid-3"].model(tiny, of["copy-hybrid-3"].make_task(tiny), 30)
    assert (config.encoding, config.position_layers, config.n_ctx) == ("rotary", (1,), 30)
    seeds = {run.name: run.training(tiny).seed for run in tiny.runs()}
    assert seeds["copy-none-3"] == seeds["sums-none-3"] != seeds["copy-hybrid-3"]


def test_presets_can_be_run():
    for name, values in PRESETS.items():
        sweep = SweepConfig.from_dict(values)
        assert len(sweep.runs()) == {"default": 4 * 5 * 2, "paper": 18 * 5 * 3}[name]


def test_every_run_is_there_once_with_all_its_keys(tiny, swept):
    folder, rows, said = swept
    assert sorted(set(rows["run"])) == sorted(NAMES)
    assert sorted(path.stem for path in (folder / "results").glob("*.parquet")) == sorted(NAMES)
    assert not rows.duplicated(["run", "split", "length", "metric"]).any()
    assert (rows["status"] == "done").all() and rows["reason"].isna().all()
    assert (
        rows[["task", "encoding", "scratchpad", "seed", "train_length", "split", "metric", "value", "n"]]
        .notna()
        .all(axis=None)
    )
    assert len(said) == 9 and said[-1].startswith("[9/9] ")
    steps = rows[rows["scratchpad"] == "steps"]
    assert set(steps["metric"]) == {"exact_match", "steps_exact", "right_answer_wrong_steps"}
    assert set(rows[rows["scratchpad"] == "none"]["metric"]) == {"exact_match"}
    # One data set: any reader of parquet has it whole.
    whole = pd.read_parquet(folder / "results")
    assert len(whole) == len(rows) and whole["value"].sum() == pytest.approx(rows["value"].sum())
    assert not (folder / "models").exists() or not list((folder / "models").iterdir())


def test_a_run_is_what_it_would_be_alone(tiny, swept, tmp_path):
    run = next(run for run in tiny.runs() if run.name == "sums-steps-hybrid-3")
    alone = work(tiny, run, tmp_path, "cpu")
    found = swept[1][swept[1]["run"] == run.name].reset_index(drop=True)
    assert found["value"].tolist() == alone["value"].tolist()
    assert found["length"].tolist() == alone["length"].tolist()


def test_what_is_finished_is_not_run_again(tiny, swept, monkeypatch):
    folder, rows, _ = swept
    monkeypatch.setattr(
        "probe.sweep.run.run_locally", lambda sweep, runs, *a, **k: ((run, "run again") for run in runs[:1])
    )
    said = []
    pd.testing.assert_frame_equal(run_sweep(tiny, folder, device="cpu", say=said.append), rows)
    assert said == []


def test_a_grid_may_grow_but_not_change(tiny, swept, tmp_path, monkeypatch):
    folder = tmp_path / "grown"
    shutil.copytree(swept[0], folder)
    asked = []

    def none_of_them(sweep, runs, *args, **options):
        asked.extend(runs)
        yield from ()

    monkeypatch.setattr("probe.sweep.run.run_locally", none_of_them)
    run_sweep(dataclasses.replace(tiny, seeds=(3, 4)), folder, device="cpu")
    assert [run.seed for run in asked] == [4] * 9
    other = dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=13))
    with pytest.raises(ProbeError, match="was made with other settings of its task, model or training"):
        run_sweep(other, folder, device="cpu")


def test_a_failed_run_is_a_row_with_its_reason(tiny, tmp_path):
    bad = dataclasses.replace(
        tiny,
        tasks={"copy": tiny.tasks["copy"]},
        encodings={"none": {}},
        training=TrainingConfig(steps=40, batch_size=8, learning_rate=1e38, warmup=0.0, log_every=1),
    )
    said = []
    rows = run_sweep(bad, tmp_path, device="cpu", jobs=1, say=said.append)
    (row,) = rows.to_dict("records")
    assert (row["run"], row["status"], row["metric"]) == ("copy-none-3", "failed", "failed")
    assert "a smaller learning_rate than 1e+38 is wanted" in row["reason"] and "\n" not in row["reason"]
    assert said == [f"[1/1] copy-none-3: failed: {row['reason']}"]
    with pytest.raises(ProbeError, match="results with 'exact_match' of a test set were wanted, got none"):
        results_of(rows)
    before = (tmp_path / "results" / "copy-none-3.parquet").stat().st_mtime_ns
    run_sweep(bad, tmp_path, device="cpu", say=said.append)
    assert (tmp_path / "results" / "copy-none-3.parquet").stat().st_mtime_ns == before and len(said) == 1
    run_sweep(bad, tmp_path, device="cpu", jobs=1, retry_failed=True, say=said.append)
    assert len(said) == 2


def first_checkpoint(folder, timeout=120):
    """Wait until some run has one; its run's name."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for path in (folder / "models").glob("*/checkpoints/step-*"):
            return path.parents[1].name
        time.sleep(0.01)
    raise AssertionError("no run has come to a checkpoint")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_nothing(long, undisturbed, tmp_path):
    killed = []

    def kill():
        first_checkpoint(tmp_path)
        workers = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        for worker in workers[:1]:
            worker.kill()
            killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    said, told = [], []
    rows = run_sweep(
        long,
        tmp_path,
        device="cpu",
        jobs=2,
        say=said.append,
        on_progress=lambda *numbers: told.append(numbers),
    )
    killer.join()
    assert len(killed) == 1 and len(said) == 2
    assert told == [(0, 2), (1, 2), (2, 2)]
    pd.testing.assert_frame_equal(rows, undisturbed)


@pytest.mark.slow
def test_a_sweep_killed_and_started_again_is_complete(long, undisturbed, tmp_path):
    config = tmp_path / "sweep.json"
    config.write_text(json.dumps(dataclasses.asdict(long)))
    command = [
        sys.executable,
        "-m",
        "probe",
        "sweep",
        "--config",
        str(config),
        "--folder",
        str(tmp_path / "s"),
        "--device",
        "cpu",
    ]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    first_checkpoint(tmp_path / "s")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(read_results(tmp_path / "s"), undisturbed)


def test_two_sweeps_in_one_folder_are_refused(tiny, swept):
    with (
        open(swept[0] / ".lock", "w") as lock,
        pytest.raises(ProbeError, match="another process is at work in this folder"),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_sweep(tiny, swept[0], device="cpu")


def test_a_run_whose_process_keeps_dying_is_a_row_too(tiny, tmp_path, monkeypatch):
    # Every process that is spawned from here ends at once.
    monkeypatch.setattr("probe.sweep.local._child", _die)
    one = dataclasses.replace(tiny, tasks={"copy": tiny.tasks["copy"]}, encodings={"none": {}})
    rows = run_sweep(one, tmp_path, device="cpu", retries=1)
    assert rows["reason"].tolist() == ["its process ended with exit code -9, 2 times"]


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_a_sweep_has_the_limits_of_the_one_that_starts_it(tiny, tmp_path, monkeypatch):
    # The process is spawned and begins as ever; in place of a run it says which limits hold there.
    monkeypatch.setattr("probe.sweep.local._child", _tell_limits)
    one = dataclasses.replace(tiny, tasks={"copy": tiny.tasks["copy"]}, encodings={"none": {}})
    with limits(distance_block=11):
        rows = run_sweep(one, tmp_path, device="cpu")
    assert rows["reason"].tolist() == ["{'distance_block': 11}"]


def _tell_limits(*args):
    from probe.sweep import local

    local.attempt = lambda *_: str(current().changed())
    local._child(*args)


def test_the_league_is_drawn_from_a_sweep(swept, tmp_path, capsys):
    folder, rows, _ = swept
    results = results_of(rows)
    assert set(results["task"]) == {"copy", "sums", "sums+steps"}
    lengths = results[results["length"].notna()]
    assert lengths[lengths["task"] == "copy"]["length"].min() == 5  # beyond the trained ones only
    assert len(league(results)) == 2 * 3
    (tmp_path / "p.csv").write_text(
        "dataset,split,encoding,seed,length,accuracy\nd,s,none,1,9,1\nd,s,t5,1,9,0\nd,s,none,2,9,1\nd,s,t5,2,9,0\n"
    )
    out = tmp_path / "league.html"
    assert main(["league", str(folder), "--published", str(tmp_path / "p.csv"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ours:") and "published:" in printed and printed.endswith(f"{out}\n")
    assert "Which differences are real? published" in out.read_text()
    capsys.readouterr()
    assert main(["league", str(folder), "--out", str(out), "--json"]) == 0
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["value"] for row in tables if row["table"] == "league"] == league(results)["value"].tolist()
    assert {row["table"] for row in tables} == {"league", "difference", "accuracy"}
    assert main(["league"]) == 2
    assert "a sweep's folder or --published FILE is wanted" in capsys.readouterr().err
    assert main(["league", str(tmp_path)]) == 2
    assert "a sweep with at least one finished run was wanted" in capsys.readouterr().err


def test_sweep_from_flags(tmp_path, monkeypatch, capsys):
    seen = {}

    def run(sweep, folder, **options):
        seen.update(sweep=sweep, options=options)
        return pd.DataFrame({"status": ["done"]})

    monkeypatch.setattr("probe.sweep.run_sweep", run)
    flags = ["--tasks", "copy,lego", "--encodings", "none,t5", "--scratchpads", "none,full", "--seeds", "7,8"]
    assert main(["sweep", "--folder", str(tmp_path), *flags, "--steps", "9", "--d-model", "64", "--ray", "auto"]) == 0
    sweep = seen["sweep"]
    assert list(sweep.tasks) == ["copy", "lego"] and list(sweep.encodings) == ["none", "t5"] and sweep.seeds == (7, 8)
    assert len(sweep.runs()) == 2 * 2 * (1 + 2) and sweep.training.steps == 9 and sweep.model["d_model"] == 64
    assert seen["options"]["ray"] == "auto"
    capsys.readouterr()
    assert main(["sweep", "--folder", str(tmp_path), *flags, "--json"]) == 0
    assert capsys.readouterr().out == '{"status": "done"}\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["sort"]}, "unknown task 'sort'"),
        ({"tasks": {}}, "tasks must hold at least one, got none"),
        ({"encodings": {"none": 3}}, "encodings must be a list of names, or options by label"),
        ({"encodings": ["rope"]}, "unknown encoding 'rope'"),
        ({"tasks": {"copy": {"colour": 1}}}, "unknown option of task 'copy': 'colour'"),
        ({"scratchpads": ["half"]}, "unknown scratchpad 'half'"),
        ({"seeds": (1, 1)}, "seeds must be at least one, each once"),
        ({"model": {"d_model": 30, "n_layers": 1, "n_heads": 4}}, "d_model .30. must be divisible by n_heads .4."),
        ({"model": {"encoding": "t5"}}, "model must leave 'encoding' out"),
        ({"tasks": {"a b": {"task": "copy"}, "a_b": {"task": "copy"}}}, "two runs would be called 'a_b-none-0'"),
    ],
)
def test_bad_settings_are_one_clear_line(options, message):
    with pytest.raises(ProbeError, match=message) as caught:
        SweepConfig.from_dict(options)
    assert "\n" not in str(caught.value)
