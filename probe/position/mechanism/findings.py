"""What speaks for and against each mechanism."""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from probe.models.decoder import Decoder
from probe.models.variants import standing_still
from probe.position.edits.readable import READABLE
from probe.position.edits.subspaces import Subspace, Whitening
from probe.position.geometry.similarity import neighbour_similarity
from probe.position.geometry.variance import ATTENTION_OUT, variance_by_position
from probe.position.mechanism.evidence import (
    ACTS,
    ALIKE,
    COUNTS,
    DECAYS,
    FLAT,
    LOST,
    SHIFTED,
    SINK,
    Disturbance,
    Evidence,
)
from probe.position.mechanism.interventions import NORMAL, first_twice, mix_sequences
from probe.position.mechanism.readout import Readout, decoded_shift, readout_sums
from probe.position.mechanism.use import Use
from probe.position.probes.moments import precision
from probe.position.probes.ridge import LinearProbe
from probe.position.probes.scores import r2
from probe.tracing import EMBED, PATTERN, RESID_POST, block_site, trace

# Whether a mechanism is there, and how to ask whether it is used, if it can be asked.
Finding = tuple[bool, Callable[[Use, Evidence], bool] | None]


def _position(readout: Readout, evidence: Evidence) -> Finding:
    for name, outcome in readout.found.items():
        for metric, drawn in outcome.items():
            evidence.add(metric, drawn, name, readout.site)
    embedding = evidence.add("r2", r2(readout.draws.sequences @ readout.read(NORMAL, EMBED)[1]), NORMAL, EMBED)
    best = max(float(readout.found[name]["r2_refitted"][0]) for name in (NORMAL, "permuted_without_bos"))
    return _gone(best, embedding["value"]), None


