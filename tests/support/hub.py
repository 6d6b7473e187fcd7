"""A stand-in for the Hub on the loopback: what huggingface_hub calls to make a repository and upload a folder to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK

TOKEN = "hf_of_the_tests"
REPO = r"(?P<repo>[^/]+/[^/]+?)"


@dataclass
class Hub:
    """What is on it, what was asked of it, and what it refuses.

    Attributes:
        repos: name -> path -> content; `private` of them.
        objects: sha256 -> content of large files, which are those that end as `large` says.
        refused: parts of paths -> the sentence it refuses them with.
    """

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    large: tuple[str, ...] = (".safetensors",)
    refused: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def create(self, body, **_):
        name = f"{body['organization'] or 'me'}/{body['name']}"
        if name not in self.repos:
            self.repos[name] = {}
            if body.get("visibility") == "private":
                self.private.add(name)
        return {"url": f"{self.address}/{name}"}

    def validate(self, body, **_):
        block = REGEX_YAML_BLOCK.search(body["content"])
        return {"errors": [] if isinstance(yaml.safe_load(block.group(2)), dict) else [{"message": "no mapping"}]}

    def preupload(self, body, repo):
        files = []
        for asked in body["files"]:
            is_large = asked["path"].endswith(self.large)
            there = self.repos[repo].get(asked["path"])
            kind = {"path": asked["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            files.append(kind if there is None else {**kind, "oid": _oid(there, is_large)})
        return {"files": files}

    def batch(self, body, repo):
        objects = []
        for asked in body["objects"]:
            action = {"upload": {"href": f"{self.address}/lfs/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.objects else {**asked, "actions": action})
        return {"transfer": "basic", "objects": objects}

    def commit(self, body, repo):
        files = dict(self.repos[repo])
        for line in body:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[repo] = files
        return {"commitUrl": f"{self.address}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}

    def tree(self, body, repo):
        return [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in self.repos[repo].items()
        ]

    def info(self, body, repo):
        return {"id": repo, "sha": "0" * 40, "siblings": []}


ROUTES = {
    r"POST /api/repos/create": Hub.create,
    r"POST /api/validate-yaml": Hub.validate,
    rf"POST /api/models/{REPO}/preupload/main": Hub.preupload,
    rf"POST /{REPO}\.git/info/lfs/objects/batch": Hub.batch,
    rf"POST /api/models/{REPO}/commit/main": Hub.commit,
    rf"GET /api/models/{REPO}/tree/main": Hub.tree,
    rf"GET /api/models/{REPO}(/revision/main)?": Hub.info,
}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The server, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._answer()

        do_POST = do_PUT = do_GET

        def _answer(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if path.startswith("/lfs/"):  # signed addresses ask for no token
                hub.objects[path.removeprefix("/lfs/")] = content
                self._send(200, {})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and path != "/api/validate-yaml":
                self._send(401, {"error": "Invalid username or password."})
            elif reason := next((why for part, why in hub.refused.items() if part in path), None):
                self._send(403, {"error": reason})
            else:
                self._send(*self._routed(path, content))

        def _routed(self, path, content):
            for route, method in ROUTES.items():
                if found := re.fullmatch(route, f"{self.command} {path}"):
                    lines = [json.loads(line) for line in content.splitlines() if line]
                    body = lines if method is Hub.commit else lines[0] if lines else None
                    return 200, method(hub, body, **{k: v for k, v in found.groupdict().items() if k == "repo"})
            return 404, {"error": f"{self.command} {path} is not known here"}

        def _send(self, status, document):
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400:
                self.send_header("X-Error-Message", document["error"])
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE=0 would do before huggingface_hub was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def _oid(content: bytes, is_large: bool) -> str:
    if is_large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
