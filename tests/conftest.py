import os

# One core a process: the suite runs in several, and so do the commands and notebooks that it starts.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is downloaded in tests: who tries fails.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import shape_checker
import torch
from threadpoolctl import threadpool_limits

shape_checker.install()  # before the first import of ours

from probe.models.decoder import Decoder, DecoderConfig  # noqa: E402

torch.set_num_threads(1)
threadpool_limits(1)


#: The files that take longest, longest first. Whatever is begun last keeps other processes waiting.
LONG_FILES = (
    "test_notebooks.py",
    "test_study.py",
    "test_beyond.py",
    "test_ray.py",
    "test_static.py",
    "test_examine.py",
    "test_train.py",
    "test_sweep.py",
    "test_interrupt.py",
    "test_docs.py",
    "test_released_text.py",
    "test_readme.py",
)


def pytest_configure(config):
    # xdist would begin with the files of many tests, which are the quick ones.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


class Told(list):
    """What a command tells of its progress: (done, total), one after the other."""

    def to_the_end(self):
        """Where it began, and of how much: always more, and in the end all. Forgotten then, for the next command."""
        (total,) = {total for _, total in self}
        done = [done for done, _ in self]
        assert done == sorted(done) and done[-1] == total > 0
        self.clear()
        return done[0], total


@pytest.fixture
def told(monkeypatch):
    seen = Told()
    monkeypatch.setattr("probe.cli.progress.untold", lambda done, total: seen.append((done, total)))
    return seen


@pytest.fixture
def make_decoder():
    """A small random decoder; any option of its config can be set."""

    def make(seed=0, **options) -> Decoder:
        defaults = {"d_vocab": 19, "n_ctx": 32, "n_layers": 2, "d_model": 32, "n_heads": 4}
        return Decoder(DecoderConfig(**(defaults | options)), seed=seed).eval()

    return make


@pytest.fixture
def random_tokens():
    def make(batch=3, length=16, d_vocab=19, seed=0) -> torch.Tensor:
        return torch.randint(0, d_vocab, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make
