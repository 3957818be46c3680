"""A census of heads: what each looks like, how much of it that says, and what the model loses without it."""

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor, nn

from probe.attention.ablation import OF_OUTPUT, HeadAblations, mean_output, used_for
from probe.attention.comparison import checked_pattern, halves
from probe.attention.distances import pattern_distance, with_sink
from probe.attention.templates import TEMPLATES, Observed, TemplateContext
from probe.errors import ProbeError
from probe.models.anatomy import layer_encodings
from probe.models.hidden_keys import nearest_keys
from probe.progress import OnProgress, Steps, untold
from probe.sequences import Integers, Sequences, TokenIds, first_of_each, marked, valid_rows
from probe.statistics import N_BOOTSTRAP, Bootstrap
from probe.tracing import PATTERN, Trace, trace

# The kind that a template stands for, the simple ones first. All are fitted, and none has a key of weight 0.
SIMPLE = {
    "first_token_sink": "sink",
    "previous_token_leaky": "previous_token",
    "diagonal_leaky": "diagonal",
    "window": "window",
    "alibi_fitted": "decay",
    "power_law": "decay",
}
KIND_OF = {**SIMPLE, "t5_fitted": "relative", "sink_t5": "relative"}
LABELS = (*dict.fromkeys(KIND_OF.values()), "learned_sink", "uniform", "induction", "duplicate", "content")
ON_ONE_KEY = ("sink", "learned_sink", "previous_token", "diagonal")
BY_TOKEN = ("induction", "duplicate")

FALLS = {"alibi_fitted": "slope", "power_law": "exponent"}  # the parameter that is > 0 where attention falls

UNIFORM = 0.99  # the share of the greatest entropy from which on a head is called uniform
MOST = 0.5  # the share of attention, or of the distance from uniform, that makes a head of a kind
SAME = 1e-6  # shares that differ by less are the same: patterns come in float32
MORE_THAN_POSITION = 2.0  # how many times what its template gives them an induction or duplicate head attends its keys


