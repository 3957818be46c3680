import numpy as np
import pytest
import torch

from constructions.learnability import LearningConfig, train_from
from probe import device
from probe.device import fast_products, product_error, product_kernels
from probe.extrapolation import ScaleTraining, train_scale
from probe.models.decoder import Decoder, DecoderConfig
from probe.position import pair_probe
from probe.tasks import make_task
from probe.training import TrainingConfig, encode, train

CPU = torch.device("cpu")


def of_numpy(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return a.double().numpy() @ b.double().numpy()


@pytest.fixture
def inexact():
    """As on a processor whose oneDNN computes in bfloat16."""
    device._medium_error.cache_clear()
    yield
    device._medium_error.cache_clear()


@pytest.mark.parametrize("shape", [(256, 256), (300, 300), (4, 8, 64, 64)])
def test_products_in_the_block_are_exact_to_float32(shape):
    a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with fast_products(CPU):
        found = (a @ b).double().numpy()
    exact = of_numpy(a, b)
    assert np.linalg.norm(found - exact) < 1e-6 * np.linalg.norm(exact)
    assert np.all(np.abs(found - exact) <= 3e-6 * of_numpy(a.abs(), b.abs()))


def test_the_block_sets_the_precision_and_puts_it_back():
    within = "medium" if product_kernels(CPU) == "oneDNN" else "highest"
    with pytest.raises(KeyError), fast_products(CPU):
        assert torch.get_float32_matmul_precision() == within
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_training_is_in_the_block_and_the_log_is_not_lost():
    task = make_task("copy")
    data = encode(task.splits(n_train=40, n_validation=5, n_test=5).train, task.vocabulary)
    config = DecoderConfig(n_layers=1, d_model=16, n_heads=2, d_vocab=len(task.vocabulary), n_ctx=64)
    seen = []
    train(
        config,
        data,
        TrainingConfig(steps=2, batch_size=4, log_every=1),
        device="cpu",
        on_log=lambda entry: seen.append(torch.get_float32_matmul_precision()),
    )
    assert seen == ["medium" if product_kernels(CPU) == "oneDNN" else "highest"] * 2
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_what_learns_learns_where_the_caller_has_no_gradients(off):
    """``torch.set_grad_enabled(False)`` at the top of a notebook is a habit; the results are the same bits."""
    task = make_task("copy")
    data = encode(task.splits(n_train=40, n_validation=5, n_test=5).train, task.vocabulary)
    shape = DecoderConfig(n_layers=1, d_model=16, n_heads=2, d_vocab=len(task.vocabulary), n_ctx=64)
    scales = ScaleTraining(steps=2, warmup=0, batch_size=4)
    task_of_position = LearningConfig(length=8, d_model=16, n_heads=2, layers=1)

    def learn(decoder):
        trained = train(shape, data, TrainingConfig(steps=2, batch_size=4), device="cpu")
        found = [trained.head.weight, train_scale(trained, data, scales).scale]
        probes = pair_probe(trained, data.to_length(8), ["hook_resid_post"], probes=["structural"], controls=(), rank=2)
        train_from(decoder, task_of_position, steps=2, generator=torch.Generator().manual_seed(0))
        return [*found, torch.tensor(probes["value"].tolist()), decoder.head.weight]

    wanted = learn(Decoder(task_of_position.decoder_config(), seed=0))
    decoder = Decoder(task_of_position.decoder_config(), seed=0)
    with off():
        found = learn(decoder)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_where_products_would_be_bfloat16_nothing_is_changed(monkeypatch, inexact):
    monkeypatch.setattr(device, "product_error", lambda *_: 3e-3)
    assert product_kernels(CPU) == "torch's default"
    with fast_products(CPU):
        assert torch.get_float32_matmul_precision() == "highest"


def test_what_somebody_has_set_stays():
    torch.set_float32_matmul_precision("high")
    try:
        assert product_kernels(CPU) == "torch's default"
        with fast_products(CPU):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_settings_of_torch_backends_stay_too():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert product_kernels(CPU) == "torch's default"
        with fast_products(CPU):
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_other_devices_keep_torchs_products():
    assert product_kernels(torch.device("meta")) == "torch's default"


def test_the_error_of_a_product_is_that_of_its_numbers():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(2))
    assert 1e-8 < product_error(a, b) < 3e-7
    half = product_error(a.bfloat16(), b.bfloat16())  # exact factors, a product rounded to eight bits
    assert 1e-3 < half < 4e-3
    exact = of_numpy(a.T, b)
    found = np.linalg.norm((a.T @ b).double().numpy() - exact) / np.linalg.norm(exact)
    assert product_error(a, b, transposed=True) == pytest.approx(found)
