"""Files from outside: checkpoints, released models, tokenizers, tables of tokens and of results, examples, logs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hostile import Payload, arrays, fresh, payload, refused, tensors_file, tree
from hypothesis import example
from hypothesis import strategies as st
from junk import JUNK, TEXTS, given, mutated
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers

from probe.league import PUBLISHED, read_published
from probe.models.families import FAMILIES
from probe.models.kinds import build, config_from_dict
from probe.models.pretrained import load_pretrained
from probe.study.beyond_checkpoints import scale_checkpoints
from probe.study.places import check_file_names, find_checkpoints, read_tokens
from probe.sweep.results import COLUMNS, failures, read_results, results_of
from probe.tasks import make_task
from probe.tasks.tokenizers import TextVocabulary
from probe.training.log import newest_log_entry
from probe.training.run_folder import checkpoints_of

DECODER = {"d_vocab": 19, "n_ctx": 32, "n_layers": 1, "d_model": 8, "n_heads": 2, "encoding": "t5"}
STATE = build(config_from_dict(DECODER)).state_dict()
WEIGHTS = save({name: tensor.contiguous() for name, tensor in STATE.items()})
HEADER = json.loads(WEIGHTS[8 : 8 + int.from_bytes(WEIGHTS[:8], "little")])
DATA = WEIGHTS[8 + int.from_bytes(WEIGHTS[:8], "little") :]


@st.composite
def broken(draw, whole: bytes) -> bytes:
    """A file with flipped bits, cut short, with bytes put in, or something else altogether."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "junk"]))
    if kind == "junk":
        return draw(st.binary(max_size=64))
    # Headers are short, and what is behind them is long: both ends are as likely as all places together.
    places = st.one_of(st.integers(0, min(64, len(whole))), st.integers(0, len(whole)), st.just(len(whole) - 1))
    at = draw(places)
    if kind == "cut":
        return whole[:at]
    if kind == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=16)) + whole[at:]
    content = bytearray(whole)
    for at in draw(st.lists(st.integers(0, len(whole) - 1) | places.filter(lambda i: i < len(whole)), max_size=8)):
        content[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def in_folder(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(text)
    return folder


def load_checkpoint(config: object, weights: bytes) -> str | None:
    with fresh() as folder:
        in_folder(folder, config__json=config, model__safetensors=weights)
        return refused(lambda: load_pretrained(folder, device="cpu"))


def headed(**changes: object) -> bytes:
    """The checkpoint with another entry in its header."""
    return tensors_file({**HEADER, **changes}, DATA)


HUGE = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}
FIRST = next(name for name in HEADER if name != "__metadata__")


@given(broken(WEIGHTS))
@example(b"")
@example(b"PK\x03\x04")
@example(b"\x80\x04K\x01.")
@example((2**63).to_bytes(8, "little") + WEIGHTS[8:])
@example((2**64 - 1).to_bytes(8, "little"))
@example(tensors_file(b"{" * 100_000))
@example(tensors_file(b"\xff\xfe"))
@example(tensors_file([1]))
@example(tensors_file(b'{"a": {}, "a": {}}'))
@example(headed(**{FIRST: HUGE}))
@example(headed(**{FIRST: {**HUGE, "shape": [2**63, 2]}}))
@example(headed(**{FIRST: {**HUGE, "shape": [-1]}}))
@example(headed(**{FIRST: {**HEADER[FIRST], "dtype": "F8_E4M3"}}))
@example(headed(**{FIRST: {**HEADER[FIRST], "data_offsets": [2**62, 2**63]}}))
@example(save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in STATE.items()}))
def test_weights_of_a_checkpoint(weights):
    load_checkpoint(DECODER, weights)


@given(mutated(HEADER))
def test_headers_of_weights(header):
    load_checkpoint(DECODER, tensors_file(header, DATA))


@given(mutated(DECODER))
@example(DECODER | {"d_model": 2**20, "n_heads": 1, "n_layers": 1024})
@example(DECODER | {"d_vocab": 2**31 - 1})
@example(DECODER | {"model_type": 3})
@example({"model": "clockwork", "d_vocab": 2**30, "d_model": 2**20, "n_modules": 1})
def test_configs_of_a_checkpoint(config):
    load_checkpoint(config, WEIGHTS)


@given(broken(json.dumps(DECODER).encode()))
def test_bytes_of_a_config(config):
    load_checkpoint(config, WEIGHTS)


