"""The page in a browser, as a person uses it: with the mouse, with the keyboard, with hostile names, and killed.

Needs the extra ``studio``, playwright and a chromium; without one of them all are skipped, with the reason. Whatever
happens in other processes is waited for, on a busy machine for minutes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from data.toybox.write import write_unseen_subject
from delora_diffusers.names import CHECKPOINT_SIZES
from studio import run_records
from studio.player import ROOT
from studio.workspace import Workspace

pytest.importorskip("gradio", reason="the extra studio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no chromium on the PATH", allow_module_level=True)

pytestmark = pytest.mark.integration
LANDMARKS = {"Photos": "#photos-overview", "Train": "#status", "Play": "#strength", "Compare": "#compare"}
LANDMARKS |= {"Export": "#format"}
"""What is seen when a tab is open."""
TABS = tuple(LANDMARKS)
HOSTILE = "<img src=x onerror=alert(1)>"
CAPTION = "<script>alert(2)</script> ${alert(3)} {{alert(4)}}"
PATIENCE = 300
"""Seconds; nothing takes this long, unless the machine does something else."""
AXE = "4.10.3"
"""The version of axe-core, which the test fetches from npm."""


class Server:
    """``python -m studio`` on a port of its own, without a network.

    Args:
        launcher: of training, instead of accelerate's, which takes seconds to start.
    """

    def __init__(self, workspace: Path, launcher: list[str] | None = None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.workspace = workspace
        self.words = [sys.executable, "-m", "studio"]
        if launcher is not None:
            code = f"from studio import __main__, runs; runs.LAUNCHER = {launcher}; __main__.main()"
            self.words = [sys.executable, "-c", code]
        self.start()

    def start(self) -> None:
        nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")} | {
            "no_proxy": "127.0.0.1"
        }
        words = [*self.words, "--workspace", str(self.workspace), "--port", str(self.port)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | nowhere | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.url.rstrip("/") in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A server whose workspace has a set with a hostile name and a hostile caption, and a run that can be resumed."""
    workspace = Workspace(tmp_path_factory.mktemp("studio") / "ws")
    write_unseen_subject(workspace.photo_set("toy"))
    folder = workspace.photo_set("hostile")
    folder.mkdir()
    Image.new("RGB", (128, 128), "red").save(folder / f"{HOSTILE}.png")
    (folder / f"{HOSTILE}.txt").write_text(CAPTION)
    (workspace.photos / HOSTILE).mkdir()
    (workspace.runs / HOSTILE).mkdir()
    stopped = workspace.run("stopped") / "checkpoint-20"
    stopped.mkdir(parents=True)
    (stopped / CHECKPOINT_SIZES).write_text("{}")
    server = Server(workspace.root)
    yield server
    server.kill()


