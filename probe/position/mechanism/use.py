"""What the model loses when position is disturbed, beside what as large a change costs that leaves position alone."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from probe.losses import sequence_losses
from probe.position.geometry.variance import ATTENTION_OUT
from probe.position.mechanism.evidence import CONTROLS, MOVED, WORTH, Disturbance, Evidence
from probe.position.mechanism.readout import Readout, token_rows
from probe.tracing import block_site, logits_with_edits


class Use:
    """What the model loses when position is disturbed, beside what as large a change costs that does not."""

    def __init__(self, readout: Readout):
        self.readout = readout
        self.counted = readout.held_out.scored[:, 1:].sum(1).double()
        value, logits = readout.run(readout.held_out.tokens, {}, readout.site)
        self.decoded, self.loss = self._decoded(value), self._losses(logits)
        self.gain = self._mean(self._by_frequency() - self.loss)

    def _decoded(self, value: Float[Tensor, "batch pos d_model"]) -> Float64[Tensor, "batch scored_pos"]:
        x, _ = token_rows(value[:, 1:])
        return self.readout.probe.predict(x).view(len(value), -1)

    def _losses(self, logits: list[Tensor]) -> Float64[Tensor, "sequence"]:
        """The cross entropy of each sequence's scored tokens, summed, in nats."""
        sizes = [len(each) for each in logits]
        held_out = self.readout.held_out
        batches = (each.split(sizes) for each in (held_out.tokens, held_out.scored))
        return torch.cat([sequence_losses(*each) for each in zip(logits, *batches, strict=True)])

    def _by_frequency(self) -> Float64[Tensor, "sequence"]:
        """The same for the best of all predictions that never change: how often each token is scored there."""
        tokens, scored = self.readout.held_out.tokens[:, 1:], self.readout.held_out.scored[:, 1:]
        seen = tokens[scored].bincount(minlength=int(tokens.max()) + 1).double()
        return -(torch.xlogy(scored.double(), (seen / seen.sum())[tokens])).sum(1)

    def _mean(self, by_sequence: Float64[Tensor, "sequence"]) -> Float64[Tensor, "draw"]:
        """Nats a scored token, on every draw."""
        times = self.readout.draws.sequences
        return (times @ by_sequence) / (times @ self.counted)

    def _changed(
        self, layer: int, delta: Tensor
    ) -> tuple[Float64[Tensor, "sequence"], Float64[Tensor, "sequence token"]]:
        """By sequence, the change of the loss; by token, that of the decoded position."""
        site = block_site(layer, ATTENTION_OUT)
        value, logits = self.readout.run(
            self.readout.held_out.tokens, lambda rows: {site: lambda x: x + delta[rows].to(x)}, self.readout.site
        )
        return self._losses(logits) - self.loss, self._decoded(value) - self.decoded

    def of(self, disturbance: Disturbance, evidence: Evidence) -> bool:
        generator = torch.Generator().manual_seed(self.readout.seed)
        layer = disturbance.layer
        where = {"intervention": "disturbed", "site": block_site(layer, ATTENTION_OUT)}

        def moved(by: Float64[Tensor, "sequence token"]) -> Float64[Tensor, "draw"]:
            if not disturbance.pretends:
                by = by.abs()
            times = self.readout.draws.sequences
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
            shift["value"] >= MOVED * self.readout.mean_position
            and shift["low"] > other["high"]
            and beyond["low"] > 0
            and exceeded["value"] == 1
            and cost["value"] >= WORTH * float(self.gain[0])
        )

    def without(self, still: nn.Module, evidence: Evidence) -> bool:
        """Whether a model in which every token stands at the same position is worse by what a use must be worth."""
        where = {"intervention": "standing_still"}
        batches = self.readout.held_out.tokens.split(self.readout.setting.batch_size)
        change = self._losses([logits_with_edits(still, batch) for batch in batches]) - self.loss
        cost = evidence.add("loss_change", self._mean(change), **where)
        return cost["low"] > 0 and cost["value"] >= WORTH * float(self.gain[0])
