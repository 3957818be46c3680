"""What the model loses when a head's pattern is replaced by what position alone makes, by the rest, by nothing."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.statistics import Bootstrap
from probe.tracing import PATTERN, block_site, logits_with_edits, sequence_losses

ABLATIONS = ("loss_without_content", "loss_without_position", "loss_uniform")


class HeadAblations:
    """How the loss changes with a head's pattern. ``scored[b, p]`` says whether the prediction of token p counts."""

    def __init__(
        self, model: nn.Module, tokens: Int[Tensor, "batch pos"], scored: Bool[Tensor, "batch pos"], batch_size: int
    ):
        self.model, self.tokens, self.scored, self.batch_size = model, tokens, scored, batch_size
        self.plain = self._loss({})

    def _loss(self, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Float64[Tensor, "sequence"]:
        """The cross entropy of each sequence's scored tokens, summed, in nats."""
        found = []
        batches = (each.split(self.batch_size) for each in (self.tokens, self.scored))
        for tokens, scored in zip(*batches, strict=True):
            found.append(sequence_losses(logits_with_edits(self.model, tokens, edits), tokens, scored))
        return torch.cat(found)

    def changes(
        self, layer: int, templates: Float64[Tensor, "head query key"], uniform: Float64[Tensor, "query key"]
    ) -> dict[str, Float64[Tensor, "sequence head"]]:
        """The change of each sequence's summed loss under each of ``ABLATIONS``, one head at a time.

        A pattern is its template T and the rest of it: T + r. The four of T or uniform, with r or without, are a
        factorial design. Uniform + r may have weights below 0; its rows sum to 1 all the same.
        """
        changed: dict[str, list[Tensor]] = {metric: [] for metric in ABLATIONS}
        for head, template in enumerate(templates):
            replacements = (
                lambda pattern, t=template: t.to(pattern).expand_as(pattern),
                lambda pattern, t=template: pattern + (uniform - t).to(pattern),
                lambda pattern: uniform.to(pattern).expand_as(pattern),
            )
            for metric, replaced in zip(ABLATIONS, replacements, strict=True):
                edit = _of_one_head(head, replaced)
                changed[metric].append(self._loss({block_site(layer, PATTERN): edit}) - self.plain)
        return {metric: torch.stack(each, dim=-1) for metric, each in changed.items()}


def _of_one_head(head: int, replaced: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        pattern = pattern.clone()
        pattern[:, head] = replaced(pattern[:, head])
        return pattern

    return edit


def used_for(changes: Mapping[str, Float64[Tensor, "draw head"]], bootstrap: Bootstrap) -> list[str]:
    """What each head is used for: which ablations raise the loss, by the lower ends of their intervals."""
    content, position, uniform = (bootstrap.interval(changes[metric][1:])[0] > 0 for metric in ABLATIONS)
    names = {(True, True): "both", (True, False): "content", (False, True): "position"}
    return [
        names.get((bool(c), bool(p)), "either" if u else "nothing")
        for c, p, u in zip(content, position, uniform, strict=True)
    ]
