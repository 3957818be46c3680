"""The vocabularies of released models: their tokenizers, whose own code is never run."""

import functools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from probe.errors import ProbeError
from probe.files import state_of
from probe.limits import current
from probe.tasks.base import Example, Vocabulary
from probe.tasks.tokenizer_files import files_of, has_tokenizer, read_by_library, read_tokenizer_of

# Stands before a piece of text while that is tokenised: what some tokenizers put in front of a text is put before it.
ANCHOR = "x"
# Letters, digits, spaces, line ends and bytes of many kinds: tokenizers that agree on these are the same one.
SAMPLE = (
    "The pass key of Amber is 71523.\n\n\tdef f(x, *args):  # naïve, 15 % of 3.14\n        return x ** 2 or '…'\r\n"
    "Здравствуй, 世界! 🙂 don't RE-read antidisestablishmentarianism @ http://a.b/c?d=e_f 0000 12,345,678"
)


class TextVocabulary(Vocabulary):
    """The tokens of a released model, from a folder with its tokenizer; ``read_tokenizer`` keeps those it has read.

    >>> gpt2 = read_tokenizer("gpt2")
    >>> gpt2.tokenize(b" is 71523"), gpt2.ids_of("Hello"), gpt2.bos == gpt2.stop
    (('Ġis', 'Ġ7', '15', '23'), [15496], True)

    Ids are those of ``tokenizer.json``, else of the tokenizer that transformers makes of the folder's other files.
    Token strings are as the tokenizer spells them and stand for one id each: an id without a string, as in a vocabulary
    that is padded, and one whose string another id has, is spelled ``<id N>``. So are ids beyond the vocabulary, which
    a model with more rows than tokens may predict.

    Such models know no ``<sep>``: a prompt is ``<bos>`` and the source, or the source alone where the tokenizer has no
    such token; ``before`` says which. Which tokens begin and end a text is what ``tokenizer_config.json`` or
    ``special_tokens_map.json`` says, else what transformers' ``AutoTokenizer`` says of the folder.

    Attributes:
        bos: the id in front of a text; None where there is none.
        eos: the id behind a text, likewise.

    Raises:
        ProbeError: for a folder that is not there, holds no tokenizer, or one that can't be read without code.
    """

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self._tokenizer, self.bos, self.eos = read_tokenizer_of(Path(folder))
        # A tokenizer is stored as it was last used: to cut texts at some length, say.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        n = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if n > (most := current().tokenizer_ids):
            raise ProbeError(f"{folder}: a tokenizer must have at most {most} ids, got {n}")
        self.tokens = tuple(self._spelled(i) for i in range(n))
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if not n or len(self.ids) != n:
            raise ProbeError(
                f"{folder}: a tokenizer with a string for every token was wanted, got {len(self.ids)} of {n}"
            )
        self._anchor = self.ids_of(ANCHOR)

    def _spelled(self, i: int) -> str:
        token = self._tokenizer.id_to_token(i)
        return token if token is not None and self._tokenizer.token_to_id(token) == i else _unspelled(i)

    @property
    def before(self) -> str:
        """What stands before every prompt, in words: a token and its id, or "nothing"."""
        return "nothing" if self.bos is None else f"{self.tokens[self.bos]} (id {self.bos})"

    @property
    def stop(self) -> int:
        """The id at which a model has said all, or -1, which no model says."""
        return -1 if self.eos is None else self.eos

    @property
    def wanted(self) -> str:
        return f"at least {len(self)} tokens"

    def fits(self, d_vocab: int) -> bool:
        """Whether a model has a row for every token; released ones often have some more."""
        return d_vocab >= len(self)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids, those beyond the vocabulary as ``<id N>``."""
        return [self.tokens[i] if i < len(self.tokens) else _unspelled(i) for i in ids]

    def prompt(self, example: Example) -> list[int]:
        """``<bos>`` source."""
        return [*(() if self.bos is None else (self.bos,)), *self.encode(example.source)]

    def completion(self, example: Example) -> list[int]:
        """target ``<eos>``, which is left out where the target does not end or there is no such token."""
        ends = example.ends and self.eos is not None
        return [*self.encode(example.target), *((self.eos,) if ends else ())]

    def ids_of(self, text: str | bytes) -> list[int]:
        """A whole text as ids, without special tokens around it."""
        return list(self.ids_of_all([text])[0])

    def ids_of_all(self, texts: Sequence[str | bytes]) -> list[Sequence[int]]:
        """``ids_of`` many texts, in little memory."""
        found: list[Sequence[int]] = []
        for start in range(0, len(texts), 16):  # what else an encoding holds is many times as large
            batch = [t.decode() if isinstance(t, bytes) else t for t in texts[start : start + 16]]
            with read_by_library(f"{self.folder}: a tokenizer of any text was wanted"):
                encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            found += (array("i", encoding.ids) for encoding in encodings)
        return found

    def tokenize(self, text: str | bytes) -> tuple[str, ...]:
        """A piece of a text as tokens. One that begins with a space or a line end is tokenised as it stands behind
        other text: without the space that some tokenizers put in front of a text."""
        text = text.decode() if isinstance(text, bytes) else text
        if text[:1].isspace():
            ids, n = self.ids_of(ANCHOR + text), len(self._anchor)
            if ids[:n] == self._anchor:
                return tuple(self.decode(ids[n:]))
        return tuple(self.decode(self.ids_of(text)))

    def text(self, tokens: Iterable[str]) -> bytes:
        """The text that tokens stand for. Those of no string are none; a part of a character is U+FFFD."""
        ids = [self.ids[token] for token in tokens if token in self.ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False).encode()


def read_tokenizer(folder: str) -> TextVocabulary:
    """The vocabulary of a folder's tokenizer. It is kept in memory, and read again when a file of it has changed."""
    return _read_tokenizer(folder, tuple(map(state_of, files_of(Path(folder)))))


@functools.lru_cache(maxsize=8)
def _read_tokenizer(folder: str, state: tuple[tuple[str, int, int, int], ...]) -> TextVocabulary:
    return TextVocabulary(folder)


def shared_tokenizer(folders: Mapping[str, str | Path]) -> str:
    """The folder of the tokenizer that models, by name, have in common, or "" where none of their folders holds one.

    Raises:
        ProbeError: where some have none, or theirs make other ids of a sample of text.
    """
    first = None
    for name, folder in folders.items():
        vocabulary = read_tokenizer(str(folder)) if has_tokenizer(folder) else None
        if first is None:
            first = name, vocabulary
        elif _reads(vocabulary) != _reads(first[1]):
            raise ProbeError(
                f"models that share a tokenizer were wanted, but {first[0]!r} and {name!r} make other tokens of a text"
            )
    return first[1].folder if first is not None and first[1] is not None else ""


def _reads(vocabulary: TextVocabulary | None) -> tuple[int | None, list[int]] | None:
    return None if vocabulary is None else (vocabulary.bos, vocabulary.ids_of(SAMPLE))


def _unspelled(i: int) -> str:
    return f"<id {i}>"
