"""Draws docs/page.png, the page at `/`: `python tests/page_picture.py`.

A server of demo-tools on a CPU is asked for a sum, the weather and a story, as a user would ask. The picture says of
which page it is: it has the SHA-256 of page.html in a chunk of text, which a test compares."""

import hashlib
import struct
import tempfile
import zlib
from pathlib import Path

from helpers_browser import chromium
from test_docs_run import served

from wave64.serve.http.page import HTML

FILE = Path(__file__).parents[1] / "docs" / "page.png"
COMMAND = "python -m wave64.launch_server --model-path demo-tools --reasoning-parser qwen3 --device cpu"
SIZE = {"width": 1180, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
ENTER, TAB = "\ue007", "\ue004"
ANSWERS = "return document.querySelectorAll('.said footer').length"
IDLE = "return document.getElementById('stop').disabled"
LOADED = "return document.querySelector('#ops tr') != null"
WHOLE = """for (const fold of document.querySelectorAll("details.reason")) fold.open = true;
const row = [...document.querySelectorAll("#ops tr")].find(row => row.textContent.startsWith("all_reduce"));
row.querySelector("details").open = true;
document.getElementById("log").scrollTop = document.getElementById("log").scrollHeight;"""
SIGNATURE, KEY = b"\x89PNG\r\n\x1a\n", b"page.html\0"


def digest() -> bytes:
    """Of the page as it is now."""
    return hashlib.sha256(HTML.encode()).hexdigest().encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def marked(png: bytes) -> bytes:
    """The picture with the page's digest behind its header."""
    end = len(SIGNATURE) + 25  # of the header's chunk, which is first
    return png[:end] + chunk(b"tEXt", KEY + digest()) + png[end:]


def drawn_of(png: bytes) -> bytes:
    """The digest that `marked` put there."""
    return png.partition(b"tEXt" + KEY)[2][:64]


def main() -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    with (tempfile.TemporaryDirectory() as folder, served(COMMAND, Path(folder)) as port, chromium() as browser):
        def say(*keys: str) -> None:
            before = browser.execute_script(ANSWERS)
            browser.switch_to.active_element.send_keys(*keys)
            WebDriverWait(browser, 300, 0.05).until(
                lambda it: it.execute_script(ANSWERS) > before and it.execute_script(IDLE))

        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
        browser.get(f"http://127.0.0.1:{port}/")
        WebDriverWait(browser, 60).until(lambda it: it.execute_script(LOADED))
        say("What is 26 plus 58?", ENTER)
        browser.execute_script("document.getElementById('uses').click()")
        say("What is the weather in Oslo?", ENTER)
        say("7 degrees, rain", TAB, ENTER)
        browser.execute_script("document.getElementById('uses').click()")
        say("Tell me a story.", ENTER)
        browser.execute_script(WHOLE)
        WebDriverWait(browser, 10, 0.05).until(lambda it: it.execute_script(  # of the story: figures come each second
            "return Number(document.getElementById('rate').textContent) > 0"))
        FILE.write_bytes(marked(browser.get_screenshot_as_png()))


if __name__ == "__main__":
    main()