def census(
    model: nn.Module,
    tokens: TokenIds,
    *,
    lengths: Integers | None = None,
    scored: Bool[Tensor, "batch scored_pos"] | None = None,
    ablate: bool = True,
    head_detector: bool = False,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Label every head, say how well the label fits, and what the head is used for.

    Templates are fitted on the first half of the sequences; every number is measured on the other half.

    Scores, by ``metric``, means over the query rows that see at least two keys (row 0 sees one):

    - "sink", "previous_token", "diagonal": attention on key 0, on the key before the query, on the query's own; that on
      key 0 over the rows that see it (in a layer with a sliding window, the first ones only);
    - "learned_sink", in layers that have one (see ``Trace.sink_mass``): the share that it takes;
    - "uniform": entropy as a share of the greatest possible, ln n for n visible keys, t + 1 where none is hidden, and a
      learned sink is one more;
    - "window", "decay": the share of the Jensen–Shannon divergence from uniform that the fitted window, and the better
      of exponential (ALiBi) and power-law decay, explains; 0 where they are worse than uniform, or rise with distance;
    - "induction": attention on keys that follow an earlier occurrence of the query's token, over the rows that see
      such keys; "induction_expected": what the head's best template would put there;
    - "duplicate", "duplicate_expected": the same of keys that hold the query's own token, earlier;
    - "content": the share of that divergence that the best template does not explain;
    - "explained_variance": 1 - Σ (pattern - template)² / Σ (pattern - uniform)² of the best template.

    The best template is that of the smallest distance among those of one or two parameters, T5's buckets, and a sink
    beside T5's buckets: the head's positional part, as far as position has one. The label is the first that holds:
    "uniform" (score at least 0.99); the larger of "induction" and "duplicate" (0.5 or more, and twice the expected);
    the largest of "sink", "learned_sink",
    "previous_token", "diagonal" (0.5 or more); the kind of the best template with one or two parameters, where it
    explains at least half; "relative", where the best template does; else "content". The thresholds are constants of
    this module.

    With ``ablate``, the change of the loss (nats a token, next-token cross entropy, paired over sequences) when

    - "loss_without_content": the pattern is replaced by the best template;
    - "loss_without_position": the template is replaced by uniform attention, pattern - template + uniform;
    - "loss_uniform": the pattern is replaced by uniform attention;

    and of heads labelled "uniform", of which these change nothing, when

    - "loss_output_without_content": the head's output is replaced by its mean over other sequences at each position;
    - "loss_output_without_position": what position adds to that mean is taken from the output;
    - "loss_output_mean": the output is replaced by its mean over sequences and positions;

    and ``used_for``, from which of the three cost something: "content", "position", "both", "either" (each can stand in
    for the other: only the uniform pattern costs) or "nothing"; "not ablated" without ``ablate``. An ablation costs
    something if its interval lies above 0 and its value is at least a twentieth of that of the one that costs most:
    less is what templates and means cost that were fitted to other sequences. An interval says nothing about other
    seeds, and among many heads some lie above 0 by chance.

    Args:
        model: a ``Decoder`` or a ``TransformerBridge``.
        tokens, lengths: sequences, right-padded; at least 2 distinct ones, and one of 3 tokens or more.
        scored: which tokens' predictions count in the loss (a task's completions, where nothing else is learned); by
            default all. Token 0 is never predicted.
        head_detector: also TransformerLens's own scores, "head_detector_previous_token" and
            "head_detector_induction" (it divides by all rows, row 0 too; importing it takes seconds).
        on_progress: called with how many layers are done, and how many there are.

    Returns:
        Columns layer, head, layer_encoding (the position encoding that the layer sees, "none" in the layers of a hybrid
        that see none: ``by_layer_encoding`` splits by it), label, template, used_for, metric, value, low, high, n
        (sequences measured); one row a number, bootstrap intervals over sequences.

    Raises:
        ProbeError: for fewer than 2 distinct sequences, sequences that are too short, or values that are no patterns.
    """
    sequences = Sequences.of(tokens, lengths)
    marks = marked("scored", scored, sequences.tokens)
    kept = first_of_each(sequences.tokens, sequences.lengths, marks)
    sequences = sequences[kept]
    traced = trace(model, sequences.tokens, [PATTERN], lengths=sequences.lengths, batch_size=batch_size)
    if int(traced.lengths.max()) < 3:
        raise ProbeError(f"a census wants sequences of at least 3 tokens, got at most {int(traced.lengths.max())}")
    fitted_on, measured_on = halves(traced)
    bootstrap = Bootstrap.draw(len(traced.tokens) - measured_on.start, n_bootstrap, confidence, seed)
    n = len(traced.tokens) - measured_on.start
    weights = bootstrap.value_and_draws
    if ablate:
        counted = _counted(traced, marks[kept])[measured_on]
        losses = HeadAblations(model, traced.tokens[measured_on], counted, batch_size)
        n_counted = (weights @ counted.sum(-1).double())[:, None].clamp(min=1e-300)
    found, encodings, steps = [], layer_encodings(model), Steps(len(traced.layers_at(PATTERN)), on_progress)
    for layer in traced.layers_at(PATTERN):
        heads = _Layer(layer, traced, fitted_on, measured_on, weights)
        scores = heads.scores()
        labels, use = heads.labels(scores), ["not ablated"] * len(heads.best)
        if head_detector:
            scores |= _head_detector(traced, layer, measured_on, weights)
        if ablate:
            changes = {
                m: weights @ each / n_counted
                for m, each in losses.changes(layer, heads.templates, heads.uniform[0]).items()
            }
            scores |= changes
            use = used_for(changes, bootstrap)
            uniform = [head for head, label in enumerate(labels) if label == "uniform"]
            if uniform:
                means = mean_output(model, traced.tokens[fitted_on], traced.lengths[fitted_on], layer)
                each = [losses.output_changes(layer, head, means) for head in uniform]
                of_output = {m: weights @ torch.stack([e[m] for e in each], -1) / n_counted for m in OF_OUTPUT}
                for head, used in zip(uniform, used_for(of_output, bootstrap, OF_OUTPUT), strict=True):
                    use[head] = used
                for metric, stack in of_output.items():
                    scores[metric] = torch.full((len(weights), len(labels)), torch.nan, dtype=torch.float64)
                    scores[metric][:, uniform] = stack
        keys = {
            "layer": layer,
            "head": range(len(labels)),
            "layer_encoding": encodings[layer],
            "label": labels,
            "template": heads.best,
        }
        for metric, stack in scores.items():
            low, high = bootstrap.interval(stack[1:])
            values = {"metric": metric, "value": stack[0], "low": low, "high": high, "n": n}
            rows = pd.DataFrame(keys | {"used_for": use} | values)
            found.append(rows[rows["value"].notna()] if metric in OF_OUTPUT else rows)
        steps.step()
    return pd.concat(found).sort_values(["layer", "head"], kind="stable", ignore_index=True)


def census_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``census`` as a table for people: one row a head, one column a metric."""
    keys = [c for c in rows.columns if c not in ("metric", "value", "low", "high", "n")]
    table = rows.pivot(index=keys, columns="metric", values="value")
    return table[list(dict.fromkeys(rows["metric"]))].reset_index().rename_axis(columns=None)


