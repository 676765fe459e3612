"""A small Hub on this machine: what `huggingface_hub` asks of the real one to create, upload, list and download.

Repositories live in memory; a revision is a branch, `refs/pr/N` or the id of a commit. Small text comes in the commit
itself, everything else is uploaded first by the LFS protocol (https://github.com/git-lfs/git-lfs/blob/main/docs/api,
with the Hub's own multipart) and served from another host by a redirect. With a token, private repositories and all
writing need it. Of Xet, the Hub's other way to upload, it knows nothing: set HF_HUB_DISABLE_XET=1, since 2.x does not
fall back.

`hub.fail("PUT /storage/", status=500, times=2)` makes the next two requests that match fail; `hub.requests` has all
that came.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


TOKEN = "hf_of_the_tests"


class LargeFile(bytes):
    """Content of a file that went through LFS."""


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)  # pull requests too, as `refs/pr/N`
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parts = [branch, message, str(len(self.commits)), *sorted(files)]
        oid = hashlib.sha1("\0".join(parts).encode()).hexdigest()
        self.commits[oid], self.branches[branch], self.messages[oid] = files, oid, message
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Fault:
    """What happens to requests that match: an error `status`, a connection `cut` in the middle of a body, or one byte
    of the body `flipped`, the request's if it has one and else the answer's."""

    request: str
    status: int | None = None
    message: str = "fault of the test"
    retry_after: int | None = None
    cut: bool = False
    flipped: bool = False
    times: int = 1


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.repositories` maps `models/user/name`, `datasets/user/name`.

    Args:
        large: bytes from which on text, too, goes through LFS.
        part: bytes of a part, from which on an upload comes in several.
        page: entries of a page of a listing.
    """

    user = "ann"

    def __init__(self, token: str | None = None, large: int = 10_000_000, part: int = 10_000_000, page: int = 1000):
        self.token, self.large, self.part, self.page = token, large, part, page
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # SHA-256 -> content, and `SHA-256/part` while parts come in
        self.requests: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Clients follow a redirect to the same host as if it were the Hub's own, and miss the headers of a CDN's.
        self.cdn = f"http://localhost:{self._server.server_port}/storage"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, request: str, **fault) -> None:
        """The next requests whose `METHOD /path` the pattern is found in fail; see `Fault`."""
        self._faults.append(Fault(request, **fault))

    def fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _serve(self) -> None:
        self.address = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(self.address.query).items()}
        self.fault = self.hub.fault_of(f"{self.command} {unquote(self.address.path)}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.cut and length:
            self.rfile.read(length // 2)
            return self._hang_up()
        self.body = self.rfile.read(length)
        if self.fault and self.fault.flipped and self.body:
            self.body = _flip(self.body)
            self.fault = None
        if self.fault and self.fault.status:
            after = {} if self.fault.retry_after is None else {"Retry_After": str(self.fault.retry_after)}
            return self._send_json({"error": self.fault.message}, self.fault.status, **after)
        for (method, pattern), answer in _ROUTES.items():
            match = re.fullmatch(pattern, self.address.path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                return answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        self._send_json({"error": "not found"}, 404)

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._hang_up()
        self.wfile.write(_flip(content) if self.fault and self.fault.flipped else content)

    def _send_json(self, content, status: int = 200, **headers: str) -> None:
        headers["X_Error_Message"] = content["error"] if status >= 400 and "error" in content else ""
        headers = {name: value for name, value in headers.items() if value}
        self._send(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def _may(self, private: bool) -> bool:
        """Whether the request may go on; answers it if not."""
        if not private or self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._send_json({"error": "Invalid username or password."}, 401)
        return False

    def _found(self, repo: str, revision: str | None = None, writes: bool = False):
        """The repository, or `(commit, files)` of one of its revisions; None when an error has been answered."""
        # Models have no prefix in the addresses of their files.
        found = self.hub.repositories.get(repo) or self.hub.repositories.get(f"models/{repo}")
        if found is None:
            self._send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif self._may(found.private or writes):
            if revision is None:
                return found
            if (at := found.at(revision)) is not None:
                return at
            self._send_json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        return None

    # --- repositories and branches ---

    def whoami(self) -> None:
        if self._may(True):
            self._send_json({"type": "user", "name": self.hub.user, "orgs": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        repo = f"{wanted.get('type', 'model')}s/{name}"
        if not self._may(True):
            return
        url = f"{self.hub.url}/{repo.removeprefix('models/')}"
        if repo in self.hub.repositories:
            return self._send_json({"error": "You already created this repo", "url": url}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"  # by the client's version
        made = self.hub.repositories[repo] = Repository(private)
        made.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )
        self._send_json({"url": url, "id": name})

    def delete(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if self._found(repo, writes=True):
            del self.hub.repositories[repo]
            self._send_json({})

    def branch(self, repo: str, revision: str) -> None:
        if (found := self._found(repo, writes=True)) is None:
            return
        if revision.startswith("refs/"):  # a pull request's, which is made with it
            return self._send_json({"error": "Invalid reference for a branch"}, 400)
        if revision in found.branches:
            return self._send_json({"error": "Reference already exists"}, 409)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[revision] = found.at(start)[0]
        self._send_json({})

    def delete_branch(self, repo: str, revision: str) -> None:
        if (found := self._found(repo, writes=True)) is not None:
            del found.branches[revision]
            self._send_json({})

    # --- upload ---

    def validate(self) -> None:
        """The card's metadata; the real Hub looks at more of them."""
        _, _, rest = json.loads(self.body)["content"].partition("---\n")
        metadata, errors = yaml.safe_load(rest.partition("\n---")[0]) or {}, []
        for name in ("license", "pipeline_tag", "library_name"):
            if not isinstance(metadata.get(name, ""), str):
                errors.append({"message": f'"{name}" must be a string'})
        self._send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        if (at := self._found(repo, revision, writes=True)) is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] >= self.hub.large or not _is_text(base64.b64decode(file["sample"]))
            entry = _entry(file["path"], at[1][file["path"]]) if file["path"] in at[1] else {}
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": entry.get("lfs", entry).get("oid"),
                }
            )
        self._send_json({"files": answers})

    def batch(self, repo: str) -> None:
        """Where to upload what, of https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md."""
        if self._found(repo, writes=True) is None:
            return
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answers.append({"oid": oid, "size": size})
            if oid in self.hub.stored:
                continue  # no actions: it is there
            upload = {"href": f"{self.hub.cdn}/{oid}"}
            if size > self.hub.part:
                parts = range(1, -(-size // self.hub.part) + 1)
                upload = {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(self.hub.part)}}
                upload["header"] |= {f"{number:05}": f"{self.hub.cdn}/{oid}/{number}" for number in parts}
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
            answers[-1]["actions"] = {"upload": upload, "verify": verify}
        self._send_json({"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> None:
        found = hashlib.sha256(self.body).hexdigest()
        if found != oid:
            return self._send_json({"error": f"BadDigest: the content has SHA-256 {found}, not {oid}"}, 400)
        self.hub.stored[oid] = self.body
        self._send(b"")

    def store_part(self, oid: str, number: str) -> None:
        self.hub.stored[f"{oid}/{number}"] = self.body
        self._send(b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(self.hub.stored.pop(f"{oid}/{number}") for number in numbers)
        self.store(oid)

    def verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        if self._found(repo, writes=True):
            there = len(self.hub.stored.get(wanted["oid"], b"")) == wanted["size"]
            self._send_json({} if there else {"error": "the object is not there"}, 200 if there else 404)

    def commit(self, repo: str, revision: str) -> None:
        if (at := self._found(repo, revision, writes=True)) is None:
            return
        files, message = dict(at[1]), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", at[0]) != at[0]:
                    return self._send_json({"error": "A commit has happened since."}, 412)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    error = f"LFS pointer pointed to a file that does not exist: {value['path']}"
                    return self._send_json({"error": error}, 400)
                files[value["path"]] = LargeFile(self.hub.stored[value["oid"]])
            else:  # deletedFile, deletedFolder
                gone = [
                    path for path in files if path == value["path"] or path.startswith(value["path"].rstrip("/") + "/")
                ]
                for path in gone:
                    del files[path]
        found, pull_request = self.hub.repositories[repo], {}
        if "create_pr" in self.query:
            number = sum(branch.startswith("refs/pr/") for branch in found.branches) + 1
            revision = f"refs/pr/{number}"
            page = f"{self.hub.url}/{repo.removeprefix('models/')}/discussions/{number}"
            pull_request = {"pullRequestUrl": page}
        oid = found.commit(revision, files, message)
        url = f"{self.hub.url}/{repo.removeprefix('models/')}/commit/{oid}"
        self._send_json({"success": True, "commitOid": oid, "commitUrl": url, **pull_request})

    # --- listing and download ---

    def info(self, repo: str, revision: str = "main") -> None:
        if (at := self._found(repo, revision)) is not None:
            private = self.hub.repositories[repo].private
            siblings = [{"rfilename": path} for path in at[1]]
            name = repo.partition("/")[2]
            self._send_json(
                {"_id": name, "id": name, "sha": at[0], "private": private, "siblings": siblings, "tags": []}
            )

    def tree(self, repo: str, revision: str, folder: str) -> None:
        if (at := self._found(repo, revision)) is None:
            return
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: content for path, content in at[1].items() if path.startswith(prefix)}
        if not inside and prefix:
            return self._send_json({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        entries = [_entry(path, content) for path, content in inside.items()]
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
            folders = {path.removeprefix(prefix).partition("/")[0] for path in inside if "/" in path[len(prefix) :]}
            entries += [{"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in folders]
        begin = int(self.query.get("cursor", 0))
        end = begin + int(self.query.get("limit", self.hub.page))
        query = "&".join(f"{name}={quote(value)}" for name, value in {**self.query, "cursor": str(end)}.items())
        following = f'<{self.hub.url}{self.address.path}?{query}>; rel="next"' if end < len(entries) else ""
        self._send_json(entries[begin:end], Link=following)

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
        entry = _entry(path, at[1][path])
        etag = f'"{entry.get("lfs", entry)["oid"]}"'
        if "lfs" not in entry:
            return self._send_range(at[1][path], ETag=etag, X_Repo_Commit=at[0])
        self._send(
            b"",
            302,
            Location=f"{self.hub.cdn}/{entry['lfs']['oid']}",
            X_Repo_Commit=at[0],
            X_Linked_Etag=etag,
            X_Linked_Size=str(entry["size"]),
        )

    def stored(self, oid: str) -> None:
        self._send_range(self.hub.stored[oid], ETag=f'"{oid}"')

    def _send_range(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(content, Accept_Ranges="bytes", **headers)
        part = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        of = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
        self._send(part, 206, Content_Range=of, Accept_Ranges="bytes", **headers)


def _is_text(sample: bytes) -> bool:
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(sample) - 3  # a character that the sample's end cuts
    return b"\0" not in sample


def _flip(content: bytes) -> bytes:
    """The last byte is another."""
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content


def _entry(path: str, content: bytes) -> dict:
    """As git and git-lfs name a file: by SHA-1 of its blob, which for a large one is a pointer with a SHA-256."""
    lfs, blob = {}, content
    if isinstance(content, LargeFile):
        oid = hashlib.sha256(content).hexdigest()
        blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": len(blob)}}
    sha1 = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": sha1, **lfs}


_REPO = r"/api/(?P<repo>(?:models|datasets|spaces)/[^/]+/[^/]+)"
_PAGE = r"/(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)"
_ROUTES = {
    ("GET", "/api/whoami-v2"): _Handler.whoami,
    ("POST", "/api/repos/create"): _Handler.create,
    ("DELETE", "/api/repos/delete"): _Handler.delete,
    ("POST", "/api/validate-yaml"): _Handler.validate,
    ("POST", rf"{_REPO}/branch/(?P<revision>[^/]+)"): _Handler.branch,
    ("DELETE", rf"{_REPO}/branch/(?P<revision>[^/]+)"): _Handler.delete_branch,
    ("POST", rf"{_REPO}/preupload/(?P<revision>[^/]+)"): _Handler.preupload,
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch"): _Handler.batch,
    ("PUT", r"/storage/(?P<oid>\w+)"): _Handler.store,
    ("PUT", r"/storage/(?P<oid>\w+)/(?P<number>\d+)"): _Handler.store_part,
    ("POST", r"/complete/(?P<oid>\w+)"): _Handler.complete,
    ("POST", rf"{_PAGE}\.git/info/lfs/verify"): _Handler.verify,
    ("POST", rf"{_REPO}/commit/(?P<revision>[^/]+)"): _Handler.commit,
    ("POST", rf"{_REPO}/paths-info/(?P<revision>[^/]+)"): _Handler.paths_info,
    ("GET", _REPO): _Handler.info,
    ("GET", rf"{_REPO}/revision/(?P<revision>[^/]+)"): _Handler.info,
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?"): _Handler.tree,
    ("GET", rf"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): _Handler.file,
    ("GET", r"/storage/(?P<oid>\w+)"): _Handler.stored,
}
