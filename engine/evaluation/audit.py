"""`efficientclip audit RUN`: what ECL did to each pair, as a table, and as a page on which a person judges it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from .. import __version__
from ..config import Config
from ..data.parquet import tables_of
from ..data.store import Store
from ..errors import UserError, tell
from ..files.atomic import write_atomically, written_aside
from ..files.digests import digest_of
from ..files.ownership import MADE_BY, Made, claim_file
from ..hardware import in_words, machine_name, read_hardware
from ..noise.by_hand import ByHand, read_by_hand
from ..training.history import epoch_files, open_epoch
from ..training.run_folder import run_config
from .charts import histogram, sparkline
from .gallery import Card, judged_card
from .report import Chart, Figure, template
from .run import trained_on
from .suspects import Evidence, evidence_of, write_suspects
from .verdicts import Detection, Verdicts, beside_baseline, caption_centroid_scores, detection, read_verdicts

SOURCES = 30
EDGE = 256  # of pictures that a person judges
MADE: dict[str, Made] = {"audit.parquet": "table", "audit.html": "page", "suspects.csv": "suspects"}
PAIR_COLUMNS = ["key", "caption", "source", "shard", "image_id", "noise", "offset", "length"]
SCORE_COLUMNS = ["score", "times_seen", "kept", "dropped_epoch"]
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("shard", pa.string()),
        ("image_id", pa.int32()),
        ("noise", pa.bool_()),
        ("score", pa.float64()),
        ("times_seen", pa.int32()),
        ("kept", pa.bool_()),
        ("dropped_epoch", pa.int32()),
        ("epoch_score", pa.list_(pa.float32())),
        ("epoch_kept", pa.list_(pa.bool_())),
        ("centroid_score", pa.float32()),
        ("evidence", pa.float64()),
        ("wrong_probability", pa.float32()),
    ],
    metadata={"made_by": f"{MADE_BY} {__version__}"},
)


@dataclass(frozen=True)
class Audit:
    """A finished run beside the store it trained on; `centroid` is the training-free score by pair row, `evidence` the
    best that there is about pairs that nobody judged, and `by_hand` what a person told that the run obeyed."""

    folder: Path
    config: Config
    store: Store
    verdicts: Verdicts
    epochs: list[Path]
    centroid: npt.NDArray[np.float32]
    evidence: Evidence
    by_hand: ByHand | None = None


@dataclass(frozen=True)
class Epoch:
    """Counts of one epoch: pairs that it scored, and at its end those kept, just dropped, and just come back."""

    scored: int
    kept: int
    dropped: int
    returned: int


@dataclass(frozen=True)
class Table:
    """What one pass over the pairs found: some rows of the pair table, by row, and counts."""

    shown: dict[int, dict[str, Any]]
    sources: list[dict[str, Any]]
    epochs: list[Epoch]


def open_audit(run: Path, store: Path | None = None) -> Audit:
    """UserError when the folder is no finished text run, or its store or history are not those it trained with."""
    config = run_config(run)
    if config.training.tower != "text" or config.data.store is None:
        trained = "both towers from shards" if config.training.tower == "both" else "an image tower on pictures alone"
        raise UserError(f"run {run}: trained {trained}; ECL's verdicts are on the pairs of a store")
    file = run / "confidence.parquet"
    if not file.is_file():
        raise UserError(f"run {run}: not finished, so confidence.parquet is not there; train it to its end first")
    found = trained_on(run, config, store)
    epochs = epoch_files(run)
    verdicts = read_verdicts(run, found)
    for epoch in epochs:
        if (count := len(open_epoch(epoch))) != len(found):
            raise UserError(
                f"run {run}: {epoch.relative_to(run)} tells of {count} pairs, but store {found.path} holds {len(found)}"
                " now; put the store that the run trained on back, or train anew"
            )
    if not epochs:
        raise UserError(f"run {run}: has no history/, an earlier version trained it; train it anew")
    if verdicts is None:
        raise UserError(
            f"run {run}: no pair was scored, all epochs were warm-up; raise training.pair_visits or lower"
            " confidence.warmup_epochs"
        )
    evidence, by_hand = evidence_of(config.confidence, found, verdicts), _obeyed(config, found)
    if by_hand is not None:
        score = np.where(by_hand.of_pairs == 0, evidence.score, np.nan)
        evidence = dataclasses.replace(evidence, score=score)
    return Audit(run, config, found, verdicts, epochs, caption_centroid_scores(found), evidence, by_hand)


def _obeyed(config: Config, store: Store) -> ByHand | None:
    """What data.verdicts tells now; None where there is none."""
    file = config.data.verdicts
    if file is None or file.is_file():
        return None if file is None else read_by_hand(file, store)
    tell(f"notice: data.verdicts: {file}: no such file; the page asks again for the pairs that it tells of")
    return None


def claim_audit(run: Path, out: Path, *, replace: bool = False) -> tuple[Path, ...]:
    """The files of MADE that `write_audit` writes into `out`; UserError where something else is there."""
    instead = f"name another folder: efficientclip audit {run} OUT"
    return tuple(claim_file(out / name, made, replace=replace, instead=instead) for name, made in MADE.items())


def write_audit(audit: Audit, out: Path, count: int, *, replace: bool = False) -> tuple[Path, ...]:
    """Write the files of MADE into OUT, `count` pairs of a kind on the page; returns them."""
    table, file, suspects = claim_audit(audit.folder, out, replace=replace)
    verdicts = audit.verdicts
    ranked = dataclasses.replace(verdicts, score=audit.evidence.score)
    # Where nothing is dropped, the lowest scores of all are the surest noise.
    judged = dataclasses.replace(ranked, kept=verdicts.kept & ~verdicts.kept.all())
    kinds = {
        "borderline": ranked.borderline(count),
        "noise": judged.surest(kept=False, count=count),
        "clean": ranked.surest(kept=True, count=count),
    }
    out.mkdir(parents=True, exist_ok=True)
    made = _write_table(audit, table, np.concatenate(list(kinds.values())))
    write_suspects(suspects, audit.store, verdicts, audit.evidence)
    cards = {kind: [_card(made.shown[row], verdicts) for row in rows.tolist()] for kind, rows in kinds.items()}
    compared = beside_baseline(verdicts, audit.centroid)
    page = template("audit.html").render(
        run=audit.folder,
        store=audit.store.manifest,
        selection=audit.config.confidence.selection,
        figures=list(_figures(verdicts, made.epochs, compared)),
        compared=compared,
        charts=list(_charts(verdicts)),
        cards=cards,
        marking=_marking(audit, made),
        epochs=made.epochs,
        sources=made.sources[:SOURCES],
        more_sources=len(made.sources[SOURCES:]),
        labelled=verdicts.noise is not None,
        judged=audit.evidence.p is not None,
        config=(audit.folder / "config.yaml").read_text(encoding="utf-8"),
        command=shlex.join(["efficientclip", "audit", str(audit.folder), str(out), "--top", str(count)]),
        written=datetime.now().astimezone(),
        machine=in_words(read_hardware(audit.folder / "hardware.json")),
        hardware=machine_name(),
        versions=f"efficientclip {__version__}",
    )
    write_atomically(file, page.encode())
    return tuple(out / name for name in MADE)


def _write_table(audit: Audit, file: Path, shown: npt.NDArray[np.int64]) -> Table:
    """One pass: the table goes to `file` in row groups, the rows `shown` and the counts are handed back."""
    found: dict[int, dict[str, Any]] = {}
    evidence = audit.evidence
    sources: pa.Table | None = None
    counts = np.zeros((len(audit.epochs), 4), np.int64)
    with (
        written_aside(file) as aside,
        pq.ParquetWriter(aside, SCHEMA) as writer,
        tqdm(total=len(audit.store), desc=file.name, unit="pair", unit_scale=True) as bar,
    ):
        for first, pairs, scores in _chunks(audit):
            history = [open_epoch(epoch)[first : first + len(pairs)] for epoch in audit.epochs]
            epoch_score = np.stack([records["score"] for records in history], axis=1).astype(np.float32)
            epoch_kept = np.stack([records["kept"] for records in history], axis=1)
            counts += _epoch_counts(epoch_score, epoch_kept)
            chunk = pa.table(
                {
                    "row": np.arange(first, first + len(pairs)),
                    **{name: pairs[name] for name in PAIR_COLUMNS},
                    **{name: scores[name] for name in SCORE_COLUMNS},
                    "epoch_score": _lists(epoch_score),
                    "epoch_kept": _lists(epoch_kept),
                    "centroid_score": audit.centroid[first : first + len(pairs)],
                    "evidence": evidence.score[first : first + len(pairs)],
                    "wrong_probability": pa.nulls(len(pairs))
                    if evidence.wrong_probability is None
                    else pa.array(evidence.wrong_probability[first : first + len(pairs)], from_pandas=True),
                }
            )
            writer.write_table(chunk.select(SCHEMA.names).cast(SCHEMA))
            wanted = shown[(shown >= first) & (shown < first + len(pairs))]
            found |= {pair["row"]: pair for pair in chunk.take(wanted - first).to_pylist()}
            sources = _add_sources(sources, chunk)
            bar.update(len(pairs))
    listed = [] if sources is None else sources.sort_by([("pairs", "descending")]).to_pylist()
    return Table(found, listed, [Epoch(*row) for row in counts.tolist()])


def _chunks(audit: Audit) -> Iterator[tuple[int, pa.Table, pa.Table]]:
    """First row, pairs and their scores, a part at a time."""
    tables = (
        audit.store.pair_tables(PAIR_COLUMNS),
        tables_of(audit.folder / "confidence.parquet", SCORE_COLUMNS),
    )
    first = 0
    for pairs, scores in zip(*tables, strict=True):
        yield first, pairs, scores
        first += len(pairs)


def _lists(values_NE: npt.NDArray[Any]) -> pa.ListArray:
    n, epochs = values_NE.shape
    return pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * epochs, pa.array(values_NE.ravel()))


def _epoch_counts(score_NE: npt.NDArray[np.float32], kept_NE: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    before_NE = np.concatenate([np.ones((len(kept_NE), 1), bool), kept_NE[:, :-1]], axis=1)
    counts = [np.isfinite(score_NE), kept_NE, before_NE & ~kept_NE, ~before_NE & kept_NE]
    return np.stack([count.sum(0) for count in counts], axis=1)


def _add_sources(known: pa.Table | None, chunk: pa.Table) -> pa.Table:
    scored = pc.is_finite(chunk["score"])
    counted = pa.table(
        {
            "source": chunk["source"],
            "pairs": np.ones(len(chunk), np.int64),
            "dropped": pc.cast(pc.invert(chunk["kept"]), pa.int64()),
            "noise": pc.cast(pc.fill_null(chunk["noise"], False), pa.int64()),
            "scored": pc.cast(scored, pa.int64()),
            "score_sum": pc.if_else(scored, chunk["score"], 0.0),
        }
    )
    columns = counted.column_names[1:]
    both = counted if known is None else pa.concat_tables([known, counted])
    grouped = both.group_by("source").aggregate([(name, "sum") for name in columns])
    return pa.table({"source": grouped["source"], **{name: grouped[f"{name}_sum"] for name in columns}})


def _marking(audit: Audit, made: Table) -> dict[str, Any]:
    """What the page's script needs: its verdicts are of the pairs that are shown, and those that the run obeyed."""
    earlier = {} if audit.by_hand is None else audit.by_hand.verdicts
    rows = {} if audit.by_hand is None else audit.by_hand.rows
    return {
        "name": audit.folder.resolve().name,
        "run": digest_of(audit.folder / "confidence.parquet"),
        "pairs": {row: [pair["key"], pair["caption"]] for row, pair in made.shown.items()},
        "earlier": [[rows.get(pair), *pair, verdict] for pair, verdict in earlier.items()],
    }


