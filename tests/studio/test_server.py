"""What the server refuses: other pages, other hosts, no password, and every way out of the workspace."""

import base64
import errno
import functools
import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from data.toybox.write import write_unseen_subject
from delora_diffusers.errors import InputError
from delora_diffusers.names import WEIGHTS_NAME
from studio.workspace import Workspace
from tests.hub_server import serve_hub

pytest.importorskip("gradio", reason="the extra studio is not installed")
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from studio import __main__ as command
from studio import app

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    root = tmp_path_factory.mktemp("studio")
    (root / "secret.txt").write_text("secret")
    (root / "secret.png").write_bytes(b"secret")
    workspace = Workspace(root / "ws")
    write_unseen_subject(workspace.photo_set("toy"))
    (workspace.outputs / "link.txt").symlink_to(root / "secret.txt")
    (workspace.outputs / "out").symlink_to(root)
    (workspace.outputs / "note.txt").write_text("<b>note</b>")
    (workspace.outputs / "page.html").write_text("<script>1</script>")
    (workspace.outputs / "key.pem").write_text("secret")
    (workspace.photos / "toy" / "stolen.png").symlink_to(root / "secret.png")
    return workspace


@pytest.fixture(scope="module")
def client(workspace):
    with TestClient(app.create_app(workspace), base_url="http://127.0.0.1:7860") as client:
        yield client


def test_the_page_is_served_and_may_load_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "studio" in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.googleapis" not in answer.text and "fonts.googleapis" not in client.get("/theme.css").text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False


OUTSIDE = ["/etc/passwd", "../secret.txt", "outputs/../../secret.txt", "outputs/link.txt", "outputs/out/secret.txt"]


@pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/file=", "/gradio_api/file%3D", "/studio/file/"])
@pytest.mark.parametrize("path", [*OUTSIDE, "//etc/passwd", "http://127.0.0.1:1/", "\0", "~root/x"])
def test_no_path_leaves_the_workspace(client, workspace, prefix, path):
    for form in (path, str(workspace.root / path)):
        for written in (
            quote(form, safe="/:"),
            quote(form, safe=""),
            form.replace("..", "%2e%2e").replace("\0", "%00"),
        ):
            answer = client.get(prefix + written)
            assert answer.status_code in (403, 404), (prefix, written, answer.text)
            assert answer.text != "secret" and "root:" not in answer.text


def test_gradio_serves_no_file_of_the_workspace_but_uploads(client, workspace):
    assert client.get(f"/gradio_api/file={workspace.outputs / 'note.txt'}").status_code == 403


def test_gradio_fetches_no_address_for_anybody(client, monkeypatch):
    async def fetch(*_):
        return PlainTextResponse("fetched")

    monkeypatch.setattr("gradio.routes.secure_url_stream_response", fetch)
    for path in ("file=http://evil.example/", "file=https:%2F%2Fevil.example"):
        assert client.get(f"/gradio_api/{path}").status_code == 403, path


def test_a_link_among_the_uploads_leads_nowhere(client, workspace):
    uploads = workspace.root / ".uploads"
    uploads.mkdir(exist_ok=True)
    (uploads / "own.txt").write_text("own")
    (uploads / "link.txt").symlink_to(workspace.root.parent / "secret.txt")
    assert client.get(f"/gradio_api/file={uploads / 'own.txt'}").text == "own"
    assert client.get(f"/gradio_api/file={uploads / 'link.txt'}").status_code == 403


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EIO, 500)])
def test_an_upload_to_a_full_disk_is_one_sentence_and_leaves_nothing(client, workspace, monkeypatch, number, status):
    uploads = workspace.root / ".uploads"
    uploads.mkdir(exist_ok=True)
    (uploads / "tmpother").write_bytes(b"of another page")

    async def write(file, data):
        Path(file.file.name).write_bytes(b"half")
        raise OSError(number, "no")

    monkeypatch.setattr("starlette.datastructures.UploadFile.write", write)
    send = functools.partial(client.post, "/gradio_api/upload", files={"files": ("a.png", b"1234", "image/png")})
    if status == 507:
        answer = send()
        assert (answer.status_code, answer.text) == (507, "the disk of the workspace is full; free some space.")
        assert [path.name for path in uploads.glob("tmp*")] == ["tmpother"]
    else:
        with pytest.raises(OSError):
            send()
    (uploads / "tmpother").unlink()


