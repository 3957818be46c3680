"""Processes that work for this one and end with it: Ctrl-C reaches this one alone, which then ends the others."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Collection, Iterator
from multiprocessing.process import BaseProcess


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C is not heard; by processes that are started inside it never is.

    A terminal sends it to all processes at once. Those at work would each print a traceback, and a pool's would take
    up the next piece of work. What they cannot hear in their first moment either is said by their inheritance: ignored
    signals stay ignored in a new program. Elsewhere than in the main thread signals cannot be set, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def end_with_parent() -> None:
    """From now on this process ends when the one that started it is gone, killed, say: nobody waits for its results,
    and another may be started in its place."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def end(processes: Collection[BaseProcess]) -> None:
    """End processes at once. Whole files stay; ``probe.runs.alone`` removes what they had begun to write."""
    with deaf_to_interrupts():
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