def _card(pair: dict[str, Any], verdicts: Verdicts) -> Card:
    history = sparkline(np.array(pair["epoch_score"], np.float32), np.array(pair["epoch_kept"], bool))
    card = judged_card(pair, verdicts, pair["row"], EDGE)
    probability = pair["wrong_probability"]
    told = [card.note, *([] if probability is None else [f"likely wrong: {probability:.0%}"]), pair["key"]]
    note = " · ".join([*told, "kept" if pair["kept"] else "dropped"])
    return dataclasses.replace(card, note=note, history=history, row=pair["row"])


def _figures(verdicts: Verdicts, epochs: list[Epoch], compared: tuple[Detection, Detection] | None) -> Iterator[Figure]:
    kept, scored = int(verdicts.kept.sum()), int(verdicts.scored.sum())
    yield Figure(f"{len(verdicts.kept):,}", "pairs", f"{scored:,} of them scored")
    yield Figure(f"{1 - kept / len(verdicts.kept):.1%}", "dropped", f"{kept:,} pairs are kept")
    back = sum(epoch.returned for epoch in epochs)
    yield Figure(f"{back:,}", "returns", "of dropped pairs, after a re-audition or as others fell lower")
    found = detection(verdicts)
    if found is not None:
        yield Figure(f"{found.noise_dropped:.1%}", "of the noise dropped", f"of {found.noisy:,} wrong captions")
        yield Figure(f"{found.clean_lost:.1%}", "of the clean pairs lost", f"of {found.clean:,} right captions")
        note = "no baseline: no caption of both kinds has two pictures"
        if compared is not None:
            note = f"without training: {compared[1].auc:.3f} (ECL {compared[0].auc:.3f} on the same pairs)"
        yield Figure(f"{found.auc:.3f}", "AUC of the ECL score", note)


def _charts(verdicts: Verdicts) -> Iterator[Chart]:
    scored, kept, noise = verdicts.scored, verdicts.kept, verdicts.noise
    groups = {"kept": verdicts.score[scored & kept], "dropped": verdicts.score[scored & ~kept]}
    label = "mean score, in standard deviations of the batch"
    yield Chart("Kept and dropped", "scores at the end of training", histogram(groups, x_label=label))
    if noise is not None:
        groups = {"right caption": verdicts.score[scored & ~noise], "wrong caption": verdicts.score[scored & noise]}
        yield Chart(
            "Right and wrong captions", "the same scores, by the store's labels", histogram(groups, x_label=label)
        )
