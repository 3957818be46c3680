"""By which mechanism a model without position encoding knows position: interventions, evidence, verdicts."""

import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from probe.config import check_number, check_size
from probe.errors import ProbeError
from probe.position.evidence import CONTROLS, MECHANISMS, MOVED, VERDICTS, WORTH, Disturbance, Evidence, Rows
from probe.position.geometry import ATTENTION_OUT
from probe.position.interventions import NORMAL
from probe.position.scores import Draws
from probe.position.subject import Subject, token_rows
from probe.sequences import Sequences, TokenIds, first_of_each, marked
from probe.tracing import EMBED, block_site, sequence_losses

MECHANISM_LENGTH = 8  #: the fewest tokens in a sequence of which ``name_mechanism`` says anything
COLUMNS = ["mechanism", "verdict", "intervention", "site", "metric", "value", "low", "high", "n"]


class _Use:
    """What the model loses when position is disturbed, beside what as large a change costs that does not."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.counted = subject.scored["test"][:, 1:].sum(1).double()
        value, logits = subject.run(subject.test, lambda rows: {}, subject.site)
        self.decoded, self.loss = self._decoded(value), self._losses(logits)
        self.gain = self._mean(self._by_frequency() - self.loss)

    def _decoded(self, value: Float[Tensor, "batch pos d_model"]) -> Float64[Tensor, "batch scored_pos"]:
        x, _ = token_rows(value[:, 1:])
        return torch.from_numpy(self.subject.probe.predict(x)).view(len(value), -1)

    def _losses(self, logits: list[Tensor]) -> Float64[Tensor, "sequence"]:
        """The cross entropy of each sequence's scored tokens, summed, in nats."""
        sizes = [len(each) for each in logits]
        batches = (each.split(sizes) for each in (self.subject.test, self.subject.scored["test"]))
        return torch.cat([sequence_losses(*each) for each in zip(logits, *batches, strict=True)])

    def _by_frequency(self) -> Float64[Tensor, "sequence"]:
        """The same for the best of all predictions that never change: how often each token is scored there."""
        tokens, scored = self.subject.test[:, 1:], self.subject.scored["test"][:, 1:]
        seen = tokens[scored].bincount(minlength=int(tokens.max()) + 1).double()
        return -(torch.xlogy(scored.double(), (seen / seen.sum())[tokens])).sum(1)

    def _mean(self, by_sequence: Float64[Tensor, "sequence"]) -> Float64[Tensor, "draw"]:
        """Nats a scored token, on every draw."""
        times = self.subject.draws.sequences
        return (times @ by_sequence) / (times @ self.counted)

    def _changed(
        self, layer: int, delta: Tensor
    ) -> tuple[Float64[Tensor, "sequence"], Float64[Tensor, "sequence token"]]:
        """By sequence, the change of the loss; by token, that of the decoded position."""
        site = block_site(layer, ATTENTION_OUT)
        value, logits = self.subject.run(
            self.subject.test, lambda rows: {site: lambda x: x + delta[rows].to(x)}, self.subject.site
        )
        return self._losses(logits) - self.loss, self._decoded(value) - self.decoded

    def of(self, disturbance: Disturbance, evidence: Evidence) -> bool:
        generator = torch.Generator().manual_seed(self.subject.seed)
        layer = disturbance.layer
        where = {"intervention": "disturbed", "site": block_site(layer, ATTENTION_OUT)}

        def moved(by: Float64[Tensor, "sequence token"]) -> Float64[Tensor, "draw"]:
            if not disturbance.pretends:
                by = by.abs()
            times = self.subject.draws.sequences
            return ((times @ by.mean(1)) / times.sum(1)).abs()

        change, by = self._changed(layer, disturbance.delta)
        controls = [self._changed(layer, disturbance.control(generator)) for _ in range(CONTROLS)]
        mean = torch.stack([loss for loss, _ in controls]).mean(0)
        cost = evidence.add("loss_change", self._mean(change), **where)
        evidence.add("loss_change_control", self._mean(mean), **where)
        beyond = evidence.add("loss_beyond_control", self._mean(change - mean), **where)
        below = torch.stack([self._mean(change) > self._mean(loss) for loss, _ in controls]).double()
        exceeded = evidence.add("controls_exceeded", below.mean(0), **where)
        shift = evidence.add("decoded_moved", moved(by), **where)
        others = torch.stack([moved(each) for _, each in controls]).mean(0)
        other = evidence.add("decoded_moved_control", others, **where)
        return (
            shift["value"] >= MOVED * self.subject.mean_position
            and shift["low"] > other["high"]
            and beyond["low"] > 0
            and exceeded["value"] == 1
            and cost["value"] >= WORTH * float(self.gain[0])
        )