def _counted(traced: Trace, scored: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The tokens whose predictions count: none is padding or the first."""
    counted = scored & valid_rows(traced.lengths, traced.tokens.shape[1]) & (torch.arange(traced.tokens.shape[1]) > 0)
    if not counted[halves(traced)[1]].any():
        raise ProbeError("at least one token of the second half of the sequences must be scored, got none")
    return counted


class _Layer:
    """The heads of one layer: their templates, scores and labels. Stacks are "draw head", the first draw the value."""

    def __init__(self, layer: int, traced: Trace, fitted_on: slice, measured_on: slice, weights: Tensor):
        pattern, self.n_visible = checked_pattern(traced, layer), traced.n_visible(layer)
        self.sink = layer in traced.sinks
        self.weights = weights
        self.pattern, self.lengths = pattern[measured_on], traced.lengths[measured_on]
        self.tokens = traced.tokens[measured_on]
        self.rows = valid_rows(self.lengths, pattern.shape[-1]) & (self.n_visible > 1)
        observed = Observed(pattern[fitted_on], traced.lengths[fitted_on], self.n_visible, self.sink)
        context = TemplateContext()
        uniform = TEMPLATES["uniform"].of(observed, context).pattern
        self.from_uniform = self._distance(uniform)
        self.explained = {}
        templates = {}
        for name in KIND_OF:
            template = TEMPLATES[name].of(observed, context)
            templates[name] = template.pattern
            share = 1 - self._distance(template.pattern) / self.from_uniform.where(self.from_uniform > 0, 1.0)
            self.explained[name] = share.where(self.from_uniform > 0, 0.0)
            if name in FALLS:  # a bias that rises with distance is no decay
                self.explained[name] = self.explained[name].where(template.parameters[FALLS[name]] > 0, -torch.inf)
        shares = torch.stack([self.explained[name][0] for name in KIND_OF])
        # The first of those that are the best but for rounding: a window of one key, say, is the diagonal with a leak.
        best = (shares >= shares.amax(0) - SAME).int().argmax(0)
        self.best = [list(KIND_OF)[i] for i in best.tolist()]
        self.templates = torch.stack([templates[name][h] for h, name in enumerate(self.best)])
        self.uniform = uniform

    def _distance(self, template: Float64[Tensor, "head query key"]) -> Float64[Tensor, "draw head"]:
        return self.weights @ pattern_distance(
            self.pattern, template[None], "jensen_shannon", self.lengths, sink=self.sink
        )

    def _mean(
        self, by_row: Float64[Tensor, "batch head query"], rows: Bool[Tensor, "batch query"] | None = None
    ) -> Float64[Tensor, "draw head"]:
        """The mean over those rows of all sequences, in every draw; 0 where a draw has no such row."""
        rows = self.rows if rows is None else rows
        total = self.weights @ by_row.where(rows[:, None], 0.0).sum(-1)
        count = self.weights @ rows.sum(-1, keepdim=True).double()
        return torch.where(count > 0, total / count.clamp(min=1e-300), 0.0)

    def scores(self) -> dict[str, Float64[Tensor, "draw head"]]:
        pattern, n_query = self.pattern, self.pattern.shape[-1]
        query = torch.arange(n_query)
        best = torch.stack([self.explained[name][:, h] for h, name in enumerate(self.best)], dim=-1)
        greatest = (self.n_visible + self.sink).double().log().expand(len(pattern), 1, -1)  # a sink is one more key
        entropy = torch.special.entr(with_sink(pattern) if self.sink else pattern).sum(-1)
        follows = follows_earlier(self.tokens) & nearest_keys(self.n_visible)
        sees_first = self.rows & (self.n_visible == query + 1)
        same = same_earlier(self.tokens) & nearest_keys(self.n_visible)
        has_such, has_same = follows.any(-1) & self.rows, same.any(-1) & self.rows
        squares = {
            name: ((pattern - of).square().sum(-1)).where(self.rows[:, None], 0.0).sum(-1)
            for name, of in (("template", self.templates), ("uniform", self.uniform))
        }
        against = self.weights @ squares["uniform"]
        learned = {"learned_sink": self._mean(1 - pattern.sum(-1))} if self.sink else {}
        return learned | {
            "sink": self._mean(pattern[..., 0], sees_first),
            "previous_token": self._mean(pattern[..., query, (query - 1).clamp(min=0)]),
            "diagonal": self._mean(pattern.diagonal(dim1=-2, dim2=-1)),
            "window": self.explained["window"].clamp(min=0),
            "decay": torch.stack([self.explained[name] for name in FALLS]).amax(0).clamp(min=0),
            "uniform": self._mean(entropy) / self._mean(greatest),
            "induction": self._mean((pattern * follows[:, None]).sum(-1), has_such),
            "induction_expected": self._mean((self.templates * follows[:, None]).sum(-1), has_such),
            "duplicate": self._mean((pattern * same[:, None]).sum(-1), has_same),
            "duplicate_expected": self._mean((self.templates * same[:, None]).sum(-1), has_same),
            "content": 1 - best,
            "explained_variance": torch.where(
                against > 0, 1 - (self.weights @ squares["template"]) / against.clamp(min=1e-300), 0.0
            ),
        }

    def labels(self, scores: Mapping[str, Tensor]) -> list[str]:
        found = []
        for head in range(len(self.best)):
            value = {metric: float(stack[0, head]) for metric, stack in scores.items()}
            on_one_key = max((key for key in ON_ONE_KEY if key in value), key=value.__getitem__)
            by_token = max(BY_TOKEN, key=value.__getitem__)
            if value["uniform"] >= UNIFORM:
                found.append("uniform")
            elif value[by_token] >= max(MOST, MORE_THAN_POSITION * value[f"{by_token}_expected"]):
                found.append(by_token)
            elif value[on_one_key] >= MOST:
                found.append(on_one_key)
            else:
                shares = {name: float(self.explained[name][0, head]) for name in SIMPLE}
                simple = next(name for name in SIMPLE if shares[name] >= max(shares.values()) - SAME)
                if shares[simple] >= MOST:
                    found.append(SIMPLE[simple])
                else:
                    found.append("relative" if value["content"] <= 1 - MOST else "content")
        return found


def follows_earlier(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """True where the key stands right after an earlier occurrence of the query's token: where an induction head looks.
    Olsson et al. 2022."""
    return torch.nn.functional.pad(same_earlier(tokens)[..., :-1], (1, 0)).tril()


def same_earlier(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
    """True where the key is an earlier occurrence of the query's token: where a duplicate-token head looks. Wang et al.
    2023 (IOI)."""
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def _head_detector(
    traced: Trace, layer: int, measured_on: slice, weights: Tensor
) -> dict[str, Float64[Tensor, "draw head"]]:
    """TransformerLens's scores of the kinds that it and this census both name."""
    from probe.models.lens import head_detector_scores

    of = (traced.pattern(layer), traced.tokens, traced.lengths)
    scores = head_detector_scores(*(each[measured_on] for each in of))
    return {f"head_detector_{name}": weights @ each for name, each in scores.items()}
