"""`transformers` behind FastAPI: it writes what the engine writes, one text after the other, and says what it cannot do."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from serving import data_url, serve

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.measure.plain import Plain
from blip2_export.measure.plain_server import Writer, app

N_PICTURES = 4
EXACT = ({"max_tokens": 12, "ignore_eos": True}, {"max_tokens": 12, "min_tokens": 12})


@contextmanager
def plain_server(checkpoint: Path) -> Iterator[tuple[str, Writer]]:
    writer = Writer(Plain(checkpoint, "float32"))
    server = uvicorn.Server(uvicorn.Config(app(writer, "plain"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", writer
    finally:
        server.should_exit = True
        thread.join()
        writer.close()


@pytest.fixture(scope="module", params=[("tiny", 30), ("t5", 13)], ids=lambda param: param[0])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of the plain server and of the engine's, on the same weights. With these seeds some texts end early."""
    shape, seed = request.param
    folder = tmp_path_factory.mktemp(shape)
    random_checkpoint.write(folder / "checkpoint", shape, seed=seed)
    convert(folder / "checkpoint", folder / "bundle", Choices("bundle", golden=False, loss=False))
    with plain_server(folder / "checkpoint") as (plain, _), serve(bundles=(str(folder / "bundle"),)) as engine:
        yield plain, engine.url


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Writer]]:
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    random_checkpoint.write(folder, "tiny", seed=4)
    with plain_server(folder) as found:
        yield found


def chat(text: str | None = None, n: int = 0, **options: Any) -> dict[str, Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(n)}}]
    parts += [{"type": "text", "text": text}] if text else []
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, **options}


def asked(url: str, body: Any) -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def whole(url: str, body: dict[str, Any]) -> tuple[str, dict[str, int], str]:
    """Text, usage, and why it ended."""
    status, said = asked(url, body)
    assert status == 200, said
    found = json.loads(said)
    [choice] = found["choices"]
    return choice["message"]["content"], found["usage"], choice["finish_reason"]


def events(url: str, body: dict[str, Any]) -> list[Any]:
    status, said = asked(url, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert status == 200, said
    lines = [line.removeprefix("data: ") for line in said.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def streamed(url: str, body: dict[str, Any]) -> tuple[str, dict[str, int], str]:
    *chunks, usage, done = events(url, body)
    assert done == "[DONE]" and not usage["choices"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text.strip(), usage["usage"], choices[-1]["finish_reason"]


def test_it_writes_what_the_engine_writes(both: tuple[str, str]) -> None:
    plain, engine = both
    texts, ends = set(), set()
    for n in range(N_PICTURES):
        for text in (None, "what is it?"):
            for options in (*EXACT, {"max_tokens": 12}, {"max_completion_tokens": 3}):
                body = chat(text, n, **options)
                ours = whole(engine, body)
                assert whole(plain, body) == ours and streamed(plain, body) == ours
                texts.add(ours[0])
                ends.add(ours[2])
                assert ours[1]["completion_tokens"] == 12 or options not in EXACT
    assert len(texts) > 2 * N_PICTURES, "it says nearly the same whatever it sees; these weights test nothing"
    assert ends == {"length", "stop"}


def test_pieces_come_while_a_text_is_written(plain: tuple[str, Writer], monkeypatch: pytest.MonkeyPatch) -> None:
    url, writer = plain
    usual, past = writer.plain.model.generate, threading.Event()

    def generate(**inputs: Any) -> Any:
        inputs["streamer"].on_finalized_text("first")
        assert past.wait(30), "nobody got it"
        return usual(**inputs)

    monkeypatch.setattr(writer.plain.model, "generate", generate)
    body = json.dumps(chat(max_tokens=2, stream=True)).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert next(line for line in reply if b"first" in line)
        past.set()
        assert reply.read().endswith(b"[DONE]\n\n")


def test_texts_are_written_one_after_the_other(plain: tuple[str, Writer], monkeypatch: pytest.MonkeyPatch) -> None:
    url, writer = plain
    usual, under_way, most, threads = writer.plain.model.generate, [], [], set()

    def generate(**inputs: Any) -> Any:
        under_way.append(None)
        most.append(len(under_way))
        threads.add(threading.get_ident())
        time.sleep(0.05)
        found = usual(**inputs)
        under_way.pop()
        return found

    monkeypatch.setattr(writer.plain.model, "generate", generate)
    bodies = [chat(n=n, max_tokens=3, stream=n % 2 == 0) for n in range(4)]
    clients = [threading.Thread(target=asked, args=(url, body)) for body in bodies]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert most == [1] * 4 and len(threads) == 1


def test_what_goes_wrong_ends_a_stream(plain: tuple[str, Writer], monkeypatch: pytest.MonkeyPatch) -> None:
    url, writer = plain

    def generate(**_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(writer.plain.model, "generate", generate)
    assert events(url, chat())[-1]["error"]["message"] == "out of memory"
    assert asked(url, chat())[0] == 500


def test_it_lists_its_model_and_knows_no_other(plain: tuple[str, Writer]) -> None:
    url, _ = plain
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        assert [model["id"] for model in json.load(reply)["data"]] == ["plain"]
    assert asked(url, chat(model="plain", max_tokens=1))[0] == 200
    status, said = asked(url, chat(model="other"))
    assert status == 404 and "there is no model `other`" in said


def without_picture() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}]}]}


def picture(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "JSON decode error"),
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "system", "content": []}]}, "messages.0.role: Input should be 'user'"),
        (without_picture(), "one picture and at most one text, not 0 and 1"),
        (picture("https://example.org/0.png"), "a picture is given as data:"),
        (picture("data:image/png;base64,%"), "no picture can be read from it"),
        (picture("data:image/png;base64,aaaa"), "no picture can be read from it"),
        (chat(temperature=0.5), "temperature: Input should be less than or equal to 0"),
        (chat(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
        (chat(max_tokens=3, min_tokens=4), "min_tokens: 4 are more than the 3 that may be written"),
        (chat(max_tokens=1000), "positions of 128"),
        (chat(tools=[]), "tools: Extra inputs are not permitted"),
    ],
)
def test_what_it_cannot_do_is_refused(plain: tuple[str, Writer], body: Any, said: str) -> None:
    status, found = asked(plain[0], body)
    assert status == 400 and said in json.loads(found)["error"]["message"], found


def test_as_many_tokens_as_there_are_positions_are_written(plain: tuple[str, Writer]) -> None:
    n = 128 - plain[1].plain.first_past("")
    body = chat(max_tokens=n, ignore_eos=True)
    assert whole(plain[0], body)[1]["completion_tokens"] == n
    assert asked(plain[0], body | {"max_tokens": n + 1})[0] == 400
