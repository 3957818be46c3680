import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

from probe.errors import ProbeError
from probe.position.edits.subspaces import (
    CONCEPTS,
    Whitening,
    concept,
    concept_subspace,
    control_subspaces,
    random_subspace,
    with_controls,
)


@pytest.fixture(scope="module")
def states():
    """Correlated states with a straight and a bent way along the position."""
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(9, (3000,), generator=generator)
    x = torch.randn(3000, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    along = torch.randn(2, 12, generator=generator)
    return x + position[:, None] * along[0] + 0.2 * (position[:, None] - 4.0) ** 2 * along[1], position


@pytest.mark.parametrize("name", CONCEPTS)
def test_no_linear_probe_finds_what_was_erased(states, name):
    x, position = states
    subspace = concept_subspace(x, concept(name, position))
    erased = subspace.erased(x.double()).numpy()
    assert LinearRegression().fit(x, position).score(x, position) > 0.9
    assert LinearRegression().fit(erased, position).score(erased, position) < 1e-10
    assert subspace.rank == (1 if name == "position" else 8)
    accuracy = LogisticRegression(solver="newton-cholesky").fit(erased, position).score(erased, position)
    chance = np.bincount(position).max() / len(position)
    if name == "classes":
        assert accuracy <= chance + 1e-9
    else:
        assert accuracy > chance + 0.05  # the bend is still there for a classifier


def test_erasing_is_a_projection_that_moves_as_little_as_can_be(states):
    x, position = states
    x = x.double()
    subspace = concept_subspace(x, concept("position", position))
    once = subspace.erased(x)
    torch.testing.assert_close(subspace.erased(once), once)
    torch.testing.assert_close(once.mean(0), x.mean(0))
    torch.testing.assert_close(once + subspace.part(x), x)
    # Belrose et al. 2023, theorem 4.2: the part lies along Σ_xz and is read by its dual; written out with numpy.
    centred, z = (x - x.mean(0)).numpy(), position.double().numpy() - position.double().mean().item()
    along = centred.T @ z / len(z)
    read = np.linalg.solve(centred.T @ centred / len(z), along)
    wanted = centred - np.outer(centred @ read, along) / (read @ along)
    np.testing.assert_allclose((once - x.mean(0)).numpy(), wanted, atol=1e-8)


def test_a_random_subspace_knows_nothing_of_position(states):
    x, position = states
    subspace = random_subspace(Whitening.of(x), 3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(subspace.right @ subspace.left, torch.eye(3, dtype=torch.float64))
    erased = subspace.erased(x.double()).numpy()
    assert LinearRegression().fit(erased, position).score(erased, position) > 0.5
    assert np.linalg.matrix_rank(erased - erased.mean(0)) == 9


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_control_has_nothing_of_the_concept_it_is_a_control_of(states, name):
    """Orthogonal in the whitened space, it has no covariance with the concept: erased, it takes nothing of it along."""
    x, position = states
    x, z = x.double(), concept(name, position)
    found = concept_subspace(x, z)
    for control in control_subspaces(x, found, 4, torch.Generator().manual_seed(2)):
        assert control.rank == min(found.rank, 12 - found.rank)
        erased = control.erased(x)
        before, after = ((each - each.mean(0)).T @ (z - z.mean(0)) / len(z) for each in (x, erased))
        np.testing.assert_allclose(after, before, atol=1e-9)
        assert LinearRegression().fit(erased, position).score(erased, position) == pytest.approx(
            LinearRegression().fit(x, position).score(x, position), abs=1e-9
        )


def test_a_control_of_the_number_has_nothing_of_its_powers_either(states):
    """Beside a bent way along the position, a control that is orthogonal to the number alone would hold the bend."""
    x, position = states
    x, bent = x.double(), (position - 4.0).double() ** 2
    drawn = with_controls("position", x, position, lambda z: z, 8, torch.Generator().manual_seed(2))
    (found,) = drawn["none"]
    assert found.rank == 1 and len(drawn["random"]) == 8

    def covariances(controls, y):
        return torch.stack([(c.right @ (x - x.mean(0)).T @ (y - y.mean()) / len(y)).abs().max() for c in controls])

    assert covariances(drawn["random"], position.double()).max() < 1e-6
    assert covariances(drawn["random"], bent).max() < 1e-6
    assert covariances(control_subspaces(x, found, 8, torch.Generator().manual_seed(2)), bent).max() > 0.1


def test_a_concept_in_all_dimensions_leaves_none_for_a_control():
    x = torch.eye(4).repeat(10, 1)
    found = concept_subspace(x, concept("classes", torch.arange(4).repeat(10)))
    assert control_subspaces(x, found, 3, torch.Generator()) == []


def test_what_cannot_be_erased_is_one_clear_line(states):
    x, position = states
    with pytest.raises(ProbeError, match="a concept must vary"):
        concept_subspace(x, torch.ones(len(x), 1))
    with pytest.raises(ProbeError, match="finite"):
        concept_subspace(x * np.nan, concept("position", position))
    with pytest.raises(ProbeError, match="nothing to erase"):
        concept_subspace(torch.zeros(len(x), 4), concept("position", position))
    with pytest.raises(ProbeError, match="unknown concept 'place'"):
        concept("place", position)
    with pytest.raises(ProbeError, match="rank must be at most 12, .*, got 13"):
        random_subspace(Whitening.of(x), 13, torch.Generator())
