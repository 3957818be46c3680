import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from probe.errors import ProbeError
from probe.models import untrained_twin
from probe.models.anatomy import n_heads_of, n_layers_of
from probe.models.checkpoint import load, save
from probe.models.clockwork import ClockworkConfig, ClockworkRNN
from probe.models.decoder import Decoder, DecoderConfig
from probe.models.kinds import build, config_from_dict
from probe.position import decompose_hidden, erase_position, fit_position_probe, probe_positions
from probe.tasks import make_task
from probe.tracing import logits_with_edits, trace
from probe.training import TrainingConfig, encode, exact_match, greedy, predict, train

SITES = ["hook_embed", "hook_resid_post"]


def make_rnn(seed=0, **options) -> ClockworkRNN:
    defaults = {"d_vocab": 19, "d_model": 24, "n_modules": 4, "n_layers": 2}
    return ClockworkRNN(ClockworkConfig(**(defaults | options)), seed=seed).eval()


def with_biases(model: ClockworkRNN) -> ClockworkRNN:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.layers:
            layer.b.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def task():
    return make_task("copy", {"train_length": 5, "test_length": 10, "n_symbols": 6})


@pytest.fixture(scope="module")
def splits(task):
    return task.splits(n_train=2000, n_validation=200, n_test=40)


@pytest.fixture(scope="module")
def data(task, splits):
    return encode(splits.train, task.vocabulary)


@pytest.fixture(scope="module")
def small(task):
    return ClockworkConfig(d_vocab=len(task.vocabulary), d_model=32, n_modules=4, n_layers=2, dropout=0.1)


@pytest.fixture(scope="module")
def quick():
    return TrainingConfig(steps=30, batch_size=16, learning_rate=3e-3, log_every=5, checkpoint_every=10)


# ---- the recurrence, beside two oracles


def by_the_paper(model: ClockworkRNN, tokens: torch.Tensor, start: int = 0) -> np.ndarray:
    """Koutník et al. 2014, Eq. 1 to 4, a module at a time, in numpy; W_H masked by an explicit matrix."""
    config = model.config
    size = config.d_model // config.n_modules
    mask = np.zeros((config.d_model, config.d_model))
    for i in range(config.n_modules):
        for j in range(i, config.n_modules):
            mask[i * size : (i + 1) * size, j * size : (j + 1) * size] = 1
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    out = []
    for sequence in tokens.tolist():
        x = [state["token_embedding.weight"][token] for token in sequence]
        for layer in range(config.n_layers):
            W_I, W_H, b = (state[f"layers.{layer}.{name}"] for name in ("W_I", "W_H", "b"))
            h, states = np.zeros(config.d_model), []
            for t, x_t in enumerate(x):
                new = h.copy()
                for i, period in enumerate(config.periods):
                    if (start + t) % period == 0:
                        unit = slice(i * size, (i + 1) * size)
                        new[unit] = np.tanh((W_H * mask)[unit] @ h + W_I[unit] @ x_t + b[unit])
                h = new
                states.append(h)
            x = states
        out.append([state["head.weight"] @ h for h in x])
    return np.array(out)


@pytest.mark.parametrize("periods", [None, (1, 1, 1, 1), (1, 2, 3, 5), (2, 3, 3, 7), (1, 1, 8, 100)])
@pytest.mark.parametrize("start", [0, 3])
def test_it_is_the_papers_recurrence(periods, start, random_tokens):
    model, tokens = with_biases(make_rnn(periods=periods).double()), random_tokens(length=20)
    with torch.no_grad():  # what stands below the diagonal is not read
        for layer in model.layers:
            layer.W_H.add_(~layer.reads())
    found = model(tokens, positions=torch.arange(start, start + 20)).detach().numpy()
    np.testing.assert_allclose(found, by_the_paper(model, tokens, start), atol=1e-12)


def test_without_a_clock_it_is_torchs_rnn(random_tokens):
    model, tokens = with_biases(make_rnn(periods=(1, 1, 1, 1)).double()), random_tokens()
    rnn = torch.nn.RNN(24, 24, num_layers=2, batch_first=True).double()
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            getattr(rnn, f"weight_ih_l{i}").copy_(layer.W_I)
            getattr(rnn, f"weight_hh_l{i}").copy_(layer.W_H)
            getattr(rnn, f"bias_ih_l{i}").copy_(layer.b)
            getattr(rnn, f"bias_hh_l{i}").zero_()
    torch.testing.assert_close(model(tokens), model.head(rnn(model.token_embedding(tokens))[0]))


