import dataclasses
import html
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from browser import CHROMIUM, in_chromium
from defined import undefined

from probe.cli import build_parser
from probe.cli.settings import study_config
from probe.errors import ProbeError
from probe.measure import MEASUREMENTS
from probe.models import checkpoint
from probe.provenance import environment
from probe.rows import check_rows
from probe.study import PRESETS, StudyConfig, run_study
from probe.study.results import MEASURED
from probe.study.run import _result
from probe.training import TrainingConfig

PAIR_STAGES = [name for name in MEASURED if MEASUREMENTS[name].between]
ROW_STAGES = [name for name in MEASURED if not (MEASUREMENTS[name].drawn or MEASUREMENTS[name].between)]
SMALL = StudyConfig(
    encodings=("none", "t5", "alibi"),
    task="copy",
    task_options={"train_length": 5, "test_length": 10, "n_symbols": 6},
    n_train=600,
    n_validation=60,
    n_test=80,
    model={"n_layers": 2, "d_model": 32, "n_heads": 2},
    training=TrainingConfig(steps=40, batch_size=32, learning_rate=3e-3, checkpoint_every=20),
    trace_sequences=30,
    trace_length=9,
    verify_lengths=(16,),
)


def test_side_by_side_is_one_after_the_other(study, tmp_path):
    # In processes of their own, one thread each; the folder's fixture ran in this process, with one thread, too.
    _, rows, _ = study
    said, seen, told = [], [], []
    side_by_side = run_study(
        SMALL,
        tmp_path / "s",
        device="cpu",
        jobs=3,
        say=said.append,
        on_log=lambda e, entry: seen.append((e, entry)),
        on_progress=lambda *numbers: told.append(numbers),
    )
    pd.testing.assert_frame_equal(side_by_side, rows)
    assert sorted(line.split(":")[0] for line in said[:4]) == ["alibi", "constructions", "none", "t5"]
    there = [*(tmp_path / "s" / "rows").glob("*.parquet"), *(tmp_path / "s" / "models").glob("*/final")]
    assert told[0] == (0, len(there) + 1) and told == sorted(told) and told[-1] == (len(there) + 1, len(there) + 1)
    assert {e for e, _ in seen} == {*SMALL.encodings, "none-1"} and all(entry["step"] == 40 for _, entry in seen[-3:])


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    said = []
    rows = run_study(SMALL, folder, device="cpu", jobs=1, say=said.append)
    return folder, rows, said


def test_rows_say_what_they_were_made_with(study):
    folder, _, _ = study
    made_with = pd.read_parquet(folder / "rows.parquet").attrs
    assert made_with == environment(torch.device("cpu"))
    assert made_with["torch"] == torch.__version__ and made_with["device"].startswith("cpu")


def test_the_folder_holds_what_is_promised(study):
    folder, _, said = study
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    for encoding in SMALL.encodings:
        assert {f"models/{encoding}/final/model.safetensors", f"rows/probe-{encoding}.parquet"} <= there
    assert {"rows.parquet", "report.html", "study.json", "figures/accuracy.html", "figures/plotly.min.js"} <= there
    assert not [name for name in there if name.endswith(".tmp")]
    assert [line.split(":")[0] for line in said][:4] == ["none", "t5", "alibi", "constructions"]


def test_every_row_carries_its_keys(study):
    folder, rows, _ = study
    pd.testing.assert_frame_equal(rows, pd.read_parquet(folder / "rows.parquet"))
    of_models = rows[rows["measurement"].isin(ROW_STAGES)]
    assert set(rows["measurement"]) == {*ROW_STAGES, *PAIR_STAGES, "construction"}
    assert of_models["encoding"].isin(SMALL.encodings).all()
    assert of_models[["task", "seed", "metric", "value"]].notna().all().all()
    intervals = of_models[of_models["scope"] != "mean"]  # what is of mean scores has none
    assert intervals[["low", "high"]].notna().all().all()
    assert set(rows[rows["measurement"] == "probe"]["control"]) == {"none", "untrained", "embedding", "shuffled"}
    pairs = rows[(rows["measurement"] == "model_distance") & (rows["scope"] == "mean")]
    # Three pairs and two seeds of NoPE, trained and untrained, by the nearest heads and by matched ones.
    assert len(pairs) == 2 * 2 * 4
    finite = rows[rows["measurement"] != "construction"]
    assert np.isfinite(finite["value"].astype(float)).all()
    assert rows[rows["measurement"] == "construction"]["holds"].all()


