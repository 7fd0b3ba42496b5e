"""What the page's server answers and refuses, apart from gradio: images of the workspace, and who may ask for them.

Three things could make a server on this machine read for a stranger: a page on the internet that sends requests to it
(refused by their origin), a name that resolves to this machine (refused by the host that is asked for), and a path out
of the workspace (refused after symbolic links are resolved).
"""

import base64
import io
import mimetypes
import re
import secrets
import time
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from delora_diffusers.errors import InputError
from studio import photos
from studio.run_records import STUDIO_FOLDER
from studio.uploads import FULL, is_full
from studio.workspace import Workspace

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""For the page: nothing comes from, or goes to, another machine. Gradio's scripts are inline."""
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'"
)
"""For the pages that `eval` writes, which contain their images: they cannot reach this server."""
UPLOADS = ".uploads"
"""Where gradio keeps uploads, in the workspace."""
PARTIAL = "tmp*"
"""What the files are called that gradio has not finished writing; finished ones are in folders."""
SHOWN = {".png", ".jpg", ".jpeg", ".webp", ".html", ".md", ".json", ".txt", ".safetensors"}
"""Files that the page links to."""


class Guard:
    """Refuses requests that do not come from the page, and adds the policy to what is answered.

    Args:
        host: that the server listens on. password: None if everyone on this machine may use the page.
    """

    def __init__(self, app: ASGIApp, workspace: Workspace, host: str, password: str | None):
        self.app = app
        self.workspace = workspace
        self.hosts = LOOPBACK if host in LOOPBACK else None
        self.password = password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = await run_in_threadpool(self._refusal, scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope["path"].endswith("/upload"):
            await self._upload(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let gradio write an upload; if the disk is full, remove what was written of it and say so."""
        uploads = self.workspace.root / UPLOADS
        before = set(uploads.glob(PARTIAL))
        failure: list[Message] = []

        async def send_unless_failed(message: Message) -> None:
            if failure or (message["type"] == "http.response.start" and message["status"] == 500):
                failure.append(message)  # it is sent before the error is raised
            else:
                await send(message)

        try:
            await self._answer(scope, receive, send_unless_failed)
        except OSError as error:
            if not is_full(error):
                raise
            for part in set(uploads.glob(PARTIAL)) - before:
                part.unlink(missing_ok=True)
            await PlainTextResponse(FULL, 507)(scope, receive, send)
            failure.clear()
        finally:
            for message in failure:
                await send(message)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                for name, value in (
                    (b"content-security-policy", POLICY),
                    (b"x-content-type-options", "nosniff"),
                    (b"referrer-policy", "no-referrer"),
                ):
                    if name not in names:
                        message["headers"].append((name, value.encode()))
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = urlsplit("//" + headers.get("host", "")).hostname
        if self.hosts is not None and host not in self.hosts:
            return PlainTextResponse("This host name is not the page's; open it under 127.0.0.1.", 403)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return PlainTextResponse("Requests from other pages are refused.", 403)
        # Another page sends no origin with an image that it embeds, whose size would tell it what is here.
        embeds = headers.get("sec-fetch-mode") != "navigate"
        if embeds and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return PlainTextResponse("Requests from other pages are refused.", 403)
        if self.password is not None and not _is_password(headers.get("authorization"), self.password):
            if "authorization" in headers:
                time.sleep(1)  # guessing takes long
            return PlainTextResponse(
                "The page needs its password (any user name).", 401, {"WWW-Authenticate": 'Basic realm="studio"'}
            )
        _, is_file, path = unquote(scope["path"]).partition("file=")
        if is_file:
            # Gradio fetches addresses that it is asked for. It checks paths itself.
            try:
                self.workspace.within(path)
            except InputError:
                return PlainTextResponse("This file is outside the workspace.", 403)
            if "://" in path:
                return PlainTextResponse("Addresses are not fetched.", 403)
        return None


def _is_password(authorization: str | None, password: str) -> bool:
    kind, _, encoded = (authorization or "").partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return kind.lower() == "basic" and secrets.compare_digest(given, password.encode())


def create_app(workspace: Workspace, host: str, password: str | None) -> FastAPI:
    """The server without the page itself."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, workspace=workspace, host=host, password=password)

    @app.get("/studio/file/{path:path}")
    def file(path: str) -> Response:
        """A file of the workspace that the page shows or links to."""
        try:
            found = workspace.within(path)
        except InputError as error:
            raise HTTPException(403, str(error)) from error
        # Of what is hidden only the samples, which belong to the runs.
        hidden = any(part.startswith(".") and part != STUDIO_FOLDER for part in found.relative_to(workspace.root).parts)
        if hidden or found.suffix.lower() not in SHOWN or not found.is_file():
            raise HTTPException(404, "there is no such file")
        headers = {"Cache-Control": "no-cache"}
        if found.suffix.lower() == ".html":
            headers["Content-Security-Policy"] = REPORT_POLICY
        kind = mimetypes.guess_type(found.name)[0] or "application/octet-stream"
        if found.suffix.lower() in (".md", ".txt"):
            kind = "text/plain; charset=utf-8"
        download = found.name if found.suffix.lower() == ".safetensors" else None
        return FileResponse(found, media_type=kind, headers=headers, filename=download)

    @app.get("/studio/photo/{name}/{file}")
    def photo(name: str, file: str, crop: str = "") -> Response:
        """A photo as training sees it, with what is outside the crop (left, top, right, bottom) darkened."""
        box = tuple(int(edge) for edge in crop.split(",") if re.fullmatch(r"\d{1,9}", edge))
        try:
            image = photos.preview(workspace, name, file, crop=box if len(box) == 4 else None)
        except InputError as error:
            raise HTTPException(404, str(error)) from error
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
        return Response(buffer.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "no-cache"})

    return app


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on this host."""
    return host in LOOPBACK
