"""A small Hub on this machine: what `huggingface_hub` asks of the real one to create, commit, list and download.

Repositories live in memory; a revision is a branch or the id of a commit. All files are sent in the commit itself, as
the real Hub has it for small text files. With a token, private repositories and all writing need it.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parts = [branch, message, str(len(self.commits)), *sorted(files)]
        oid = hashlib.sha1("\0".join(parts).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.repositories` maps `models/user/name`, `datasets/user/name`."""

    def __init__(self, token: str | None = None):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def _serve(self) -> None:
        self.address = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.address.path)
        for (method, pattern), answer in _ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                return answer(self, **match.groupdict())
        self._send_json({"error": "not found"}, 404)

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, content, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def _may(self, private: bool) -> bool:
        """Whether the request may go on; answers it if not."""
        if not private or self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._send_json({"error": "Invalid username or password."}, 401)
        return False

    def _found(self, repo: str, revision: str | None = None):
        """The repository, or `(commit, files)` of one of its revisions; None when an error has been answered."""
        # Models have no prefix in the addresses of their files.
        found = self.hub.repositories.get(repo) or self.hub.repositories.get(f"models/{repo}")
        if found is None:
            self._send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif self._may(found.private or self.command == "POST" and "paths-info" not in self.address.path):
            if revision is None:
                return found
            if (at := found.at(revision)) is not None:
                return at
            self._send_json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        return None

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        repo = f"{wanted.get('type', 'model')}s/{name}"
        if not self._may(True):
            return
        url = f"{self.hub.url}/{repo.removeprefix('models/')}"
        if repo in self.hub.repositories:
            return self._send_json({"error": "You already created this repo", "url": url}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"  # by the client's version
        made = self.hub.repositories[repo] = Repository(private)
        made.commit("main", {}, "initial commit")
        self._send_json({"url": url, "id": name})

    def branch(self, repo: str, revision: str) -> None:
        if (found := self._found(repo)) is None:
            return
        if revision in found.branches:
            return self._send_json({"error": "Reference already exists"}, 409)
        found.branches[revision] = found.branches["main"]
        self._send_json({})

    def preupload(self, repo: str, revision: str) -> None:
        if self._found(repo, revision):
            files = [file["path"] for file in json.loads(self.body)["files"]]
            self._send_json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
            )

    def commit(self, repo: str, revision: str) -> None:
        if (at := self._found(repo, revision)) is None:
            return
        files, message = dict(at[1]), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = self.hub.repositories[repo].commit(revision, files, message)
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, repo: str, revision: str = "main") -> None:
        if (at := self._found(repo, revision)) is not None:
            private = self.hub.repositories[repo].private
            siblings = [{"rfilename": path} for path in at[1]]
            name = repo.partition("/")[2]
            self._send_json(
                {"_id": name, "id": name, "sha": at[0], "private": private, "siblings": siblings, "tags": []}
            )

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        if (at := self._found(repo, revision)) is not None:
            recursive = parse_qs(self.address.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
            inside = {path: content for path, content in at[1].items() if path.startswith(prefix)}
            if not inside and prefix:
                return self._send_json({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            entries = [_entry(path, content) for path, content in inside.items()]
            if not recursive:
                entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
                folders = {
                    path.removeprefix(prefix).partition("/")[0] for path in inside if "/" in path[len(prefix) :]
                }
                entries += [
                    {"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in folders
                ]
            self._send_json(entries)

    def paths_info(self, repo: str, revision: str) -> None:
        if (at := self._found(repo, revision)) is not None:
            if self.headers.get("Content-Type", "").startswith("application/json"):
                paths = json.loads(self.body)["paths"]
            else:
                paths = parse_qs(self.body.decode())["paths"]
            self._send_json([_entry(path, at[1][path]) for path in paths if path in at[1]])

    def file(self, repo: str, revision: str, path: str) -> None:
        if (at := self._found(repo, revision)) is None:
            return
        if path not in at[1]:
            return self._send_json(
                {"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=at[0]
            )
        content = at[1][path]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{_entry(path, content)["oid"]}"', "X_Repo_Commit": at[0], "Accept_Ranges": "bytes"}
        if wanted is None:
            return self._send(content, **headers)
        part = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        of = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
        self._send(part, 206, Content_Range=of, **headers)

    def valid(self) -> None:
        self._send_json({"errors": [], "warnings": []})


def _entry(path: str, content: bytes) -> dict:
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }


_REPO = r"/api/(?P<repo>(?:models|datasets|spaces)/[^/]+/[^/]+)"
_ROUTES = {
    ("POST", "/api/repos/create"): _Handler.create,
    ("POST", "/api/validate-yaml"): _Handler.valid,
    ("POST", rf"{_REPO}/branch/(?P<revision>[^/]+)"): _Handler.branch,
    ("POST", rf"{_REPO}/preupload/(?P<revision>[^/]+)"): _Handler.preupload,
    ("POST", rf"{_REPO}/commit/(?P<revision>[^/]+)"): _Handler.commit,
    ("POST", rf"{_REPO}/paths-info/(?P<revision>[^/]+)"): _Handler.paths_info,
    ("GET", _REPO): _Handler.info,
    ("GET", rf"{_REPO}/revision/(?P<revision>[^/]+)"): _Handler.info,
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?"): lambda self, folder, **found: self.tree(
        folder=folder or "", **found
    ),
    ("GET", r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): _Handler.file,
}
