"""Run the notebooks anew and keep their outputs, every figure as a picture. As a script:

    python tests/support/refresh_notebooks.py [01_position_from_nothing …]

Whoever runs a notebook sees interactive figures. What is committed holds pictures of them, small and to be seen on a
code host: kaleido draws them, and wants a Chromium or Chrome (on the PATH, or where ``BROWSER_PATH`` says). A digest of
the code that was run goes into the notebook's metadata, by which a test can tell that it was changed since.
"""

import ast
import base64
import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
MOST_BYTES = 1_000_000
WIDTH, HEIGHT = 920, 450  # pixels, of a figure without a size of its own
SCALE = 1.5  # how many times as fine a picture is
# What no output may hold: where a machine keeps its files.
PLACES = re.compile(r"(?<![\w./])/(home|root|tmp|usr|var|opt|work|mnt|Users|private)/|[A-Z]:\\\\?Users|localhost:")


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """All notebooks, or those of these names."""
    found = sorted(FOLDER.glob("*.ipynb"))
    there = [path.stem for path in found]
    for name in names:
        if name not in there:
            raise SystemExit(f"{name!r} is no notebook; there are {', '.join(there)}")
    return [path for path in found if not names or path.stem in names]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: NotebookNode) -> str:
    """What the code of a notebook is, in short."""
    sources = json.dumps([cell.source for cell in code_cells(notebook)], ensure_ascii=False)
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def execute(notebook: NotebookNode, folder: Path, timeout: int = 600) -> None:
    """Run a notebook from top to bottom in a kernel of its own, in that folder.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell fails.
    """
    where = {"metadata": {"path": folder}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False, resources=where).execute()


def settle(notebook: NotebookNode, draw: Callable[[dict], bytes]) -> None:
    """Put pictures in the place of figures, and join what was printed piece by piece."""
    for cell in code_cells(notebook):
        cell.metadata, kept = NotebookNode(), []
        for output in cell.outputs:
            if FIGURE in output.get("data", {}):
                figure = output.data[FIGURE]
                output.data = NotebookNode({PICTURE: base64.b64encode(draw(figure)).decode()})
                output.metadata = NotebookNode({PICTURE: {"width": figure["layout"].get("width", WIDTH)}})
            if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        executed_code=digest(notebook),
    )


def faults(notebook: NotebookNode, n_bytes: int) -> Iterator[str]:
    """What is wrong with a notebook as it is committed, in words."""
    if n_bytes >= MOST_BYTES:
        yield f"it has {n_bytes:,} bytes, fewer than {MOST_BYTES:,} were wanted"
    if notebook.metadata.get("executed_code") != digest(notebook):
        yield "its code was changed since it was run; python tests/support/refresh_notebooks.py runs it anew"
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != [*range(1, len(counts) + 1)]:
        yield f"its cells were not run once each, in order: {counts}"
    if not cells or "FULL = False" not in cells[0].source.splitlines():
        yield "its first cell of code has no line FULL = False"
    for i, cell in enumerate(cells, start=1):
        tree = ast.parse(cell.source)
        if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(tree)):
            yield f"cell [{i}] defines a function or class: that belongs in the package"
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not cell.outputs:
            yield f"cell [{i}] ends in an expression and has no output"
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"cell [{i}] holds an error or a warning"
            if FIGURE in output.get("data", {}) or "<script" in words_of(output):
                yield f"cell [{i}] holds a figure that is no picture"
            if place := PLACES.search(words_of(output)):
                yield f"cell [{i}] says where a machine keeps its files: {place[0]}"


def words_of(output: NotebookNode) -> str:
    """All of an output but its picture."""
    data = {kind: what for kind, what in output.get("data", {}).items() if kind != PICTURE}
    return json.dumps([data, output.get("text", "")], ensure_ascii=False)


def smaller(png: bytes) -> bytes:
    """The same picture in 256 colours and a quarter of the size, where Pillow is there to do it."""
    try:
        from PIL import Image
    except ImportError:
        return png
    picture, found = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(found, "PNG", optimize=True)
    return found.getvalue()


def main(names: Sequence[str]) -> int:
    """Run the notebooks and write them; 1 if something is wrong with one of them."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # what is to be drawn, and not yet how
    import kaleido

    def draw(figure: dict) -> bytes:
        size = {"width": figure["layout"].get("width", WIDTH), "height": figure["layout"].get("height", HEIGHT)}
        return smaller(kaleido.calc_fig_sync(figure, opts={"format": "png", "scale": SCALE, **size}))

    wrong = 0
    kaleido.start_sync_server(silence_warnings=True, mathjax=False)
    try:
        for path in notebooks(names):
            notebook, started = read(path), time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                execute(notebook, Path(folder))
            taken = time.perf_counter() - started
            settle(notebook, draw)
            nbformat.validate(notebook)
            text = nbformat.writes(notebook) + "\n"
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: {taken:.0f} s, {len(text.encode()) / 1000:.0f} kB")
            found = [*faults(notebook, len(text.encode()))]
            words = "".join(words_of(output) for cell in code_cells(notebook) for output in cell.outputs)
            if platform.node() and re.search(rf"\b{re.escape(platform.node())}\b", words):
                found.append(f"it holds the name of this machine, {platform.node()}")
            wrong += len(found)
            print("".join(f"  {fault}\n" for fault in found), end="", flush=True)
    finally:
        kaleido.stop_sync_server(silence_warnings=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
