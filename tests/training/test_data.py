import pytest
import torch

from probe.errors import ProbeError
from probe.training.data import BatchOrder, encode


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


def test_little_is_padded(data):
    order = BatchOrder(data.lengths, batch_size=50, seed=0)
    batches = [data.batch(order.rows(step)) for step in range(40)]
    wanted = sum(int(data.lengths[order.rows(step)].sum()) - 50 for step in range(40))
    assert wanted / sum(b.inputs.numel() for b in batches) > 0.9


def test_sequences_of_one_length_are_cut_not_padded(data):
    tokens = data.to_length(10)
    assert len(tokens) == int((data.lengths >= 10).sum())
    assert (tokens != 0).all()


def test_bad_input_is_one_clear_line(task, data):
    with pytest.raises(ProbeError, match="at least one example was wanted, got none"):
        encode([], task.vocabulary)
    with pytest.raises(ProbeError, match="batch_size must be at least 1, got 0"):
        BatchOrder(data.lengths, 0, 0)
