"""What LangChain's clients get from a server: python langchain_clients.py HTTP_ADDRESS PICTURE PICTURE PICTURE → JSON.

It runs in the environment that `make setup-langchain` makes, for LangChain's reranker needs an older `cohere` than the exporter.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import cohere
from langchain_cohere import CohereEmbeddings, CohereRerank
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

KEY = "none"
TEXTS = ["a red circle", "nothing", "two squares", "a blue star on the left"]
QUESTION = "what is it?"


def reranked(url: str, pictures: list[str]) -> dict[str, Any]:
    """Each order as place and probability; LangChain's documents are texts, a picture is its data URL."""
    best = CohereRerank(base_url=url, cohere_api_key=KEY, model="stage1", top_n=3)
    texts = [Document(text, metadata={"place": place}) for place, text in enumerate(TEXTS)]
    own = cohere.ClientV2(KEY, base_url=url)
    every = CohereRerank(client=own, model="stage1", top_n=None)
    found = best.compress_documents(texts, query=pictures[0])
    return {
        "texts": [[one.metadata["place"], one.metadata["relevance_score"]] for one in found],
        "kept": [one.page_content for one in found],
        "pictures": [[one["index"], one["relevance_score"]] for one in every.rerank(pictures, TEXTS[0], top_n=None)],
        "refused": failure(lambda: every.rerank(TEXTS, "a text beside texts", top_n=None)),
        "unknown": failure(lambda: every.rerank(TEXTS, pictures[0], model="rerank-v3.5")),
    }


def chatted(url: str, picture: str) -> dict[str, Any]:
    """An answer to a question, whole, in pieces and by way of OpenAI's newer form."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    asked, options = [HumanMessage(parts)], {"base_url": f"{url}/v1", "api_key": KEY, "model": "vqa-opt"}
    chat = ChatOpenAI(**options, temperature=0, max_tokens=12, max_retries=0)
    responses = ChatOpenAI(**options, temperature=0, max_tokens=12, max_retries=0, use_responses_api=True)
    whole, pieces = chat.invoke(asked), list(chat.stream(asked, stream_usage=True))
    together = pieces[0]
    for piece in pieces[1:]:
        together += piece
    return {
        "whole": whole.text,
        "streamed": together.text,
        "n_pieces": len([piece for piece in pieces if piece.text]),
        "usage": [whole.usage_metadata, together.usage_metadata],
        "responded": responses.invoke(asked).text,
    }


def embedded(url: str) -> list[list[list[float]]]:
    """By OpenAI's form and by Cohere's first; without a count of tokens, for which it would need a vocabulary of OpenAI's."""
    openai = OpenAIEmbeddings(base_url=f"{url}/v1", api_key=KEY, model="stage1", check_embedding_ctx_length=False)
    coheres = CohereEmbeddings(base_url=url, cohere_api_key=KEY, model="stage1", max_retries=1)
    return [openai.embed_documents(TEXTS), coheres.embed_documents(TEXTS)]


def failure(ask: Any) -> str:
    """How it fails."""
    try:
        ask()
    except cohere.core.ApiError as error:
        return f"{error.status_code} {error.body}"
    return "it was answered"


def main() -> None:
    url, *paths = sys.argv[1:]
    pictures = [f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in paths]
    found = {"reranked": reranked(url, pictures), "chatted": chatted(url, pictures[0]), "embedded": embedded(url)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
