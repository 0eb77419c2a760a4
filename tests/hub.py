"""A stand-in for the Hugging Face hub: the part of its HTTP API that an upload uses, on 127.0.0.1."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """The repositories and what was asked of them.

    Attributes:
      user: What whoami answers.
      files: {repository: {path: content}}.
      commits: {repository: number of commits}.
      stored: Large files, by SHA-256.
      asked: "METHOD /path" of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        access: dict[str, Any] = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.user: dict[str, Any] = {"type": "user", "name": "ada", "orgs": [{"name": "engines"}], "auth": access}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextmanager
def logged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that huggingface_hub uploads to, with ada logged in."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # read from HF_ENDPOINT on import
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the stand-in does not speak
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_request(b"")

    def do_POST(self) -> None:
        self.handle_request(self.rfile.read(int(self.headers["Content-Length"])))

    do_PUT = do_POST  # noqa: N815

    def handle_request(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["stored", digest]:  # the address has a signature, not a token
                if hashlib.sha256(body).hexdigest() != digest:
                    return self.answer(400, {"error": "another content"})
                hub.stored[digest] = body
                return self.answer(200, {})
            case _ if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials in Authorization header"})
            case ["api", "whoami-v2"]:
                return self.answer(200, hub.user)
            case ["api", "validate-yaml"]:
                return self.answer(*validated(json.loads(body)["content"]))
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                existed = name in hub.files
                hub.files.setdefault(name, {})
                return self.answer(409 if existed else 200, {"url": f"{hub.endpoint}/{name}"})
            case ["api", "models", owner, name, "preupload", "main"]:
                assert f"{owner}/{name}" in hub.files
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
                files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                return self.answer(200, {"files": files})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    each | {"actions": {"upload": {"href": f"{hub.endpoint}/stored/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "commit", "main"]:
                header, *changes = [json.loads(line) for line in body.splitlines()]
                assert header["key"] == "header"
                for each in changes:
                    value = each["value"]
                    content = (
                        hub.stored[value["oid"]] if each["key"] == "lfsFile" else base64.b64decode(value["content"])
                    )
                    hub.files[f"{owner}/{name}"][value["path"]] = content
                hub.commits[f"{owner}/{name}"] = hub.commits.get(f"{owner}/{name}", 0) + 1
                return self.answer(200, {"commitUrl": f"{hub.endpoint}/{owner}/{name}/commit/1", "commitOid": "1"})
            case _:
                return self.answer(404, {"error": f"no such address: {path}"})

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def validated(card: str) -> tuple[int, dict[str, Any]]:
    """The hub's check of a README.md: metadata that it can read, and a base_model that can be a repository of the hub."""
    first, metadata, _ = card.split("---\n", 2)
    fields = yaml.safe_load(metadata)
    errors = [] if first == "" else ["no metadata"]
    if "base_model" in fields and not all(part and part[0] not in "./" for part in fields["base_model"].split("/")):
        errors.append(f'"base_model" with value "{fields["base_model"]}" is not valid')
    problems = {"errors": [{"message": error} for error in errors], "warnings": []}
    return (400 if errors else 200), problems
