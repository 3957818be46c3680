"""Models that others trained, from end to end: what a study measures, without training and without a task.

A folder holds what was found; each finished stage is a file there and is not done again.

    examine.json             what is looked at; other work is refused
    rows/<stage>-<model>     what each stage measured
    rows.parquet             all of it, one row per number
    report.html              what it looks like
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from torch import nn

from probe.config import check_size
from probe.device import find_device
from probe.errors import ProbeError
from probe.measure.base import Case
from probe.measure.data import Texts, TracedSequences
from probe.measure.needle import PROMPTS
from probe.measure.run import measure_models
from probe.models.anatomy import d_model_of, d_vocab_of, layer_encodings, n_heads_of, n_layers_of, our_decoder
from probe.models.decoder import Decoder
from probe.models.open.ways import as_model
from probe.progress import OnProgress, untold
from probe.report.page import Line, Section
from probe.study.command import examine_command
from probe.study.places import check_file_names, locate, read_tokens
from probe.study.texts import text_sequences, text_task
from probe.tasks.corpus import PYTHON
from probe.tasks.passkey import Passkey
from probe.tasks.tokenizer_files import has_tokenizer
from probe.tasks.tokenizers import read_tokenizer


@dataclass(frozen=True)
class ExamineConfig:
    """What models are looked at on, and how closely.

    Args:
        text: a folder of texts, or "python", the standard library's sources; tokenised by each model's own tokenizer,
            or as bytes where a model of bytes has none.
        tokens: a ``.npy`` file of ids "sequence pos" in place of texts: for models without a tokenizer.
        length: tokens of a sequence, a ``<bos>`` included; at least 8.
        sequences: how many; at least 8.
        needles: prompts with a hidden key, for which heads retrieve (with texts only); 0 for none.
        ablate: replace every head's pattern in the census; None: where it takes no longer than minutes.
        seed: of whatever is drawn.
    """

    text: str = PYTHON
    tokens: str | None = None
    length: int = 64
    sequences: int = 64
    needles: int = PROMPTS
    ablate: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.text != PYTHON:
            raise ProbeError(f"sequences must be either of tokens or of text, got both ({self.tokens} and {self.text})")
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

    Measured is whatever of ``MEASUREMENTS`` the models can give: the table of positions, probes with controls, whether
    position is used, its geometry and mechanism, the loss when all positions are shifted, the loss by position;
    attention beside templates, the split of scores, the census, what heads attend to when a key is asked for; and,
    where models are looked at on the same tokens, their distances. Every number stands beside an untrained twin's.
    Layers are named by what they see.

    Args:
        places: by name, where each model is.
        folder: where rows and report go.
        config: what the models are looked at on.
        device: "cuda", "mps" or "cpu"; the first that is there by default.
        say: called with a line when a measurement is finished or has failed.
        on_progress: called with how many measurements are done, and how many there are.

    Returns:
        The rows, with the columns measurement, model and encoding.

    Raises:
        ProbeError: for what a model cannot be loaded or looked at for; where the folder is another command's or one
            for other weights or settings; where another process is at work there.
    """
    config = config or ExamineConfig()
    check_file_names(places)
    located = {name: locate(place) for name, place in places.items()}
    models = {name: place.load(device) for name, place in located.items()}
    cases = [case_of(name, models[name], place.folder, config) for name, place in located.items()]
    about = [
        _anatomy(case, places[case.name], located[case.name].folder) | {"looked at on": case.traced.data}
        for case in cases
    ]
    models_section = Section(
        "Models", ["What was loaded, and which position encoding each layer sees."], tables=[("", pd.DataFrame(about))]
    )
    return measure_models(
        cases,
        folder,
        options={"census": {"ablate": config.ablate}, "needle": {"n": config.needles}},
        command="examine",
        title="Models examined",
        typed=examine_command(places, config, find_device(device).type),
        settings=asdict(config),
        lead=[_models_in_words(about)],
        first=[models_section],
        say=say,
        on_progress=on_progress,
    )


def case_of(name: str, model: nn.Module, place: str | Path, config: ExamineConfig) -> Case:
    """A model, and held-out texts of its own tokens or the sequences of a file.

    Raises:
        ProbeError: where the model does not know so many positions, or not these ids; or there are too few sequences.
    """
    decoder = our_decoder(model)
    last = None if decoder is None else decoder.encoding.last_position
    if last is not None and config.length > last + 1:
        raise ProbeError(f"{place}: sequences must have at most {last + 1} tokens, got {config.length}")
    texts = None
    if config.tokens is not None:
        tokens = read_tokens(config.tokens)[: config.sequences, : config.length]
        if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab_of(model):
            raise ProbeError(
                f"{config.tokens}: ids must be in 0…{d_vocab_of(model) - 1}, those of {place}, got "
                f"{int(tokens.min())}…{int(tokens.max())}"
            )
        traced = TracedSequences(tokens, None, f"token ids of {config.tokens}")
    else:
        task = _task(model, place, config)
        traced = text_sequences(task, config.length, config.sequences, config.seed)
        texts = Texts(task, n_texts=config.sequences, seed=config.seed, trained=False) if config.needles else None
    if len(traced.tokens) < 8:
        raise ProbeError(f"at least 8 sequences of {config.length} tokens are needed, got {len(traced.tokens)}")
    return Case(name, [model], traced, config.seed, texts=texts)


def _task(model: nn.Module, place: str | Path, config: ExamineConfig) -> Passkey:
    """The texts in the words of a model."""
    tokenizer = str(place) if has_tokenizer(place) else ""
    return text_task(config.text, tokenizer, config.length, d_vocab_of(model), place)


def _anatomy(case: Case, place: str | Path, where: Path) -> dict[str, str]:
    model = case.model
    encodings, owner = layer_encodings(model), as_model(model).owner
    parameters = list(model.parameters())
    commit = f" ({where.name})" if where.parent.name == "snapshots" else ""  # in the hub's cache
    return {
        "model": case.name,
        "from": f"{place}{commit}",
        "loaded as": "our decoder" if isinstance(owner, Decoder) else f"{type(owner).__name__} of transformers",
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "layers × heads": f"{n_layers_of(model)} × {n_heads_of(model)}",
        "d_model": str(d_model_of(model)),
        "d_vocab": f"{d_vocab_of(model):,}",
        "position seen": _by_layer(encodings),
        "before each text": read_tokenizer(str(where)).before if has_tokenizer(where) else "",
    }


def _models_in_words(about: Sequence[Mapping[str, str]]) -> Line:
    said = [
        f"{r['model']}: {r['parameters']} parameters, {r['layers × heads']} layers × heads, position "
        f"{r['position seen']}."
        for r in about
    ]
    return Line("Models", "", said)


def _by_layer(encodings: Sequence[str]) -> str:
    """ "rotary", or for a hybrid "rotary in layers 0 1 2, none in layers 3"."""
    kinds = dict.fromkeys(encodings)
    if len(kinds) == 1:
        return encodings[0]
    where = {kind: [str(layer) for layer, e in enumerate(encodings) if e == kind] for kind in kinds}
    return ", ".join(f"{kind} in layers {' '.join(layers)}" for kind, layers in where.items())
