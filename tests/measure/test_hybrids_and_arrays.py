"""probe measure on what is no decoder of ours: a hybrid of transformers, and a file of arrays."""

import numpy as np
import pandas as pd
import pytest
import torch
from released import gpt_oss_with_sinks

import probe
from probe.attention import compare_templates
from probe.cli import main
from probe.measure import Case, TracedSequences, measure_models


def test_rows_about_a_layer_say_what_the_layer_is(tmp_path):
    model = probe.wrap(gpt_oss_with_sinks())
    tokens = torch.randint(0, 19, (12, 16), generator=torch.Generator().manual_seed(0))
    case = Case("oss", [model], TracedSequences(tokens, None, "random tokens"))
    rows = measure_models([case], tmp_path / "out", ["templates", "census", "use"])
    assert set(rows["measurement"]) >= {"templates", "census", "use"} and not (rows["metric"] == "failed").any()
    of_layers = rows[rows["layer"].notna()]
    assert set(of_layers["layer_kind"]) == {"attention"} and of_layers["layer_sink"].all()
    windows = of_layers.groupby("layer")["layer_window"].unique()
    assert windows[0].tolist() == [8] and windows[1].isna().all()
    assert "learned_sink" in set(rows["metric"]) and (tmp_path / "out" / "report.html").exists()


def test_a_file_of_arrays_is_measured_on_its_own_sequences(tmp_path, capsys):
    config = probe.DecoderConfig(d_vocab=19, n_ctx=16, n_layers=2, d_model=16, n_heads=2, encoding="alibi")
    decoder = probe.Decoder(config, seed=0).eval()
    tokens = torch.randint(0, 19, (24, 12), generator=torch.Generator().manual_seed(0))
    traced = probe.trace(decoder, tokens)
    names = {f"patterns.{layer}": traced.pattern(layer).numpy() for layer in (0, 1)}
    np.savez(tmp_path / "mine.npz", tokens=tokens.numpy(), **names)
    folder = str(tmp_path / "out")
    assert main(["measure", str(tmp_path / "mine.npz"), "--only", "entropy,use", "--folder", folder]) == 1
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    assert "entropy" in set(rows["measurement"])
    failed = rows[(rows["measurement"] == "use") & (rows["metric"] == "failed")]
    assert failed["reason"].str.contains("needs the model|unknown site").all() and len(failed)
    capsys.readouterr()
    assert main(["measure", str(tmp_path / "mine.npz"), "--tokens", "x.npy", "--folder", folder]) == 2
    assert "measured on the sequences that they were recorded on" in capsys.readouterr().err
    wanted = compare_templates(probe.Trace.from_file(tmp_path / "mine.npz"), ["uniform"], n_bootstrap=20)
    assert len(wanted) == 4
    with pytest.raises(probe.ProbeError, match="no such file|does not exist|was wanted"):
        probe.Trace.from_file(tmp_path / "nowhere.npz")
