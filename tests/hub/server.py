"""A Hub in this process, used over HTTP by the real client: repositories, branches, LFS, commits, downloads.

It checks requests (sha256 and sizes of files, tokens, owners), and fails on demand:

    with LocalHub() as hub:
        hub.fail("PUT /lfs/", 500, times=2)          # or "drop": the connection, in the middle of the request
        hub.fail("GET ", lambda handler: handler.answer(200, b"<html>"))
        HfApi(hub.endpoint, token=hub.token)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "tester", "hf_secretOfTheTests0123456789"
READ_TOKEN = "hf_readOnly0123456789"


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)  # branch and title of every commit sent
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch, files, title=None):
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        if title is not None:
            self.messages.append((branch, title))
        return oid

    def resolve(self, revision):
        named = {**self.tags, **self.branches}
        return named.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision):
        return self.commits[self.resolve(revision)]


class LocalHub:
    token = TOKEN

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[list] = []
        self.lock = threading.RLock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, pattern, how, times=1):
        """Answer the next requests whose `METHOD path` match: with a status, by a function, or by "drop"."""
        self.failures.append([re.compile(pattern), how, times])

    def failure_of(self, request):
        with self.lock:
            for failure in self.failures:
                if failure[0].search(request) and failure[2] > 0:
                    failure[2] -= 1
                    return failure[1]
        return None

    def make(self, repo_id, private=False):
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is written in two pieces
    hub: LocalHub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message="refused"):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        request, length = f"{self.command} {path}", int(self.headers.get("Content-Length") or 0)
        self.hub.requests.append(request)
        failure = self.hub.failure_of(request)
        if failure == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        if callable(failure):
            failure(self)
            return
        if failure is not None:
            self.refuse(failure, message=f"failing with {failure} on demand")
            return
        with self.hub.lock:
            self.route(path)

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def _chunks(self):
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    # ---- Permissions -----------------------------------------------------------------------------------------------

    def user(self):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return {TOKEN: USER, READ_TOKEN: "reader"}.get(given)

    def repo_for(self, repo_id, *, writing):
        """The repository, or None after an answer that says why not."""
        repo, owner, user = self.hub.repos.get(repo_id), repo_id.split("/")[0], self.user()
        if writing and user is None:
            self.refuse(401, message="Invalid username or password.")
        elif repo is None or (repo.private and user != owner):
            self.refuse(404 if user else 401, "RepoNotFound", "Repository not found")
        elif writing and user != owner:
            self.refuse(403, message="You don't have the required permissions")
        else:
            return repo
        return None

    # ---- Actions ---------------------------------------------------------------------------------------------------

    def route(self, path):
        for pattern, act in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                act(self, *found.groups())
                return
        self.refuse(404, message=f"this Hub knows no {self.command} {path}")

    def whoami(self):
        if self.user() is None:
            self.refuse(401)
        else:
            self.answer(200, {"type": "user", "name": self.user(), "orgs": [], "auth": {}})

    def validate_yaml(self):
        self.answer(200, {"errors": [], "warnings": []})

    def create(self):
        asked, user = json.loads(self.body), self.user()
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        if user is None:
            self.refuse(401, message="Invalid username or password.")
        elif owner != user:
            self.refuse(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        elif repo_id in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo_id}"})
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.make(repo_id, private)
            self.answer(200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    def branch(self, repo_id, name):
        if repo := self.repo_for(repo_id, writing=True):
            if name in repo.branches:
                self.answer(409, {"error": "Reference already exists"})
            else:
                start = json.loads(self.body or b"{}").get("startingPoint", "main")
                repo.branches[name] = repo.resolve(start)
                self.answer(200, {})

    def tag(self, repo_id, revision):
        if repo := self.revision(repo_id, revision, writing=True):
            name = json.loads(self.body)["tag"]
            if name in repo.tags:
                self.answer(409, {"error": "Tag reference exists already"})
            else:
                repo.tags[name] = repo.resolve(revision)
                self.answer(200, {})

    def preupload(self, repo_id, revision):
        if self.revision(repo_id, revision, writing=True):
            files = [
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for asked in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": files})

    def lfs_batch(self, repo_id):
        if self.repo_for(repo_id, writing=True):
            objects = json.loads(self.body)["objects"]
            for one in objects:
                if one["oid"] not in self.hub.blobs:
                    href = f"{self.hub.endpoint}/lfs/{one['oid']}/{one['size']}"
                    one["actions"] = {"upload": {"href": href}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid, size):
        if hashlib.sha256(self.body).hexdigest() != oid or len(self.body) != int(size):
            self.refuse(400, message="what was sent is not what was announced")
        else:
            self.hub.blobs[oid] = self.body
            self.answer(200, {})

    def commit(self, repo_id, branch):
        if not (repo := self.revision(repo_id, branch, writing=True)):
            return
        files, title = dict(repo.files(branch)), ""
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                blob = self.hub.blobs.get(value["oid"])
                if blob is None or len(blob) != value["size"]:
                    self.refuse(400, message=f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = blob
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(branch, files, title)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def refs(self, repo_id):
        if repo := self.repo_for(repo_id, writing=False):
            branches, tags = (
                [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in found.items()]
                for kind, found in (("heads", repo.branches), ("tags", repo.tags))
            )
            self.answer(200, {"branches": branches, "converts": [], "tags": tags})

    def tree(self, repo_id, revision):
        if repo := self.revision(repo_id, revision):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in repo.files(revision).items()
            ]
            self.answer(200, entries)

    def info(self, repo_id, revision=None):
        if repo := self.revision(repo_id, revision or "main"):
            siblings = [{"rfilename": path} for path in repo.files(revision or "main")]
            sha = repo.resolve(revision or "main")
            found = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings}
            self.answer(200, {**found, "tags": [], "downloads": 0, "likes": 0})

    def download(self, repo_id, revision, path):
        if repo := self.revision(repo_id, revision):
            content, commit = repo.files(revision).get(path), repo.resolve(revision)
            if content is None:
                self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, content, X_Repo_Commit=commit, ETag=etag, Accept_Ranges="bytes")

    def revision(self, repo_id, revision, *, writing=False):
        repo = self.repo_for(repo_id, writing=writing)
        if repo is not None and repo.resolve(revision) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    ("POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/tag/(.+)", _Handler.tag),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(\w+)/(\d+)", _Handler.lfs_put),
    (rf"GET /api/models/{_REPO}/refs", _Handler.refs),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.download),
]
