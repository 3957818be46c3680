"""How far patterns are from templates that were fitted to a model's own heads, before something was done to it."""

from collections.abc import Callable

from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from probe.attention.comparison import check_names, checked_pattern
from probe.attention.distances import pattern_distance
from probe.attention.templates import TEMPLATES, Observed, TemplateContext
from probe.sequences import Integers, TokenIds
from probe.tracing import PATTERN, trace


def distance_from_template(
    model: nn.Module,
    tokens: TokenIds,
    lengths: Integers | None = None,
    *,
    template: str = "t5_fitted",
    distance: str = "jensen_shannon",
) -> Callable[[int, Float[Tensor, "batch head query key"], Int[Tensor, "batch"]], Float64[Tensor, "batch"]]:
    """How far any patterns are from the templates of a model's own heads, fitted to it on these sequences.

    Returns:
        A function of a layer, patterns of that layer, and the sequences' lengths: by sequence, the mean over heads of
        the distance between a head's pattern and its template.
    """
    check_names("template", [template], TEMPLATES)
    traced = trace(model, tokens, [PATTERN], lengths=lengths).distinct()
    fit = TEMPLATES[template]
    fitted = {
        layer: fit.of(
            Observed(checked_pattern(traced, layer), traced.lengths, traced.n_visible(layer), layer in traced.sinks),
            TemplateContext(),
        ).pattern
        for layer in traced.layers_at(PATTERN)
    }

    def measure(layer: int, pattern: Tensor, lengths: Tensor) -> Tensor:
        return pattern_distance(
            pattern.double(), fitted[layer][None], distance, lengths, sink=layer in traced.sinks
        ).mean(-1)

    return measure
