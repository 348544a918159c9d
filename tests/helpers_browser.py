"""A headless Chromium that selenium drives, for the scripts that draw pictures of pages."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

FLAGS = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,860", "hide-scrollbars",
         "force-device-scale-factor=1")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Without a Chromium the process ends with what to install."""
    from selenium import webdriver

    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver is None:
        sys.exit("Chromium and its driver are not here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    made = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield made
    finally:
        made.quit()