class Watched:
    """A page of which nothing may be wrong: errors, dialogs, and requests that leave the machine are collected."""

    def __init__(self, browser, server: Server, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.context.set_default_timeout(1000 * PATIENCE)
        self.server = server
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.expected = ""
        self.page.on("console", self._on_message)
        self.page.on("pageerror", lambda error: self.wrong.append(f"page error: {error}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append("dialog"), dialog.dismiss()))
        local = (server.url, "data:", "blob:")
        self.page.on("request", lambda r: None if r.url.startswith(local) else self.wrong.append(f"request: {r.url}"))
        self.page.goto(server.url)
        self.page.wait_for_selector("#photos-overview figure")

    def _on_message(self, message) -> None:
        if message.type == "error" and not (self.expected and re.search(self.expected, message.text)):
            self.wrong.append(f"console: {message.text}")

    def open(self, tab: str) -> None:
        wanted, menu = self.page.get_by_role("tab", name=tab), self.page.locator(".overflow-menu button")
        # Whichever is visible at the moment of the click, since tabs move between both while the page is laid out.
        wanted.or_(menu).locator("visible=true").first.click()
        wanted.or_(self.page.locator(".overflow-dropdown button", has_text=tab)).locator("visible=true").first.click()
        self.page.locator(LANDMARKS[tab]).wait_for()

    def field(self, label: str):
        """The visible field with this label; what explains the field is part of the label too."""
        title = self.page.locator("[data-testid=block-info]", has_text=re.compile(rf"^\s*{label}\s*$"))
        within = self.page.locator("label", has=title).locator("textarea, input")
        return self.page.get_by_label(label, exact=True).or_(within).locator("visible=true").first

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def choose(self, label: str, value: str) -> None:
        self.settle()  # a list that is filled again while it is open stays open
        self.field(label).click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def wait(self, selector: str, text: str, seconds: float = PATIENCE) -> str:
        """Wait until an element has a text, a regular expression; returns all of its text."""
        until = time.monotonic() + seconds
        while True:
            shown = self.page.locator(selector).inner_text()
            if re.search(text, shown, re.IGNORECASE):
                return shown
            assert time.monotonic() < until, f"{selector} does not show {text!r} but {shown!r}"
            self.page.wait_for_timeout(200)

    def settle(self) -> None:
        """Wait until nothing of the page changes any more."""
        before, until = None, time.monotonic() + PATIENCE
        while before != (before := self.page.content()):
            assert time.monotonic() < until, "the page does not come to rest"
            self.page.wait_for_timeout(250)

    def check_access(self, axe: str | None, what: str) -> None:
        """Labels, contrast and structure, by axe-core if it is at hand."""
        if axe is None:
            return
        self.settle()
        self.page.evaluate(axe)
        found = self.page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'best-practice']})")["violations"]
        wrong = [(rule["id"], node["html"]) for rule in found for node in rule["nodes"]]
        # Gradio's messages have a button in a header that is a button.
        wrong = [(rule, html) for rule, html in wrong if not (rule == "nested-interactive" and "toast-header" in html)]
        assert not wrong, (what, wrong)

    def close(self) -> None:
        self.context.close()
        assert not self.wrong, self.wrong


@pytest.fixture
def watched(browser, server) -> Iterator[Watched]:
    watched = Watched(browser, server)
    yield watched
    watched.close()


def test_hostile_names_are_shown_and_do_nothing(watched):
    page = watched.page
    watched.choose("Photo set", "hostile")
    shown = watched.wait("#photos-overview", "hostile: 1 photo")
    assert HOSTILE in shown and CAPTION in shown
    assert watched.field("Caption").input_value() == CAPTION
    assert page.locator("#photos-overview script, #photos-overview img[src=x]").count() == 0
    watched.field("Caption").fill(f"{CAPTION}!")
    watched.button("Save caption").click()
    watched.wait("#photos-overview", re.escape(f"{CAPTION}!"))
    watched.open("Train")
    watched.field("Name of the run").fill(f"../{HOSTILE}")
    assert f"../{HOSTILE}" in watched.wait("#train-command", "cannot be used")
    watched.button("Start training").click()
    page.get_by_role("alert").or_(page.locator(".toast-body")).first.wait_for()
    assert HOSTILE in page.locator(".toast-body").first.inner_text()
    watched.field("Name of the run").fill("mine")
    watched.field("Instance prompt").fill(f"$(id) `id` {CAPTION}")
    shown = watched.wait("#train-command", "script")
    assert f"'$(id) `id` {CAPTION}'" in shown


def test_uploads_become_a_set_and_two_pages_do_not_disturb_each_other(browser, server, watched, tmp_path):
    other = Watched(browser, server)
    other.open("Train")
    other.field("Rank").fill("7")
    other_set = other.field("Photo set").input_value()
    photos = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(photos):
        Image.effect_mandelbrot((160, 128), (-3 + number / 9, -2.5, 2, 2.5), 100).convert("RGB").save(file)
    (tmp_path / "no.png").write_bytes(b"no image")
    page = watched.page
    watched.field("Photo set").fill("two words")
    page.keyboard.press("Enter")
    page.locator("input[type=file]").first.set_input_files([*photos, tmp_path / "no.png"])
    shown = watched.wait("#photos-overview", "two words: 3 photos")
    assert "0.png: 160 x 128, trained as 144 x 112" in shown
    assert "no.png" in watched.wait("#photos-message", "no.png")
    watched.open("Train")
    playwright.expect(watched.field("Photo set")).to_have_value("two words")
    assert len(list((server.workspace / "photos" / "two words").glob("*.png"))) == 3
    other.page.wait_for_timeout(500)
    assert other.field("Rank").input_value() == "7"
    assert other.field("Photo set").input_value() == other_set != "two words"
    other.close()


