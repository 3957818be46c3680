import threading
import time

import pandas as pd
import psutil
import pytest

from probe.errors import ProbeError
from probe.limits import limits
from probe.sweep import run_sweep

ray = pytest.importorskip("ray", reason="sweeps on Ray want the extra: pip install 'position-probe[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """A real cluster of this machine's own: a head that does no work and two nodes of one core."""
    from ray.cluster_utils import Cluster

    # Small stores, no dashboard: several clusters and a test suite share the machine.
    node = {"object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def at_first_checkpoint(folder, do) -> threading.Thread:
    def wait():
        deadline = time.monotonic() + 240
        while not list((folder / "models").glob("*/checkpoints/step-*")):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_killed_worker_is_placed_again_and_nothing_counts_twice(cluster, long, undisturbed, tmp_path):
    killed, said = [], []

    def kill():
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::_on_worker"):
                process.kill()
                killed.append(process.pid)
                return

    killer = at_first_checkpoint(tmp_path, kill)
    rows = run_sweep(long, tmp_path, device="cpu", ray=cluster[0].address, say=said.append)
    killer.join()
    assert len(killed) == 1 and len(said) == 2
    pd.testing.assert_frame_equal(rows, undisturbed)
    assert run_sweep(long, tmp_path, device="cpu", ray=cluster[0].address, say=said.append).equals(rows)
    assert len(said) == 2


def test_a_lost_node_is_survived(cluster, long, undisturbed, tmp_path):
    of, nodes = cluster
    lost = []

    def lose():
        of.remove_node(nodes[0], allow_graceful=False)
        lost.append(nodes[0])

    loser = at_first_checkpoint(tmp_path, lose)
    rows = run_sweep(long, tmp_path, device="cpu", ray=of.address)
    loser.join()
    assert lost
    pd.testing.assert_frame_equal(rows, undisturbed)


def test_runs_that_were_not_tried_have_not_failed_when_the_cluster_dies(long, undisturbed, tmp_path):
    """One core, so that one run is at work and the other waits when the raylet is killed."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    of = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False},
    )
    try:
        killer = at_first_checkpoint(tmp_path, lambda: of.head_node.kill_raylet(check_alive=False))
        lost = pytest.raises(ProbeError, match=r"is lost \(.*the same command tries the 2 runs that are left")
        with limits(cluster_seconds=5.0), lost as caught:
            run_sweep(long, tmp_path, device="cpu", ray=of.address)
        killer.join()
        assert "\n" not in str(caught.value) and not list((tmp_path / "results").glob("*.parquet"))
    finally:
        ray.shutdown()
        of.shutdown()
    pd.testing.assert_frame_equal(run_sweep(long, tmp_path, device="cpu"), undisturbed)


def test_no_cluster_is_one_clear_line(tiny, tmp_path):
    ray.shutdown()
    with pytest.raises(ProbeError, match="no Ray cluster answers at '127.0.0.1:1': .*refused") as caught:
        run_sweep(tiny, tmp_path, device="cpu", ray="127.0.0.1:1")
    assert "\n" not in str(caught.value)
