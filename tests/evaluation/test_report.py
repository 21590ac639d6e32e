from __future__ import annotations

import html
import json
import re
import tarfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from efficientclip.cli import main
from efficientclip.config import load_config, save_config
from efficientclip.data.pictures import decode_square
from efficientclip.data.store import Store
from efficientclip.evaluation.evaluate import evaluate
from efficientclip.evaluation.run import open_run
from efficientclip.noise.cross_fit import CrossFit, SourceRate, near_in_words, write_cross_fit
from tests.evaluation.conftest import World


class Resources(HTMLParser):
    """Everything a browser would fetch, and the tags that stay open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(run: Path) -> str:
    page = (run / "report.html").read_text(encoding="utf-8")
    parser = Resources()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert all(value.startswith(("data:", "#")) for value in parser.fetched)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    return page


def test_the_page_shows_everything_and_fetches_nothing(world: World) -> None:
    arguments = ["--data", f"held <b>out</b>={world.tar}", f"again={world.store}"]
    assert main(["report", str(world.run), *arguments]) == 0
    results = json.loads((world.run / "results.json").read_text())
    assert results.pop("made_by").startswith("made by efficientclip ")
    assert results == {name: evaluate(world.run, world.store) for name in ("held <b>out</b>", "again")}
    page = page_of(world.run)
    assert "&lt;script src=" in page and "<script" not in page and "<b>" not in page
    for title in ("Contrastive loss", "Masked-language", "Validation recall", "Pairs kept", "Learning rate", "AUC"):
        assert title in page
    assert page.count("<svg") == 6
    # The captions of the first set, and its pictures; no other set's.
    texts = results["again"]["texts"]
    assert page.count("right answer at rank") == texts > 12 and page.count("What queries find") == 1
    assert "一只戴帽子的猫" in page and "Resolved config" in page
    assert page.count("data:image/webp;base64,") > texts * 3 + 12 + 6 * 6


def test_the_gallery_shows_the_named_sets(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's own pictures and queries, a table: each picture beside the nearest captions of the first set."""
    with tarfile.open(world.tar) as tar:
        tar.extractall(tmp_path)
    (tmp_path / "mine.tsv").write_text("image\tcaption\n03.png\t红鱼\n05.png\t两只红猫\n", encoding="utf-8")
    arguments = ["report", str(world.run), "--data", f"held={world.store}", f"mine={tmp_path / 'mine.tsv'}"]
    assert main([*arguments, "--gallery", "mine"]) == 0
    found = json.loads((world.run / "results.json").read_text())["mine"]["t2i"]
    page = page_of(world.run)
    assert page.count("right answer at rank") == 2 and "What queries find: mine" in page
    assert f"Of all 2 queries {found['R@1']:.1f}% find a right picture first" in page and "--gallery mine" in page
    assert "What queries find: held" not in page and "一只戴帽子的猫" not in page
    called = page.split("What pictures are called: mine")[1].split("</section>")[0]
    assert "of “held”" in called and "红鱼" not in called and called.count('<li class="card') == 2
    opened, store = open_run(world.run), Store(world.store)
    features = opened.frozen.encode([decode_square((tmp_path / "03.png").read_bytes(), 16)])
    texts = dict.fromkeys(store.pairs()["caption"].to_pylist())
    best = max(texts, key=lambda text: float(features[0] @ opened.encode_texts([text])[0]))
    assert f'<span lang="zh">{html.escape(best)}、' in called
    assert main([*arguments, "--gallery", "held", "mine"]) == 0
    assert page_of(world.run).count("What queries find") == 2
    assert main([*arguments, "--gallery", "yours"]) == 2
    assert "--gallery yours: is no set of --data; choose of held, mine" in capsys.readouterr().err


def test_sets_come_from_the_config_and_ecl_needs_a_finished_run(world: World) -> None:
    for name in ("confidence.parquet", "metrics.jsonl"):
        (world.run / name).unlink()
    assert main(["report", str(world.run)]) == 0
    assert list(json.loads((world.run / "results.json").read_text())) == ["made_by", "held"]
    page = page_of(world.run)
    assert "What ECL believes" not in page and "<svg" not in page


