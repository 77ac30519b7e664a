"""A real headless Chromium, Debian's, and nothing that it would fetch from the network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PACKAGES = ("chromium", "chromium-driver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
WIDTH, HEIGHT = 1280, 900


def install() -> tuple[str, str]:
    """Paths of Chromium and its driver, installed first where they are missing. Fails where they cannot be."""
    for attempt in range(2):
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium and driver:
            return chromium, driver
        if attempt == 0 and os.geteuid() == 0 and shutil.which("apt-get"):
            subprocess.run(["apt-get", "update", "--quiet"], check=False, capture_output=True, timeout=300)
            command = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *PACKAGES]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.fail(f"{' '.join(command)}: {done.stderr[-1000:]}", pytrace=False)
    pytest.fail(f"no Chromium for the tests: apt-get install {' '.join(PACKAGES)}", pytrace=False)


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """The browser, with a profile of its own and a log of what pages complain about."""
    binary, driver = install()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield browser
    finally:
        browser.quit()
