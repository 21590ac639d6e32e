"""The C++ loader (csrc/): batches from the store's flat, possibly memory-mapped arrays.

Arrays are taken as they are, never copied or converted. Errors name the argument: TypeError for a wrong
dtype, shape or layout, IndexError for an id outside the store, ValueError for arrays that contradict each
other.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

_Item = TypeVar("_Item", bound=np.generic)

def pack_tokens(
    tokens: NDArray[np.uint16] | NDArray[np.int32],
    offsets: NDArray[np.int64],
    ids: NDArray[np.int64],
    max_length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The texts `ids` [m] in one row without padding: (input_ids [T], position_ids [T], cu_seqlens [m + 1]).

    Text i is tokens[offsets[i] : offsets[i + 1]]; `offsets` is [texts + 1]. A text longer than `max_length`
    is cut to it but keeps its last token ([SEP]). Positions count from 0 in each text; text k of the batch
    lies at cu_seqlens[k] : cu_seqlens[k + 1].
    """

def gather_rows(table: NDArray[_Item], rows: NDArray[np.int64], threads: int = 1) -> NDArray[_Item]:
    """table[rows] as a new array [m, D], of a C-contiguous `table` [N, D] and `rows` [m] from 0 to N - 1.

    `threads` is an upper bound: small copies are not split.
    """

