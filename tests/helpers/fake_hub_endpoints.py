"""The endpoints of the fake Hub."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from tests.helpers.fake_hub import Commit, FakeHub, Repo

OWNER = "me"
TOKENS = {"hf_writing": "write", "hf_reading": "read"}  # any other token is an expired one
_DATE = "2026-01-01T00:00:00.000Z"
_LFS_ENDINGS = (".safetensors", ".parquet", ".bin", ".onnx", ".arrow", ".npz")
_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
_FRONT_MATTER = re.compile(r"^\s*---\r?\n(.*?)\r?\n---\r?\n?", re.DOTALL)


class _Answer(Exception):
    """Ends a request: status, body and headers."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Cut(Exception):
    """The network breaks."""


class Handler(BaseHTTPRequestHandler):
    """One connection; `_ROUTES` says which method answers what."""

    state: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, *_: Any) -> None:
        """Keep quiet; the requests are recorded."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        hub = self.state
        try:
            if self.route == "/_faults":
                hub.faults = json.loads(self._body())
                raise _Answer(200, {})
            hub.requests.append((self.command, self.route))
            hub.authorizations.add(self.headers.get("Authorization", ""))
            self._break_here("cut_at")
            body = self._body()
            with hub.lock:
                self._dispatch(body)
        except _Answer as answer:
            self._send(answer)
        except _Cut:
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _break_here(self, fault: str) -> None:
        """Cut the connection of requests that match `METHOD path`, `times` times (default: always)."""
        pattern, times = self.state.faults.get(fault), self.state.faults.get("times", 10**9)
        if pattern and times and re.search(pattern, f"{self.command} {self.route}"):
            self.state.faults["times"] = times - 1
            raise _Cut

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        with contextlib.suppress(_Cut):
            self._break_here("cut_inside")
            if self.headers.get("Transfer-Encoding") == "chunked":
                return b"".join(iter(self._chunk, b""))
            return self.rfile.read(length)
        self.rfile.read(min(length // 2, 1000))  # half of it has arrived
        raise _Cut

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _send(self, answer: _Answer) -> None:
        raw = isinstance(answer.body, bytes)
        body = answer.body if raw else b"" if answer.body is None else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _dispatch(self, body: bytes) -> None:
        self.role = self._role()
        for methods, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in methods.split():
                getattr(self, action)(body, **match.groupdict())
                raise AssertionError(action)
        raise _Answer(404, {"error": f"the fake Hub has no {self.command} {self.route}"})

    def _role(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header or "/_lfs/" in self.route:
            return None
        role = TOKENS.get(header.removeprefix("Bearer "))
        if role is None:
            message = "Invalid credentials in Authorization header"
            raise _Answer(401, {"error": message}, X_Error_Message=message)
        return role

    def _repo(self, kind: str | None, repo: str, write: bool = False) -> Repo:
        found = self.state.repos.get((_TYPES[kind or "models"], repo))
        if found is None or (found.private and self.role is None):
            raise _Answer(404 if self.role else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if write:
            self._may_write(repo.split("/")[0])
        return found

    def _may_write(self, owner: str) -> None:
        if self.role is None:
            message = "Invalid username or password."
            raise _Answer(401, {"error": message}, X_Error_Message=message)
        opens_pr = "create_pr" in self.query or self.route.endswith((".git/info/lfs/objects/batch", "/discussions"))
        if self.role == "read" or (owner != OWNER and not opens_pr):
            message = "Forbidden: you must use a write token to write to this repository."
            raise _Answer(403, {"error": message}, X_Error_Message=message)

    def _revision(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        oid = repo.find(revision)
        if oid is None:
            raise _Answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return oid, repo.commits[oid]

    # ---- the endpoints ---------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        if self.role is None:
            raise _Answer(401, {"error": "Invalid username or password."})
        token = {"accessToken": {"role": self.role, "displayName": "test"}}
        raise _Answer(200, {"type": "user", "name": OWNER, "orgs": [], "auth": token})

    def validate(self, body: bytes) -> None:
        matter = _FRONT_MATTER.match(json.loads(body)["content"])
        if matter is None:
            raise _Answer(200, {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []})
        try:
            data = yaml.safe_load(matter[1])
        except yaml.YAMLError as error:
            raise _Answer(400, {"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}) from error
        errors = [{"message": message} for message in _front_matter_errors(data)]
        raise _Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        owner = wanted.get("organization") or OWNER
        repo_id, kind = f"{owner}/{wanted['name']}", wanted.get("type") or "model"
        url = f"{self.state.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
        self._may_write(owner)
        if (kind, repo_id) in self.state.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": url})
        self.state.create(repo_id, kind, private=wanted.get("visibility") == "private")
        raise _Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo, write=True)
        files = found.files("main" if "create_pr" in self.query else self._revision(found, revision)[0])
        answers = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(_LFS_ENDINGS) or file["size"] > 10_000_000
            here = files.get(file["path"])
            oid = None if here is None else hashlib.sha256(here).hexdigest() if lfs else _git_oid(here)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise _Answer(200, {"files": answers})

    def lfs_batch(self, body: bytes, kind: str | None, repo: str) -> None:
        self._repo(kind, repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {
                name: {"href": f"{self.state.url}/_lfs/{place}/{wanted['oid']}", "header": {}}
                for name, place in (("upload", "objects"), ("verify", "verify"))
            }
            objects.append({**wanted, **({} if wanted["oid"] in self.state.lfs else {"actions": actions})})
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, {"error": "the content is not what was announced"})
        self.state.lfs[oid] = body
        raise _Answer(200)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        raise _Answer(200 if oid in self.state.lfs else 404, {})

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found, pr = self._repo(kind, repo, write=True), "create_pr" in self.query
        parent, base = self._revision(found, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent):
            raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files, lfs = dict(base.files), set(base.lfs)
        for value, key in ((line["value"], line["key"]) for line in lines[1:]):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.state.lfs:
                    raise _Answer(400, {"error": f"LFS object {value['oid']} is missing"})
                files[value["path"]] = self.state.lfs[value["oid"]]
                lfs.add(value["path"])
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Answer(404, {"error": "A file with this name doesn't exist"}, X_Error_Code="EntryNotFound")
            else:
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        new = type(base)(header["summary"], header.get("description", ""), files, parent, frozenset(lfs))
        oid = found.add(new, f"refs/pr/{number}" if pr else revision)
        self._break_here("cut_after")  # done, but nobody is told
        prefix = f"{self.state.url}/{'' if kind == 'models' else f'{kind}/'}{repo}"
        answer = {"commitUrl": f"{prefix}/commit/{oid}", "commitOid": oid, "success": True}
        raise _Answer(200, {**answer, "pullRequestUrl": f"{prefix}/discussions/{number}" if pr else None})

    def info(self, body: bytes, kind: str, repo: str, revision: str | None = None) -> None:
        found = self._repo(kind, repo)
        oid, commit = self._revision(found, revision or "main")
        matter = _FRONT_MATTER.match(commit.files.get("README.md", b"").decode())
        data = yaml.safe_load(matter[1]) if matter else {}
        answer = {"_id": oid[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": oid, "tags": []}
        answer |= {"lastModified": _DATE, "createdAt": _DATE, "private": found.private, "gated": False, "likes": 0}
        answer |= {
            "disabled": False,
            "downloads": 0,
            "cardData": data,
            "siblings": [{"rfilename": p} for p in commit.files],
        }
        raise _Answer(200, answer | {key: data[key] for key in ("library_name", "pipeline_tag") if key in data})

    def tree(self, body: bytes, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        _, commit = self._revision(self._repo(kind, repo), revision)
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        inside = [path for path in commit.files if path.startswith(prefix)]
        if prefix and not inside:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        depth = prefix.count("/")
        folders = {"/".join(p.split("/")[:n]) for p in inside for n in range(depth + 1, p.count("/") + 1)}
        entries = [_entry(path, commit) for path in inside] + [
            {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
            for path in sorted(folders)
        ]
        raise _Answer(200, [e for e in entries if recursive or e["path"].count("/") == depth])

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        _, commit = self._revision(self._repo(kind, repo), revision)
        try:
            wanted = json.loads(body)["paths"]
        except ValueError:
            wanted = parse_qs(body.decode())["paths"]
        raise _Answer(200, [_entry(path, commit) for path in wanted if path in commit.files])

    def refs(self, body: bytes, kind: str, repo: str) -> None:
        found = self._repo(kind, repo).refs
        branches = {name: oid for name, oid in found.items() if not name.startswith("refs/")}
        answer = {"branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in branches.items()]}
        pulls = [_ref(name, name, oid) for name, oid in found.items() if name not in branches]
        raise _Answer(200, {**answer, "converts": [], "tags": [], "pullRequests": pulls})

    def branch(self, body: bytes, kind: str, repo: str, name: str) -> None:
        found = self._repo(kind, repo, write=True)
        if name in found.refs:
            raise _Answer(409, {"error": "Reference already exists"})
        found.refs[name] = self._revision(found, json.loads(body or b"{}").get("startingPoint") or "main")[0]
        raise _Answer(200, {})

    def commits(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        self._revision(found, revision)
        names = ("id", "title", "message", "date", "authors")
        rows = [(o, c.title, c.message, _DATE, [{"user": c.author}]) for o, c in found.history(revision)]
        raise _Answer(200, [dict(zip(names, row, strict=True)) for row in rows])

    def discuss(self, body: bytes, kind: str, repo: str, number: str | None = None) -> None:
        found = self._repo(kind, repo, write=self.command == "POST")
        title = "a discussion"
        if self.command == "POST":
            title = json.loads(body)["title"]
            number = str(1 + sum(ref.startswith("refs/pr/") for ref in found.refs))
            found.refs[f"refs/pr/{number}"] = found.refs["main"]
        if f"refs/pr/{number}" not in found.refs:
            raise _Answer(404, {"error": "Not found"})
        answer = {"num": int(number or 0), "title": title, "status": "open", "isPullRequest": True, "createdAt": _DATE}
        answer |= {"author": {"name": OWNER}, "repo": {"name": repo, "type": _TYPES[kind]}, "events": []}
        raise _Answer(200, answer | {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": []})

    def resolve(self, body: bytes, kind: str | None, repo: str, revision: str, path: str) -> None:
        oid, commit = self._revision(self._repo(kind, repo), revision)
        content = commit.files.get(path)
        if content is None:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        etag = f'"{hashlib.sha256(content).hexdigest() if path in commit.lfs else _git_oid(content)}"'
        headers = {"X_Repo_Commit": oid, "ETag": etag, "Accept_Ranges": "bytes"}
        headers |= {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and self.command == "GET":
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            raise _Answer(206, content[first : last + 1], **headers)
        raise _Answer(200, content, **headers)


def _front_matter_errors(data: Any) -> Iterator[str]:
    """Yield what the Hub refuses; its own rules are longer."""
    if not isinstance(data, dict):
        yield "the metadata must be a mapping"
        return
    for key in ("tags", "datasets", "license", "base_model", "language"):
        items = data.get(key, "ok")
        if not all(isinstance(item, str) for item in (items if isinstance(items, list) else [items])):
            yield f'"{key}" must be a string or a list of strings'
    for key in ("base_model", "datasets"):
        items = data.get(key) or []
        for item in items if isinstance(items, list) else [items]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(item)):
                yield f'"{key}" with value "{item}" is not valid. Use a model or dataset id.'
    for place, entry in enumerate(data.get("model-index") or []):
        if not isinstance(entry, dict) or not entry.get("name"):
            yield f'"model-index[{place}].name" is required'
            continue
        for result in entry.get("results", []):
            if not (result.get("task") or {}).get("type") or not {"name", "type"} <= set(result.get("dataset") or {}):
                yield f'"model-index[{place}]" has a result without task type, dataset name or dataset type'
            if not all(isinstance(m.get("value"), int | float) for m in result.get("metrics", [])):
                yield f'"model-index[{place}]" has a metric that is no number'


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


def _entry(path: str, commit: Commit) -> dict[str, Any]:
    content = commit.files[path]
    entry: dict[str, Any] = {"type": "file", "oid": _git_oid(content), "size": len(content), "path": path}
    if path in commit.lfs:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths_info"),
    ("POST", rf"{_API}/branch/(?P<name>.+)", "branch"),
    ("GET", rf"{_API}/tree/{_REVISION}(?P<folder>/.*)?", "tree"),
    ("GET", rf"{_API}/commits/{_REVISION}", "commits"),
    ("GET", rf"{_API}/refs", "refs"),
    ("GET POST", rf"{_API}/discussions(/(?P<number>\d+))?", "discuss"),
    ("GET", rf"{_API}(/revision/{_REVISION})?", "info"),
    ("POST", r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/_lfs/objects/(?P<oid>\w+)", "lfs_put"),
    ("POST", r"/_lfs/verify/(?P<oid>\w+)", "lfs_verify"),
    ("GET HEAD", rf"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
