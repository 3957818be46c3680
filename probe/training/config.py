"""How a model is trained."""

from dataclasses import dataclass

from probe.config import check_flag, check_number, check_size
from probe.errors import ProbeError

MIXED_PRECISION = ("no", "bf16")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. The defaults are Kazemnejad et al. 2023, table 2 (lr 3e-5, linear decay).

    ``accumulation`` is for batches that do not fit into memory at once: the gradient stays that of the whole batch.
    ``compile`` takes up to a minute at the start; a CPU gains 0 to 9 % from it.
    """

    steps: int = 40_000  #: of the optimizer, AdamW
    batch_size: int = 64  #: sequences of a step, over all processes
    accumulation: int = 1  #: parts of a batch that go through the model one after the other
    learning_rate: float = 3e-5  #: the highest, at the end of the warm-up
    weight_decay: float = 0.05  #: of matrices; vectors have none
    warmup: float = 0.06  #: share of the steps
    clip_norm: float = 1.0  #: the longest gradient that a step takes
    mixed_precision: str = "no"  #: "no" or "bf16"
    compile: bool = False  #: whether torch.compile makes kernels of the layers
    seed: int = 0  #: of the first weights, the order of the data and dropout
    log_every: int = 50  #: steps between two lines of the log
    checkpoint_every: int = 1000  #: steps between two checkpoints

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every"):
            check_size(name, getattr(self, name))
        check_size("seed", self.seed, least=0, most=2**63 - 1)
        for name in ("learning_rate", "clip_norm"):
            check_number(name, getattr(self, name))
        check_number("weight_decay", self.weight_decay, closed=True)
        check_number("warmup", self.warmup, 0, 1, closed=True)
        if self.batch_size % self.accumulation:
            raise ProbeError(f"batch_size ({self.batch_size}) must be divisible by accumulation ({self.accumulation})")
        check_flag("compile", self.compile)
        if self.mixed_precision not in MIXED_PRECISION:
            raise ProbeError(
                f"mixed_precision must be one of {', '.join(MIXED_PRECISION)}, got {self.mixed_precision!r}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …: up to the peak over the warm-up, then linearly to 0."""
        warm = max(1, round(self.warmup * self.steps))
        return self.learning_rate * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))
