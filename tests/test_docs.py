"""The documentation is built, what it says runs, and what it tells one to add can be added."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import constructions
import probe
from probe.attention import AGGREGATES, DISTANCES, TEMPLATES
from probe.cli import COMMANDS, build_parser
from probe.errors import ProbeError
from probe.measure import MEASUREMENTS as MEASURED
from probe.measure import Case, TracedSequences, measure_models, measurements
from probe.models.encodings import ENCODINGS
from probe.report.glossary import DEFINITIONS, define
from probe.rows import check_rows
from probe.study import StudyConfig
from probe.tasks import TASKS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
MEASUREMENTS = sorted((DOCS / "measurements").glob("[!i]*.md"))
HEADINGS = (
    *("Formula", "Shapes, units, range", "Beside what", "What it shows, and what it cannot", "Source"),
    "How to call it",
)


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS).with_suffix(""))


def run(path: Path, names: dict) -> dict:
    """What a page's blocks leave, one after the other."""
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), names)
    return names


@pytest.fixture(scope="session")
def start():
    """The names that the page "Start" makes and all others use."""
    return run(DOCS / "start.md", {"__name__": "docs"})


def with_code(path: Path) -> bool:
    return bool(blocks(path)) and path.name not in ("start.md", "extending.md")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if with_code(path)], ids=name_of)
def test_the_code_of_a_page_runs(path, start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(go.Figure, "show", lambda figure: None)
    run(path, dict(start))


def test_what_start_makes_is_what_other_pages_use(start):
    assert start["decoder"].config.encoding == "none" and start["tokens"].shape[1] == 14


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "shell")], ids=name_of)
def test_commands_on_a_page_are_commands(path):
    parser = build_parser(COMMANDS)
    lines = [line for block in blocks(path, "shell") for line in block.splitlines() if line.startswith("probe ")]
    for line in lines:
        parser.parse_args(shlex.split(line, comments=True)[1:])
    assert lines


@pytest.mark.parametrize("path", MEASUREMENTS, ids=name_of)
def test_a_measurement_says_all_that_there_is_to_say(path):
    text = path.read_text(encoding="utf-8")
    found = [heading for heading in re.findall(r"^## (.*)$", text, flags=re.MULTILINE) if heading in HEADINGS]
    assert found == list(HEADINGS)
    assert re.match(r"# .+\n\n\*.+\?\*\n", text), "a measurement begins with its question"
    assert blocks(path) and "\nReference: {py:" in text


def test_the_rows_of_the_pages_keep_to_the_schema():
    for path in ("extrapolation/rows", "seeds/rows", "released/mgm", "position/edits", "generalization/results/grid"):
        check_rows(pd.read_parquet(DOCS / f"{path}.parquet"))


@pytest.mark.parametrize("path", [*PAGES, DOCS.parent / "README.md"], ids=lambda path: path.stem)
def test_addresses_are_well_formed(path):
    for address in re.findall(r"\]\((\w+:[^)]*)\)", path.read_text(encoding="utf-8")):
        assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[^\s]*)?", address)


def test_every_measurement_is_listed_and_answers_a_question():
    listed, asked = ((DOCS / name).read_text(encoding="utf-8") for name in ("measurements/index.md", "questions.md"))
    for path in MEASUREMENTS:
        assert f"({path.name})" in listed
    unasked = {path.stem for path in MEASUREMENTS if f"measurements/{path.name}" not in asked}
    assert unasked == {"controls", "pair-probes", "maps"}  # of which each is beside another


# The build.


def sphinx(source: Path, out: Path) -> subprocess.CompletedProcess:
    """Build the documentation as ``make docs`` does, with the configuration of this one."""
    options = ["-W", "--keep-going", "-n", "-q", "-b", "html", "-c", str(DOCS), "-d", str(out / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out / "html")]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    done = sphinx(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_documentation_is_built_and_wants_no_network(built):
    pages = list(built.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]* (?:src|href)=\"([^\"]*)\"", page.read_text("utf-8"))
        assert not [address for address in loaded if "//" in address], page
    assert not [path for path in built.rglob("*") if path.stat().st_size > 1_000_000]


@pytest.mark.slow
def test_formulas_limits_and_words_are_on_their_pages(built):
    theory = (built / "theory.html").read_text("utf-8")
    assert theory.count("<math") > 60 and "\\frac" not in theory
    assert "odometer_three" in theory and "131,074 of 131,200" in theory
    from probe.report.glossary import DEFINITIONS

    glossary = (built / "glossary.html").read_text("utf-8")
    assert glossary.count("<dt") >= len(DEFINITIONS)
    assert all(f"probe {name}" in (built / "commands.html").read_text("utf-8") for name in COMMANDS)


