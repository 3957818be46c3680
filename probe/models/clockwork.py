"""The clockwork RNN: a recurrent language model whose hidden units are updated by the clock, each module at its own
period. It is what rotary's frequencies are to attention, in a recurrence.

Koutník, Greff, Gomez and Schmidhuber 2014, *A Clockwork RNN*, section 3. The hidden layer of a simple recurrent network

    y_H(t) = f_H(W_H y_H(t-1) + W_I x(t)),    y_O(t) = f_O(W_O y_H(t))    (Eq. 1 and 2, without biases)

is cut into g modules of equal size with the periods T_1 ≤ … ≤ T_g. W_H and W_I are cut into block-rows accordingly
(Eq. 3), and at time t only those of the modules with t mod T_i = 0 are used (Eq. 4); the other modules keep their
state. Block-row i of W_H is {0_1, …, 0_{i-1}, W_{i,i}, …, W_{i,g}}: a module reads itself and those behind it, which
are slower, never a faster one. Here f_H is tanh with a bias, f_O the softmax, x(t) the embedding of the token at
position t, and, in a stack, the hidden state of the layer below.

Two things the paper leaves open: time is the position, from 0, so that at t = 0 every module runs (from a state of 0);
and of two modules with equal periods the first in the order reads the second.

The clock alone tells the position, before anything is learned, where all sequences begin alike: until T_i a module
holds what it made of ``<bos>``, so that a linear map reads off t < T_i. These steps, at 1, 2, 4, …, explain 92 % of the
variance of 40 positions. Of random tokens behind one ``<bos>`` an untrained network (8 modules of 16 units, means over
8 seeds) tells the position with an R² of 0.93; with all periods 1 it is 0.16; without ``<bos>`` 0.30 and 0.02.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from probe.config import FILL, Filled, check_flag, check_number, check_size, from_mapping
from probe.errors import ProbeError, unknown_name
from probe.models.checks import check_call
from probe.models.config import MOST, SITES
from probe.models.layers import Hook, Hooks
from probe.models.protocol import RECURRENCE, Anatomy, Layer, Visit
from probe.models.undrawn import undrawn
from probe.sequences import TokenIds

# Under a Decoder's names, both "batch pos d_model": what a layer reads, and its hidden state at every step.
LAYER_SITES = ("hook_resid_pre", "hook_resid_post")

MOST_MODULES = 1024
MOST_PERIOD = 2**63  # tokens: longer than any sequence


@dataclass(frozen=True)
class ClockworkConfig:
    """Everything that fixes a clockwork RNN's shape. Validated when made; JSON there and back.

    ``periods`` are in tokens, one a module, in ascending order; None stands for the paper's 1, 2, 4, … 2^(n_modules-1).
    With all of them 1 it is a simple recurrent network with a block upper triangular W_H.
    """

    d_vocab: int  #: token ids
    d_model: int  #: hidden units of a layer, divisible by n_modules
    n_modules: int  #: modules of a layer
    periods: Filled[tuple[int, ...]] = FILL
    n_layers: int = 1  #: layers, each reading the hidden states of the one below
    tie_embeddings: bool = False  #: whether the head is the token embedding
    dropout: float = 0.0  #: share of the numbers that training sets to 0, behind embedding and layers

    KIND = "clockwork"  # under "model" in its JSON, which a decoder's has not

    def __post_init__(self) -> None:
        for name in ("d_vocab", "d_model", "n_modules", "n_layers"):
            check_size(name, getattr(self, name), most=MOST.get(name, MOST_MODULES))
        if self.d_model % self.n_modules:
            raise ProbeError(f"d_model ({self.d_model}) must be divisible by n_modules ({self.n_modules})")
        periods = self.periods
        if periods is None:
            periods = tuple(2**i for i in range(self.n_modules))
        if not isinstance(periods, Sequence) or len(periods) != self.n_modules:
            raise ProbeError(f"periods must be {self.n_modules} numbers, one a module, got {periods!r}")
        for period in periods:
            check_size("periods", period, most=MOST_PERIOD)
        if list(periods) != sorted(periods):
            raise ProbeError(f"periods must be in ascending order, got {tuple(periods)}")
        object.__setattr__(self, "periods", tuple(periods))  # the dataclass is frozen
        check_number("dropout", self.dropout, 0, 1, closed=True)
        check_flag("tie_embeddings", self.tie_embeddings)

    @property
    def d_module(self) -> int:
        """The hidden units of a module."""
        return self.d_model // self.n_modules

    def sites(self) -> list[str]:
        """All site names of such a model, in the order in which they are computed."""
        return [*SITES, *(f"blocks.{layer}.{site}" for layer in range(self.n_layers) for site in LAYER_SITES)]

    def to_json(self) -> str:
        """What stands in a checkpoint's ``config.json``."""
        return json.dumps({"model": self.KIND} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClockworkConfig":
        """A config from its JSON object; unknown and missing keys are refused."""
        fields = dict(values)
        if (kind := fields.pop("model", cls.KIND)) != cls.KIND:
            raise unknown_name("kind of model", kind, [cls.KIND])
        return from_mapping(cls, fields, "a clockwork RNN's config")


class StateCache:
    """Each layer's hidden state after the positions seen so far, "batch d_model": all that a recurrence remembers."""

    def __init__(self) -> None:
        self.length = 0
        self.states: dict[int, Tensor] = {}

    def keep(self, rows: Tensor) -> None:
        """Keep only those sequences of the batch (a mask or indices)."""
        self.states = {layer: state[rows] for layer, state in self.states.items()}


@dataclass(frozen=True)
class Tick:
    """Which units run at a time: none behind the first ``n_units``, and of these not the ``resting`` ones.

    Where every period divides the next, as the paper's do, the modules that run are the first so many: none rests among
    them, and exactly what is needed is computed.
    """

    n_units: int
    resting: Bool[Tensor, "unit"] | None

    @classmethod
    def at(cls, time: int, config: ClockworkConfig, device: torch.device) -> "Tick":
        runs = [time % period == 0 for period in config.periods]
        n_modules = max((i + 1 for i, running in enumerate(runs) if running), default=0)
        resting = None
        if not all(runs[:n_modules]):
            resting = ~torch.tensor(runs[:n_modules], device=device).repeat_interleave(config.d_module)
        return cls(n_modules * config.d_module, resting)


class ClockworkLayer(nn.Module):
    """One hidden layer: h_t = tanh(W_H h_{t-1} + W_I x_t + b) in the units that run at t, h_{t-1} in the others."""

    def __init__(self, config: ClockworkConfig):
        super().__init__()
        d = config.d_model
        self.d_module = config.d_module
        self.W_I, self.W_H, self.b = (nn.Parameter(torch.empty(*shape)) for shape in ((d, d), (d, d), (d,)))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Each row of W_I and W_H N(0, 1/n), n the number of units that it reads; b = 0."""
        nn.init.normal_(self.W_I, std=self.W_I.shape[1] ** -0.5, generator=generator)
        read = self.reads()
        nn.init.normal_(self.W_H, generator=generator).mul_(read / read.sum(1, keepdim=True).to(self.W_H).sqrt())
        nn.init.zeros_(self.b)

    def reads(self) -> Bool[Tensor, "unit read_unit"]:
        """Block upper triangular: True where a unit reads another. The rest of W_H is 0, and nothing is learned there:
        the gradient is 0, too."""
        module = torch.arange(len(self.b), device=self.b.device) // self.d_module
        return module[:, None] <= module

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        ticks: Sequence[Tick],
        state: Float[Tensor, "batch d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The hidden state at every step, from ``state`` (0 at the start) on."""
        W_H = self.W_H * self.reads()
        # One slice for all steps with as many units, lest the gradient of each be padded to all of W_H.
        rows = {tick.n_units: W_H[: tick.n_units].T for tick in ticks}
        inputs = F.linear(x, self.W_I, self.b).unbind(1)
        h = torch.zeros_like(inputs[0]) if state is None else state
        states = []
        for from_input, tick in zip(inputs, ticks, strict=True):
            n = tick.n_units
            if n:
                new = torch.tanh(torch.addmm(from_input[:, :n], h, rows[n]))
                if tick.resting is not None:
                    new = torch.where(tick.resting, h[:, :n], new)
                h = new if n == h.shape[1] else torch.cat((new, h[:, n:]), dim=1)
            states.append(h)
        return torch.stack(states, dim=1)


class ClockworkRNN(nn.Module):
    """A causal language model without attention, called as a ``Decoder`` is: ``model(tokens) -> logits``."""

    def __init__(self, config: ClockworkConfig, seed: int | None = 0, device: str = "cpu"):
        """A model with freshly drawn weights; ``seed=None`` leaves them undrawn, any numbers, to be written over.

        The weights are a function of the seed: torch's global generator is neither read nor moved. On the ``device``
        "meta" undrawn weights have no memory yet.
        """
        super().__init__()
        self.config = config
        with undrawn():
            self.token_embedding = nn.Embedding(config.d_vocab, config.d_model)
            self.dropout = nn.Dropout(config.dropout)
            layers = nn.ModuleList(ClockworkLayer(config) for _ in range(config.n_layers))
            self.layers = cast("Sequence[ClockworkLayer]", layers)  # torch's list does not say of what it is
            self.head = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.to(torch.float32).to_empty(device=device)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        if seed is not None:
            self.reset_parameters(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights: those of the layers as they say, the head N(0, 1/d_model), embeddings N(0, 1)
        (N(0, 1/d_model) where the head is tied to them)."""
        std = self.config.d_model**-0.5
        for layer in self.layers:
            layer.reset_parameters(generator)
        nn.init.normal_(self.head.weight, std=std, generator=generator)
        embedding_std = std if self.config.tie_embeddings else 1.0
        nn.init.normal_(self.token_embedding.weight, std=embedding_std, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return self.token_embedding.weight.dtype

    @property
    def owner(self) -> "ClockworkRNN":
        """The model itself, which holds its config and weights."""
        return self

    @property
    def anatomy(self) -> Anatomy:
        """Its layers, sizes and sites, as its config says."""
        config = self.config
        layers = (Layer(RECURRENCE, "recurrence"),) * config.n_layers
        return Anatomy(layers, config.d_model, config.d_vocab, None, tuple(config.sites()))

    def run(
        self, tokens: Int[Tensor, "batch pos"], hooks: Mapping[str, Hook], *, explicit: bool = False
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """See ``probe.models.protocol.Model.run``."""
        return self(tokens.to(self.device), hooks=hooks)

    def attention_inputs(self, tokens: Int[Tensor, "batch pos"], visit: Visit, layers: Sequence[int]) -> None:
        """Refuse: a recurrent model has no attention.

        Raises:
            ProbeError: always.
        """
        raise ProbeError("streaming needs a model with attention, got a ClockworkRNN")

    def untrained(self, seed: int) -> "ClockworkRNN":
        """A model of the same config with the weights from which a training with that seed starts."""
        return ClockworkRNN(self.config, seed).to(self.device, self.dtype).eval()

    def own_positions(self, n: int) -> Int[Tensor, "pos"]:
        """The times of n tokens where the caller names none."""
        return torch.arange(n)

    def new_cache(self) -> StateCache:
        """An empty cache, for calls that go on from where the one before ended."""
        return StateCache()

    def forward(
        self,
        tokens: TokenIds,
        *,
        positions: Int[Tensor, "all_positions"] | None = None,
        cache: StateCache | None = None,
        hooks: Mapping[str, Hook] | None = None,
        attention: str = "auto",
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits before the softmax, each row from the tokens up to and with its own.

        Args:
            tokens: ids in 0…d_vocab-1.
            positions: the 0-based time of each column, which decides what modules run there; by default 0, 1, 2, …
                (after what the cache holds). A module that has not run yet has the state 0.
            cache: hidden states after an earlier prefix; they are replaced by those after this call.
            hooks: functions by site name. Each is called with the value at its site; what it returns, if anything,
                replaces the value. At ``hook_resid_post`` these are a layer's hidden states after its whole recurrence:
                an edit is seen by the layer above, or the head, at that position, and does not enter the recurrence of
                the layer itself, nor the cache.
            attention: a ``Decoder``'s choice of path, of no effect here.

        Raises:
            ProbeError: for an empty batch, ids outside the vocabulary, or a site that does not exist.
        """
        ids = check_call(tokens, hooks or (), attention, self.config, "a clockwork RNN's", LAYER_SITES)
        past = 0 if cache is None else cache.length
        n = past + ids.shape[1]
        times = list(range(n)) if positions is None else positions.tolist()
        if len(times) != n:
            raise ProbeError(f"positions must name all {n} positions (cached ones too), got {len(times)}")
        tick = functools.cache(lambda time: Tick.at(time, self.config, ids.device))
        ticks = [tick(time) for time in times[past:]]
        at = Hooks(hooks or {})
        x = self.dropout(at("hook_embed", self.token_embedding(ids)))
        for i, layer in enumerate(self.layers):
            under = at.under(f"blocks.{i}.")
            states = layer(under("hook_resid_pre", x), ticks, None if cache is None else cache.states.get(i))
            if cache is not None:
                cache.states[i] = states[:, -1]
            x = self.dropout(under("hook_resid_post", states))
        if cache is not None:
            cache.length = n
        return self.head(x)
