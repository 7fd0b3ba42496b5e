"""A local server that implements the hub's download and upload protocols for folders on disk."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler_for(repositories: dict[str, Path], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            requests.append(path)
            if path == "api/whoami-v2":
                return self.answer(200, b'{"type": "user", "name": "me"}', Content_Type="application/json")
            for repo_id, folder in repositories.items():
                files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
                if path.startswith(f"api/models/{repo_id}/tree/"):
                    tree = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in files]
                    return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                if path in (f"api/models/{repo_id}", f"api/models/{repo_id}/revision/main"):
                    siblings = [{"rfilename": name} for name in files]
                    info = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings, "tags": []}
                    info |= {"private": False, "downloads": 0, "likes": 0, "pipeline_tag": "text-to-image"}
                    return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
                if path.startswith(f"{repo_id}/resolve/"):
                    name = path.removeprefix(f"{repo_id}/resolve/").split("/", 1)[1]
                    if name not in files:
                        return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                    body = (folder / name).read_bytes()
                    etag = '"' + hashlib.sha256(body).hexdigest() + '"'
                    return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="none")
            return self.answer(404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self):
            path, host = self.path.split("?")[0].strip("/"), f"http://{self.headers['Host']}"
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            requests.append(path)

            def reply(**content: object) -> None:
                self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

            if path == "api/repos/create":
                repository = json.loads(body)
                repo_id = f"{repository.get('organization') or 'me'}/{repository['name']}"
                return reply(url=f"{host}/{repo_id}", id=repo_id, name=repo_id)
            if path == "api/validate-yaml":
                return reply(errors=[], warnings=[])
            for repo_id, folder in repositories.items():
                if path == f"api/models/{repo_id}/preupload/main":
                    files = [file["path"] for file in json.loads(body)["files"]]
                    return reply(files=[dict(path=p, uploadMode="regular", shouldIgnore=False) for p in files])
                if path == f"api/models/{repo_id}/commit/main":
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            file = folder / line["value"]["path"]
                            file.parent.mkdir(parents=True, exist_ok=True)
                            file.write_bytes(base64.b64decode(line["value"]["content"]))
                    return reply(success=True, commitUrl=f"{host}/{repo_id}/commit/{COMMIT}", commitOid=COMMIT)
            return self.answer(404, X_Error_Code="RepoNotFound")

    return Handler


def connect(endpoint: str, cache: Path) -> None:
    """Have this process use a hub and a cache; the environment was read when huggingface_hub was imported."""
    from huggingface_hub import constants, hf_api

    constants.HF_HUB_OFFLINE, constants.ENDPOINT, hf_api.api.endpoint = False, endpoint, endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_XET = str(cache), True


@contextmanager
def serve_hub(repositories: dict[str, Path]):
    """Yield (endpoint, list of requested paths) of a hub with the given repositories."""

    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(repositories, requests))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
