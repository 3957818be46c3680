"""Folders that commands work in: nothing of others is destroyed there, and nothing of one is mixed with another's."""

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from probe.cli import main
from probe.errors import ProbeError
from probe.files import beside, write_text
from probe.models.checkpoint import save
from probe.processes import end
from probe.runs import COMMANDS, LOCK, NOTES, alone, at_work, check_output, remove_unfinished, working_in
from probe.study import run as study_run


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_lock_that_points_elsewhere_is_refused_and_nothing_is_emptied(tmp_path):
    (tmp_path / "precious.txt").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to("../precious.txt")
    with pytest.raises(ProbeError, match=r"\.lock: must be a plain file"), alone(tmp_path / "run"):
        pass
    assert (tmp_path / "precious.txt").read_text() == "years of work"
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run" / LOCK).hardlink_to(tmp_path / "precious.txt")
    with alone(tmp_path / "run"):
        assert (tmp_path / "precious.txt").read_text() == "years of work"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / LOCK)
    with pytest.raises(ProbeError, match=r"\.lock: must be a plain file"), alone(tmp_path):
        pass


def test_without_locks_there_is_a_way_to_go_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ProbeError, match=r"no locks \(Function not implemented\).* set PROBE_WITHOUT_LOCK=1"):
        alone(tmp_path).__enter__()
    monkeypatch.setenv("PROBE_WITHOUT_LOCK", "1")
    with alone(tmp_path):
        write_text(tmp_path / "a", "a")
    assert (tmp_path / "a").read_text() == "a"


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path):
    (tmp_path / "old").mkdir()
    for name, left in (("new", False), ("old", True)):
        with pytest.raises(ProbeError, match="no"), alone(tmp_path / name):
            raise ProbeError("no")
        assert (tmp_path / name).exists() == left
    with alone(tmp_path / "new"):
        write_text(tmp_path / "new" / "a", "a")
    assert sorted(os.listdir(tmp_path / "new")) == [LOCK, "a"]


def test_what_somebody_else_keeps_in_the_folder_stays(tmp_path):
    """Names of temporary files, at any depth, in a folder that a run begins to work in."""
    home = tmp_path / "home"
    write_text(home / "work" / ".backup.2026-11-30.tmp" / "thesis.tex", "years of work")
    write_text(home / ".notes.final-version.tmp", "notes")
    write_text(home / "run" / ".rows.parquet.123-0123abcd.tmp", "what a living run is writing")
    before = tree(home)
    with at_work(home, "study"):
        assert {name: c for name, c in tree(home).items() if name != LOCK} == before
    assert {name: c for name, c in tree(home).items() if name != LOCK} == before


def test_notes_from_elsewhere_remove_nothing_of_others(tmp_path):
    """An archive may hold notes that name anything."""
    name = ".a.1-01234567.tmp"
    run = tmp_path / "run"
    write_text(tmp_path / name, "outside")
    write_text(tmp_path / "other" / name, "behind a link")
    write_text(run / "thesis.tex", "years of work")
    (run / "link").symlink_to("../other")
    write_text(run / NOTES / "1-a", "\0".join([f"../{name}", f"link/{name}", str(tmp_path / name), "thesis.tex", ""]))
    (run / NOTES / "1-b").symlink_to("../thesis.tex")
    os.mkfifo(run / NOTES / "1-c")
    before = tree(tmp_path)
    with alone(run):
        pass
    assert {n: c for n, c in before.items() if NOTES not in n} == {
        n: c for n, c in tree(tmp_path).items() if NOTES not in n and not n.endswith(LOCK)
    }


def _half(folder, begun):
    with working_in(folder):
        (beside(folder / "deep" / "a") / "b").mkdir(parents=True)
        beside(folder / "deep" / "b").write_text("half")
        begun.set()
        multiprocessing.Event().wait()


def test_a_process_of_a_study_notes_what_it_begins_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(study_run, "use_threads", lambda threads: None)
    study_run._begin(1, tmp_path, {})
    try:
        gc.collect()
        unfinished = beside(tmp_path / "rows" / "a.parquet")
        unfinished.parent.mkdir()
        unfinished.write_text("half")
        remove_unfinished(tmp_path)
        assert not unfinished.exists()
    finally:
        study_run._WORK.close()


def test_what_an_ended_process_had_begun_to_write_is_removed(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    with alone(tmp_path):
        process = context.Process(target=_half, args=(tmp_path, begun))
        process.start()
        assert begun.wait(30) and len(list(tmp_path.rglob("*.tmp"))) == 2
        end([process])
        assert not process.is_alive()
        kept = beside(tmp_path / "of a process that is at work")
        kept.write_text("half")
        assert kept.exists()
    assert [path.name for path in tmp_path.rglob("*")] == [LOCK, "deep"] or not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / NOTES).exists()


