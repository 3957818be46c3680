"""What commands print cannot steer a terminal: names come from files and folders of others."""

import io

from probe.cli import main
from probe.cli.progress import progress
from probe.errors import printable

NASTY = "\x1b]0;pwned\x07\x1b[2Jx\u202e"


def test_names_on_stdout_are_spelt_out(tmp_path, capsys):
    rows = [f"{NASTY},s,{e},{seed},9,{a}" for e, a in (("none", 1), (NASTY, 0)) for seed in (1, 2)]
    (tmp_path / "p.csv").write_text("\n".join(["dataset,split,encoding,seed,length,accuracy", *rows]) + "\n")
    out = tmp_path / f"{NASTY}.html"
    assert main(["league", "--published", str(tmp_path / "p.csv"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert out.exists() and printed.count("\\x1b]0;pwned\\x07\\x1b[2Jx\\u202e") >= 2
    assert all(c.isprintable() or c == "\n" for c in printed)


def test_names_on_stderr_are_spelt_out(capsys, monkeypatch):
    with progress("work") as shown:
        shown.say(f"{NASTY}: measured")
    assert capsys.readouterr().err == "\\x1b]0;pwned\\x07\\x1b[2Jx\\u202e: measured\n"
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("work", 10) as shown:
        shown.say(f"{NASTY}: measured")
        shown.on_log(NASTY, {"loss": 1.0, "step": 5})
    written = terminal.getvalue()
    assert "\\x1b]0;pwned\\x07" in written and "\x1b]0" not in written and "\x07" not in written


def test_lines_and_words_stay():
    assert printable("a\tb\nλ ≥ 1 – „x“") == "a\tb\nλ ≥ 1 – „x“"
