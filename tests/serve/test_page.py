"""The page at `/` in headless Chromium: the real application, over an engine that says what a test wants."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from helpers_http import App
from helpers_server import eventually, free_port

from wave64.serve.http.page import HEADERS, HTML
from wave64.serve.http.schemas import ApiError
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Statistics

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&amp;'
CALL = '{"name": "get_weather", "parameters": {"city": "Oslo & <b>Bergen</b>"}}'
ROWS = [{"op": "rms_norm", "backend": "hip", "status": "bound", "reason": None},
        {"op": "rms_norm", "backend": "aiter", "status": "off", "reason": "needs <AITER>"},
        {"op": "sample", "backend": "hip", "status": "off", "reason": "needs a GPU"},
        {"op": "sample", "backend": "reference", "status": "bound", "reason": None}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def test_it_is_one_file_that_asks_no_other_server(tokenizer):
    app = App(tokenizer, api_key="secret")
    answer = app.get("/")
    assert (answer.status_code, answer.text) == (200, HTML)
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(r"https?://|//\w|@import|<script \w|<link(?! rel=\"icon\" href=\"data:,\")", HTML)
    assert not re.findall(r"(inner|outer)HTML|insertAdjacent|document\.write|\beval\b|new Function", HTML)
    assert not re.findall(r"Storage|cookie|indexedDB", HTML)
    script = re.findall(r"<script>(.*?)</script>", HTML, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert policy == HEADERS["Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert app.request("HEAD", "/").status_code == 200
    assert app.post("/v1/chat/completions", messages=[]).status_code == 401


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,860"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield made
    made.quit()


class Page:
    """The page of a server, as a user sees it."""

    def __init__(self, browser, app: App, url: str) -> None:
        self.browser, self.app = browser, app
        browser.get(url)

    def __call__(self, script: str, *args):
        return self.browser.execute_script(f"return {script}", *args)

    def text(self, selector: str) -> str:
        """What is in an element, folded or not."""
        return self("document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def last(self, selector: str) -> str:
        """What is in the last of such elements."""
        return self("[...document.querySelectorAll(arguments[0])].at(-1).textContent", selector)

    def type(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def ask(self, text: str, answer: str) -> None:
        """Type a message, and wait for the answer, which the engine is to give."""
        tokenizer = self.app.generator.tokenizer
        self.app.engine.tokens = tokenizer.encode(answer, add_special_tokens=False)
        before = self("document.querySelectorAll('.said footer').length")
        self.type(text, "\ue007")  # Enter
        assert eventually(lambda: self("document.querySelectorAll('.said footer').length") > before)

    def prompt(self) -> str:
        """What the engine was asked to continue last."""
        return self.app.generator.tokenizer.decode(self.app.engine.requests[-1].input_ids, skip_special_tokens=False)

    def complaints(self) -> list[str]:
        """Of the console, but of answers of status 401."""
        return [line["message"] for line in self.browser.get_log("browser") if "401" not in line["message"]]


@pytest.fixture
def show(browser, tokenizer) -> Iterator:
    """show(**settings) gives the Page of a server with these."""
    with served() as start:
        yield lambda **settings: start(browser, App(tokenizer, **settings))
    browser.get("about:blank")


@contextmanager
def served() -> Iterator:
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(browser, app: App) -> Page:
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app.asgi, port=port, log_config=None, lifespan="off"))

        async def serve() -> None:
            await server.serve()
            await app.generator.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        running.append((server, thread))
        assert eventually(lambda: server.started)
        return Page(browser, app, f"http://127.0.0.1:{port}/")

    try:
        yield start
    finally:
        for server, thread in running:
            server.force_exit = server.should_exit = True
            thread.join()


def test_a_chat_streams_with_reasoning_folded_and_calls_shown(show):
    page = show(reasoning_parser="deepseek-r1", tool_call_parser="llama3")
    page.ask("Hello", "<think>Let me see.</think>Good day.")
    assert page.text(".said.user div") == "Hello"
    assert page.text("details.reason div") == "Let me see."
    assert page("document.querySelector('details.reason').open") is False
    assert page.text(".said.assistant > div") == "Good day."
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, first after \d+ ms", page.text(".said footer"))
    page("document.getElementById('uses').click()")
    page.ask("Weather?", "<think></think>" + CALL)
    assert page.prompt() == "[user] Hello\n[assistant] Good day.\n[user] Weather?\n[assistant] "
    assert (page.text(".call b"), page.text(".call pre")) == (
        "calls get_weather", '{"city": "Oslo & <b>Bergen</b>"}')  # fmt: skip
    page.ask("7 degrees\ue004", "<think></think>Cold.")  # Tab goes from the result to its button
    assert page.prompt().endswith("[user] Weather?\n[assistant] \n[tool] 7 degrees\n[assistant] ")
    assert page.last(".said.assistant > div:not(.call)") == "Cold."
    page.ask("Hm?", "A thought that does not end")
    assert page.last("details.reason div") == "A thought that does not end"
    assert page.complaints() == []


def test_nothing_that_a_model_says_is_html(show):
    page = show(reasoning_parser="qwen3", tool_call_parser="llama3", served_model_name="<i>m</i>")
    page("document.getElementById('uses').click()")
    page.ask(HOSTILE, f"<think>{HOSTILE}</think>{HOSTILE}")
    page.ask("again", json.dumps({"name": "get_weather", "parameters": {"city": HOSTILE}}))
    assert page("window.hacked") is None
    assert page("document.querySelectorAll('#log img, #log script, #log i, header i').length") == 0
    for where in (".said.user div", "details.reason div", ".said.assistant > div"):
        assert page.text(where) == HOSTILE
    assert json.loads(page.text(".call pre")) == {"city": HOSTILE}
    assert page.text("#model").startswith("<i>m</i> on cpu")
    page("document.querySelector('h2').innerHTML = arguments[0]", HOSTILE)
    page.browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert page("window.hacked") is None, "what is HTML by mistake does not run: the policy of the page forbids it"


def test_the_key_is_asked_for_and_kept_nowhere(show):
    page = show(api_key="secret", served_model_name="tiny")
    page.type("Hello", "\ue007")
    assert eventually(lambda: page("document.getElementById('ask-key').open"))
    page.type("wrong", "\ue007")
    assert eventually(lambda: page("document.getElementById('ask-key').open && !document.getElementById('key').value"))
    page.type("secret", "\ue007")
    assert eventually(lambda: page.text(".said footer"))
    page.ask("More", "yes")
    assert page("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.browser.refresh()
    page.type("Hello", "\ue007")
    assert eventually(lambda: page("document.getElementById('ask-key').open"))
    page.type("\ue00c")
    assert eventually(lambda: "API key" in page.text(".said.error"))


def test_what_the_server_does_is_shown(show):
    page = show()
    page.app.engine.ready.backends = ROWS
    page.app.engine.statistics = Statistics(running=3, waiting=2, pages_used=25, pages_total=100, prompt_tokens=300,
                                            generated_tokens=50, cached_tokens=100, preemptions=7)  # fmt: skip
    page.app.generator.metrics.first_token.observe(2.0)
    page.browser.refresh()
    assert eventually(lambda: page.text("#kv") == "25.0 %")
    assert (page.text("#running"), page.text("#queued"), page.text("#hit")) == ("3", "2", "25.0 %")
    assert page("document.getElementById('kv-meter').value") == 0.25
    assert (page.text("#ttft"), page.text("#preempted")) == ("2000 ms", "7")
    page.app.engine.statistics.generated_tokens += 1000
    assert eventually(lambda: page("document.querySelector('#spark polyline').getAttribute('points')").count(",") >= 2)
    rows = page("[...document.querySelectorAll('#ops tr')].map((row) => [row.querySelector('th').textContent, "
                "row.querySelector('summary').textContent, row.querySelector('p').textContent])")
    assert rows == [["rms_norm", "hip", "aiter: needs <AITER>"], ["sample", "reference", "hip: needs a GPU"]]
    assert page.text("#status") == "ok"
    page("(window.asked = window.fetch, window.fetch = () => Promise.reject())")
    assert eventually(lambda: page.text("#status") == "the server does not answer")
    page("(window.fetch = window.asked)")
    assert eventually(lambda: page.text("#status") == "ok")


CONTRAST = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((c) => c / 255)
      .map((c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const back = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
  };
  const what = 'h1, h1 b, h2, p, dt, dd, label, button:not(:disabled), th, summary, textarea, input, .said div';
  return [...document.querySelectorAll(what)]
    .map((one) => [light(getComputedStyle(one).color), light(back(one))])
    .map(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
})()"""


