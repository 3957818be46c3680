import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jaxtyping
import pytest
import torch

from probe.cli import main
from probe.device import fast_products
from probe.errors import ProbeError
from probe.models import checkpoint
from probe.models.decoder import Decoder
from probe.models.encodings import ENCODINGS
from probe.training import TrainingConfig, checkpoints_of, encode, exact_match, predict, train
from probe.training.data import BatchOrder

# What a user's script does; the slow log makes it likely that the kill falls between two checkpoints.
SCRIPT = """
import sys, time, torch
from probe.models.decoder import DecoderConfig
from probe.tasks import make_task
from probe.training import TrainingConfig, encode, train
torch.set_num_threads(1)
task = make_task("copy", {"train_length": 5, "test_length": 10, "n_symbols": 6})
data = encode(task.splits(n_train=2000, n_validation=100, n_test=200).train, task.vocabulary)
small = DecoderConfig.from_json(sys.argv[2])
quick = TrainingConfig(steps=30, batch_size=16, learning_rate=3e-3, log_every=5, checkpoint_every=10)
train(small, data, quick, sys.argv[1], device="cpu", on_log=lambda entry: time.sleep(float(sys.argv[3])))
"""


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="session")
def unbroken(small, data, quick):
    return train(small, data, quick, device="cpu")


def test_a_run_killed_and_started_again_is_bit_identical(small, data, quick, unbroken, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(folder), small.to_json(), "0.3"]
    run = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step-000000020").is_dir():
        assert run.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (folder / "final").exists()
    train(small, data, quick, folder, device="cpu")  # the same run, in another process than the killed one
    assert same_weights(checkpoint.load(folder / "final"), unbroken)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [5, 10, 15, 20, 25, 30]
    assert set(log[0]) == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "data_share"}
    assert all(0 <= entry["data_share"] <= 1 for entry in log)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_while_an_older_checkpoint_is_removed_leaves_nothing_for_good(
    after, small, data, quick, unbroken, tmp_path, monkeypatch
):
    remove = shutil.rmtree

    def killed(path, *args, **kwargs):
        if str(path).endswith("step-000000010"):
            if after:
                remove(path)
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        train(small, data, quick, tmp_path, device="cpu")
    assert same_weights(train(small, data, quick, tmp_path, device="cpu"), unbroken)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_broken_off_by_an_error_goes_on(small, data, quick, unbroken, tmp_path):
    class Stop(Exception):
        pass

    def stop_at_25(entry):
        if entry["step"] == 25:
            raise Stop

    with pytest.raises(Stop):
        train(small, data, quick, tmp_path, device="cpu", on_log=stop_at_25)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-000000020"]
    steps = []
    resumed = train(small, data, quick, tmp_path, device="cpu", on_log=lambda entry: steps.append(entry["step"]))
    assert steps == [25, 30]
    assert same_weights(resumed, unbroken)


def test_a_finished_run_is_loaded_and_another_one_refused(small, data, quick, unbroken, tmp_path):
    train(small, data, quick, tmp_path, device="cpu")
    again = train(small, data, quick, tmp_path, device="cpu", on_log=lambda entry: pytest.fail("it trained again"))
    assert same_weights(again, unbroken)
    assert not again.training
    with pytest.raises(ProbeError, match=r"it was begun with training\.steps 30, and this command says 31"):
        train(small, data, dataclasses.replace(quick, steps=31), tmp_path, device="cpu")
    with pytest.raises(ProbeError, match=r"holds other work: it was begun with data "):
        train(small, dataclasses.replace(data, tokens=data.tokens.flip(0)), quick, tmp_path, device="cpu")


def test_old_keywords_train_the_same_model(small, data, quick, unbroken):
    with pytest.warns(DeprecationWarning, match="argument '(model|config)' of train is now '(config|training)'"):
        trained = train(model=small, data=data, config=quick, device="cpu")
    assert same_weights(trained, unbroken)


def test_training_goes_on_from_given_weights(small, data, quick, unbroken, tmp_path):
    still = dataclasses.replace(quick, steps=1, learning_rate=1e-9)
    went_on = train(small, data, still, tmp_path / "run", device="cpu", initial=unbroken)
    for after, before in zip(went_on.parameters(), unbroken.parameters(), strict=True):
        assert torch.allclose(after, before, atol=1e-7)
    assert not same_weights(train(small, data, still, device="cpu"), unbroken)
    # The weights are part of what a run is.
    assert same_weights(train(small, data, still, tmp_path / "run", device="cpu", initial=unbroken), went_on)
    with pytest.raises(ProbeError, match="holds other work: it was begun with initial"):
        train(small, data, still, tmp_path / "run", device="cpu", initial=Decoder(small, seed=5))
    with pytest.raises(ProbeError, match="initial must be a model of the config that is trained"):
        train(small, data, still, device="cpu", initial=Decoder(dataclasses.replace(small, dropout=0.0)))


