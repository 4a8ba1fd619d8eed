"""The viewer in a real browser: list, traces of any length, live updates, hostile texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, open_browser, running_viewer
from installed import need

from delethink import Chunk, Problem, Trace
from delethink.report_page import Chart, ChartCurve, Report, ReportSection, write_report
from delethink.trace_io import TraceRecord
from delethink.types import StopReason, TraceStop

need("starlette", "uvicorn", "playwright")
pytestmark = pytest.mark.integration

ATTACKS = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>"
    "<a href='javascript:window.pwned = 3'>x</a>\x1b]8;;http://evil\x07x\x1b[2J\u202e"
)
LONG = 100_000  # tokens
C, M = 4096, 2048


def record(
    prompt: str, reward: float | None, tokens: int, context: int = 90, carry: int = 45
) -> TraceRecord:
    chunks, carried, query = [], (), (8, 6, 5, 6)
    left = tokens
    while left:
        count = min(left, context - len(carried))
        output = tuple(6 + i % 2 for i in range(count))
        left -= count
        stop = StopReason.LENGTH if left else StopReason.EOS
        chunks.append(
            Chunk((*query, *carried), output, tuple(-0.1 * (i % 50) for i in range(count)), stop,
                  len(carried))
        )  # fmt: skip
        carried = (*carried, *output)[-carry:]
    trace = Trace(query, tuple(chunks), TraceStop.COMPLETED)
    return TraceRecord(Problem(prompt, "1"), trace, {"exact": reward}, reward=reward)


def write(run: Path, step: int, records: list[TraceRecord]) -> None:
    with (run / f"traces/step_{step:06d}.jsonl").open("a") as file:
        file.writelines(json.dumps(one.to_json()) + "\n" for one in records)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "traces").mkdir()
    (run / "config.yaml").write_text("model: toy\n")
    write(run, 1, [record("first", reward, 200 + 10 * n) for n, reward in enumerate((0.0, 1.0))])
    write(run, 2, [record("second", 1.0, 100), record(ATTACKS, 0.5, 120)])
    write(run, 3, [record("long", 1.0, LONG, C, M)])
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with running_viewer(run) as address:
        yield address


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Page]:
    page = Page(browser)
    page.page.goto(address)
    page.page.wait_for_selector("#table tbody tr")
    yield page
    page.page.close()
    assert page.faults == []


def until(page: Any, condition: str) -> None:
    """Wait for a condition. The page's own policy forbids playwright to wait for one inside it."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {condition}")


def rows_are(page: Any, count: int) -> None:
    until(page, f"document.querySelectorAll('#table tbody tr').length === {count}")


