"""A small Hub on loopback, standard library only: the LFS path of the client, and faults on demand.

A commit is a tree ``{path: (bytes, is_lfs)}`` with an id. Every request is logged with its body, so that a test can say
went over the wire, how often, and what did not.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "testtokenAAAABBBBCCCCDDDDEEEEFFFF"
READER = "hf_" + "readertokenAAAABBBBCCCCDDDDEEEE"
USERS = {TOKEN: "me", READER: "reader"}


@dataclass
class Commit:
    """A commit of a repository."""

    sha: str
    tree: dict[str, tuple[bytes, bool]]
    message: str = ""
    parent: str | None = None
    changed: tuple[str, ...] = ()


@dataclass
class Repo:
    """A repository: branches, tags and pull requests are names of commits."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def content_commits(self) -> list[Commit]:
        """All but the first, which makes .gitattributes."""
        return [c for c in self.commits.values() if c.parent is not None]

    def head(self, revision: str = "main") -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or self.pulls.get(revision) or revision
        return self.commits.get(sha)


@dataclass
class Fault:
    """What to do to a request instead of, or after, answering it.

    `kind`: ``status`` answers so; ``cut`` closes the connection after part of the body; ``lost`` does the work and
    closes the connection without an answer; ``html`` answers with a page; ``none`` answers as always. `before` is called first.
    """

    method: str
    path: str
    kind: str = "status"
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    error: str = ""
    code: str = ""
    before: Any = None


class Hub:
    """The server; `with Hub() as hub` or `start`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, bytes]] = []
        self.lock = threading.RLock()
        self.counter = 0
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        with self.lock:
            self.repos.clear()
            self.faults.clear()
            self.log.clear()

    def make(self, repo_id: str, private: bool = False) -> Repo:
        with self.lock:
            repo = self.repos[repo_id] = Repo(private)
            first = {".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
            self.commit(repo, "main", first, "initial commit", None)
            return repo

    def put(self, repo_id: str, files: dict[str, bytes], message: str = "by hand") -> str:
        """Commit files as someone else would."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.make(repo_id)
            head = repo.head()
            tree = {**head.tree, **{name: (data, _large(name, data)) for name, data in files.items()}}
            return self.commit(repo, "main", tree, message, head.sha, tuple(files))

    def commit(self, repo, branch, tree, message, parent, changed=()) -> str:
        self.counter += 1
        sha = hashlib.sha1(f"{self.counter}{message}".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, dict(tree), message, parent, changed)
        (repo.pulls if branch.startswith("refs/pr/") else repo.branches)[branch] = sha
        return sha

    def fault(self, method: str, path: str, **options: Any) -> Fault:
        made = Fault(method, path, **options)
        self.faults.append(made)
        return made

    def requests(self, method: str, pattern: str) -> list[tuple[str, str, bytes]]:
        return [entry for entry in self.log if entry[0] == method and re.search(pattern, entry[1])]

    def uploaded(self) -> list[str]:
        """sha256 of every object whose whole body arrived, in order."""
        return [path.rsplit("/", 1)[-1] for _, path, _ in self.requests("DONE", "/lfs-storage/")]


