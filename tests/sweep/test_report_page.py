"""The page of a study, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from llmops.sweep import page, report
from llmops.sweep.model import Axis, StudyRecord, TrialRow
from tests.sweep.browser import chromium
from tests.sweep.studies import row, rows, study

HOSTILE = "</script><script>document.title='owned'</script><!--<img src=x onerror=\"document.title='owned'\">{{ 7*7 }}"
Open = Callable[[StudyRecord, Sequence[TrialRow]], Chrome]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def show(browser: Chrome, tmp_path: Path) -> Iterator[Open]:
    """Opens a study's page. Whatever a test does, the page must not complain."""

    def opened(record: StudyRecord, trials: Sequence[TrialRow]) -> Chrome:
        (tmp_path / "page.html").write_text(page.html(record, trials), encoding="utf-8")
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield opened
    assert browser.get_log("browser") == []


def visible_lines(browser: Chrome) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, "#parallel path.trial:not(.out)"))


def visible_rows(browser: Chrome) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, "#table tbody tr:not([hidden])"))


def column(browser: Chrome, index: int) -> list[str]:
    script = "return [...document.querySelectorAll('#table tbody tr')].map(tr => tr.cells[arguments[0]].textContent)"
    return browser.execute_script(script, index)


def test_what_is_there(show: Open) -> None:
    browser = show(study(), rows(30))
    assert visible_lines(browser) == visible_rows(browser) == 30
    titles = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#parallel text.label")]
    assert titles == ["train.lr", "train.warmup_steps", "model", "train.dtype", "eval/loss"]
    ticks = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#parallel text:not(.label)")]
    assert {"1e-3", "1e-4", "tiny", "bfloat16"} <= set(ticks), "a logarithmic axis, and choices"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#history circle")) == 30
    assert len(browser.find_elements(By.CSS_SELECTOR, "#history circle.pruned")) == 4
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curves path.curve")) == 30
    assert browser.find_elements(By.CSS_SELECTOR, "#importance dt")[0].text == "train.lr"
    best = report.best(study(), rows(30))
    assert best is not None
    assert f"by trial {best.trial}:" in browser.find_element(By.ID, "best").text
    assert browser.find_element(By.CSS_SELECTOR, "tr.best td").text == str(best.trial)


def test_a_brush_filters_lines_and_table(show: Open) -> None:
    browser = show(study(), rows(30))
    strip = browser.find_elements(By.CSS_SELECTOR, "#parallel rect.strip")[0]
    upper = sum(each.params["train.lr"] > 1e-3 for each in rows(30))
    (tick,) = [each for each in browser.find_elements(By.CSS_SELECTOR, "#parallel text") if each.text == "1e-3"]
    middle = tick.rect["y"] + tick.rect["height"] / 2
    from_centre = round(middle - strip.rect["y"] - strip.rect["height"] / 2)
    drag = ActionChains(browser).move_to_element_with_offset(strip, 0, from_centre).click_and_hold()
    drag.move_by_offset(0, -int(middle - strip.rect["y"])).release().perform()
    assert 0 < upper < 30
    assert visible_lines(browser) == visible_rows(browser) == upper
    assert browser.find_element(By.ID, "shown").text == f"{upper} of 30 trials"
    reset = browser.find_element(By.ID, "reset")
    browser.execute_script("arguments[0].focus()", reset)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert visible_lines(browser) == visible_rows(browser) == 30
    assert not reset.is_enabled()


def test_hovering_says_which_trial(show: Open) -> None:
    browser = show(study(), rows(30))
    dot = browser.find_elements(By.CSS_SELECTOR, "#history circle")[-1]
    ActionChains(browser).move_to_element(dot).perform()
    number = dot.get_attribute("data-trial")
    assert browser.find_element(By.ID, "details").text.startswith(f"trial {number} ")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#parallel path.on")) == 1


def test_the_table_is_sorted_by_keyboard(show: Open) -> None:
    browser = show(study(), [*rows(30), row(30, state="failed", reason="out of memory")])
    heads = browser.find_elements(By.CSS_SELECTOR, "#table th")
    browser.execute_script("arguments[0].focus()", heads[2].find_element(By.TAG_NAME, "button"))
    for order, backwards in (("ascending", False), ("descending", True)):
        ActionChains(browser).send_keys(Keys.ENTER).perform()
        assert heads[2].get_attribute("aria-sort") == order
        values = column(browser, 2)
        assert values[-1] == "-", "what has no value is last either way"
        numbers = [float(value) for value in values[:-1]]
        assert numbers == sorted(numbers, reverse=backwards)
    assert heads[0].get_attribute("aria-sort") == "none"


def test_hostile_names_are_text(show: Open) -> None:
    axes = [Axis(key=HOSTILE, kind="choice", values=[HOSTILE, "\ud800 lone"])]
    trials = [row(n, 1.0 + n, params={HOSTILE: axes[0].values[n % 2]}, reason=HOSTILE) for n in range(6)]
    browser = show(study(axes=axes, name=HOSTILE, objective=HOSTILE), trials)
    assert browser.find_element(By.ID, "name").text == HOSTILE
    assert browser.title == HOSTILE
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert visible_lines(browser) == 6


@pytest.mark.parametrize(
    "trials",
    [[], [row(0, 1.0)], [row(0, state="failed", params={})], [row(0, float("nan")), row(1, float("inf"))]],
    ids=["none", "one", "failed", "not finite"],
)
def test_studies_with_little_to_show(show: Open, trials: list[TrialRow]) -> None:
    browser = show(study(), trials)
    assert visible_rows(browser) == len(trials)


def test_light_and_dark(show: Open) -> None:
    browser = show(study(), rows(30))
    colours = {}
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        colours[scheme] = sum(int(part) for part in re.findall(r"\d+", colour))
    assert colours["light"] > 600
    assert colours["dark"] < 120


def test_a_thousand_trials_stay_fluid(show: Open) -> None:
    browser = show(study(), rows(1000))
    assert visible_lines(browser) == 1000
    script = """
      const began = performance.now();
      for (let at = 60; at < 80; at++) {
        brushes.set('train.lr', [60, at + 60]); filter(true); document.body.offsetHeight;
      }
      return (performance.now() - began) / 20;
    """
    assert browser.execute_script(script) < 100, "ms for each move of a brush"


def test_nothing_comes_from_the_network() -> None:
    text = page.html(study(), rows(5))
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", text) == ["data:,"]
    assert set(re.findall(r"https?://[^\"\s]+", text)) == {"http://www.w3.org/2000/svg"}, "a name, never fetched"
