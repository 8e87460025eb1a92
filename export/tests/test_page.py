"""The page of `blip2 serve` in a browser, as `make setup-browser` unpacks one, against a stand-in for the server."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "server" / "page"
SAMPLES = ROOT / "models" / "samples"
UNPACKED = ROOT / "target" / "browser" / "unpacked" / "usr" / "lib"
FILES = {"/": "index.html", "/page/app.js": "app.js", "/page/style.css": "style.css"}
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
MODEL = {"id": "large", "object": "model", "tasks": ["caption", "ask"], "state": "ready", "is_demo": False}
MATCHING = {**MODEL, "id": "matching", "tasks": ["match", "embed"]}
LOOKED = {"queue": 0.5, "decode_image": 2.0, "preprocess": 3.0, "vision": 40.0, "qformer": 9.5, "total": 56.0}
WRITTEN = {"queue": 0.5, "prompt": 0.5, "waiting": 0.0, "prefill": 12.0, "decode": 30.0, "total": 44.0}
MATCHES = {"a dog": (0.02, -0.1), "a blue ring": (0.97, 0.41), "a <b>ring</b>": (0.4, 0.2)}
LIGHT, DARK = "rgb(251, 251, 250)", "rgb(22, 24, 26)"


# The stand-in


@dataclass
class Reply:
    status: int
    body: bytes | dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> Reply:
    error = {"message": message, "type": kind, "param": None, "code": None}
    return Reply(status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()})


def busy() -> Reply:
    return refusal(429, "too many wait already", "overloaded_error", retry_after="1")


def stream(*events: dict[str, Any] | str) -> Reply:
    lines = (event if isinstance(event, str) else json.dumps(event) for event in events)
    body = "".join(f"data: {line}\r\n\r\n" for line in lines).encode()
    return Reply(200, body, {"Content-Type": "text/event-stream"})


@dataclass
class StandIn:
    """Answers as the server does. `replies`: path → what its next requests get instead. A closed `gate` holds what streams."""

    url: str
    models: list[dict[str, Any]] = field(default_factory=lambda: [MODEL])
    samples: list[Path] = field(default_factory=list)
    key: str | None = None
    pieces: list[str] = field(default_factory=lambda: ["a blue", " ring at", " the left"])
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    log: list[tuple[str, Any]] = field(default_factory=list)  # path and what was posted
    left: threading.Event = field(default_factory=threading.Event)  # somebody went before the end of a stream

    def posted(self, path: str) -> list[Any]:
        return [body for asked, body in self.log if asked == path]

    def is_left(self) -> None:
        assert self.left.wait(10), "nobody went before the end of the stream"


class Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        is_json = self.headers["Content-Type"] == "application/json"
        self.answer(json.loads(content) if is_json else self.parts(content))

    def parts(self, content: bytes) -> dict[str, Any]:
        message = message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + content)
        named = [(part.get_param("name", header="content-disposition"), part) for part in message.get_payload()]
        return {str(name): part.get_payload(decode=True) for name, part in named}

    def answer(self, body: Any) -> None:
        path = self.path.partition("?")[0]
        if path in FILES:
            return self.send_file(SOURCE / FILES[path])
        if self.stand_in.key and self.headers["Authorization"] != f"Bearer {self.stand_in.key}":
            return self.send(refusal(401, "this key is not known here", "authentication_error"))
        self.stand_in.log.append((path, body))
        if waiting := self.stand_in.replies.get(path):
            return self.send(waiting.pop(0))
        if path in ("/caption", "/ask"):
            return self.send_stream()
        self.send(self.reply(path, body))

    def reply(self, path: str, body: Any) -> Reply:
        named = {f"/samples/{sample.name}": sample for sample in self.stand_in.samples}
        if path == "/v1/models":
            return Reply(200, {"object": "list", "data": self.stand_in.models})
        if path == "/samples":
            return Reply(200, {"samples": [{"name": url.rpartition("/")[2], "url": url} for url in named]})
        if path in named:
            return Reply(200, named[path].read_bytes(), {"Content-Type": "image/png"})
        if path == "/images":
            return Reply(200, {"image_id": f"img-{body['model'].decode()}", "timings_ms": LOOKED})
        if path == "/match":
            numbers = [(text, *MATCHES.get(text, (0.5, 0.3))) for text in body["texts"]]
            keys = ("text", "itm_probability", "itc_similarity")
            matches = [dict(zip(keys, row, strict=True)) for row in numbers]
            return Reply(200, {"results": [{"matches": matches, "timings_ms": {"match": 7.0, "total": 7.5}}]})
        return refusal(404, f"nothing is at {path}", "not_found_error")

    def send_file(self, path: Path) -> None:
        self.send(
            Reply(200, path.read_bytes(), {"Content-Type": TYPES[path.suffix], "Content-Security-Policy": POLICY})
        )

    def send(self, reply: Reply) -> None:
        is_json = isinstance(reply.body, dict)
        content = json.dumps(reply.body).encode() if is_json else reply.body
        headers = {"Content-Type": "application/json", **reply.headers, "Content-Length": str(len(content))}
        self.begin(reply.status, headers)
        self.wfile.write(content)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_stream(self) -> None:
        self.begin(200, {"Content-Type": "text/event-stream", "Connection": "close"})
        first, *others = self.stand_in.pieces
        self.event({"text": first})
        if not self.wanted():
            return self.stand_in.left.set()
        for piece in others:
            self.event({"text": piece})
        text = "".join(self.stand_in.pieces)
        self.event({"result": {"text": text, "tokens": [5, 6, 7], "finish_reason": "stop", "timings_ms": WRITTEN}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def wanted(self) -> bool:
        """Waits for the gate; false if whoever asked has gone by then."""
        while not self.stand_in.gate.wait(0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return False  # nothing to read from a connection that is readable: it is closed
        return True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    class Bound(Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    Bound.stand_in = StandIn(f"http://127.0.0.1:{server.server_port}")
    Bound.stand_in.gate.set()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield Bound.stand_in
    server.shutdown()
    server.server_close()
    thread.join()


# The browser


# A browser reads commands from descriptor 3 and writes to 4.
LAUNCH = """
import fcntl, os, sys
for number, place in zip(sys.argv[1:3], (3, 4)):
    os.dup2(fcntl.fcntl(int(number), fcntl.F_DUPFD, 10), place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Chromium without a window, over its DevTools protocol."""

    def __init__(self, commands: int, messages: int) -> None:
        self.commands, self.messages = commands, messages
        self.ids, self.unread, self.events = count(1), b"", list[dict[str, Any]]()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        sent = {"id": next(self.ids), "method": method, "params": parameters}
        os.write(self.commands, json.dumps(sent | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (message := self.read()).get("id") != sent["id"]:
            self.events.append(message)
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            readable, _, _ = select.select([self.messages], [], [], 30)
            content = os.read(self.messages, 1 << 20) if readable else b""
            assert content, "the browser says nothing more"
            self.unread += content
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def tab(self) -> Iterator[Tab]:
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        yield Tab(self, session)
        self.call("Target.disposeBrowserContext", browserContextId=context)


@contextmanager
def launched(folder: Path) -> Iterator[Browser]:
    program = UNPACKED / "chromium" / "chromium-headless-shell"
    folder_of_libraries = UNPACKED / f"{platform.machine()}-linux-gnu"
    libraries = f"{folder_of_libraries}:{folder_of_libraries / 'pulseaudio'}"
    typed = ["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    (read, commands), (messages, write) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(read), str(write), str(program), *typed],
        pass_fds=(read, write),
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    try:
        yield Browser(commands, messages)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(20)
        os.close(messages)


@dataclass
class Tab:
    browser: Browser
    session: str

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def open(self, url: str, size: tuple[int, int] = (1280, 900), dark: bool = False, still: bool = False) -> Tab:
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        features = {"prefers-color-scheme": ("light", "dark")[dark]}
        features |= {"prefers-reduced-motion": ("no-preference", "reduce")[still]}
        self.call("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()])
        self.call("Page.navigate", url=url)
        self.until("document.querySelector('#key[open], main:not([hidden]), #notice:not([hidden])') !== null")
        return self

    def see(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        end = time.monotonic() + 15
        while not (found := self.see(expression)):
            assert time.monotonic() < end, f"never: {expression}\n{self.see('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        return self.see(f"document.querySelector({json.dumps(selector)}).textContent")

    def shows(self, selector: str, text: str) -> None:
        self.until(f"document.querySelector({json.dumps(selector)})?.textContent === {json.dumps(text)}")

    def is_visible(self, selector: str) -> bool:
        return self.see(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def click(self, selector: str, n_times: int = 1) -> None:
        x, y = self.see(
            f"(node => {{ node.scrollIntoView({{ block: 'center' }}); const at = node.getBoundingClientRect();"
            f"return [at.x + at.width / 2, at.y + at.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for i in range(1, n_times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=i)

    def fill(self, selector: str, text: str) -> None:
        self.see(f"(node => {{ node.focus(); node.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code, text = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)

    def choose(self, path: Path, input: str = "input[type=file]") -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=input)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def captioned(self, path: Path = SAMPLES / "0.png") -> None:
        self.choose(path)
        self.until("document.querySelector('#caption .status').textContent.includes('tokens')")

    def events(self) -> list[dict[str, Any]]:
        return [event for event in self.browser.events if event.get("sessionId") == self.session]

    def faults(self) -> list[str]:
        """Errors and refusals of the policy; answers that are errors are no faults of the page."""
        self.see("new Promise(done => setTimeout(done, 50))")
        mine = self.events()
        thrown = [str(event["params"]) for event in mine if event["method"] == "Runtime.exceptionThrown"]
        calls = [event["params"] for event in mine if event["method"] == "Runtime.consoleAPICalled"]
        entries = [event["params"]["entry"] for event in mine if event["method"] == "Log.entryAdded"]
        return [
            *thrown,
            *(str(call["args"]) for call in calls if call["type"] in ("error", "warning")),
            *(
                str(entry)
                for entry in entries
                if entry["level"] in ("error", "warning") and entry["source"] != "network"
            ),
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (UNPACKED / "chromium" / "chromium-headless-shell").is_file():
        pytest.skip("there is no browser; `make setup-browser` unpacks one")
    with launched(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as tab:
        yield tab
        assert tab.faults() == []


# The files


def test_the_page_is_small_and_holds_nothing_that_its_policy_refuses() -> None:
    texts = {name: (SOURCE / name).read_text() for name in FILES.values()}
    assert sum(len(text.encode()) for text in texts.values()) < 30_000
    html, script = texts["index.html"], texts["app.js"]
    assert "<style" not in html and not re.search(r"\s(style|on\w+)=", html)
    assert all(tag == "" for tag in re.findall(r"<script[^>]*>([^<]*)</script>", html))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|setAttribute\('style", script)
    elsewhere = re.findall(r"https?://[^'\"\s]+", "".join(texts.values()))
    assert elsewhere == ["http://www.w3.org/2000/svg"], "a name, and nothing that is fetched"


# Pictures


def test_a_chosen_picture_is_sent_once_and_its_caption_appears_as_it_is_written(stand_in: StandIn, tab: Tab) -> None:
    stand_in.gate.clear()
    tab.open(stand_in.url)
    assert tab.see("document.title") == "blip2" and not tab.is_visible("#notice")
    assert not tab.is_visible("#choice") and not tab.is_visible("#samples") and not tab.is_visible("#match")
    tab.choose(SAMPLES / "0.png")
    tab.shows("#caption-text", "a blue")
    assert tab.see("document.querySelector('#caption-text').ariaBusy") == "true"
    assert tab.text("#caption button") == "Stop"
    stand_in.gate.set()
    tab.shows("#caption-text", "a blue ring at the left")
    tab.shows("#caption .status", "3 tokens · 100 ms")
    assert tab.see("document.querySelector('#caption-text').ariaBusy") == "false"
    assert tab.text("#caption button") == "Describe"
    assert tab.see("document.querySelector('#picture').alt") == "0.png" and tab.is_visible("#picture")
    assert stand_in.posted("/images") == [{"model": b"large", "image": (SAMPLES / "0.png").read_bytes()}]
    asked = {"model": "large", "images": [{"image_id": "img-large"}], "options": {}, "stream": True}
    assert stand_in.posted("/caption") == [asked]


HANDED = """
(async () => {
  const bytes = await (await fetch('samples/1.png')).blob();
  const handed = new DataTransfer();
  handed.items.add(new File([bytes], 'handed.png', { type: 'image/png' }));
  const common = { bubbles: true, cancelable: true };
  const fire = (kind, Kind, name) => document.body.dispatchEvent(new Kind(kind, { ...common, [name]: handed }));
  EVENTS
})()
"""


@pytest.mark.parametrize(
    "events",
    [
        "fire('dragover', DragEvent, 'dataTransfer'); fire('drop', DragEvent, 'dataTransfer');",
        "fire('paste', ClipboardEvent, 'clipboardData');",
    ],
    ids=["dropped", "pasted"],
)
def test_a_picture_may_be_dropped_or_pasted(stand_in: StandIn, tab: Tab, events: str) -> None:
    stand_in.samples = [SAMPLES / "1.png"]
    tab.open(stand_in.url)
    tab.see(HANDED.replace("EVENTS", events))
    tab.shows("#caption-text", "a blue ring at the left")
    assert stand_in.posted("/images")[0]["image"] == (SAMPLES / "1.png").read_bytes()
    assert tab.see("document.querySelector('#picture').alt") == "handed.png"
    assert not tab.see("document.querySelector('#frame').classList.contains('over')")


def test_the_frame_opens_the_chooser(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.call("Page.setInterceptFileChooserDialog", enabled=True)
    tab.click("#frame")
    tab.see("new Promise(done => setTimeout(done, 100))")
    assert "Page.fileChooserOpened" in [event["method"] for event in tab.events()]


def test_a_phone_offers_its_camera(stand_in: StandIn, tab: Tab) -> None:
    tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
    tab.call("Emulation.setEmitTouchEventsForMouse", enabled=True, configuration="mobile")
    tab.open(stand_in.url, (390, 844))
    assert tab.is_visible(".camera")
    tab.choose(SAMPLES / "2.png", "input[capture=environment]")
    tab.shows("#caption-text", "a blue ring at the left")


def test_a_sample_is_chosen_with_the_keyboard(stand_in: StandIn, tab: Tab) -> None:
    stand_in.samples = [SAMPLES / "0.png", SAMPLES / "1.png"]
    tab.open(stand_in.url)
    tab.until("document.querySelectorAll('#samples img').length === 2")
    tab.see("document.querySelector('#samples button:last-child').focus()")
    tab.press("Enter")
    tab.shows("#caption-text", "a blue ring at the left")
    assert stand_in.posted("/images")[0]["image"] == (SAMPLES / "1.png").read_bytes()
    assert tab.see("[...document.querySelectorAll('#samples button')].map(b => b.ariaPressed)") == ["false", "true"]


def test_a_picture_that_the_browser_cannot_show_is_still_sent(stand_in: StandIn, tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "scan.tif").write_bytes(b"II*\0 and so on")
    tab.open(stand_in.url)
    tab.captioned(tmp_path / "scan.tif")
    tab.shows("#frame p", "This browser cannot show scan.tif; the server may.")
    assert stand_in.posted("/images")[0]["image"] == b"II*\0 and so on"


def test_another_picture_begins_anew(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.captioned()
    stand_in.gate.clear()
    tab.fill("#question", "how many?")
    tab.press("Enter")
    tab.shows("#exchanges .answer", "a blue")
    tab.choose(SAMPLES / "1.png")
    tab.shows("#caption-text", "a blue")
    assert tab.see("document.querySelectorAll('#exchanges li').length") == 0 and not tab.is_visible("#times")
    assert tab.text("#ask button") == "Ask" and tab.text("#ask .status") == ""
    stand_in.is_left()
    stand_in.left.clear()
    tab.choose(SAMPLES / "2.png")
    tab.until("document.querySelector('#picture').alt === '2.png'")
    stand_in.is_left()
    stand_in.gate.set()
    tab.shows("#caption .status", "3 tokens · 100 ms")
    assert len(stand_in.posted("/images")) == 3


# Writing


def test_stop_ends_the_stream_at_the_server(stand_in: StandIn, tab: Tab) -> None:
    stand_in.gate.clear()
    tab.open(stand_in.url)
    tab.choose(SAMPLES / "0.png")
    tab.shows("#caption-text", "a blue")
    tab.click("#caption button")
    tab.shows("#caption .status", "Stopped.")
    assert tab.text("#caption button") == "Describe" and tab.text("#caption-text") == "a blue"
    stand_in.is_left()


def test_a_double_click_starts_and_does_not_stop(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.captioned()
    stand_in.gate.clear()
    tab.click("#caption button", n_times=2)
    tab.shows("#caption-text", "a blue")
    assert tab.text("#caption button") == "Stop" and len(stand_in.posted("/caption")) == 2
    stand_in.gate.set()
    tab.shows("#caption-text", "a blue ring at the left")


def test_questions_are_asked_about_what_was_seen(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.captioned()
    stand_in.pieces = ["two"]
    for question in ("how many objects are there?", "and rings?"):
        tab.fill("#question", question)
        tab.press("Enter")
        tab.until("document.querySelector('#question').value === ''")
    shown = "[...document.querySelectorAll('#exchanges li')].map(li => [...li.children].map(p => p.textContent))"
    assert tab.see(shown) == [["and rings?", "two"], ["how many objects are there?", "two"]]
    assert [body["question"] for body in stand_in.posted("/ask")] == ["how many objects are there?", "and rings?"]
    assert all(body["images"] == [{"image_id": "img-large"}] for body in stand_in.posted("/ask"))
    assert len(stand_in.posted("/images")) == 1


def test_a_new_question_ends_the_one_that_is_being_answered(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.captioned()
    stand_in.gate.clear()
    for question in ("first?", "second?"):
        tab.fill("#question", question)
        tab.press("Enter")
        tab.until(f"document.querySelector('#exchanges li')?.textContent === '{question}a blue'")
    stand_in.is_left()
    stand_in.gate.set()
    tab.shows("#exchanges li", "second?a blue ring at the left")
    tab.shows("#ask .status", "3 tokens · 44.0 ms")


@pytest.mark.parametrize("is_status", [True, False])
def test_a_picture_that_was_forgotten_is_sent_again(stand_in: StandIn, tab: Tab, is_status: bool) -> None:
    gone = refusal(404, "no picture `img-large` is kept", "not_found_error")
    tab.open(stand_in.url)
    tab.captioned()
    stand_in.replies["/ask"] = [gone if is_status else stream(gone.body)]
    tab.fill("#question", "how many?")
    tab.press("Enter")
    tab.shows("#exchanges .answer", "a blue ring at the left")
    content = base64.b64encode((SAMPLES / "0.png").read_bytes()).decode()
    assert [body["images"] for body in stand_in.posted("/ask")] == [[{"image_id": "img-large"}], [{"data": content}]]
    tab.click("#caption button")
    tab.until("document.querySelector('#caption .status').textContent === '3 tokens · 100 ms'")
    assert len(stand_in.posted("/images")) == 2


# Matching


def test_texts_are_compared_by_the_model_that_matches_the_best_first(stand_in: StandIn, tab: Tab) -> None:
    stand_in.models = [MODEL, MATCHING]
    tab.open(stand_in.url)
    tab.captioned()
    tab.fill("#texts", "a dog\n\n a blue ring \na <b>ring</b>\na dog")
    tab.click("#match button")
    tab.until("document.querySelectorAll('#matches li').length === 3")
    shown = "[...document.querySelectorAll('#matches li')].map(li => li.innerText.split(/\\n+/))"
    assert tab.see(shown) == [
        ["a blue ring", "Match (ITM)", "97.0 %", "Similarity (ITC)", "0.410"],
        ["a <b>ring</b>", "Match (ITM)", "40.0 %", "Similarity (ITC)", "0.200"],
        ["a dog", "Match (ITM)", "2.0 %", "Similarity (ITC)", "-0.100"],
    ]
    wide = "[...document.querySelectorAll('.track')].map(t => t.firstChild.offsetWidth / t.offsetWidth)"
    assert tab.see(wide) == pytest.approx([0.97, 0.41, 0.4, 0.2, 0.02, 0], abs=0.01)
    posted = stand_in.posted("/match")
    seen = [{"image_id": "img-matching"}]
    assert posted == [{"model": "matching", "images": seen, "texts": ["a dog", "a blue ring", "a <b>ring</b>"]}]
    assert tab.text("#match .by") == "by matching" and tab.text("#times .by") == "match, matching"


# Times


def test_the_times_of_looking_and_writing_add_up(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.captioned()
    rows = "[...document.querySelectorAll('#times tbody tr')].map(r => [0, 2, 3].map(i => r.cells[i].textContent))"
    assert tab.see(rows) == [
        ["queue", "1.00", "1.0 %"],
        ["decode image", "2.00", "2.0 %"],
        ["preprocess", "3.00", "3.0 %"],
        ["vision", "40.0", "40.0 %"],
        ["qformer", "9.50", "9.5 %"],
        ["prompt", "0.50", "0.5 %"],
        ["waiting", "0.00", "0.0 %"],
        ["prefill", "12.0", "12.0 %"],
        ["decode", "30.0", "30.0 %"],
        ["other", "2.00", "2.0 %"],
        ["total", "100", "100.0 %"],
    ]
    parts = tab.see("[...document.querySelectorAll('.stack i')].map(i => i.offsetWidth / i.parentNode.offsetWidth)")
    assert parts[3] == pytest.approx(0.4, abs=0.02) and parts[8] == pytest.approx(0.3, abs=0.02)
    colours = "new Set([...document.querySelectorAll('.stack i')].map(i => getComputedStyle(i).backgroundColor)).size"
    assert tab.see(colours) == len(parts)
    tab.click("#caption button")
    tab.shows("#caption .status", "3 tokens · 44.0 ms")


# Choices


def test_the_chosen_model_does_what_it_can_and_others_do_the_rest(stand_in: StandIn, tab: Tab) -> None:
    small = {**MODEL, "id": "small", "tasks": ["caption"]}
    stand_in.models = [MODEL, small]
    tab.open(stand_in.url)
    assert tab.is_visible("#choice") and tab.text("#ask .by") == ""
    tab.see("(s => { s.value = 'small'; s.dispatchEvent(new Event('change')); })(document.querySelector('#model'))")
    assert tab.text("#ask .by") == "by large" and tab.text("#caption .by") == ""
    tab.captioned()
    tab.fill("#question", "how many?")
    tab.press("Enter")
    tab.shows("#exchanges .answer", "a blue ring at the left")
    assert [body["model"] for body in stand_in.posted("/images")] == [b"small", b"large"]
    assert stand_in.posted("/caption")[0]["model"] == "small" and stand_in.posted("/ask")[0]["model"] == "large"


def test_only_options_that_were_chosen_are_sent(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.click("summary")
    tab.fill("[name=beams]", "1")
    tab.press("Enter")
    tab.captioned()
    assert stand_in.posted("/caption")[-1]["options"] == {"beams": 1}
    tab.click("[name=sample]")
    for name, value in (
        ("temperature", "0.7"),
        ("top_p", "0.9"),
        ("seed", "3"),
        ("max_new_tokens", "12"),
        ("beams", ""),
    ):
        tab.fill(f"[name={name}]", value)
        if not value:
            tab.see("document.querySelector('[name=beams]').value = ''")
    tab.click("#caption button")
    tab.until("document.querySelector('#caption .status').textContent === '3 tokens · 44.0 ms'")
    wanted = {"max_new_tokens": 12, "sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    assert stand_in.posted("/caption")[-1]["options"] == wanted
    tab.fill("[name=top_p]", "1.5")
    tab.click("summary")
    tab.click("#caption button")
    tab.shows("#caption .status", "One of the options is out of its range.")
    assert len(stand_in.posted("/caption")) == 2 and tab.is_visible("[name=top_p]")


@pytest.mark.parametrize(
    ("demos", "said"),
    [
        ([], ""),
        (
            ["large"],
            "This is a demo (large): it knows only coloured shapes drawn by this project. Ordinary photographs",
        ),
        (["large", "matching"], "This is a demo (large, matching): it knows only"),
    ],
)
def test_a_demo_says_what_it_cannot_know(stand_in: StandIn, tab: Tab, demos: list[str], said: str) -> None:
    stand_in.models = [{**model, "is_demo": model["id"] in demos} for model in (MODEL, MATCHING)]
    tab.open(stand_in.url)
    assert tab.text("#notice p").startswith(said) and tab.is_visible("#notice") == bool(demos)


# What goes wrong


def test_a_key_is_asked_for_and_kept_in_the_tab_only(stand_in: StandIn, tab: Tab) -> None:
    stand_in.key, stand_in.samples = "right", [SAMPLES / "0.png"]
    tab.open(stand_in.url)
    assert tab.is_visible("#key") and not tab.is_visible("main") and tab.text("#key .bad") == ""
    for key in ("wrong", "right"):
        assert tab.see("document.activeElement.type") == "password"
        tab.fill("#key input", key)
        tab.press("Enter")
        tab.until("document.querySelector('#key .bad').textContent || !document.querySelector('#key').open")
        if key == "wrong":
            tab.until("document.querySelector('#key').open")
            tab.shows("#key .bad", "this key is not known here")
    tab.until("document.querySelectorAll('#samples img').length === 1")
    tab.captioned()
    assert tab.see("JSON.stringify(sessionStorage)") == '{"blip2.key":"right"}'
    assert tab.see("[localStorage.length, document.cookie, document.querySelector('#key input').value]") == [0, "", ""]
    stand_in.key = "changed"
    tab.fill("#question", "how many?")
    tab.press("Enter")
    tab.until("document.querySelector('#key').open")
    tab.fill("#key input", "changed")
    tab.press("Enter")
    tab.shows("#exchanges .answer", "a blue ring at the left")


def test_without_a_key_it_can_be_tried_again(stand_in: StandIn, tab: Tab) -> None:
    stand_in.key = "right"
    tab.open(stand_in.url)
    tab.press("Escape")
    tab.shows("#notice p", "this key is not known here")
    tab.click("#notice button")
    tab.until("document.querySelector('#key').open")
    tab.click("#key [type=button]")
    tab.shows("#notice p", "this key is not known here")
    stand_in.key = None
    tab.click("#notice button")
    tab.until("document.querySelector('main').checkVisibility()")
    assert not tab.is_visible("#notice")


def test_a_busy_server_is_asked_again_twice(stand_in: StandIn, tab: Tab) -> None:
    stand_in.replies["/caption"] = [busy(), busy()]
    tab.open(stand_in.url)
    tab.choose(SAMPLES / "0.png")
    tab.shows("#caption .status", "The server is busy; trying again in 1 s.")
    tab.shows("#caption-text", "a blue ring at the left")
    stand_in.replies["/caption"] = [busy(), busy(), busy()]
    tab.click("#caption button")
    tab.shows("#caption .status", "too many wait already")
    assert len(stand_in.posted("/caption")) == 6 and tab.is_visible("#caption .status.bad")
    stand_in.replies["/caption"] = [busy()]
    tab.click("#caption button")
    tab.shows("#caption .status", "The server is busy; trying again in 1 s.")
    tab.click("#caption button")
    tab.shows("#caption .status", "Stopped.")
    assert len(stand_in.posted("/caption")) == 7


MARKUP = "cannot read <img src=x onerror=\"document.title='run'\"> as a picture"


@pytest.mark.parametrize(
    ("path", "reply", "said"),
    [
        ("/images", refusal(400, MARKUP), MARKUP),
        ("/images", Reply(502, b"<h1>Bad gateway</h1>"), "The server answered with status 502."),
        ("/caption", refusal(400, "beams must be at most 16"), "beams must be at most 16"),
        ("/caption", stream({"text": "a"}, refusal(500, "the graph failed").body), "the graph failed"),
        ("/caption", stream({"text": "a"}, {"result": refusal(400, "too dark").body}, "[DONE]"), "too dark"),
        ("/caption", stream({"text": "a"}), "The answer broke off."),
    ],
)
def test_errors_are_shown_as_they_are_said(stand_in: StandIn, tab: Tab, path: str, reply: Reply, said: str) -> None:
    stand_in.replies[path] = [reply]
    tab.open(stand_in.url)
    tab.choose(SAMPLES / "0.png")
    tab.shows("#caption .status", said)
    assert tab.is_visible("#caption .status.bad") and tab.text("#caption button") == "Describe"
    assert tab.see("[document.title, document.querySelectorAll('img').length]") == ["blip2", 1]
    tab.click("#caption button")
    tab.shows("#caption-text", "a blue ring at the left")


def test_what_a_model_writes_is_text(stand_in: StandIn, tab: Tab) -> None:
    stand_in.pieces = ["<b>a", " dog</b>", "<script>document.title = 'run'</script>"]
    tab.open(stand_in.url)
    tab.captioned()
    assert tab.text("#caption-text") == "".join(stand_in.pieces) and tab.see("document.title") == "blip2"


def test_work_without_its_material_is_asked_for(stand_in: StandIn, tab: Tab) -> None:
    stand_in.models = [MODEL, MATCHING]
    tab.open(stand_in.url)
    for form in ("caption", "ask", "match"):
        tab.click(f"#{form} button")
        tab.shows(f"#{form} .status", "Choose a picture first.")
    tab.captioned()
    tab.click("#ask button")
    tab.shows("#ask .status", "Type a question first.")
    tab.click("#match button")
    tab.shows("#match .status", "Type a text first.")
    assert not stand_in.posted("/ask") and not stand_in.posted("/match")


def test_a_server_that_is_gone_is_said(stand_in: StandIn, tab: Tab) -> None:
    tab.open(stand_in.url)
    tab.call("Network.enable")
    tab.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    tab.choose(SAMPLES / "0.png")
    tab.shows("#caption .status", "The server cannot be reached.")


def test_it_waits_for_models_that_are_loading(stand_in: StandIn, tab: Tab) -> None:
    loading = {**MATCHING, "state": "loading"}
    stand_in.models, stand_in.samples = [{**MODEL, "state": "loading"}, loading], [SAMPLES / "0.png"]
    tab.open(stand_in.url)
    tab.shows("#notice p", "No model is loaded yet; looking again.")
    stand_in.models = [MODEL, loading]
    tab.until("document.querySelector('main').checkVisibility()")
    assert not tab.is_visible("#notice") and not tab.is_visible("#choice") and not tab.is_visible("#match")
    stand_in.models = [MODEL, MATCHING]
    tab.until("document.querySelector('#match').checkVisibility()")
    assert tab.see("[...document.querySelectorAll('option')].map(o => o.value)") == ["large", "matching"]
    assert tab.see("document.querySelectorAll('#samples button').length") == 1
    asked = len(stand_in.posted("/v1/models"))
    tab.see("new Promise(done => setTimeout(done, 2500))")
    assert len(stand_in.posted("/v1/models")) == asked


# Looks


CONTRAST = """
(() => {
  const pen = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const light = colour => {
    pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === 'rgba(0, 0, 0, 0)' && node.parentElement ? behind(node.parentElement) : colour;
  };
  const words = [...document.querySelectorAll('body *')].filter(node => node.checkVisibility() &&
    !node.closest(':disabled') && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()));
  return words.map(node => {
    const [low, high] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), node.textContent];
  }).sort((a, b) => a[0] - b[0])[0];
})()
"""
SHIFTS = """
new Promise(done => {
  let moved = 0;
  new PerformanceObserver(list => { for (const entry of list.getEntries()) moved += entry.value; })
    .observe({ type: 'layout-shift', buffered: true });
  setTimeout(() => done(moved), 300);
})
"""


def full(tab: Tab) -> None:
    """Everything the page can show at once, with words that are hard to fit."""
    long = "a " + "very" * 40 + " long word"
    tab.until("document.querySelectorAll('#samples img').length === 6")
    tab.captioned()
    tab.fill("#question", "how many objects are there?")
    tab.press("Enter")
    tab.until("document.querySelector('#ask .status').textContent")
    tab.fill("#texts", f"a blue ring\na dog\n{long}")
    tab.click("#match button")
    tab.until("document.querySelectorAll('#matches li').length === 3")
    tab.click("summary")


FOCUSED = """
(node => {
  const rings = [node, node.parentNode].map(place => getComputedStyle(place).outlineWidth);
  return [node.id || node.name || node.textContent || node.type, node === document.body || rings.includes('2px')];
})(document.activeElement)
"""


def prepared(stand_in: StandIn) -> None:
    stand_in.models = [{**MODEL, "is_demo": True}, {**MATCHING, "id": "matching-" + "long-" * 12}]
    stand_in.samples = sorted(SAMPLES.glob("*.png"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [(320, 640), (800, 900), (1280, 900)], ids=["phone", "tablet", "desk"])
def test_it_fits_every_screen_and_is_readable(stand_in: StandIn, tab: Tab, size: tuple[int, int], dark: bool) -> None:
    prepared(stand_in)
    tab.open(stand_in.url, size, dark)
    full(tab)
    assert tab.see("innerWidth") == size[0]
    assert tab.see("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.see("getComputedStyle(document.body).backgroundColor") == (DARK if dark else LIGHT)
    ratio, words = tab.see(CONTRAST)
    assert ratio >= 4.5, words


@pytest.mark.parametrize("size", [(320, 640), (1280, 900)], ids=["phone", "desk"])
def test_nothing_jumps(stand_in: StandIn, tab: Tab, size: tuple[int, int]) -> None:
    prepared(stand_in)
    tab.open(stand_in.url, size)
    tab.until("document.querySelectorAll('#samples img').length === 6")
    tab.captioned()
    assert tab.see(SHIFTS) < 0.02


def test_everything_has_a_name_and_shows_that_it_has_the_focus(stand_in: StandIn, tab: Tab) -> None:
    prepared(stand_in)
    tab.open(stand_in.url)
    full(tab)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "combobox", "checkbox", "spinbutton", "list", "region", "image", "DisclosureTriangle")
    found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert {node["role"]["value"] for node in found} >= set(roles) - {"DisclosureTriangle"}
    assert [node for node in found if not node["name"]["value"]] == []
    tab.see("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(40):
        tab.press("Tab")
        name, is_seen = tab.see(FOCUSED)
        assert is_seen, name
        reached.add(name)
    assert {"model", "beams", "question", "texts", "Describe", "Ask", "Compare"} <= reached, reached


def test_nothing_blinks_where_motion_is_unwanted(stand_in: StandIn, tab: Tab) -> None:
    stand_in.gate.clear()
    for still in (True, False):
        tab.open(stand_in.url, still=still)
        tab.choose(SAMPLES / "0.png")
        tab.shows("#caption-text", "a blue")
        assert tab.see("document.getAnimations().length") == (0 if still else 1)
    stand_in.gate.set()
