import json
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from allostasis.models import hub
from allostasis.models.lens import pretrained

OFFICIAL = constants.ENDPOINT
Checkpoint = Callable[[str], Path]


class Hub(BaseHTTPRequestHandler):
    """A hub with one model, `open/model`; its other owners refuse."""

    folder: Path
    commit = "f" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/gated/"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif path.startswith("/api/models/open/model/revision/no-such"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/open/model/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in self.folder.iterdir()
            ]
            self.answer(200, json.dumps(files).encode())
        elif path.startswith("/api/models/open/model"):
            siblings = [
                {"rfilename": p.name, "size": p.stat().st_size} for p in self.folder.iterdir()
            ]
            self.answer(
                200,
                json.dumps({"id": "open/model", "sha": self.commit, "siblings": siblings}).encode(),
            )
        elif path.startswith("/open/model/resolve/"):
            content = (self.folder / Path(path).name).read_bytes()
            etag = sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def own_hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.folder = checkpoint("gpt_neox")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(OFFICIAL)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    yield address
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("own_hub")
def test_a_model_is_fetched_from_the_hub_once(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    model = pretrained(name="open/model")
    assert model.identity["revision"] == Hub.commit
    expected = pretrained(source=str(checkpoint("gpt_neox"))).identity["weights_sha256"]
    assert model.identity["weights_sha256"] == expected
    assert hub.fetched("open/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pretrained(name="open/model").identity == model.identity


@pytest.mark.parametrize(
    ("name", "revision", "state"),
    [("gated/model", None, "hub (gated)."), ("closed/model", None, "hub (not found, or private)."),
     ("open/model", "no-such", "hub (has no revision no-such)."),
     ("not a name", None, "hub (no such name is possible; names are written owner/name).")],
)  # fmt: skip
def test_what_the_hub_refuses_is_told_apart(
    own_hub: str, name: str, revision: str | None, state: str
) -> None:
    with pytest.raises(FileNotFoundError) as error:
        pretrained(name=name, revision=revision)
    assert f"model.source (not set); {state}\n" in str(error.value)
    advice = f"  accept the licence at {own_hub}/gated/model, then run: hf auth login\n"
    assert (advice in str(error.value)) is (name == "gated/model")


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = threading.Event()

    def look_up_slowly(*_: Any, **__: Any) -> None:
        stop.wait()
        raise OSError("temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "create_connection", look_up_slowly)
    start = time.monotonic()
    assert not hub.is_reachable(within=0.1)
    assert time.monotonic() - start < 2
    stop.set()
