"""Clients that know nothing of `blip2 serve` ask it: OpenAI's, Cohere's, Prometheus, and schemathesis on its OpenAPI document."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import hypothesis
import numpy
import openai
import pytest
import schemathesis
from schemathesis import checks
from serving import ROOT, Server, data_url, serve

PROMETHEUS = ROOT / "target" / "prometheus" / "unpacked" / "usr" / "bin"
KEY = "a-key-of-a-test-0123"
SIZE = 24  # of the vectors of tests/bundles/stage1


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(text: str | None = "what is it?") -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url()}}]
    return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


def responding(text: str = "what is it?") -> list[Any]:
    image = {"type": "input_image", "detail": "auto", "image_url": data_url()}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": text}]}]


# OpenAI's client


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["t5", "stage1", "vqa-opt"]
    assert client.models.retrieve("t5").owned_by == "blip2"


def test_openai_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    options: Any = {"model": "vqa-opt", "messages": asked(), "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert whole.usage.completion_tokens <= 12 and choice.finish_reason in ("stop", "length")
    assert choice.logprobs and len(choice.logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told.strip() == choice.message.content and chunks[-1].usage == whole.usage
    several = client.chat.completions.create(
        **options | {"temperature": 1.5}, n=3, seed=1, extra_body={"top_k": 50, "min_p": 0.0}
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]


def test_openai_embeds_in_both_forms(client: openai.OpenAI) -> None:
    texts = ["a red circle", "nothing"]
    numbers = client.embeddings.create(model="stage1", input=texts, encoding_format="float").data
    assert [len(one.embedding) for one in numbers] == [SIZE, SIZE]
    # Without a format the client asks for base64, and unpacks it.
    unpacked = client.embeddings.create(model="stage1", input=texts).data
    for one, other in zip(numbers, unpacked, strict=True):
        numpy.testing.assert_array_equal(numpy.float32(one.embedding), numpy.float32(other.embedding))
        assert abs(numpy.linalg.norm(one.embedding) - 1) < 1e-5


def test_openai_responds_whole_and_streamed(client: openai.OpenAI) -> None:
    options: Any = {"model": "vqa-opt", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**options, input=responding())
    assert whole.status in ("completed", "incomplete") and whole.usage.output_tokens <= 12
    said = client.chat.completions.create(model="vqa-opt", messages=asked(), temperature=0, max_tokens=12)
    assert whole.output_text == said.choices[0].message.content
    with client.responses.stream(**options, input=responding()) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response() if kinds[-1] == "response.completed" else None
    assert kinds[0] == "response.created" and kinds[-1] == f"response.{whole.status}"
    assert final is None or final.output_text == whole.output_text
    events = list(client.responses.create(**options, input=responding(), stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.usage == whole.usage
    # What was answered stands in the next request as it came.
    again = [*responding(), *(item.to_dict() for item in whole.output), {"role": "user", "content": "which colour?"}]
    assert client.responses.create(**options, input=again).usage.input_tokens > whole.usage.input_tokens
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.retrieve(whole.id)


def test_openai_knows_what_went_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=asked())
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="t5", messages=asked(), frequency_penalty=1)
    assert (refused.value.param, refused.value.code) == ("frequency_penalty", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="t5", input=responding(), previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


def test_openai_is_told_of_keys_and_of_limits(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f"[somebody]\nkey = '{KEY}'\nrequests_per_s = 0.01\n")
    with serve("--keys", str(keys), bundles=("t5",)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another-key-0123456", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        client.api_key = KEY
        assert client.models.list().data
        with pytest.raises(openai.RateLimitError) as late:
            client.models.list()
        assert int(late.value.response.headers["retry-after"]) >= 1


# Cohere's client


def test_cohere_embeds_and_reranks(server: Server) -> None:
    client = cohere.ClientV2("none", base_url=server.url)
    forms: Any = {"model": "stage1", "embedding_types": ["float", "base64"]}
    texts = client.embed(texts=["a red circle", "nothing"], input_type="search_query", **forms)
    assert texts.id and texts.texts == ["a red circle", "nothing"] and texts.meta.api_version.version == "2"
    pictures = client.embed(images=[data_url(0), data_url(1)], input_type="image", **forms)
    assert [(one.width, one.height, one.format) for one in pictures.images] == [(256, 256, "png")] * 2
    content: Any = [{"content": [{"type": "image_url", "image_url": {"url": data_url(1)}}]}]
    parts = client.embed(inputs=content, input_type="search_document", **forms)
    numpy.testing.assert_allclose(parts.embeddings.float_[0], pictures.embeddings.float_[1], atol=1e-5)
    packed = numpy.frombuffer(base64.b64decode(texts.embeddings.base64[0]), "<f4")
    numpy.testing.assert_array_equal(packed, numpy.float32(texts.embeddings.float_[0]))
    ranked = client.rerank(model="stage1", query="a red circle", documents=[data_url(0), data_url(1), data_url(2)])
    scores = [one.relevance_score for one in ranked.results]
    assert ranked.id and ranked.meta and sorted(one.index for one in ranked.results) == [0, 1, 2]
    assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] <= scores[0] <= 1
    few = client.rerank(model="stage1", query=data_url(0), documents=["a red circle", "nothing"], top_n=1)
    assert len(few.results) == 1
    with pytest.raises(cohere.BadRequestError, match="int8"):
        client.embed(model="stage1", texts=["a"], input_type="image", embedding_types=["int8"])
    with pytest.raises(cohere.NotFoundError):
        client.rerank(model="rerank-v3.5", query="a", documents=["b"])


# schemathesis

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
FEW = hypothesis.settings(
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=True,
    phases=[hypothesis.Phase.generate],
)


@pytest.fixture(scope="module")
def document(server: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_what_is_drawn_from_the_document_is_answered_as_it_says(
    document: schemathesis.BaseSchema, mode: schemathesis.GenerationMode
) -> None:
    routes = [found.ok() for found in document.get_all_operations()]
    # What is drawn may be a model's name, for names that stand in tests are drawn too: the others would be without it.
    routes = [route for route in routes if not route.path.endswith("/unload")]
    wrong: list[str] = []
    n_asked = 0
    for route in routes:
        try:
            ask_drawn(route, mode)
            n_asked += 1
        except hypothesis.errors.Unsatisfiable:
            pass  # nothing can be wrong with a request that says nothing
        except Exception as error:
            wrong.append(f"{route.label}: {error!r}"[:2000])
    assert not wrong, "\n\n".join(wrong)
    assert n_asked == len(routes) if mode == schemathesis.GenerationMode.POSITIVE else n_asked >= 10


def ask_drawn(route: schemathesis.APIOperation, mode: schemathesis.GenerationMode) -> None:
    @FEW
    @hypothesis.given(case=route.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()


SOUND: dict[str, dict[str, Any]] = {
    "/caption": {"images": [{"url": data_url()}], "options": {"beams": 2, "num_return": 2, "log_probs": 1}},
    "/ask": {"images": [{"url": data_url()}, {"data": "AAAA"}], "question": "what is it?"},
    "/match": {"images": [{"url": data_url()}], "texts": ["a red circle"]},
    "/embed": {"images": [{"url": data_url()}], "texts": ["a red circle"]},
    "/rank": {"images": [{"url": data_url()}], "question": "what?", "answers": ["a", "b"]},
    "/images": {"image": {"url": data_url()}},
    "/v1/chat/completions": {"messages": asked(), "logprobs": True, "temperature": 0},
    "/v1/responses": {"input": responding(), "temperature": 0},
    "/v1/embeddings": {"input": "a red circle"},
    "/v1/score": {"text_1": "a red circle", "text_2": data_url()},
    "/v1/rerank": {"query": "a red circle", "documents": [data_url(), data_url(1)]},
    "/v2/embed": {"images": [data_url()], "embedding_types": ["float", "base64"]},
    "/v1/embed": {"texts": ["a red circle"]},
    "/tokenize": {"model": "t5", "prompt": "a red circle"},
    "/detokenize": {"model": "t5", "tokens": [5, 6]},
    "/v2/models/{model}/infer": {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [data_url()]}]
    },
}
NAMED = {"model": "t5"}


@pytest.mark.parametrize("path", SOUND)
def test_answers_are_as_the_document_says(document: schemathesis.BaseSchema, path: str) -> None:
    streams = [{}, {"stream": True}] if path in ("/caption", "/v1/chat/completions", "/v1/responses") else [{}]
    for more in streams:
        options = {"options": {}} if path == "/caption" and more else {}
        body = SOUND[path] | options | more
        named = NAMED if "{" in path else {}
        case = document[path]["POST"].Case(body=body, media_type="application/json", path_parameters=named)
        reply = case.call()
        assert reply.status_code == 200, reply.text
        case.validate_response(reply, checks=CHECKS)
        assert reply.headers["content-type"][0].startswith("text/event-stream") == bool(more)


def test_every_post_that_is_documented_is_asked(document: schemathesis.BaseSchema) -> None:
    posts = {route.path for found in document.get_all_operations() if (route := found.ok()).method == "post"}
    assert {path for path in posts if not path.startswith("/admin")} == set(SOUND)


# Prometheus


@pytest.fixture(scope="module")
def prometheus() -> Path:
    if not (PROMETHEUS / "prometheus").exists():
        pytest.skip("there is no Prometheus; `make setup-prometheus` unpacks one")
    return PROMETHEUS


def metrics(server: Server, accept: str) -> tuple[str, str]:
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


def test_metrics_are_in_the_form_that_is_accepted(server: Server, prometheus: Path) -> None:
    for path, body in SOUND.items():
        assert server.ask(path.format(**NAMED), body)[0] == 200, path
    kind, text = metrics(server, "*/*")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    checked = subprocess.run(
        [prometheus / "promtool", "check", "metrics"], input=text, capture_output=True, encoding="utf-8"
    )
    assert checked.returncode == 0 and not checked.stdout + checked.stderr, checked
    kind, text = metrics(server, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text; version=1.0.0") and text.endswith("# EOF\n")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_prometheus_scrapes(server: Server, prometheus: Path, tmp_path: Path) -> None:
    host, port = server.url.removeprefix("http://"), free_port()
    scrape = {"job_name": "blip2", "scrape_interval": "1s", "static_configs": [{"targets": [host]}]}
    config = tmp_path / "prometheus.json"  # what is JSON is YAML
    config.write_text(json.dumps({"scrape_configs": [scrape]}))
    server.ask("/v1/models")
    address = f"127.0.0.1:{port}"
    command = [prometheus / "prometheus", f"--config.file={config}", f"--web.listen-address={address}"]
    with subprocess.Popen([*command, f"--storage.tsdb.path={tmp_path}/data"], stderr=subprocess.DEVNULL) as process:
        try:
            found = queried(address, 'blip2_requests_total{route="/v1/models",status="200"}')
        finally:
            process.kill()
    assert float(found[0]["value"][1]) >= 1 and found[0]["metric"]["instance"] == host


def queried(address: str, query: str) -> list[Any]:
    """What a query finds, once it finds anything."""
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(url) as reply:
                if found := json.load(reply)["data"]["result"]:
                    return found
        except OSError:
            pass  # it does not listen yet
    raise AssertionError(f"nothing is found of {query}")