def test_the_page_tells_how_many_pairs_are_wrong(world: World, tmp_path: Path) -> None:
    store, judged = Store(world.store), tmp_path / "judged"
    judged.mkdir()
    settings = ["confidence.selection=calibrated", f"confidence.cross_fit={judged}"]
    save_config(load_config(world.run / "config.yaml", settings), world.run / "config.yaml")
    assert main(["report", str(world.run)]) == 0 and "How many pairs are wrong" not in page_of(world.run)
    zero = np.zeros(len(store))
    whole = SourceRate("all", 12, 0.25, 0.2, 0.3, 0.9)
    sources = (SourceRate("a", 8, 0.3, 0.25, 0.35, 0.95), SourceRate("b", 4, 0.1, 0.0, 0.7, 0.6))
    found = CrossFit(0.2, 7, zero.astype(np.int8), zero, zero, zero, zero, sources, whole)
    write_cross_fit(judged, store, found)
    assert main(["report", str(world.run)]) == 0 and "near misses" not in page_of(world.run)
    near = SourceRate("near misses", 12, 0.12, 0.1, 0.14)
    write_cross_fit(judged, store, replace(found, near=near, company=zero))
    assert main(["report", str(world.run)]) == 0
    assert f"<p>{near_in_words(near)}.</p>" in page_of(world.run)
    rows = [
        "<tr><th>all</th><td>12</td><td>25.0%</td><td>20.0 to 30.0%</td><td>90.0%</td><td>25.0%</td></tr>",
        "<tr><th>a</th><td>8</td><td>30.0%</td><td>25.0 to 35.0%</td><td>95.0%</td><td>30.0%</td></tr>",
        "<tr><th>b</th><td>4</td><td>cannot be told</td><td>0.0 to 70.0%</td><td>60.0%</td><td>none</td></tr>",
    ]
    assert all(row in page_of(world.run).replace("\n", "") for row in rows)


def test_a_page_elsewhere_leaves_the_run_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, results = tmp_path / "pages" / "mine.html", tmp_path / "pages" / "results.json"
    arguments = ["report", str(world.run), "--output", str(page)]
    before = sorted(world.run.iterdir())
    with monkeypatch.context() as patched:
        # As a folder on a read-only disk answers.
        patched.setattr("os.access", lambda path, mode: Path(path) != world.run)
        assert main(["report", str(world.run)]) == 2
        assert (
            "cannot be written (Permission denied); name a page elsewhere by --output FILE.html"
            in capsys.readouterr().err
        )
        assert main(arguments) == 0
    assert sorted(world.run.iterdir()) == before
    assert '<meta name="generator" content="made by efficientclip ' in page.read_text(encoding="utf-8")
    assert f"--output {page}" in page.read_text(encoding="utf-8") and "held" in json.loads(results.read_text())
    for file in (page, results):
        content = file.read_bytes()
        file.write_text("mine")
        assert main(arguments) == 2
        assert f"{file.name}: exists, and efficientclip did not write it" in capsys.readouterr().err
        assert file.read_text() == "mine"
        file.write_bytes(content)
    # A page that only quotes the mark, and a result in the place of a page.
    quoting = "<!doctype html><title>x</title><p>a note on pages made by efficientclip 0.1.0"
    for foreign in (quoting, results.read_text(encoding="utf-8")):
        page.write_text(foreign)
        assert main(arguments) == 2
        assert "mine.html: exists, and" in capsys.readouterr().err and page.read_text() == foreign
    assert main([*arguments, "--replace"]) == 0
    assert main([*arguments[:-1], "/", "--replace"]) == 2
    assert "/: is no file, but a folder; name a file" in capsys.readouterr().err


def test_a_set_without_name_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(world.run), "--data", str(world.tar)]) == 2
    assert "NAME=PATH" in capsys.readouterr().err
