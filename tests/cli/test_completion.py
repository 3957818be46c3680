import shutil
import subprocess

import pytest

from probe.cli import COMMANDS, main
from probe.cli.completion import SHELLS, completion_script


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """What bash offers for a line whose last word is being typed."""
    path = tmp_path_factory.mktemp("completion") / "probe.bash"
    path.write_text(completion_script("bash"))
    (path.parent / "runs").mkdir()
    (path.parent / "settings.json").write_text("{}")

    def offered(line):
        words = line.split(" ")
        # As bash calls it: the words typed so far, and the number of the one that the cursor is in.
        script = f"""
            source {path}
            COMP_WORDS=({" ".join(repr(word) for word in words)})
            COMP_CWORD={len(words) - 1}
            COMP_LINE={line!r}
            COMP_POINT={len(line)}
            $(complete -p probe | sed -E 's/.*-F ([^ ]+).*/\\1/') probe {words[-1]!r} {words[-2]!r}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=path.parent, check=True)
        return set(done.stdout.split())

    return offered


def test_every_command_is_offered(bash):
    assert set(COMMANDS) <= bash("probe ")
    assert bash("probe st") == {"study"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("probe study --enc", {"--encodings", "--encoding-options"}),
        ("probe train --encoding ro", {"rotary"}),
        ("probe study --preset ", {"default", "paper", "text"}),
        ("probe sweep --preset ", {"default", "paper"}),
        ("probe study --task pass", {"passkey"}),
        ("probe verify exact_a", {"exact_alibi"}),
        ("probe compare --device c", {"cuda", "cpu"}),
        ("probe study --bias ", {"true", "false"}),
        ("probe compare --folder ru", {"runs"}),
        ("probe compare ru", {"runs"}),
        ("probe study --config set", {"settings.json"}),
        ("probe completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_options_and_what_they_may_be_told_are_offered(bash, line, wanted):
    assert {word.rstrip("/") for word in bash(line)} >= wanted
    typed = line.split(" ")[-1]
    assert all(word.startswith(typed) for word in bash(line))


def test_values_are_those_of_the_option_alone(bash):
    assert bash("probe train --encoding al") == {"alibi", "alibi_keys", "alibi_learned"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_printed_that_the_shell_can_read(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*COMMANDS, "fitted-length", "alibi_learned"))
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
