"""Killed at any moment, out of disk, or beside another process: what was finished stays whole, and the work goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from interrupted import command, finish, group_is_there
from safetensors import safe_open

from probe.cli import main
from probe.errors import ProbeError
from probe.files import write_file
from probe.runs import alone
from probe.study import StudyConfig, run_study
from probe.sweep import SweepConfig, run_sweep

KILLS = int(os.environ.get("PROBE_KILLS", "0"))  # 20 take a quarter of an hour


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "probe", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def assert_every_file_is_whole(folder):
    """Whatever has its final name can be read to its end."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or any(part.endswith(".tmp") for part in path.parts):
            continue
        if path.suffix == ".parquet":
            pd.read_parquet(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        elif path.suffix == ".html":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.slow
@pytest.mark.skipif(KILLS == 0, reason="takes minutes: PROBE_KILLS=20 runs it (sweeps are killed in their own tests)")
def test_a_study_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path):
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    finish(command(tmp_path / "whole", "study", jobs=2))
    lasted = time.monotonic() - began
    wanted = (tmp_path / "whole" / "study" / "rows.parquet").read_bytes()
    draw, kills, tries = random.Random(0), 0, 0
    while kills < KILLS:
        tries += 1
        (tmp_path / str(tries)).mkdir()
        arguments, folder = command(tmp_path / str(tries), "study", jobs=2), tmp_path / str(tries) / "study"
        while kills < KILLS:
            process = start(arguments)
            try:
                process.wait(timeout=draw.uniform(0.1 * lasted, lasted))
                break  # it came to its end first
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)  # its workers are not told: they see that it is gone
                process.wait()
                kills += 1
            deadline = time.monotonic() + 20
            while group_is_there(process.pid):
                assert time.monotonic() < deadline, "a worker outlived the study"
                time.sleep(0.02)
            assert_every_file_is_whole(folder)
        finish(arguments)
        assert_every_file_is_whole(folder)
        assert not [path for path in folder.rglob("*.tmp")]
        assert (folder / "rows.parquet").read_bytes() == wanted


@pytest.mark.parametrize(
    "work",
    [lambda folder: run_study(StudyConfig(), folder, device="cpu"), lambda folder: run_sweep(SweepConfig(), folder)],
)
def test_a_folder_at_which_another_process_works_is_refused(work, tmp_path):
    with alone(tmp_path), pytest.raises(ProbeError, match="another process is at work in this folder"):
        work(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_a_lock_goes_with_its_process(tmp_path):
    code = """if True:
        import os, pathlib, sys
        from probe.files import beside
        from probe.runs import alone
        folder = pathlib.Path(sys.argv[1])
        with alone(folder):
            beside(folder / "rows.parquet").write_text("half")
            (beside(folder / "models" / "final") / "deep").mkdir(parents=True)
            os.kill(os.getpid(), 9)
    """
    assert python(code, tmp_path).returncode == -9
    assert len(list(tmp_path.rglob("*.tmp"))) == 2
    with alone(tmp_path):
        assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "models"]


SMALL_FILES = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
from probe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    """No file may be larger than 64 kB there: the system refuses to write on, as it does where a disk is full."""
    wish = ["--task", "copy", "--steps", 2, "--n-train", 50, "--n-validation", 10, "--device", "cpu"]
    done = python(SMALL_FILES, "train", "--folder", tmp_path / "run", *wish)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / "final").exists()


def test_what_cannot_be_written_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("earlier")

    def half(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device", str(temporary))

    with pytest.raises(OSError, match="No space left"):
        write_file(path, half)
    assert path.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o555)
    assert main(["study", "--folder", str(tmp_path / "study"), "--device", "cpu"]) == 2
    assert "Permission denied" in capsys.readouterr().err
