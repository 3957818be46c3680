"""Training in which a variable is enforced: an interchange of it, and of nothing else, changes what must be answered.

A model that is trained for its answers alone may come to them in any way. Here every step runs a base sequence and a
source sequence, and asks three times (Geiger et al. 2022; Gupta et al. 2024, InterpBench, whose strictness is the
third):

- the base as it is: the answer of the base;
- the base with the variable of the source: the answer that the variable of the source gives with all else of the base;
- the base with all else of the source, and its own variable: the other way round.

Tokens are independent and uniform, so no content tells where it stands, and the variable is the only way to the answer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from constructions.known.drawing import FIRST, LENGTH, Draw
from constructions.known.plan import Plan
from probe.errors import ProbeError
from probe.models.config import DecoderConfig
from probe.models.decoder import Decoder, Hook
from probe.tracing import block_site

N_PAIRS = 16  # of a base and a source in a step
STEPS = 250  # of a round
ROUNDS = 16  # at most
LEARNING_RATE = 3e-3
ENFORCED = 0.98  #: the share of right answers, of each of the three kinds, that ends the training
NO_ANSWER = -1  # of rows that nothing is asked of
SUBSPACE = 8  # dimensions of the stream that hold the variable

SITE = block_site(1, "hook_resid_pre")  #: where a variable of the stream stands: what layer 0 hands on

Content = Int[Tensor, "pair pos"]  #: 0-based content tokens


@dataclass(frozen=True)
class Asked:
    """What is run, and what must be answered."""

    content: Int[Tensor, "row pos"]  #: 0-based content tokens, all kinds of rows one after the other
    hooks: Mapping[str, Hook]  #: they exchange what is exchanged
    answers: Int[Tensor, "kind pair pos"]  #: 0-based content tokens, of the first rows: base, variable, all else


class Exercise(ABC):
    """What a model is trained for: which variable, and which answer it gives with each token."""

    def __init__(self, plan: Plan, *, bos: bool, reads: bool):
        self.plan, self.bos, self.reads = plan, bos, reads

    @property
    def first(self) -> int:
        """The first position that an answer is asked of."""
        return int(self.bos)

    def prepare(self, draw: Draw, d_model: int) -> list[nn.Parameter]:
        """Draw the exercise's own parameters; return those that are trained with the model."""
        return []

    def random_content(self, draw: Draw, *shape: int) -> Int[Tensor, "..."]:
        return draw.content(self.plan.n_content, *shape, LENGTH)

    @abstractmethod
    def ask(self, draw: Draw) -> Asked:
        """Draw bases and sources."""

    def further_loss(self) -> Tensor | float:
        """What else is asked, after a run."""
        return 0.0

    def tokens(self, content: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
        ids = content + FIRST
        return torch.cat((torch.zeros_like(ids[:, :1]), ids[:, 1:]), dim=1) if self.bos else ids


class OfStream(Exercise):
    """A variable in a random subspace of the stream behind layer 0: the segment of the plan that the position is in.

    The answer is the token plus the shift of the segment. Where the model must not read the variable, the answer is the
    token plus the first shift whatever is exchanged, and a linear map of the subspace must tell the position, so that
    it is there.
    """

    def prepare(self, draw: Draw, d_model: int) -> list[nn.Parameter]:
        basis, _ = torch.linalg.qr(draw.normal(d_model, SUBSPACE))
        self.basis = basis.float()
        self.readout = nn.Parameter(draw.normal(SUBSPACE).float() / SUBSPACE)
        self.held: Tensor | None = None
        return [] if self.reads else [self.readout]

    def segments(self, content: Content) -> Int[Tensor, "pair pos"]:
        """The value of the variable at every place."""
        seen, after = torch.arange(1, LENGTH + 1), torch.tensor(self.plan.after)
        return (seen[:, None] > after).sum(-1).expand(content.shape)

    def answer(self, content: Content, segments: Int[Tensor, "pair pos"]) -> Int[Tensor, "pair pos"]:
        shifts = torch.tensor(self.plan.shifts)[segments * int(self.reads)]
        return (content + shifts) % self.plan.n_content

    def ask(self, draw: Draw) -> Asked:
        base, source = self.random_content(draw, 2, N_PAIRS)
        # Every place gets what stands at any place of the source.
        place = self.first + draw.content(LENGTH - self.first, N_PAIRS, LENGTH)
        of_base, of_source = self.segments(base), self.segments(source).gather(1, place)

        def exchange(x: Float[Tensor, "row pos d_model"]) -> Tensor:
            own, _, _, other = x.split(N_PAIRS)
            given = other.gather(1, place[..., None].expand(own.shape))
            variable = (given - own) @ self.basis @ self.basis.T
            self.held = own @ self.basis
            asked = torch.stack((own, own + variable, given - variable, other))
            if self.bos:  # which stays <bos>
                asked = torch.cat((x.view(asked.shape)[:, :, :1], asked[:, :, 1:]), dim=2)
            return asked.flatten(0, 1)

        answers = [
            self.answer(base, of_base),
            self.answer(base, of_source),
            self.answer(source.gather(1, place), of_base),
        ]
        return Asked(torch.cat((base, base, base, source)), {SITE: exchange}, self.but_first(torch.stack(answers)))

    def but_first(self, answers: Int[Tensor, "kind pair pos"]) -> Int[Tensor, "kind pair pos"]:
        return torch.where(torch.arange(LENGTH) >= self.first, answers, NO_ANSWER)

    def further_loss(self) -> Tensor | float:
        if self.reads:
            return 0.0
        assert self.held is not None
        position = torch.linspace(-1.7, 1.7, LENGTH)  # of about unit variance
        return (self.held @ self.readout - position)[:, self.first :].square().mean()


class OfShares(OfStream):
    """A variable of content in the same place: whether most tokens so far are of a class. No answer depends on
    position."""

    def prepare(self, draw: Draw, d_model: int) -> list[nn.Parameter]:
        self.members = torch.tensor(draw.distinct(self.plan.n_content // 2, 0, self.plan.n_content - 1))
        return super().prepare(draw, d_model)

    def segments(self, content: Content) -> Int[Tensor, "pair pos"]:
        member = torch.isin(content, self.members).long()
        if self.bos:
            member = torch.cat((torch.zeros_like(member[:, :1]), member[:, 1:]), dim=1)
        seen = torch.arange(1, content.shape[1] + 1) - self.first
        return (2 * member.cumsum(1) > seen).long()


class OfPattern(Exercise):
    """A variable in the pattern of head 0 of layer 0: how far back it looks.

    The answer is the token that stands so many places back, plus a shift. If a row is given the pattern of the row j
    places before it, the answer is the token j places further back, plus the shift. The third time, all else of
    attention (what other heads of layer 0 and all of layer 1 put out) is the source's, and must change nothing. Where
    the model must not read the variable, the answer is the token itself plus the shift, whatever is exchanged.
    """

    def __init__(self, plan: Plan, *, back: int, reads: bool):
        super().__init__(plan, bos=False, reads=reads)
        self.back = back

    def answer(self, content: Content, back: Int[Tensor, "pair"]) -> Int[Tensor, "pair pos"]:
        at = torch.arange(LENGTH) - back[:, None]
        answers = (content.gather(1, at.clamp(min=0)) + self.plan.shifts[0]) % self.plan.n_content
        return torch.where(at >= 0, answers, NO_ANSWER)

    def ask(self, draw: Draw) -> Asked:
        base, source = self.random_content(draw, 2, N_PAIRS)
        further = draw.content(4, N_PAIRS)
        back = torch.full((N_PAIRS,), self.back * int(self.reads))
        place = (torch.arange(LENGTH) - further[:, None]).clamp(min=0)  # the row whose pattern is given

        def give_pattern(pattern: Float[Tensor, "row head query key"]) -> Tensor:
            own, _, again, other = pattern.split(N_PAIRS)
            given = other[:, 0].gather(1, place[..., None].expand(-1, -1, LENGTH))
            exchanged = torch.cat((given[:, None], own[:, 1:]), dim=1)
            if not self.reads:
                again = torch.cat((given[:, None], again[:, 1:]), dim=1)
            return torch.cat((own, exchanged, again, other))

        def give_rest(first: int) -> Hook:
            def give(z: Float[Tensor, "row pos head d_head"]) -> Tensor:
                own, exchanged, again, other = z.split(N_PAIRS)
                given = torch.cat((again[:, :, :first], other[:, :, first:].roll(1, 1)), dim=2)
                return torch.cat((own, exchanged, given, other))

            return give

        hooks = {
            block_site(0, "attn.hook_pattern"): give_pattern,
            block_site(0, "attn.hook_z"): give_rest(1),
            block_site(1, "attn.hook_z"): give_rest(0),
        }
        moved = back + further * int(self.reads)
        answers = [self.answer(base, back), self.answer(base, moved), self.answer(base, back)]
        return Asked(torch.cat((base, base, base, source)), hooks, torch.stack(answers))


def train_enforced(config: DecoderConfig, exercise: Exercise, draw: Draw, enforced: float = ENFORCED) -> Decoder:
    """A decoder in which the variable of an exercise is enforced: of the answers of each of the three kinds at least
    the share ``enforced`` is right, in the last tenth of a round of training.

    Raises:
        ProbeError: where that is not reached in ROUNDS rounds.
    """
    decoder = Decoder(config, seed=draw.integer(0, 2**31)).train()
    parameters = [*decoder.parameters(), *exercise.prepare(draw, config.d_model)]
    right = torch.zeros(3)
    with torch.enable_grad():
        for _ in range(ROUNDS):
            optimizer = torch.optim.Adam(parameters)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
            counted = []
            for step in range(STEPS):
                asked = exercise.ask(draw)
                logits = decoder(exercise.tokens(asked.content), hooks=asked.hooks, attention="explicit")
                loss, right = _loss_and_right(logits, asked.answers, exercise.plan.noise)
                loss = loss + exercise.further_loss()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                if step >= 0.9 * (STEPS - 1):
                    counted.append(right)
            right = torch.stack(counted).mean(0)
            if right.min() >= enforced:
                return decoder.requires_grad_(False).eval()
    got = ", ".join(f"{share:.3f}" for share in right.tolist())
    raise ProbeError(f"{enforced} of the answers of each kind must be right after {ROUNDS * STEPS} steps, got {got}")


def _loss_and_right(
    logits: Float[Tensor, "row pos d_vocab"], answers: Int[Tensor, "kind pair pos"], noise: float
) -> tuple[Tensor, Float[Tensor, "kind"]]:
    """The cross entropy of answers that are a random token with the probability ``noise``, and how many are right."""
    asked = answers >= 0
    given = logits[: answers.shape[0] * answers.shape[1]].view(*answers.shape, -1)
    loss = F.cross_entropy(given[asked], answers[asked] + FIRST, label_smoothing=noise)
    right = ((given.detach().argmax(-1) == answers + FIRST) & asked).flatten(1).sum(1) / asked.flatten(1).sum(1)
    return loss, right