def test_files_are_served_as_what_they_are(client):
    note = client.get("/studio/file/outputs/note.txt")
    assert note.text == "<b>note</b>" and note.headers["content-type"].startswith("text/plain")
    assert note.headers["x-content-type-options"] == "nosniff"
    assert client.get("/studio/file/outputs/page.html").headers["content-security-policy"].startswith("sandbox")
    assert client.get("/studio/file/outputs/key.pem").status_code == 404
    assert client.get("/studio/file/.scoring.log").status_code == 404


def test_photos_are_served_and_links_out_of_the_set_are_not(client):
    photo = client.get("/studio/photo/toy/00.png?crop=0,0,64,128")
    assert photo.status_code == 200 and photo.headers["content-type"] == "image/jpeg"
    for name, file in (
        ("toy", "stolen.png"),
        ("toy", "%2e%2e%2f..%2fsecret.png"),
        ("..", "secret.png"),
        ("no", "00.png"),
    ):
        assert client.get(f"/studio/photo/{name}/{file}").status_code == 404, (name, file)
    assert client.get("/studio/photo/toy/00.png?crop=-1,x,99999999999,2").status_code == 200


def call(client, name: str, *data: object) -> dict:
    """The answer of an event handler of the page; inputs that are not given are as the page shows them at first."""
    config = client.get("/config").json()
    handler = next(handler for handler in config["dependencies"] if handler["api_name"] == name)
    first = {component["id"]: component["props"].get("value") for component in config["components"]}
    values = [*data, *(first[component] for component in handler["inputs"][len(data) :])]
    body = {"fn_index": handler["id"], "data": values, "session_hash": "a"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    for line in client.get("/gradio_api/queue/data?session_hash=a").text.splitlines():
        message = json.loads(line.removeprefix("data: ") or "{}")
        if message.get("msg") == "process_completed":
            return message["output"]
    raise AssertionError("no answer")


def test_only_uploads_are_imported(client, workspace, tmp_path):
    """Whoever may use the page may still not read this machine's files."""
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    for path in (tmp_path / "other.png", workspace.photo_set("toy") / "00.png", Path("/etc/passwd")):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        assert "not uploaded by a user" in call(client, "add", "stolen", [file])["error"], path
        assert "not uploaded by a user" in call(client, "store_mask", "toy", "00.png", file)["error"], path
    assert workspace.photo_sets() == ["toy"] and not list(workspace.photo_set("toy").glob("*.mask.*"))
    content = (tmp_path / "other.png").read_bytes()
    (path,) = client.post("/gradio_api/upload", files={"files": ("mine.png", content)}).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert "Added mine.png to mine." in call(client, "add", "mine", [file])["data"][-1]
    shutil.rmtree(workspace.photo_set("mine"))


def test_a_page_that_the_server_has_forgotten_gets_sentences(client):
    """As after a laptop slept: gradio knows no longer which choices this page was sent."""
    for name, data in {
        "store": ("toy", "gone.png", "a toy"),
        "end": ("gone",),
        "begin": ("my-subject", "gone"),
        "go_on": ("gone",),
        "export": ("kohya", "fp32", "", "", "gone"),
        "generate": ("gone",),
        "compare": (["gone", "lost"], "toy"),
    }.items():
        error = call(client, name, *data)["error"]
        assert re.fullmatch(r"[A-Z/].*gone.*\.", error), (name, error)


@pytest.mark.parametrize(
    "name",
    [
        "../../x.png",
        "/etc/x.png",
        "a" * 300 + ".png",
        "\u202egnp.exe.png",
        "<img src=x onerror=alert(1)>.png",
        "a\nb.png",
    ],
)
def test_uploads_have_no_name_that_leaves_their_folder(client, workspace, name):
    before = {path for path in workspace.root.parent.rglob("*") if ".uploads" not in path.parts}
    answer = client.post("/gradio_api/upload", files={"files": (name, b"abc", "image/png")})
    assert answer.status_code == 200
    (path,) = map(Path, answer.json())
    assert path.parent.parent == workspace.root / ".uploads" and path.is_file() and "<" not in path.name
    assert {path for path in workspace.root.parent.rglob("*") if ".uploads" not in path.parts} == before


def test_other_pages_neither_embed_images_nor_open_sockets(client):
    photo = "/studio/photo/toy/00.png"
    for site, mode, code in (
        ("cross-site", "no-cors", 403),
        ("same-site", "no-cors", 403),  # another port of this machine
        ("same-origin", "no-cors", 200),
        ("none", "navigate", 200),
        ("cross-site", "navigate", 200),  # a link is followed
    ):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        assert client.get(photo, headers=headers).status_code == code, (site, mode)
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/queue/join", headers=headers):
            pass


def test_other_pages_and_other_host_names_are_refused(client):
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"Host": "127.0.0.1.evil.example:7860"}).status_code == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1234"):
        answer = client.post("/gradio_api/queue/join", headers={"Origin": origin}, json={"fn_index": 0, "data": []})
        assert answer.status_code == 403, origin
    assert client.get("/config", headers={"Origin": "http://127.0.0.1:7860"}).status_code == 200


