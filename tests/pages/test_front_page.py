"""Every number of README.md is counted here, or is said to be a setting, a version or a name."""

import pandas as pd
from page_numbers import ROOT, WORDS, Page

import constructions
from probe.attention import TEMPLATES
from probe.attention.head_census import LABELS
from probe.limits import Limits
from probe.models.encodings import ENCODINGS
from probe.models.families import FAMILIES
from probe.models.open.kinds import KINDS, KINDS_OF
from probe.study.config import PRESETS
from probe.tasks.scan import commands

NOT_MEASURED = {
    "papers": ["Kazemnejad et al. 2023", "Wang et al. 2024", "1.5-entmax"],
    "names and versions": [
        *("Python 3.11", "GPT-2", "Cohere 2", "Llama 3's", "TransformerLens 4.3"),
        *("nnsight 0.8", "pyvene 0.1", "BertViz 1.4"),
        "01 position from nothing, 02 reading position, 03 what NoPE attention looks like, 04 length generalisation, "
        "05 temperature, 06 your own model",
    ],
    "what programs return, and what a probe reads": ["exit status is 1", "exit status 1", "1/t"],
    "bounds that other tests hold": ["the original's to 1e-6 or so, in the tests", "in under 90 seconds"],
}


def counts():
    paper = PRESETS["paper"]
    size = "{n_layers} layers, d_model {d_model}".format(**paper.model)
    yield f"is the paper's size: {size}, {paper.training.steps:,} steps"
    yield f"Sequences of more than {Limits().dense_length:,} tokens are streamed"
    yield f"`scan`, the whole language, {sum(1 for _ in commands()):,} commands"
    limits = pd.read_csv(ROOT / "constructions" / "limits.csv")
    exact = limits[(limits["construction"] == "exact_position") & limits["holds"] & (limits["dtype"] == "float32")]
    far = exact[exact["quantity"] == "bits"].iloc[-1]
    yield f"exact with all bits at {far['length']:,} tokens (width {far['width']})"
    yield f"| {len(ENCODINGS)} encodings, hybrids |"
    yield f"| {len(FAMILIES) + len(KINDS)} kinds, each compared with its original |"
    yield f"Any other decoder of transformers ({len(KINDS)} kinds of {KINDS_OF} were tried: "
    yield "Qwen, Mistral, Gemma, Llama 4, gpt-oss"
    yield f"| {len(TEMPLATES)} templates, three nulls |"
    yield f"| {WORDS[len(LABELS)]}, with what they are used for |"
    yield f"| {len(constructions.CONSTRUCTIONS)} constructions, {len(constructions.PROPOSITIONS)} propositions |"


def test_every_number_is_counted():
    page = Page("README.md", ROOT)
    page.says(*counts())
    assert page.rest(NOT_MEASURED) == []
