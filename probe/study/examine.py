"""Models that others trained, from end to end: what a study measures, without training and without a task.

A folder holds what was found; each finished stage is a file there and is not done again.

    examine.json             what is looked at; other work is refused
    rows/<stage>-<model>     what each stage measured
    rows.parquet             all of it, one row a number
    report.html              what it looks like
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from probe.attention import attention_on, by_layer_encoding
from probe.config import check_size
from probe.device import find_device
from probe.errors import ProbeError
from probe.extrapolation.losses_by_context import loss_by_position
from probe.files import write_rows, write_text
from probe.models.anatomy import (
    d_model_of,
    d_vocab_of,
    layer_encodings,
    n_heads_of,
    n_layers_of,
    our_decoder,
)
from probe.models.checkpoint import digest_of
from probe.models.decoder import Decoder
from probe.models.twins import untrained_twin
from probe.position import has_position_table, position_table
from probe.progress import OnProgress, Steps, untold
from probe.provenance import environment
from probe.report.examine import examine_page
from probe.report.page import Made
from probe.runs import at_work, claim_folder
from probe.study.command import examine_command
from probe.study.config import TracedSequences
from probe.study.places import check_file_names, locate, read_tokens
from probe.study.stages import (
    FIGURE_STAGES,
    PAIR_STAGES,
    ROW_STAGES,
    Measure,
    attention_stages,
    extrapolation,
    hidden_stages,
    pair_stages,
    read_stage,
    too_long,
    write_stage,
)
from probe.study.texts import text_sequences, text_task
from probe.tasks.corpus import PYTHON
from probe.tasks.passkey import Passkey
from probe.tasks.tokenizer_files import has_tokenizer
from probe.tasks.tokenizers import read_tokenizer
from probe.training.shifted import shifted_texts

TABLE_STAGES = ("table", "table_basis", "table_map")
# What is split by what a layer sees, in models whose layers are of two kinds.
BY_KIND = {
    "needle": ("on_keys", "on_first", "on_recent", "elsewhere", "reach"),
    "census": ("induction", "sink", "previous_token", "window", "content", "uniform"),
}
EXAMINE_STAGES = (*ROW_STAGES, "loss_by_position", "needle", *TABLE_STAGES)
ABLATED = 64  # heads: of a larger model on a CPU, three forward passes for each take long, and are left out


@dataclass(frozen=True)
class ExamineConfig:
    """What models are looked at on, and how closely.

    Args:
        text: a folder of texts, or "python", the standard library's sources; tokenised by each model's own tokenizer,
            or as bytes where a model of bytes has none.
        tokens: a ``.npy`` file of ids "sequence pos" in place of texts: for models without a tokenizer.
        length: tokens of a sequence, a ``<bos>`` included.
        sequences: how many.
        needles: prompts with a hidden key, for which heads retrieve (with texts only).
        ablate: replace every head's pattern in the census; None: where it takes no longer than minutes.
    """

    text: str = PYTHON
    tokens: str | None = None
    length: int = 64
    sequences: int = 64
    needles: int = 24
    ablate: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_size("length", self.length, least=8)
        check_size("sequences", self.sequences, least=8)
        check_size("needles", self.needles, least=0)
        check_size("seed", self.seed, least=0)


def examine(
    places: Mapping[str, str | Path],
    folder: str | Path,
    config: ExamineConfig | None = None,
    *,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = untold,
) -> pd.DataFrame:
    """Look at models, by name, each a place as ``locate`` has it, and write rows and a report into a folder.

    What is measured: the learned table of positions, probes with controls at every site, whether position is used, its
    geometry and mechanism, the loss when all positions are shifted, the loss by position; attention beside templates,
    the split of scores, the census, what heads attend to that look for a key; and, where models are looked at on the
    same tokens, their distances. Every number stands beside an untrained model's. Layers are named by what they see.
    ``on_progress`` is called with how many stages are done, and how many there are.

    Returns:
        The rows, with the columns measurement and encoding (the model's name).

    Raises:
        ProbeError: for what a model cannot be loaded or looked at for; where the folder is another command's or one
            for other weights or settings; where another process is at work there.
    """
    folder, config = Path(folder), config or ExamineConfig()
    check_file_names(places)
    located = {name: locate(place) for name, place in places.items()}
    models = {name: place.load(device) for name, place in located.items()}
    where = {name: place.folder for name, place in located.items()}
    seen = {name: looked_at(model, where[name], config) for name, model in models.items()}
    weights = {name: digest_of(model.state_dict()) for name, model in models.items()}
    identity = {
        "models": {name: {"place": str(place), "weights": weights[name]} for name, place in places.items()},
        **asdict(config),
    }

    def stages_of(name: str, control: nn.Module) -> dict[str, Measure]:
        return examine_stages(models[name], where[name], seen[name], config, control=control)

    def pairs_of(untrained: Mapping[str, Sequence[nn.Module]]) -> dict[str, Measure]:
        tokens = next(iter(seen.values())).tokens
        return pair_stages({name: [model] for name, model in models.items()}, untrained, tokens, config.seed)

    compared = len(models) > 1 and not (differ := _incomparable(models, seen))
    # Counted with no more models in memory than there are: nothing is measured before a stage is called.
    total = sum(len(stages_of(name, model)) for name, model in models.items()) + (len(pairs_of({})) if compared else 0)
    with at_work(folder, "examine"):
        claim_folder(folder, "examine.json", identity)  # once nothing more is to be refused
        steps = Steps(total, on_progress)
        for name, model in models.items():
            for stage, measure in stages_of(name, untrained_twin(model, config.seed)).items():
                if write_stage(folder, f"{stage}-{name}", measure):
                    say(f"{name}: {stage}")
                steps.step()
        if compared:
            untrained = {name: [untrained_twin(model, config.seed)] for name, model in models.items()}
            for stage, measure in pairs_of(untrained).items():
                if write_stage(folder, stage, measure):
                    say(stage)
                steps.step()
        elif len(models) > 1:
            say(f"models not compared with each other: {differ}")
        rows = _collect(folder, {name: traced.data for name, traced in seen.items()})
        drawn = {stage: {n: read_stage(folder, f"{stage}-{n}") for n in models} for stage in FIGURE_STAGES}
        about = [
            _anatomy(name, places[name], where[name], model) | {"looked at on": seen[name].data}
            for name, model in models.items()
        ]
        on = find_device(device)
        made = Made(examine_command(places, config, on.type), settings=asdict(config), environment=environment(on))
        write_rows(folder / "rows.parquet", rows, made.environment)
        page = examine_page(rows, drawn["maps"], drawn["curves"], pd.DataFrame(about), made)
        write_text(folder / "report.html", page)
        return rows


def examine_stages(
    model: nn.Module,
    place: str | Path,
    traced: TracedSequences,
    config: ExamineConfig,
    *,
    control: nn.Module,
) -> dict[str, Measure]:
    """The stages of one model beside its untrained control."""
    decoder, seed = our_decoder(model), config.seed
    tokens, n_heads = traced.tokens, n_layers_of(model) * n_heads_of(model)
    ablate = config.ablate
    if ablate is None:
        ablate = n_heads <= ABLATED or next(model.parameters()).device.type != "cpu"
    lengths = torch.full((len(tokens),), tokens.shape[1])
    stages = {
        **hidden_stages([model], [control], traced, seed, distance=None),
        "extrapolation": lambda: extrapolation([model], [control], tokens, lengths, seed=seed),
        **attention_stages([model], [control], traced, seed, ablate=ablate),
        "loss_by_position": lambda: loss_by_position(model, tokens, seed=seed),
    }
    if isinstance(decoder, Decoder):
        stages["shifted"] = lambda: shifted_texts(decoder, tokens, seed=seed)
    if has_position_table(model):
        table = functools.cache(lambda: position_table(model, seed=seed))
        stages |= {
            "table": lambda: table().rows,
            "table_basis": lambda: table().basis,
            "table_map": lambda: table().similarity,
        }
    last = _last_position(model)
    if config.needles and config.tokens is None and (last is None or _task(model, place, config).least_length <= last):
        stages["needle"] = lambda: _needles({"none": model, "untrained": control}, place, config, seed)
    return stages


def looked_at(model: nn.Module, place: str | Path, config: ExamineConfig) -> TracedSequences:
    """The sequences on which a model is looked at: held-out texts, or those of a file."""
    last = _last_position(model)
    if last is not None and config.length > last + 1:
        raise ProbeError(f"{place}: sequences of at most {last + 1} tokens were wanted, got {config.length}")
    if config.tokens is not None:
        tokens = read_tokens(config.tokens)[: config.sequences, : config.length]
        if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab_of(model):
            raise ProbeError(
                f"{config.tokens}: ids in 0…{d_vocab_of(model) - 1}, those of {place}, were wanted, got "
                f"{int(tokens.min())}…{int(tokens.max())}"
            )
        traced = TracedSequences(tokens, None, f"token ids of {config.tokens}")
    else:
        traced = text_sequences(_task(model, place, config), config.length, config.sequences, config.seed)
    if len(traced.tokens) < 8:
        raise ProbeError(f"at least 8 sequences of {config.length} tokens are needed, got {len(traced.tokens)}")
    return traced


def _incomparable(models: Mapping[str, nn.Module], seen: Mapping[str, TracedSequences]) -> str | None:
    """Why models are not compared head by head, layer by layer, on the same tokens."""
    if len({(n_layers_of(model), n_heads_of(model)) for model in models.values()}) > 1:
        return "their layers or heads are not as many"
    first, *others = (each.tokens for each in seen.values())
    if not all(torch.equal(first, other) for other in others):
        return "their tokens differ"
    if any(too_long(model, first) for model in models.values()):
        return "that wants whole patterns, which are too large at this length"
    return None


def _task(model: nn.Module, place: str | Path, config: ExamineConfig) -> Passkey:
    """The texts in the words of a model."""
    tokenizer = str(place) if has_tokenizer(place) else ""
    return text_task(config.text, tokenizer, config.length, d_vocab_of(model), place)


def _needles(models: Mapping[str, nn.Module], place: str | Path, config: ExamineConfig, seed: int) -> pd.DataFrame:
    tokens, keys, queries, lengths = prompts_with_keys(models["none"], place, config)
    found = [
        attention_on(model, tokens, keys, queries, lengths=lengths, seed=seed).assign(control=control)
        for control, model in models.items()
    ]
    return pd.concat(found, ignore_index=True)


def prompts_with_keys(
    model: nn.Module, place: str | Path, config: ExamineConfig
) -> tuple[Int[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"], Bool[Tensor, "prompt pos"], Int[Tensor, "prompt"]]:
    """Texts that hold a key of five digits and end with the question for it, ``config.needles`` of them, right-padded:
    tokens, which of them are the key, which is the last, and the lengths. What ``attention_on`` wants."""
    task, rng = _task(model, place, config), np.random.default_rng(config.seed)
    length, last = task.least_length + 64, _last_position(model)
    if last is not None:
        length = min(length, last + 1)
    sequences, needles = [], []
    for _ in range(config.needles):
        prompt = task.prompt(length, None, rng)
        sequences.append(torch.tensor(task.vocabulary.prompt(prompt.example)))
        needles.append(task.tokens_of_key(prompt))
    lengths = torch.tensor([len(each) for each in sequences])
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    position = torch.arange(tokens.shape[1])
    keys = torch.stack([(position >= start) & (position < end) for start, end in needles])
    return tokens, keys, position == lengths[:, None] - 1, lengths


def _last_position(model: nn.Module) -> int | None:
    decoder = our_decoder(model)
    return None if decoder is None else decoder.encoding.last_position


def _anatomy(name: str, place: str | Path, where: Path, model: nn.Module) -> dict[str, str]:
    encodings, decoder = layer_encodings(model), our_decoder(model)
    parameters = list(model.parameters())
    commit = f" ({where.name})" if where.parent.name == "snapshots" else ""  # in the hub's cache
    return {
        "model": name,
        "from": f"{place}{commit}",
        "loaded as": "our decoder" if decoder is not None else f"{type(model.original_model).__name__} under a bridge",
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "layers × heads": f"{n_layers_of(model)} × {n_heads_of(model)}",
        "d_model": str(d_model_of(model)),
        "d_vocab": f"{d_vocab_of(model):,}",
        "position seen": _by_layer(encodings),
        "before each text": read_tokenizer(str(where)).before if has_tokenizer(where) else "",
    }


def _by_layer(encodings: Sequence[str]) -> str:
    """ "rotary", or for a hybrid "rotary in layers 0 1 2, none in layers 3"."""
    kinds = dict.fromkeys(encodings)
    if len(kinds) == 1:
        return encodings[0]
    where = {kind: [str(layer) for layer, e in enumerate(encodings) if e == kind] for kind in kinds}
    return ", ".join(f"{kind} in layers {' '.join(layers)}" for kind, layers in where.items())


def _collect(folder: Path, data: Mapping[str, str]) -> pd.DataFrame:
    """All rows of models, by name what they were looked at on."""
    parts = []
    for name in data:
        there = [stage for stage in EXAMINE_STAGES if (folder / "rows" / f"{stage}-{name}.parquet").exists()]
        found = {stage: read_stage(folder, f"{stage}-{name}") for stage in there}
        parts += [rows.assign(measurement=stage, encoding=name) for stage, rows in found.items()]
        for stage in [stage for stage in BY_KIND if stage in found]:
            trained = found[stage][found[stage]["control"] == "none"]
            if trained["layer_encoding"].nunique() > 1:
                split = by_layer_encoding(trained, BY_KIND[stage])
                parts.append(split.assign(measurement="by_layer_encoding", of=stage, encoding=name))
    for stage in PAIR_STAGES:
        if (folder / "rows" / f"{stage}.parquet").exists():
            parts.append(read_stage(folder, stage).assign(measurement=stage))
    rows = pd.concat(parts, ignore_index=True).astype({"layer": "Int64", "head": "Int64"})
    # Models are compared with each other on the same tokens, so any of theirs says which.
    return rows.assign(data=[data.get(name, next(iter(data.values()))) for name in rows["encoding"]])
