import argparse
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from probe.cli import COMMANDS, _as_typed, build_parser, main
from probe.models.encodings import ENCODINGS

TINY = [
    "--task",
    "copy",
    "--task-options",
    "train_length=4,test_length=8,n_symbols=5",
    "--n-train",
    "200",
    "--n-validation",
    "40",
    "--n-test",
    "40",
    "--n-layers",
    "1",
    "--d-model",
    "16",
    "--n-heads",
    "2",
    "--steps",
    "5",
    "--trace-sequences",
    "12",
    "--trace-length",
    "7",
    "--verify-lengths",
    "16",
    "--device",
    "cpu",
]


def run(*arguments):
    """The installed command, as a user runs it."""
    return subprocess.run([sys.executable, "-m", "probe", *arguments], capture_output=True, text=True)


def test_study_from_flags(tmp_path, capsys):
    done = run("study", "--folder", str(tmp_path / "s"), "--encodings", "none,rotary", *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "s" / "report.html")
    settings = json.loads((tmp_path / "s" / "study.json").read_text())
    assert settings["encodings"] == ["none", "rotary"]
    assert settings["model"] == {"n_layers": 1, "d_model": 16, "n_heads": 2}
    assert settings["training"]["steps"] == 5

    # Again, with nothing left to be done: its rows on stdout, and nothing else there.
    arguments = ["study", "--folder", str(tmp_path / "s"), "--encodings", "none,rotary", *TINY, "--jobs", "1", "--json"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = pd.read_parquet(tmp_path / "s" / "rows.parquet")
    np.testing.assert_array_equal([row["value"] for row in rows], kept["value"])
    assert [row["measurement"] for row in rows] == kept["measurement"].tolist()


def test_models_are_listed(capsys):
    from probe.models.families import FAMILIES
    from probe.models.open.kinds import KINDS, KINDS_OF

    assert main(["models"]) == 0
    version, _, head, *lines = capsys.readouterr().out.splitlines()
    assert f"transformers {KINDS_OF}" in version
    assert head.split("  ")[0] == "model_type" and "exact against" in head
    assert [line.split()[0] for line in lines] == [*FAMILIES, *KINDS]
    assert next(line for line in lines if line.startswith("opt ")).split()[1:4] == ["learned", "our", "decoder,"]
    assert main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["loaded as"].split()[0] for row in rows} == {"our", "transformers'"}