def test_every_control_can_be_reached_with_the_keyboard(watched):
    page = watched.page
    wanted = {
        "Photos": {"Photo set", "Resolution", "Crop to squares", "Caption", "Save caption", "Remove this photo"},
        "Train": {
            "Name of the run",
            "Method",
            "Rank",
            "Start training",
            "Run",
            "Resume",
            "Resume up to step",
            "Use its settings",
            "Copy",
        },
        "Play": {"Adapter", "Prompts", "Seed", "Generate", "Sheet of strengths", "Stop"},
        "Compare": {"Adapters", "Prompts", "Compare", "Stop"},
        "Export": {"Adapter", "Export", "Push to the hub", "Repository"},
    }
    name_of_focus = """() => {
      const e = document.activeElement;
      if (!e || e === document.body) return "";
      const label = e.labels?.[0]?.querySelector("[data-testid=block-info]") || e.labels?.[0];
      return (e.getAttribute("aria-label") || label?.innerText || e.innerText || "").trim();
    }"""
    for tab in TABS:
        watched.open(tab)
        watched.settle()
        reached = set()
        page.get_by_role("tab", name=tab).focus()
        for _ in range(70):
            page.keyboard.press("Tab")
            reached.add(page.evaluate(name_of_focus))
        assert wanted[tab] <= reached, (tab, wanted[tab] - reached, reached)


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str | None:
    """The source of axe-core, None if npm is missing or cannot fetch it."""
    folder = tmp_path_factory.mktemp("axe")
    try:
        words = ["npm", "pack", f"axe-core@{AXE}", "--silent", "--fetch-retries", "0"]
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder, "gztar")
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_contrast_and_structure(browser, server, axe, scheme):
    if axe is None:
        pytest.skip("axe-core cannot be fetched from npm")
    watched = Watched(browser, server, scheme=scheme)
    page = watched.page
    for tab in TABS:
        watched.open(tab)
        watched.check_access(axe, tab)
    watched.button("Push to the hub").click()  # there is nothing to push
    page.locator(".toast-body").wait_for()
    watched.open("Photos")
    watched.choose("Photo set", "hostile")  # which has warnings
    watched.wait("#photos-overview", "hostile: 1 photo")
    watched.check_access(axe, "messages and warnings")
    watched.open("Train")
    for name in ("All other flags of the training script", "Training", "Log"):
        page.get_by_role("button", name=re.compile(f"^{name}")).first.click()
    watched.field("Name of the run").fill("../x")
    watched.wait("#train-command", "cannot be used")
    watched.check_access(axe, "all flags")
    watched.close()


@pytest.mark.parametrize("width", [390, 800])
def test_nothing_is_wider_than_a_small_screen(browser, server, width):
    watched = Watched(browser, server, width)
    for tab in TABS:
        watched.open(tab)
        watched.settle()
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width, tab
    watched.close()


def test_a_browser_that_closes_during_an_upload_leaves_nothing_half_done(browser, server, tmp_path):
    Image.effect_noise((3000, 3000), 100).save(tmp_path / "large.png")
    photos = server.workspace / "photos"
    address, before = urlsplit(server.url), sorted(path.name for path in photos.iterdir())
    with socket.create_connection((address.hostname, address.port)) as connection:  # cut in the middle of the file
        head = 'Content-Disposition: form-data; name="files"; filename="half.png"'
        body = f"--x\r\n{head}\r\n\r\n".encode() + (tmp_path / "large.png").read_bytes()[:1_000_000]
        connection.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 9000000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
            + body
        )
    closed = Watched(browser, server)
    closed.field("Photo set").fill("closed")
    closed.page.keyboard.press("Enter")
    with closed.page.expect_request("**/upload*"):
        closed.page.locator("input[type=file]").first.set_input_files(tmp_path / "large.png")
    closed.context.close()
    watched = Watched(browser, server)
    watched.settle()
    assert set(before) <= {path.name for path in photos.iterdir()} <= {*before, "closed"}
    for file in photos.glob("closed/*.png"):
        assert file.read_bytes() == (tmp_path / "large.png").read_bytes()
    assert not [path for path in photos.rglob("*") if "half" in path.name or path.suffix == ".part"]
    watched.close()


