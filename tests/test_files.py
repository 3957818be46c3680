import multiprocessing
import os
import signal
import time

import pytest

from probe.errors import ProbeError
from probe.files import read_rows, write_file, write_folder, write_text
from probe.processes import deaf_to_interrupts, end


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_file_that_is_broken_off_is_not_there(tmp_path):
    write_text(tmp_path / "a", "old")
    for name in "ab":
        with pytest.raises(KeyboardInterrupt):
            write_file(tmp_path / name, lambda path: interrupt(path.write_text("half")))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_that_is_broken_off_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, renames):
    """Broken off before the old folder steps aside, before the new one takes its place, and after."""
    write_folder(tmp_path / "a", lambda folder: write_text(folder / "x", "old"))
    rename, calls = os.rename, []

    def counted(*paths):
        if len(calls) == renames:
            calls.append(paths)
            interrupt()
        calls.append(paths)
        rename(*paths)

    monkeypatch.setattr(os, "rename", counted)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "a", lambda folder: write_text(folder / "x", "new"))
    else:
        write_folder(tmp_path / "a", lambda folder: write_text(folder / "x", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == ("new" if renames == 2 else "old")


def _half(folder, begun):
    def write(path):
        path.write_text("half")
        begun.set()
        time.sleep(60)

    write_folder(folder / "deep" / "a", lambda path: write_file(path / "b", write))


def test_what_an_ended_process_had_begun_to_write_is_removed(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    write_text(tmp_path / "deep" / f".other.{os.getpid()}-0.tmp", "another process's, still at work")
    process = context.Process(target=_half, args=(tmp_path, begun))
    process.start()
    assert begun.wait(30) and len(list(tmp_path.rglob("*.tmp"))) == 3
    end([process], tmp_path)
    assert not process.is_alive()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f".other.{os.getpid()}-0.tmp"]


def test_interrupts_are_not_heard_inside_and_are_outside():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background hears none
    try:
        with deaf_to_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_damaged_table_is_one_clear_line(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ProbeError, match=r"rows\.parquet: not a whole parquet file; remove it"):
        read_rows(tmp_path / "rows.parquet")
