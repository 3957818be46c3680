"""Every kind of model, built from its config: what trains, is saved and is measured under one calling convention."""

from collections.abc import Callable, Mapping
from typing import Any, overload

from probe.errors import unknown_name
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.decoder import Decoder, DecoderConfig

OwnModel = Decoder | ClockworkRNN
ModelConfig = DecoderConfig | ClockworkConfig


@overload
def build(config: DecoderConfig, seed: int | None = 0, device: str = "cpu") -> Decoder: ...
@overload
def build(config: ModelConfig, seed: int | None = 0, device: str = "cpu") -> OwnModel: ...
def build(config: ModelConfig, seed: int | None = 0, device: str = "cpu") -> OwnModel:
    """The model of a config, with weights drawn from the seed, or undrawn where it is None; on the ``device`` "meta"
    they have no memory yet."""
    return dict(MODELS.values())[type(config)](config, seed, device)


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """A config from its JSON object, which says under "model" what it is of; a decoder's need not.

    Raises:
        ProbeError: for another kind of model, or what the config itself refuses.
    """
    kind = values.get("model", "decoder")
    if not isinstance(kind, str) or kind not in MODELS:
        raise unknown_name("kind of model", kind, MODELS)
    config, _ = MODELS[kind]
    return config.from_dict({name: value for name, value in values.items() if name != "model"})


MODELS: dict[str, tuple[type[ModelConfig], Callable[..., OwnModel]]] = {
    "decoder": (DecoderConfig, Decoder),
    ClockworkConfig.KIND: (ClockworkConfig, ClockworkRNN),
}
