"""Hidden states on their way from a model to the moments: which tokens count, and what is asked of them."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from probe.errors import ProbeError
from probe.position.probes.moments import Moments
from probe.position.probes.splits import Split
from probe.position.probes.targets import TargetContext, target_names, target_values
from probe.sequences import Sequences, valid_rows
from probe.tracing import visit

RANDOM = "random"
HEAD = re.compile(r"(?<=attn\.hook_z)\.\d+$")


@dataclass(frozen=True)
class RandomProjection:
    """Features that know the token and nothing else: a row of N(0, 1) for each id."""

    d_model: int
    seed: int

    def table(self, d_vocab: int) -> Tensor:
        return torch.randn(
            d_vocab, self.d_model, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32
        )


@dataclass(frozen=True)
class Rows:
    """The tokens of a batch that count, one after the other."""

    where: Bool[Tensor, "batch pos"] | None  # None: all of them
    y: Float64[Tensor, "row target"]
    group: Int[Tensor, "row"]  # of the whole side: sequence · bins + bin

    def of(self, value: Tensor) -> Tensor:
        return value.flatten(0, 1) if self.where is None else value[self.where.to(value.device)]


@dataclass(frozen=True)
class Reader:
    """Runs a model over sequences and hands on, batch by batch, the features of a site and what to read off them."""

    split: Split
    targets: tuple[str, ...]
    context: TargetContext
    seed: int
    batch_size: int = 64

    @property
    def names(self) -> list[str]:
        return target_names(self.targets, self.context)

    def sites(self, source: nn.Module | RandomProjection, sites: Sequence[str]) -> list[str]:
        """The full names of sites, every head one of its own, as ``read`` will call them."""
        seen: dict[str, None] = {}
        self.read(source, self.split.train.first(1), sites, False, lambda site, x, rows: seen.setdefault(site))
        return list(seen)

    def read(
        self,
        source: nn.Module | RandomProjection,
        part: Sequences,
        sites: Sequence[str],
        shuffled: bool,
        fn: Callable[[str, Tensor, Rows], None],
    ) -> None:
        """Call ``fn(site, features "row feature", rows)`` for every batch and site, each head a site of its own."""
        labelled = functools.lru_cache(maxsize=1)(lambda start, end: self._rows(part, slice(start, end), shuffled))
        heads = {site for site in sites if HEAD.search(site)}
        whole = list(dict.fromkeys(HEAD.sub("", site) for site in sites))
        every_head = {site for site in sites if site.endswith("hook_z")}

        def features(site: str, value: Tensor, at: slice) -> None:
            rows = labelled(at.start, at.stop)
            if not site.endswith("attn.hook_z"):
                if value.ndim != 3:
                    raise ProbeError(f"{site!r} holds no hidden states (batch, pos, d_model) but {tuple(value.shape)}")
                return fn(site, rows.of(value), rows)
            for h, z in enumerate(value.unbind(2)):
                name = f"{site}.{h}"
                if name in heads or not every_head.isdisjoint((site, "attn.hook_z")):
                    fn(name, rows.of(z), rows)

        if isinstance(source, RandomProjection):
            table = source.table(int(max(self.split.train.tokens.max(), self.split.test.tokens.max())) + 1)
            for start in range(0, len(part), self.batch_size):
                at = slice(start, min(start + self.batch_size, len(part)))
                features(RANDOM, table[part.tokens[at]], at)
        else:
            visit(source, part.tokens, whole, features, batch_size=self.batch_size)

    def _rows(self, part: Sequences, at: slice, shuffled: bool) -> Rows:
        tokens, lengths = part.tokens[at], part.lengths[at]
        y = target_values(self.targets, tokens, lengths, self.context)
        if shuffled:
            # Drawn from the seed and what is shuffled: the same whichever model reads it, another in every batch. The
            # same on both sides would leave a mean by position to be learned.
            key = hash((self.seed, *tokens[0, : int(lengths[0])].tolist())) % 2**63
            generator = torch.Generator().manual_seed(key)
            order = torch.rand(tokens.shape, generator=generator, dtype=torch.float32)
            order[~valid_rows(lengths, tokens.shape[1])] = 2  # padding stays behind
            y = torch.cat((y, y.gather(1, order.argsort(1)[..., None].expand_as(y))), dim=-1)
        counts = valid_rows(lengths, tokens.shape[1])
        edges = torch.tensor(self.split.edges)
        bins = torch.bucketize(torch.arange(tokens.shape[1]), edges[1:-1], right=True)
        group = torch.arange(at.start, at.stop)[:, None] * (len(edges) - 1) + bins
        return Rows(None if counts.all() else counts, y[counts], group[counts])


class FoldMoments:
    """Moments of one site and fold. Where targets are defined on different tokens, the tokens are counted by which of
    the targets are, so that none is counted twice and Σ x xᵀ is had for each target."""

    def __init__(self) -> None:
        self.by_pattern: dict[tuple[bool, ...], Moments] = {}

    def add(self, x: Tensor, rows: Rows, origin: Moments) -> None:
        defined = ~rows.y.isnan()
        if defined.all():
            groups = [((True,) * rows.y.shape[1], x, rows.y)]
        else:
            patterns, which = defined.unique(dim=0, return_inverse=True)
            y = rows.y.nan_to_num(0.0)
            groups = [
                (tuple(pattern.tolist()), x[(which == i).to(x.device)], y[which == i])
                for i, pattern in enumerate(patterns)
            ]
        for pattern, x_part, y_part in groups:
            self.by_pattern[pattern] = self.by_pattern.get(pattern, origin).and_rows(x_part, y_part)

    def of(self, targets: Sequence[int], origin: Moments) -> Moments:
        """The moments of the tokens on which all of these targets are defined."""
        moments = [m for pattern, m in self.by_pattern.items() if all(pattern[t] for t in targets)]
        return sum(moments, start=origin).of_targets(targets)