def name_mechanism(
    model: nn.Module,
    tokens: TokenIds,
    *,
    site: str | None = None,
    scored: Bool[Tensor, "batch scored_pos"] | None = None,
    test_share: float = 0.4,
    n_bootstrap: int = 200,
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
    - encoding: position can be read from one token repeated without ``<bos>``, as only an encoding makes possible;

    else "nothing". An available one is "used" if, in addition, the loss (nats a scored token) is below that of the best
    prediction that never changes, token frequencies ("loss_gain", which an untrained model has not); and if what
    disturbs it in one layer's attention output (odds doubled in the layer that counts, content that fluctuates as at
    half the position, strangers, sinks cut) moves the decoded position by MOVED of the mean one and more than controls
    do, costs more loss than CONTROLS changes of equal size at every token, each of them, with an interval of the
    difference above 0, and costs WORTH of the gain. The controls go in directions that the disturbance does not take;
    for strangers they are whole other sequences. Of an encoding it is not asked. "position" is used if one of the
    others is.

    "nothing" means: not established on these sequences. What is used may be used through another mechanism.

    Args:
        model: a ``Decoder`` or a ``TransformerBridge``.
        tokens: sequences of one length, without padding; those that occur twice count once.
        site: where position is decoded; by default the last ``hook_resid_post``.
        scored: which tokens' predictions count in the loss (a task's completions); all but the first by default.
        test_share: the share of the sequences that all numbers are measured on; the others fit the probes.

    Returns:
        Columns mechanism, verdict, intervention, site, metric, value, low, high, n (sequences): the numbers that each
        verdict rests on, with percentile intervals over sequences. ``mechanism_table`` makes them short.

    Raises:
        ProbeError: for fewer than 10 distinct sequences, sequences of fewer than 8 tokens, a site that the model has
            not or that holds no hidden states, hidden states that are not finite, or ``scored`` of another shape.
    """
    ids = Sequences.of(tokens).tokens
    if ids.shape[1] < MECHANISM_LENGTH:
        raise ProbeError(
            f"name_mechanism needs sequences of at least {MECHANISM_LENGTH} tokens, got shape {tuple(ids.shape)}"
        )
    counted = marked("scored", scored, ids)
    check_number("test_share", test_share, 0, 1)
    check_size("batch_size", batch_size, least=2)
    kept = first_of_each(ids, None, counted)
    if len(kept) < 10:
        raise ProbeError(f"name_mechanism needs at least 10 distinct sequences, got {len(kept)}")
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    draws = Draws.of(min(max(3, round(test_share * len(kept))), len(kept) - 3), n_bootstrap, confidence, seed)
    subject = Subject(model, ids[kept], site, counted[kept], draws, seed, batch_size)
    use = _Use(subject)
    found: dict[str, tuple[str, Rows]] = {}
    for name, find in MECHANISMS.items():
        evidence = Evidence(draws, [])
        available, disturb = find(subject, evidence)
        verdict = VERDICTS[available]
        if name == "position" or (available and disturb is not None):
            gains = evidence.add("loss_gain", use.gain)["low"] > 0
        if available and disturb is not None and gains and use.of(disturb(), evidence):
            verdict = "used"
        found[name] = verdict, evidence.rows
    if any(verdict == "used" for verdict, _ in found.values()):
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
