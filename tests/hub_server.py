"""A Hugging Face Hub on loopback, in memory: as much of the protocol as pushing and loading models needs.

The real client (`huggingface_hub`) is pointed at it with `HubServer.environment()`; nothing leaves the machine.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.files("user/name")["adapter_config.json"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


USER, TOKEN = "user", "hf_loopback"
REPOSITORY, REVISION = r"(?P<repository>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """The id of a git blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass
class Commit:
    message: str
    files: dict[str, File] = field(default_factory=dict)
    parent: str = ""

    @property
    def sha(self) -> str:
        tree = sorted((path, file.sha256) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent, self.message, tree)).encode()).hexdigest()


class Refused(Exception):
    """Becomes an HTTP error with the code that the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """Repositories of models, each one branch of commits, behind an HTTP server in a thread."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[Commit]] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path | str) -> dict[str, str]:
        """What makes the client of a new process talk to this server, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repository: str) -> dict[str, bytes]:
        """The newest version of every file."""
        return {path: file.content for path, file in self.repositories[repository][-1].files.items()}

    # --------------------------------------------------------------------------------------------------------------------
    # Looking up

    def commit(self, repository: str, revision: str = "main") -> Commit:
        if repository not in self.repositories:
            raise Refused(404, f"no repository {repository}", "RepoNotFound")
        commits = self.repositories[repository]
        found = commits[-1:] if revision == "main" else [commit for commit in commits if commit.sha == revision]
        if not found:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return found[0]

    # --------------------------------------------------------------------------------------------------------------------
    # Endpoints: (body, **parts of the path) -> JSON

    def whoami(self, body: bytes) -> Any:
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        repository = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"name": repository, "url": f"{self.endpoint}/{repository}"}
        if repository in self.repositories:
            raise Refused(409, json.dumps(answer))
        self.repositories[repository] = [
            Commit("initial commit", {".gitattributes": File(b"*.safetensors lfs", False)})
        ]
        return answer

    def validate_yaml(self, body: bytes) -> Any:
        errors = [] if json.loads(body)["content"].startswith("---") else [{"message": "no metadata block"}]
        return {"errors": errors, "warnings": []}

    def model_info(self, body: bytes, repository: str, revision: str = "main") -> Any:
        commit = self.commit(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": repository, "sha": commit.sha, "private": False, "tags": [], "downloads": 0, "siblings": siblings}

    def tree(self, body: bytes, repository: str, revision: str, folder: str = "") -> Any:
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, file in self.commit(repository, revision).files.items():
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                if file.is_lfs:
                    entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
                entries.append(entry)
        return entries

    def commits(self, body: bytes, repository: str, revision: str) -> Any:
        self.commit(repository, revision)
        date = "2026-01-01T00:00:00.000Z"
        return [
            {"id": commit.sha, "title": commit.message, "message": "", "authors": [{"user": USER}], "date": date}
            for commit in reversed(self.repositories[repository])
        ]

    def preupload(self, body: bytes, repository: str, revision: str) -> Any:
        existing = self.commit(repository, revision).files
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            oid = existing[path].etag if path in existing else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, body: bytes, repository: str) -> Any:
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.lfs:
                href = f"{self.endpoint}/lfs/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        self.lfs[oid] = body
        return {}

    def lfs_verify(self, body: bytes, oid: str) -> Any:
        if len(self.lfs.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "no such object of this size")
        return {}

    def add_commit(self, body: bytes, repository: str, revision: str) -> Any:
        last = self.commit(repository, revision)
        new = Commit("", dict(last.files), last.sha)
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                new.message = value["summary"]
            elif kind == "file":
                new.files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise Refused(400, f"the content of {value['path']} was not uploaded")
                new.files[value["path"]] = File(self.lfs[value["oid"]], is_lfs=True)
            elif kind == "deletedFile":
                del new.files[value["path"]]
            else:
                raise Refused(400, f"unknown operation {kind}")
        self.repositories[repository].append(new)
        return {"commitUrl": f"{self.endpoint}/{repository}/commit/{new.sha}", "commitOid": new.sha}

    ENDPOINTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/repos/create", create),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("GET", f"/api/models/{REPOSITORY}/revision/{REVISION}", model_info),
        ("GET", f"/api/models/{REPOSITORY}/tree/{REVISION}(/(?P<folder>.+))?", tree),
        ("GET", f"/api/models/{REPOSITORY}/commits/{REVISION}", commits),
        ("POST", f"/api/models/{REPOSITORY}/preupload/{REVISION}", preupload),
        ("POST", f"/api/models/{REPOSITORY}/commit/{REVISION}", add_commit),
        ("GET", f"/api/models/{REPOSITORY}", model_info),
        ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/lfs/(?P<oid>\w{64})", lfs_put),
        ("POST", r"/lfs/(?P<oid>\w{64})/verify", lfs_verify),
    )


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.read_body()
        try:
            # The address of an upload is its own authorization, as on the real Hub.
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "a token is needed to write")
            if match := re.fullmatch(f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", path):
                return self.send_file(**match.groupdict())
            for method, pattern, endpoint in HubServer.ENDPOINTS:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    parts = {name: part for name, part in match.groupdict().items() if part is not None}
                    return self.answer(200, json.dumps(endpoint(self.hub, body, **parts)).encode())
            raise Refused(404, f"no endpoint {self.command} {path}")
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)} if error.code else {}
            return self.answer(error.status, str(error).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send_file(self, repository: str, revision: str, path: str) -> None:
        commit = self.hub.commit(repository, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, b"Entry not found", headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.etag}"'
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return self.answer(200, file.content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