@pytest.mark.parametrize("periods", [(1, 2, 4, 8), (2, 3, 5, 7)])
def test_a_module_changes_at_its_times_and_at_no_other(periods, random_tokens):
    traced = trace(make_rnn(periods=periods), random_tokens(length=30), ["hook_resid_post"])
    for layer in range(2):
        states = traced.hidden(f"blocks.{layer}.hook_resid_post").unflatten(-1, (4, 6))
        changed = (states[:, 1:] != states[:, :-1]).any(-1)
        due = torch.tensor([[t % period == 0 for period in periods] for t in range(1, 30)])
        assert torch.equal(changed, due.expand_as(changed))


def test_nothing_is_learned_below_the_diagonal(small, data, quick, random_tokens):
    model = make_rnn()
    model(random_tokens()).square().sum().backward()
    for layer in model.layers:
        blocks = layer.W_H.grad.unflatten(0, (4, 6)).unflatten(2, (4, 6)).abs().amax((1, 3))
        assert torch.equal(blocks > 0, torch.ones(4, 4).triu().bool())
    for layer in train(small, data, quick, device="cpu").layers:
        assert (layer.W_H[~layer.reads()] == 0).all()
        assert (layer.W_H[layer.reads()] != 0).all()


def test_the_seed_decides_all_weights_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    models = [make_rnn(seed=s, d_model=400) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [torch.nn.utils.parameters_to_vector(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    for i, rows in enumerate(models[0].layers[0].W_H.unflatten(0, (4, 100))):
        assert rows.square().sum(1).mean().item() == pytest.approx(1, abs=0.1)
        assert (rows[:, : 100 * i] == 0).all()


# ---- called as a decoder is


def test_a_cache_changes_nothing(random_tokens):
    model, tokens = make_rnn(), random_tokens(batch=4, length=20)
    cache, parts = model.new_cache(), []
    for part in tokens.split([7, 1, 1, 6, 5], dim=1):
        parts.append(model(part, cache=cache))
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))
    cache.keep(torch.tensor([True, False, True, True]))
    more = model(tokens[[0, 2, 3], :1], cache=cache, positions=torch.arange(21))
    longer = torch.cat((tokens, tokens[:, :1]), dim=1)[[0, 2, 3]]
    torch.testing.assert_close(more[:, 0], model(longer)[:, -1])


def test_greedy_decoding_is_decoding_without_a_cache(random_tokens):
    model, prompts = make_rnn(), random_tokens(batch=12, length=7)
    endless = []
    for prompt in prompts:
        tokens = prompt[None]
        for _ in range(20):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
        endless.append(tokens[0, 7:].tolist())
    stop = next(token for token in range(19) if 0 < sum(token in e for e in endless) < 12)
    found = greedy(model, prompts, stop=stop, max_new=20)
    assert found == [e[: e.index(stop)] if stop in e else e for e in endless]


def test_positions_set_the_clock(random_tokens):
    model, tokens = make_rnn(), random_tokens(length=20)
    logits = model(tokens)
    assert torch.equal(model(tokens, positions=torch.arange(8, 28)), logits)  # the period of the whole clock
    assert not torch.allclose(model(tokens, positions=torch.arange(1, 21)), logits)


def test_edits_reach_what_comes_after(random_tokens):
    model, tokens = make_rnn(), random_tokens(length=12)
    plain = model(tokens)
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 19
    embedded = logits_with_edits(model, tokens, {"hook_embed": lambda x: model.token_embedding(other)})
    assert torch.equal(embedded, model(other))

    def at_5(value):
        return torch.where(torch.arange(12)[:, None] == 5, -value, value)

    # What a layer reads enters its recurrence; its own states are edited after it, for those above alone.
    for site, reached in {
        "blocks.0.hook_resid_pre": slice(5, None),
        "blocks.0.hook_resid_post": slice(5, None),
        "blocks.1.hook_resid_pre": slice(5, None),
        "blocks.1.hook_resid_post": slice(5, 6),
    }.items():
        changed = (logits_with_edits(model, tokens, {site: at_5}) != plain).any(-1).any(0)
        assert changed.nonzero()[:, 0].tolist() == list(range(12))[reached]
    below = trace(model, tokens, ["hook_resid_post"])
    edited = trace(model, tokens, ["blocks.1.hook_resid_pre"])
    assert torch.equal(edited["blocks.1.hook_resid_pre"], below["blocks.0.hook_resid_post"])
    cache = model.new_cache()
    model(tokens, cache=cache, hooks={"blocks.0.hook_resid_post": torch.zeros_like})
    assert torch.equal(cache.states[0], below["blocks.0.hook_resid_post"][:, -1])


def test_dropout_and_mixed_precision_train(small, data, quick):
    model = train(small, data, dataclasses.replace(quick, mixed_precision="bf16", steps=3), device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert all(p.isfinite().all() for p in model.parameters())
    tokens = data.tokens[:2, :-1]
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


# ---- trained, saved and loaded


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True, "periods": (1, 3, 9, 27)}])
def test_what_is_saved_comes_back_to_the_last_bit(options, random_tokens, tmp_path):
    model = make_rnn(**options)
    save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.config == model.config == config_from_dict(json.loads(model.config.to_json()))
    assert torch.equal(back(random_tokens()), model(random_tokens()))
    assert (back.head.weight is back.token_embedding.weight) == model.config.tie_embeddings
    assert load(tmp_path / "model", dtype=torch.float64).dtype == torch.float64


