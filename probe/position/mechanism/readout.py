"""A model under interventions, and what a probe reads of its positions then."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from probe.errors import ProbeError
from probe.position.mechanism.interventions import INTERVENTIONS, NORMAL, Input
from probe.position.probes.ridge import LinearProbe
from probe.position.probes.scores import Draws, mean_absolute_error, r2
from probe.position.setting import Edits, Setting
from probe.tracing import PATTERN, RESID_POST, trace, visit

CHOSEN_ON = 4096  # tokens, about, on which the site is chosen
AS_WELL = 0.02  # of R²


class Readout:
    """What a probe reads of the positions in a setting, plainly and under every intervention."""

    def __init__(self, setting: Setting, site: str | None, draws: Draws, seed: int):
        self.setting, self.draws, self.seed = setting, draws, seed
        self.fitted, self.held_out, self.n_layers = setting.fitted, setting.held_out, setting.n_layers
        tokens = torch.cat((self.fitted.tokens, self.held_out.tokens))
        first = tokens[:, 0].unique().tolist()
        self.bos = first[0] if len(first) == 1 else None
        self.mean_position = tokens.shape[1] / 2  # of positions 1, 2, …
        traced = trace(setting.model, self.held_out.tokens[:1], [PATTERN])
        self.visible = [traced.visible(layer) for layer in range(self.n_layers)]
        self.attention = self._first_key()
        self.site = self._best_site() if site is None else site
        self.probe = self.read(NORMAL, self.site)[0]
        self.found = {name: self._outcome(name) for name in INTERVENTIONS if self._applies(name)}

    @property
    def site_layer(self) -> int:
        """The layer that the site is in or behind, -1 before all layers."""
        return int(self.site.split(".")[1]) if self.site.startswith("blocks.") else -1

    def _best_site(self) -> str:
        """The last stream behind a layer in which position is read as well as in the best one, but for ``AS_WELL``.

        A ridge probe of every layer is fitted to one half of some sequences and scored on the other. The last layers of
        a trained model may hold only what it has made of the position.
        """
        n = min(len(self.fitted.tokens), max(4, math.ceil(CHOSEN_ON / self.fitted.tokens.shape[1])))
        values: dict[str, list[Tensor]] = {}

        def keep(site: str, value: Tensor, rows: slice) -> None:
            values.setdefault(site, []).append(value[:, 1:].detach().cpu())

        visit(self.setting.model, self.fitted.tokens[:n], [RESID_POST], keep, batch_size=self.setting.batch_size)
        y = torch.arange(1, self.fitted.tokens.shape[1]).repeat(n)
        half = n // 2 * (self.fitted.tokens.shape[1] - 1)
        scores = {}
        for site in sorted(values, key=lambda site: int(site.split(".")[1])):
            x, _ = token_rows(torch.cat(values.pop(site)))
            if not x.isfinite().all():
                raise ProbeError(f"values at {site!r} must be finite, got NaN or infinity")
            scores[site] = float(new_probe().fit(x[:half], y[:half]).r2(x[half:], y[half:]))
        return [site for site, score in scores.items() if score >= max(scores.values()) - AS_WELL][-1]

    def _applies(self, name: str) -> bool:
        alone = self.n_layers == 1 and name.startswith("strangers")
        return not alone and (self.bos is not None or not INTERVENTIONS[name].wants_bos)

    def given(self, name: str, part: str) -> tuple[Input, Tensor, Edits]:
        """What an intervention makes of the sequences of a part, "fitted" or "held_out"; the same at every call."""
        seed = self.seed + 2 * [*INTERVENTIONS].index(name) + (part == "fitted")
        generator = torch.Generator().manual_seed(seed)
        given = Input(getattr(self, part).tokens, self.bos, self.n_layers, generator, self.visible[0])
        return given, INTERVENTIONS[name].tokens(given), INTERVENTIONS[name].edits(given)

    def run(
        self, tokens: Tensor, edits: Edits | Callable[[slice], Edits], site: str
    ) -> tuple[Float[Tensor, "batch pos d_model"], list[Tensor]]:
        """The values at a site, and the logits by batch."""
        seen: list[Tensor] = []
        logits = self.setting.run(tokens, edits, {site: lambda value: seen.append(value.detach().cpu())})
        value = torch.cat(seen)
        if value.ndim != 3:
            raise ProbeError(f"{site!r} must hold hidden states (batch, pos, d_model), got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ProbeError(f"values at {site!r} must be finite, got NaN or infinity")
        return value, logits

    def states(self, name: str, part: str, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states under an intervention, their positions, and the number of their sequence; one row a token."""
        given, tokens, edits = self.given(name, part)
        value, _ = self.run(tokens, edits, site)
        first = INTERVENTIONS[name].first(given)
        return (*token_rows(value[:, first:]), torch.arange(first, given.length).repeat(len(tokens)))

    def read(self, name: str, site: str) -> tuple[LinearProbe, Tensor]:
        """A ridge probe fitted under an intervention, and its ``readout_sums`` there on other sequences."""
        x, _, y = self.states(name, "fitted", site)
        probe = new_probe().fit(x, y)
        return probe, self.score(probe, name, site)

    def score(self, probe: LinearProbe, name: str, site: str) -> Tensor:
        x, group, y = self.states(name, "held_out", site)
        return readout_sums(probe.predict(x), y, group)

    def decode_under(self, edits: Edits) -> Float64[Tensor, "sequence sum"]:
        """What the probe decodes on normal sequences while values are replaced."""
        value, _ = self.run(self.held_out.tokens, edits, self.site)
        x, group = token_rows(value[:, 1:])
        return readout_sums(self.probe.predict(x), torch.arange(1, value.shape[1]).repeat(len(value)), group)

    def _outcome(self, name: str) -> dict[str, Tensor]:
        """By metric, on every draw."""
        drawn = self.draws.sequences @ self.score(self.probe, name, self.site)
        again = self.draws.sequences @ self.read(name, self.site)[1]
        return {metric: measure(drawn) for metric, measure in READOUTS.items()} | {"r2_refitted": r2(again)}

    def _first_key(self) -> dict[str, Float64[Tensor, "batch layer head"]]:
        """The attention of each head on the first key, and the slope of its log-odds over the log of the number of
        other keys: -1 for softmax with keys of any fixed scores, 0 where it is the same from every position. Over the
        rows that see the first key: a sliding window hides it from the others."""
        sees_first = [visible[0, 0, 1:, 0] for visible in self.visible]
        mass: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
        slope: list[list[Tensor]] = [[] for _ in range(self.n_layers)]

        def keep(site: str, pattern: Tensor, rows: slice) -> None:
            layer = int(site.split(".")[1])
            pattern = pattern[:, :, 1:].detach().cpu().double()[:, :, sees_first[layer]]
            x = (1 + sees_first[layer].nonzero()[:, 0]).double().log()
            x = (x - x.mean()) / (x - x.mean()).square().sum().clamp(min=1e-300)
            first, others = pattern[..., 0], pattern[..., 1:].sum(-1)
            least = torch.finfo(torch.float32).tiny  # what underflowed
            mass[layer].append(first.mean(-1))
            slope[layer].append((first.clamp(min=least) / others.clamp(min=least)).log() @ x)

        visit(self.setting.model, self.held_out.tokens, [PATTERN], keep, batch_size=self.setting.batch_size)
        return {
            name: torch.stack([torch.cat(layer) for layer in each], 1)
            for name, each in (("mass", mass), ("slope", slope))
        }


