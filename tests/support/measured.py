"""Every measurement on small inputs in a dtype of one's choice, and how far what it finds is from what was wanted.

``Inputs(cast)`` holds the inputs: weights and numbers that ``cast`` takes to a dtype. Functions here take inputs and
give what a measurement says of them: numbers, tensors, rows, or several of these.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass

import mpmath
import numpy as np
import pandas as pd
import torch
from patterns import random_pattern
from scipy import stats
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import constructions
import probe
from probe import attention, extrapolation, position, training
from probe.losses import sequence_losses, token_losses
from probe.models import untrained_like
from probe.rows import check_rows
from probe.tasks import make_task
from probe.tracing import logits_with_edits

N, T, D_VOCAB = 24, 16, 11
SITES = ("hook_embed", "hook_resid_post", "hook_attn_out", "attn.hook_pattern", "attn.hook_attn_scores")
FEW = {"n_bootstrap": 10}
COPY = make_task("copy", {"train_length": 4, "test_length": 8, "n_symbols": 6})


@functools.cache
def decoder(encoding="none", n_layers=2, sharpness=4.0, **options):
    """A decoder that nobody trained, with attention that is neither uniform nor on one key."""
    defaults = {"d_vocab": D_VOCAB, "n_ctx": 64, "d_model": 32, "n_heads": 4}
    config = probe.DecoderConfig(**(defaults | options), n_layers=n_layers, encoding=encoding)
    made = probe.Decoder(config, seed=1).eval()
    with torch.no_grad():
        made.token_embedding.weight.mul_(3)
        for layer in made.layers:
            layer.attention.q_proj.weight.mul_(sharpness)
            layer.attention.k_proj.weight.mul_(sharpness)
            layer.attention.v_proj.weight.mul_(sharpness)
    return made


@functools.cache
def tokens(n=N, length=T, seed=0):
    made = torch.randint(1, D_VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))
    made[:, 0] = 0  # <bos>
    return made


@functools.cache
def examples():
    return COPY.splits(n_train=60, n_validation=8, n_test=24)


@dataclass(frozen=True)
class Inputs:
    """Models and numbers in the dtype that ``cast`` makes, of decoders that ``change`` has changed."""

    cast: Callable
    tokens: Tensor = field(default_factory=lambda: tokens())
    change: Callable = lambda decoder: None

    def model(self, encoding="none", **options):
        made = copy.deepcopy(decoder(encoding, **options))
        with torch.no_grad():
            self.change(made)
        return self.cast(made)

    def trace(self, encoding="none", sites=SITES, **options):
        return probe.trace(self.model(encoding, **options), self.tokens, sites)

    def pattern(self, seed=0):
        """Patterns as their dtype holds them."""
        return self.cast(random_pattern(6, 4, T, seed=seed, spread=2.0))

    def rows(self, seed):
        return self.pattern(seed)[:, :, -1]


def double(x):
    return x.double()


def single(x):
    return x.float()


def half(x):
    return x.bfloat16()


def half_in_double(x):
    """The numbers that bfloat16 holds, where nothing else is rounded."""
    return x.bfloat16().double()


# How far one is from the other.


def numbers(found):
    """All floats of what was found, one after the other, and all that is no float."""
    if isinstance(found, pd.DataFrame):
        check_rows(found)  # every measurement keeps to the schema
        real = found.select_dtypes(include=["float64", "float32", "Float64"])
        rest = found.drop(columns=real.columns).astype(object).where(lambda frame: frame.notna(), None)
        return real.to_numpy(dtype=float, na_value=math.nan).ravel(), rest.to_numpy().ravel().tolist()
    if isinstance(found, Tensor):
        found = found.detach().double().numpy()
    if isinstance(found, (float, np.ndarray)):
        return np.asarray(found, dtype=float).ravel(), [np.shape(found)]
    if isinstance(found, dict):
        parts = [numbers(each) for each in found.values()]
        return _together(parts, [*map(str, found)])
    if isinstance(found, (list, tuple)):
        return _together([numbers(each) for each in found], [len(found)])
    if is_dataclass(found):
        return numbers([getattr(found, each.name) for each in fields(found)])
    return np.empty(0), [found]


def _together(parts, rest):
    values = [part[0] for part in parts]
    return np.concatenate(values) if values else np.empty(0), rest + [each for part in parts for each in part[1]]


def error(found, wanted):
    """The largest difference, absolute, or relative to what was wanted where that is above 1; infinite where a label
    or a place differs, or what is NaN or infinite in the one and not in the other."""
    (a, names_a), (b, names_b) = numbers(found), numbers(wanted)
    if a.shape != b.shape or names_a != names_b:
        return math.inf
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not (np.isfinite(a) & np.isfinite(b))[~same].all():
        return math.inf
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b) / np.maximum(1, np.abs(b))
    return float(np.where(same, 0.0, apart).max(initial=0.0))


# What is measured.


def distance(name):
    return lambda given: attention.DISTANCES[name](given.rows(1), given.rows(2))


def pattern_distance(given):
    return attention.pattern_distance(given.pattern(1), given.pattern(2))


def head_pair_distances(given):
    return [attention.head_pair_distances(given.pattern(1), given.pattern(2), name) for name in attention.DISTANCES]


def attention_summary(given):
    return attention.attention_summary(given.trace(), **FEW)


TABLE = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))


def template(name):
    def fitted(given):
        context = attention.TemplateContext(given.cast(TABLE))
        return attention.TEMPLATES[name](given.pattern(), None, context).pattern

    return fitted


def compare_templates(given):
    rows = attention.compare_templates(given.trace(), **FEW)
    return rows.drop(columns="slope")  # of a saturated head it is whatever the ridge makes of it


def nearest_template(given):
    rows = attention.compare_templates(given.trace(), ["uniform", "alibi", "alibi_fitted", "first_token_sink"], **FEW)
    return attention.nearest_template(rows)


def distance_from_template(given):
    measure = attention.distance_from_template(given.model(), given.tokens, template="alibi_fitted")
    traced = given.trace()
    return [measure(layer, traced.pattern(layer), traced.lengths) for layer in range(2)]


def attention_maps(given):
    return attention.attention_maps(given.trace(), ["uniform", "alibi_fitted", "t5_fitted"], bins=8)


def pool(given):
    return attention.pool(given.pattern(), 5)


def pooled_pattern(given):
    q, k = queries_and_keys(given)
    return attention.pooled_pattern(q, k, 0.25, bins=5)


def census(given):
    return attention.census(given.model(), given.tokens, **FEW)


def census_table(given):
    table = attention.census_table(attention.census(given.model(n_layers=1), given.tokens, ablate=False, **FEW))
    return {name: [float(x) if not isinstance(x, str) else x for x in table[name]] for name in table}  # a wide table


def _second_seed(given):
    return probe.trace(untrained_like(given.model(), seed=5), given.tokens, SITES)


def compare_models(given):
    return [
        attention.compare_models({"a": given.trace(), "b": given.trace("alibi")}, aggregate=aggregate, **FEW)
        for aggregate in attention.AGGREGATES
    ]


def compare_to(given):
    traces = {"a": given.trace(), "b": given.trace("alibi"), "c": _second_seed(given)}
    return attention.compare_to(traces, "a", **FEW)


def split_scores(given):
    return attention.split_scores(given.trace("t5"), **FEW)


def split_long_context(given):
    return attention.split_long_context(given.model("t5"), given.tokens[:6], **FEW)


def _marked(given):
    position = torch.arange(given.tokens.shape[1]).expand_as(given.tokens)
    return (position >= 3) & (position < 5), position >= 9


def attention_on(given):
    return attention.attention_on(given.model(), given.tokens, *_marked(given), window=4, **FEW)


def by_layer_encoding(given):
    hybrid = given.model("rotary", position_layers=(0,))
    return attention.by_layer_encoding(attention.attention_on(hybrid, given.tokens, *_marked(given), **FEW), **FEW)


def queries_and_keys(given, largest=10.0):
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(heads, 40, 16, generator=generator) for heads in (4, 2))
    return given.cast(q * largest / 12), given.cast(k)


def stream_templates():
    return {"alibi": attention.StreamTemplate.alibi(probe.alibi_slopes(4)), "t5": attention.StreamTemplate.t5(TABLE)}


def stream_attention(path, largest=10.0):
    def streamed(given):
        q, k = queries_and_keys(given, largest)
        options = {} if path == "fused" else {"histogram": True, "jensen_shannon": True}
        chosen = "auto" if q.dtype == torch.float64 else path
        return attention.stream_attention(q, k, scale=0.25, templates=stream_templates(), path=chosen, **options)

    return streamed


def stream(given):
    return attention.stream(
        given.model("t5"), given.tokens[:4], stream_templates(), histogram=True, jensen_shannon=True
    )


def compare_long_context(given):
    return attention.compare_long_context(given.model("alibi"), given.tokens[:6], bins=6, **FEW)


def traced(given):
    return given.trace().values


def losses(given):
    logits = logits_with_edits(given.model(), given.tokens)
    return token_losses(logits, given.tokens), sequence_losses(
        logits, given.tokens, torch.ones_like(given.tokens, dtype=torch.bool)
    )


def fit_position_probe(kind):
    return lambda given: position.fit_position_probe(given.model("t5"), given.tokens, probes=[kind], **FEW)


def probe_positions(given):
    context = position.TargetContext(separator=3, counted=4)
    targets = tuple(position.TARGETS)
    return position.probe_positions(given.model("t5"), given.tokens, targets=targets, context=context, **FEW)


def _states(given):
    traced = given.trace("t5", sites=["hook_resid_post"])
    return traced.hidden("blocks.1.hook_resid_post").flatten(0, 1), torch.arange(given.tokens.shape[1]).repeat(
        len(given.tokens)
    )


def ridge_probe(given):
    x, y = _states(given)
    fitted = position.LinearProbe(alphas=(1e-2, 1.0), standardize=True).fit(x.numpy(), y.numpy())
    return fitted.predict(x.numpy())


def softmax_probe(given):
    x, y = _states(given)
    return position.SoftmaxProbe(tol=1e-9).fit(x.numpy(), y.numpy()).predict_proba(x.numpy())


def moments(given):
    x, y = _states(given)
    found = position.Moments.of(x, y[:, None].double())
    return found.means, found.scatter / found.n


def pair_probe(given):
    options = {"n_pairs": 300, "rank": 4, "controls": ("shuffled",)}
    return position.pair_probe(given.model("t5"), given.tokens, ["blocks.1.hook_resid_post"], **options, **FEW)


def probe_over_training(given):
    return position.probe_over_training([(0, given.model()), (1, given.model("t5"))], given.tokens, **FEW)


def erase_position(given):
    fit = functools.partial(attention.distance_from_template, template="alibi_fitted")
    return position.erase_position(given.model("t5"), given.tokens, distance=fit, n_random=1, **FEW)


def steer_position(given):
    return position.steer_position(given.model("t5"), given.tokens, "blocks.1.hook_resid_pre", n_random=1, **FEW)


def patch_position(given):
    return position.patch_position(
        given.model("t5"), given.tokens, "blocks.1.hook_resid_pre", (0, 2), n_random=1, concept_name="position", **FEW
    )


def name_mechanism(given):
    return position.name_mechanism(given.model(), given.tokens, **FEW)


def mechanism_table(given):
    table = position.mechanism_table(name_mechanism(Inputs(given.cast, given.tokens[:10])))
    return table[["mechanism", "verdict"]]  # the evidence is written in three digits


def geometry(name):
    few = {} if name == "decompose_hidden" else FEW  # the jackknife's intervals draw nothing
    return lambda given: getattr(position, name)(given.trace(sites=["hook_resid_post", "hook_attn_out"]), **few)


def position_channels(given):
    return position.position_channels(given.trace("t5", sites=["hook_resid_post"]), top=4, **FEW)


def position_table(given):
    return position.position_table(given.model("learned"), n_shuffles=5)


def _task_model(given):
    return given.model(d_vocab=len(COPY.vocabulary))


def predict(given):
    return training.predict(_task_model(given), examples().test, COPY.vocabulary)


def exact_match(given):
    rows = training.exact_match(pd.DataFrame({"length": [5] * 7 + [9] * 4, "correct": [True, False] * 5 + [True]}))
    return rows[["value", "low", "high"]]


def shifted_positions(given):
    model = given.model("learned", d_vocab=len(COPY.vocabulary))
    return training.shifted_positions(model, training.encode(examples().test, COPY.vocabulary), (0, 1, 5), **FEW)


def shifted_texts(given):
    return training.shifted_texts(given.model("learned"), given.tokens, (0, 1, 5), **FEW)


def perplexity(given):
    return extrapolation.perplexity(given.model(), given.tokens, (4, 9, 16), **FEW)


def context_losses(given):
    return extrapolation.context_losses(given.model(), given.tokens, (4, 16)).by_context


def perplexity_rows(given):
    pair = (extrapolation.context_losses(given.model(name), given.tokens, (4, 16)) for name in ("none", "t5"))
    return extrapolation.perplexity_rows(*pair, **FEW)


def loss_by_position(given):
    return extrapolation.loss_by_position(given.model(), given.tokens, n_bins=5, **FEW)


PASSKEY = make_task("passkey")


def passkey(given):
    model = given.model(d_vocab=len(PASSKEY.vocabulary), n_ctx=256)
    return extrapolation.passkey(model, PASSKEY, (160,), (0.0, 1.0), n=2)


def scaled(kind):
    def logits(given):
        model = given.model()
        scale = 1.25 if kind == "uniform" else 1 + torch.arange(8).view(2, 4) / 16
        if kind == "folded":
            return extrapolation.scaled(model, scale)(given.tokens)
        with (extrapolation.UniformScale if kind == "uniform" else extrapolation.HeadScale)(model, scale):
            return model(given.tokens)

    return logits


def _longer():
    return training.encode(examples().test, COPY.vocabulary)


RESULTS = pd.DataFrame(
    [
        (task, encoding, seed, length, accuracy)
        for task, encoding, seed, accuracies in (
            ("copy", "none", 0, (0.5, 0.25)),
            ("copy", "none", 1, (0.4, 0.3)),
            ("copy", "t5", 0, (0.1, 0.2)),
            ("copy", "t5", 1, (0.7, 0.1)),
            ("sort", "none", 0, (0.6, 0.2)),
            ("sort", "none", 1, (0.9, 0.8)),
            ("sort", "t5", 0, (0.2, 0.6)),
            ("sort", "t5", 1, (0.3, 0.2)),
        )
        for length, accuracy in zip((10, 20), accuracies, strict=True)
    ],
    columns=["task", "encoding", "seed", "length", "accuracy"],
).astype({"length": "Int64"})


def league(given):
    return training.league(RESULTS)["value"].to_numpy()


def paired_differences(given):
    rows = training.paired_differences(RESULTS)
    return rows[["value", "p_runs", "p_tasks"]].to_numpy()


def accuracy_by_length(given):
    return training.accuracy_by_length(RESULTS)[["value", "low", "high"]].to_numpy()


EXTENSIONS, SCALES = (2.0, 4.0, 8.0), (1.3, 1.5, 1.9)


def fit_log_law(given):
    law = extrapolation.fit_log_law(EXTENSIONS, SCALES)
    return np.array([law.slope, law.low, law.high, law(16.0)])


def scale_against(given):
    return extrapolation.scale_against(np.array(HEADS), np.array(ENTROPIES))["value"].to_numpy()


HEADS, ENTROPIES = (1.0, 1.2, 1.9, 1.4, 1.1), (0.5, 0.7, 2.0, 0.6, 0.9)


def sweep_scale(given):
    return extrapolation.sweep_scale(_task_model(given), _longer(), (1.0, 1.25, 2.0), **FEW)


def train_scale(given):
    found = extrapolation.train_scale(_task_model(given), _longer(), extrapolation.ScaleTraining(steps=5, warmup=1))
    return found.scale, found.rows


def search_scale(given):
    model = given.model(n_layers=1, n_heads=1, d_head=32, d_vocab=len(COPY.vocabulary))
    return extrapolation.search_scale(model, _longer(), evaluations=12).rows["loss"].min()


def planted(given):
    found = constructions.plant(constructions.widen(decoder()), layer=0, length=T)
    states = probe.trace(given.cast(found.decoder), given.tokens, ["blocks.1.hook_resid_post"])
    return found.read(states.hidden("blocks.1.hook_resid_post").double())


def widen(given):
    return given.cast(constructions.widen(decoder()))(given.tokens)


# What it is held against, where something else than this toolkit knows it.


def by_rows(oracle):
    """An oracle of two rows, row by row."""

    def wanted(given):
        p, q = given.rows(1), given.rows(2)
        rows = zip(p.flatten(0, 1).numpy(), q.flatten(0, 1).numpy(), strict=True)
        return np.array([oracle(a, b) for a, b in rows]).reshape(p.shape[:2])

    return wanted


def jeffreys(p, q):
    return float(sum((mpmath.mpf(a) - b) * (mpmath.log(a) - mpmath.log(b)) for a, b in zip(p, q, strict=True)))


def released(p, q):
    m = (p + q) / 2
    return (rel_entr(m, p).sum() + rel_entr(m, q).sum()) / 2


SCIPY = {
    "jensen_shannon": lambda p, q: jensenshannon(p, q) ** 2,
    "symmetric_kl": jeffreys,
    "total_variation": lambda p, q: np.maximum(p - q, 0).sum(),
    "hellinger": lambda p, q: math.sqrt(1 - np.sqrt(p * q).sum()),
    "wasserstein": lambda p, q: wasserstein_distance(range(len(p)), range(len(q)), p, q),
    "mcgill_compat": released,
}


def jensen_shannon_by_row(p, q):
    values = [[jensenshannon(a, b) ** 2 for a, b in zip(*rows, strict=True)] for rows in zip(p, q, strict=True)]
    return np.array(values)


def pattern_distance_by_row(given):
    p, q = given.pattern(1).flatten(0, 1).numpy(), given.pattern(2).flatten(0, 1).numpy()
    return torch.from_numpy(np.nanmean(jensen_shannon_by_row(p, q), axis=-1)).view(6, 4)


def pooled(pattern):
    """Of a numpy pattern, cell by cell."""
    n = pattern.shape[-1]
    of = np.arange(n) * 5 // n
    cells = [[pattern[..., of == a, :][..., of == b].sum(-1).mean(-1) for b in range(5)] for a in range(5)]
    return np.moveaxis(np.array(cells), (0, 1), (-2, -1))


def dense_pattern(q, k, scale):
    """The causal pattern in numpy's long double, and its logarithm."""
    q, k = (x.numpy().astype(np.longdouble) for x in (q, k))
    scores = scale * q @ np.repeat(k, len(q) // len(k), axis=0).transpose(0, 2, 1)
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    scores = scores - scores.max(-1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.exp(log_p), np.where(np.isfinite(log_p), log_p, 0)


def row_statistics(p, log_p):
    at = np.arange(p.shape[-1])
    previous = np.pad(np.diagonal(p, -1, -2, -1), [(0, 0)] * (p.ndim - 2) + [(1, 0)])
    distance = (p * (at[:, None] - at)).sum(-1)
    return [-(p * log_p).sum(-1), distance, p[..., 0], previous, np.diagonal(p, 0, -2, -1)]


def streamed_rows(path, largest=10.0):
    def found(given):
        whole = stream_attention(path, largest)(given)
        rows = (whole.entropy, whole.mean_distance, whole.first, whole.previous, whole.self_)
        return np.stack([each.double().numpy() for each in rows])

    return found


def dense_rows(largest=10.0):
    return lambda given: np.stack(row_statistics(*dense_pattern(*queries_and_keys(given, largest), 0.25))).astype(float)


def summary_values(given):
    rows = attention_summary(given)
    return rows["value"].to_numpy()


def summary_by_numpy(given):
    traced, found = given.trace(), []
    for layer in range(2):
        p = traced.pattern(layer).numpy()
        found += [each.mean(0).ravel() for each in row_statistics(p, np.log(np.where(p > 0, p, 1)))]
    return np.concatenate(found)


def losses_by_numpy(given):
    logits = logits_with_edits(given.model(), given.tokens).numpy().astype(np.longdouble)[:, :-1]
    highest = logits.max(-1, keepdims=True)
    log_p = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_p, given.tokens[:, 1:, None].numpy(), -1)[..., 0]
    return torch.from_numpy(each.astype(float)), torch.from_numpy(each.sum(1).astype(float))


def perplexity_of_whole_texts(given):
    return extrapolation.perplexity(given.model(), given.tokens, (given.tokens.shape[1],), **FEW)["value"].to_numpy()


def perplexity_by_numpy(given):
    loss = float(losses_by_numpy(given)[0].mean())
    return np.array([math.exp(loss), loss, loss / math.log(2)])


def sklearn_ridge(given):
    """scikit-learn's own ridge regression on standardised features, at the strength that was chosen."""
    x, y = (each.numpy() for each in _states(given))
    chosen = position.LinearProbe(alphas=(1e-2, 1.0), standardize=True).fit(x, y).alpha_
    return make_pipeline(StandardScaler(), Ridge(alpha=chosen)).fit(x, y).predict(x)


def sklearn_softmax(given):
    x, y = _states(given)
    fitted = LogisticRegression(tol=1e-12, max_iter=20_000).fit(x.numpy(), y.numpy())
    return fitted.predict_proba(x.numpy())


def numpy_moments(given):
    x, y = _states(given)
    both = torch.cat((x, y[:, None].double()), dim=1).numpy()
    means = torch.from_numpy(both.mean(0))
    return (means[:-1], means[-1:]), torch.from_numpy(np.cov(both.T, bias=True))


def wilson(given):
    """Wilson 1927 in mpmath: the two zeros of (p̂ - p)² = z² p (1 - p) / n."""
    z, rows = mpmath.sqrt(2) * mpmath.erfinv(mpmath.mpf("0.95")), []
    for right, n in ((6, 11), (4, 7), (2, 4)):
        share = mpmath.mpf(right) / n
        middle, half = share + z**2 / (2 * n), z * mpmath.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        rows.append([float(each / (1 + z**2 / n)) for each in (share * (1 + z**2 / n), middle - half, middle + half)])
    return pd.DataFrame(rows, columns=["value", "low", "high"])


def league_by_hand(given):
    # Means over lengths: copy .375 .35 against .15 .4, sort .4 .85 against .4 .25; the third pair ties.
    return np.array([(1 + 0.5 + 0.75 + 1) / 4, (0.5 + 1 + 0.75 + 0.5) / 4, (0.725 + 1.25) / 4, (0.55 + 0.65) / 4])


def differences_by_hand(given):
    # Differences .225, -.05, 0, .6: of 16 patterns of signs, 4 have a sum of at least .775, and 4 of at most -.775.
    return np.array([[(0.225 - 0.05 + 0 + 0.6) / 4, 8 / 16, 2 / 4]])


def students_t(given):
    found = []
    for _, of in RESULTS.groupby(["task", "encoding", "length"])["accuracy"]:
        low, high = stats.t.interval(0.95, 1, loc=of.mean(), scale=stats.sem(of))
        found.append([of.mean(), max(low, 0.0), min(high, 1.0)])
    return np.array(found)


def law_by_lstsq(given):
    x, y = np.log(EXTENSIONS)[:, None], np.array(SCALES) - 1
    slope, squares, *_ = np.linalg.lstsq(x, y, rcond=None)
    half = stats.t.ppf(0.975, 2) * math.sqrt(squares[0] / 2 / (x**2).sum())
    return np.array([slope[0], slope[0] - half, slope[0] + half, 1 + slope[0] * math.log(16)])


def correlations(given):
    return np.array([stats.linregress(HEADS, ENTROPIES).rvalue, stats.spearmanr(HEADS, ENTROPIES).statistic])
