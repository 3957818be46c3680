"""A small GPT-2 as others release them, made here by transformers: where there is no network, and no model to hand."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from probe.config import check_size
from probe.device import gradients
from probe.errors import ProbeError
from probe.folders import write_folder
from probe.models import checkpoint
from probe.models.open.quiet import quiet_transformers
from probe.tasks.corpus import PYTHON, read_corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


END = "<|endoftext|>"


def make_small_gpt2(
    folder: str | Path,
    *,
    text: str = PYTHON,
    steps: int = 900,
    n_layers: int = 2,
    d_model: int = 64,
    n_heads: int = 4,
    n_positions: int = 96,
    vocab_size: int = 512,
    seed: int = 0,
) -> Path:
    """Train Hugging Face's GPT-2, and a byte-level BPE for it, on a folder of texts; save both as they are released.

    Every sequence is ``n_positions`` tokens long and begins with ``<|endoftext|>``, so that all positions are trained.
    AdamW at 2e-3, falling to 0, 16 sequences a step. A folder that holds such a model is left as it is.

    Returns:
        The folder.

    Raises:
        ProbeError: for a folder with other files, or texts that are too short.
    """
    folder = Path(folder)
    if (folder / checkpoint.CONFIG_FILE).is_file():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ProbeError(f"{folder}: a new folder or a model was wanted, got a folder with other files")
    for name, size in (("steps", steps), ("vocab_size", vocab_size)):
        check_size(name, size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = read_corpus(text).texts["train"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    rng = np.random.default_rng(seed)
    some = [texts[i].decode() for i in rng.permutation(len(texts))[:200]]
    tokenizer.train_from_iterator(some, trainer)
    ids = np.concatenate([encoding.ids for encoding in tokenizer.encode_batch_fast(some)])
    if len(ids) < 100 * n_positions:
        raise ProbeError(f"{text}: texts of at least {100 * n_positions} tokens were wanted, got {len(ids)}")
    end = tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=n_positions, n_embd=d_model, n_layer=n_layers,
        n_head=n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    with gradients(), quiet_transformers():
        for _ in range(steps):
            starts = rng.integers(len(ids) - n_positions, size=16)
            batch = np.array([[end, *ids[s : s + n_positions - 1]] for s in starts], dtype=np.int64)
            tokens = torch.from_numpy(batch)
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        write_folder(folder, lambda temporary: _save(model, tokenizer, temporary))
    return folder


def _save(model: "PreTrainedModel", tokenizer: "Tokenizer", folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model.eval().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