def test_it_is_usable_by_keyboard_and_screen_reader_in_the_light_and_in_the_dark(show):
    page = show(answer="ok")
    page.ask("Hello", "Fine.")
    assert page("document.activeElement.id") == "prompt"
    unnamed = page("[...document.querySelectorAll('input, textarea, button, meter, svg, dialog, [role]')].filter("
                   "(one) => !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label') || "
                   "one.getAttribute('aria-labelledby'))).map((one) => one.outerHTML)")  # fmt: skip
    assert unnamed == []
    assert page("[document.documentElement.lang, document.getElementById('log').getAttribute('aria-live')]") == [
        "en", "polite"]  # fmt: skip
    seen = []
    for _ in range(9):
        page.type("\ue004")
        seen.append(page("document.activeElement.id || document.activeElement.tagName"))
    assert [name for name in seen if name in ("send", "clear", "SUMMARY")][:3] == ["send", "clear", "SUMMARY"]
    colors = []
    for scheme in ("light", "dark"):
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                     {"features": [{"name": "prefers-color-scheme", "value": scheme}]})  # fmt: skip
        colors.append(page("getComputedStyle(document.body).backgroundColor"))
        assert min(page(CONTRAST)) > 4.5
    assert colors[0] != colors[1]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_what_is_set_is_asked_for_and_what_was_said_is_forgotten_when_it_is_cleared(show):
    page = show(tool_call_parser="llama3")
    page("(document.getElementById('system').value = 'Be brief.', document.getElementById('temperature').value = 0.5, "
         "document.getElementById('limit').value = 7)")  # fmt: skip
    page.type("One", "\ue008\ue007", "\ue000", "more")  # Shift+Enter
    assert page("document.getElementById('prompt').value") == "One\nmore"
    assert page.app.engine.requests == []
    page.ask("", "Good.")
    assert page.prompt() == "[system] Be brief.\n[user] One\nmore\n[assistant] "
    params = page.app.engine.requests[-1].params
    assert (params.temperature, params.max_new_tokens) == (0.5, 7)
    page("document.getElementById('limit').value = 99")
    page("document.getElementById('uses').click()")
    page.ask("Weather?", CALL)
    page("document.getElementById('prompt').focus()")
    page.ask("Never mind", "Well.")  # the call has no result, and is not sent
    assert page.prompt().endswith("[assistant] Good.\n[user] Weather?\n[user] Never mind\n[assistant] ")
    page("document.getElementById('clear').click()")
    assert page("[document.querySelectorAll('.said').length, document.activeElement.id]") == [0, "prompt"]
    page.ask("Again", "Yes.")
    assert page.prompt() == "[system] Be brief.\n[user] Again\n[assistant] "


