"""Limits: changed for a block, checked, and handed to the processes that work for this one."""

import contextvars
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from probe.benchmark.processes import in_processes
from probe.errors import ProbeError
from probe.limits import Limits, adopt, current, limits
from probe.runs import RunFolder
from probe.study import StudyConfig


def test_limits_are_changed_for_a_block():
    assert current() == Limits() and current().changed() == {}
    with limits(distance_block=11) as held:
        assert held is current() and current() == Limits(distance_block=11)
        with limits(fire_block=7):  # the others stay as they are
            assert current().changed() == {"distance_block": 11, "fire_block": 7}
        assert current().changed() == {"distance_block": 11}
    with pytest.raises(KeyError), limits(distance_block=12):
        raise KeyError
    assert current() == Limits()


def test_a_wrong_limit_is_refused_in_one_line():
    with pytest.raises(ProbeError, match="unknown limit 'distance_blok'.*did you mean 'distance_block'"):
        limits(distance_blok=11).__enter__()
    for name, value in [("distance_block", 0), ("fire_block", -3), ("json_bytes", True), ("cluster_seconds", 0.0)]:
        with pytest.raises(ProbeError, match=f"{name} must be") as caught:
            limits(**{name: value}).__enter__()
        assert "\n" not in str(caught.value)
    assert current() == Limits()


def test_a_thread_has_the_defaults_unless_it_runs_in_a_copy_of_the_context():
    with limits(distance_block=11):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(current).result() == Limits()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(contextvars.copy_context().run, current).result() == Limits(distance_block=11)


def test_a_process_adopts_what_was_changed_in_another():
    found = []

    def first_line(given):
        adopt(given)
        found.append(current())

    with limits(distance_block=11, cluster_seconds=2.5):
        given = current().changed()
    thread = threading.Thread(target=first_line, args=(given,))
    thread.start()
    thread.join()
    assert found == [Limits(distance_block=11, cluster_seconds=2.5)] and current() == Limits()


def _changed(_: int) -> dict:
    return current().changed()


def test_processes_of_the_benchmark_have_the_limits_of_the_one_that_starts_them():
    with limits(distance_block=11):
        assert list(in_processes(_changed, [0, 1], 2)) == [{"distance_block": 11}] * 2


def test_a_folder_belongs_to_the_limits_that_decide_what_is_measured(tmp_path):
    with RunFolder.open(tmp_path / "a", "measure", {"seed": 0}) as run:
        run.measure("x", _rows)
    with limits(distance_block=11), RunFolder.open(tmp_path / "a", "measure", {"seed": 0}) as run:
        assert run.has("x")  # the same numbers
    refused = pytest.raises(ProbeError, match=r"holds other work: .*limits.*'dense_numbers': 1")
    with limits(dense_numbers=1), refused, RunFolder.open(tmp_path / "a", "measure", {"seed": 0}):
        pass
    study = StudyConfig()
    assert StudyConfig.from_dict(dataclasses.asdict(study) | {"limits": {"dense_numbers": 1}}) == study


def _rows():
    import pandas as pd

    return pd.DataFrame({"metric": ["loss"], "value": [0.5]})
