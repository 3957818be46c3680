import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from probe.cli.progress import progress
from probe.progress import Steps

WORK = """
import sys
from probe.cli.progress import progress
with progress("work", 40) as shown:
    print("before")
    shown.on_progress(2, 8)
    shown.on_log("none", {"step": 20, "loss": 0.25})
    shown.say("half of it [is] done")
    shown.on_progress(6.5, 8)
print("rows", "rich" in sys.modules)
"""


def test_steps_are_counted_and_what_is_within_one_too():
    told = []
    steps = Steps(2, lambda *numbers: told.append(numbers))
    inner = Steps(4, steps.within)
    for _ in range(4):
        inner.step()
    steps.step()
    steps.within(1, 2)
    steps.step()
    assert told == [(0, 2), (0, 2), (0.25, 2), (0.5, 2), (0.75, 2), (1, 2), (1.5, 2), (2, 2)]


def run_in_terminal(code, **environment):
    """What a script writes to stdout, a pipe, and to stderr, a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm", **environment}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 4096):
                seen += part
        except OSError:  # the other end is closed
            pass
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0, seen
    return out, seen.decode()


def test_a_terminal_shows_bars_with_the_time_left_and_stdout_none_of_it():
    out, seen = run_in_terminal(WORK)
    assert out == "before\nrows True\n"
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    work = [line for line in re.split(r"[\r\n]+", frames) if line.startswith("work")]
    assert (
        "0/?" in work[0] and "6/8" in work[-1] and re.search(r"\d:\d\d:\d\d left \d:\d\d:\d\d|left -:--:--", work[-1])
    )
    (training, *_) = re.findall(r"none .*20/40.*", frames)
    assert "loss 0.2500" in training
    assert "half of it [is] done" in frames


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"LOCAL_RANK": "1"}])
def test_a_terminal_that_shows_none_has_lines(environment):
    out, seen = run_in_terminal(WORK, **environment)
    assert out == "before\nrows False\n"
    assert seen == "half of it [is] done\r\n"


def test_no_terminal_has_lines_and_nothing_is_imported_for_it():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("before\nrows False\n", "half of it [is] done\n")


def test_bars_end_where_work_is_interrupted(capsys):
    with pytest.raises(KeyboardInterrupt), progress("work") as shown:
        shown.say("begun")
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "begun\n"