@pytest.mark.parametrize("owner", COMMANDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_belongs_to_one_command(owner, command, tmp_path):
    write_text(tmp_path / COMMANDS[owner].record, '{"format": 1}')
    if command == owner:
        with at_work(tmp_path, command):
            return
    before = tree(tmp_path)
    with pytest.raises(ProbeError, match=rf"holds the work of `probe {owner}`"), at_work(tmp_path, command):
        pass
    for name in COMMANDS[owner].writes:
        with pytest.raises(ProbeError, match=rf"lies in the work of `probe {owner}`"):
            at_work(tmp_path / name / "deep", command).__enter__()
        with pytest.raises(ProbeError, match=rf"is a file of `probe {owner}`"):
            check_output(tmp_path / name)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_unknown_origin_are_not_overwritten(command, tmp_path):
    for name in COMMANDS[command].writes:
        write_text(tmp_path / name / name, "mine")
        with pytest.raises(ProbeError, match=rf"holds '{name}', which `probe {command}` would overwrite"):
            at_work(tmp_path / name, command).__enter__()
        assert tree(tmp_path / name) == {name: b"mine"}


@pytest.mark.parametrize("command", ["sweep", "measure", "compare", "fit", "perplexity", "passkey"])
def test_a_file_that_only_has_the_name_of_a_record_is_none(command, tmp_path):
    write_text(tmp_path / COMMANDS[command].record, '{"project": "mine"}')
    with pytest.raises(ProbeError, match="got another file of that name"):
        at_work(tmp_path, command).__enter__()
    assert len(tree(tmp_path)) == 1


def test_every_record_is_of_one_command():
    assert max(Counter(kind.record for kind in COMMANDS.values()).values()) == 1


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A small model of bytes, and token ids for it."""
    from probe.models.decoder import Decoder, DecoderConfig
    from probe.tasks import make_task

    d_vocab = len(make_task("passkey").vocabulary)
    folder = tmp_path_factory.mktemp("byte") / "model"
    save(Decoder(DecoderConfig(d_vocab=d_vocab, n_ctx=64, n_layers=1, d_model=8, n_heads=1), seed=0), folder)
    np.save(folder.parent / "ids.npy", np.random.default_rng(0).integers(0, d_vocab, (12, 10)))
    return folder


@pytest.mark.parametrize(
    "command", ["measure", "examine", "compare", "fit", "perplexity", "passkey", "scale", "train", "sweep"]
)
def test_every_command_refuses_the_folder_of_a_study(command, byte_model, tmp_path, capsys):
    write_text(tmp_path / "study.json", "{}")
    write_text(tmp_path / "rows" / "probe-none.parquet", "a study's")
    write_text(tmp_path / "rows.parquet", "a study's")
    before = tree(tmp_path)
    options = {
        "examine": [byte_model, "--tokens", byte_model.parent / "ids.npy", "--length", 8, "--sequences", 8],
        "measure": [byte_model, "--tokens", byte_model.parent / "ids.npy"],
        "compare": [byte_model, "--tokens", byte_model.parent / "ids.npy"],
        "fit": [byte_model, "--tokens", byte_model.parent / "ids.npy"],
        "train": ["--task", "copy", "--steps", 1, "--n-train", 20],
        "sweep": ["--tasks", "copy", "--encodings", "none"],
    }.get(command, [byte_model, "--train-length", 64, "--n-texts", 2])
    assert main([command, *map(str, options), "--folder", str(tmp_path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds the work of `probe study` (study.json)" in error
    assert tree(tmp_path) == before


def test_a_command_may_be_run_again_in_its_folder_and_others_may_not(byte_model, tmp_path, capsys):
    arguments = ["--tokens", str(byte_model.parent / "ids.npy"), "--device", "cpu", "--folder", str(tmp_path / "x")]
    assert main(["compare", str(byte_model), *arguments]) == 0
    assert json.loads((tmp_path / "x" / "compare.json").read_text())["format"] == 3
    before = tree(tmp_path / "x")
    assert main(["fit", str(byte_model), *arguments]) == 2
    assert "holds the work of `probe compare`" in capsys.readouterr().err
    assert tree(tmp_path / "x") == before
    with alone(tmp_path / "x"):
        assert main(["compare", str(byte_model), *arguments]) == 2
    assert "another process is at work" in capsys.readouterr().err


def test_examined_stages_are_of_the_weights_that_are_there(byte_model, make_decoder, tmp_path, capsys):
    """Another model at the same place is not taken for the one whose stages are finished."""
    save(make_decoder(seed=1, n_layers=1), tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 19, (12, 10)))
    arguments = ["examine", str(tmp_path / "model"), "--tokens", str(tmp_path / "ids.npy"), "--length", "10",
                 "--sequences", "8", "--folder", str(tmp_path / "x"), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    save(make_decoder(seed=2, n_layers=1), tmp_path / "model")
    assert main(arguments) == 2
    assert "holds other work: it was begun with models.model" in capsys.readouterr().err


def test_the_other_processes_of_a_training_write_and_remove_nothing(tmp_path, monkeypatch):
    """Process 1 of a distributed training, in a folder in which process 0 has begun."""
    from probe.models.decoder import DecoderConfig
    from probe.tasks import make_task
    from probe.training import TrainingConfig, encode
    from probe.training.run_folder import RunFolder

    task = make_task("copy", {"train_length": 4, "test_length": 8})
    data = encode(task.splits(n_train=20, n_validation=2, n_test=2).train, task.vocabulary)
    model = DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=16, n_layers=1, d_model=8, n_heads=1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, written in (("1", []), ("0", ["run.json"])):
        monkeypatch.setenv("RANK", rank)
        RunFolder(tmp_path / "run", model, data, TrainingConfig(steps=1), None, True)
        assert sorted(tree(tmp_path)) == [f"run/{name}" for name in written]


@pytest.mark.slow
def test_two_processes_train_one_model_in_a_new_folder(tmp_path):
    wish = ["--task", "copy", "--task-options", "train_length=4,test_length=8", "--n-train", "50", "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "probe",
         "train", "--folder", str(tmp_path / "run"), "--device", "cpu", *wish],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "config.json").is_file() and not list((tmp_path / "run").rglob("*.tmp"))
