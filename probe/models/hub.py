"""Released models by name: from the cache of ``huggingface_hub``, or into it. What is fetched is data, never code."""

import re
from pathlib import Path

from probe.errors import ProbeError

# Weights as safetensors, and what a tokenizer is made of; no pickle and no Python.
FETCHED = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)

_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")  # with its owner or, as older ones are called, without


def find_folder(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: that one if it is there, else the hub's snapshot of that name, fetched where need be.

    The hub's cache, offline mode and token are those that its own tools know: ``HF_HOME``, ``HF_HUB_CACHE``,
    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_TOKEN`` or ``hf auth login``. Nothing is written outside the cache. The
    name of a snapshot's folder is its commit.

    Args:
        revision: a branch, tag or commit of the hub's; its main branch where None.

    Raises:
        ProbeError: where there is neither, saying how to get it: the hub is out of reach and the model not in the
            cache, there is no such name or revision, or its terms are to be accepted first.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ProbeError(f"{folder}: a folder has no revisions, got {revision!r}: they are for a name on the hub")
        return folder
    name = str(name_or_folder)
    if isinstance(name_or_folder, Path) or not _NAME.fullmatch(name) or ".." in name:
        raise ProbeError(f"{name}: no such folder")
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    asked = f"{name} at revision {revision!r}" if revision else name
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    except errors.HFValidationError:
        raise ProbeError(f"{name}: no such folder, and no name that a model on the hub could have") from None
    except errors.GatedRepoError:
        raise ProbeError(
            f"{name}: its terms are to be accepted on its page on the hub; then log in (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ProbeError(
            f"{name}: no such folder, and no such model on the hub; for a private one log in "
            "(hf auth login, or HF_TOKEN)"
        ) from None
    except (errors.RevisionNotFoundError, errors.RevisionResolutionError):
        raise ProbeError(f"{name}: no revision {revision!r} on the hub") from None
    except errors.HfHubHTTPError as error:
        raise ProbeError(f"{asked}: the hub refused, with status {error.response.status_code}") from None
    except Exception as error:  # no network, one that broke off, offline mode: whatever its HTTP client raises
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub is out of reach"
        fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        raise ProbeError(
            f"{asked}: no such folder, not whole in the cache {constants.HF_HUB_CACHE}, and {why} "
            f"({type(error).__name__}); where there is a network: {fetch} --local-dir FOLDER, then load FOLDER"
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ProbeError(
            f"{asked}: has no safetensors, and a pickle can run code; a pull request there may hold a conversion, "
            "to be had with revision='refs/pr/NUMBER'"
        )
    return folder