def test_a_trained_t5_is_compared_with_its_own_table(study):
    _, rows, _ = study
    of_t5 = rows[(rows["measurement"] == "templates") & (rows["template"] == "t5")]
    assert set(of_t5["encoding"]) == {"t5"}


def test_every_model_is_compared_with_the_learned_t5_table(study):
    _, rows, _ = study
    table = rows[rows["measurement"] == "trained_t5"]
    assert set(table["encoding"]) == set(SMALL.encodings) and set(table["table"]) == {"t5"}
    own = rows[(rows["measurement"] == "templates") & (rows["template"] == "t5") & (rows["control"] == "none")]
    again = table[(table["encoding"] == "t5") & (table["control"] == "none")]
    np.testing.assert_array_equal(own["value"], again["value"])


def test_further_seeds_are_on_the_diagonal_and_among_the_nulls(study):
    folder, rows, _ = study
    assert (folder / "models" / "none-1" / "final").is_dir()
    accuracy = rows[(rows["measurement"] == "accuracy") & (rows["encoding"] == "none")]
    assert set(accuracy["seed"]) == {SMALL.seed, SMALL.seed + 1}
    pairs = rows[(rows["measurement"] == "model_distance") & (rows["scope"] == "mean")]
    diagonal = pairs[pairs["model_a"] == pairs["model_b"]]
    assert set(diagonal["model_a"]) == {"none"} and (diagonal["value"] > 0).all()
    templates = rows[(rows["measurement"] == "templates") & (rows["control"] == "none")]
    assert templates.groupby("encoding")["null_seed"].agg(lambda x: x.notna().all()).to_dict() == {
        "none": True,
        "t5": False,
        "alibi": False,
    }


def test_a_temperature_of_one_is_the_model_as_it_is(study):
    # Given the right tokens before, all likeliest: what greedy decoding gets right.
    _, rows, _ = study
    plain = rows[(rows["measurement"] == "temperature") & (rows["scale"] == 1) & (rows["metric"] == "exact_match")]
    decoded = rows[(rows["measurement"] == "accuracy") & rows["length"].isna() & (rows["metric"] == "exact_match")]
    decoded = decoded[decoded["seed"] == SMALL.seed].set_index(["encoding", "split"])["value"]
    assert len(plain) == 2 * len(SMALL.encodings)
    for row in plain.itertuples():
        assert row.value == pytest.approx(decoded[row.encoding, {"trained": "validation", "longer": "test"}[row.split]])


def test_heads_are_counted_and_scores_are_split(study):
    _, rows, _ = study
    census = rows[rows["measurement"] == "census"]
    heads = census.drop_duplicates(["encoding", "control", "layer", "head"])
    assert len(heads) == 3 * 2 * 4 and set(heads["control"]) == {"none", "untrained"}
    assert (heads[heads["control"] == "untrained"]["used_for"] == "not ablated").all()
    shares = rows[(rows["measurement"] == "split") & (rows["metric"] == "share")]
    sums = shares.groupby(["encoding", "control", "scope", "layer", "head"])["value"].sum()
    np.testing.assert_allclose(sums, 1)
    slopes = rows[(rows["measurement"] == "split") & (rows["metric"] == "slope") & (rows["encoding"] == "alibi")]
    by_head = slopes.groupby("head")["value"].mean()
    assert by_head[0] > by_head[1]  # ALiBi's slopes of two heads, 2^-4 and 2^-8


def test_models_start_from_weights_of_their_own(study):
    seeds = {SMALL.training_of(encoding, r).seed for encoding in SMALL.encodings for r in range(2)}
    assert len(seeds) == 6
    folder, _, _ = study
    a, b = (checkpoint.load(folder / "models" / e / "final") for e in ("none", "alibi"))
    # 40 steps move weights little: were the starts the same, these would correlate almost perfectly.
    x, y = (m.layers[0].attention.q_proj.weight.detach().flatten() for m in (a, b))
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.2


def test_only_what_was_lost_is_done_again_and_it_comes_out_the_same(study):
    folder, rows, _ = study
    lost = [folder / "rows" / f"{name}.parquet" for name in ("probe-t5", "model_distance")]
    kept = {path: path.stat().st_mtime_ns for path in (folder / "rows").glob("*.parquet") if path not in lost}
    for path in (*lost, folder / "report.html"):
        path.unlink()
    told = []
    again = run_study(SMALL, folder, device="cpu", jobs=1, on_progress=lambda *numbers: told.append(numbers))
    total = told[0][1]
    assert sorted(set(told)) == [(done, total) for done in range(total - 3, total + 1)]
    pd.testing.assert_frame_equal(again, rows)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(path.exists() for path in (*lost, folder / "report.html"))


