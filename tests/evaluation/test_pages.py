"""The pages in a real browser: they open without an error, and what is marked on one reaches the next run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from efficientclip.cli import main
from efficientclip.config import load_config, save_config
from efficientclip.data.store import Store
from efficientclip.noise.by_hand import read_by_hand
from efficientclip.training.history import write_epoch
from tests.evaluation.conftest import HOSTILE, World

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    program, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options, folder = webdriver.ChromeOptions(), tmp_path_factory.mktemp("browser")
    options.binary_location = program
    for argument in ("headless", "no-sandbox", "disable-dev-shm-usage", f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
        started.downloads = folder / "downloads"
        yield started


def opened(browser: Any, page: Path) -> None:
    """Every picture is shown, and the console has nothing to say."""
    browser.get(page.as_uri())
    shown = "return [...document.images].every((one) => (one.loading = 'eager', one.complete && one.naturalWidth > 0))"
    until(lambda: browser.execute_script(shown))
    assert browser.get_log("browser") == []


def until(holds: Any) -> Any:
    deadline = time.monotonic() + 30
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class Page:
    """An audit.html that is open in a browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def press(self, keys: str) -> None:
        for key in keys:
            self.browser.find_element("tag name", "body").send_keys(key)

    @property
    def cards(self) -> list[Any]:
        return list(self.browser.find_elements("css selector", "[data-row]"))

    @property
    def rows(self) -> list[int]:
        return [int(card.get_attribute("data-row")) for card in self.cards]

    @property
    def at(self) -> int:
        """Place of the current card."""
        (place,) = [at for at, card in enumerate(self.cards) if card.get_attribute("aria-current")]
        return place

    @property
    def verdicts(self) -> dict[int, str]:
        cards = self.browser.find_elements("css selector", "[data-verdict]")
        return {int(card.get_attribute("data-row")): card.get_attribute("data-verdict") for card in cards}

    @property
    def status(self) -> str:
        return str(self.browser.find_element("css selector", "[role=status]").text)

    def handed_out(self) -> Path:
        shutil.rmtree(self.browser.downloads, ignore_errors=True)
        self.press("d")
        return next(iter(until(lambda: list(self.browser.downloads.glob("*.csv")))))


def audited(world: World, out: Path) -> Path:
    told = pq.read_table(world.run / "confidence.parquet")
    write_epoch(world.run, 0, told["score"].to_numpy().astype("f4"), told["kept"].to_numpy())
    assert main(["audit", str(world.run), str(out), "--top", "5"]) == 0
    return out / "audit.html"


def test_what_is_marked_survives_and_reaches_the_next_run(world: World, browser: Any, tmp_path: Path) -> None:
    opened(browser, audited(world, tmp_path / "one"))
    page, store = Page(browser), Store(world.store)
    rows = page.rows
    assert page.at == 0 and page.verdicts == {} and page.status == "0 right, 0 wrong"
    width = "return document.querySelector('[aria-current] img').getBoundingClientRect().width"
    assert browser.execute_script(width) >= 200
    page.press("rjw")
    assert page.verdicts == {rows[0]: "right", rows[2]: "wrong"} and page.at == 3
    # Back to one that is marked, another word, and back again.
    page.press("kr")
    assert page.verdicts[rows[2]] == "right" and page.status == "2 right, 0 wrong"
    page.press("k")
    browser.find_element("css selector", "[data-key=u]").click()
    assert page.verdicts == {rows[0]: "right"} and page.at == 2
    page.press("wu")
    assert page.verdicts == {rows[0]: "right"} and page.at == 2
    page.cards[1].click()
    page.press("w")
    hostile = next(i for i, row in enumerate(rows) if store.pairs([row]).to_pylist()[0]["caption"] == HOSTILE)
    page.cards[hostile].click()
    page.press("r")
    marked = {rows[0]: "right", rows[1]: "wrong", rows[hostile]: "right"}
    assert page.verdicts == marked
    # Reloaded, and made anew with other pairs.
    opened(browser, tmp_path / "one" / "audit.html")
    assert page.verdicts == marked and page.at == 2 and page.status == "2 right, 1 wrong"
    assert main(["audit", str(world.run), str(tmp_path / "one"), "--top", "4"]) == 0
    opened(browser, tmp_path / "one" / "audit.html")
    assert page.status == "2 right, 1 wrong"
    file = page.handed_out()
    assert file.name == "verdicts-run.csv"
    found = read_by_hand(file, store)
    assert {row: "right" if value > 0 else "wrong" for row, value in enumerate(found.of_pairs) if value} == marked
    assert found.rows.keys() == found.verdicts.keys()
    # A run that obeyed it asks for others, and hands out the old ones with the new.
    shutil.move(file, tmp_path / "verdicts.csv")
    settings = [f"data.verdicts={tmp_path / 'verdicts.csv'}"]
    save_config(load_config(world.run / "config.yaml", settings), world.run / "config.yaml")
    browser.execute_script("localStorage.clear()")
    opened(browser, audited(world, tmp_path / "two"))
    assert not {*page.rows} & {*marked} and page.status == "2 right, 1 wrong"
    new = page.rows[0]
    page.press("w")
    again = read_by_hand(page.handed_out(), store)
    expected = marked | {new: "wrong"}
    assert {row: "right" if value > 0 else "wrong" for row, value in enumerate(again.of_pairs) if value} == expected


def test_a_report_opens_without_an_error(world: World, browser: Any) -> None:
    assert main(["report", str(world.run), "--data", f"held={world.store}"]) == 0
    opened(browser, world.run / "report.html")
    assert len(browser.find_elements("tag name", "svg")) == 6
