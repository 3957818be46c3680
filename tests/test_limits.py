"""Limits: changed for a block, checked, and handed to the processes that work for this one."""

import contextlib
import contextvars
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

from probe import attention
from probe.attention.pooling import pooled_pattern
from probe.attention.score_split.sums import ScoreSums
from probe.benchmark.processes import in_processes
from probe.errors import ProbeError
from probe.extrapolation import perplexity
from probe.files import read_json_object
from probe.limits import Limits, adopt, current, limits
from probe.models import checkpoint
from probe.position import LinearProbe, SoftmaxProbe
from probe.report.export import read_page
from probe.runs import RunFolder
from probe.study import StudyConfig
from probe.study import run as study_run
from probe.tracing import SCORES, trace


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
    return pd.DataFrame({"metric": ["loss"], "value": [0.5]})


def test_a_process_of_a_study_begins_with_the_limits_that_it_is_given(tmp_path, monkeypatch):
    with contextlib.ExitStack() as work:
        monkeypatch.setattr(study_run, "_WORK", work)
        context = contextvars.copy_context()
        context.run(study_run._begin, 1, tmp_path, {"distance_block": 11})
        assert context.run(current) == Limits(distance_block=11) and current() == Limits()


def _streamed():
    q, k = torch.randn(2, 2, 70, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    template = {"alibi": attention.StreamTemplate.alibi(torch.tensor([0.5, 0.1]))}
    t5 = {"t5": attention.StreamTemplate.t5(torch.linspace(-1, 1, 64).sin().view(32, 2))}
    found = [attention.stream_attention(q.float(), k.float(), scale=0.3, templates=template | t5, path="fused")]
    found.append(attention.stream_attention(q, k, scale=0.3, templates=template, histogram=True, path="blocks"))
    numbers = [each.entropy for each in found] + [d.kl for each in found for d in each.divergence.values()]
    return torch.cat([each.double().flatten() for each in numbers])


def _pooled():
    q, k = torch.randn(2, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    return pooled_pattern(q, k, 0.3, bins=7)


def _sums():
    q, k = torch.randn(2, 2, 70, 8, generator=torch.Generator().manual_seed(0))
    return torch.cat([ScoreSums.of_queries_and_keys(q, k, 0.3, window=w).squares for w in (None, 9)])


def _curves(model, tokens):
    rows = attention.split_scores(trace(model, tokens, [SCORES]), n_bootstrap=5).curves
    return torch.tensor(rows[["value", "low", "high"]].to_numpy(float))


def _logits(model, tokens):
    return model(tokens)


def _losses(model, tokens):
    return torch.tensor(perplexity(model, tokens, (8, 16), n_bootstrap=5)["value"].to_numpy(float))


def _probes():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(200) % 4
    softmax = SoftmaxProbe(tol=1e-10).fit((x + y[:, None]).numpy(), y.numpy())
    return torch.cat((torch.from_numpy(LinearProbe().fit(x, x[:, 0] + y).coef_), torch.from_numpy(softmax.coef_[0])))


@pytest.mark.parametrize(
    ("measure", "small"),
    [
        (_streamed, {"pattern_block": 90, "pattern_rows": 3, "fused_block": 7, "fused_stretch": 2}),
        (_pooled, {"pattern_block": 300}),
        (_sums, {"squares_block": 4}),
        (_curves, {"curve_block": 5}),
        (_logits, {"explicit_length": 1}),
        (_losses, {"window_tokens": 1, "logits_at_once": 1}),
        (_probes, {"moment_rows": 7, "loss_rows": 9}),
    ],
    ids=lambda x: getattr(x, "__name__", "of"),
)
def test_no_number_depends_on_the_size_of_blocks(measure, small, make_decoder, random_tokens):
    given = (make_decoder(), random_tokens()) if measure.__code__.co_argcount else ()
    wanted = measure(*given)
    with limits(**small):
        found = measure(*given)
    assert len(wanted) and not torch.equal(wanted, torch.zeros_like(wanted))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5, equal_nan=True)


def test_what_is_read_is_bounded(tmp_path, make_decoder):
    (tmp_path / "a.json").write_text('{"a": [1, 2, 3]}')
    for change in ({"json_bytes": 5}, {"json_values": 2}):
        with limits(**change), pytest.raises(ProbeError, match=r"must be JSON of at most \d (bytes|values), got more"):
            read_json_object(tmp_path / "a.json")
    assert read_json_object(tmp_path / "a.json") == {"a": [1, 2, 3]}
    checkpoint.save(make_decoder(), tmp_path / "model")
    with limits(header_bytes=10), pytest.raises(ProbeError, match="a header of at most 10 bytes"):
        checkpoint.load(tmp_path / "model")
    (tmp_path / "page.html").write_text("<p>a page</p>" * 2)
    with limits(read_page_bytes=9), pytest.raises(ProbeError, match="must be a report of at most 9 bytes"):
        read_page(tmp_path / "page.html")


def test_steps_are_bounded():
    q = torch.softmax(torch.randn(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf), -1)
    whole = attention.TEMPLATES["first_token_sink"](q, torch.tensor([12])).pattern
    with limits(log_odds_steps=1):
        first = attention.TEMPLATES["first_token_sink"](q, torch.tensor([12])).pattern
    assert not torch.allclose(first, whole, atol=1e-4)
