"""The page in a real browser: what people see, by eye, by keyboard and by screen reader."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from tests.dashboard.conftest import Served, resize, until
from tests.dashboard.team import interrupted, lines, live, over, steps, sweep

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e{{7*7}}"


def texts(browser: Chrome, selector: str) -> list[str]:
    """Of all elements that are shown, in order."""
    shown = "[...document.querySelectorAll(arguments[0])].filter(each => each.checkVisibility())"
    script = f"return {shown}.map(each => each.textContent.trim())"
    found = browser.execute_script(script, selector)
    assert isinstance(found, list)
    return found


def count(browser: Chrome, selector: str) -> int:
    return len(browser.find_elements(By.CSS_SELECTOR, selector))


def show(browser: Chrome, served: Served, path: str = "") -> None:
    browser.get(served.url + path)


def names(browser: Chrome) -> list[str]:
    return texts(browser, "#runs a.name")


def press(browser: Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def spoken(browser: Chrome) -> str:
    return browser.find_element(By.ID, "live").text


@pytest.fixture
def four(make_run, alive):
    """Three live runs and one that is over, the oldest."""
    now = time.time()
    over(make_run, "gone", now - 90_000, last=30)
    for name, done in (("alpha", 50), ("beta", 60), ("gamma", 70)):
        live(make_run, alive, name, now - 2, done, most=500, owner="bob" if name == "beta" else "ada")
    return make_run.runs_url


def test_the_list(browser, serve, four):
    show(browser, serve(four))
    until(lambda: names(browser) == ["alpha", "beta", "gamma", "gone"], "four runs, those that live first")
    assert texts(browser, "#runs .state-badge") == ["▶running"] * 3 + ["✓finished"]
    assert texts(browser, "#runs td.c-progress > span:first-child")[0] == "50 / 500"
    assert count(browser, "#runs td.c-loss svg.spark path") == 4
    assert texts(browser, ".chip") == ["3 running", "1 finished"]
    assert texts(browser, "#count") == ["4 runs"]
    heads = {
        each.text.strip(" \u2002↑↓"): each for each in browser.find_elements(By.CSS_SELECTOR, "#runs thead th button")
    }
    heads["Progress"].click()
    assert names(browser) == ["gone", "alpha", "beta", "gamma"]
    heads["Progress"].click()
    assert names(browser)[0] == "gamma"
    assert texts(browser, 'th[aria-sort="descending"]') == ["Progress"]
    heads["Progress"].click()
    assert count(browser, 'th[aria-sort]:not([aria-sort="none"])') == 0
    browser.find_element(By.CSS_SELECTOR, ".chip").click()
    assert names(browser) == ["alpha", "beta", "gamma"]
    browser.find_element(By.ID, "filter").send_keys("owner:bob")
    assert names(browser) == ["beta"]
    assert texts(browser, "#count") == ["1 of 4 runs"]


def test_only_what_has_changed_is_drawn_again(browser, serve, make_run, alive):
    now = time.time()
    quiet, going = over(make_run, "quiet", now - 90_000, last=20), live(make_run, alive, "going", now, 20, most=100)
    show(browser, serve(make_run.runs_url))
    until(lambda: len(names(browser)) == 2, "two runs")
    browser.execute_script(
        "for (const row of document.querySelectorAll('#runs tbody tr')) row.mine = row.cells[1].firstChild.mine = 1;"
        "window.drawn = []; new MutationObserver(all => { for (const each of all)"
        " window.drawn.push(each.target.closest?.('tr')?.dataset.id ?? each.target.nodeName); })"
        ".observe(document.querySelector('#runs tbody'), { childList: true, subtree: true, characterData: true });"
    )
    lines(going, 0, steps(21, 33, now))
    until(lambda: "33 / 100" in texts(browser, "#runs td.c-progress > span:first-child"), "the new step", 5)
    assert browser.execute_script("return [...document.querySelectorAll('#runs tbody tr')].every(row => row.mine)")
    assert browser.execute_script("return [...document.querySelectorAll('#runs .c-name a')].every(link => link.mine)")
    assert set(browser.execute_script("return window.drawn")) == {going.load().id}
    late = over(make_run, "late", now - 50, last=1)
    until(lambda: names(browser) == ["going", "late", "quiet"], "a run that was submitted later", 5)
    shutil.rmtree(late.store.url)
    until(lambda: names(browser) == ["going", "quiet"], "a run that was removed to go", 5)
    assert quiet.load().id.endswith("aaaa")


def test_by_keyboard_alone(browser, serve, four):
    show(browser, serve(four))
    until(lambda: len(names(browser)) == 4, "the runs")
    press(browser, "/", "a", "l", "p")
    assert names(browser) == ["alpha"]
    press(browser, Keys.ESCAPE, Keys.ESCAPE)
    assert len(names(browser)) == 4
    press(browser, "j", "j", "x", Keys.ARROW_DOWN, "x", "k")
    assert browser.switch_to.active_element.text == "beta"
    assert texts(browser, ".selection > span") == ["2 chosen"]
    press(browser, Keys.ENTER)
    until(lambda: texts(browser, "main h1") == ["beta"] and count(browser, "path.line"), "the page of the run")
    assert browser.switch_to.active_element.tag_name == "h1"
    press(browser, Keys.ESCAPE)
    until(lambda: len(names(browser)) == 4, "the list")
    until(lambda: browser.switch_to.active_element.text == "beta", "the cursor to be where it was")
    press(browser, "c")
    until(lambda: count(browser, 'section[aria-label="Loss"] path.line') == 2, "two curves")
    press(browser, "?")
    assert browser.find_element(By.ID, "help").is_displayed()
    press(browser, Keys.ESCAPE)
    assert not browser.find_element(By.ID, "help").is_displayed()
    press(browser, "/")
    until(lambda: browser.switch_to.active_element.get_attribute("id") == "filter", "the filter to have the focus")


def test_curves_over_one_another(browser, serve, four):
    served = serve(four)
    by_name = {row["name"]: row["id"] for row in served.ask("api/runs")[1]["runs"]}
    show(browser, served, f"#/compare?ids={by_name['alpha']},{by_name['beta']},{by_name['gamma']}")
    until(lambda: count(browser, 'section[aria-label="Loss"] path.line') == 3, "three curves")
    assert texts(browser, 'section[aria-label="Loss"] .legend .label') == ["alpha", "beta", "gamma"]
    plot = browser.find_element(By.CSS_SELECTOR, 'section[aria-label="Loss"] .chart')
    plot.send_keys(Keys.HOME)
    until(lambda: spoken(browser).startswith("step 1: alpha "), "the first values to be said")
    plot.send_keys(Keys.ARROW_RIGHT)
    until(lambda: spoken(browser).startswith("step 2: alpha "), "the next values to be said")
    plot.send_keys(Keys.END)
    until(lambda: spoken(browser).startswith("step 70: gamma "), "only the curve that goes so far")
    assert count(browser, 'section[aria-label="Loss"] .cursor') == 1
    before = browser.find_element(By.CSS_SELECTOR, 'section[aria-label="Loss"] path.line').get_attribute("d")
    browser.find_element(By.ID, "log").click()
    after = browser.find_element(By.CSS_SELECTOR, 'section[aria-label="Loss"] path.line').get_attribute("d")
    assert before != after
    browser.find_element(By.ID, "smooth").send_keys(Keys.PAGE_UP)
    assert count(browser, 'section[aria-label="Loss"] path.line.raw') == 3
    browser.find_element(By.CSS_SELECTOR, 'section[aria-label="Loss"] .legend button').click()
    assert count(browser, 'section[aria-label="Loss"] path.line.raw') == 2
    browser.find_element(By.CSS_SELECTOR, 'section[aria-label="MFU"] summary').click()
    until(lambda: count(browser, 'section[aria-label="MFU"] tbody tr') > 60, "the table of the data")
    assert texts(browser, 'section[aria-label="MFU"] thead th') == ["step", "alpha", "beta", "gamma"]


def test_one_run(browser, serve, make_run, alive):
    run = interrupted(make_run, alive, "main", time.time())
    show(browser, serve(make_run.runs_url), f"#/run/{run.load().id}")
    until(lambda: count(browser, 'section[aria-label="Timeline"] rect.span') > 8, "the timeline")
    assert texts(browser, 'section[aria-label="Attempts"] .state-badge') == [
        "▶running",
        "✕failed",
        "✕failed",
        "◐preempted",
    ]
    assert "train.lr" in texts(browser, 'section[aria-label="Changes of configuration"] code')
    line = browser.find_element(By.CSS_SELECTOR, 'section[aria-label="Timeline"] .chart')
    line.send_keys(Keys.ARROW_RIGHT)
    until(lambda: spoken(browser).startswith("Waiting for nodes, 25m"), "the first span to be said")
    until(lambda: texts(browser, "#log div")[-1:] and "rank 0" in texts(browser, "#log div")[-1], "the log")
    ranks = browser.find_element(By.ID, "log-rank")
    ranks.send_keys("1", Keys.ENTER)
    until(lambda: "rank 1" in (texts(browser, "#log div") or [""])[-1], "the log of another rank")
    run.log(3, 1, "the newest line\n", part=1)
    until(lambda: (texts(browser, "#log div") or [""])[-1].endswith("the newest line"), "the log to be followed", 8)
    run.end(3, "finished", time=time.time(), last_step=12_000)
    until(lambda: texts(browser, ".headline .state-badge") == ["✓finished"], "the end to be seen", 10)


def test_a_study_and_its_parallel_coordinates(browser, serve, make_run):
    study = sweep(make_run.runs_url, time.time())
    served = serve(make_run.runs_url)
    show(browser, served)
    until(lambda: names(browser) == ["lr search"], "the study in the list")
    press(browser, "j", Keys.ENTER)
    until(lambda: count(browser, "path.trial") == 30, "a line for each trial")
    assert browser.current_url.endswith(study)
    labels = texts(browser, "svg.parallel text.label")
    assert labels == ["train.lr", "train.warmup_steps", "model", "train.dtype", "eval/loss"]
    strip = browser.find_elements(By.CSS_SELECTOR, "rect.strip")[0]
    ActionChains(browser).move_to_element(strip).click_and_hold().move_by_offset(0, -200).release().perform()
    left = count(browser, "path.trial:not(.out)")
    assert 0 < left < 30
    assert len(texts(browser, "#trials tbody tr")) == left
    browser.find_element(By.XPATH, "//button[text()='Reset filters']").click()
    assert len(texts(browser, "#trials tbody tr")) == 30
    browser.find_element(By.CSS_SELECTOR, '[aria-roledescription="parallel coordinates"]').send_keys(Keys.ARROW_DOWN)
    until(lambda: spoken(browser).startswith("trial 17, complete, eval/loss 2.00"), "the best trial to be said")
    assert texts(browser, "tr.lit th") == ["17"]
    browser.find_element(By.XPATH, "//th/button[text()='eval/loss']").click()
    assert texts(browser, "#trials tbody th")[0] == "17"


def test_goodput_by_week(browser, serve, make_run, alive):
    now = time.time()
    for back in range(4):
        over(make_run, f"week-{back}", now - (back + 1) * 7 * 86400, last=30)
    interrupted(make_run, alive, "main", now)
    show(browser, serve(make_run.runs_url), "#/goodput")
    until(lambda: count(browser, "g.week") >= 5, "five weeks")
    box = browser.find_element(By.CSS_SELECTOR, 'section[aria-label="By week"] .chart')
    box.send_keys(Keys.END)
    until(lambda: "node-hours, goodput" in spoken(browser), "the week to be said")
    browser.find_element(By.CSS_SELECTOR, 'section[aria-label="By week"] summary').click()
    until(lambda: len(texts(browser, 'section[aria-label="By week"] tbody tr')) >= 5, "the table")


def test_what_others_wrote_is_text(browser, serve, make_run, alive):
    now = time.time()
    run = live(make_run, alive, HOSTILE, now, 20, id="20260131-120000-hostile-aaaa", owner=HOSTILE)
    run.log(0, 0, f"{HOSTILE}\n\x1b]0;owned\x07line\n")
    ended = over(make_run, "failed", now - 9000, "failed", last=20)
    ended.end(0, "failed", time=now, error=HOSTILE, detail=HOSTILE, failed_host=HOSTILE, failed_rank=0)
    served = serve(make_run.runs_url)
    show(browser, served)
    until(lambda: HOSTILE in names(browser), "the name, as it is")
    for each in (run, ended):
        show(browser, served, f"#/run/{each.load().id}")
        until(lambda: len(texts(browser, "#log div")) > 1, "the log")
        assert "<script>" in browser.find_element(By.TAG_NAME, "main").text
    assert count(browser, "main img, main script") == 0
    show(browser, served, f"#/compare?ids={run.load().id}")
    until(lambda: count(browser, "path.line") >= 3, "the curves")
    assert browser.title != "owned"


def test_the_token_is_asked_for_and_not_shown(browser, serve, four):
    served = serve(four, "--host", "0.0.0.0", quiet=False)
    port = served.url.rsplit(":", 1)[1]
    browser.get(f"http://127.0.0.1:{port}#token={served.token}")
    until(lambda: len(names(browser)) == 4, "the runs")
    assert "token" not in browser.current_url
    browser.execute_script("sessionStorage.clear()")
    browser.get("about:blank")
    browser.get(f"http://127.0.0.1:{port}")
    until(lambda: browser.find_element(By.ID, "login").is_displayed(), "to be asked")
    field = browser.find_element(By.ID, "token")
    field.send_keys("not-this-one-surely", Keys.ENTER)
    until(lambda: "not the token" in browser.find_element(By.ID, "login-error").text, "to be asked again")
    browser.find_element(By.ID, "token").send_keys(served.token or "", Keys.ENTER)
    until(lambda: len(names(browser)) == 4, "the runs")
    refused = [each for each in browser.get_log("browser") if "401" not in each["message"]]
    assert refused == []


def test_actions_ask_first(browser, serve, make_run, alive):
    run = live(make_run, alive, "mine", time.time(), 20)
    served = serve(make_run.runs_url, "--allow-actions")
    browser.get(f"{served.printed}")
    until(lambda: names(browser) == ["mine"], "the run")
    press(browser, "j", Keys.ENTER)
    until(lambda: texts(browser, ".actions button") == ["Save and cancel", "Cancel"], "what can be done")
    browser.find_elements(By.CSS_SELECTOR, ".actions button")[1].click()
    assert browser.switch_to.active_element.text == "Keep as it is"
    press(browser, Keys.ENTER)
    until(lambda: not browser.find_element(By.ID, "confirm").is_displayed(), "the question to go")
    assert not run.store.exists("job/0000/intent.json")
    browser.find_elements(By.CSS_SELECTOR, ".actions button")[1].click()
    browser.find_element(By.ID, "confirm-yes").click()
    until(lambda: run.store.exists("job/0000/intent.json"), "the intent")


def test_a_server_that_goes_away_and_comes_back_is_shown(browser, serve, four):
    served = serve(four)
    show(browser, served)
    until(lambda: len(names(browser)) == 4, "the runs")
    assert not browser.find_element(By.ID, "trouble").is_displayed()
    assert served.end() == 0
    until(lambda: "does not answer" in browser.find_element(By.ID, "trouble").text, "the trouble")
    assert len(names(browser)) == 4
    serve(four, "--port", served.url.rsplit(":", 1)[1].rstrip("/"))
    until(lambda: not browser.find_element(By.ID, "trouble").is_displayed(), "the page to be fresh again")
    refused = [each for each in browser.get_log("browser") if "ERR_" not in each["message"]]
    assert refused == []


def test_a_store_that_does_not_answer_is_shown(browser, serve, dead_port):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{dead_port}"}
    show(browser, serve("s3://nothing/runs", **keys, AWS_EC2_METADATA_DISABLED="true", AWS_MAX_ATTEMPTS="1"))
    until(lambda: "not up to date: s3://nothing/runs" in browser.find_element(By.ID, "trouble").text, "the trouble")
    assert texts(browser, "p.empty") == ["Reading the run store…"]


def test_a_hundred_live_runs(browser, serve, make_run, alive):
    now = time.time()
    runs = [
        live(make_run, alive, f"run-{number:03d}", now, 12, most=1000, id=f"20260131-{number:06d}-run-aaaa")
        for number in range(100)
    ]
    served = serve(make_run.runs_url)
    show(browser, served)
    until(lambda: len(names(browser)) == 100, "a hundred runs")
    browser.execute_script("for (const row of document.querySelectorAll('#runs tbody tr')) row.mine = 1;")
    slowest = 0.0
    for look in range(3):
        first = 13 + look
        for run in runs:
            lines(run, 0, steps(first, first, time.time() - 2))
        begun, shown = time.monotonic(), 0
        while shown < 100:
            asked = time.monotonic()
            assert served.ask("healthz")[0] == 200
            slowest = max(slowest, time.monotonic() - asked)
            shown = texts(browser, "#runs td.c-progress > span:first-child").count(f"{first} / 1,000")
            assert time.monotonic() - begun < 5, f"{shown} of 100 rows after 5 s"
    assert slowest < 1
    assert browser.execute_script("return [...document.querySelectorAll('#runs tbody tr')].every(row => row.mine)")


def accessible(browser: Chrome) -> list[tuple[str, str]]:
    """Role and name of everything that a screen reader finds."""
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes: list[dict[str, Any]] = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    browser.execute_cdp_cmd("Accessibility.disable", {})
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]


def test_what_a_screen_reader_finds(browser, serve, make_run, alive):
    run = interrupted(make_run, alive, "main", time.time())
    served = serve(make_run.runs_url)
    show(browser, served)
    until(lambda: names(browser) == ["main"], "the run")
    found = accessible(browser)
    assert {
        ("searchbox", "Filter runs"),
        ("table", "Runs and studies"),
        ("checkbox", "Choose main"),
        ("link", "main"),
    } <= set(found)
    assert {("columnheader", "State"), ("button", "State"), ("navigation", "Pages"), ("heading", "Runs")} <= set(found)
    assert ("button", "Theme: as the system") in found
    assert any(role == "cell" and name.startswith("running") for role, name in found), "a state is a word, not a colour"
    show(browser, served, f"#/run/{run.load().id}")
    until(lambda: len(texts(browser, "#log div")) > 1, "the log")
    found = accessible(browser)
    assert ("group", "Loss. Left and right arrows move the cursor.") in found
    assert ("group", "Timeline of attempts. Left and right arrows move from span to span.") in found
    assert {("combobox", "Rank"), ("combobox", "Attempt"), ("region", "Log lines"), ("heading", "Attempts")} <= set(
        found
    )
    controls = ("button", "link", "checkbox", "combobox", "searchbox", "slider", "textbox", "table", "region", "dialog")
    assert [(role, name) for role, name in found if role in controls and not name] == []


def test_themes_and_widths(browser, serve, make_run, alive):
    now = time.time()
    ids = [interrupted(make_run, alive, "a-name-that-is-rather-long-for-a-phone", now).load().id]
    study = sweep(make_run.runs_url, now)
    served = serve(make_run.runs_url)
    for width in (360, 1920):
        resize(browser, width)
        for path, sign in (
            ("", "#runs tbody tr"),
            (f"#/run/{ids[0]}", "rect.span"),
            (f"#/compare?ids={ids[0]}", "path.line"),
            (f"#/study/{study}", "path.trial"),
            ("#/goodput", "g.week"),
        ):
            show(browser, served, path)
            until(lambda sign=sign: count(browser, sign), f"{path} at {width}")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, path
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(background)
    button = browser.find_element(By.ID, "theme")
    button.click()
    button.click()
    assert button.get_attribute("aria-label") == "Theme: dark"
    dark = browser.execute_script(background)
    assert light != dark
    browser.refresh()
    assert browser.execute_script(background) == dark, "it is remembered"
    browser.find_element(By.ID, "theme").click()
    assert browser.find_element(By.ID, "theme").get_attribute("aria-label") == "Theme: as the system"
