"""Every notebook runs from top to bottom, and what is committed of it is what it says when it is run."""

import base64

import nbformat
import pytest
import refresh_notebooks
from browser import CHROMIUM
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from refresh_notebooks import FIGURE, PICTURE, code_cells, digest, execute, faults, notebooks, read, settle

PATHS = notebooks()
#: Steps of training by notebook, and the fewer that do here. Four fifths of the time were training; that the notebooks
#: were run with all steps is told by what is committed of them and by the digest of their code.
FEWER_STEPS = {
    "01_position_from_nothing": ("if FULL else 250", "if FULL else 20"),
    "02_reading_position": ("if FULL else 700", "if FULL else 40"),
    "03_what_does_nope_attention_look_like": ("if FULL else 400", "if FULL else 30"),
    "04_length_generalisation": ("if FULL else 400", "if FULL else 20"),
    "05_temperature": ("if FULL else 800", "if FULL else 40"),
    "06_your_own_model": ("dict(steps=900", "dict(steps=40"),
}


def with_fewer_steps(path):
    notebook, (steps, fewer) = read(path), FEWER_STEPS[path.stem]
    cells = [cell for cell in code_cells(notebook) if steps in cell.source]
    assert len(cells) == 1
    cells[0].source = cells[0].source.replace(steps, fewer)
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = with_fewer_steps(path)
    nbformat.validate(notebook)
    execute(notebook, tmp_path, timeout=300)
    assert all(cell.execution_count for cell in code_cells(notebook))
    stored = [[output.output_type for output in cell.outputs] for cell in code_cells(read(path))]
    # What is printed comes in one piece or in several.
    fresh = [sorted({output.output_type for output in cell.outputs}) for cell in code_cells(notebook)]
    assert fresh == [sorted(set(types)) for types in stored]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_committed_is_what_was_run(path):
    assert [*faults(read(path), path.stat().st_size)] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_asks_and_says_what_it_can_not_show(path):
    first, *_, last = [cell for cell in read(path).cells if cell.cell_type == "markdown"]
    assert first.source.startswith("# ") and "**Question.**" in first.source
    assert any("What this shows, and what it can't" in cell.source for cell in read(path).cells)
    assert len(last.source) > 200


def test_there_are_notebooks():
    assert len(PATHS) >= 5


def small(*sources: str) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_markdown_cell("# One"), *(new_code_cell(source) for source in sources)])


def drawn(figure: dict) -> bytes:
    return figure["data"][0]["name"].encode()


def test_figures_become_pictures_and_print_is_joined(tmp_path):
    shown = "import plotly.graph_objects as go\nprint('a', flush=True)\nprint('b')\ngo.Figure(go.Scatter(name='dots'))"
    notebook = small("FULL = False", shown)
    execute(notebook, tmp_path)
    figure = code_cells(notebook)[1].outputs[-1].data
    if FIGURE not in figure:  # as a browser's own renderer was chosen
        pytest.skip("plotly shows figures by another way here")
    settle(notebook, drawn)
    nbformat.validate(notebook)
    text, picture = code_cells(notebook)[1].outputs
    assert text.text == "a\nb\n"
    assert base64.b64decode(picture.data[PICTURE]) == b"dots" and set(picture.data) == {PICTURE}
    assert [*faults(notebook, 1000)] == []


def settled(*outputs, source="FULL = False\nx") -> nbformat.NotebookNode:
    notebook = small(source)
    cell = code_cells(notebook)[0]
    cell.execution_count, cell.outputs = 1, [*outputs]
    notebook.metadata["executed_code"] = digest(notebook)
    return notebook


def data(**kinds) -> nbformat.NotebookNode:
    return new_output("execute_result", data=kinds, execution_count=1)


PLAIN = data(**{"text/plain": "1"})


@pytest.mark.parametrize(
    ("notebook", "fault"),
    [
        (settled(), "has no output"),
        (settled(PLAIN, source="x"), "no line FULL = False"),
        (settled(PLAIN, source="FULL = False\ndef f():\n    return 1\nf()"), "defines a function"),
        (settled(new_output("error", ename="E", evalue="", traceback=[])), "an error or a warning"),
        (settled(new_output("stream", name="stderr", text="careful")), "an error or a warning"),
        (settled(new_output("stream", name="stdout", text="see /home/me/x")), "keeps its files: /home/"),
        (settled(data(**{"text/html": "<script src='plotly.js'>"})), "no picture"),
        (settled(data(**{FIGURE: {}})), "no picture"),
    ],
)
def test_a_fault_is_found(notebook, fault):
    found = [*faults(notebook, 1000)]
    assert len(found) == 1 and fault in found[0]


def test_nothing_is_wrong_with_a_good_one_until_it_is_changed():
    notebook = settled(PLAIN)
    assert [*faults(notebook, 1000)] == []
    assert "fewer than 1,000,000 were wanted" in next(faults(notebook, 1_000_000))
    code_cells(notebook)[0].source += " + 1"
    assert "was changed since it was run" in next(faults(notebook, 1000))
    again = settled(PLAIN)
    again.cells[0].source = "# Another title"  # words are no code
    assert [*faults(again, 1000)] == []
    code_cells(again)[0].execution_count = 2
    assert "not run once each" in next(faults(again, 1000))


def test_an_unknown_notebook_is_refused():
    with pytest.raises(SystemExit, match="'07_nothing' is no notebook; there are .*01_position_from_nothing"):
        notebooks(["07_nothing"])


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_script_draws_with_a_browser(tmp_path, monkeypatch, capsys):
    pytest.importorskip("kaleido")
    monkeypatch.setattr(refresh_notebooks, "FOLDER", tmp_path)
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    source = "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2]))"
    nbformat.write(small("FULL = False", source), tmp_path / "one.ipynb")
    assert refresh_notebooks.main([]) == 0
    assert "one.ipynb" in capsys.readouterr().out
    outputs = code_cells(read(tmp_path / "one.ipynb"))[1].outputs
    assert base64.b64decode(outputs[0].data[PICTURE]).startswith(b"\x89PNG")
