"""A Hugging Face Hub on the loopback interface, for tests, in memory: what huggingface_hub asks of model repositories,
and what datasets and HfFileSystem ask of data set repositories, which go by the name datasets/owner/name here, as
Spaces do by spaces/owner/name.

Spoken: whoami, creating a repository, access checks, information, branches, tags, history, file listings, downloads
(HEAD, GET, byte ranges) and uploads: validation of the model card, the choice between a regular file and LFS, LFS
with the "basic" transfer, and commits. As on the Hub, a new repository has one commit with .gitattributes, weights
and pictures are LFS files, an unchanged file is told by its id, and errors are named by the header X-Error-Code.

Not spoken: Xet (clients run with HF_HUB_DISABLE_XET=1, see `HubServer.environment`), redirects to other hosts,
listings of more than a page, deleting folders, pull requests, multipart LFS.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".parquet")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository. `readers` are the users whose request for access to a gated one was granted."""

    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # oldest commit first
    tags: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a sha."""
        commits = {commit.sha: commit for branch in self.branches.values() for commit in branch}
        named = {name: branch[-1] for name, branch in self.branches.items()}
        try:
            return (commits | self.tags | named)[revision]
        except KeyError:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None

    def commit(self, title: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Add a commit that leaves a branch with exactly these files."""
        history = self.branches.setdefault(branch, [])
        parent = history[-1].sha if history else ""
        content = [parent, title, *(f"{path} {file_id(path, data)}" for path, data in sorted(files.items()))]
        history.append(Commit(hashlib.sha1("\n".join(content).encode()).hexdigest(), title, files))
        return history[-1]


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "", **body):
        self.status, self.code, self.message, self.body = status, code, message, {"error": message} | body


def without_kind(repo_id: str) -> str:
    return repo_id.removeprefix("datasets/").removeprefix("spaces/")


def owner(repo_id: str) -> str:
    return without_kind(repo_id).split("/")[0]


