"""By which mechanism a model without position encoding knows position: interventions, evidence, verdicts."""

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from probe.config import check_number, check_size
from probe.errors import ProbeError
from probe.models.anatomy import layers_of
from probe.models.protocol import ATTENTION
from probe.position.mechanism.evidence import VERDICTS, Evidence, Rows
from probe.position.mechanism.findings import MECHANISMS
from probe.position.mechanism.interventions import NORMAL
from probe.position.mechanism.readout import Readout
from probe.position.mechanism.use import Use
from probe.position.probes.scores import Draws
from probe.position.setting import Part, Setting
from probe.sequences import TokenIds, token_ids
from probe.statistics import N_BOOTSTRAP
from probe.tracing import EMBED

MECHANISM_LENGTH = 8  #: the fewest tokens in a sequence of which ``name_mechanism`` says anything
MECHANISM_SEQUENCES = 10  #: the fewest distinct sequences
COLUMNS = ["mechanism", "verdict", "intervention", "site", "metric", "value", "low", "high", "n"]


def name_mechanism(
    model: nn.Module,
    tokens: TokenIds,
    *,
    site: str | None = None,
    scored: Bool[Tensor, "batch scored_pos"] | None = None,
    test_share: float = 0.4,
    n_bootstrap: int = N_BOOTSTRAP,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """By which mechanism position can be read in a model, and which of them its predictions use.

    A ridge probe for the position is fitted on normal sequences at ``site``; how well it does on other sequences under
    each of ``INTERVENTIONS`` (position 0 is left out) is the evidence, the rows of mechanism "position":

    - "r2", "mean_absolute_error" (tokens), "shift" (the mean of decoded - true, tokens), "slope" (of decoded on true):
      whether what the probe found is still there;
    - "r2_refitted": the R² of a probe that was fitted under the intervention, whether anything is.

    A mechanism is "available" if

    - position: R², normal or refitted on random content without ``<bos>``, is at least READABLE, and LOST of it is gone
      at the token embedding;
    - bos_counter (Kazemnejad et al. 2023, Theorem 1: attention to ``<bos>`` falls as 1/t): LOST of the R² is gone
      without ``<bos>``; a second ``<bos>``, and doubled odds of the first in all heads, shift the decoded position back
      by SHIFTED of the mean position (1/2 if exact); from a moved ``<bos>`` on it is not behind by half of the move (as
      a distance to ``<bos>`` would be); and in the layer where doubled odds do most the log-odds of the first key have,
      in some head, a slope within COUNTS of -1 over the log of the number of other keys;
    - variance_decay (Chi et al. 2023): on random content without ``<bos>``, the variance of layer 0's attention output
      falls with an exponent whose interval lies above DECAYS, and from the norm of that output at one token alone
      ln(t) is read with an R² of READABLE;
    - neighbour_similarity (Zuo et al. 2025): on such content hidden states behind layer 0 are the more alike the nearer
      (Spearman's correlation above ALIKE), position can be read at ``site``, and LOST of that R² is gone where
      neighbours are strangers: states of the same positions out of other sequences;
    - attention_sink: a head has SINK of its attention on the first key with log-odds that do not count (slope above
      FLAT), and LOST of the R² is gone where its layer's sinks are cut off;
    - encoding: position can be read from one token repeated without ``<bos>``, as only an encoding makes possible, or
      the encoding acts;

    else "nothing". An available one is "used" if, in addition, the loss (nats a scored token) is below that of the best
    prediction that never changes, token frequencies ("loss_gain", which an untrained model has not); and if what
    disturbs it in one layer's attention output (odds doubled in the layer that counts, content that fluctuates as at
    half the position, strangers, sinks cut) moves the decoded position by MOVED of the mean one and more than controls
    do, costs more loss than each of CONTROLS controls, with an interval of the difference above 0, and costs WORTH of
    the gain. Doubled odds and cut sinks disturb by their mean over sequences at each position, so that content is held.
    Their controls are as many standard deviations long in other directions that the attention output takes; those of
    fluctuating content turn what a sequence adds to the mean towards what another one adds, as far as is as large a
    change; those of strangers are whole other sequences. An encoding is used if the loss rises by WORTH of the gain,
    with an interval above 0, where all tokens stand at the middle position; it acts, and so is there, if ACTS of the
    states' squares move then. Only a ``Decoder`` can be asked. "position" is used if it is there and one of the others
    is used.

    How often these verdicts are true is measured on models whose answer is known: ``probe.benchmark``.

    "nothing" means: not established on these sequences. What is used may be used through another mechanism.

    Args:
        model: any model whose layers all have attention.
        tokens: sequences of one length, without padding; those that occur twice count once.
        site: where position is decoded; by default the last ``hook_resid_post`` at which a ridge probe reads it as well
            as at the best one, to .02 of R², chosen on some of the sequences that probes are fitted to.
        scored: which tokens' predictions count in the loss (a task's completions); all but the first by default.
        test_share: the share of the sequences that all numbers are measured on; the others fit the probes.

    Returns:
        Columns mechanism, verdict, intervention, site, metric, value, low, high, n (sequences): the numbers that each
        verdict rests on, with bootstrap intervals over sequences. ``mechanism_table`` makes them short.

    Raises:
        ProbeError: for fewer than 10 distinct sequences, sequences of fewer than 8 tokens, a site that the model has
            not or that holds no hidden states, hidden states that are not finite, ``scored`` of another shape, or a
            model with layers that mix tokens by something else than attention.
    """
    ids = token_ids(tokens).cpu()
    if ids.shape[1] < MECHANISM_LENGTH:
        raise ProbeError(
            f"name_mechanism needs sequences of at least {MECHANISM_LENGTH} tokens, got shape {tuple(ids.shape)}"
        )
    check_number("test_share", test_share, 0, 1)
    check_size("batch_size", batch_size, least=2)
    part = Part.distinct(ids, None, scored)
    n = len(part)
    if n < MECHANISM_SEQUENCES:
        raise ProbeError(f"name_mechanism needs at least {MECHANISM_SEQUENCES} distinct sequences, got {n}")
    part = part[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    n_held_out = min(max(3, round(test_share * n)), n - 3)
    draws = Draws.of(n_held_out, n_bootstrap, confidence, seed)
    without = [i for i, layer in enumerate(layers_of(model)) if layer.kind != ATTENTION]
    if without:
        raise ProbeError(
            "name_mechanism needs layers that mix tokens by attention alone, since it edits patterns, but layers "
            f"{without} are of other kinds"
        )
    setting = Setting(model, part[: n - n_held_out], part[n - n_held_out :], batch_size)
    readout = Readout(setting, site, draws, seed)
    use = Use(readout)
    found: dict[str, tuple[str, Rows]] = {}
    for name, find in MECHANISMS.items():
        evidence = Evidence(draws, [])
        available, used = find(readout, evidence)
        verdict = VERDICTS[available]
        if name == "position" or (available and used is not None):
            gains = evidence.add("loss_gain", use.gain)["low"] > 0
        if available and used is not None and gains and used(use, evidence):
            verdict = "used"
        found[name] = verdict, evidence.rows
    there = found["position"][0] != "nothing"
    if there and any(verdict == "used" for verdict, _ in found.values()):
        found["position"] = "used", found["position"][1]
    rows = [{"mechanism": name, "verdict": verdict} | row for name, (verdict, rows) in found.items() for row in rows]
    return pd.DataFrame(rows)[COLUMNS]


def mechanism_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``name_mechanism`` as a table for people: mechanism, verdict, and the evidence in words."""
    of = rows[(rows["mechanism"] != "position") | ((rows["metric"] == "r2") & (rows["intervention"] == NORMAL))]
    words = of["metric"].str.replace("_", " ") + of["intervention"].map(lambda i: "" if i == NORMAL else f" ({i})")
    words = words + of["site"].map(lambda site: " at the embedding" if site == EMBED else "")
    told = words + " " + of["value"].map("{:.3g}".format)
    table = of.assign(evidence=told).groupby(["mechanism", "verdict"], sort=False)["evidence"].agg("; ".join)
    return table.reset_index()
