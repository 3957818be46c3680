import pytest
import torch

from probe.errors import ProbeError
from probe.tasks import make_task
from probe.tasks.base import EOS
from probe.training.data import BatchOrder, Feed, encode


def test_only_the_completion_is_scored(task, splits, data):
    batch = data.batch(torch.arange(50))
    for i, example in enumerate(splits.train[:50]):
        sequence = task.vocabulary.prompt(example) + task.vocabulary.completion(example)
        assert batch.inputs[i, : len(sequence) - 1].tolist() == sequence[:-1]
        scored = batch.targets[i][batch.scored[i]].tolist()
        assert task.vocabulary.decode(scored) == [*example.target, "<eos>"]


def test_a_batch_is_as_wide_as_its_longest(data):
    rows = torch.tensor([0, 1, 2])
    assert data.batch(rows).inputs.shape == (3, data.lengths[rows].max() - 1)


def test_every_epoch_sees_every_example_once_in_another_order(data):
    order = BatchOrder(data.lengths, batch_size=20, seed=0)
    epochs = [torch.cat([order.rows(step) for step in range(start, start + 100)]) for start in (0, 100)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(2000))
    assert not torch.equal(*epochs)


def test_the_order_is_a_function_of_seed_and_step(data):
    forwards, backwards = BatchOrder(data.lengths, 16, seed=5), BatchOrder(data.lengths, 16, seed=5)
    there = [forwards.rows(step) for step in range(300)]
    back = [backwards.rows(step) for step in reversed(range(300))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))
    assert not torch.equal(BatchOrder(data.lengths, 16, seed=6).rows(0), there[0])


@pytest.mark.parametrize("name", ["copy", "addition", "scan", "lego", "pcfg"])
def test_little_is_padded(name):
    task = make_task(name)
    data = encode(task.splits(n_train=10_000, n_validation=1, n_test=1).train, task.vocabulary)
    order = BatchOrder(data.lengths, 64, seed=0)
    batches = [data.lengths[order.rows(step)] - 1 for step in range(order.batches_per_epoch)]
    slots = sum(len(lengths) * int(lengths.max()) for lengths in batches)
    assert 1 - sum(int(lengths.sum()) for lengths in batches) / slots < 0.03


@pytest.fixture
def mixed(data):
    """An order of batches whose sequences differ in length."""
    return BatchOrder(torch.ones_like(data.lengths), 24, seed=1)


@pytest.mark.parametrize(("n_processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 4)])
def test_the_parts_of_a_batch_are_the_batch(n_processes, accumulation, task, data, mixed):
    def sequences(inputs):
        return [[t for t in row if t not in (0, task.vocabulary.ids[EOS])] for row in inputs.tolist()]

    rows = mixed.rows(5)
    assert len(set(data.lengths[rows].tolist())) > 1
    whole = data.batch(rows)
    inputs, targets = [], []
    for process in range(n_processes):
        share = Feed(data, mixed, torch.device("cpu"), accumulation, process, n_processes).share(5)
        assert len(share.micro_batches) == accumulation
        assert share.n_scored == int(whole.scored.sum())
        assert share.n_tokens == int(data.lengths[rows].sum()) - 24
        for part in share.micro_batches:
            assert part.inputs[:, -1].any()  # no wider than its longest
            inputs += sequences(part.inputs)
            targets += part.targets.tolist()
    assert sorted(inputs) == sorted(sequences(whole.inputs))
    assert sorted(targets) == sorted(whole.targets[whole.scored].tolist())


def test_a_micro_batch_says_which_token_comes_where(data, mixed):
    (part,) = Feed(data, mixed, torch.device("cpu")).share(0).micro_batches
    batch = data.batch(mixed.rows(0))
    found = torch.full_like(batch.targets, -1)
    found.view(-1)[part.scored] = part.targets
    assert torch.equal(found, batch.targets.where(batch.scored, -1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_batch_comes_to_a_gpu_without_waiting_for_it(data):
    feed = Feed(data, BatchOrder(data.lengths, 24, seed=1), torch.device("cuda"), accumulation=2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        share = feed.share(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.inputs.is_cuda and part.scored.is_cuda and part.targets.is_cuda for part in share.micro_batches)


def test_sequences_of_one_length_are_cut_not_padded(data):
    tokens = data.to_length(10)
    assert len(tokens) == int((data.lengths >= 10).sum())
    assert (tokens != 0).all()


def test_bad_input_is_one_clear_line(task, data):
    with pytest.raises(ProbeError, match="at least one example was wanted, got none"):
        encode([], task.vocabulary)
    with pytest.raises(ProbeError, match="batch_size must be at least 1, got 0"):
        BatchOrder(data.lengths, 0, 0)
    with pytest.raises(ProbeError, match="batches of 2 sequences cannot be shared by 3 processes"):
        Feed(data, BatchOrder(data.lengths, 2, 0), torch.device("cpu"), n_processes=3)
