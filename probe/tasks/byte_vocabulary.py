"""The vocabulary of bytes."""

from collections.abc import Iterable

from probe.tasks.base import SPECIALS, Vocabulary

# Every token of a byte-level vocabulary: printable ASCII as itself, the others as sentencepiece spells them.
BYTE_TOKENS = tuple(chr(b) if 32 <= b < 127 else f"<0x{b:02X}>" for b in range(256))


def byte_tokens(text: bytes) -> tuple[str, ...]:
    """Bytes as tokens of ``BYTE_TOKENS``."""
    return tuple(BYTE_TOKENS[b] for b in text)


class ByteVocabulary(Vocabulary):
    """The 256 bytes, and the special tokens of every task."""

    def __init__(self) -> None:
        super().__init__(BYTE_TOKENS)

    def tokenize(self, text: bytes) -> tuple[str, ...]:
        """A text's bytes as tokens."""
        return byte_tokens(text)

    def text(self, tokens: Iterable[str]) -> bytes:
        """The bytes that tokens are; special ones are none."""
        return bytes(i - len(SPECIALS) for i in self.encode(tokens) if i >= len(SPECIALS))