def test_a_config_says_what_it_is_of_and_a_decoders_says_nothing_new(make_decoder, tmp_path):
    config = make_decoder(encoding="rotary", position_layers=(0,)).config
    fields = dataclasses.asdict(config)
    assert (fields.pop("attention_function"), fields.pop("attention_options")) == ("softmax", {})
    assert (fields.pop("parallel"), fields.pop("embedding_norm"), fields.pop("windows")) == (False, False, None)
    assert config.to_json() == json.dumps(fields, indent=2) + "\n"
    assert list(json.loads(config.to_json()))[:2] == ["d_vocab", "n_ctx"]
    assert type(build(config)) is Decoder and config_from_dict(json.loads(config.to_json())) == config
    save(make_rnn(), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model"] == "clockwork"
    for kind in ("lstm", ["clockwork"]):
        (tmp_path / "config.json").write_text(json.dumps(saved | {"model": kind}))
        with pytest.raises(ProbeError, match=r"config\.json: unknown kind of model .*; known: clockwork, decoder$"):
            load(tmp_path)


def test_a_run_broken_off_ends_as_an_unbroken_one(small, data, quick, tmp_path):
    def stop_at_25(entry):
        if entry["step"] == 25:
            raise KeyboardInterrupt

    unbroken = train(small, data, quick, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(small, data, quick, tmp_path, device="cpu", on_log=stop_at_25)
    steps = []
    resumed = train(small, data, quick, tmp_path, device="cpu", on_log=lambda entry: steps.append(entry["step"]))
    assert steps == [25, 30]
    for model in (resumed, load(tmp_path / "final")):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unbroken.parameters(), strict=True))
    decoder = DecoderConfig(d_vocab=small.d_vocab, n_ctx=24, n_layers=2, d_model=32, n_heads=4)
    with pytest.raises(ProbeError, match=r"holds other work: it was begun with model"):
        train(decoder, data, quick, tmp_path, device="cpu")


@pytest.mark.slow
def test_it_learns_to_copy(task, splits, data, small):
    config = TrainingConfig(steps=1000, batch_size=64, learning_rate=3e-3, weight_decay=0.01)
    model = train(dataclasses.replace(small, d_model=128, dropout=0.0), data, config, device="cpu")
    assert exact_match(predict(model, splits.validation, task.vocabulary))["value"][0] > 0.9


# ---- measured as a decoder is


def test_a_trace_knows_the_sites_that_there_are(random_tokens):
    model, tokens = make_rnn(n_layers=3), random_tokens()
    traced = trace(model, tokens, ["hook_embed", "hook_resid_pre", "hook_resid_post"], batch_size=2)
    assert list(traced.values) == [
        "hook_embed",
        *(f"blocks.{layer}.hook_resid_pre" for layer in range(3)),
        *(f"blocks.{layer}.hook_resid_post" for layer in range(3)),
    ]
    assert set(traced.values) == set(model.config.sites()) and n_layers_of(model) == traced.n_layers == 3
    torch.testing.assert_close(model.head(traced.hidden("blocks.2.hook_resid_post")), model(tokens))
    only = r"known: hook_embed, and in a layer \(.*layers 0…2\): hook_resid_pre, hook_resid_post$"
    for site in ("attn.hook_pattern", "blocks.0.attn.hook_pattern", "blocks.3.hook_resid_post"):
        with pytest.raises(ProbeError, match=f"unknown site '{site}'; {only}"):
            trace(model, tokens, [site])


def r2(rows: pd.DataFrame, control: str = "none") -> float:
    found = rows[(rows["metric"] == "r2") & (rows["control"] == control)].groupby("site", sort=False)["value"].last()
    return float(found.iloc[-1])


