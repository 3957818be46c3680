"""The one exception that a user's mistake raises."""

from collections.abc import Iterable


class ProbeError(ValueError):
    """A wrong input: its message is one line, says what was wanted and what was got.

    It is a ``ValueError``, so notebooks may catch it as one. The command line prints its message and exits with
    status 2; every other exception is a bug of ours and keeps its traceback.
    """


LONGEST = 2000  # characters of a message; what it quotes may be a whole file


class NoTwin(ProbeError):
    """Nobody can draw another model of this kind, so there is no untrained twin of it."""


def one_line(message: object) -> str:
    """A message as one line of a terminal: blanks run together, and what cannot be printed is spelt out."""
    text = " ".join(str(message).split())
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")


def printable(text: str) -> str:
    """A text for a terminal. What steers one, or cannot be printed, is spelt out; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ProbeError:
    """The error for a name that is not in a registry, with the one that is spelt most like it."""
    import difflib

    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ProbeError(f"unknown {kind} {name!r}; known: {', '.join(known)}{hint}")
