"""What the model loses when a head's pattern, or its output, is replaced by what position alone makes, by the rest, by
nothing."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from probe.losses import sequence_losses
from probe.sequences import valid_rows
from probe.statistics import ROUNDING, Bootstrap
from probe.tracing import PATTERN, Z, block_site, logits_with_edits, trace

ABLATIONS = ("loss_without_content", "loss_without_position", "loss_uniform")
# The same three of a head's output: of a uniform head, whose pattern says nothing, this is what there is to take out.
OF_OUTPUT = ("loss_output_without_content", "loss_output_without_position", "loss_output_mean")

# The share of what the head is worth from which on a part of it is used. What is put in its place was fitted to n other
# sequences. It has 1/n of the variance of a single one by chance, and costs about 1/n of what all of the content does.
WORTH = 0.05


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

    def output_changes(
        self, layer: int, head: int, means: Float[Tensor, "pos head d_head"]
    ) -> dict[str, Float64[Tensor, "sequence"]]:
        """The change of each sequence's summed loss under each of ``OF_OUTPUT``.

        ``means`` is the mean of each head's output over other sequences, by position. What a head puts out at t is its
        mean over positions, what position adds to it, and what the content adds; position 0 stays as it is.
        """
        by_position, mean = means[1:, head], means[1:, head].mean(0)
        replacements = (
            lambda z: by_position.to(z).expand_as(z),
            lambda z: z + (mean - by_position).to(z),
            lambda z: mean.to(z).expand_as(z),
        )
        changed = {}
        for metric, replaced in zip(OF_OUTPUT, replacements, strict=True):

            def edit(
                z: Float[Tensor, "batch pos head d_head"], replaced: Callable[[Tensor], Tensor] = replaced
            ) -> Tensor:
                z = z.clone()
                z[:, 1:, head] = replaced(z[:, 1:, head])
                return z

            changed[metric] = self._loss({block_site(layer, Z): edit}) - self.plain
        return changed


def mean_output(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, "batch"], layer: int
) -> Float[Tensor, "pos head d_head"]:
    """The mean over sequences of each head's output at each position; at positions that none of them reaches, that of
    the last that one does."""
    site = block_site(layer, Z)
    z = trace(model, tokens, [site], lengths=lengths)[site]
    valid = valid_rows(lengths, z.shape[1]).to(z)[..., None, None]
    means = (z * valid).sum(0) / valid.sum(0).clamp(min=1)
    longest = int(lengths.max())
    means[longest:] = means[longest - 1]
    return means


def _of_one_head(head: int, replaced: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        pattern = pattern.clone()
        pattern[:, head] = replaced(pattern[:, head])
        return pattern

    return edit


def used_for(
    changes: Mapping[str, Float64[Tensor, "draw head"]], bootstrap: Bootstrap, ablations: Sequence[str] = ABLATIONS
) -> list[str]:
    """What each head is used for: which of three ablations (without content, without position, without both) raise the
    loss, by the lower ends of their intervals, which must lie above rounding, and by at least WORTH of the rise under
    the ablation that costs most."""
    values = torch.stack([changes[metric][0] for metric in ablations])
    worth = values >= WORTH * values.amax(0)
    raises = torch.stack([bootstrap.interval(changes[metric][1:])[0] > ROUNDING for metric in ablations])
    content, position, uniform = raises & worth
    names = {(True, True): "both", (True, False): "content", (False, True): "position"}
    return [
        names.get((bool(c), bool(p)), "either" if u else "nothing")
        for c, p, u in zip(content, position, uniform, strict=True)
    ]
