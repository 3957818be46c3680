"""Where training starts: random weights, a construction with a readout written by hand, or that with noise on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from constructions import absolute
from constructions.construction import StreamConstruction
from constructions.layout import ONE, POSITION
from constructions.weights import zero_weights
from probe.models.decoder import Decoder, DecoderConfig


@torch.no_grad()
def hand_built(shape: DecoderConfig, target: str, construction: StreamConstruction) -> Decoder:
    """The construction for ``shape.n_ctx`` tokens, float32, and a readout of row POSITION for the target."""
    decoder = Decoder(shape, seed=None).double()
    zero_weights(decoder)
    construction.write_weights(decoder, shape.n_ctx, torch.float32)
    READOUTS[target](decoder)
    return decoder.float()


def _read_as_number(decoder: Decoder) -> None:
    """Unit 0 of the head is t / T."""
    decoder.head.weight[0, POSITION] = 1 / decoder.config.n_ctx


def _read_as_class(decoder: Decoder) -> None:
    """The unit of class k is k t - k²/2 = -(t - k)²/2 + t²/2, and softmax does not see t²/2: classes are normally
    distributed about t with variance 1. The most probable is right everywhere, and the loss is ½ ln 2π = .92 nats (away
    from the ends): there is something left to sharpen."""
    length = decoder.config.n_ctx
    k = torch.arange(1, length + 1, dtype=torch.float64)
    decoder.head.weight[:length, POSITION] = k
    decoder.head.weight[:length, ONE] = -k.square() / 2


READOUTS: dict[str, Callable[[Decoder], None]] = {"regression": _read_as_number, "classification": _read_as_class}


def _as_it_is(weight: Tensor, generator: torch.Generator) -> Tensor:
    return weight


def _times_noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """w (1 + .05 n), n ~ N(0, 1): what is 0 stays 0."""
    return weight * (1 + 0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float32))


def _plus_noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    """w + .01 n, n ~ N(0, 1): nothing stays 0. Of the head, W_Q = W_K = 0 is a point from which no gradient leads away
    (that of each has the other as a factor); this start is not held there."""
    return weight + 0.01 * torch.randn(weight.shape, generator=generator, dtype=torch.float32)


@dataclass(frozen=True)
class Start:
    """Random weights, in the shape of the construction if there is one, or ``perturb`` of the construction's."""

    construction: StreamConstruction | None = None
    perturb: Callable[[Tensor, torch.Generator], Tensor] | None = None

    @torch.no_grad()
    def build(self, shape: DecoderConfig, target: str, seed: int) -> Decoder:
        if self.perturb is None or self.construction is None:
            return Decoder(shape, seed=seed).eval()
        decoder, generator = hand_built(shape, target, self.construction), torch.Generator().manual_seed(seed)
        for parameter in decoder.parameters():
            parameter.copy_(self.perturb(parameter, generator))
        return decoder.eval()


_CLOSED_FORM, _AS_WRITTEN = absolute.ClosedForm(), absolute.AbsolutePosition()
STARTS: dict[str, Start] = {
    "random": Start(),
    "random_alike": Start(_CLOSED_FORM),
    "closed_form": Start(_CLOSED_FORM, _as_it_is),
    "closed_form_times_noise": Start(_CLOSED_FORM, _times_noise),
    "closed_form_plus_noise": Start(_CLOSED_FORM, _plus_noise),
    "absolute_position": Start(_AS_WRITTEN, _as_it_is),
    "absolute_position_times_noise": Start(_AS_WRITTEN, _times_noise),
}
