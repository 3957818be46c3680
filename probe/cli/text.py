"""The commands for models of text, beyond the length that they were trained with."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.cli.command import Command, add_device, add_json, seed, tell_folder
from probe.cli.progress import progress
from probe.cli.settings import add_text_options
from probe.config import check_size
from probe.options import integers, numbers, words

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from probe.study import StudyConfig
    from probe.study.beyond import Beyond
    from probe.study.places import Place
    from probe.tasks.passkey import Passkey


Add = Callable[[argparse.ArgumentParser], None]


def _of_models(name: str, own: Add) -> Add:
    """A command's own options, and those that all of these have."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("models", nargs="+", metavar="MODEL", help="as of `probe compare`; models of text")
        own(parser)
        parser.add_argument("--folder", default=f"runs/{name}", help="where all goes (default: %(default)s)")
        parser.add_argument("--text", metavar="FOLDER", help="texts (default: python, its standard library)")
        parser.add_argument(
            "--tokenizer", metavar="FOLDER", help="of models that are not of bytes (default: the one in their folders)"
        )
        add_text_options(parser)
        help_of_seed = "of what is drawn (default: %(default)s)"
        parser.add_argument("--seed", type=seed, default=0, metavar="N", help=help_of_seed)
        add_json(parser)
        add_device(parser)

    return add


def _find(options: argparse.Namespace) -> "tuple[dict[str, list[Place]], StudyConfig | None]":
    """Where the models are, and a study's settings. What is to be fetched is, and shows how far it is."""
    from probe.study.places import find_checkpoints

    return find_checkpoints(options.models)


def _text_models(
    options: argparse.Namespace,
    checkpoints: "Mapping[str, Sequence[Place]]",
    study: "StudyConfig | None",
    **settings: Any,
) -> "tuple[dict[str, nn.Module], Beyond]":
    """Models of text by name, and what is looked at beyond their length."""
    from probe.device import find_device
    from probe.study.beyond import Beyond
    from probe.study.beyond_checkpoints import check_text_models
    from probe.study.places import load_all
    from probe.study.texts import text_task_of

    names = ("text", "train_length", "n_keys", "filler", "tokenizer")
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    models = load_all(checkpoints, str(find_device(options.device)))
    folders = {name: first.folder for name, (first, *_) in checkpoints.items()}
    of_study = study.task_options if study is not None and study.task == "passkey" else None
    task, trained = text_task_of(models, folders, of_study, **given)
    beyond = Beyond(
        task,
        n_texts=options.n_texts,
        n_prompts=options.n_prompts,
        seed=options.seed,
        trained=trained,
        **settings,
    )
    return check_text_models(models, beyond.task), beyond


def _tell(options: argparse.Namespace, rows: "pd.DataFrame", by: str, metric: str, task: "Passkey") -> int:
    """Rows as JSON lines, or a table of one metric, what stands before each prompt, and where the report is."""
    shown = rows[rows["metric"] == metric]
    if options.json or shown.empty:
        return tell_folder(options, rows)
    if "depth" in shown:
        shown = shown[shown["depth"].isna()]
    index = ["model", *(column for column in ("variant", "extension") if column in shown)]
    table = shown.pivot_table(index=index, columns=by, values="value", sort=False, dropna=False).dropna(how="all")
    print(table.rename(columns=int).to_string(float_format=lambda x: f"{x:.3f}"))
    if task.tokenizer:
        from probe.tasks import read_tokenizer

        print(f"before each prompt: {read_tokenizer(task.tokenizer).before}")
    return tell_folder(options, rows)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", type=integers, metavar="N,N,…", help="tokens (default: 1, 2, 4, 8 × trained)")


def _perplexity(options: argparse.Namespace) -> int:
    from probe.study.beyond_checkpoints import perplexity_checkpoints

    found = _find(options)
    with progress("perplexity") as shown:
        models, beyond = _text_models(options, *found)
        rows = perplexity_checkpoints(
            models,
            beyond,
            Path(options.folder),
            contexts=options.contexts,
            command=options.typed,
            on_progress=shown.on_progress,
        )
    return _tell(options, rows, "context", "perplexity", beyond.task)


def _add_passkey(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=integers, metavar="N,N,…", help="tokens (default: 1, 2, 4, 8 × trained)")
    parser.add_argument("--depths", type=numbers, metavar="X,X,…", help="0, at the start, … 1 (default: ten)")
    parser.add_argument("--n-keys", type=int, metavar="N", help="keys in a prompt, asked for by name")
    parser.add_argument("--filler", choices=("text", "sentences"), help="what the key is hidden in")


def _passkey(options: argparse.Namespace) -> int:
    from probe.study.beyond_checkpoints import passkey_checkpoints
    from probe.tasks.passkey import DEPTHS

    found = _find(options)
    with progress("passkey") as shown:
        models, beyond = _text_models(options, *found)
        rows = passkey_checkpoints(
            models,
            beyond,
            Path(options.folder),
            lengths=options.lengths,
            depths=options.depths or DEPTHS,
            command=options.typed,
            on_progress=shown.on_progress,
        )
    return _tell(options, rows, "length", "exact_match", beyond.task)


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--extensions", type=integers, metavar="N,N,…", help="times the trained length (default: 2,4,8)"
    )
    parser.add_argument(
        "--fits", type=words, metavar="NAME,…", help="head (the paper's), head_free, head_from_one, search"
    )
    parser.add_argument("--ablation", action="store_true", help="the paper's: without the limit, without initial value")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of training λ (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.1, metavar="X", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")


def _scale(options: argparse.Namespace) -> int:
    from probe.extrapolation import ScaleTraining
    from probe.study.beyond import ABLATION
    from probe.study.beyond_checkpoints import scale_checkpoints

    check_size("steps", options.steps)
    training = ScaleTraining(
        steps=options.steps,
        warmup=min(20, options.steps // 10),
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
    )
    fits = ABLATION if options.ablation else options.fits or ("head",)
    settings = {"extensions": options.extensions} if options.extensions else {}
    found = _find(options)
    with progress("scale") as shown:
        models, beyond = _text_models(options, *found, scale=training, fits=fits, **settings)
        told = {"command": options.typed, "say": shown.say, "on_progress": shown.on_progress}
        rows = scale_checkpoints(models, beyond, Path(options.folder), **told)
    return _tell(options, rows, "context", "perplexity", beyond.task)


COMMANDS = {
    "perplexity": Command(
        "perplexity of text models by context and position",
        _of_models("perplexity", _add_perplexity),
        _perplexity,
        resumes=True,
    ),
    "passkey": Command(
        "a key hidden in a long text: exact match by length and depth",
        _of_models("passkey", _add_passkey),
        _passkey,
        resumes=True,
    ),
    "scale": Command(
        "attention temperatures: fit them, fold them, say what they do",
        _of_models("scale", _add_scale),
        _scale,
        resumes=True,
    ),
}
