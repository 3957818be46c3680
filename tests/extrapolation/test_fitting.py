import copy

import pytest
import torch
from text_data import of_text
from torch.nn import functional as F

from probe.errors import ProbeError
from probe.extrapolation import ScaleTraining, UniformScale, best_scale, scaled, search_scale, sweep_scale, train_scale
from probe.models.decoder import Decoder, DecoderConfig

QUICK = ScaleTraining(initial=1.2, steps=12, warmup=2, batch_size=16)


def mean_loss(model, data):
    """Over scored tokens, sequence by sequence."""
    total = scored = 0
    for row in range(len(data)):
        length, prompt = int(data.lengths[row]), int(data.prompt_lengths[row])
        tokens = data.tokens[row, :length]
        loss = F.cross_entropy(model(tokens[None, :-1])[0].double(), tokens[1:], reduction="none")[prompt - 1 :]
        total, scored = total + float(loss.detach().sum()), scored + len(loss)
    return total / scored


def test_the_schedule_is_the_papers():
    config = ScaleTraining()
    assert (config.steps, config.warmup, config.batch_size, config.initial, config.least) == (200, 20, 8, 1.6, 1.0)
    rates = [config.rate(step) for step in range(200)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, 19)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 180, eta_min=0.01)
    expected = []
    for step in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 19:
            warm.step()
        elif step >= 20:
            cosine.step()
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("uniform", [False, True])
def test_training_moves_scales_and_nothing_else(trained, longer, uniform):
    before = copy.deepcopy(trained.state_dict())
    wanted = {name: p.requires_grad for name, p in trained.named_parameters()}
    fit = train_scale(trained, longer, QUICK, uniform=uniform)
    assert fit.scale.shape == (2, 4) and not fit.scale.requires_grad
    assert (fit.scale.unique().numel() == 1) == uniform
    assert fit.rows["step"].tolist() == list(range(1, 13))
    assert fit.rows["loss"].iloc[-3:].mean() < fit.rows["loss"].iloc[:3].mean()
    assert all(torch.equal(trained.state_dict()[name], weight) for name, weight in before.items())
    assert {name: p.requires_grad for name, p in trained.named_parameters()} == wanted
    assert torch.equal(train_scale(trained, longer, QUICK, uniform=uniform).scale, fit.scale)


def test_the_clamp_holds_after_every_step_and_can_be_left_out(trained, longer):
    rough = dict(steps=8, warmup=0, batch_size=16, learning_rate=0.3)
    held = train_scale(trained, longer, ScaleTraining(initial=1.0, **rough))
    assert (held.rows["least"] >= 1).all()
    free = train_scale(trained, longer, ScaleTraining(initial=1.0, least=None, **rough))
    assert free.rows["least"].min() < 1
    assert free.rows.loc[0, ["loss", "most"]].equals(held.rows.loc[0, ["loss", "most"]])


def test_first_step_is_the_gradient_of_the_mean_loss(trained, longer):
    """AdamW's first step is the rate times the sign of the gradient; the gradient is that of finite differences."""
    config = ScaleTraining(initial=1.3, steps=1, warmup=0, batch_size=len(longer), learning_rate=0.01)
    moved = train_scale(trained, longer, config).scale - 1.3
    assert torch.allclose(moved.abs(), torch.full((2, 4), 0.01), atol=1e-6)
    for layer, head in ((0, 0), (0, 3), (1, 1), (1, 2)):
        up, down = torch.full((2, 4), 1.3), torch.full((2, 4), 1.3)
        up[layer, head], down[layer, head] = 1.35, 1.25
        slope = mean_loss(scaled(trained, up), longer) - mean_loss(scaled(trained, down), longer)
        assert (slope < 0) == bool(moved[layer, head] > 0)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(trained, longer):
    whole = train_scale(trained, longer, QUICK)
    parts = train_scale(trained, longer, ScaleTraining(**{**vars(QUICK), "accumulation": 4}))
    assert torch.allclose(whole.scale, parts.scale, atol=1e-3)


def test_sweep_is_the_loss_under_each_scale(trained, longer):
    rows = sweep_scale(trained, longer, (1.0, 1.3), n_bootstrap=50)
    found = rows.set_index(["scale", "metric"])["value"]
    assert found[1.0, "loss"] == pytest.approx(mean_loss(trained, longer), rel=1e-5)
    assert found[1.3, "loss"] == pytest.approx(mean_loss(scaled(trained, 1.3), longer), rel=1e-5)
    assert found[1.3, "loss_change"] == pytest.approx(found[1.3, "loss"] - found[1.0, "loss"])
    assert found[1.0, "loss_change"] == found[1.0, "exact_match_change"] == 0
    assert (rows["low"] <= rows["value"]).all() and (rows["value"] <= rows["high"]).all()
    assert (rows["n"] == len(longer)).all()
    assert best_scale(rows) == min((1.0, 1.3), key=lambda s: found[s, "loss"])
    with pytest.raises(ProbeError, match="rows of 'recall' were wanted"):
        best_scale(rows, "recall")


def test_both_ways_find_the_scales_of_a_model_whose_answer_is_known():
    """One head that answers with what it attends to: the softmax is the prediction, so the best λ is the one by which
    the queries were divided."""
    torch.manual_seed(0)
    config = DecoderConfig(
        d_vocab=24, n_ctx=16, n_layers=1, d_model=24, n_heads=1, d_mlp=1, normalization="none", bias=False
    )
    teacher = Decoder(config, seed=0)
    tokens = torch.randint(0, 24, (2000, 12))
    with torch.no_grad():
        teacher.layers[0].attention.o_proj.weight.mul_(4.0)
        drawn = torch.distributions.Categorical(logits=teacher(tokens)[:, -1]).sample()
    tokens = torch.cat((tokens, drawn[:, None]), dim=1)
    data = of_text(tokens)
    data.prompt_lengths.fill_(12)
    student = scaled(teacher, 1 / 1.8)
    trained = train_scale(student, data, ScaleTraining(initial=1.2, steps=60, warmup=5, batch_size=2000))
    searched = search_scale(student, data, initial=1.2, evaluations=40, batch_size=2000)
    assert searched.rows["evaluation"].tolist() == list(range(1, len(searched.rows) + 1))
    for fit in (trained, searched):
        assert float(fit.scale) == pytest.approx(1.8, rel=0.1)
    assert float(trained.scale) == pytest.approx(float(searched.scale), rel=0.02)
    grid = sweep_scale(student, data, [1 + i / 50 for i in range(25, 55)], batch_size=2000, n_bootstrap=2)
    assert best_scale(grid) == pytest.approx(float(searched.scale), abs=0.021)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initial": 0.0}, "initial must be a number above 0, got 0.0"),
        ({"initial": 0.9}, r"initial \(0.9\) must be at least least \(1\)"),
        ({"least": -1.0}, "least must be a number above 0"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number above 0"),
    ],
)
def test_wrong_settings_are_refused(options, said):
    with pytest.raises(ProbeError, match=said):
        ScaleTraining(**options)


def test_wrong_bounds_are_refused(trained, longer):
    with pytest.raises(ProbeError, match="0 < low <= initial <= high was wanted, got 1, 0.5, 2"):
        search_scale(trained, longer, initial=0.5, bounds=(1.0, 2.0))
    with UniformScale(trained, 1.1), pytest.raises(ProbeError, match="is scaled already"):
        train_scale(trained, longer, QUICK)
