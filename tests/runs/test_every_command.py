"""What holds for every command that measures models into a folder: whose rows they are, and that a run goes on."""

import shutil

import numpy as np
import pytest

from probe.cli import main
from probe.models.checkpoint import save
from probe.models.decoder import Decoder, DecoderConfig
from probe.runs import RunFolder
from probe.tasks import make_task

TEXT = ["--text", "texts"]
IDS = ["--tokens", "ids.npy"]
SEED = {"seed": ["--seed", "1"]}
#: By command: what it is told, and by what it is refused in a folder that was made without it.
COMMANDS = {
    "measure": ([*IDS, "--only", "entropy,maps"], {"sequences": ["--tokens", "other.npy"], **SEED}),
    "compare": (IDS, {"sequences": ["--tokens", "other.npy"], **SEED}),
    "fit": ([*IDS, "--sites", "blocks.0.hook_resid_post"], {"options": ["--targets", "position"], **SEED}),
    "examine": (
        [*IDS, "--length", "10", "--sequences", "12", "--no-ablate"],
        {"options": ["--ablate"], "sequences": ["--tokens", "other.npy"], **SEED},
    ),
    "perplexity": (
        [*TEXT, "--train-length", "96", "--contexts", "16,32", "--n-texts", "4"],
        {"options": ["--contexts", "16,24"], "texts.model.n_texts": ["--n-texts", "3"], **SEED},
    ),
    "passkey": (
        [*TEXT, "--train-length", "96", "--lengths", "96", "--depths", "0.5", "--n-prompts", "1", "--n-texts", "2"],
        {"options": ["--depths", "0.2"], "texts.model.n_prompts": ["--n-prompts", "2"], **SEED},
    ),
    "scale": (
        [*TEXT, "--train-length", "96", "--extensions", "2", "--steps", "1", "--n-prompts", "1", "--n-texts", "2"],
        {"scale": ["--steps", "2"], "n_texts": ["--n-texts", "3"], **SEED},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models of bytes of one shape, token ids, texts."""
    folder = tmp_path_factory.mktemp("home")
    d_vocab = len(make_task("passkey").vocabulary)
    for name, seed in (("a", 0), ("b", 1)):
        save(
            Decoder(DecoderConfig(d_vocab=d_vocab, n_ctx=512, n_layers=1, d_model=8, n_heads=1), seed=seed),
            folder / name,
        )
    for name, seed in (("ids", 0), ("other", 1)):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, d_vocab, (12, 10)))
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        words = " ".join("".join(rng.choice(list("abcdefgh"), 5)) for _ in range(400))
        (folder / "texts" / f"{i}.txt").write_text(words)
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def times(folder):
    return {p: p.stat().st_mtime_ns for p in sorted((folder / "rows").rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_belongs_to_one_run_which_goes_on(command, home, tmp_path, monkeypatch, capsys):
    options, others = COMMANDS[command]
    monkeypatch.chdir(home)
    shutil.rmtree("model", ignore_errors=True)
    shutil.copytree("a", "model")
    run = [command, "model", *options, "--device", "cpu", "--folder", "out"]
    measured = RunFolder.measure

    def killed(self, stage, measure):
        if any(self.path.glob("rows/*.parquet")):
            raise KeyboardInterrupt
        return measured(self, stage, measure)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "measure", killed)
        assert main(run) == (130 if command not in ("fit", "passkey") else 0)  # these have one stage
    assert main(run) == 0
    resumed = content(home / "out")
    before = times(home / "out")
    capsys.readouterr()
    # The same run again measures nothing, and leaves every byte as it was.
    assert main(run) == 0
    assert times(home / "out") == before and content(home / "out") == resumed
    # In another seed, on other sequences or with other options it is another run; so is that of other weights.
    for differs, option in others.items():
        assert main([*run, *option]) == 2
        error = capsys.readouterr().err
        assert f"holds other work: it was begun with {differs}" in error and error.count("\n") == 1
    shutil.rmtree("model")
    shutil.copytree("b", "model")
    assert main(run) == 2
    assert "holds other work: it was begun with models.model" in capsys.readouterr().err
    assert content(home / "out") == resumed
    # Never interrupted, it comes to the same bytes.
    shutil.rmtree("model")
    shutil.copytree("a", "model")
    shutil.rmtree("out")
    assert main(run) == 0
    assert content(home / "out") == resumed
    shutil.rmtree("out")