def test_what_was_changed_in_the_folder_is_told_or_refused_in_one_line(study, tmp_path, monkeypatch):
    """Rows with a column less are a stage that failed. A model of another encoding in place of "none" is refused."""
    shutil.copytree(study[0], tmp_path / "s")
    path, models = tmp_path / "s" / "rows" / "templates-none.parquet", tmp_path / "s" / "models"
    whole = path.read_bytes()
    pd.read_parquet(path).drop(columns="value").to_parquet(path)
    rows = run_study(SMALL, tmp_path / "s", device="cpu", jobs=1)
    failed = rows[rows["metric"] == "failed"]
    assert failed[["measurement", "model"]].to_numpy().tolist() == [["templates", "none"]]
    assert f"{path.name}: must be as it was written, got another SHA" in failed["reason"].item()
    assert set(rows[rows["measurement"] == "templates"]["model"]) == {*SMALL.encodings}
    path.write_bytes(whole)
    shutil.rmtree(models / "none" / "final")
    shutil.copytree(models / "alibi" / "final", models / "none" / "final")
    with pytest.raises(ProbeError, match=r"none/final/config\.json: must be as it was written"):
        run_study(SMALL, tmp_path / "s", device="cpu", jobs=1)
    shutil.rmtree(models / "none" / "_digests")
    with pytest.raises(ProbeError, match=r"none/final: must be the model that .*/none trained, got another's"):
        run_study(SMALL, tmp_path / "s", device="cpu", jobs=1)


def test_a_killed_worker_is_one_line():
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
        pytest.raises(ProbeError, match="a process of this study was killed.* the same command goes on"),
    ):
        _result(pool.submit(_killed))


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_another_study_in_the_folder_is_refused(study):
    folder, _, _ = study
    with pytest.raises(ProbeError, match=r"it was begun with training\.steps 40, and this command says 41"):
        run_study(dataclasses.replace(SMALL, training=dataclasses.replace(SMALL.training, steps=41)), folder)