def test_an_error_in_the_middle_of_a_stream_is_shown(show):
    page = show()
    stream = page.app.engine.stream

    async def lost(requests):
        async for output in stream(requests):
            output.finish_reason = None
            yield output
        raise ApiError("the engine is gone: lost", status=503)

    page.app.engine.stream, page.app.engine.abort = lost, lambda rid: None
    page.type("Hello", "\ue007")
    assert eventually(lambda: page.text(".said.error div") == "the engine is gone: lost")
    assert page.text(".said.assistant > div") == "ok"
    assert page("document.getElementById('send').disabled") is False


def test_an_answer_can_be_stopped(show):
    page = show()
    go_on = threading.Event()

    async def stuck(requests):
        page.app.engine.requests += requests
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return
        yield

    page.app.engine.stream, page.app.engine.abort = stuck, lambda rid: None
    page.type("Hello", "\ue007")
    assert eventually(lambda: page.app.engine.requests)
    assert page("document.getElementById('send').disabled") is True
    page.type("\ue00c")
    assert eventually(lambda: not page("document.getElementById('send').disabled"))
    assert page("document.querySelectorAll('.said').length") == 1, "the message, and neither an answer nor an error"
    page.type("Again", "\ue007")
    assert eventually(lambda: len(page.app.engine.requests) == 2)
    page("document.getElementById('stop').click()")
    assert eventually(lambda: not page("document.getElementById('send').disabled"))
    go_on.set()
