"""The checker of types and shapes that all other tests run under."""

from collections.abc import Iterator
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from shape_checker import jaxtyped
from torch import Tensor

from probe.statistics import drawn_shares

A, B = torch.zeros(2, 3), torch.zeros(3, 4)


@jaxtyped
def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"], transpose: bool = False) -> Float[Tensor, "a c"]:
    return (x @ y).T if transpose else x @ y


@jaxtyped
def rows(x: Float[Tensor, "a b"]) -> Iterator[Tensor]:
    yield from x


@jaxtyped
def later(x: "Unknown", y: "Tensor") -> None: ...


def nested():
    @jaxtyped
    def inner(
        x: Float[Tensor, "a b"], *rest: int, factor: float = 1.0, result: object = None, **more: str
    ) -> Float[Tensor, "b a"]:
        return x.T * factor if result is None else result

    return inner


@jaxtyped
@dataclass
class Pair:
    x: Float[Tensor, "a b"]
    y: Float[Tensor, " b"]

    @classmethod
    @jaxtyped
    def of(cls, size: int) -> "Pair":
        return cls(torch.zeros(2, size), torch.zeros(size))

    @property
    @jaxtyped
    def total(self) -> float:
        return self.x


@jaxtyped
@dataclass
class Named(Pair):
    name: str = ""


class Heir(Pair):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda: product(A, A),  # axes of one name
        lambda: product(A, B.long()),
        lambda: product(x=A, y=B, transpose=1),
        lambda: product(A, B, transpose=True),  # the result
        lambda: rows(A[0]),
        lambda: later(None, 1),
        lambda: nested()(A[0]),
        lambda: nested()(A, "1"),
        lambda: nested()(A, 1, factor="1"),
        lambda: nested()(A, more=1),
        lambda: nested()(A, result=A),
        lambda: Pair(A, A[:, 0]),
        lambda: Pair(A, y=A),
        lambda: Named(A, A[0], name=1),
        lambda: Heir(A, A),
        lambda: Pair.of("3"),
        lambda: Pair.of(3).total,
        lambda: drawn_shares("2", 3, torch.Generator()),  # of the package: the hook is in place
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_what_fits_is_let_through():
    assert product(A, B).shape == product(B.T, y=A.T).T.shape
    assert len(list(rows(A))) == 2
    assert nested()(A, 1, 2, factor=2, more="1").shape == (3, 2)
    later(1, A)
    assert Named(A, A[0], name="1").name == "1" and Pair.of(3).y.shape == (3,)
    assert Heir(A, A[0]).x is A


def test_the_shapes_are_said():
    with pytest.raises(jaxtyping.TypeCheckError) as error:
        product(A, A)
    assert error.value.__notes__ == [
        f"{__name__}.product was called with [torch.Size([2, 3]), torch.Size([2, 3])]",
    ]


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert nested()(A, "1").shape == (3, 2) and product(A, B, transpose=True).shape == (4, 2)
