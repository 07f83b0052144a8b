"""The page in a real browser without a network: it draws, sorts, filters and toggles, and the console stays silent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_factory import defended, picture, png, results

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--window-size=1280,1000", "--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>"),
)


def unavailable() -> str:
    """Why there is no browser here, or nothing."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found; type apt-get install chromium chromium-driver"
    try:
        import altair
        import jinja2
        import selenium
        import vl_convert
    except ImportError as e:
        return f'{e.name} is not installed; type pip install -e ".[dev]"'
    return "" if all((altair, jinja2, selenium, vl_convert)) else "unreachable"


def found() -> dict[str, Any]:
    """Two sets, two budgets, three defenses, two pictures."""
    parts = []
    for data, more in (("photos", 0.0), ("shapes", 10.0)):
        for eps, less in (("1/255", 0.0), ("4/255", 9.375)):
            parts += [
                defended("none", 62.5 + more, 3.0, 0.0, title="undefended", data=data, eps=eps),
                defended("tecoa", 40.0 + more, 30.5 - less, 28.125 - less, title="TeCoA", data=data, eps=eps),
                defended("rtpt", 63.0 + more, 50.0 - less, None, title="R-TPT", data=data, eps=eps),
            ]
    pictures = [
        picture("tecoa", "a1", data="photos", class_name="<b>cat</b>"),
        picture("none", "a2", data="shapes", threat="adaptive", seen_png=None, adv_png=png((1, 2, 3))),
    ]
    pair = {"vlm": "lite", "data": "photos", "eps": "1/255", "metric": "R*", "a": "TECOA()", "b": "NONE()"}
    pair |= {"diff": 28.1, "diff_lo": 17.0, "diff_hi": 39.0, "p": 1e-5, "p_holm": 1e-5, "verdict": "a"}
    return results(*parts, gallery=pictures, pairs=[pair], notes=["budget: quick"])


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    reason = unavailable()
    if reason and os.environ.get("CI") == "true" and os.environ.get("IRONCLIP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"this run must have a browser: {reason}")
    if reason:
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*", "ws://*", "wss://*"]})
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def path(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ironclip.report import write_html

    return write_html(found(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def page(driver: Any, path: Path) -> Any:
    """The page freshly loaded, charts drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get_log("performance")
    driver.get(path.as_uri())
    WebDriverWait(driver, 20).until(lambda d: d.execute_script(DRAWN))
    return driver


DRAWN = """const places = [...document.querySelectorAll('.chart')].filter(e => e.offsetParent);
return places.length > 0 && places.every(e => e.querySelector('svg .mark-symbol path'));"""


def css(page: Any, query: str) -> list[Any]:
    return [e for e in page.find_elements("css selector", query) if e.is_displayed()]


def column(page: Any, heading: str) -> list[str]:
    """First lines of a column of the rows of the leaderboard that are shown."""
    heads = [h.get_attribute("textContent") for h in page.find_elements("css selector", "#board th")]
    number = heads.index(heading) + 1
    return [e.text.splitlines()[0] for e in css(page, f"#board tbody td:nth-child({number})")]


def choose(page: Any, key: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", f"choose-{key}")).select_by_value(value)


def test_loads_offline_in_silence_and_draws_charts(page: Any) -> None:
    assert [e for e in page.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(e["message"])["message"] for e in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == []
    assert len(css(page, ".chart svg.marks")) == 2
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_policy_stops_what_the_page_must_not_do(page: Any) -> None:
    blocked = page.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('loaded'), e => done('refused'));"
    )
    assert blocked == "refused"
    assert any("Content Security Policy" in e["message"] for e in page.get_log("browser"))


def test_opens_on_one_comparable_block_sorted_by_worst_case(page: Any) -> None:
    assert column(page, "Defense") == ["TeCoA", "undefended", "R-TPT"]
    sorted_by = css(page, "#board th[aria-sort='descending']")
    assert [h.text.split()[0] for h in sorted_by] == ["R*"]


def test_clicking_a_header_sorts_and_again_reverses(page: Any) -> None:
    head = next(h for h in css(page, "#board th") if h.text.startswith("Clean"))
    head.find_element("tag name", "button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "Defense") == ["R-TPT", "undefended", "TeCoA"]
    head.find_element("tag name", "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "Defense") == ["TeCoA", "undefended", "R-TPT"]
    assert len(css(page, "#board th[aria-sort]")) == 1


def test_keyboard_sorts_and_missing_values_stay_last(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    head = next(h for h in css(page, "#board th") if h.text.startswith("R*"))
    head.find_element("tag name", "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "Defense") == ["undefended", "TeCoA", "R-TPT"]


def test_filters_by_set_budget_and_threat(page: Any) -> None:
    assert column(page, "Clean") == ["45.0", "67.5", "68.0"]  # means of two sets
    choose(page, "set", "shapes")
    assert column(page, "Clean") == ["50.0", "72.5", "73.0"]
    assert column(page, "R*")[0] == "28.1"
    choose(page, "eps", "4/255")
    assert column(page, "R*")[0] == "18.8"
    choose(page, "set", "")
    assert sorted({e.text for e in css(page, "#board tbody td[data-col='set']")}) == [
        "mean of 2 sets",
        "photos",
        "shapes",
    ]
    choose(page, "threat", "adaptive")
    assert [h.text.split()[0] for h in css(page, "#board th")] == [
        "Defense",
        "Set",
        "Clean",
        "R*",
        "H",
        "ms/image",
        "F/B",
        "Flags",
    ]
    assert {e.text for e in css(page, "#runs-table td:nth-child(4)")} == {"adaptive"}
    choose(page, "set", "photos")
    assert [e.text for e in css(page, ".card h3")] == []
    assert css(page, "#gallery ~ .nothing")


def test_charts_of_a_set_are_drawn_when_it_is_chosen(page: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    choose(page, "set", "shapes")
    WebDriverWait(page, 20).until(lambda d: d.execute_script(DRAWN))
    assert all("shapes" in e.text for e in css(page, "figure h3"))


def test_the_accuracy_chart_switches_between_worst_case_and_static(page: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    points = ".chart.accuracy .mark-symbol.role-mark path"
    assert len(page.find_elements("css selector", points)) == 2 * 3  # two defenses have R*, at clean and two budgets
    page.find_element("css selector", ".chart.accuracy input[value='static']").click()
    WebDriverWait(page, 10).until(lambda d: len(d.find_elements("css selector", points)) == 3 * 3)


def test_gallery_toggles_between_pictures(page: Any) -> None:
    card = css(page, ".card")[0]
    picture_of = card.find_element("tag name", "img")
    seen = []
    for button in card.find_elements("css selector", "button[data-view]"):
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert (
            page.execute_script("return arguments[0].decode().then(() => arguments[0].naturalWidth)", picture_of) == 8
        )
        seen.append(picture_of.get_attribute("src"))
    assert len(set(seen)) == len(seen) == 4
    assert card.find_element("tag name", "h3").text == "<b>cat</b>"
    assert "<b>cat</b>" in (picture_of.get_attribute("alt") or "")


def test_one_switch_shows_a_view_in_all_cards(page: Any) -> None:
    next(b for b in css(page, "[data-every]") if b.text == "what the defense saw").click()
    pressed = [b.text for b in css(page, ".card [aria-pressed='true']")]
    assert pressed == ["seen", "clean"]  # the second card has no such picture


LABEL = "return document.querySelector('.chart svg .role-axis-label text')?.getAttribute('fill')"


def test_narrow_and_dark_pages_fit_and_redraw(page: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    light = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    label = page.execute_script(LABEL)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    try:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        assert page.execute_script("return getComputedStyle(document.body).backgroundColor") != light
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        WebDriverWait(page, 20).until(lambda d: d.execute_script(LABEL) not in (None, label))
        assert [e for e in page.get_log("browser") if e["level"] == "SEVERE"] == []
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