def new_probe() -> LinearProbe:
    """What reads position everywhere here: a ridge probe of strength 1 on standardised features."""
    return LinearProbe((1.0,), standardize=True)


def token_rows(x: Float[Tensor, "batch pos d_model"]) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, "row"]]:
    """One row per token, and the number of its sequence."""
    return x.flatten(0, 1), torch.arange(len(x)).repeat_interleave(x.shape[1])


def readout_sums(
    decoded: Float64[Tensor, "row"], y: Shaped[Tensor, "row"], group: Int[Tensor, "row"]
) -> Float64[Tensor, "sequence sum"]:
    """Over the tokens of each sequence: 1, y, y², e², |e|, as ``probe.position.probes.scores`` has them, and e, y e."""
    e, y = decoded - y, y.double()
    each = torch.stack((torch.ones_like(e), y, y**2, e**2, e.abs(), e, y * e), dim=1)
    return torch.zeros(int(group.max()) + 1, 7, dtype=torch.float64).index_add_(0, group, each)


def decoded_shift(sums: Float64[Tensor, "*lead sum"]) -> Float64[Tensor, "*lead"]:
    return sums[..., 5] / sums[..., 0]


def _slope(sums: Float64[Tensor, "*lead sum"]) -> Float64[Tensor, "*lead"]:
    n, y, y2 = sums[..., :3].unbind(-1)
    return 1 + (sums[..., 6] - y * sums[..., 5] / n) / (y2 - y.square() / n)


READOUTS = {"r2": r2, "mean_absolute_error": mean_absolute_error, "shift": decoded_shift, "slope": _slope}
