"""Plain text, a text a line: cut to the longest that a tower takes, and written as tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import UserError, reading, writing
from .parts import batches
from .writer import token_dtype, write_tokens


def build_texts(
    source: Path, name: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    """Write a text store's files into `folder`; returns their part of the manifest."""
    lines = [line for line in read_lines(source) if line.strip()]
    if not lines:
        raise UserError(f"source {source}: empty, no text found")
    inner = max_tokens - 2

    def pieces() -> Iterator[list[int]]:
        for batch in batches(tqdm(lines, desc=f"tokens of {name}", unit="text"), 1024):
            for tokens in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                for start in range(0, len(tokens), inner):
                    yield [tokenizer.cls_token_id, *tokens[start : start + inner], tokenizer.sep_token_id]

    dtype = token_dtype(len(tokenizer))
    with writing(folder):
        texts = write_tokens(folder, pieces(), dtype)
        tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "texts": texts,
        "token_dtype": dtype.name,
        "vocabulary": len(tokenizer),
        "special_tokens": sorted(tokenizer.all_special_ids),
        "mask_token": tokenizer.mask_token_id,
    }


def read_lines(source: Path) -> list[str]:
    """Lines as editors and `wc` count them; Unicode's other separators are part of a text."""
    with reading("source", source, "copy it again"):
        content = source.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"source {source}: byte {error.start} is not UTF-8; convert it with iconv -t UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
