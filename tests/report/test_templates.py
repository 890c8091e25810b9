"""The page in Chromium: nothing is reported to the console, axe-core finds nothing, and its scripts do their work."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_runs import (
    HOSTILE,
    HOSTILE_USER,
    finished,
    make_comparison,
    make_scores,
    make_tuning,
    prepare_record,
    trained,
    with_titles,
)

from raygr.files import write_text
from raygr.recommend.recommender import load_recommender
from raygr.report.config import ReportConfig
from raygr.report.stage import report

SHOWN = "[...document.querySelectorAll('#live li')].map((one) => one.dataset.item)"
WIDE, PHONE = 1440, 390
OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
# axe-core is slow in large pages: a figure is one image to it, and all rows of a table are alike
LESS = """document.querySelectorAll('svg').forEach((one) => one.replaceChildren());
  document.querySelectorAll('tbody tr:nth-child(n+3)').forEach((one) => one.remove())"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium to open the page")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    trained(folder)
    with_titles(folder / "prepare", {f"i{i}": f"{HOSTILE} {i}" for i in range(1, 31)})
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """A page with a section of each kind."""
    lines = [{"epoch": n, "validation": {"ndcg_at_10": n / 10}} for n in range(1, 5)]
    write_text("\n".join(map(json.dumps, lines)), str(folder / "epochs" / "epochs.jsonl"))
    base = finished(folder / "epochs", "train", {"output": "t", "data": "d"})
    config = ReportConfig(
        output=str(folder / "report"),
        title=f"Films {HOSTILE}",
        notice="Simulated shoppers.",
        data=prepare_record(folder),
        comparison=make_comparison(folder / "compare", base),
        item_score_run=make_scores(folder / "item_scores", "items", ["i1", "i2", "i4", "i5", "i3"]),
        user_score_run=make_scores(folder / "user_scores", "users", ["u1", "u2", "u3", "u4", HOSTILE_USER]),
        train_run=str(folder / "train"),
        finetune=(make_tuning(folder / "tuned"),),
    )
    return f"file://{report(config).path}/report.html"


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """An empty page; the test fails if the console gets an error or a warning."""
    context = chromium.new_context(viewport={"width": WIDE, "height": 900})
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    yield tab
    context.close()
    assert said == []


def violations(tab: Any, arguments: str) -> list[str]:
    """The rules of axe-core that are broken, with their places."""
    found = tab.evaluate(f"axe.run({arguments})")["violations"]
    return [f"{one['id']}: {[node['html'] for node in one['nodes']]}" for one in found]


def test_axe_finds_nothing_wide_and_light_or_on_a_dark_phone(tab: Any, page: str):
    axe = pytest.importorskip("axe_playwright_python", reason="needs the axe-core of axe-playwright-python")
    tab.goto(page)
    tab.evaluate(f"{OPEN_ALL}; {LESS}")
    tab.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    every_rule = "document, {rules: {'target-size': {enabled: true}, 'color-contrast': {enabled: false}}}"
    contrast = "{include: ['header', '#section-1', '#live', 'summary']}, {runOnly: ['color-contrast']}"
    for width, scheme, rules in ((WIDE, "light", []), (PHONE, "dark", [every_rule])):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page itself scrolls sideways"
        assert [found for one in (contrast, *rules) for found in violations(tab, one)] == []


def test_tables_sort_and_search(tab: Any, page: str):
    tab.set_viewport_size({"width": PHONE, "height": 900})
    tab.goto(page)
    names = "[...document.querySelector('.table table').rows].slice(1).map((row) => row.cells[0].innerText)"
    assert tab.evaluate(names) == ["base", "refined", "shuffled", "chance"]
    table = tab.locator(".table").first
    by_mrr = table.get_by_role("button", name="MRR")
    by_mrr.click()
    assert tab.evaluate(names) == ["chance", "shuffled", "base", "refined"]
    by_mrr.click()
    assert tab.evaluate(names) == ["refined", "base", "shuffled", "chance"]
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "descending"
    assert "wide" in table.get_attribute("class")
    assert table.locator("tbody th").first.evaluate("(one) => getComputedStyle(one).position") == "sticky"
    tab.evaluate(OPEN_ALL)
    searched = tab.locator(".table", has=tab.locator(".search")).first
    rows = searched.locator("tbody tr")
    assert rows.count() >= 8
    searched.locator(".search").fill("GUIDED weight")
    assert rows.count() > searched.locator("tbody tr:visible").count() == 0
    searched.locator(".search").fill(rows.nth(2).inner_text().split("\t")[0].upper())
    assert rows.nth(2).is_visible() and searched.locator("tbody tr:visible").count() < rows.count()


def test_the_list_ranks_again_as_the_recommender_does(tab: Any, page: str, folder: Path):
    recommender = load_recommender(str(folder / "train"))

    def ids(user: str, **steer: float) -> list[str]:
        return [one.item_id for one in recommender.recommend(user, 10, steer=steer or None)]

    tab.goto(page)
    assert tab.evaluate(SHOWN) == ids(HOSTILE_USER)
    slider = tab.locator("#live").get_by_role("slider").first
    slider.evaluate("(one) => { one.value = 1.2; }")
    slider.press("ArrowRight")  # a step of 0.1, by the keyboard
    assert tab.evaluate(SHOWN) == ids(HOSTILE_USER, pace=1.3) != ids(HOSTILE_USER)
    call = tab.locator("#live code").inner_text()
    assert call == f'recommender.recommend({json.dumps(HOSTILE_USER)}, steer={{"pace": 1.3}})'
    tab.locator("#live select").select_option(label="u3")
    assert tab.evaluate(SHOWN) == ids("u3")  # moved aspects are back
    assert tab.locator("h1").inner_text() == f"Films {HOSTILE}"  # and no script of the data has run


def test_twenty_thousand_items_stay_small_and_open_fast(tab: Any, tmp_path: Path):
    run = trained(tmp_path, users=100, items=20_000)
    with_titles(tmp_path / "prepare", {f"i{i}": f"A title as long as titles are, {i}" for i in range(20_001)})
    config = ReportConfig(output=str(tmp_path / "r"), title="t", data=prepare_record(tmp_path), train_run=run)
    page = Path(report(config).path, "report.html")
    assert page.stat().st_size < 5e6 and "4,000 of 20,000 items" in page.read_text()
    start = time.monotonic()
    tab.goto(f"file://{page}")
    assert len(tab.evaluate(SHOWN)) == 10
    seconds = time.monotonic() - start
    print(f"{page.stat().st_size:,} bytes, opened in {seconds:.2f} s")
    assert seconds < 6  # 2 s on a quiet machine
