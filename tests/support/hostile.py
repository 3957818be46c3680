"""What reads input from outside, each a function of bytes or values, and what may come of it: a result, or a refusal in
one line, within seconds, a bound of memory and the output folder."""

import contextlib
import io
import json
import os
import pickle
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jaxtyping
import numpy as np
import pandas as pd
import torch

from probe.cli import main
from probe.errors import ProbeError

SECONDS = 5.0
MEMORY = 2**29  # bytes that are used above what the process has used before
CLAIMED = 2**32  # bytes of address space, likewise: allocators reserve more than is used


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def payload(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more memory than ``MEMORY``, no more time than ``SECONDS``. What claims more than ``CLAIMED`` gets an error of
    another kind than is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + CLAIMED, hard))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    try:
        # Users have no checker of types that could refuse a value for us.
        with mock.patch.object(jaxtyping.config, "jaxtyping_disable", True):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    took = time.process_time() - cpu  # what others run on the machine is no fault of ours, but nothing may hang
    assert time.perf_counter() - started < 6 * SECONDS
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
    assert took < SECONDS and used < MEMORY, f"{took:.1f} s, {used / 2**20:.0f} MiB"


def refused(call: Callable[[], object]) -> str | None:
    """The message of a refusal, or None where the call went well; whatever else is raised is a finding."""
    with bounded():
        try:
            call()
        except ProbeError as error:
            message = str(error)
            assert message
            return message
        except OSError as error:
            return f"{error.filename}: {error.strerror or error}"
    return None


def command(*arguments: object) -> str | None:
    """What a command says in its refusal, which is one line and exit status 2; None where it went well."""
    said, told = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as asked:  # for help
            status = asked.code
    if status == 0:
        return None
    line = told.getvalue()
    assert status == 2, (status, line)
    assert line.startswith("probe: ") and line.endswith("\n") and line.count("\n") == 1 and line[:-1].isprintable(), (
        line
    )
    return line


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """Commands read and check all that they are told, and do no work."""
    nothing = mock.Mock(return_value=pd.DataFrame({"status": ["done"]}))
    with contextlib.ExitStack() as patched:
        for name in ("probe.study.run_study", "probe.study.train_one", "probe.sweep.run_sweep"):
            patched.enter_context(mock.patch(name, nothing))
        yield


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    """A folder for one example: pytest's would be that of all of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def tree(folder: Path) -> set[str]:
    """All that there is under a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def arrays(shape: tuple[int, ...] = (8, 12)) -> bytes:
    """A file of token ids."""
    file = io.BytesIO()
    np.save(file, np.arange(np.prod(shape)).reshape(shape) % 19)
    return file.getvalue()


def tensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


torch.set_num_threads(1)
