"""A folder that replaces another one: whenever the process is killed, a whole folder is at the path."""

import errno
import os
import sys

import pytest

from probe import folders
from probe.errors import ProbeError
from probe.files import write_text
from probe.folders import exchange, restore, write_folder
from probe.models.checkpoint import load, save

FILES = ("a.json", "b.bin")


def write(text):
    return lambda folder: [write_text(folder / name, text) for name in FILES]


def content(path):
    return [(path / name).read_text() for name in FILES]


def killed_at(work, call):
    """Do the work in a child that is killed before its system call of that number; False where it came to its end."""
    child = os.fork()
    if child == 0:
        number = 0

        def count(event, _):
            nonlocal number
            # What changes names on the disk goes through an audit hook before it is done.
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "exchange"):
                number += 1
                if number > call:
                    os._exit(7)

        try:
            exchanged = folders.exchange
            folders.exchange = lambda *paths: (sys.audit("exchange"), exchanged(*paths))
            sys.addaudithook(count)
            work()
            os._exit(0)
        finally:
            os._exit(9)  # the work raised
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 7)
    return os.waitstatus_to_exitcode(status) == 7


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_before_any_system_call_leaves_a_whole_folder(exchanges, tmp_path, monkeypatch):
    """With the exchange of two paths a whole folder is there at once; without, after ``restore``."""
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda: None)
    call, found = 0, []
    while True:
        path = tmp_path / str(call) / "final"
        write_folder(path, write("old"))
        if not killed_at(lambda path=path: write_folder(path, write("new")), call):
            break
        if not exchanges:
            restore(path)
        assert content(path) in (["old", "old"], ["new", "new"])
        found.append(content(path)[0])
        write_folder(path, write("newer"))  # and the next one is not disturbed by what the killed one left
        assert content(path) == ["newer", "newer"]
        call += 1
    assert content(path) == ["new", "new"] and os.listdir(path.parent) == ["final"]
    assert {"old", "new"} == set(found) and found == sorted(found, reverse=True) and call > 10


def test_a_checkpoint_that_had_stepped_aside_is_read(make_decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda: None)
    save(make_decoder(seed=1), tmp_path / "model")
    rename = os.rename

    def killed(source, target):
        if str(source).endswith(".tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", killed)
    monkeypatch.setattr(folders, "restore", lambda path: None)  # a killed process does nothing more
    with pytest.raises(KeyboardInterrupt):
        save(make_decoder(seed=2), tmp_path / "model")
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    assert load(tmp_path / "model").head.weight.equal(make_decoder(seed=1).head.weight)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="other systems have no such call")
def test_two_paths_are_exchanged_and_errors_are_the_systems(tmp_path):
    write_text(tmp_path / "a" / "x", "a")
    write_text(tmp_path / "b", "b")
    exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b" and (tmp_path / "b" / "x").read_text() == "a"
    with pytest.raises(OSError) as caught:
        exchange(tmp_path / "a", tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_fails_leaves_the_old_folder_and_nothing_beside_it(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda: None)
    path = tmp_path / "final"
    write_folder(path, write("old"))

    def half(folder):
        write_text(folder / FILES[0], "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(path, half)
    rename = os.rename
    monkeypatch.setattr(folders, "exchange", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no")))
    monkeypatch.setattr(
        folders.os, "rename", lambda a, b: rename(a, b) if not str(a).endswith(".tmp") else half(path.parent / "x")
    )
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, write("new"))
    assert content(path) == ["old", "old"] and sorted(os.listdir(tmp_path)) == ["final", "x"]


def test_other_files_are_not_replaced(tmp_path, make_decoder):
    """A config.json alone does not make a folder a checkpoint: somebody's project has one, too."""
    write_text(tmp_path / "project" / "config.json", "{}")
    write_text(tmp_path / "project" / "thesis.tex", "years of work")
    write_text(tmp_path / "file", "mine")
    for path in (tmp_path / "project", tmp_path / "file"):
        with pytest.raises(ProbeError, match="must be a new folder or an older one of the same kind"):
            save(make_decoder(), path)
        with pytest.raises(ProbeError, match="must be a new folder or an older one of the same kind"):
            write_folder(path, write("new"))
    assert sorted(os.listdir(tmp_path)) == ["file", "project"]
    assert (tmp_path / "project" / "thesis.tex").read_text() == "years of work"


def test_a_link_to_a_folder_is_replaced_and_what_it_points_to_stays(tmp_path):
    write_folder(tmp_path / "elsewhere", write("old"))
    (tmp_path / "final").symlink_to("elsewhere")
    write_folder(tmp_path / "final", write("new"))
    assert content(tmp_path / "final") == ["new", "new"] and content(tmp_path / "elsewhere") == ["old", "old"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "final"]