def linked_pairs(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    left_ids: NDArray[np.int64],
    columns: NDArray[np.int64],
    diagonal: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where a batch's similarity matrix [m, n] has edges of the store: (rows [k], cols [k]), sorted.

    The graph is CSR: node i has edges to indices[indptr[i] : indptr[i + 1]], ascending. Place (i, j) is
    returned, once, if there is an edge left_ids[i] -> columns[j] and j != i + diagonal. `left_ids` [m] and
    `columns` [n] may repeat ids; a column below 0 has no edges. A row that is not ascending is a
    ValueError if it is no longer than `columns`; longer ones are searched, not read through.
    """

IMAGE_SUFFIXES: list[str]
"""What a picture's file may be called, in lower case and without the dot."""

def read_captions(txt: bytes | None, json: bytes | None) -> tuple[list[str], list[bool | None], str, list[str]]:
    """What a tar's sample with these members says: captions, whether each is wrong, source, English captions.

    ValueError with the cause where it has no captions that can be used.
    """

def stripped(text: str) -> str:
    """Without white space and marks at its ends; empty where nothing in it can be seen."""

def read_picture(path: bytes, offset: int, size: int, base64: bool) -> bytes:
    """The encoded picture that lies there, or whose base64 does; size -1: the whole file. ValueError with the cause."""

_Other = Callable[[bytes], tuple[int, int, bytes] | str]
"""Decodes what is no JPEG, PNG or WebP to (width, height, RGBA pixels), or tells why not. It is called by threads."""

def decode_square(encoded: bytes, size: int, other: _Other) -> NDArray[np.uint8]:
    """RGB [size, size, 3], the middle of the picture after its short side is resized. ValueError with the cause."""

class ShardError(Exception):
    """A shard that cannot be opened or is no whole tar: which, where it breaks, and the remedy."""

class _Keeper(Protocol):
    """Who knows more of the shards; the reader's thread asks."""

    def fetch(self, shard: int, following: list[int], /) -> tuple[bytes, dict[str, Any] | None, Any] | str:
        """(path of its tar, columns of the same pictures if it has some, owner of both), or what is wrong.

        The columns take the place of the shard's own. `following` are those elsewhere that will be asked for next.
        """
    def index(self, shard: int, /) -> NDArray[np.uint32] | None:
        """Of a tar, how many 512-byte records each of its samples takes, from the first one on; None: not known."""
    def keep(self, shard: int, index: NDArray[np.uint32], /) -> None:
        """Called when a tar without an index was read to its end."""

class ImageLoader:
    """One pass over image shards, made by threads ahead of the consumer: the engine of `efficientclip.ImageLoader`.

    Every method raises RuntimeError after close() and in a forked child.
    """

    def __init__(
        self,
        *,
        shards: list[bytes],
        shard_shares: list[float],
        listings: list[dict[str, Any] | None],
        elsewhere: list[bool],
        keeper: _Keeper,
        max_bad_shards: int,
        bad_shards: list[tuple[int, int, str]],
        other: _Other,
        batch_size: int,
        size: int,
        train: bool,
        threads: int,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        shares: list[tuple[int, int, int, int]],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: str,
        channels_last: bool,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: bool,
        scaled_decoding: bool,
        shuffle_buffer: int,
        captions: bool,
        keep_encoded: bool,
        drop_last: bool,
        consumed: int,
    ) -> None:
        """A shard is the tar at that path, unless it has a listing, the columns of `efficientclip.data.listing`.

        One that is `elsewhere` is fetched from the keeper. `max_bad_shards` may be broken or not to be had; of those of
        this pass that are known, `bad_shards`, as many samples are read as they gave. Of each shard's samples a share,
        drawn anew each epoch, is read: `shard_shares`, 1 for all of them.
        `consumed` samples of the order or share, good or bad, are passed over; `dtype` is a name of torch's.
        """

    def supply(self, address: int, owner: object) -> None:
        """Lend the memory at `address` for one more batch [batch_size, 3, size, size]; `owner` keeps it alive."""

    def next(
        self,
    ) -> tuple[
        object | None,
        list[tuple[Any, ...]],
        list[tuple[int, str, str]],
        list[tuple[int, int, str]],
        int,
        int,
    ]:
        """The next batch: (owner, samples, bad samples, bad shards, samples consumed up to here, images by `other`).

        Batches lie in the memory that was lent, in that order; `owner` is None after the last one. A sample is (key,
        shard, its place in it, byte offset and length of its image, then as `read_captions` has it captions, noise,
        source and English captions, why it has no captions or None, .json, the image's file if kept, samples consumed
        up to it and with it); a bad one (shard, key, cause), a bad shard (shard, how many samples it gave, cause).
        Raises ShardError, after all whole samples before, for one bad shard too many.
        """

    def close(self) -> None:
        """End the threads."""

_Weights = tuple[NDArray[np.uint8], NDArray[np.float64]]
"""How often an epoch visits pairs: the group of each, and the weight of each group."""

def count_visits(kept: NDArray[np.uint8], weights: _Weights | None, pairs: int, seed: int, epoch: int) -> int:
    """Of the kept pairs, as PairLoader takes them. ValueError for a weight below 0 or above 100."""

class PairLoader:
    """One epoch's batches in order from `epoch_step` on, made by `threads` threads ahead of the consumer.

    trained_ids, frozen_ids [pairs]: what each pair's trained side is, and the row of `features` [n, D] of its partner.
    captions: (tokens, offsets) of the trained texts, as in pack_tokens, or None.
    masked: None, or texts that are masked and packed behind the captions: tokens, offsets, texts_per_batch over all
    ranks, max_tokens, token_kinds uint8 [vocabulary] (0 ordinary, 1 special, 2 continuing a word), mask_token,
    mask_share, whole_words.
    kept: one bit a pair, lowest first; `auditions` of each `batch_size` go to the other pairs, at weight 0.
    step: number of the first batch over all epochs, which chooses the masked texts.

    ValueError for settings that contradict each other or the store.
    """

    def __init__(
        self,
        *,
        trained_ids: NDArray[np.int32],
        frozen_ids: NDArray[np.int32],
        features: NDArray[np.float16],
        captions: tuple[NDArray[np.uint16] | NDArray[np.int32], NDArray[np.int64]] | None,
        masked: dict[str, Any] | None,
        kept: NDArray[np.uint8],
        weights: _Weights | None,
        batch_size: int,
        auditions: int,
        rank: int,
        world_size: int,
        max_tokens: int,
        pairs_per_micro_batch: int,
        tokens_per_micro_batch: int,
        seed: int,
        epoch: int,
        epoch_step: int,
        step: int,
        threads: int,
        prefetch: int,
    ) -> None: ...
    @property
    def steps(self) -> int:
        """Batches in the whole epoch."""

    def next(self) -> dict[str, Any]:
        """The next batch, N pairs over all ranks, M on this one; the arrays are views, lent until the last one dies.

        rows int64 [N], weights float32 [N], frozen_ids int64 [N], trained_ids int64 [M], features float16 [M, D];
        with captions: input_ids, position_ids int64 [T], cu_seqlens int32 [texts + micro-batches] from 0 in each
        micro-batch, segments int64 [M] within the micro-batch, masked_positions, masked_labels int64 [K] within the
        first one, and micro_batches, tuples (first pair, last pair, first token, last token, first text, last text).

        IndexError or ValueError where the store contradicts itself, IndexError after the last batch, RuntimeError in a
        forked child or after `close`.
        """

    def close(self) -> None:
        """End the threads; batches that were handed out stay valid."""
