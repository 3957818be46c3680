"""What is finished is what was written: rows of stages, results of a sweep, checkpoints."""

import shutil
import subprocess

import pandas as pd
import pytest

from probe.digests import check_digests, digest_file, write_finished_rows
from probe.errors import ProbeError
from probe.files import write_rows
from probe.models import checkpoint
from probe.runs import RunFolder
from probe.sweep import read_results
from probe.sweep.results import COLUMNS, read_run


def stage_file(folder, name):
    return RunFolder(folder, "study").file_of(name)


def write_stage(folder, name, measure):
    return RunFolder(folder, "study").measure(name, measure)


def read_stage(folder, name):
    return RunFolder(folder, "study").rows(name)


ROWS = pd.DataFrame({"metric": ["r2", "mse"], "value": [0.5, 0.1]})


def as_folder(path):
    path.unlink()
    path.mkdir()


TAMPERS = {
    "a missing column": lambda path: ROWS[["metric"]].to_parquet(path),
    "a folder": as_folder,
    "strings": lambda path: ROWS.astype(str).to_parquet(path),
    "no rows": lambda path: ROWS.head(0).to_parquet(path),
    "other numbers": lambda path: ROWS.assign(value=0.9).to_parquet(path),
    "another stage's": lambda path: path.write_bytes(stage_file(path.parents[1], "other").read_bytes()),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3]),
}


@pytest.mark.parametrize("tamper", TAMPERS)
def test_a_tampered_stage_is_one_line(tamper, tmp_path):
    write_stage(tmp_path, "other", lambda: ROWS.assign(value=1.0))
    assert write_stage(tmp_path, "probe-none", lambda: ROWS)
    assert not write_stage(tmp_path, "probe-none", lambda: ROWS)
    pd.testing.assert_frame_equal(read_stage(tmp_path, "probe-none"), ROWS)
    TAMPERS[tamper](stage_file(tmp_path, "probe-none"))
    for work in (lambda: read_stage(tmp_path, "probe-none"), lambda: write_stage(tmp_path, "probe-none", lambda: ROWS)):
        with pytest.raises(ProbeError, match=r"probe-none\.parquet: must be (a plain file|as it was written)"):
            work()
    pd.testing.assert_frame_equal(read_stage(tmp_path, "other"), ROWS.assign(value=1.0))


def test_rows_that_no_digest_is_of_are_measured_again(tmp_path):
    write_rows(stage_file(tmp_path, "probe-none"), ROWS.assign(value=9.0))
    with pytest.raises(ProbeError, match="got a file without a digest"):
        read_stage(tmp_path, "probe-none")
    assert write_stage(tmp_path, "probe-none", lambda: ROWS)
    pd.testing.assert_frame_equal(read_stage(tmp_path, "probe-none"), ROWS)


def test_digests_are_those_of_sha256sum(tmp_path):
    write_stage(tmp_path, "probe-none", lambda: ROWS)
    file = digest_file(stage_file(tmp_path, "probe-none"))
    done = subprocess.run(["sha256sum", "--check", file.name], cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "../probe-none.parquet: OK\n"
    assert check_digests(stage_file(tmp_path, "probe-none")) and not check_digests(tmp_path / "unknown")


def test_tampered_results_of_a_sweep_are_one_line(tmp_path):
    path = tmp_path / "results" / "a.parquet"
    row = dict.fromkeys(COLUMNS) | {"seed": 0, "train_length": 1, "status": "done"}
    whole = pd.DataFrame([row]).astype(COLUMNS)
    write_finished_rows(path, whole)
    pd.testing.assert_frame_equal(read_results(tmp_path), whole, check_dtype=False)
    assert len(pd.read_parquet(tmp_path / "results")) == 1  # one data set for any reader
    whole.assign(value=1.0).to_parquet(path)
    with pytest.raises(ProbeError, match=r"a\.parquet: must be as it was written"):
        read_results(tmp_path)
    digest_file(path).unlink()  # results that were copied without their digests are read ...
    assert read_run(path)["value"].tolist() == [1.0]
    whole.head(0).to_parquet(path)  # ... unless there is nothing in them
    with pytest.raises(ProbeError, match="must hold the results of a run, got no row"):
        read_run(path)


def test_a_tampered_checkpoint_of_a_training_is_refused(tmp_path, make_decoder):
    from probe.tasks import make_task
    from probe.training import TrainingConfig, encode, train
    from probe.training.run_folder import checkpoints_of

    task = make_task("copy", {"train_length": 4, "test_length": 8})
    data = encode(task.splits(n_train=40, n_validation=2, n_test=2).train, task.vocabulary)
    model = make_decoder(d_vocab=len(task.vocabulary), n_ctx=16, n_layers=1, d_model=8, n_heads=1).config
    config = TrainingConfig(steps=2, batch_size=4, checkpoint_every=1)
    trained = train(model, data, config, tmp_path / "run", device="cpu", keep_checkpoints=True)
    assert [step for step, _ in checkpoints_of(tmp_path / "run")] == [0, 1, 2]
    again = train(model, data, config, tmp_path / "run", device="cpu", keep_checkpoints=True)
    assert again.head.weight.equal(trained.head.weight)
    for name in ("final", "checkpoints/step-000000001"):
        path = tmp_path / "run" / name / checkpoint.WEIGHTS_FILE
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ProbeError, match=r"model\.safetensors: must be as it was written"):
            list(checkpoints_of(tmp_path / "run"))
        path.write_bytes(whole)
    train(model, data, config, tmp_path / "other", device="cpu")
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["_digests", "final", "log.jsonl", "run.json"]
    # Nothing of others is overwritten: no log without a record, and none that a link leads to.
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "new").mkdir()
    for folder in ("new", "other"):
        (tmp_path / folder / "log.jsonl").unlink(missing_ok=True)
        (tmp_path / folder / "log.jsonl").symlink_to("../notes.txt")
    with pytest.raises(ProbeError, match=r"holds 'log\.jsonl', which `probe train` would overwrite"):
        train(model, data, config, tmp_path / "new", device="cpu")
    shutil.rmtree(tmp_path / "other" / "final")
    train(model, data, config, tmp_path / "other", device="cpu")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "other" / "log.jsonl").is_symlink()