def test_a_truncated_checkpoint_is_named(small, data, quick, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(small, data, quick, tmp_path, device="cpu", on_log=interrupt_at_25)
    path = tmp_path / "checkpoints" / "step-000000020" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ProbeError, match=r"optimizer\.safetensors: must be as it was written"):
        train(small, data, quick, tmp_path, device="cpu")


def interrupt_at_25(entry):
    if entry["step"] == 25:
        raise KeyboardInterrupt


def test_the_seed_decides_everything_and_the_global_generator_is_left_alone(small, data, quick, unbroken):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same_weights(train(small, data, quick, device="cpu"), unbroken)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same_weights(train(small, data, dataclasses.replace(quick, seed=1), device="cpu"), unbroken)


def test_one_step_is_what_torchs_own_adamw_and_autograd_make_of_it(small, data):
    config = TrainingConfig(steps=1, batch_size=8, learning_rate=0.01, weight_decay=0.1, clip_norm=0.5, warmup=0.0)
    model = dataclasses.replace(small, dropout=0.0)
    trained = train(model, data, config, device="cpu")
    ours = Decoder(model, seed=0)
    batch = data.batch(BatchOrder(data.lengths, 8, seed=0).rows(0))
    with fast_products(torch.device("cpu")):  # the bias of keys has no gradient but rounding, and Adam makes it large
        logits = ours(batch.inputs)
        loss = torch.nn.functional.cross_entropy(logits[batch.scored], batch.targets[batch.scored])
        loss.backward()
    torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
    groups = [
        {"params": [p for p in ours.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in ours.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.01).step()
    for (name, mine), theirs in zip(trained.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4, msg=name)


# For runs that are equal but for rounding. Other shapes and kernels draw other dropout masks; and the gradient of a
# key's bias is rounding alone, 0 in truth (it shifts all scores of a query alike), of which AdamW makes whole steps.
SMOOTH = {"dropout": 0.0, "bias": False}


def test_accumulated_gradients_are_those_of_the_whole_batch(small, data, quick, monkeypatch):
    from accelerate import Accelerator

    unsynchronised = []
    no_sync = Accelerator.no_sync
    monkeypatch.setattr(Accelerator, "no_sync", lambda self, model: unsynchronised.append(1) or no_sync(self, model))
    model = dataclasses.replace(small, **SMOOTH)
    runs = {}
    for accumulation in (1, 4):
        log = []
        config = dataclasses.replace(quick, steps=5, log_every=1, warmup=0.0, accumulation=accumulation)
        runs[accumulation] = train(model, data, config, device="cpu", on_log=log.append), log
    assert len(unsynchronised) == 5 * 3  # all parts of a step but the last
    (whole, whole_log), (parts, parts_log) = runs.values()
    for key in ("loss", "gradient_norm"):
        assert [e[key] for e in parts_log] == pytest.approx([e[key] for e in whole_log], rel=1e-4)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


# In a process of its own, because the tests' shape checks cannot be compiled.
COMPILED = """
import json, sys
from torch._dynamo.utils import counters
from probe.models.decoder import Decoder, DecoderConfig
from probe.tasks import make_task
from probe.training import TrainingConfig, encode, train
task = make_task("copy", {"train_length": 5, "test_length": 10, "n_symbols": 6})
data = encode(task.splits(n_train=2000, n_validation=100, n_test=200).train, task.vocabulary)
small = DecoderConfig.from_json(sys.argv[2])
config = TrainingConfig(steps=12, batch_size=16, learning_rate=3e-3, log_every=1, compile=True)
graphs = []
found = train(small, data, config, sys.argv[1], device="cpu",
              on_log=lambda entry: graphs.append(counters["stats"]["unique_graphs"]))
plain = [type(m) for m in found.modules()] == [type(m) for m in Decoder(small).modules()]
print(json.dumps({"graphs": graphs, "plain": plain, "training": any(m.training for m in found.modules())}))
"""
has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler, reason="torch.compile wants a C++ compiler")
def test_compiled_training_is_training(small, data, quick, tmp_path):
    model = dataclasses.replace(small, **SMOOTH)
    command = [sys.executable, "-c", COMPILED, str(tmp_path), model.to_json()]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert said["plain"] and not said["training"]
    order = BatchOrder(data.lengths, 16, seed=0)
    assert len({int(data.lengths[order.rows(step)].max()) for step in range(12)}) >= 3
    assert len(set(said["graphs"])) == 1 and said["graphs"][0] > 0  # in the first step, for batches of every length
    uncompiled = train(model, data, dataclasses.replace(quick, steps=12), device="cpu")
    compiled = checkpoint.load(tmp_path / "final")
    for (name, a), b in zip(uncompiled.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_gpu_in_bf16_learns_as_the_cpu_does(small, data, quick):
    losses = []
    for device, options in (("cpu", {}), ("cuda", {"mixed_precision": "bf16", "compile": True, "accumulation": 2})):
        log = []
        model, config = dataclasses.replace(small, **SMOOTH), dataclasses.replace(quick, **options)
        train(model, data, config, device=device, on_log=log.append)
        losses.append([entry["loss"] for entry in log])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_learning_rate_rises_and_falls_to_zero():
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[9:] == pytest.approx([min(1.0, (100 - s) / 90) for s in range(9, 100)])


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_learns(encoding, task, splits, data, small, monkeypatch):
    # Shapes are checked where each encoding is tested, and here they would be checked five hundred times.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = dataclasses.replace(small, encoding=encoding, dropout=0.0, n_ctx=32)
    # Copying five of six symbols is learned; NoPE, which must build its own positions, is the slowest.
    # Transformer-XL comes to 0.87 in 500 steps; randomized positions have 2048 of them to learn.
    steps = {"transformer_xl": 700, "randomized": 1400}.get(encoding, 500)
    config = TrainingConfig(steps=steps, batch_size=32, learning_rate=4e-3, weight_decay=0.01)
    decoder = train(model, data, config, device="cpu")
    rows = exact_match(predict(decoder, splits.validation, task.vocabulary))
    assert rows["value"][0] > (0.6 if encoding == "none" else 0.9)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    # The launcher that several GPUs are started with, on two CPU processes.
    options = ["--task", "copy", "--task-options", "train_length=4,test_length=8,n_symbols=5", "--n-train", "200",
               "--n-validation", "40", "--n-test", "40", "--n-layers", "1", "--d-model", "16", "--n-heads", "2",
               "--steps", "20", "--log-every", "1", "--checkpoint-every", "10", "--device", "cpu"]  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    assert main(["train", "--folder", str(tmp_path / "one"), *options]) == 0
    # In two parts each: the last of them is all that there is without accumulation.
    command = [sys.executable, *launch, "-m", "probe", "train", "--folder", str(tmp_path / "four"), *options,
               "--accumulation", "2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, four = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "four")
    )
    assert [entry["step"] for entry in four] == list(range(1, 21))
    for key in ("loss", "gradient_norm"):
        assert [e[key] for e in four] == pytest.approx([e[key] for e in one], rel=1e-3)


def test_mixed_precision_trains(small, data, quick):
    decoder = train(small, data, dataclasses.replace(quick, mixed_precision="bf16", steps=3), device="cpu")
    assert decoder.dtype == torch.float32
    assert all(p.isfinite().all() for p in decoder.parameters())
    assert decoder(data.tokens[:2, :-1]).dtype == torch.float32


def test_a_loss_that_is_not_finite_is_said(small, data, quick):
    with pytest.raises(ProbeError, match="the loss became (nan|inf) at step 30: a smaller learning_rate than 1e"):
        train(small, data, dataclasses.replace(quick, learning_rate=1e30, log_every=30), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be a number above 0, got -1.0"),
        ({"warmup": 1.5}, "warmup must be a number at least 0 and below 1, got 1.5"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, got 'fp8'"),
        ({"accumulation": 0}, "accumulation must be an integer of at least 1, got 0"),
        ({"batch_size": 64, "accumulation": 3}, r"batch_size \(64\) must be divisible by accumulation \(3\)"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_configs_are_one_clear_line(options, message):
    with pytest.raises(ProbeError, match=message):
        TrainingConfig(**options)


def test_examples_must_be_there(task):
    with pytest.raises(ProbeError, match="at least one example was wanted"):
        encode([], task.vocabulary)


def test_checkpoints_are_kept_where_they_are_wanted(small, data, quick, unbroken, tmp_path):
    kept = train(small, data, quick, tmp_path / "kept", device="cpu", keep_checkpoints=True)
    found = dict(checkpoints_of(tmp_path / "kept"))
    assert list(found) == [0, 10, 20, 30]
    assert same_weights(found[0], Decoder(small, seed=quick.seed))
    assert same_weights(found[30], kept) and same_weights(kept, unbroken)
    assert not same_weights(found[20], kept)
    assert not list((tmp_path / "kept").rglob("optimizer.safetensors"))
    train(small, data, quick, tmp_path / "not", device="cpu")
    with pytest.raises(ProbeError, match="a finished run that kept its checkpoints was wanted"):
        next(checkpoints_of(tmp_path / "not"))
