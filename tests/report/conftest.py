import numpy as np
import pandas as pd
import pytest
import torch

from probe.attention import attention_maps, attention_summary, census, compare_models, compare_templates, split_scores
from probe.models.decoder import Decoder, DecoderConfig
from probe.tracing import PATTERN, SCORES, trace

NASTY = "<script>document.title='pwned'</script>&\"'"


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 19, (12, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def decoders():
    config = {"d_vocab": 19, "n_ctx": 16, "n_layers": 2, "d_model": 16, "n_heads": 2}
    return {
        name: Decoder(DecoderConfig(**config, encoding=encoding), seed=i).eval()
        for i, (name, encoding) in enumerate([("none", "none"), ("t5", "t5"), (NASTY, "alibi")])
    }


@pytest.fixture(scope="session")
def traces(decoders, tokens):
    return {name: trace(decoder, tokens, [PATTERN, SCORES]) for name, decoder in decoders.items()}


@pytest.fixture(scope="session")
def census_rows(decoders, tokens):
    parts = [census(decoder, tokens, n_bootstrap=10).assign(model=name) for name, decoder in decoders.items()]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="session")
def split(traces):
    return split_scores(traces["none"], n_bootstrap=10)


@pytest.fixture(scope="session")
def entropy_rows(traces):
    parts = [attention_summary(t, n_bootstrap=10).assign(model=e, control="none") for e, t in traces.items()]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="session")
def accuracy_rows():
    lengths = [*range(1, 9)] * 2
    value = np.linspace(1, 0, 16)
    return pd.DataFrame(
        {
            "model": ["none"] * 8 + [NASTY] * 8,
            "length": lengths,
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
            "n": 30,
        }
    ).astype({"length": "Int64"})


@pytest.fixture(scope="session")
def probe_rows():
    rows = [
        {"model": e, "site": s, "control": c, "metric": "r2", "value": v, "low": v - 0.1, "high": v + 0.05}
        for e in ("none", NASTY)
        for s in ("hook_embed", "blocks.0.hook_resid_post")
        for c, v in (("none", 0.9), ("untrained", 0.5), ("embedding", 0.3), ("shuffled", 0.0))
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def template_rows(traces):
    parts = [
        compare_templates(t, n_bootstrap=10).assign(model=e, control=c)
        for e, t in traces.items()
        for c in ("none", "untrained")
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="session")
def map_rows(traces):
    return attention_maps(traces["none"])


@pytest.fixture(scope="session")
def pair_rows(traces):
    rows = compare_models(traces, n_bootstrap=10)
    return rows[rows["scope"] == "mean"]


@pytest.fixture(scope="session")
def construction_rows():
    return pd.DataFrame(
        [
            {
                "construction": "c",
                "claim": f"holds for {NASTY}",
                "quantity": "x",
                "dtype": d,
                "length": n,
                "largest_error": e,
                "tolerance": 0.1,
            }
            for d in ("float64", "float32")
            for n, e in ((16, 0.0), (64, 1e-9))
        ]
    )