def test_a_model_is_checked_without_measuring(tmp_path, capsys):
    from decoder_classes import build

    build("granitemoehybrid").save_pretrained(tmp_path / "granite")
    build("llama").save_pretrained(tmp_path / "llama")
    build("mamba").save_pretrained(tmp_path / "mamba")
    assert main(["models", "--check", str(tmp_path / "granite"), "--device", "cpu"]) == 0
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    said = {name.strip(): value.strip() for name, value in said.items()}
    assert said["loaded as"] == "transformers' GraniteMoeHybridForCausalLM, through its attention"
    assert said["layers"] == "2 recurrence, 2 without position"
    assert float(said["error of logits"].split()[0]) < 1e-5 > float(said["error of patterns"].split()[0])
    assert said["error of patterns"].endswith("in 2 layers")
    assert said["sites"].startswith("hook_embed, hook_resid_pre, hook_resid_post, attn.hook_rot_q")
    assert main(["models", "--check", str(tmp_path / "llama"), "--device", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["loaded as"] == "our decoder" and said["layers"] == "4 rotary"
    assert main(["models", "--check", str(tmp_path / "mamba"), "--device", "cpu"]) == 1
    refused = capsys.readouterr().err
    assert refused.startswith(f"probe: {tmp_path / 'mamba'}: ") and refused.count("\n") == 1
    assert main(["models", "--check", str(tmp_path / "missing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path, monkeypatch):
    seen = {}

    def seeing(config, folder, **options):
        seen["config"] = config
        return pd.DataFrame({"metric": []})

    monkeypatch.setattr("probe.study.run_study", seeing)
    (tmp_path / "c.json").write_text(json.dumps({"seed": 3, "training": {"steps": 7, "batch_size": 9}}))
    assert main(["study", "--config", str(tmp_path / "c.json"), "--steps", "8", "--dropout", "0.1"]) == 0
    config = seen["config"]
    assert (config.seed, config.training.steps, config.training.batch_size) == (3, 8, 9)
    assert config.training.learning_rate == 1e-3
    assert config.model == {"n_layers": 3, "d_model": 128, "n_heads": 4, "dropout": 0.1}
    main(["study", "--preset", "paper", "--bias", "false", "--task", "copy"])
    assert seen["config"].model["n_layers"] == 12
    assert seen["config"].model["bias"] is False
    assert seen["config"].task_options == {}
    (tmp_path / "c.json").write_text(json.dumps({"task": "reverse"}))
    main(["study", "--config", str(tmp_path / "c.json")])
    assert (seen["config"].task, seen["config"].task_options) == ("reverse", {})
    main(["study", "--config", str(tmp_path / "c.json"), "--task-options", "train_length=3,test_length=9"])
    assert seen["config"].task_options == {"train_length": 3, "test_length": 9}


def test_verify_prints_every_claim_and_says_whether_it_holds(capsys, told):
    assert main(["verify", "absolute_position", "--lengths", "16,64", "--dtypes", "float64"]) == 0
    out = capsys.readouterr().out
    assert out.count("absolute_position") == 4
    assert told.to_the_end() == (0, 2)
    assert main(["verify", "--lengths", "16", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["dtype"] for row in rows} == {"float64", "float32"}
    assert all(row["holds"] for row in rows)


def test_a_claim_that_does_not_hold_is_status_1(monkeypatch, capsys):
    import constructions

    rows = constructions.verify(["absolute_position"], lengths=(16,))
    monkeypatch.setattr("constructions.verify", lambda *a, **k: rows.assign(holds=False))
    assert main(["verify"]) == 1


TINY_TRAINING = [
    a
    for i, a in enumerate(TINY)
    if not {TINY[i], TINY[i - 1]} & {"--trace-sequences", "--trace-length", "--verify-lengths"}
]


def test_train_trains_one_decoder(tmp_path):
    done = run("train", "--folder", str(tmp_path / "run"), "--encoding", "t5", *TINY_TRAINING)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_fit_over_training_probes_every_checkpoint(tmp_path, capsys):
    kept = ["--keep-checkpoints", "--checkpoint-every", "2"]
    assert main(["train", "--folder", str(tmp_path / "run"), *TINY_TRAINING, *kept]) == 0
    tokens = torch.randint(4, 9, (24, 9), generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "tokens.npy", tokens)
    fit = ["fit", f"nope={tmp_path / 'run'}", "--tokens", str(tmp_path / "tokens.npy"), "--targets", "position"]
    assert main([*fit, "--over-training", "--folder", str(tmp_path / "fit")]) == 0
    rows = pd.read_parquet(tmp_path / "fit" / "rows.parquet")
    over = rows[rows["measurement"] == "over_training"]
    assert sorted(set(over["step"])) == [0, 2, 4, 5] and set(over["metric"]) == {"r2", "loss"}
    assert "over the training of nope" in (tmp_path / "fit" / "report.html").read_text()
    capsys.readouterr()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    assert main([*fit, "--over-training", "--folder", str(tmp_path / "another")]) == 2
    assert "a finished run that kept its checkpoints was wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "--colour", "red"], "unrecognized arguments: --colour red; probe study --help says what there is"),
        (["study", "--stpes", "5"], "unrecognized arguments: --stpes 5; did you mean --steps?"),
        (["study", "--encodings", "none,rotray"], "xpos; did you mean 'rotary'?"),
        (["study", "--encodings", "none,rope"], "unknown encoding 'rope'; known: alibi, alibi_keys, alibi_learned"),
        (["study", "--task", "sort"], "unknown task 'sort'; known: addition, copy, jsonl, lego, parity, passkey, pcfg"),
        (["study", "--steps", "0"], "steps must be an integer of at least 1, got 0"),
        (["study", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["study", "--n-layers", "-2"], "n_layers must be an integer of at least 1, got -2"),
        (["study", "--task-options", "train_length"], "NAME=VALUE was wanted, got 'train_length'"),
        (["study", "--preset", "huge"], "unknown preset 'huge'; known: default, paper"),
        (["study", "--config", "nowhere.json"], "nowhere.json: no such file"),
        (["study", "--device", "tpu"], "device must be one of cuda, mps, cpu, got 'tpu'"),
        (["study", "--jobs", "0"], "jobs must be an integer of at least 1, got 0"),
        (["verify", "theorem_9"], "unknown construction 'theorem_9'"),
        (["verify", "--dtypes", "int8"], "unknown dtype 'int8'; known: bfloat16, float16, float32, float64"),
        (["verify", "--lengths", "99999999"], "99999999"),
        (["verify", "--lengths", "16,x"], "integers with commas between them were wanted, got '16,x'"),
        (["studdy"], "unknown command 'studdy'; did you mean 'study'?"),
        (
            ["dance"],
            "unknown command 'dance'; known: benchmark, census, compare, completion, doctor, examine, figures, fit",
        ),
        ([], "the following arguments are required: COMMAND (probe --help says what there is)"),
        (["compare"], "the following arguments are required: MODEL (probe compare --help says what there is)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("probe: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must be a JSON object, got list"),
        ('{"speed": 1}', "unknown option of a study 'speed'"),
        ('{"training": {"speed": 1}}', "unknown option of a study's training 'speed'"),
        ('{"training": 1}', "'training' of a study must be an object, got 1"),
        ('{"model": []}', "'model' of a study must be an object, got []"),
        ('{"task_options": 1}', "'task_options' of a study must be an object, got 1"),
        ('{"encodings": "none"}', "'encodings' of a study must be a list of strings, got 'none'"),
        ('{"verify_lengths": ["x"]}', "'verify_lengths' of a study must be a list of integers, got ['x']"),
        ('{"seeds": {"none": "x"}}', "'seeds' of a study must be an object of integers, got {'none': 'x'}"),
    ],
)
def test_a_bad_file_is_one_line_and_status_2(text, message, capsys, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(text)
    assert main(["study", "--config", str(path), "--folder", str(tmp_path / "s"), "--steps", "3"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_wrong_type_in_a_file_is_one_line_too(tmp_path):
    # In a process of its own: in this one the tests' type checker would see it first.
    path = tmp_path / "c.json"
    path.write_text('{"model": {"bias": 1, "n_layers": 1, "d_model": 8, "n_heads": 2}}')
    done = run("study", "--config", str(path), "--folder", str(tmp_path / "s"))
    assert (done.returncode, done.stdout) == (2, "")
    said = "bias must be true, false or a list of parts out of norm, qkv, attn_out, mlp, got 1"
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("study", "--folder", str(tmp_path / "file" / "s"), *TINY)
    assert done.returncode == 2
    assert done.stderr.startswith("probe: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [*COMMANDS])
def test_an_interrupted_command_says_how_to_go_on_if_it_can(name, monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(add=lambda parser: None, run=interrupted))
    monkeypatch.setattr(sys, "argv", ["/somewhere/probe", "ignored"])
    monkeypatch.setattr("shutil.which", {"probe": "/somewhere/probe"}.get)
    assert main([name]) == 130
    going_on = f"; what was finished is kept, and this goes on from there: probe {name}"
    finds_its_work = name not in (
        "census",
        "verify",
        "benchmark",
        "figures",
        "models",
        "doctor",
        "completion",
        "league",
        "portrait",
    )
    assert capsys.readouterr().err == f"probe: interrupted{going_on if finds_its_work else ''}\n"


def test_the_command_to_go_on_with_is_quoted_and_runs_this_probe(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/other/{name}")
    monkeypatch.setattr(sys, "argv", ["/an env/bin/probe"])
    assert _as_typed(["study", "--folder", "a b"]) == "'/an env/bin/probe' study --folder 'a b'"
    monkeypatch.setattr(sys, "argv", ["/site-packages/probe/__main__.py"])
    assert _as_typed(["study"]) == f"{sys.executable} -m probe study"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert _as_typed(["train"]) == "accelerate launch -m probe train"


def test_who_reads_no_further_is_not_told_off():
    code = "import sys; from probe.cli import COMMANDS, main\n"
    code += "COMMANDS['say'] = COMMANDS['models']._replace(run=lambda options: print('rows', flush=True))\n"
    code += "sys.exit(main(['say']))"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    with command.stderr as said:
        assert said.read() == b""
    assert command.wait() == 141


def test_help_is_quick():
    """No command's options are wanted, and what they come from is not imported."""
    code = "import sys; from probe.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(*sorted({'torch', 'pandas', 'numpy', 'rich', 'shtab', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n\n") and "completion" in done.stdout


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["study", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--encodings", "--n-layers", "--position-layers", "--learning-rate", "--mixed-precision", "--preset"):
        assert flag in text


def test_every_option_says_what_it_is_and_what_holds_without_it():
    commands = next(a for a in build_parser(COMMANDS)._actions if isinstance(a, argparse._SubParsersAction))
    helps = {name: {a.dest: a.help for a in parser._actions} for name, parser in commands.choices.items()}
    assert set(helps) == set(COMMANDS)
    assert not [(name, option) for name, of in helps.items() for option, text in of.items() if not text]
    study, sweep = helps["study"], helps["sweep"]
    assert study[".encodings"] == f"Any of {', '.join(ENCODINGS)} (default: none,t5,alibi,rotary,sinusoidal)"
    assert study["model.n_layers"] == "blocks (default: 3)"  # the study's, where the decoder's config has none
    assert (study["training.steps"], sweep["training.steps"]) == (
        "of the optimizer, AdamW (default: 1000)",
        "of the optimizer, AdamW (default: 2000)",
    )
    assert study["model.d_head"] == "dimensions of a head"  # follows from the others
    assert study["training.warmup"] == "share of the steps (default: 0.06)"
    assert sweep[".tasks"].endswith("(default: copy,reverse)")
    assert study[".load"] == "encoding -> checkpoint or released model, not trained here"
