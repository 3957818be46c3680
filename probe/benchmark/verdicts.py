"""Verdicts: how often what the toolkit says of a model is true, on models whose answer is known from their weights.

The models are those of ``constructions.known``, written by hand or trained so that their mechanism is enforced. Every
verdict is a name that the toolkit gives: "used" by ``name_mechanism``, "used" by erasure and by patching, "follows" by
steering, a head's label and use by the census, a head's nearest template; and the shares of the split of scores, which
are right within ``SHARE``. The first half of the seeds may be looked at when thresholds and rules are set; only the
other half is scored.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from constructions.known import KNOWN, TRAINED, Known, KnownModel, Trained
from probe.attention import census, compare_templates, split_scores
from probe.benchmark.processes import in_processes
from probe.config import check_size
from probe.errors import unknown_name
from probe.position import (
    attention_follows,
    erase_position,
    name_mechanism,
    patch_position,
    patched_position_used,
    position_used,
    steer_position,
)
from probe.progress import OnProgress, Steps, untold
from probe.statistics import wilson
from probe.tracing import PATTERN, SCORES, block_site, trace

CONFIDENCE = 0.95
SEEDS = 12  # of each generator; the second half of them is scored
SHARE = 0.03  # how far a share of the split may be from the truth
TIE = 1e-4  # nats: templates that are as near as the nearest
WRITTEN, BY_TRAINING = "written", "trained"  #: how a model was made
THRESHOLDS, SCORED = "thresholds", "scored"  #: the halves of the seeds

COLUMNS = ["verdict", "about", "said", "truth", "right"]

GENERATORS: dict[str, Known | Trained] = {**KNOWN, **TRAINED}


@dataclass(frozen=True)
class Verdict:
    """One kind of verdict: what the toolkit says of a known model, beside what is true."""

    about: str  #: one sentence
    positive: str | None  #: what is said where something is found; None for labels, which are right or wrong
    ask: Callable[["Asked"], Iterator[tuple[str, str, str]]]  #: about what, what is said, what is true


@dataclass(frozen=True)
class Asked:
    """A known model, and what was measured of it for more than one verdict."""

    known: KnownModel

    @functools.cached_property
    def mechanisms(self) -> dict[str, str]:
        rows = name_mechanism(self.known.model, self.known.tokens, scored=self.known.scored)
        return dict(zip(rows["mechanism"], rows["verdict"], strict=True))

    @functools.cached_property
    def heads(self) -> pd.DataFrame:
        """The census, one row per head."""
        rows = census(self.known.model, self.known.tokens, scored=self.known.scored)
        return rows.drop_duplicates(["layer", "head"]).set_index(["layer", "head"])

    @property
    def site(self) -> str:
        """Where position stands, or, where the answer names no site, the states before the last layer."""
        return self.known.answer.site or block_site(self.known.model.config.n_layers - 1, "hook_resid_pre")

    @property
    def position_in_stream(self) -> bool | None:
        """Whether predictions use a position that stands in the stream; None where nothing can be scored: what an
        encoding does by distance is no matter of the stream."""
        answer = self.known.answer
        return None if answer.uses_position and answer.site is None else answer.uses_position


def verdict_rows(
    generators: Sequence[str] | None = None,
    verdicts: Sequence[str] | None = None,
    *,
    n_seeds: int = SEEDS,
    jobs: int = 1,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """What the toolkit says of every known model, beside what is true.

    Args:
        generators: names in ``constructions.known.KNOWN`` and ``TRAINED``; by default all of both. Those of ``TRAINED``
            take some ten seconds each.
        verdicts: names in ``VERDICTS``; by default all.
        n_seeds: models of each generator, at least 1; each seed has a variant, in turn.
        jobs: processes side by side.
        on_progress: called with how many models are done, and how many there are.

    Returns:
        One row per thing said: generator, made ("written" or "trained"), variant, seed, half ("thresholds" for the
        first half of the seeds, "scored" for the other), verdict, about (a mechanism, a head, a part), said, truth,
        right.

    Raises:
        ProbeError: for an unknown name, or a number below 1.
    """
    check_size("n_seeds", n_seeds)
    check_size("jobs", jobs)
    for name in generators or ():
        if name not in GENERATORS:
            raise unknown_name("generator", name, GENERATORS)
    for name in verdicts or ():
        if name not in VERDICTS:
            raise unknown_name("verdict", name, VERDICTS)
    chosen = tuple(verdicts or VERDICTS)
    work = [
        (name, kind.variants[(i + seed) % len(kind.variants)], seed, 2 * seed >= n_seeds, chosen)
        for i, (name, kind) in enumerate(GENERATORS.items())
        if generators is None or name in generators
        for seed in range(n_seeds)
    ]
    steps, found = Steps(len(work), on_progress), []
    for rows in in_processes(_of_model, work, jobs):
        found.append(rows)
        steps.step()
    return pd.concat(found, ignore_index=True)


Work = tuple[str, str, int, bool, tuple[str, ...]]


def _of_model(work: Work) -> pd.DataFrame:
    name, variant, seed, scored, verdicts = work
    asked = Asked(GENERATORS[name].build(seed, variant))
    keys = {
        "generator": name,
        "made": BY_TRAINING if name in TRAINED else WRITTEN,
        "variant": variant,
        "seed": seed,
        "half": SCORED if scored else THRESHOLDS,
    }
    rows = [
        keys | {"verdict": verdict, "about": about, "said": said, "truth": truth, "right": said == truth}
        for verdict in verdicts
        for about, said, truth in VERDICTS[verdict].ask(asked)
    ]
    return pd.DataFrame(rows, columns=[*keys, *COLUMNS])


def verdict_scores(rows: pd.DataFrame, half: str = SCORED) -> pd.DataFrame:
    """Precision, recall and accuracy of each verdict on a half of the seeds.

    Returns:
        Columns verdict, about ("" for all together), metric ("precision": of what is said to be found, the share that
        is there; "recall": of what is there, the share that is found; "accuracy": the share of what is said that is
        true, the only metric of labels and shares), value, low, high (Wilson's), n.
    """
    scored, found = rows[rows["half"] == half], []
    for verdict, of_verdict in scored.groupby("verdict", sort=False):
        for about, of in [("", of_verdict), *of_verdict.groupby("about", sort=False)]:
            if about and VERDICTS[str(verdict)].positive is None:
                continue
            for metric, counted in _metrics(of, VERDICTS[str(verdict)].positive).items():
                if len(counted):
                    held = int(counted["right"].sum())
                    low, high = wilson(held, len(counted), CONFIDENCE)
                    row = {"verdict": verdict, "about": about, "metric": metric, "value": held / len(counted)}
                    found.append(row | {"low": low, "high": high, "n": len(counted)})
    return pd.DataFrame(found, columns=["verdict", "about", "metric", "value", "low", "high", "n"])


def _metrics(rows: pd.DataFrame, positive: str | None) -> Mapping[str, pd.DataFrame]:
    if positive is None:
        return {"accuracy": rows}
    return {
        "precision": rows[rows["said"] == positive],
        "recall": rows[rows["truth"] == positive],
        "accuracy": rows,
    }


def confusion(rows: pd.DataFrame, verdict: str, half: str = SCORED) -> pd.DataFrame:
    """How often each thing was said where each was true: a row per truth, a column per thing said."""
    of = rows[(rows["verdict"] == verdict) & (rows["half"] == half)]
    return pd.crosstab(of["truth"], of["said"])


# ---- what is asked

USED, NOT_USED = "used", "not used"
THERE, NOT_THERE = "there", "not there"
FOLLOWS, DOES_NOT_FOLLOW = "follows", "does not follow"


def _mechanism_used(asked: Asked) -> Iterator[tuple[str, str, str]]:
    answer = asked.known.answer
    for name, verdict in asked.mechanisms.items():
        if answer.mechanisms.get(name) == USED or name in answer.unused:
            said = USED if verdict == USED else NOT_USED
            yield name, said, NOT_USED if name in answer.unused else USED


def _mechanism_there(asked: Asked) -> Iterator[tuple[str, str, str]]:
    for name, verdict in asked.mechanisms.items():
        if name in asked.known.answer.mechanisms:
            said, truth = (v if v == "nothing" else THERE for v in (verdict, asked.known.answer.mechanisms[name]))
            yield name, said.replace("nothing", NOT_THERE), truth.replace("nothing", NOT_THERE)


def _erasure(asked: Asked) -> Iterator[tuple[str, str, str]]:
    known, used = asked.known, asked.position_in_stream
    if used is not None:
        rows = erase_position(
            known.model, known.tokens, [asked.site], scored=known.scored, concepts=["position"], n_bootstrap=500
        )
        yield asked.site, position_used(rows)["verdict"].iloc[0], USED if used else NOT_USED


def _patching(asked: Asked) -> Iterator[tuple[str, str, str]]:
    """With the greatest of the default shifts, which alone decides; random subspaces do not."""
    known, used = asked.known, asked.position_in_stream
    if used is not None:
        rows = patch_position(
            known.model, known.tokens, asked.site, shifts=(4,), scored=known.scored, n_random=1, n_bootstrap=500
        )
        yield asked.site, patched_position_used(rows)["verdict"].iloc[0], USED if used else NOT_USED


def _steering(asked: Asked) -> Iterator[tuple[str, str, str]]:
    known = asked.known
    if known.answer.follows:
        rows = attention_follows(steer_position(known.model, known.tokens, asked.site, n_bootstrap=500))
        said = rows.set_index(["layer", "head"])["verdict"]
        for (layer, head), follows in known.answer.follows.items():
            yield f"head {layer}.{head}", said[layer, head], FOLLOWS if follows else DOES_NOT_FOLLOW


def _labels(asked: Asked) -> Iterator[tuple[str, str, str]]:
    for (layer, head), label in asked.known.answer.heads.items():
        yield f"head {layer}.{head}", asked.heads["label"][layer, head], label


def _uses(asked: Asked) -> Iterator[tuple[str, str, str]]:
    for (layer, head), use in asked.known.answer.used_for.items():
        yield f"head {layer}.{head}", asked.heads["used_for"][layer, head], use


def _templates(asked: Asked) -> Iterator[tuple[str, str, str]]:
    known = asked.known
    if known.answer.templates:
        rows = compare_templates(trace(known.model, known.tokens, [PATTERN]), nulls=False, n_bootstrap=1)
        for (layer, head), template in known.answer.templates.items():
            of = rows[(rows["layer"] == layer) & (rows["head"] == head)].set_index("template")["value"]
            said = template if of[template] <= of.min() + TIE else str(of.idxmin())
            yield f"head {layer}.{head}", said, template


def _split(asked: Asked) -> Iterator[tuple[str, str, str]]:
    known = asked.known
    if known.answer.split:
        rows = split_scores(trace(known.model, known.tokens, [SCORES]), n_bootstrap=1).rows
        rows = rows[(rows["scope"] == "seen") & (rows["metric"] == "share")]
        shares = rows.set_index(["layer", "head", "part"])["value"]
        for (layer, head), parts in known.answer.split.items():
            for part, share in parts.items():
                near = abs(float(shares[layer, head, part]) - share) <= SHARE
                yield part, "right" if near else f"{shares[layer, head, part]:.3f} for {share:.3f}", "right"


#: By name: what the toolkit is asked of every known model.
VERDICTS: dict[str, Verdict] = {
    "mechanism_used": Verdict("name_mechanism says that the model uses a mechanism.", USED, _mechanism_used),
    "mechanism_there": Verdict("name_mechanism says that a mechanism is there, used or not.", THERE, _mechanism_there),
    "erasure_used": Verdict("position_used says that the model uses the position that is erased.", USED, _erasure),
    "patching_used": Verdict(
        "patched_position_used says that the model uses the position that is exchanged.", USED, _patching
    ),
    "steering_follows": Verdict(
        "attention_follows says that a head's attention follows the position that is moved.", FOLLOWS, _steering
    ),
    "used_for": Verdict("The census says what a head is used for.", None, _uses),
    "head_label": Verdict("The census names a head.", None, _labels),
    "nearest_template": Verdict("The template that is nearest to a head's pattern.", None, _templates),
    "split_share": Verdict("The shares of the variance of scores within rows.", None, _split),
}