def _bos_counter(readout: Readout, evidence: Evidence) -> Finding:
    if readout.bos is None:
        return False, None
    read = functools.partial(evidence.read, readout)
    plain, dropped = read(NORMAL, "r2"), read("drop_bos", "r2")
    doubled, moved = (read("double_bos", "shift"), read("double_odds", "shift")), read("move_bos", "shift")
    read("constant", "r2")
    # The layer that counts: where doubled odds alone send the decoded position back furthest.
    edited = [readout.decode_under({block_site(i, PATTERN): first_twice}) for i in range(readout.n_layers)]
    layer = int(torch.stack([decoded_shift(sums.sum(0)) for sums in edited]).argmin())
    slopes = readout.attention["slope"]
    head = int((slopes[:, layer].mean(0) + 1).abs().argmin())
    counter = evidence.mean("log_odds_slope", slopes[:, layer, head], site=f"{block_site(layer, PATTERN)}[{head}]")
    available = (
        _gone(plain, dropped)
        and max(doubled) < -SHIFTED * readout.mean_position
        and moved > -(readout.held_out.tokens.shape[1] // 4) / 2
        and abs(counter["value"] + 1) < COUNTS
    )
    return available, lambda use, evidence: use.of(_of_pattern(readout, layer, first_twice), evidence)


def _variance_decay(readout: Readout, evidence: Evidence) -> Finding:
    where, site = "permuted_without_bos", block_site(0, ATTENTION_OUT)
    traced = {
        part: trace(readout.setting.model, readout.given(where, part)[1], [site]) for part in ("fitted", "held_out")
    }
    fitted = variance_by_position(traced["held_out"], [site], seed=readout.seed).query("metric == 'exponent'").iloc[0]
    value, low, high = fitted[["value", "low", "high"]]
    row = evidence.put("variance_exponent", value, low, high, where, site)
    centre = traced["fitted"][site].double().mean((0, 1))
    x = {part: _log_norm(each[site], centre) for part, each in traced.items()}
    log_t = torch.arange(1, readout.held_out.tokens.shape[1] + 1, dtype=torch.float64).log()
    line = LinearProbe((0.0,)).fit(x["fitted"].reshape(-1, 1), log_t.repeat(len(x["fitted"])))
    group = torch.arange(len(x["held_out"])).repeat_interleave(len(log_t))
    sums = readout_sums(line.predict(x["held_out"].reshape(-1, 1)), log_t.repeat(len(x["held_out"])), group)
    readable = evidence.add("r2_log_position_from_norm", r2(readout.draws.sequences @ sums), where, site)
    available = row["low"] > DECAYS and readable["value"] >= READABLE

    def grown() -> Disturbance:
        # The fluctuation that stands at t has the size of that at t/2.
        content = _content(readout, site)
        return beside_content(0, (2 ** (row["value"] / 2) - 1) * content, content)

    return available, lambda use, evidence: use.of(grown(), evidence)


def _neighbour_similarity(readout: Readout, evidence: Evidence) -> Finding:
    if readout.n_layers == 1:
        return False, None
    where, site = "permuted_without_bos", block_site(0, RESID_POST)
    traced = trace(readout.setting.model, readout.given(where, "held_out")[1], [site])
    rows = neighbour_similarity(traced, [site], seed=readout.seed).query("control == 'none'")
    fitted = rows[rows["metric"] == "hidden_spearman"].iloc[0]
    value, low, high = fitted[["value", "low", "high"]]
    row = evidence.put("spearman_of_similarity", value, low, high, where, site)
    read = evidence.read(readout, where, "r2_refitted")
    alone = evidence.read(readout, "strangers_without_bos", "r2_refitted")
    available = row["low"] > ALIKE and _gone(read, alone)

    def mixed() -> Disturbance:
        x = trace(readout.setting.model, readout.held_out.tokens, [block_site(0, ATTENTION_OUT)])[
            block_site(0, ATTENTION_OUT)
        ]
        generator = torch.Generator().manual_seed(readout.seed)
        # The control has whole sequences of strangers: content is as wrong, neighbours are as alike as they were.
        return Disturbance(
            0, mix_sequences(x, generator) - x, lambda g: x[torch.randperm(len(x), generator=g)] - x, False
        )

    return available, lambda use, evidence: use.of(mixed(), evidence)


def _attention_sink(readout: Readout, evidence: Evidence) -> Finding:
    mass, slope = (readout.attention[name].mean(0) for name in ("mass", "slope"))
    flat = mass.where(slope > FLAT, -1.0)
    # What a later layer's sink adds cannot be decoded at the site.
    flat[readout.site_layer + 1 :] = -1.0
    layer, head = divmod(int(flat.argmax()), flat.shape[1])
    where = {"site": f"{block_site(layer, PATTERN)}[{head}]"}
    sink = evidence.mean("attention_on_first", readout.attention["mass"][:, layer, head], **where)
    evidence.mean("log_odds_slope", readout.attention["slope"][:, layer, head], **where)
    if sink["value"] < SINK or flat.max() < 0:
        return False, None
    heads = (flat[layer] >= SINK)[:, None, None]

    def cut(pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        """The first key is hidden from the layer's sinks; the first query keeps it, and those that see nothing else."""
        rest = pattern.clone()
        rest[:, :, 1:, 0] = 0
        total = rest.sum(-1, keepdim=True)
        rest = torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), pattern)
        return torch.where(heads.to(pattern.device), rest, pattern)

    decoded = readout.draws.sequences @ readout.decode_under({block_site(layer, PATTERN): cut})
    without = evidence.add("r2", r2(decoded), "cut_sinks", readout.site)
    plain = evidence.read(readout, NORMAL, "r2")
    cut_off = _gone(plain, without["value"])
    return cut_off, lambda use, evidence: use.of(_of_pattern(readout, layer, cut, False), evidence)