def _large(name: str, data: bytes) -> bool:
    return bool(data) and (
        name.endswith((".safetensors", ".png", ".bin")) or b"\0" in data[:512] or len(data) > 10 * 2**20
    )


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or each answer waits 40 ms for an acknowledgement
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        path = urllib.parse.unquote(self.path)
        hub = self.hub
        fault = self._fault(method, path)
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.kind == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0)) // 2))
            return self._drop()
        body = self._body()
        with hub.lock:
            hub.log.append((method, path, body))
        if fault is not None and fault.kind == "status":
            headers = {**fault.headers, **({"X-Error-Message": fault.error} if fault.error else {})}
            headers |= {"X-Error-Code": fault.code} if fault.code else {}
            return self._json(fault.status, {"error": fault.error or f"fault {fault.status}"}, headers)
        if fault is not None and fault.kind == "html":
            return self._send(fault.status, b"<html>down</html>", {"Content-Type": "text/html"})
        with hub.lock:
            status, data, headers = self._answer(method, path, body)
        if fault is not None and fault.kind == "lost":
            return self._drop()
        if isinstance(data, bytes):
            return self._send(status, data, headers)
        return self._json(status, data, headers)

    def _fault(self, method: str, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _drop(self) -> None:
        self.close_connection = True
        self.wfile = io.BytesIO()
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    # The Hub's answers.

    def _user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _no(self, status: int, code: str, message: str) -> tuple[int, Any, dict[str, str]]:
        return status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message}

    def _answer(self, method: str, raw: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub, user = self.hub, self._user()
        path, _, query = raw.partition("?")
        if path.startswith("/lfs-storage/"):
            oid, repo_id = path.rsplit("/", 1)[-1], path.removeprefix("/lfs-storage/").rsplit("/", 1)[0]
            if method == "PUT":
                assert "Authorization" not in self.headers, "the token went to the storage"
                if hashlib.sha256(body).hexdigest() != oid:
                    return self._no(400, "BadDigest", "wrong content")
                hub.repos[repo_id].objects[oid] = body
                hub.log.append(("DONE", path, b""))
                return 200, b"", {"ETag": f'"{oid}"'}
        if path == "/api/whoami-v2":
            if user is None:
                return self._no(401, "Unauthorized", "Invalid credentials in Authorization header")
            return 200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}, {}
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body), user)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            repo = hub.repos.get(found[1])
            if repo is None or (repo.private and user != found[1].split("/")[0]):
                return self._no(404 if user else 401, "RepoNotFound", "Repository not found")
            return self._api(method, found[1], repo, found[2] or "", query, body, user)
        if found := re.fullmatch(r"/([^/]+/[^/]+?)\.git/info/lfs/objects/(batch|verify)", path):
            return self._lfs(found[1], found[2], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/((?:refs/pr/\d+)|[^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3], user)
        return self._no(404, "NotFound", f"no such route {path}")

    def _validate(self, content: str) -> tuple[int, Any, dict[str, str]]:
        errors = []
        try:
            data = yaml.safe_load(content[4:].partition("\n---")[0]) if content.startswith("---\n") else {}
            bases = data.get("base_model", [])
            for base in [bases] if isinstance(bases, str) else bases:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                    errors.append({"message": f'"base_model" with value "{base}" is not valid'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _create(self, data: dict[str, Any], user: str | None) -> tuple[int, Any, dict[str, str]]:
        if user is None:
            return self._no(401, "Unauthorized", "Invalid username or password.")
        repo_id = f"{data.get('organization') or user}/{data['name']}"
        if repo_id in self.hub.repos:
            return 409, {"url": f"{self.hub.url}/{repo_id}", "error": "You already created this model repo"}, {}
        if repo_id.split("/")[0] != user or user == "reader":
            return self._no(
                403, "Forbidden", f"You don't have the rights to create a model under the namespace {repo_id}"
            )
        self.hub.make(repo_id, data.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"}, {}

    def _api(self, method, repo_id, repo, rest, query, body, user):
        write = user == repo_id.split("/")[0]
        if rest == "/auth-check/write":
            return (200, {}, {}) if write else self._no(403, "Forbidden", "you have no write role")
        if rest == "/refs":

            def named(table, kind):
                full = {name: name if name.startswith("refs") else f"refs/{kind}/{name}" for name in table}
                return [{"name": n.rsplit("/", 1)[-1], "ref": full[n], "targetCommit": s} for n, s in table.items()]

            return 200, {"branches": named(repo.branches, "heads"), "converts": [], "tags": named(repo.tags, "tags"),
                         "pullRequests": named(repo.pulls, "pr")}, {}  # fmt: skip
        if found := re.fullmatch(r"/(branch|tag)/(.+)", rest):
            if not write:
                return self._no(403, "Forbidden", "you have no write role")
            if found[1] == "branch":
                if found[2] in repo.branches:
                    return self._no(409, "Conflict", "Reference already exists")
                repo.branches[found[2]] = repo.branches["main"]
            else:
                name = json.loads(body)["tag"]
                if name in repo.tags:
                    return self._no(409, "Conflict", "Tag reference exists already")
                repo.tags[name] = repo.head(found[2]).sha
            return 201, {}, {}
        if rest == "" or (found := re.fullmatch(r"/revision/(.+)", rest)):
            head = repo.head("main" if rest == "" else found[1])
            if head is None:
                return self._no(404, "RevisionNotFound", "Invalid rev id")
            return 200, self._info(repo_id, repo, head), {}
        if found := re.fullmatch(r"/tree/([^/]+|refs/pr/\d+)/?", rest):
            head = repo.head(found[1])
            if head is None:
                return self._no(404, "RevisionNotFound", "Invalid rev id")
            return 200, [_entry(n, d, large) for n, (d, large) in sorted(head.tree.items())], {}
        if found := re.fullmatch(r"/preupload/(.+)", rest):
            if not write and "create_pr=1" not in query:
                return self._no(403, "Forbidden", "you have no write role")
            head = repo.head(found[1])
            if head is None:
                return self._no(404, "RevisionNotFound", "Invalid rev id")
            files = []
            for file in json.loads(body)["files"]:
                large = _large(file["path"], base64.b64decode(file["sample"])) or file["size"] > 10 * 2**20
                known = head.tree.get(file["path"])
                oid = None if known is None else hashlib.sha256(known[0]).hexdigest() if known[1] else _blob(known[0])
                mode = "lfs" if large else "regular"
                files.append(
                    {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})}
                )
            return 200, {"files": files}, {}
        if found := re.fullmatch(r"/commit/(.+)", rest):
            return self._commit(repo_id, repo, found[1], "create_pr=1" in query, body, write)
        return self._no(404, "NotFound", f"no such route {rest}")

    def _info(self, repo_id: str, repo: Repo, head: Commit) -> dict[str, Any]:
        card = head.tree.get("README.md", (b"", False))[0].decode()
        data = yaml.safe_load(card[4:].partition("\n---")[0]) if card.startswith("---\n") else None
        names = [{"rfilename": name} for name in sorted(head.tree)]
        return {
            "id": repo_id, "modelId": repo_id, "sha": head.sha, "private": repo.private, "gated": False, "siblings": names,
            "tags": [], "downloads": 0, "likes": 0, "cardData": data, "author": repo_id.split("/")[0],
        }  # fmt: skip

    def _lfs(self, repo_id: str, call: str, data: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        repo = self.hub.repos[repo_id]
        if call == "verify":
            ok = len(repo.objects.get(data["oid"], b"")) == data["size"]
            return (200, {}, {}) if ok else self._no(404, "NotFound", "object is not there")
        objects = []
        for item in data["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.objects:
                upload = {"href": f"{self.hub.url}/lfs-storage/{repo_id}/{item['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify", "header": {}}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _commit(self, repo_id, repo, branch, create_pr, body, write):
        if not write and not create_pr:
            return self._no(403, "Forbidden", "pass `create_pr=1` as a query parameter to create a Pull Request")
        head = repo.head(branch)
        tree, header, changed = dict(head.tree), {}, []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                tree[value["path"]] = (base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    return self._no(400, "BadRequest", "LFS pointer without content")
                tree[value["path"]] = (repo.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                tree.pop(value["path"])
            changed.append(value.get("path", ""))
        if header.get("parentCommit") not in (None, head.sha):
            return self._no(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        if create_pr:
            branch = f"refs/pr/{len(repo.pulls) + 1}"
        sha = self.hub.commit(repo, branch, tree, header["summary"], head.sha, tuple(filter(None, changed)))
        answer = {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}",
            "hookOutput": "",
        }
        if create_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{len(repo.pulls)}"
        return 200, answer, {}

    def _resolve(self, repo_id: str, revision: str, name: str, user: str | None) -> tuple[int, Any, dict[str, str]]:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            return self._no(404 if user else 401, "RepoNotFound", "Repository not found")
        head = repo.head(revision)
        if head is None:
            return self._no(404, "RevisionNotFound", "Invalid rev id")
        if name not in head.tree:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": head.sha}
        data, large = head.tree[name]
        etag = hashlib.sha256(data).hexdigest() if large else _blob(data)
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": head.sha,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(data)),
        }
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return 200, data, headers


def _entry(name: str, data: bytes, large: bool) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    if large:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