def column(opened: Page, number: int) -> list[str]:
    cells = opened.page.locator(f"#table tbody tr td:nth-child({number})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_the_list_is_sorted_filtered_searched_and_grouped(opened: Page) -> None:
    page = opened.page
    assert column(opened, 1) == ["1", "1", "2", "2", "3"]
    page.get_by_role("button", name="tokens").click()
    page.wait_for_selector("th[aria-sort=ascending] >> text=tokens")
    assert column(opened, 6) == ["100", "120", "200", "210", "100,000"]
    page.select_option("#reward", "low")
    rows_are(page, 2)
    page.click("#clear")
    page.fill("#q", "second")
    rows_are(page, 1)
    page.click("#clear")
    page.check("#by")
    rows_are(page, 4)
    assert "mean reward" in page.inner_text("#table thead")


def test_everything_is_done_by_keys(opened: Page) -> None:
    page = opened.page
    page.keyboard.press("?")
    assert page.locator("#help[open]").count() == 1
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('#help').open")
    page.keyboard.press("j")
    page.keyboard.press("m")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.trace .boundary').length >= 6")
    assert page.locator("#traces.two article").count() == 2
    page.keyboard.press("s")
    assert page.locator(".by-logprob:checked").count() == 2
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    page.keyboard.press("/")
    page.keyboard.type("long")
    rows_are(page, 1)


def test_all_traces_of_a_problem_stand_beside_each_other(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "config.yaml").write_text("model: toy\n")
    write(tmp_path, 1, [record("first", n % 2, 2000 + n) for n in range(20)])
    write(tmp_path, 2, [record("second", 1.0, 100)])
    with running_viewer(tmp_path) as address:
        opened = Page(browser)
        page = opened.page
        page.goto(address)
        rows_are(page, 21)
        page.keyboard.press("o")
        page.wait_for_selector("#group .card")
        assert page.locator(".card").count() == 16
        assert "16 of 20 traces · mean reward 0.5" in page.inner_text("#group .count >> nth=0")
        page.keyboard.press("End")
        until(page, "document.querySelectorAll('.card svg').length === 16")
        assert opened.number_of_nodes() < 8_000
        verdicts = page.locator(".card .verdict b").all_inner_texts()
        assert verdicts == ["✓ right"] * 10 + ["✕ wrong"] * 6
        page.keyboard.press("]")
        until(page, "document.querySelectorAll('.card').length === 4")
        page.keyboard.press("[")
        until(page, "document.querySelectorAll('.card').length === 16")
        page.keyboard.press("j")
        page.keyboard.press("m")
        page.wait_for_selector(".card.marked >> text=2.")
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('#traces.two .verdict').length === 2")
        page.keyboard.press("o")
        page.wait_for_selector(".card.current >> text=3.")
        page.keyboard.press("b")
        until(page, "document.querySelectorAll('#traces.two .verdict').length === 2")
        page.keyboard.press("Escape")
        page.wait_for_selector(".card.current")
        page.keyboard.press("Escape")
        page.wait_for_selector("#list:not([hidden])")
        assert opened.faults == []
        page.close()


def test_a_row_of_the_map_leads_to_its_chunk(opened: Page, address: str) -> None:
    page = opened.page
    page.goto(f"{address}#trace?name=traces/step_000001.jsonl:2")
    page.wait_for_selector(".map g[data-chunk='3']")
    page.locator(".map g[data-chunk='3']").click(position={"x": 300, "y": 5})
    until(page, "document.querySelector('#chunk-3').getBoundingClientRect().top < 120")


def test_an_address_leads_to_a_trace_and_a_chunk_of_it(opened: Page, address: str) -> None:
    page = opened.page
    page.goto(f"{address}#trace?name=traces/step_000001.jsonl:2")
    page.wait_for_selector("text=from chunk 1")
    page.keyboard.press("n")
    page.keyboard.press("n")
    until(page, "document.querySelector('#chunk-2').getBoundingClientRect().top < 120")
    assert page.inner_text("#chunk-2").startswith("Chunk 2 of 4")
    page.goto(f"{address}#trace?name=traces/none.jsonl:2")
    page.wait_for_selector("#message:not([hidden])")
    assert "there is no trace" in page.inner_text("#message")
    opened.faults.clear()  # the browser reports the answer 404


def test_a_long_trace_has_a_bounded_page_and_a_reachable_end(opened: Page, address: str) -> None:
    page, most = opened.page, 0
    page.goto(f"{address}#trace?name=traces/step_000003.jsonl:1")
    page.wait_for_selector(".trace .seg i")
    for _ in range(8):
        page.mouse.wheel(0, 20_000)
        page.wait_for_timeout(50)
        most = max(most, opened.number_of_nodes())
    page.keyboard.press("End")
    until(
        page,
        "scrollTo(0, document.body.scrollHeight), "
        f"document.querySelector('i[title^=\"token {LONG:,} of\"]')",
    )
    page.wait_for_selector("text=the model ended its answer (completed)")
    most = max(most, opened.number_of_nodes())
    assert most < 15_000
    page.keyboard.press("Home")
    page.wait_for_selector("#query")


def test_no_text_of_a_model_is_live(opened: Page, address: str) -> None:
    page = opened.page
    page.goto(f"{address}#trace?name=traces/step_000002.jsonl:2")
    page.wait_for_selector(".trace .seg i")
    page.click("summary")
    assert "<script>window.pwned = 1</script>" in page.inner_text(".trace details")
    assert "\\x1b[2J\\u202e" in page.inner_text(".trace details")
    assert page.evaluate("window.pwned") is None
    assert page.locator(".trace script, .trace img, .trace a[href^=javascript]").count() == 0


def test_a_run_that_goes_on_is_followed(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "config.yaml").write_text("model: toy\n")
    write(tmp_path, 1, [record("first", 0.0, 100)])
    with running_viewer(tmp_path) as address:
        opened = Page(browser)
        opened.page.goto(address)
        opened.page.wait_for_selector("#table tbody tr")
        write(tmp_path, 1, [record("added", 1.0, 100)])
        opened.page.wait_for_selector("#table >> text=added")
        with (tmp_path / "traces/step_000001.jsonl").open("a") as file:
            file.write("{damaged\n")
        opened.page.wait_for_selector("text=1 damaged lines skipped")
        tmp_path.rename(tmp_path.with_name("gone"))
        opened.page.wait_for_selector("#message >> text=The folder has gone")
        tmp_path.with_name("gone").rename(tmp_path)
        assert opened.faults == []
        opened.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("place", ["list", "group", "trace"])
def test_pages_fit_their_width_and_pass_axe(
    browser: Any, address: str, tmp_path: Path, place: str, width: int, scheme: str
) -> None:
    opened = Page(browser, width, scheme)
    page = opened.page
    if place == "list":
        page.goto(address)
        page.wait_for_selector("#table tbody tr")
    elif place == "group":
        page.goto(address)
        page.wait_for_selector("#table tbody tr")
        page.keyboard.press("o")
        until(page, "document.querySelectorAll('.card svg').length === 2")
    else:
        page.goto(f"{address}#trace?name=traces/step_000001.jsonl:2")
        page.wait_for_selector(".trace .boundary")
    page.screenshot(path=tmp_path / f"{place}_{width}_{scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 400:
        page.close()
        return  # the same elements
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (one["id"], one["nodes"][0]["html"])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert opened.faults == []
    page.close()


def test_a_report_draws_and_smooths_its_charts_under_its_own_policy(
    browser: Any, tmp_path: Path
) -> None:
    need("bokeh")
    steps = list(range(1, 41))
    values = [float(step % 7) for step in steps]
    chart = Chart("reward", "step", "reward", [ChartCurve("reward", steps, values)], smooth=True)
    path = write_report(Report("run", "done", [ReportSection("Curves", [chart])]), tmp_path)
    opened = Page(browser)
    page = opened.page
    page.goto(path.as_uri())
    until(page, "Bokeh.documents.length === 1")
    y = "Bokeh.documents[0].roots()[0].renderers[0].data_source.data.y[39]"
    before = page.evaluate(y)
    page.evaluate(
        "const s = document.getElementById('smoothing');"
        "s.value = 0.9; s.dispatchEvent(new Event('input'))"
    )
    until(page, f"Math.abs({y} - 3) < 1")
    assert before == 5.0
    assert page.inner_text("#smoothed") == "0.90"
    assert opened.faults == []
    page.close()