def _encoding(readout: Readout, evidence: Evidence) -> Finding:
    available = evidence.read(readout, "constant_without_bos", "r2_refitted") >= READABLE
    model = readout.setting.model
    if not isinstance(model, Decoder) or model.config.encoding == "none":
        return available, None
    # An encoding by distance leaves no position in the states of one token said again and again. That it acts is seen
    # where it is taken away: all tokens stand at one position, in the middle.
    still = standing_still(model, readout.held_out.tokens.shape[1] // 2)
    # Behind the last layer: the layers that see an encoding may all lie behind the site.
    site = block_site(readout.n_layers - 1, RESID_POST)
    plain, moved = (
        torch.cat([trace(m, part, [site])[site] for part in readout.held_out.tokens.split(readout.setting.batch_size)])
        for m in (model, still)
    )
    apart = (moved - plain).double().square().sum((1, 2)), (plain - plain.mean((0, 1))).double().square().sum((1, 2))
    times = readout.draws.sequences
    share = evidence.add(
        "states_moved", (times @ apart[0]) / (times @ apart[1]).clamp(min=1e-300), "standing_still", site
    )
    return available or share["value"] > ACTS, lambda use, evidence: use.without(still, evidence)


MECHANISMS: dict[str, Callable[[Readout, Evidence], Finding]] = {
    "position": _position,
    "bos_counter": _bos_counter,
    "variance_decay": _variance_decay,
    "neighbour_similarity": _neighbour_similarity,
    "attention_sink": _attention_sink,
    "encoding": _encoding,
}


def _gone(before: float, after: float) -> bool:
    """Whether an R² at which position can be read has been lost."""
    return before >= READABLE and before - max(after, 0.0) >= LOST * before


def _log_norm(
    x: Float[Tensor, "batch pos d_model"], centre: Float64[Tensor, "d_model"]
) -> Float64[Tensor, "batch pos"]:
    """ln ‖x - centre‖², not below what rounding makes of x."""
    rounding = precision(x.dtype) ** 2 * x.double().square().sum(-1).mean()
    least = max(float(rounding), torch.finfo(torch.float64).tiny)
    return (x.double() - centre).square().sum(-1).clamp(min=least).log()


def _of_pattern(readout: Readout, layer: int, edit: Callable[[Tensor], Tensor], pretends: bool = True) -> Disturbance:
    """What another pattern changes in its layer's attention output, the mean over sequences at each position.

    The mean holds content: a doubled <bos> also takes attention from all other keys, and a model that only counts words
    is worse for it, though it reads no position. That part differs from sequence to sequence, and goes with the mean.
    """
    site = block_site(layer, ATTENTION_OUT)
    plain, _ = readout.run(readout.held_out.tokens, {}, site)
    edited, _ = readout.run(readout.held_out.tokens, {block_site(layer, PATTERN): edit}, site)
    change = (edited - plain).mean(0, keepdim=True).expand_as(plain)
    states = trace(readout.setting.model, readout.fitted.tokens, [site])[site][:, 1:].flatten(0, 1)
    return elsewhere(layer, change, states, pretends)


def _content(readout: Readout, site: str) -> Float[Tensor, "batch pos d_model"]:
    """What differs between the test sequences at each position: from the mean of the training sequences."""
    train, test = (
        trace(readout.setting.model, each, [site])[site] for each in (readout.fitted.tokens, readout.held_out.tokens)
    )
    return test - train.mean(0)


def elsewhere(
    layer: int,
    delta: Float[Tensor, "batch pos d_model"],
    states: Float[Tensor, "row d_model"],
    pretends: bool = True,
) -> Disturbance:
    """The control is a change that is as far among the states at every token, in directions that the change itself does
    not take.

    In whitened coordinates of the states, the principal directions of the change, 95 % of its squares (at most half of
    all directions), are turned into random ones orthogonal to them. So it is as many standard deviations long, in
    directions that the states really take. Where they take no other, there is no control, and the change is 0.
    """
    whitening = Whitening.of(states)
    flat = delta[0].double() @ whitening.inverse.T
    _, strength, directions = torch.linalg.svd(flat, full_matrices=False)
    k = min(int((strength.square().cumsum(0) < 0.95 * strength.square().sum()).sum()) + 1, max(1, whitening.rank // 2))
    own = Subspace(whitening.root @ directions[:k].T, directions[:k] @ whitening.inverse, whitening.mean)

    def turn(generator: torch.Generator) -> Tensor:
        if whitening.rank - k < k:
            return torch.zeros_like(delta)
        others = torch.linalg.qr(whitening.random(k, generator, own))[0]
        turned = flat @ directions[:k].T @ others.T
        size = flat.norm(dim=-1, keepdim=True) / turned.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        return ((turned * size) @ whitening.root.T).to(delta).expand_as(delta)

    return Disturbance(layer, delta, turn, pretends)


def beside_content(
    layer: int,
    delta: Float[Tensor, "batch pos d_model"],
    content: Float[Tensor, "batch pos d_model"],
) -> Disturbance:
    """The control is a change of content, as large at every token as the change of position, and no larger than the
    content of another sequence.

    ``content`` is what differs between sequences at each position. It is turned towards that of another sequence c′:
    c cos θ + c′ sin θ, of the same size on average, so that nothing that position does to its size is changed, and
    further from c by 2 sin(θ/2) of it. These are directions that the model's own states take; in any other direction
    a change may cost much, or nothing, for reasons that have nothing to do with what stands there.
    """
    size = content.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(content.dtype).tiny)
    angle = 2 * (delta.norm(dim=-1, keepdim=True) / (2 * size)).clamp(max=0.5**0.5).asin()

    def control(generator: torch.Generator) -> Tensor:
        other = content[torch.randperm(len(content), generator=generator)]
        return content * (angle.cos() - 1) + other * angle.sin()

    return Disturbance(layer, delta, control, pretends=True)