TRAINER = """
import signal, sys, time
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--output_dir") + 1])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
first = max((int(path.name[11:]) for path in run.glob("checkpoint-*")), default=0)
for step in range(first, 100_000):
    print(f"training:   1%|    | {step}/100000 [00:{step % 60:02}<10:00, 50.00it/s]", end="\\r", flush=True)
    if step % 10 == 0 or stop:
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sizes.json").write_text("{}")
    if stop:
        sys.exit(f"stopped after step {step}; continue with --resume_from_checkpoint latest.")
    time.sleep(0.02)
"""
"""It writes what the training script writes, without training."""


def step_of(shown: str) -> int:
    match = re.search(r"step (\d+) of \d+", shown, re.IGNORECASE)
    return int(match[1]) if match else 0


def test_whatever_is_killed_nothing_of_a_run_is_lost_and_the_page_says_what_happened(browser, tmp_path):
    (tmp_path / "train.py").write_text(TRAINER)
    write_unseen_subject(Workspace(tmp_path / "ws").photo_set("toy"))
    server = Server(tmp_path / "ws", [sys.executable, str(tmp_path / "train.py")])
    try:
        watched = Watched(browser, server)
        watched.open("Train")
        watched.field("Name of the run").fill("mug")
        watched.wait("#train-command", "runs/mug")
        watched.button("Start training").click()
        reached = step_of(watched.wait("#status", "step [1-9][0-9]* of"))
        watched.close()  # the browser, while it trains

        watched = Watched(browser, server)
        watched.open("Train")
        later = step_of(watched.wait("#status", "step [1-9][0-9]* of"))
        assert later >= reached
        run = Workspace(tmp_path / "ws").run("mug")
        kill_all(run)  # the trainer
        shown = watched.wait("#status", "ended without a message at step")
        kept = int(re.search(r"its last checkpoint is at step (\d+): resume to continue", shown)[1])
        assert step_of(shown) >= kept >= later - 10
        playwright.expect(watched.button("Stop, keeping a checkpoint")).to_be_disabled()
        watched.button("Resume").click()
        assert step_of(watched.wait("#status", "training: [0-9]+ of")) >= kept

        watched.expected = "ERR_CONNECTION|ERR_INCOMPLETE|Failed to fetch|SSE|Connection|network|fetch|Abort"
        server.kill()
        watched.page.locator(".toast-body", has_text="Connection to the server was lost").wait_for()
        server.start()
        watched.page.wait_for_selector("#photos-overview figure")  # the page has loaded itself again
        watched.close()
        watched = Watched(browser, server)
        watched.open("Train")
        before = step_of(watched.wait("#status", "training: [0-9]+ of"))
        assert before >= kept
        watched.button("Stop, keeping a checkpoint").click()
        shown = watched.wait("#status", "Stopped after step [0-9]+, which is saved: resume to continue")
        assert step_of(shown) >= before and (run / f"checkpoint-{step_of(shown)}").is_dir()
        watched.close()
    finally:
        kill_all(Workspace(tmp_path / "ws").run("mug"))
        server.kill()


def kill_all(run: Path) -> None:
    """Kill the processes of a run."""
    record = run_records.read_record(run)
    for process in run_records.processes_of({record.token})[record.token] if record else ():
        process.kill()


def test_the_main_path(browser, axe, tmp_path):
    """Train, stop, resume, play, compare and export, with the miniature."""
    server = Server(tmp_path / "ws", [sys.executable])
    try:
        main_path(Watched(browser, server), axe, tmp_path / "ws")
    finally:
        kill_all(Workspace(tmp_path / "ws").run("mug"))
        server.kill()


