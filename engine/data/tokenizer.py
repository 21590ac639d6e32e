"""Tokenizers: any Hugging Face one, or a bare BERT vocabulary file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from ..errors import UserError, reading

RESTORE = "restore it from a copy"


def load_tokenizer(name: str | Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id, a folder, or a `vocab.txt`."""
    if name is None:
        raise UserError("data.tokenizer: not set; give a hub id, a tokenizer folder, or a BERT vocab.txt")
    path = Path(name)
    tokenizer: PreTrainedTokenizerBase
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"data.tokenizer: {path} is missing; `efficientclip demo-data` writes the demo's")
        with reading("tokenizer", path, RESTORE):
            tokenizer = BertTokenizer(vocab=str(path))
    elif path.is_dir():
        with reading("tokenizer", path, RESTORE):
            tokenizer = AutoTokenizer.from_pretrained(str(name))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name))
        except (OSError, ValueError) as error:
            raise UserError(f"data.tokenizer: {name} is no tokenizer folder or reachable hub id ({error})") from error
    # Without a vocabulary, Hugging Face makes a tokenizer of special tokens alone.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise UserError(f"tokenizer {name}: holds no vocabulary; give the folder that a tokenizer was saved in")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that map every text to the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
