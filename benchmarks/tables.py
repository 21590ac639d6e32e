"""The tables of README and docs/ that hold what was measured: from `results/*.csv`, in English and Chinese.

    python -m benchmarks.tables [PAGE …]            # writes them anew: `make tables`
    python -m benchmarks.tables --check [PAGE …]    # tells those that differ; exit code 1

In a page, what stands between `<!-- results: NAME -->` and `<!-- end -->` is `TABLES[NAME]`, and the file, hardware and
date of its rows. Of the rows that a `Pick` fits, the newest counts: a command that measures anew needs nothing here.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Where = Mapping[str, str | tuple[float, float]]
"""What a column says, or between which numbers it lies."""


class Figure(str):
    """A cell of a CSV file: `{name}` shows it as it is, `{name:.2f}` its first number, .25 rather than 0.25."""

    def __format__(self, spec: str) -> str:
        if not self:
            return "–"
        text = format(float(self.split()[0]), spec) if spec else str(self)
        text = re.sub(r"^(-?)0\.(?=\d+$)", r"\1.", text) if spec else text
        return re.sub(r"(?<=\d)%", " %", text)


@dataclass(frozen=True)
class Pick:
    """The newest row that fits; the means of those columns that are numbers, where several are asked for."""

    file: str
    wheres: tuple[Where, ...]

    def rows(self) -> list[dict[str, str]]:
        with (RESULTS / f"{self.file}.csv").open(encoding="utf-8") as source:
            rows = list(csv.DictReader(source))
        return [self._newest(rows, where) for where in self.wheres]

    def _newest(self, rows: Sequence[dict[str, str]], where: Where) -> dict[str, str]:
        fitting = [row for row in rows if all(_fits(row[name], wanted) for name, wanted in where.items())]
        if not fitting:
            sys.exit(f"benchmarks/results/{self.file}.csv has no row of {dict(where)}: measure it, or change TABLES")
        # Of a day's rows the last.
        return max(reversed(fitting), key=lambda row: row.get("date", ""))

    def figures(self) -> dict[str, Figure]:
        first, *others = self.rows()
        if not others:
            return {name: Figure(held) for name, held in first.items()}
        columns = {name: [_number(row[name]) for row in (first, *others)] for name in first}
        return {name: Figure(fmean(column)) for name, column in columns.items() if not any(map(math.isnan, column))}


def _number(text: str) -> float:
    return float(text.split()[0]) if re.match(r"[-+]?\d+(\.\d+)?( |$)", text) else math.nan


def _fits(held: str, wanted: str | tuple[float, float]) -> bool:
    return held == wanted if isinstance(wanted, str) else bool(held) and wanted[0] <= float(held) <= wanted[1]


def pick(file: str, **where: str | tuple[float, float]) -> Pick:
    return Pick(file, (where,))


@dataclass(frozen=True)
class Row:
    """`{column}` is of the first pick, `{1[column]}` of the second."""

    cells: Sequence[str]
    picks: Sequence[Pick]


def row(*parts: str | Pick) -> Row:
    return Row([one for one in parts if isinstance(one, str)], [one for one in parts if isinstance(one, Pick)])


@dataclass(frozen=True)
class Table:
    """`origin` is told of the rows."""

    head: Sequence[str]
    rows: Sequence[Row]
    origin: str = "{hardware}, {date}"

    def markdown(self, chinese: bool) -> str:
        def line(cells: Sequence[str]) -> str:
            return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"

        lines = [line([_said(cell, chinese) for cell in self.head]), "|" + "---|" * len(self.head)]
        for one in self.rows:
            figures = [picked.figures() for picked in one.picks]
            lines.append(line([_said(cell, chinese).format(*figures, **figures[0]) for cell in one.cells]))
        origins: dict[str, dict[str, None]] = {}
        for picked in (picked for one in self.rows for picked in one.picks):
            for held in picked.rows():
                figures_of = {name: Figure(re.sub(r"\(R\)| Processor", "", cell)) for name, cell in held.items()}
                origins.setdefault(picked.file, {})[self.origin.format(**figures_of)] = None
        told = [f"`{file}.csv`: {'; '.join(of)}".removesuffix(": ") for file, of in origins.items()]
        return "\n".join([*lines, "", ". ".join(told)])


def _said(words: str, chinese: bool) -> str:
    # What is no figure, code or name of a file is words.
    if not chinese or not re.search(r"[a-z]{2}", re.sub(r"\{[^}]*\}|`[^`]*`", "", words)):
        return words
    if words not in CHINESE:
        sys.exit(f"benchmarks/tables.py has no Chinese for {words!r}: add it to CHINESE")
    return CHINESE[words]


# Tables

FULL, THREE_THOUSAND = (20_000.0, 22_000.0), (2_900.0, 3_100.0)
SIZES = {"300": (290.0, 310.0), "1,000": (990.0, 1_010.0), "3,000": THREE_THOUSAND, "10,000": (9_900.0, 10_100.0)}
RATES = ("0", "0.1", "0.3", "0.5")
TOLD = "{estimated:.3f} ({low:.3f} to {high:.3f})"
NEAR = "{near:.3f} ({near low:.3f} to {near high:.3f})"
DROPPED = "{noise_dropped:.3f} / {clean_lost:.3f}"
RECALLS = ("{t2i_R@1_style:.1f} / {t2i_R@10_style:.1f}", "{t2i_R@10_concepts:.1f}", DROPPED)
RECALLED = ("text to image R@1 / R@10", "held-out concepts: R@10", "noise dropped / clean pairs lost")


def noise(case: str, pairs: tuple[float, float] = FULL) -> Pick:
    # Rows of before the towers' present visits judged the features of another tower.
    return pick("noise_rate", case=case, pairs=pairs, store="demo")


ONE_PICTURE = (7_000.0, 8_000.0)
# Every size and rate of captions that are wrong at random.
AT_RANDOM = Pick(
    "noise_rate",
    tuple(noise(f"random-{rate}", pairs).wheres[0] for pairs in (*SIZES.values(), FULL) for rate in RATES),
)


def judged(label: str, case: str, pairs: tuple[float, float] = FULL) -> Row:
    return row(
        label, "{true:.2f}", TOLD, "{held:.2f}", "{near:.3f}", "{cross-fit AUC:.3f} / {centroid AUC:.3f}",
        "{cross-fit best F1:.3f} / {centroid best F1:.3f}",
        "{cross-fit noise dropped:.3f} / {cross-fit clean dropped:.3f}", noise(case, pairs),
    )  # fmt: skip


def judged_briefly(label: str, case: str, pairs: tuple[float, float] = FULL) -> Row:
    return row(label, "{true:.2f}", TOLD, "{held:.2f}", "{cross-fit AUC:.3f}", noise(case, pairs))


def ecl(label: str, name: str, arm: str, **where: str) -> Row:
    return row(label, name, "{R@1}", "{R@10}", "{oracle_gain_recovered}", DROPPED, pick("ecl", arm=arm, **where))


def arms(**where: str) -> list[Row]:
    told = [ecl("{noise:.0%}, {seeds}", "all pairs", "none", **where)]
    told += [ecl("", f"`{arm}`", arm, **where) for arm in ("schedule", "calibrated")]
    # Without wrong pairs the oracle would be `none`.
    return told if where.get("noise") == "0.00" else [*told, ecl("", "`oracle`", "oracle", **where)]


def changed(label: str, arm: str) -> Row:
    return row(
        label, "{R@1}", "{R@10}", "{R@10_over_calibrated}", "{oracle_gain_recovered}", DROPPED, "{kept:.2f}",
        pick("ecl", noise="0.30", arm=arm, store="demo", seeds="3", pair_visits="200000"),
    )  # fmt: skip


def mlm(label: str, arm: str) -> Row:
    return row(
        label, "{fine-tuned}", "{fine-tuned_over_off}", "{fine-tuned_over_longer}", "{picture_R@10}",
        "{picture_R@10_over_off}", "{text_R@10}", "{text_R@10_over_off}", "{cpu_seconds}", pick("mlm", arm=arm),
    )  # fmt: skip


def paid(label: str, count: str, recipe: str, budget: str = "") -> Row:
    return row(
        label, "{pair_visits:,.0f}", "{cpu_seconds:,.0f}", "{cpu_over_clip:.2f}", "{operations:.1e}",
        "{operations_over_clip:.2f}", "{val_R@10:.1f} / {test_R@10:.1f}", "{reached}",
        pick("resources", count=count, until="val_seen", recipe=recipe, budget=budget),
    )  # fmt: skip


def loss(N: str, implementation: str, **where: str) -> Pick:
    fixed = {"D": "512", "bank": "0", "frozen": "False", "one_way": "False", "frozen_dtype": "", "dtype": "float32"}
    fixed |= {"loss": "contrastive", "pass": "forward+backward", "device": "cpu"}
    return pick("contrastive", **(fixed | {"N": N, "implementation": implementation} | where))


def timed(label: str, name: str, picked: Pick) -> Row:
    return row(label, name, "{seconds:.3g}", "{ratio:.2f}", "{extra_mib:,.0f}", "{note}", picked)


ONE_WAY = {"frozen": "True", "one_way": "True"}
MIXED = ONE_WAY | {"frozen_dtype": "float16"}


def images(label: str, implementation: str, *, alone: bool = False) -> Row:
    two, one = (pick("images", implementation=implementation, threads=threads) for threads in "21")
    shown = "{images_per_s:,.0f}", "{1[images_per_s]:,.0f}" if alone else ""
    errors = "{mean_error} / {max_error}"
    return row(label, *shown, "{over_open_clip:.1f}", errors, "{extra_mib}", two, *([one] if alone else []))


TWO_RANKS = "two ranks, a core each"


def prepared(case: str, label: str, tower: str = "none") -> Row:
    cells = ("{pairs:,.0f}", case, "{ms_a_pair:.3f}", "{cpu_ms_a_pair:.3f}", "{peak_gib:.2f}", "{to_one_rank:.2f}")
    pairs = "1000000" if tower == "none" else "6000"
    return row(label, *cells, pick("prepare", case=case, tower=tower, pairs=pairs, code="ours"))


def judge(pairs: tuple[float, float]) -> Row:
    cells = ("{pairs:,.0f}", "{judge_s:.0f}", "{cpu_s:.0f}", "{of_floor:.2f}", "{peak_mib:,.0f}")
    return row(*cells, pick("judge", pairs=pairs))


def large(command: str, pairs: str = "5000000") -> Row:
    cells = ("`{command}`", "{pairs:,.0f}", "{seconds:,.1f}", "{cpu_seconds:,.1f}", "{peak_anonymous_mib}")
    return row(*cells, pick("large", command=command, pairs=pairs))


def lit(what: str, precision: str) -> Row:
    cells = ("{what}", "{precision}", "{pairs_per_s}", "{over_open_clip:.1f}", "{peak_mib:,.0f}", "{step_mib:,.0f}")
    return row(*cells, pick("lit", what=what, precision=precision))


def pair_loader(implementation: str) -> Row:
    cells = ("{implementation}", "{pairs_per_s:,.0f}", "{ms_per_batch}", "{ratio_of_ours}")
    return row(*cells, pick("pair_loader", implementation=implementation))


def step(text_tokens: str) -> Row:
    paper, ours = (pick("step", pairs="16", text_tokens=text_tokens, implementation=name) for name in ("paper", "ours"))
    seconds, memory = "{seconds:.2f} / {1[seconds]:.2f}", "{extra_mib:,.0f} / {1[extra_mib]:,.0f}"
    return row("{text_tokens} tokens on average", "{over_ours:.1f}", seconds, memory, paper, ours)


def planned(ranks: str) -> Row:
    cells = ("{ranks}", "{planned_s} / {measured_s}", "{time_error}", "{planned_gib:.2f} / {measured_gib:.2f}")
    return row(*cells, "{memory_error}", "{note}", pick("plan", ranks=ranks))


def proof(label: str, what: str) -> Row:
    return row(label, "{gigabytes:.2f}", "{seconds:.2f}", "{cpu_seconds:.2f}", pick("proofs", what=what))


PAID = ("", "pair visits", "CPU seconds", "of CLIP's", "operations", "of CLIP's", "R@10, validation / held-out style",
        "reached")  # fmt: skip
OWN: dict[str, str | tuple[float, float]] = {"image_visits": (200_000.0, 300_000.0), "distillation_visits": "320512"}

TABLES = {
    "demo": Table(
        ("", *RECALLED),
        [row("`make demo`", *RECALLS, pick("demo", image_visits="0"))],
    ),
    "noise-brief": Table(
        ("", "planted", "told", "intervals that hold it", "AUC of single pairs"),
        [
            judged_briefly("21,000 pairs", "random-0"),
            judged_briefly("", "random-0.1"),
            judged_briefly("", "random-0.3"),
            judged_briefly("", "random-0.5"),
            judged_briefly("3,000 pairs", "random-0.3", THREE_THOUSAND),
            row("these, and from 300 to 10,000 pairs", "", "", "{held:.2f}", "", AT_RANDOM),
            judged_briefly("all in one source of three", "source-0.2"),
            row("captions of the most similar concepts, as near misses", "{true:.2f}", NEAR, "", "{cross-fit AUC:.3f}",
                noise("near-0.3")),
        ],
    ),
    "peers": Table(
        ("", "ours", "the peer's", "ours / the peer's"),
        [
            row("seconds of the contrastive loss, 16,384 pairs, beside open_clip's `ClipLoss`", "{seconds:.1f}",
                "{1[seconds]:.1f}", "{ratio:.2f}", loss("16384", "ours"), loss("16384", "open_clip")),
            row("MiB that it takes beside inputs and gradients", "{extra_mib:,.0f}", "{1[extra_mib]:,.0f}", "",
                loss("16384", "ours"), loss("16384", "open_clip")),
            row("pictures a second, 2 threads, beside open_clip's webdataset pipeline",
                "{images_per_s:,.0f}", "{1[images_per_s]:,.0f}", "{over_open_clip:.1f}",
                pick("images", implementation="ours", threads="2"),
                pick("images", implementation="open_clip", threads="2")),
            row("pairs a second, text tower on a locked ViT-B/32, bf16, beside open_clip's `--lock-image`",
                "{pairs_per_s}", "{1[pairs_per_s]}", "{over_open_clip:.1f}",
                pick("lit", what="ours", precision="bf16"), pick("lit", what="open_clip", precision="bf16")),
            row("the same in fp32", "{pairs_per_s}", "{1[pairs_per_s]}", "{over_open_clip:.1f}",
                pick("lit", what="ours", precision="fp32"), pick("lit", what="open_clip", precision="fp32")),
            row("pairs a second from the store, one thread, beside a torch `Dataset` with 2 workers",
                "{pairs_per_s:,.0f}", "{1[pairs_per_s]:,.0f}", "{1[ratio_of_ours]:.0f}",
                pick("pair_loader", implementation="PairLoader, 1 thread"),
                pick("pair_loader", implementation="torch DataLoader, 2 workers")),
            row("CPU seconds until CLIP's recall on the demo, image tower given, as the paper counts",
                "{cpu_seconds}", "{1[cpu_seconds]}", "{cpu_over_clip:.3f}",
                pick("resources", count="given", until="val_seen", recipe="efficientclip", reached="yes", budget="2"),
                pick("resources", count="given", until="val_seen", recipe="clip")),
            row("the same, image tower trained too: a tenth is **missed**",
                "{cpu_seconds}", "{1[cpu_seconds]}", "{cpu_over_clip:.2f}",
                pick("resources", count="all", until="val_seen", recipe="efficientclip", reached="yes", budget="2"),
                pick("resources", count="all", until="val_seen", recipe="clip")),
        ],
    ),
    "demo-own": Table(
        ("", *RECALLED),
        [
            row("`configs/demo-own.yaml`", *RECALLS, pick("demo", **OWN)),
            row("another run, its last step", *RECALLS, pick("demo", command="make demo in an empty clone, a soak of"
                " faults beside it: 13 min 24 s; RUN/model by training.final: last")),
            row("the best of that one by its 260 validation pictures (`training.final: best`)", *RECALLS, pick("demo",
                command="the same run, RUN/model by training.final: best (step 112 of 196: 72.9 on validation, the last"
                " 71.0)")),
        ],
    ),
    "second-stage": Table(
        ("", *RECALLED[:2]),
        [
            row("where it begins", *RECALLS[:2], pick("demo", command="the commands of make demo; where the second"
                " stages below begin")),
            row("on the pairs that ECL kept", *RECALLS[:2], pick("demo", command="efficientclip audit runs/demo"
                " --export data/demo-kept; efficientclip train configs/demo-second-stage.yaml: 64000 visits more")),
            row("another seed", *RECALLS[:2], pick("demo", command="the same, seed=1")),
            row("on all pairs", *RECALLS[:2], pick("demo", command="the same, on all pairs:"
                " data.shards=[data/demo/train]")),
        ],
    ),
    "step": Table(
        ("unpaired texts", "the paper's / ours", "seconds, the paper's / ours", "extra MiB, the paper's / ours"),
        [step("20"), step("64")],
    ),
    "noise": Table(
        ("wrong captions", "planted", "told", "intervals that hold it", "near misses told",
         "AUC, ours / without training", "best F1", "dropped, wrong / clean"),
        [
            judged("drawn at random", "random-0"),
            judged("", "random-0.1"),
            judged("", "random-0.3"),
            judged("", "random-0.5"),
            judged("exchanged among the pairs", "permute-0.2"),
            judged("", "permute-0.4"),
            judged("", "permute-0.6"),
            judged("at random, one picture a concept", "one-0.1", ONE_PICTURE),
            judged("", "one-0.3", ONE_PICTURE),
            judged("one on all pictures of a concept", "cor-0.3"),
            judged("all in one source of three", "source-0.2"),
            judged("all of that source", "source-1"),
            judged("a third of a source of 2,000 pairs", "rare-0.03"),
            judged("all of that source", "rare-1"),
            judged("of the same subgroup of emoji: rate **missed**", "category-0.2"),
            judged("", "category-0.4"),
            judged("", "category-0.6"),
            judged("of a concept that shares an English word: rate **missed**", "noun-0.2"),
            judged("", "noun-0.4"),
            judged("", "noun-0.6"),
            judged("near misses, captions of the most similar concepts", "near-0.3"),
        ],
    ),
    "noise-pairs": Table(
        ("pairs", *(f".{10 * float(rate):.0f}0" if float(rate) else "0" for rate in RATES)),
        [
            row(label, *(f"{{{at}[estimated]:.3f}} ({{{at}[low]:.3f}} to {{{at}[high]:.3f}})" for at in range(4)),
                *(noise(f"random-{rate}", pairs) for rate in RATES))
            for label, pairs in SIZES.items()
        ] + [row("intervals that hold it, 21,000 pairs with them", "", "", "", "{held:.2f}", AT_RANDOM)],
    ),
    "ecl": Table(
        ("noise, seeds", "", "R@1", "R@10", "recovered", "dropped, wrong / clean"),
        [
            *arms(noise="0.00", store="random-0-5"),
            *arms(noise="0.10", store="random-0.1-5"),
            *arms(noise="0.30", store="demo", seeds="3", pair_visits="200000"),
            *arms(noise="0.50", store="random-0.5-5"),
        ],
        "{hardware}, {pair_visits:,.0f} visits, {date}",
    ),
    "ablation": Table(
        ("", "R@1", "R@10", "R@10 over `calibrated`", "recovered", "dropped, wrong / clean", "kept"),
        [
            changed("`calibrated`", "calibrated"),
            changed("score: `snapshot`", "snapshot score"),
            changed("score: `log-probability`", "log-probability score"),
            changed("no re-audition", "no re-audition"),
            changed("re-audition on 15 % of the visits, not 5 %", "re-audition 15 %"),
            changed("selection: `schedule`", "schedule"),
            changed("selection: `mixture`", "mixture"),
            changed("the paper's: `snapshot`, `published`", "published"),
        ],
        "{hardware}, {seeds} seeds, {pair_visits:,.0f} visits, {date}",
    ),
    "mlm": Table(
        ("unpaired texts", "reviews, fine-tuned", "over none", "over none, longer", "text to image R@10", "over none",
         "names, zh to en R@10", "over none", "CPU seconds"),
        [
            mlm("none", "off"),
            mlm("none, a second stage as long as with them", "longer"),
            mlm("in the second stage and beside the pairs", "language"),
        ],
        "{hardware}, {pair_visits:,.0f} visits, {date}",
    ),
    "resources-given": Table(
        PAID,
        [
            paid("`clip`", "given", "clip"),
            paid("`wenlan`, after 240,000 visits of `clip`'s recipe", "given", "wenlan"),
            paid("`efficientclip`", "given", "efficientclip", "1"),
            paid("", "given", "efficientclip", "1.5"),
            paid("", "given", "efficientclip", "2"),
            paid("", "given", "efficientclip", "4"),
        ],
    ),
    "resources-all": Table(
        PAID,
        [
            paid("`clip`, both towers from scratch", "all", "clip"),
            paid("`wenlan`, after visits of `clip`'s recipe", "all", "wenlan"),
            paid("`efficientclip`", "all", "efficientclip", "1"),
            paid("", "all", "efficientclip", "2"),
            paid("", "all", "efficientclip", "4"),
        ],
    ),
    "contrastive": Table(
        ("pairs", "", "seconds", "over open_clip's", "MiB beside inputs and gradients", ""),
        [
            timed("16,384", "ours", loss("16384", "ours")),
            timed("", "plain torch", loss("16384", "plain")),
            timed("", "open_clip's `ClipLoss`", loss("16384", "open_clip")),
            timed("65,536", "ours", loss("65536", "ours")),
            timed("", "open_clip's `ClipLoss`", loss("65536", "open_clip")),
            timed("256, a bank of 1,000,000 rows", "ours", loss("256", "ours", bank="1000000", frozen="True")),
        ],
    ),
    "losses": Table(
        ("8,192 pairs", "", "seconds", "over open_clip's", "MiB beside inputs and gradients", ""),
        [
            timed(label if name == "ours" else "", f"`{name}`" if "_" in name else name, loss("8192", name, **where))
            for label, where in (
                ("both trained, both ways", {}),
                ("images frozen, text to image alone", ONE_WAY),
                ("the same, images in fp16", MIXED),
            )
            for name in ("ours", "linear_cross_entropy", "open_clip", "plain")
        ],
    ),
    "images": Table(
        ("", "2 threads or worker processes", "1 thread", "over open_clip", "mean / greatest error", "MiB"),
        [
            images("`ImageLoader`", "ours", alone=True),
            images("the same with scaled decoding", "ours, scaled decoding"),
            images("open_clip's webdataset pipeline", "open_clip"),
            images("DALI on CPUs", "DALI"),
            images("libjpeg-turbo alone, decoding only", "libjpeg-turbo alone", alone=True),
        ],
    ),
    "prepare": Table(
        ("tower", "pictures", "", "ms a pair", "CPU ms a pair", "GiB", "over one rank"),
        [
            prepared("one rank", "of no cost, 32 x 32"),
            *(prepared(case, "") for case in ("one rank, a core", TWO_RANKS, "one shard of 20 replaced")),
            prepared("the tower alone", "ViT-B/32, bf16, 640 x 480", "vit-b-32"),
            *(prepared(case, "", "vit-b-32") for case in ("one rank", "one rank, a core", TWO_RANKS)),
        ],
    ),
    "judge": Table(
        ("pairs", "seconds", "CPU seconds", "over its products alone", "MiB"),
        [judge((1.9e5, 2.1e5)), judge((9e5, 1.1e6)), judge((4.8e6, 5.1e6))],
    ),
    "large": Table(
        ("", "pairs", "seconds", "CPU seconds", "MiB beyond the page cache"),
        [large(command) for command in ("train, to its first step", "train, epoch's end", "search", "one query",
                                        "report", "audit", "evaluate --queries 1000", "verify store", "verify run")]
        + [large("audit", "200000"), large("audit --export", "200000")],
    ),
    "pair-loader": Table(
        ("", "pairs a second", "ms a batch", "over `PairLoader`'s, 1 thread"),
        [pair_loader(name) for name in ("PairLoader, 1 thread", "PairLoader, 2 threads", "numpy, 1 thread",
                                        "torch DataLoader, 2 workers")],
    ),
    "lit": Table(
        ("", "", "pairs a second", "over open_clip", "peak MiB", "of a step"),
        [lit(what, precision) for precision in ("bf16", "fp32") for what in ("ours", "open_clip")],
    ),
    "plan": Table(
        ("ranks", "seconds, planned / measured", "off by", "GiB a rank, planned / measured", "off by", ""),
        [planned("2"), planned("1")],
    ),
    "proofs": Table(
        ("", "GB", "seconds", "CPU seconds"),
        [
            proof("a checkpoint, with digests", "checkpoint, with digests"),
            proof("without", "checkpoint, without"),
            proof("a store at a start, first", "store at a start, first"),
            proof("again", "store at a start, again"),
            proof("113M parameters and 10M pairs: training stands still",
                  "checkpoint beside training, 10000000 pairs: training waits"),
            proof("until that checkpoint is there", "checkpoint beside training, 10000000 pairs: until it is there"),
        ],
    ),
    "soak": Table(
        ("faults", "bit-equal in the end", "files lost or mixed", "silent differences", "survivors", "tracebacks"),
        [row("{tried}", "{bit-equal}", "{lost or mixed files}", "{silent differences}", "{survivors}", "{tracebacks}",
             pick("soak", command="all"))],
        "",
    ),
}  # fmt: skip

CHINESE = {
    "text to image R@1 / R@10": "文搜图 R@1 / R@10",
    "held-out concepts: R@10": "未见概念 R@10",
    "noise dropped / clean pairs lost": "剔除的噪声 / 误删的正确对",
    "planted": "植入",
    "told": "得出",
    "intervals that hold it": "包含真值的区间",
    "AUC of single pairs": "单个图文对的 AUC",
    TOLD: "{estimated:.3f} ({low:.3f} 至 {high:.3f})",
    NEAR: "{near:.3f} ({near low:.3f} 至 {near high:.3f})",
    "21,000 pairs": "21,000 对",
    "3,000 pairs": "3,000 对",
    "these, and from 300 to 10,000 pairs": "以上，以及 300 至 10,000 对",
    "all in one source of three": "全部在三个来源之一",
    "captions of the most similar concepts, as near misses": "取自最相似概念的描述，按近似错配计",
    "ours": "本项目",
    "the peer's": "同类",
    "ours / the peer's": "本项目 / 同类",
    "seconds of the contrastive loss, 16,384 pairs, beside open_clip's `ClipLoss`":
        "对比损失的秒数，16,384 对，相对 open_clip 的 `ClipLoss`",
    "MiB that it takes beside inputs and gradients": "其输入与梯度之外的 MiB",
    "pictures a second, 2 threads, beside open_clip's webdataset pipeline":
        "每秒图片，2 线程，相对 open_clip 的 webdataset 流水线",
    "pairs a second, text tower on a locked ViT-B/32, bf16, beside open_clip's `--lock-image`":
        "锁定 ViT-B/32 训练文本塔，每秒图文对，bf16，相对 open_clip 的 `--lock-image`",
    "the same in fp32": "同上，fp32",
    "pairs a second from the store, one thread, beside a torch `Dataset` with 2 workers":
        "从特征库读取，每秒图文对，1 线程，相对带 2 个工作进程的 torch `Dataset`",
    "CPU seconds until CLIP's recall on the demo, image tower given, as the paper counts":
        "在示例上达到 CLIP 召回率的 CPU 秒数，按论文的算法，图像塔为已有",
    "the same, image tower trained too: a tenth is **missed**": "同上，图像塔也从头训练：**未达到**十分之一",
}  # fmt: skip


# Pages


def written(page: str, chinese: bool) -> str:
    """The text of a page with its tables made anew."""

    def block(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            sys.exit(f"<!-- results: {found[2]} -->: no such table; benchmarks/tables.py has {', '.join(TABLES)}")
        return f"{found[1]}{TABLES[found[2]].markdown(chinese)}\n{found[3]}"

    if page.count("<!-- results:") != len(BLOCK.findall(page)):
        sys.exit("a block `<!-- results: NAME -->` has no `<!-- end -->`")
    return BLOCK.sub(block, page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given, differing = parser.parse_args(argv), 0
    for page in given.pages:
        was = page.read_text(encoding="utf-8")
        now = written(was, chinese=".zh" in page.name)
        differing += was != now
        if was != now and given.check:
            blocks = zip(BLOCK.finditer(was), BLOCK.finditer(now), strict=True)
            names = ", ".join(new[2] for old, new in blocks if old[0] != new[0])
            print(f"{page.name}: {names}: not what benchmarks/results holds; run `make tables`", file=sys.stderr)
        elif was != now:
            page.write_text(now, encoding="utf-8")
            print(f"{page.name}: written")
    return int(given.check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