def test_what_is_no_checkpoint(tmp_path):
    marker = tmp_path / "marker"
    assert "not a whole safetensors file" in load_checkpoint(DECODER, payload(marker))
    pickled = io.BytesIO()
    torch.save({"a": Payload(marker)}, pickled)
    assert "not a whole safetensors file" in load_checkpoint(DECODER, pickled.getvalue())
    in_folder(tmp_path, config__json=DECODER)
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(pickled.getvalue())
    assert "no such file" in refused(lambda: load_pretrained(tmp_path))
    (tmp_path / "model.safetensors").mkdir()
    assert "must be a plain file, got a folder" in refused(lambda: load_pretrained(tmp_path))
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    assert "must be a plain file, got a device" in refused(lambda: load_pretrained(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    assert "must be a plain file, got a device" in refused(lambda: load_pretrained(tmp_path))
    assert not marker.exists()


# The keys of all families' configs, so that each finds what it reads.
RELEASED = {
    "vocab_size": 19,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 16),
    "d_kv": 4,
    "position_encoding_type": "rotary",
    "no_bias": True,
    "attn_config": {"alibi": True},
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    "sliding_window": None,
    "partial_rotary_factor": None,
    "no_rope_layers": [1],
    "auto_map": None,
}


@given(st.sampled_from(sorted(FAMILIES)), mutated(RELEASED))
@example("llama", RELEASED | {"partial_rotary_factor": 1e308})
@example("llama", RELEASED | {"num_hidden_layers": 10**9})
@example("smollm3", RELEASED | {"num_hidden_layers": 2**31 - 1, "no_rope_layers": None})
@example("llama", RELEASED | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 10**400}})
@example("falcon", RELEASED | {"alibi": True, "hidden_size": 10**400})
@example("gpt2", RELEASED | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
def test_configs_of_released_models(family, config):
    with fresh() as folder:
        marker = folder / "marker"
        in_folder(folder, config__json=config | {"model_type": family}, model__safetensors=WEIGHTS)
        (folder / "modeling_x.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
        assert refused(lambda: load_pretrained(folder, device="cpu"))
        assert not marker.exists()


@given(
    mutated({"metadata": {}, "weight_map": {"wte.weight": "model-1.safetensors", "wpe.weight": "model-2.safetensors"}})
)
@example({"weight_map": {"wte.weight": "../model.safetensors"}})
@example({"weight_map": {"wte.weight": "/etc/passwd"}})
@example({"weight_map": {"wte.weight": ".."}})
@example({"weight_map": {"wte.weight": ""}})
@example({"weight_map": {"wte.weight": "x" * 300}})
@example({"weight_map": {}})
def test_indexes_of_weights(index):
    with fresh() as outer:
        (folder := outer / "inner").mkdir()
        in_folder(outer, model__safetensors=WEIGHTS)
        in_folder(folder, config__json=RELEASED | {"model_type": "gpt2"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert refused(lambda: load_pretrained(folder, device="cpu"))


def test_a_bridge_of_more_layers_than_any(tmp_path):
    in_folder(tmp_path, config__json={"model_type": "qwen2", "num_hidden_layers": 10**9}, model__safetensors=WEIGHTS)
    assert "'num_hidden_layers' must be an integer of at most 1024" in refused(lambda: load_pretrained(tmp_path))


def test_code_of_a_released_model_is_never_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "modeling_x.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    for kind in (*sorted(FAMILIES), "qwen2", "unheard"):
        names = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": "modeling_x.T"}
        config = RELEASED | {"model_type": kind, "auto_map": names, "trust_remote_code": True}
        in_folder(
            tmp_path, config__json=config, tokenizer_config__json={"auto_map": {"AutoTokenizer": ["modeling_x.T"] * 2}}
        )
        assert refused(lambda: load_pretrained(tmp_path, device="cpu"))
    (tmp_path / "vocab.txt").write_text("a\n")
    refused(lambda: TextVocabulary(tmp_path))
    assert not marker.exists()


def whole_tokenizer() -> dict:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "x": 3}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return json.loads(tokenizer.to_str())


TOKENIZER = whole_tokenizer()


def read_vocabulary(tokenizer: object, config: object) -> None:
    with fresh() as folder:
        in_folder(folder, tokenizer__json=tokenizer, tokenizer_config__json=config, config__json={"eos_token_id": [1]})
        refused(lambda: TextVocabulary(folder).tokenize(" ab"))


@given(mutated(TOKENIZER), mutated({"bos_token": {"content": "a"}, "eos_token": "b"}))
@example(TOKENIZER | {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, {})
@example(TOKENIZER, {"bos_token": {"content": []}})
@example(TOKENIZER | {"model": TOKENIZER["model"] | {"unk_token": ""}}, {})
@example(TOKENIZER | {"model": TOKENIZER["model"] | {"continuing_subword_prefix": "zz"}}, {})
def test_tokenizers(tokenizer, config):
    read_vocabulary(tokenizer, config)


@given(broken(json.dumps(TOKENIZER).encode()))
def test_bytes_of_a_tokenizer(content):
    read_vocabulary(content, {})


LINE = json.dumps({"source": "jump twice", "target": ["JUMP"], "length": 2, "split": "test"}).encode()


def read_examples(content: bytes) -> None:
    with fresh() as folder:
        in_folder(folder, mine__jsonl=content)
        task = make_task("jsonl", {"path": str(folder / "mine.jsonl")})
        refused(lambda: (task.splits(n_train=1, n_validation=1, n_test=1), len(task.vocabulary)))


@given(broken(LINE + b"\n" + LINE))
@example(b"\xef\xbb\xbf" + LINE)
@example(b'{"source": "a", "target": "", "length": ' + b"9" * 5000 + b"}")
@example(b"[" * 10**6)
def test_bytes_of_examples(content):
    read_examples(content)


@given(st.lists(mutated(json.loads(LINE)) | JUNK, max_size=4))
@example([{"source": "a", "target": "b", "length": 10**400}])
def test_examples(lines):
    read_examples("\n".join(map(json.dumps, lines)).encode())


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin-1") + bytes(64)


def read(content: bytes) -> None:
    with fresh() as folder:
        in_folder(folder, ids__npy=content)
        refused(lambda: read_tokens(folder / "ids.npy"))


@given(broken(arrays()))
@example(b"")
@example(npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000)}\n"))
@example(npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2, 2305843009213693952)}\n"))
@example(npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 2)}\n"))
@example(npy("{'descr': '<i8', 'fortran_order': False, 'shape': (True, 2)}\n"))
@example(npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2)}\n"))
@example(npy("{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (2, 2)}\n"))
@example(npy("(" * 5000))
@example(npy("{" * 9000))
@example(npy("__import__('os')"))
def test_token_ids(content):
    read(content)


