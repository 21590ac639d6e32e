"""Plain text, a text a line: cut to the longest that a tower takes, and written as tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.captions import read_lines, stripped
from ..errors import UserError, writing
from ..files.places import Location
from .writer import token_dtype, write_tokens


def build_texts(
    source: Location, name: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    """Write a text store's files into `folder`; returns their part of the manifest."""
    special = {"[CLS]": tokenizer.cls_token_id, "[SEP]": tokenizer.sep_token_id, "[MASK]": tokenizer.mask_token_id}
    if lacking := [name for name, token in special.items() if token is None]:
        raise UserError(
            f"data.tokenizer: has no {' and no '.join(lacking)}, between or by which texts are learned from; give a"
            " BERT's or RoBERTa's"
        )
    lines = [line for line in map(stripped, read_lines(source)) if line]
    if not lines:
        raise UserError(f"source {source}: empty, no text found")
    inner = max_tokens - 2

    def pieces() -> Iterator[list[int]]:
        told = iter(tqdm(lines, desc=f"tokens of {name}", unit="text"))
        while batch := list(islice(told, 1024)):
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