def test_the_report_says_what_was_found(study):
    folder, rows, _ = study
    page = (folder / "report.html").read_text()
    text = re.sub(r"<script[^>]*>.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL)
    for words in (
        "3 decoders (none, t5, alibi) on copy (train_length 5, test_length 10, n_symbols 6)",
        "40 steps of 32 sequences",
        "on held-out sequences of trained lengths",
        "NoPE is nearest to",
        "Position is read from hidden states after the last layer",
        "checks of hand-built weights",
        "Attention beside its templates",
        "absolute bias on keys",
        "Census of heads",
        "Models compared",
        "torch",
        "learning_rate",
    ):
        assert words in text
    accuracy = rows[(rows["measurement"] == "accuracy") & rows["length"].isna() & (rows["split"] == "validation")]
    for value in accuracy["value"]:
        assert f"{value:.3f}" in text
    assert len(page) < 5_000_000


def test_every_number_of_a_study_is_defined(study):
    assert undefined(study[1]) == []


def test_every_column_has_the_kind_that_the_schema_says(study):
    check_rows(study[1])
    with pytest.raises(ProbeError, match="the column 'layer' must hold a whole number, got a text"):
        check_rows(study[1].assign(layer="first"))
    with pytest.raises(ProbeError, match="columns of the schema, got 'my_column'"):
        check_rows(study[1].assign(my_column=1))


def test_the_report_prints_the_command_that_makes_it_again(study):
    page = (study[0] / "report.html").read_text()
    command = html.unescape(re.search(r'<code id="command">(.*?)</code>', page)[1])
    assert study_config(build_parser(["study"]).parse_args(shlex.split(command)[1:])) == SMALL


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_the_report_whole(study, tmp_path):
    folder, rows, _ = study
    script = """
      const d = wide.document, all = selector => [...d.querySelectorAll(selector)];
      await until(() => all(".plot").every(plot => plot.querySelector(".main-svg")));
      d.querySelector("[data-download=rows-data]").click();
      await until(() => wide.saved.length === 1);
      return {
        complaints: [...wide.complaints, ...phone.complaints],
        requests: [wide, phone].flatMap(at => at.performance.getEntriesByType("resource")).map(e => e.name)
          .filter(name => !/^(data|blob):/.test(name)),
        figures: all(".plot").map(plot => plot.querySelector(".main-svg") !== null),
        links: all("nav a").map(a => d.querySelector(a.getAttribute("href")) !== null),
        terms: all("[aria-describedby]").map(each => d.getElementById(each.getAttribute("aria-describedby")) !== null),
        sorted: all("table").map(table => {
          const before = [...table.tBodies[0].rows], buttons = [...table.querySelectorAll("thead button")];
          buttons.forEach(button => { button.click(); button.click(); button.click(); });
          return [...table.tBodies[0].rows].every((row, i) => row === before[i]);
        }),
        phone: phone.document.documentElement.scrollWidth,
        rows: new TextDecoder().decode(await wide.saved[0].arrayBuffer()),
      };
    """
    found = in_chromium((folder / "report.html").read_text(), script, tmp_path)
    assert found["complaints"] == [] and found["requests"] == []
    for what in ("figures", "links", "terms", "sorted"):
        assert len(found[what]) > 10 and all(found[what]), what
    assert found["phone"] <= 360
    assert found["rows"] == rows.to_csv(index=False)


def test_decoders_can_be_loaded_instead_of_trained(study, tmp_path):
    folder, rows, _ = study
    load = {"t5": str(folder / "models" / "t5" / "final")}
    config = dataclasses.replace(SMALL, encodings=("t5",), load=load)
    loaded = run_study(config, tmp_path / "loaded", device="cpu", jobs=1)
    assert not (tmp_path / "loaded" / "models").exists()

    def accuracy(r):
        kept = r[(r["measurement"] == "accuracy") & (r["encoding"] == "t5") & (r["seed"] == SMALL.seed)]
        return kept[["encoding", "length", "value"]].reset_index(drop=True)

    pd.testing.assert_frame_equal(accuracy(loaded), accuracy(rows))
    with pytest.raises(ProbeError, match="a decoder with encoding 'alibi' and 10 tokens was wanted, got 't5' and 10"):
        run_study(dataclasses.replace(SMALL, encodings=("alibi",), load={"alibi": load["t5"]}), tmp_path / "x", jobs=1)


def test_the_settings_in_the_folder_make_the_study_anew(study):
    folder, _, _ = study
    assert StudyConfig.from_dict(json.loads((folder / "study.json").read_text())) == SMALL
    assert StudyConfig.from_dict({"format": 1}) == StudyConfig()  # older settings are read, older rows are not
    with pytest.raises(ProbeError, match="a study must have one of the formats 1, 2, 3, got 4"):
        StudyConfig.from_dict({"format": 4})


def test_configs_go_through_json():
    for config in PRESETS.values():
        assert StudyConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    paper = PRESETS["paper"]
    assert (paper.model["n_layers"], paper.model["d_model"], paper.training.steps) == (12, 768, 40_000)
    assert (paper.training.learning_rate, paper.training.batch_size, paper.training.weight_decay) == (3e-5, 64, 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encodings": ("none", "rope")}, "unknown encoding 'rope'"),
        ({"encodings": ()}, "encodings must name at least one"),
        ({"encodings": ("none", "none")}, "each once"),
        ({"task": "sort"}, "unknown task 'sort'"),
        ({"model": {"heads": 3}}, "unknown option of a decoder's config 'heads'"),
        ({"model": {"n_layers": 2, "d_model": 32, "n_heads": 5}}, r"d_model \(32\) must be divisible by n_heads \(5\)"),
        ({"model": {"encoding": "t5"}}, "model must leave 'encoding' out"),
        ({"load": {"rotary": "x"}}, "load names 'rotary', which is not among the encodings"),
        ({"trace_length": 1}, "trace_length must be an integer of at least 2, got 1"),
        ({"n_test": -1}, "n_test must be an integer of at least 1, got -1"),
    ],
)
def test_bad_configs_are_one_clear_line(options, message):
    with pytest.raises(ProbeError, match=message):
        dataclasses.replace(SMALL, **options)


def test_too_long_a_trace_is_said_before_anything_runs(tmp_path):
    with pytest.raises(ProbeError, match=r"trace_length \(99\) must be short enough for at least 4"):
        run_study(dataclasses.replace(SMALL, trace_length=99), tmp_path / "x", device="cpu")
    assert not (tmp_path / "x").exists()