@given(TEXTS | st.text("{}'()descrfortan_order:shapeTFlse,<i8 0123456789", max_size=80))
def test_headers_of_token_ids(header):
    read(npy(header.encode("ascii", "ignore").decode()))


def test_token_ids_of_other_kinds(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "ids.npy"
    np.save(path, np.array([[Payload(marker)]], dtype=object), allow_pickle=True)
    assert "ids.npy: token ids in numpy's format were wanted" in refused(lambda: read_tokens(path))
    path.write_bytes(payload(marker))
    assert "numpy's format" in refused(lambda: read_tokens(path))
    np.savez(tmp_path / "ids.npz", ids=np.zeros((2, 2)))
    assert "got an archive" in refused(lambda: read_tokens(tmp_path / "ids.npz"))
    np.save(path, np.zeros((0, 5), int))
    assert "at least one sequence" in refused(lambda: read_tokens(path))
    for wrong in (np.zeros((2, 2)), np.zeros(3, int), np.zeros((2, 2), bool), np.zeros((2, 2), "M8[s]")):
        np.save(path, wrong)
        assert "integers of shape (sequence, pos) were wanted" in refused(lambda: read_tokens(path))
    assert not marker.exists()


TABLE = ",".join(PUBLISHED).encode() + b"\nscan,length,none,0,overall,0.5\nscan,length,t5,1,22,1\n"
CELLS = st.one_of(TEXTS, JUNK.map(str), st.sampled_from(["1e300", "inf", "nan", "0x10", "1_0", "overall", '"']))


def read_table(content: bytes) -> None:
    with fresh() as folder:
        in_folder(folder, table__csv=content)
        refused(lambda: read_published(folder / "table.csv"))


@given(broken(TABLE))
@example(b"")
@example(b"\n\n")
@example(b"\xff")
@example(TABLE.replace(b"22", b"1e300"))
@example(TABLE.replace(b",1,22", b",1e300,22"))
@example(b"," * 10**6)
@example(TABLE + b'"')
def test_published_tables(content):
    read_table(content)


@given(st.lists(st.tuples(*[CELLS] * len(PUBLISHED)), max_size=3))
def test_cells_of_published_tables(rows):
    text = pd.DataFrame(rows, columns=PUBLISHED).to_csv(index=False)
    read_table(text.encode("utf-8", "surrogatepass"))


def results(**changes: object) -> bytes:
    row = dict.fromkeys(COLUMNS, "a") | {
        "seed": 0,
        "train_length": 4,
        "length": 8,
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
    }
    row |= {"n": 5, "status": "done", "split": "test", "metric": "exact_match", "scratchpad": "none"}
    frame = pd.DataFrame([{name: value for name, value in (row | changes).items() if value is not ...}])
    file = io.BytesIO()
    frame.to_parquet(file, index=False)
    return file.getvalue()


@given(broken(results()))
@example(results(value=...))
@example(results(value="high"))
@example(results(seed=0.5))
@example(results(length="long"))
@example(results(task=[1, 2]))
@example(results(status=None))
def test_results_of_a_sweep(content):
    with fresh() as folder:
        (folder / "results").mkdir()
        in_folder(folder / "results", a__parquet=content)
        refused(lambda: (results_of(rows := read_results(folder)), failures(rows)))


@given(st.lists(mutated({"step": 5, "loss": 0.5}) | JUNK, max_size=4), st.binary(max_size=8))
@example([[1]], b"")
@example([{"step": "a", "loss": 1}], b"\xff")
@example([{"step": 1, "loss": 10**400}], b"[" * 100_000)
def test_logs_of_a_training(lines, rest):
    with fresh() as folder:
        in_folder(folder, log__jsonl="\n".join(map(json.dumps, lines)).encode() + b"\n" + rest)
        found = None

        def look():
            nonlocal found
            found = newest_log_entry(folder)

        assert refused(look) is None
        assert found is None or (f"{found['loss']:.4f}" and found["step"] >= 1)


@given(mutated({"model": {}, "training": {"steps": 2}}))
def test_runs_that_somebody_edited(run):
    with fresh() as folder:
        for name in ("checkpoints/step-000000000", "checkpoints/step-x", "final"):
            (folder / name).mkdir(parents=True)
            in_folder(folder / name, config__json=DECODER, model__safetensors=WEIGHTS)
        in_folder(folder, run__json=run)
        refused(lambda: [step for step, _ in checkpoints_of(folder)])


@given(mutated({"format": 1, "task": "copy", "encodings": ["none"], "load": {"none": "x"}}))
@example({"load": {"none": "../" * 2000}, "encodings": ["none"]})
def test_studies_that_somebody_edited(study):
    with fresh() as folder:
        in_folder(folder, study__json=study)
        refused(lambda: find_checkpoints([str(folder)]))


@given(TEXTS)
@example("../x")
@example("a/../../x")
@example("/etc/x")
@example("x" * 300)
@example("\ud800")
@example("")
def test_names_of_models_stay_in_their_folder(name):
    if refused(lambda: check_file_names([name])) is None:
        path = Path("/out/models") / f"{name}-head-2x"
        assert Path(os.path.normpath(path)).parent == Path("/out/models") and len(path.name.encode()) < 256
    else:
        with fresh() as folder:
            assert refused(lambda: scale_checkpoints({name: None}, None, folder / "out"))
            assert not tree(folder)


@given(st.text(max_size=20) | TEXTS)
@example("x" * 5000)
@example("~/../x@")
@example("a/b@c@d")
@example("llama:llama:x")
def test_names_of_places(place):
    refused(lambda: find_checkpoints([place]))


@pytest.mark.parametrize(
    "odd",
    [
        {"HF_HUB_ETAG_TIMEOUT": "soon", "BROWSER_PATH": "/", "COLUMNS": "many"},
        {"HF_ENDPOINT": "http://a b", "HF_HOME": "/dev/null/x", "PYTHONIOENCODING": "ascii", "HOME": ""},
    ],
)
def test_the_doctor_in_an_odd_environment(odd):
    run = subprocess.run(
        [sys.executable, "-m", "probe", "doctor"],
        env={"PATH": "", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", **odd},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode in (0, 1) and not run.stderr, run.stderr
    assert "hub " in run.stdout
