import os
import signal
import time

import pytest

from probe.errors import ProbeError
from probe.files import read_rows, write_file, write_text
from probe.processes import deaf_to_interrupts


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_file_that_is_broken_off_is_not_there(tmp_path):
    write_text(tmp_path / "a", "old")
    for name in "ab":
        with pytest.raises(KeyboardInterrupt):
            write_file(tmp_path / name, lambda path: interrupt(path.write_text("half")))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


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