FAULTS = {
    "[a page](nowhere.md)": "nowhere.md",
    "[a heading](index.md#nowhere)": "nowhere",
    "[a file](../constructions/nowhere.csv)": "nowhere.csv",
    "{py:func}`probe.attention.nowhere`": "probe.attention.nowhere",
    "{py:class}`probe.nowhere.Nowhere`": "probe.nowhere.Nowhere",
    "$\\nowhere$": "nowhere",
}


@pytest.mark.slow
def test_the_build_fails_on_broken_links(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(DOCS / "static", source / "static")
    (source / "index.md").write_text("# One page\n\n" + "\n\n".join(FAULTS))
    done = sphinx(source, tmp_path / "out")
    assert done.returncode == 1
    for fault in FAULTS.values():
        assert fault in done.stderr


@pytest.fixture
def public_names(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    import public_names

    return public_names


@pytest.mark.slow
def test_the_build_fails_on_an_undocumented_name(public_names, monkeypatch, tmp_path):
    from sphinx.cmd.build import build_main

    (tmp_path / "static").mkdir()
    (tmp_path / "index.md").write_text("# One page\n")
    options = ["-W", "--keep-going", "-n", "-q", "-c", str(DOCS), str(tmp_path), str(tmp_path / "out")]
    assert build_main(options) == 0
    monkeypatch.setattr(probe.attention.jensen_shannon, "__doc__", None)
    assert build_main(options) == 1


def test_every_public_name_says_what_it_is(public_names):
    assert public_names.undocumented(e for p in public_names.packages() for e in public_names.names_of(p)) == []


def test_what_says_nothing_is_found(public_names):
    class Silent:
        field: int

        def method(self):
            pass

        @property
        def documented(self):
            """It is."""

    Silent.__module__ = "constructions"  # one of ours
    found = public_names.undocumented([public_names.Public("Silent", Silent, "constructions")])
    path = f"constructions.{Silent.__qualname__}"
    assert [fault.partition(" wants ")[0] for fault in found] == [
        "constructions.Silent",
        f"{path}.method",
        f"{path}.field",
    ]
    assert public_names.undocumented([public_names.Public("DTYPES", (), "constructions.verification")])


# What is added by extending.md, used as a user would.


@pytest.fixture(scope="module")
def added():
    """The page's names; the dicts are afterwards what they were."""
    registries = [ENCODINGS, TASKS, TEMPLATES, DISTANCES, constructions.CONSTRUCTIONS, MEASURED, DEFINITIONS]
    before = [dict(registry) for registry in registries]
    yield run(DOCS / "extending.md", {"__name__": "docs"})
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def staircase(added, start):
    return probe.DecoderConfig(
        d_vocab=start["config"].d_vocab,
        n_ctx=32,
        n_layers=2,
        d_model=16,
        n_heads=2,
        encoding="staircase",
        encoding_options={"width": 2},
    )


@pytest.mark.slow
def test_the_encoding_trains_is_causal_saved_bridged_and_streamed(staircase, start, tmp_path):
    decoder = probe.train(staircase, start["data"], probe.TrainingConfig(steps=2, batch_size=8))
    tokens = start["tokens"][:4]
    changed = tokens.clone()
    changed[:, 9:] = 4
    torch.testing.assert_close(decoder(changed)[:, :9], decoder(tokens)[:, :9])
    probe.save(decoder, tmp_path / "model")
    assert torch.equal(probe.load(tmp_path / "model")(tokens), decoder(tokens))
    torch.testing.assert_close(probe.to_bridge(decoder)(tokens), decoder(tokens), atol=1e-5, rtol=1e-5)
    streamed = probe.stream(decoder, tokens).layers[1].first
    torch.testing.assert_close(streamed, probe.trace(decoder, tokens).pattern(1)[..., 0].float(), atol=1e-4, rtol=1e-4)


def test_the_encoding_is_what_it_says(staircase):
    bias = probe.Decoder(staircase).encoding.by_distance(torch.arange(6), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(bias[0], -probe.alibi_slopes(2)[0] * torch.tensor([0, 0, 2, 2, 4, 4]))


def test_the_encoding_is_among_a_study_s_choices(staircase):
    config = StudyConfig(encodings=("none", "staircase"))
    assert config.training_of("staircase").seed % 1000 == len(ENCODINGS) - 1
    with pytest.raises(ProbeError, match="known: .*staircase"):
        StudyConfig(encodings=("stairs",))


@pytest.mark.slow
def test_the_task_trains_and_is_evaluated(added):
    task = probe.make_task("stutter", {"train_length": 3, "test_length": 5, "n_symbols": 4})
    splits = task.splits(n_train=60, n_validation=8, n_test=20)
    assert {e.source for e in splits.train}.isdisjoint(e.source for e in splits.test)
    config = probe.DecoderConfig(d_vocab=len(task.vocabulary), n_ctx=32, n_layers=1, d_model=16, n_heads=2)
    data = probe.encode(splits.train, task.vocabulary)
    decoder = probe.train(config, data, probe.TrainingConfig(steps=2, batch_size=8))
    predictions = probe.predict(decoder, splits.test, task.vocabulary)
    example = predictions.iloc[0]
    assert example["target"].split()[::2] == example["source"].split() == example["target"].split()[1::2]
    assert probe.exact_match(predictions)["n"].iloc[0] == len(splits.test)


def test_the_template_is_fitted_and_measured_on_held_out_sequences(added, start):
    traced = start["traced"]
    rows = probe.compare_templates(traced, ["uniform", "stretched", "sink_stretched"])
    value = rows.pivot(index=["layer", "head"], columns="template", values="value")
    assert rows[rows["template"] == "stretched"]["n"].unique().tolist() == [
        len(traced.tokens) - len(traced.tokens) // 2
    ]
    assert rows[rows["template"] == "sink_stretched"]["n_parameters"].unique().tolist() == [2]
    assert (value["stretched"] < value["uniform"]).any()
    fitted = TEMPLATES["stretched"](traced.pattern(0)[:20])
    rate, distance = fitted.parameters["rate"], torch.arange(14, dtype=torch.float64)
    wanted = (-rate[:, None] * distance.sqrt()).softmax(-1).flip(-1)
    torch.testing.assert_close(fitted.pattern[:, -1], wanted)


def test_the_distance_compares_templates_and_models(added, start):
    traced = start["traced"]
    rows = probe.compare_templates(traced, ["uniform"], ["bhattacharyya", "hellinger"], nulls=False)
    assert set(rows["metric"]) == {"bhattacharyya", "hellinger"} and (rows["value"] >= 0).all()
    p, q = (row / row.sum() for row in (traced.pattern(layer)[0, 0, -1].double() for layer in (0, 1)))
    # Hellinger's squared is 1 - Σ √(p q).
    torch.testing.assert_close(DISTANCES["bhattacharyya"](p, q), -(1 - DISTANCES["hellinger"](p, q) ** 2).log())
    other = probe.trace(probe.Decoder(start["config"], seed=7), traced.tokens, ["attn.hook_pattern"])
    for aggregate in AGGREGATES:
        rows = probe.compare_models({"a": traced, "b": other}, "bhattacharyya", aggregate=aggregate, n_bootstrap=10)
        assert (rows["value"] > 0).all() and rows["value"].notna().all()


def test_the_measurement_is_measured_shown_and_defined(added, start, tmp_path):
    traced = start["traced"]
    case = Case("mine", [probe.Decoder(start["config"], seed=3)], TracedSequences(traced.tokens))
    rows = measure_models([case], tmp_path / "x", ["norms"])
    own = probe.trace(case.model, traced.tokens, ["hook_resid_post"]).values["blocks.1.hook_resid_post"]
    found = rows[(rows["control"] == "none") & (rows["site"] == "blocks.1.hook_resid_post")]
    assert found["value"].tolist() == [own.norm(dim=-1).mean().item()]
    page = (tmp_path / "x" / "report.html").read_text()
    assert "Norms of hidden states" in page and "over all tokens; at least 0." in page
    assert "norms" in set(measurements()["name"])
    with pytest.raises(ProbeError, match="'layer' is defined already"):
        define({"layer": "something else"})


def test_the_construction_is_verified_and_fails_when_a_weight_is_perturbed(added):
    rows = constructions.verify(["reciprocal"], lengths=(64, 256))
    assert len(rows) == 4 and rows["holds"].all()
    construction = constructions.CONSTRUCTIONS["reciprocal"]
    broken = constructions.perturbed(construction.build(64), "layers.0.attention.o_proj.weight", (2, 0))
    assert not construction.check(64, decoder=broken)["holds"].any()