def test_with_a_password_nothing_is_served_without_it(workspace):
    def basic(password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    with TestClient(app.create_app(workspace, "0.0.0.0", "correct horse"), base_url="http://gpu.lan:7860") as client:
        for path in ("/", "/config", "/gradio_api/info", "/studio/file/outputs/note.txt", "/studio/photo/toy/00.png"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers=basic("correct horse")).status_code == 200, path
        for headers in (basic("wrong"), {"Authorization": "Basic !"}, {"Authorization": "Bearer correct horse"}):
            assert client.get("/config", headers=headers).status_code == 401


def test_another_host_needs_a_password(monkeypatch):
    def read(*words: str) -> str | None:
        return command.read_password(command.build_parser().parse_args(words))

    monkeypatch.delenv(command.PASSWORD_VARIABLE, raising=False)
    assert read() is None
    with pytest.raises(InputError, match="--host 0.0.0.0 opens the page to other machines"):
        read("--host", "0.0.0.0")
    with pytest.raises(InputError, match=command.PASSWORD_VARIABLE):
        read("--host", "0.0.0.0", "--password")
    monkeypatch.setenv(command.PASSWORD_VARIABLE, "short")
    with pytest.raises(InputError, match="fewer than 8"):
        read("--password")
    monkeypatch.setenv(command.PASSWORD_VARIABLE, "long enough")
    assert read("--host", "0.0.0.0", "--password") == "long enough"


def test_a_port_that_is_taken_is_one_sentence():
    with command.listening("127.0.0.1", 0) as taken, pytest.raises(InputError, match="cannot be used"):
        command.listening("127.0.0.1", taken.getsockname()[1])


def test_the_server_starts_without_torch(tmp_path):
    import subprocess
    import sys

    Workspace(tmp_path / "ws").photo_set("mine").mkdir()
    code = (
        "import sys; from pathlib import Path; from studio.app import create_app;"
        "from studio.workspace import open_workspace;"
        f"create_app(open_workspace(Path({str(tmp_path / 'ws')!r}))); print('torch' in sys.modules)"
    )
    root = Path(command.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "False", result.stderr


def test_a_run_is_pushed_by_the_command_that_is_shown(client, workspace, tmp_path, monkeypatch):
    run, pushed = workspace.run("mine"), tmp_path / "pushed"
    for name in ("README.md", WEIGHTS_NAME, "samples/00.png", "checkpoint-5/x.bin", "logs/events", ".hidden/y"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"---\n---\n{name}")
    pushed.mkdir()
    assert "no repository" in call(client, "upload", "mine", " ", True)["error"]
    assert "not confirmed" in call(client, "upload", "mine", "me/toy", False)["error"]
    with serve_hub({"me/toy": pushed}) as (endpoint, _):
        for name, value in {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        shown, *_ = call(client, "upload", "mine", "me/toy", True)["data"]
        assert f"hf upload me/toy {run}" in shown
        error = call(client, "upload", "mine", "me/nothing", True)["error"]
        assert error and "Traceback" not in error
    assert {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()} == {
        "README.md",
        WEIGHTS_NAME,
        "samples/00.png",
    }
    shutil.rmtree(run)
