"""A small Hugging Face hub on 127.0.0.1, so that tests run the real huggingface_hub client without a network.

As a context manager, with the client of this process pointed at it (pytest's `monkeypatch` undoes that):

    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")           # HF_ENDPOINT, the cache and no proxy, in this process
        commit = hub.add("org/model", folder)              # a repository with the files of a folder, revision "main"
        hub.add("org/model", other_folder, "v2")           # another revision of it
        Checkpoint("org/model@v2")
        assert hub.fetched("org/model") == ["config.json", "model.safetensors"]

For a subprocess: `subprocess.run([...], env=hub.env(tmp_path / "cache"))`.

It knows model info, file trees, `paths-info`, HEAD and GET of files with ETag, X-Repo-Commit, Content-Length and Range,
and uploads: `create_repo`, `upload_file`, `upload_folder` and `create_commit` work, every file in one piece; what was
uploaded is in `hub.files("org/model")`. It asks for no token.

    hub.requests                                            every request so far: (method, path, range or None)
    hub.fetched("org/model")                                files of it that were downloaded whole, in order
    hub.peeked("org/model")                                 files of it of which a range was read
    hub.forget()                                            start counting anew
    hub.fail("resolve/.*/model", status=401, code="GatedRepo")     requests whose path matches are answered like this
    hub.cut("model-00002", size=100)                        downloads of matching files end after 100 bytes
    hub.stall("model-00002")                                whole downloads of matching files begin at hub.heal()
    hub.heal()                                              no more faults
    hub.stop()                                              from now on: connection refused
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants, hf_api

# How the real hub answers, in X-Error-Code.
NO_REPOSITORY, NO_REVISION, NO_FILE = (404, "RepoNotFound"), (404, "RevisionNotFound"), (404, "EntryNotFound")


class Hub:
    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.refs: dict[str, dict[str, str]] = {}  # repository -> branch or tag -> commit
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: list[tuple[str, int, str]] = []
        self.cuts: list[tuple[str, int]] = []
        self.stalls: list[str] = []
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        huggingface_hub.close_session()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
            huggingface_hub.close_session()  # its open connections would still be answered

    def use(self, monkeypatch, cache: Path) -> None:
        """Point huggingface_hub in this process here. It has read its environment when it was imported."""
        huggingface_hub.close_session()
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # whose methods the functions of huggingface_hub are

    def env(self, cache: Path) -> dict[str, str]:
        """Environment of a subprocess whose huggingface_hub comes here."""
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return {**{k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}, **settings}

    def add(self, repository: str, files: Path | dict[str, bytes], revision: str = "main") -> str:
        """Publish the files of a folder, or of a dictionary of contents, as a revision. Returns its commit."""
        if not isinstance(files, dict):
            folder = Path(files)
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        digest = hashlib.sha1(repository.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha256(content).digest())
        self.commits.setdefault(repository, {})[digest.hexdigest()] = dict(files)
        self.refs.setdefault(repository, {})[revision] = digest.hexdigest()
        return digest.hexdigest()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a revision."""
        return self.commits[repository][self.refs[repository].get(revision, revision)]

    def fetched(self, repository: str) -> list[str]:
        return self._read(repository, whole=True)

    def peeked(self, repository: str) -> list[str]:
        return self._read(repository, whole=False)

    def _read(self, repository: str, whole: bool) -> list[str]:
        pattern = re.compile(rf"/{re.escape(repository)}/resolve/[^/]+/(.+)")
        found = ((pattern.fullmatch(path), range) for method, path, range in self.requests if method == "GET")
        return [match[1] for match, range in found if match and (range is None) == whole]

    def forget(self) -> None:
        self.requests.clear()

    def fail(self, pattern: str, status: int = 404, code: str = "") -> None:
        self.faults.append((pattern, status, code))

    def cut(self, pattern: str, size: int) -> None:
        self.cuts.append((pattern, size))

    def stall(self, pattern: str) -> None:
        self.stalls.append(pattern)

    def heal(self) -> None:
        self.faults.clear()
        self.cuts.clear()
        self.stalls.clear()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A client may hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        for pattern, status, code in self.hub.faults:
            if re.search(pattern, path):
                return self.error(status, code)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.json({"type": "user", "name": "someone", "orgs": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+))?(?:/(.*))?", path):
            return self.api(match[1], match[2] or "revision", match[3] or "main", match[4] or "", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        return self.error(404, "")

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a revision, or None when an error was answered."""
        if repository not in self.hub.refs:
            return self.error(*NO_REPOSITORY)
        commit = self.hub.refs[repository].get(revision, revision)
        return commit if commit in self.hub.commits[repository] else self.error(*NO_REVISION)

    def api(self, repository: str, verb: str, revision: str, folder: str, body: bytes) -> None:
        if verb == "branch" and repository in self.hub.refs:
            self.hub.refs[repository].setdefault(revision, self.hub.refs[repository]["main"])
            return self.json({})
        commit = self.commit(repository, revision)
        if commit is None:
            return
        files = self.hub.commits[repository][commit]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.json({"id": repository, "sha": commit, "siblings": siblings, "tags": [], "private": False})
        elif verb == "tree":
            inside = {path: content for path, content in files.items() if path.startswith(folder)}
            self.json([_describe(path, content) for path, content in inside.items()])
        elif verb == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            self.json([_describe(path, content) for path, content in files.items() if path in asked])
        elif verb == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            self.json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]})
        elif verb == "commit":
            files = dict(files)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            commit = self.hub.add(repository, files, revision)
            url = f"{self.hub.url}/{repository}/commit/{commit}"
            self.json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            self.error(404, "")

    def create(self, wanted: dict) -> None:
        repository = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        exists = repository in self.hub.refs
        if not exists:
            self.hub.add(repository, {".gitattributes": b""})
        url = f"{self.hub.url}/{repository}"
        self.json({"url": url, "id": repository, "name": repository}, status=409 if exists else 200)

    def file(self, repository: str, revision: str, path: str) -> None:
        commit = self.commit(repository, revision)
        if commit is None:
            return
        content = self.hub.commits[repository][commit].get(path)
        if content is None:
            return self.error(*NO_FILE, commit)
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        if self.command == "GET":
            while "Range" not in self.headers and any(re.search(pattern, path) for pattern in self.hub.stalls):
                time.sleep(0.05)
            for pattern, size in self.hub.cuts:
                content = content[:size] if re.search(pattern, path) else content
        self.send(status, content, headers)

    def json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": f"{code} (of the test's hub)", "X-Repo-Commit": commit}
        self.send(status, b"", {name: value for name, value in headers.items() if value})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _describe(path: str, content: bytes) -> dict:
    """A file as the tree and paths-info of the hub list it; weights are stored by their sha256, as in git-lfs."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
