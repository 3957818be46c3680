"""The rows of the residual stream that constructions write and read, by name."""

import torch
from jaxtyping import Float
from torch import Tensor

from probe.models.decoder import Decoder

# The residual stream of every construction begins with three rows, as in Kazemnejad et al. 2023, appendix C (whose
# rows 1, 2, 3 these are); behind them stand scratch rows, 0 at first, and last the content, N_CONTENT numbers that are
# the token's and arbitrary.
ONE, IS_BOS, POSITION = 0, 1, 2
N_CONTENT = 13

BOS = 0
D_VOCAB = 32


class Layout:
    """Where each named group of rows stands: ``Layout(bits=17)["bits"]`` is ``range(3, 20)``.

    A group called ``not_bos`` is filled by the embeddings: 1 for every token but ``<bos>``.
    """

    def __init__(self, **sizes: int):
        self._rows: dict[str, range] = {}
        row = POSITION + 1
        for name, size in sizes.items():
            self._rows[name] = range(row, row + size)
            row += size
        self.content = slice(row, row + N_CONTENT)
        self.d_model = row + N_CONTENT

    def __getitem__(self, name: str) -> range:
        return self._rows[name]

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def row(self, name: str) -> int:
        """The row of a group of one."""
        (row,) = self._rows[name]
        return row

    def change(
        self, embedded: Float[Tensor, "pos d_model"], stream: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "pos"]:
        """The largest change of what no construction may touch: ONE, IS_BOS and the content."""
        rows = [ONE, IS_BOS, *range(self.content.start, self.content.stop)]
        return (stream[:, rows] - embedded[:, rows]).abs().amax(-1)


D_MODEL = Layout().d_model
CONTENT = Layout().content


def write_embeddings(decoder: Decoder, layout: Layout | None = None, seed: int = 0) -> None:
    """Row ONE = 1, row IS_BOS = 1 for ``<bos>`` and 0 for the others, scratch rows 0; content ~ N(0, 1)."""
    layout = layout or Layout()
    embedding = decoder.token_embedding.weight.detach()
    embedding[:, ONE] = 1
    embedding[BOS, IS_BOS] = 1
    if "not_bos" in layout:
        embedding[:, layout.row("not_bos")] = 1
        embedding[BOS, layout.row("not_bos")] = 0
    content = embedding[:, layout.content]
    content.copy_(
        torch.randn(content.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(content)
    )
