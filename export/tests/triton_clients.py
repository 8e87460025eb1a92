"""What Triton's own clients get from a server: python triton_clients.py HTTP_ADDRESS GRPC_ADDRESS PICTURE PICTURE → JSON.

It runs in the environment that `make setup-kserve` makes, for these clients need another protobuf than the exporter.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

QUESTIONS = ["what is it?", "which colour?"]
TEXTS = ["a red circle", "nothing", "two squares"]
OPTIONS = {"max_new_tokens": 7, "beams": 3, "repetition_penalty": "1.5", "stop": "zz"}


class Asking:
    """One of the clients, and what it is asked about."""

    def __init__(self, clients: ModuleType, address: str, pictures: list[bytes]) -> None:
        self.clients, self.client, self.pictures = clients, clients.InferenceServerClient(address), pictures

    def tensor(self, name: str, elements: list[Any], **how: Any) -> Any:
        """An input of bytes."""
        found = self.clients.InferInput(name, [len(elements)], "BYTES")
        found.set_data_from_numpy(np.array(elements, dtype=np.object_), **how)
        return found

    def infer(self, model: str, names: list[str], **inputs: list[Any]) -> dict[str, Any]:
        """The outputs of these names."""
        tensors = [self.tensor(name, elements) for name, elements in {"image": self.pictures, **inputs}.items()]
        return told(self.client.infer(model, tensors), names)

    def written(self) -> dict[str, Any]:
        """A caption of every picture, with options and a name of the request."""
        outputs = [self.clients.InferRequestedOutput("text")]
        tensors = [self.tensor("image", self.pictures)]
        asked = {"model_version": "1", "outputs": outputs, "request_id": "a-1", "parameters": OPTIONS}
        found = self.client.infer("t5", tensors, **asked)
        answer = found.get_response()
        return {**told(found, ["text"]), "id": answer["id"] if isinstance(answer, dict) else answer.id}

    def refused(self) -> list[list[str]]:
        """The status and the message of requests that make no sense."""
        picture = self.tensor("image", [b"no picture"])
        wish = self.clients.InferRequestedOutput("embedding")
        return [
            failure(lambda: self.client.infer("t6", [picture])),
            failure(lambda: self.client.infer("t5", [picture])),
            failure(lambda: self.client.infer("t5", [picture], outputs=[wish])),
            failure(lambda: self.client.infer("t5", [picture], sequence_id=7)),
            failure(lambda: self.client.infer("t5", [picture], model_version="2")),
            failure(lambda: self.client.get_model_metadata("t6")),
        ]

    def all(self) -> dict[str, Any]:
        """Everything that both clients can."""
        as_json = {"as_json": True} if self.clients is tritonclient.grpc else {}
        return {
            "ready": [
                self.client.is_server_live(),
                self.client.is_server_ready(),
                self.client.is_model_ready("t5", "1"),
            ],
            "server": self.client.get_server_metadata(**as_json),
            "model": self.client.get_model_metadata("stage1", **as_json),
            "written": self.written(),
            "answers": self.infer("vqa-opt", ["text"], text=QUESTIONS),
            "matches": self.infer("stage1", ["itm_probability", "itc_similarity"], text=TEXTS),
            "vectors": self.infer("stage1", ["embedding"], task=["embed"]),
            "refused": self.refused(),
        }

    def as_json(self) -> dict[str, Any]:
        """Tensors in JSON both ways, and a body that is compressed."""
        pictures = [base64.b64encode(picture).decode() for picture in self.pictures]
        tensors = [self.tensor("image", pictures, binary_data=False), self.tensor("text", TEXTS, binary_data=False)]
        outputs = [self.clients.InferRequestedOutput(name, binary_data=False) for name in ("itm_probability",)]
        found = self.client.infer("stage1", tensors, outputs=outputs, request_compression_algorithm="gzip")
        return told(found, ["itm_probability", "itc_similarity"])


def told(found: Any, names: list[str]) -> dict[str, Any]:
    """Tensors as lists; None where there is none."""
    arrays = {name: found.as_numpy(name) for name in names}
    return {name: None if array is None else listed(array) for name, array in arrays.items()}


def listed(array: np.ndarray) -> list[Any]:
    return [one.decode() for one in array] if array.dtype == np.object_ else array.tolist()


def failure(ask: Any) -> list[str]:
    """How it fails."""
    try:
        ask()
    except InferenceServerException as error:
        return [str(error.status()), error.message()]
    return ["", "it was answered"]


def main() -> None:
    http, grpc, *paths = sys.argv[1:]
    pictures = [Path(path).read_bytes() for path in paths]
    by_http = Asking(tritonclient.http, http, pictures)
    by_grpc = Asking(tritonclient.grpc, grpc, pictures)
    print(json.dumps({"http": by_http.all(), "grpc": by_grpc.all(), "json": by_http.as_json()}))


if __name__ == "__main__":
    main()