def test_the_clock_alone_tells_the_position_behind_a_common_start():
    """Until T_i module i holds what it made of <bos>: t < T_i is there to be read, and of 40 positions these steps
    explain what the means over 0, 1, 2…3, 4…7, 8…15, 16…31 and 32…39 do."""
    steps = np.array([sum(t >= period for period in (1, 2, 4, 8, 16, 32)) for t in range(40)])
    within = sum(np.var(np.flatnonzero(steps == s)) * np.sum(steps == s) for s in set(steps))
    explained = 1 - within / (np.var(np.arange(40)) * 40)
    assert explained == pytest.approx(0.92, abs=0.005)

    content = torch.randint(1, 19, (300, 40), generator=torch.Generator().manual_seed(0))
    started = torch.cat((torch.zeros_like(content[:, :1]), content[:, 1:]), dim=1)
    clock, plain = (make_rnn(d_model=128, n_modules=8, n_layers=1, periods=p) for p in (None, (1,) * 8))
    states = trace(clock, started, SITES[1:]).hidden("blocks.0.hook_resid_post").unflatten(-1, (8, 16))
    common = (states - states[:1]).abs().amax((0, 3)) < 1e-6
    assert common.sum(0).tolist() == [1, 2, 4, 8, 16, 32, 40, 40]

    rows = probe_positions(clock, started, SITES[1:], n_bootstrap=10)
    assert r2(rows) == pytest.approx(explained, abs=0.03)
    assert r2(rows, "untrained") == pytest.approx(r2(rows), abs=0.03)  # it is one itself
    assert max(r2(rows, control) for control in ("embedding", "shuffled", "random")) < 0.1
    for model, tokens, most in ((clock, content, 0.5), (plain, started, 0.25), (plain, content, 0.05)):
        assert r2(probe_positions(model, tokens, SITES[1:], controls=(), n_bootstrap=10)) < most


def test_position_is_probed_erased_and_decomposed_as_in_a_decoder(random_tokens):
    tokens = random_tokens(batch=60)
    tokens[:, 0] = 0
    model = make_rnn()
    rows = fit_position_probe(model, tokens, SITES, n_bootstrap=10)
    assert set(rows["control"]) == {"none", "untrained", "embedding", "shuffled"}
    assert set(rows["site"]) == {"hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    fresh = fit_position_probe(untrained_twin(model), tokens, ["blocks.1.hook_resid_post"], n_bootstrap=10, controls=())
    ridge = rows[rows["probe"] == "ridge"]
    assert r2(ridge, "untrained") == pytest.approx(r2(fresh[fresh["probe"] == "ridge"]), rel=1e-6)
    erased = erase_position(model, tokens, SITES[1:], concepts=("position",), n_bootstrap=10)
    left = erased[(erased["metric"] == "probe_r2") & (erased["control"] == "none")]["value"]
    assert len(left) == 2 and left.max() < 0.05  # of sequences that it was not fitted to
    loss = erased[(erased["metric"] == "loss") & (erased["control"] == "none")]["value"]
    assert (loss != 0).all()
    shares = decompose_hidden(trace(model, tokens, SITES), untrained=trace(make_rnn(seed=1), tokens, SITES)).rows
    assert {"none", "untrained"} <= set(shares["control"]) and shares["value"].notna().any()


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_modules": 5}, r"d_model \(24\) must be divisible by n_modules \(5\)"),
        ({"n_modules": 0}, "n_modules must be an integer of at least 1, got 0"),
        ({"periods": (1, 2, 4)}, r"periods must be 4 numbers, one a module, got \(1, 2, 4\)"),
        ({"periods": (0, 1, 2, 4)}, "periods must be an integer of at least 1, got 0"),
        ({"periods": (1, 4, 2, 8)}, r"periods must be in ascending order, got \(1, 4, 2, 8\)"),
        ({"dropout": 1.0}, "dropout must be a number at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_configs_are_one_clear_line(options, message):
    with pytest.raises(ProbeError, match=f"^{message}$"):
        make_rnn(**options)


def test_bad_input_is_one_clear_line(random_tokens):
    model, tokens = make_rnn(), random_tokens()
    for call, message in (
        (lambda: model(tokens[:, :0]), r"tokens must hold at least one sequence of one token, got shape \(3, 0\)"),
        (lambda: model(tokens + 5), "token ids must lie in 0…18, got 5…23"),
        (lambda: model(tokens, attention="sparse"), "unknown attention path 'sparse'; known: auto, explicit, fused"),
        (lambda: model(tokens, positions=torch.arange(3)), r"positions must name all 16 positions .*, got 3"),
        (lambda: model(tokens, hooks={"hook_pos": print}), "unknown site 'hook_pos'; a clockwork RNN's sites: .*…1"),
        (lambda: n_heads_of(model), "a model with attention was wanted, got a ClockworkRNN, which has no heads"),
        (lambda: ClockworkConfig.from_dict({"model": "decoder"}), "unknown kind of model 'decoder'; known: clockwork"),
        (lambda: ClockworkConfig.from_dict({"d_vocab": 5}), "a clockwork RNN's config wants 'd_model', .*"),
        (lambda: ClockworkConfig.from_dict({"n_heads": 5}), "unknown option of a clockwork RNN's config 'n_heads'; .*"),
    ):
        with pytest.raises(ProbeError, match=f"^{message}$"):
            call()
