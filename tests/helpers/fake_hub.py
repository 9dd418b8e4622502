"""A small Hub in memory, which speaks HTTP to huggingface_hub, datasets and sentence-transformers.

`HF_ENDPOINT` is read when huggingface_hub is imported, so the Hub is for subprocesses:

    with FakeHub() as hub:
        subprocess.run([sys.executable, "-c", "..."], env=hub.environment(tmp_path))
    hub.repos["model", "me/student"].files()

What the tests ask of it: repositories, git and LFS uploads, commits with a parent, pull requests, downloads with
ranges, three kinds of token, and a network that breaks. Each request is in `hub.requests`. It does not speak xet.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.helpers.fake_hub_endpoints import OWNER, Handler

WRITING, READING, EXPIRED = "hf_writing", "hf_reading", "hf_expired"


@dataclass
class Commit:
    """One commit: all files of the repository as they were then."""

    title: str
    message: str
    files: dict[str, bytes]
    parent: str | None
    lfs: frozenset[str] = frozenset()
    author: str = OWNER

    @property
    def oid(self) -> str:
        names = "".join(f"{path}:{hashlib.sha1(content).hexdigest()}" for path, content in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent}{self.title}{names}".encode()).hexdigest()


@dataclass
class Repo:
    """A repository: commits, and the branches and pull requests that point at them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, commit: Commit, ref: str = "main") -> str:
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return path to content at a branch, a pull request or a commit."""
        return self.commits[self.find(revision) or ""].files

    def history(self, revision: str) -> list[tuple[str, Commit]]:
        oid, found = self.find(revision), []
        while oid:
            found.append((oid, self.commits[oid]))
            oid = self.commits[oid].parent
        return found


class FakeHub:
    """The Hub; a context manager. Look at `repos` and `requests` when the subprocess has ended."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.authorizations: set[str] = set()
        self.faults: dict[str, Any] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> FakeHub:
        hub = self

        class Here(Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = WRITING) -> dict[str, str]:
        """Return this process's environment, changed so that huggingface_hub talks to this Hub and to no other."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFF"))}
        root = str(Path(__file__).resolve().parents[2])
        ours |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        return ours | ({"HF_TOKEN": token} if token else {})

    def create(self, repo_id: str, repo_type: str = "model", private: bool = True) -> Repo:
        repo = self.repos[repo_type, repo_id] = Repo(private)
        repo.add(Commit("initial commit", "", {".gitattributes": b"*.safetensors filter=lfs\n"}, None))
        return repo

    def commit(self, repo_id: str, files: dict[str, bytes], title: str, author: str, repo_type: str = "model") -> str:
        """Commit as somebody who does not use st_wkl."""
        repo = self.repos[repo_type, repo_id]
        return repo.add(Commit(title, "", {**repo.files(), **files}, repo.refs["main"], author=author))
