import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

import probe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_in_the_readme_runs(monkeypatch, tmp_path, make_decoder):
    monkeypatch.chdir(tmp_path)
    d_vocab = len(probe.make_task("scan").vocabulary)
    probe.save(make_decoder(d_vocab=d_vocab), "runs/demo/models/none/final")  # what `make demo` leaves there
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda figure: shown.append(figure))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, names)  # the README's own code
    assert len(shown) == 2
    assert names["decoder"].config.encoding == "none"
