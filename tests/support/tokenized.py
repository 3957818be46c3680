"""Folders with tokenizers as released models have them, trained on a few texts, and a model with one."""

import io
import json
import random

from released import make
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


WORDS = (
    *("the", "pass", "key", "is", "remember", "it", "what", "of", "a", "grass", "green", "sky", "blue", "def", "self"),
    *("naïve", "–", "🙂"),
)


def texts(n=40, seed=0):
    """Texts of thirty lines, of words and numbers, some letters of more bytes than one."""
    rng = random.Random(seed)

    def word():
        return str(rng.randrange(10**5)) if rng.random() < 0.2 else rng.choice(WORDS)

    return ["".join(" ".join(word() for _ in range(12)) + "\n" for _ in range(30)) for _ in range(n)]


def write_texts(folder):
    """Texts as files."""
    folder.mkdir()
    for i, text in enumerate(texts()):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def byte_level(folder, vocab_size=400, **settings):
    """A tokenizer as GPT-2's, in tokenizer.json: bytes, a space before a word belonging to it, <|endoftext|> last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def sentence_piece(folder, vocab_size=360):
    """A tokenizer as Llama's, in tokenizer.model: a space before a text, single digits, bytes for what is rare."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts() for line in text.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def gpt2(folder, n_positions=256, d_vocab=404):
    """A small GPT-2 with random weights, more rows than tokens, and a tokenizer, in a folder; Hugging Face's model."""
    shape = {"vocab_size": d_vocab, "n_positions": n_positions, "n_embd": 16, "n_head": 2}
    model = make(folder, "gpt2", shape | {"bos_token_id": 399, "eos_token_id": 399})
    byte_level(folder)
    return model
