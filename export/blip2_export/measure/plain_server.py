"""The `baseline-server` command: `transformers` behind FastAPI, as one writes it in an afternoon.

It speaks what `blip2 bench --url` asks for of OpenAI's chat completions: a caption or an answer of one picture, by greedy search,
whole or streamed. Requests wait for the one thread that writes, as they do at servers that know of no batches.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from transformers import TextIteratorStreamer

from blip2_export import processors
from blip2_export.measure import work
from blip2_export.measure.baseline import DTYPES
from blip2_export.measure.plain import Plain, decoded
from blip2_export.read.checkpoint import CheckpointError

_USUAL_TOKENS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a BLIP-2 with a language model")
    parser.add_argument("--port", type=work.count(0), default=8000, help="on 127.0.0.1 (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="where `transformers` computes, such as cuda:0 (default: cpu)")
    parser.add_argument(
        "--threads", type=work.count(1), default=processors.count(), metavar="N", help="default: one a processor"
    )


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    try:
        writer = Writer(Plain(args.checkpoint, args.dtype, args.device))
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from error
    try:
        uvicorn.run(app(writer, args.checkpoint.name), host="127.0.0.1", port=args.port)
    finally:
        writer.close()
    return 0


class _Strict(BaseModel):
    """What is not known is refused."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    url: str
    detail: str | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["user"]
    content: list[Annotated[ImagePart | TextPart, Field(discriminator="type")]]


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """Names of vLLM's where OpenAI has none: `min_tokens`, and `ignore_eos` for as many tokens as may be written."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    temperature: Annotated[float, Field(ge=0, le=0)] = 0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def n_most(self) -> int:
        return self.max_completion_tokens or self.max_tokens or _USUAL_TOKENS

    @property
    def n_least(self) -> int:
        return self.n_most if self.ignore_eos else self.min_tokens


@dataclass(frozen=True)
class Asked:
    """A text of `n_least` to `n_most` tokens."""

    image: Image.Image
    prompt: str
    n_least: int
    n_most: int


@dataclass(frozen=True)
class Writing:
    """A text under way. `pieces` end with it."""

    pieces: Iterator[str]
    tokens: Future[list[int]]


class Writer:
    """Writes one text after the other, in a thread of its own."""

    def __init__(self, plain: Plain) -> None:
        self.plain, self._thread = plain, ThreadPoolExecutor(max_workers=1)

    def write(self, asked: Asked) -> list[int]:
        return self._thread.submit(self._generate, asked, None).result()

    def stream(self, asked: Asked) -> Writing:
        streamer = TextIteratorStreamer(self.plain.tokenizer, skip_prompt=True, skip_special_tokens=True)
        tokens = self._thread.submit(self._generate, asked, streamer)
        # Also where `generate()` fails, so that nobody waits for ever.
        tokens.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
        return Writing(filter(None, streamer), tokens)

    @torch.inference_mode()
    def _generate(self, asked: Asked, streamer: TextIteratorStreamer | None) -> list[int]:
        rows = self.plain.model.generate(
            **self.plain.inputs([asked.image], [asked.prompt]),
            max_new_tokens=asked.n_most,
            min_new_tokens=asked.n_least,
            num_beams=1,
            do_sample=False,
            streamer=streamer,
        )
        return rows[0, self.plain.first_past(asked.prompt) :].tolist()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def app(writer: Writer, name: str) -> FastAPI:
    found = FastAPI(title=f"{name} in transformers")

    @found.exception_handler(RequestValidationError)
    def unread(_: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _refusal(400, f"{where}: {first['msg']}")

    @found.exception_handler(HTTPException)
    def refused(_: Any, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, error.detail)

    @found.get("/v1/models")
    def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "transformers"}],
        }

    @found.post("/v1/chat/completions", response_model=None)
    def complete(chat: ChatRequest) -> dict[str, Any] | StreamingResponse:
        if chat.model not in (None, name):
            raise HTTPException(404, f"there is no model `{chat.model}`, but `{name}`")
        asked, about = _asked(writer.plain, chat), _About(writer.plain, name)
        if chat.stream:
            events = about.events(asked, writer.stream(asked), chat.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return about.whole(asked, writer.write(asked))

    return found


def _asked(plain: Plain, chat: ChatRequest) -> Asked:
    [message] = chat.messages
    urls = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    if len(urls) != 1 or len(texts) > 1:
        raise HTTPException(400, f"messages: one picture and at most one text, not {len(urls)} and {len(texts)}")
    if chat.n_least > chat.n_most:
        raise HTTPException(400, f"min_tokens: {chat.n_least} are more than the {chat.n_most} that may be written")
    prompt = plain.prompt(texts[0] if texts else None)
    n, most = plain.first_past(prompt) + chat.n_most, plain.most_positions
    if most is not None and n > most:
        raise HTTPException(400, f"messages: with {chat.n_most} tokens behind it takes {n} positions of {most}")
    return Asked(_picture(urls[0]), prompt, chat.n_least, chat.n_most)


def _picture(url: str) -> Image.Image:
    head, _, content = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise HTTPException(400, "image_url: a picture is given as data:image/…;base64,…")
    try:
        return decoded(base64.b64decode(content, validate=True))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"image_url: no picture can be read from it: {error}") from error


class _About:
    """What every part of an answer says."""

    def __init__(self, plain: Plain, name: str) -> None:
        self._plain = plain
        self._said = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self, asked: Asked, tokens: list[int]) -> dict[str, Any]:
        [text] = self._plain.texts([tokens])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": _finish(asked, tokens)}
        return {**self._said, "object": "chat.completion", "choices": [choice], "usage": self._usage(asked, tokens)}

    def events(self, asked: Asked, writing: Writing, with_usage: bool) -> Iterator[str]:
        """Pieces as they come: the first begins with the space that a whole text loses."""
        yield self._chunk({"role": "assistant", "content": ""})
        for piece in writing.pieces:
            yield self._chunk({"content": piece})
        try:
            tokens = writing.tokens.result()
        except Exception as error:  # the status is sent: only the stream can tell
            yield _event({"error": {"message": str(error), "type": "server_error"}})
            return
        yield self._chunk({}, _finish(asked, tokens))
        if with_usage:
            usage = self._usage(asked, tokens)
            yield _event({**self._said, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event({**self._said, "object": "chat.completion.chunk", "choices": [choice]})

    def _usage(self, asked: Asked, tokens: list[int]) -> dict[str, int]:
        n = self._plain.n_image_tokens + self._plain.n_prompt_tokens(asked.prompt)
        return {"prompt_tokens": n, "completion_tokens": len(tokens), "total_tokens": n + len(tokens)}


def _finish(asked: Asked, tokens: list[int]) -> str:
    return "length" if len(tokens) == asked.n_most else "stop"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)