def file_id(path: str, content: bytes) -> str:
    """What the Hub knows a file by: the sha256 of an LFS file, git's blob id of any other."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The Hub; `with HubServer({token: user}) as hub` serves it at `hub.url`.

    A user may write to the repositories `user/...`, and read what is public, their own, or granted to them.
    `requests` lists all requests so far, each "METHOD /path".
    """

    def __init__(self, users: dict[str, str]):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._failures: list[list] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home, token: str = "") -> dict[str, str]:
        """The environment variables of a client; huggingface_hub reads them when it is imported.

        Args:
            home: folder for the client's cache and settings, so that it finds nothing of the machine's user.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_MODULES_CACHE": f"{home}/modules",
            "HF_TOKEN": token,
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_TOKEN_PATH": f"{home}/token",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def create(self, repo_id: str, **settings) -> Repo:
        repo = self.repos[repo_id] = Repo(**settings)
        files = {".gitattributes": GITATTRIBUTES}
        if repo_id.startswith("spaces/"):
            files["README.md"] = b"---\ntitle: As the Hub names it\nsdk: gradio\n---\n"
        repo.commit("initial commit", files)
        return repo

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """The history of a branch, oldest first."""
        return list(self.repos[repo_id].branches[branch])

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo_id].find(revision).files)

    def fail(self, pattern: str, status: int | str | None, times: int = 1, after: int = 0) -> None:
        """Let the next requests "METHOD /path" that match a regular expression fail.

        Args:
            status: of the answers; None cuts the connection without one; "cut" cuts it in the middle of the answer;
                "stall" stops there, with the connection open.
            after: how many matching requests succeed before.
        """
        self._failures.append([re.compile(pattern), status, times, after])

    def heal(self) -> None:
        """No request fails any more."""
        self._failures.clear()

    def _fault(self, method: str, target: str) -> tuple:
        """The status that `fail` prescribes for a request, if any."""
        self.requests.append(f"{method} {unquote(urlsplit(target).path)}")
        for failure in self._failures:
            pattern, status, times, after = failure
            if times and pattern.search(self.requests[-1]):
                failure[3 if after else 2] -= 1
                if not after:
                    return (status,)
        return ()

    def _answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict, bytes]:
        """Status, headers and body of the answer to a request."""
        url = urlsplit(target)
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            if token and token not in self.users:
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            request = _Request(self, self.users.get(token), headers, body, parse_qs(url.query))
            for allowed, pattern, answer in _ROUTES:
                # The parts of a path are matched quoted: a branch name may hold a slash.
                if method in allowed and (match := re.fullmatch(pattern, url.path)):
                    answer = answer(request, **{name: unquote(part or "") for name, part in match.groupdict().items()})
                    return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
            raise Refusal(501, "", f"tests/hub_server.py does not speak {self.requests[-1]}")
        except Refusal as refusal:
            named = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            extra = refusal.body.pop("headers", {})
            return refusal.status, {k: v for k, v in (named | extra).items() if v}, json.dumps(refusal.body).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece
    hub: HubServer

    def handle_any(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub._lock:
            fault = self.hub._fault(self.command, self.path)
            if fault == (None,):
                self.close_connection = True
                return
            if fault and isinstance(fault[0], int):
                status, headers, content = fault[0], {"Content-Type": "text/plain"}, b"injected failure"
            else:
                status, headers, content = self.hub._answer(self.command, self.path, self.headers, body)
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if fault in (("cut",), ("stall",)):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == ("stall",):
                self.rfile.read(1)  # until the client hangs up
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args):
        pass


@dataclass
class _Request:
    """One request; its methods are the answers: JSON, or status, headers and body."""

    hub: HubServer
    user: str | None
    headers: dict
    body: bytes
    query: dict

    def readable(self, repo_id: str) -> Repo:
        """The repository, where the user may know of it."""
        repo = self.hub.repos.get(repo_id)
        if repo and (not repo.private or self.user == owner(repo_id)):
            return repo
        if self.user is None:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        raise Refusal(404, "RepoNotFound", "Repository not found")

    def writable(self, repo_id: str) -> Repo:
        repo = self.readable(repo_id)
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if self.user != owner(repo_id):
            raise Refusal(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def open_to_user(self, repo_id: str) -> Repo:
        """The repository, where the user may have its files."""
        repo = self.readable(repo_id)
        if repo.gated and self.user not in repo.readers | {owner(repo_id)}:
            name = repo_id.replace("datasets/", "dataset ") if "datasets/" in repo_id else f"model {repo_id}"
            message = f"Access to {name} is restricted and you are not in the authorized list."
            raise Refusal(403 if self.user else 401, "GatedRepo", message)
        return repo

    # ---- accounts and repositories ----

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    def create_repo(self):
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.user
        kind = asked.get("type", "model")
        repo_id = f"{'spaces/' if kind == 'space' else ''}{namespace}/{asked['name']}"
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if namespace != self.user:
            raise Refusal(403, "", f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        if kind == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "", 'Invalid input: "sdk" is required for a Space')
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refusal(409, "", f"You already created this {kind} repo", url=url)
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        return {"url": url, "name": f"{namespace}/{asked['name']}"}

    def auth_check(self, repo_id, write):
        (self.writable if write else self.open_to_user)(repo_id)
        return {}

    def info(self, repo_id, revision=""):
        repo = self.readable(repo_id)
        commit = repo.find(revision or "main")
        return {
            "id": without_kind(repo_id),
            "sha": commit.sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            "lastModified": DATE,
            "tags": [],
        }

    def refs(self, repo_id):
        repo = self.readable(repo_id)
        heads = {name: branch[-1] for name, branch in repo.branches.items()}
        return {
            kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": c.sha} for name, c in commits.items()]
            for kind, ref, commits in (("branches", "heads", heads), ("tags", "tags", repo.tags), ("converts", "", {}))
        }

    def history(self, repo_id, revision):
        repo = self.readable(repo_id)
        branch = next(branch for branch in repo.branches.values() if repo.find(revision) in branch)
        commits = branch[: branch.index(repo.find(revision)) + 1][::-1]
        return [{"id": c.sha, "title": c.title, "message": "", "authors": [], "date": DATE} for c in commits]

    def create_branch(self, repo_id, revision):
        repo = self.writable(repo_id)
        if revision in repo.branches:
            raise Refusal(409, "", f"Reference already exists: refs/heads/{revision}")
        start = repo.find(json.loads(self.body or b"{}").get("startingPoint", "main"))
        origin = next(branch for branch in repo.branches.values() if start in branch)
        repo.branches[revision] = origin[: origin.index(start) + 1]
        return {}

    def create_tag(self, repo_id, revision):
        repo, tag = self.writable(repo_id), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, "", f"Tag already exists: {tag}")
        repo.tags[tag] = repo.find(revision)
        return {}

    # ---- files ----

    def describe(self, path: str, content: bytes) -> dict:
        """A file as the listings show it."""
        described = {"type": "file", "path": path, "size": len(content), "oid": file_id(path, content)}
        if path.endswith(LFS_SUFFIXES):
            described["lfs"] = {"oid": described["oid"], "size": len(content), "pointerSize": 134}
        return described

    def tree(self, repo_id, revision, path=""):
        files = self.readable(repo_id).find(revision).files
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        inside = {name: content for name, content in files.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        if self.query.get("recursive", [""])[0].lower() == "true":
            return [self.describe(name, content) for name, content in sorted(inside.items())]
        direct = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside}
        folder = {"type": "directory", "size": 0, "oid": file_id("", b"")}
        return [
            self.describe(name, files[name]) if name in files else folder | {"path": name} for name in sorted(direct)
        ]

    def paths_info(self, repo_id, revision):
        files = self.readable(repo_id).find(revision).files
        paths = parse_qs(self.body.decode())["paths"]
        return [self.describe(path, files[path]) for path in paths if path in files]

    def resolve(self, repo_id, revision, path):
        commit = self.open_to_user(repo_id).find(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found", headers={"X-Repo-Commit": commit.sha})
        content = commit.files[path]
        headers["ETag"] = f'"{file_id(path, content)}"'
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            if start > end:
                raise Refusal(416, "", "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, headers, content[start : end + 1]
        return 200, headers, content

    # ---- uploads ----

    def validate_yaml(self):
        """Whether a model card begins with metadata; of YAML itself, only that its lines are `key: value`."""
        card = json.loads(self.body)["content"].splitlines()
        if card[:1] != ["---"] or "---" not in card[1:]:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        metadata = card[1 : card.index("---", 1)]
        if wrong := [line for line in metadata if not re.match(r"#|\s|- |[\w-]+:|$", line)]:
            raise Refusal(400, "", "Invalid YAML", errors=[{"message": f"not metadata: {line}"} for line in wrong])
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id, revision):
        files = self.writable(repo_id).find(revision).files
        answer = []
        for name in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            answer.append({"path": name, "uploadMode": mode, "shouldIgnore": False})
            if name in files:
                answer[-1]["oid"] = file_id(name, files[name])
        return {"files": answer}

    def lfs_batch(self, repo_id):
        self.writable(repo_id)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.lfs_objects:
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the sha256 of the content is another")
        self.hub.lfs_objects[oid] = self.body
        return {}

    def lfs_verify(self, repo_id):
        self.writable(repo_id)
        asked = json.loads(self.body)
        if len(self.hub.lfs_objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "", "LFS object not found")
        return {}

    def commit(self, repo_id, revision):
        repo = self.writable(repo_id)
        if revision not in repo.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head = repo.find(revision)
        files = dict(head.files)
        header, *changes = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        for kind, value in ((change["key"], change["value"]) for change in changes):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise Refusal(400, "", f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif kind == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise Refusal(501, "", f"tests/hub_server.py does not speak {kind}")
        sha = repo.commit(header["value"]["summary"], files, revision).sha
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}


_REPO = r"(?P<repo_id>(?:datasets/|spaces/)?[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>[^/]+)"
_API = rf"/api/(?:models/|(?=datasets/|spaces/)){_REPO}"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Request.whoami),
    ("POST", r"/api/repos/create", _Request.create_repo),
    ("POST", r"/api/validate-yaml", _Request.validate_yaml),
    ("GET", rf"{_API}/auth-check(?P<write>/write)?", _Request.auth_check),
    ("GET", rf"{_API}/refs", _Request.refs),
    ("GET", rf"{_API}/commits/{_REVISION}", _Request.history),
    ("GET", rf"{_API}/tree/{_REVISION}(?P<path>/.+)?", _Request.tree),
    ("GET", rf"{_API}/revision/{_REVISION}", _Request.info),
    ("GET", _API, _Request.info),
    ("POST", rf"{_API}/paths-info/{_REVISION}", _Request.paths_info),
    ("POST", rf"{_API}/branch/{_REVISION}", _Request.create_branch),
    ("POST", rf"{_API}/tag/{_REVISION}", _Request.create_tag),
    ("POST", rf"{_API}/preupload/{_REVISION}", _Request.preupload),
    ("POST", rf"{_API}/commit/{_REVISION}", _Request.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Request.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _Request.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Request.lfs_upload),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Request.resolve),
]
