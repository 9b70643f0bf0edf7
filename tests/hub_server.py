"""A Hugging Face Hub on loopback, in memory: as much of the protocol as pushing and loading models needs.

The real client (`huggingface_hub`) is pointed at it with `HubServer.environment()`; nothing leaves the machine. It serves
many clients at once, keeps private repositories, branches and tags, and fails on demand.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})
        hub.files("user/name")["adapter_config.json"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


USER, TOKEN = "user", "hf_loopback"
# Another account, which sees no private repository of `USER` and may not write to any.
GUEST, GUEST_TOKEN = "guest", "hf_guest"
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


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]]
    tags: dict[str, Commit] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or an id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        by_id = {commit.sha: commit for commits in self.branches.values() for commit in commits}
        return self.tags.get(revision) or by_id.get(revision)


@dataclass
class Failure:
    """What happens to the next `times` requests of this method and path in place of an answer.

    With a `status` they are refused; without one the connection is cut in the middle, of the body that is sent or received.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1


class Refused(Exception):
    """Becomes an HTTP error with the code that the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """Repositories of models behind an HTTP server in a thread, one more thread for each connection."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.accounts = {TOKEN: USER, GUEST_TOKEN: GUEST}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._failures: list[Failure] = []
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

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision, the newest one of the main branch by default."""
        with self.lock:
            return {path: file.content for path, file in self.commit(repository, revision).files.items()}

    def messages(self, repository: str, branch: str = "main") -> list[str]:
        """The messages of the commits of a branch, oldest first."""
        return [commit.message for commit in self.repositories[repository].branches[branch]]

    @contextmanager
    def failing(self, method: str, path: str, status: int | None = None, times: int = 1) -> Iterator[Failure]:
        """Inside, the next requests of this method, with a path that matches this expression, fail (see `Failure`)."""
        failure = Failure(method, path, status, times)
        self._failures.append(failure)
        try:
            yield failure
        finally:
            self._failures.remove(failure)

    def failure_of(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self._failures:
                if failure.times and failure.method == method and re.fullmatch(failure.path, path):
                    failure.times -= 1
                    return failure
        return None

    # --------------------------------------------------------------------------------------------------------------------
    # Looking up

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refused(404, f"no repository {name}", "RepoNotFound")
        return self.repositories[name]

    def commit(self, repository: str, revision: str = "main") -> Commit:
        found = self.repository(repository).commit(revision)
        if found is None:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return found

    def authorize(self, token: str | None, repository: str | None, writes: bool) -> None:
        """Raise as the Hub does unless the bearer of a token may read, or write, a repository."""
        if token is not None and token not in self.accounts:
            raise Refused(401, "Invalid credentials in Authorization header")
        if token is None and writes:
            raise Refused(401, "a token is needed to write")
        owner, account = (repository or "").split("/")[0], self.accounts.get(token or "")
        if repository in self.repositories and self.repositories[repository].private and account != owner:
            # The Hub does not tell whether there is one.
            raise Refused(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if writes and repository and account != owner:
            raise Refused(403, f"{account} may not write to {repository}")

    # --------------------------------------------------------------------------------------------------------------------
    # Endpoints: (token, body, **parts of the path) -> JSON

    def whoami(self, token: str | None, body: bytes) -> Any:
        if token is None:
            raise Refused(401, "a token is needed")
        name = self.accounts[token]
        return {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, token: str, body: bytes) -> Any:
        asked = json.loads(body)
        repository = f"{asked.get('organization') or self.accounts[token]}/{asked['name']}"
        self.authorize(token, repository, writes=True)
        answer = {"name": repository, "url": f"{self.endpoint}/{repository}"}
        if repository in self.repositories:
            raise Refused(409, json.dumps(answer))
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        first = Commit("initial commit", {".gitattributes": File(b"*.safetensors lfs", False)})
        self.repositories[repository] = Repository(private, {"main": [first]})
        return answer

    def create_branch(self, token: str, body: bytes, repository: str, branch: str) -> Any:
        start = json.loads(body or b"{}").get("startingPoint", "main")
        branches = self.repository(repository).branches
        if branch in branches:
            raise Refused(409, f"there is a branch {branch}")
        history = next((commits for commits in branches.values() if self.commit(repository, start) in commits), [])
        branches[branch] = history[: history.index(self.commit(repository, start)) + 1]
        return {}

    def create_tag(self, token: str, body: bytes, repository: str, revision: str) -> Any:
        tag = json.loads(body)["tag"]
        if tag in self.repository(repository).tags:
            raise Refused(409, f"there is a tag {tag}")
        self.repository(repository).tags[tag] = self.commit(repository, revision)
        return {}

    def auth_check(self, token: str | None, body: bytes, repository: str, writes: str = "") -> Any:
        self.repository(repository)
        self.authorize(token, repository, writes=bool(writes))
        return {}

    def refs(self, token: str | None, body: bytes, repository: str) -> Any:
        found = self.repository(repository)
        branches = {name: commits[-1] for name, commits in found.branches.items()}
        return {
            kind: [
                {"name": name, "ref": f"refs/{path}/{name}", "targetCommit": commit.sha}
                for name, commit in refs.items()
            ]
            for kind, path, refs in (("branches", "heads", branches), ("tags", "tags", found.tags))
        } | {"converts": []}

    def validate_yaml(self, token: str | None, body: bytes) -> Any:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if match is None:
            return {"errors": [{"message": "no metadata block"}], "warnings": []}
        base = yaml.safe_load(match[1]).get("base_model", "some/model")
        is_id = isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
        errors = [] if is_id else [{"message": f'"base_model" with value {base!r} is not valid. Use a model id.'}]
        return {"errors": errors, "warnings": []}

    def model_info(self, token: str | None, body: bytes, repository: str, revision: str = "main") -> Any:
        commit = self.commit(repository, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = self.repository(repository).private
        info = {
            "id": repository,
            "sha": commit.sha,
            "private": private,
            "tags": [],
            "downloads": 0,
            "siblings": siblings,
        }
        readme = commit.files.get("README.md", File(b"", False)).content.decode()
        if match := re.match(r"---\n(.*?)\n---", readme, re.DOTALL):
            info["cardData"] = yaml.safe_load(match[1])
        return info

    def tree(self, token: str | None, body: bytes, repository: str, revision: str, folder: str = "") -> Any:
        prefix = f"{folder}/" if folder else ""
        if prefix and not any(path.startswith(prefix) for path in self.commit(repository, revision).files):
            raise Refused(404, f"no folder {folder}", "EntryNotFound")
        entries = []
        for path, file in self.commit(repository, revision).files.items():
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                if file.is_lfs:
                    entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
                entries.append(entry)
        return entries

    def commits(self, token: str | None, body: bytes, repository: str, revision: str) -> Any:
        self.commit(repository, revision)
        date = "2026-01-01T00:00:00.000Z"
        return [
            {"id": commit.sha, "title": commit.message, "message": "", "authors": [{"user": USER}], "date": date}
            for commit in reversed(self.repository(repository).branches[revision])
        ]

    def preupload(self, token: str | None, body: bytes, repository: str, revision: str) -> Any:
        existing = self.commit(repository, revision).files
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            oid = existing[path].etag if path in existing else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, token: str | None, body: bytes, repository: str) -> Any:
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.lfs:
                href = f"{self.endpoint}/lfs/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, token: str | None, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content does not have this hash")
        self.lfs[oid] = body
        return {}

    def lfs_verify(self, token: str | None, body: bytes, oid: str) -> Any:
        if len(self.lfs.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "no such object of this size")
        return {}

    def add_commit(self, token: str | None, body: bytes, repository: str, revision: str) -> Any:
        branch = self.repository(repository).branches.get(revision)
        if branch is None:
            raise Refused(404, f"no branch {revision}", "RevisionNotFound")
        new = Commit("", dict(branch[-1].files), branch[-1].sha)
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
        branch.append(new)
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
        ("POST", f"/api/models/{REPOSITORY}/branch/(?P<branch>[^/]+)", create_branch),
        ("POST", f"/api/models/{REPOSITORY}/tag/{REVISION}", create_tag),
        ("GET", f"/api/models/{REPOSITORY}/refs", refs),
        ("GET", f"/api/models/{REPOSITORY}/auth-check(?P<writes>/write)?", auth_check),
        ("GET", f"/api/models/{REPOSITORY}", model_info),
        ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/lfs/(?P<oid>\w{64})", lfs_put),
        ("POST", r"/lfs/(?P<oid>\w{64})/verify", lfs_verify),
    )


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    token: str | None = None
    is_cut = False

    def handle_request(self) -> None:
        # Matched before it is unquoted: the name of a branch may hold a slash.
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(path)}")
        failure = self.hub.failure_of(self.command, unquote(path))
        self.is_cut = failure is not None and failure.status is None
        if self.is_cut and int(self.headers.get("Content-Length", 0)):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.cut()
        body = self.read_body()
        try:
            if failure is not None and failure.status is not None:
                raise Refused(failure.status, "this request fails on demand")
            authorization = self.headers.get("Authorization")
            self.token = authorization.removeprefix("Bearer ") if authorization else None
            if match := re.fullmatch(f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", path):
                return self.send_file(**{name: unquote(part) for name, part in match.groupdict().items()})
            for method, pattern, endpoint in HubServer.ENDPOINTS:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                    # The address of an upload is its own authorization, and anyone may have metadata checked.
                    if method != "PUT":
                        writes = method == "POST" and endpoint is not HubServer.validate_yaml
                        self.hub.authorize(self.token, parts.get("repository"), writes)
                    with self.hub.lock:
                        answer = endpoint(self.hub, self.token, body, **parts)
                    return self.answer(200, json.dumps(answer).encode())
            raise Refused(404, f"no endpoint {self.command} {path}")
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            return self.answer(error.status, str(error).encode(), headers)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

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
        self.hub.authorize(self.token, repository, writes=False)
        with self.hub.lock:
            commit = self.hub.commit(repository, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, b"Entry not found", headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.etag}"'
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        # The client goes on with a file where the connection was cut.
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, size = int(match[1]), len(file.content)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            return self.answer(206, file.content[start:], headers)
        return self.answer(200, file.content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.is_cut else content)
        if self.is_cut:
            self.wfile.flush()
            self.cut()

    def log_message(self, *args: object) -> None:
        pass
