"""How far a piece of work is: numbers for whoever asks, nothing on a screen (``probe.cli.progress`` draws them)."""

from collections.abc import Callable

OnProgress = Callable[[float, float], None]  # called with how many pieces of work are done, and of how many


def untold(done: float, total: float) -> None:
    """Where nobody asks."""


class Steps:
    """Counts pieces of work that are done one after another, and tells each count, the first one, 0, included."""

    def __init__(self, total: int, on_progress: OnProgress = untold):
        self.total, self.done, self._on_progress = total, 0, on_progress
        on_progress(0, total)

    def step(self) -> None:
        """A piece is done."""
        self.done += 1
        self._on_progress(self.done, self.total)

    def within(self, done: float, total: float) -> None:
        """How far the piece is that is worked on: an ``OnProgress`` for whatever does it. Its end is a ``step``."""
        if done < total:
            self._on_progress(self.done + done / total, self.total)