def main_path(watched: Watched, axe: str | None, workspace: Path) -> None:
    page = watched.page
    watched.wait("#photos-overview", "toy: 5 photos")

    def fill(flag: str, value: object) -> None:
        page.locator(f"#flag-{flag} textarea").fill(str(value))

    watched.open("Train")
    watched.field("Name of the run").fill("mug")
    for flag, value in {"max_train_steps": 40, "validation_steps": 20, "validation_split": 0.2}.items():
        fill(flag, value)
    for flag, value in {"resolution": 64, "train_batch_size": 2}.items():
        fill(flag, value)
    page.get_by_role("button", name="All other flags of the training script").click()
    page.get_by_role("button", name="Checkpoints, validation and logs").click()
    for flag, value in {"num_validation_images": 1, "validation_inference_steps": 2, "logging_steps": 2}.items():
        fill(flag, value)
    shown = watched.wait("#train-command", "logging_steps 2")
    assert "--max_train_steps 40" in shown and "accelerate launch train_dreambooth_delora.py" in shown
    watched.button("Start training").click()
    watched.wait("#status", "loading the model")
    other = Watched(page.context.browser, watched.server)  # finds the run, and cannot start it again
    other.open("Train")
    other.field("Name of the run").fill("mug")
    other.wait("#status", "of 40")
    other.page.locator("#start").click()
    other.page.locator(".toast-body", has_text="mug").wait_for()
    other.close()
    watched.wait("#status", "step [1-9][0-9]* of 40")
    watched.button("Stop, keeping a checkpoint").click()
    reached = step_of(watched.wait("#status", "Stopped after step"))
    assert 0 < reached < 40
    watched.button("Resume").click()
    watched.wait("#status", "finished")
    shown = watched.wait("#curves", "CLIP-T")
    for title in ("loss:", "loss on held-out photos:", "distance", "boundary", "DINO", "CLIP-T"):
        assert title in shown
    line = page.locator("#curves polyline").first.get_attribute("points")
    assert len(line.split()) >= 10
    assert page.locator("#samples img").count() >= 2
    watched.check_access(axe, "a run")
    fill("max_train_steps", 7)
    fill("rank", 5)
    watched.button("Use its settings").click()
    playwright.expect(watched.field("Name of the run")).to_have_value("mug-2")
    for flag, value in {"max_train_steps": "40", "rank": ""}.items():
        playwright.expect(page.locator(f"#flag-{flag} textarea")).to_have_value(value)

    watched.open("Play")
    playwright.expect(watched.field("Adapter")).to_have_value("mug")
    page.get_by_role("spinbutton", name="Steps", exact=True).fill("2")
    page.get_by_role("spinbutton", name="Images", exact=True).fill("1")
    watched.button("Generate").click()
    page.locator("#play-result img").wait_for()
    page.locator("#strength input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    watched.wait("#play-result", "strength 0.95")
    watched.button("Sheet of strengths").click()
    page.wait_for_function("document.querySelectorAll('#play-result img').length == 7")
    watched.button("Checkpoints side by side").click()
    assert f"checkpoint-{reached}," in watched.wait("#play-result", "finished,")
    watched.check_access(axe, "images")

    shutil.copytree(workspace / "runs" / "mug", workspace / "runs" / "copy")
    watched.open("Compare")
    watched.wait("#compared", "copy")
    page.get_by_role("spinbutton", name="Steps", exact=True).fill("2")
    page.get_by_role("spinbutton", name="Images per prompt", exact=True).fill("1")
    watched.field("Prompts").fill("a photo of sks mug in the snow\na photo of sks mug at night")
    watched.button("Compare").click()
    page.locator("#compare-result .chart svg").wait_for()
    assert "real images" in page.locator("#compare-result").inner_text()
    differences = json.loads(next((workspace / "outputs").glob("compare-*/differences.json")).read_text())
    assert differences[0]["difference"]["dino"]["subjects"] == 2
    watched.check_access(axe, "a comparison")
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.set_viewport_size({"width": 1280, "height": 900})

    watched.open("Export")
    watched.choose("Adapter", "mug")
    page.get_by_role("button", name="More adapters and weights").click()
    watched.choose("Adapter 2", "copy")
    watched.field("Weight 2").fill("0.5")
    page.get_by_label("kohya").check()
    watched.button("Export").click()
    watched.wait("#export-message", "mug-and-copy-kohya.safetensors")
    assert "--adapter_weights 1 0.5" in page.locator("#export-command").inner_text()
    assert (workspace / "outputs" / "mug-and-copy-kohya.safetensors").is_file()
    watched.wait("#card", "sks mug")
    watched.close()
