"""The page: five tabs over the workspace, and the server that answers for it."""

import atexit
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from studio import flags, server
from studio.player import Player
from studio.scorer import Scorer
from studio.tabs import compare, export, photos, play, train
from studio.workspace import Workspace

LARGEST_UPLOAD = "2gb"
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
STYLE = Path(__file__).parent / "style.css"


def chosen(_: gr.Dropdown, payload: Any) -> Any:
    """What a list sends, as it is: whether it is still there is for the handlers, which say so in a sentence.

    Gradio compares it with the choices that this browser was sent, which it forgets when a laptop sleeps.
    """
    return payload


gr.Dropdown.preprocess = chosen


def theme() -> gr.themes.Base:
    """The plain theme with the system's fonts and colours that can be read on every background."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO).set(
        button_primary_background_fill="#1d4ed8",
        button_primary_background_fill_hover="#1e40af",
        button_primary_background_fill_dark="#1d4ed8",
        button_primary_text_color="white",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        body_text_color_subdued="#475569",
        body_text_color_subdued_dark="#cbd5e1",
        block_info_text_color="#475569",
        block_info_text_color_dark="#cbd5e1",
        input_placeholder_color="#64748b",
        input_placeholder_color_dark="#94a3b8",
        block_label_text_color="#334155",
        block_label_text_color_dark="#e2e8f0",
        block_title_text_color="#1e293b",
        block_title_text_color_dark="#f1f5f9",
    )


def build(workspace: Workspace, player: Player, scorer: Scorer) -> gr.Blocks:
    """The page with its events."""
    defaults = flags.effective({})
    resolution = defaults["resolution"]
    resolution = resolution[0] if isinstance(resolution, list | tuple) else resolution
    with gr.Blocks(title="delora-diffusers studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(
            "<h1>delora-diffusers studio</h1><p>Teach a text-to-image model a subject from a few photos. Without a "
            "base model it trains the included miniature.</p>",
            elem_id="title",
        )
        followed = gr.State()
        with gr.Tabs():
            with gr.Tab("Photos"):
                shown_set = photos.build(workspace, resolution, defaults["bucket_step"])
            with gr.Tab("Train") as training:
                run, photo_set, refresh_train = train.build(workspace, player, scorer)
            with gr.Tab("Play") as playing:
                played, refresh_played = play.build(workspace, player)
            with gr.Tab("Compare") as comparing:
                compared, besides, refresh_compared = compare.build(workspace, player)
            with gr.Tab("Export") as exporting:
                refresh_exported = export.build(workspace)
        # What was added in one tab, or on another page, is in the lists of a tab when it is opened.
        training.select(
            refresh_train, [run, photo_set, shown_set, followed], [run, photo_set, followed], show_progress="hidden"
        )
        playing.select(refresh_played, played, played, show_progress="hidden")
        comparing.select(refresh_compared, compared, [*compared, *besides], show_progress="hidden")
        exporting.select(**refresh_exported, show_progress="hidden")
    return page


def create_app(workspace: Workspace, host: str = "127.0.0.1", password: str | None = None) -> FastAPI:
    """The whole server; see ``server.create_app``."""
    # Uploads and what gradio copies stay in the workspace.
    os.environ["GRADIO_TEMP_DIR"] = str(workspace.root / server.UPLOADS)
    player, scorer = Player(), Scorer(workspace)
    atexit.register(player.close)
    atexit.register(scorer.close)
    page = build(workspace, player, scorer)
    page.queue(default_concurrency_limit=8)
    page.has_launched = True  # or gradio, mounted in another server, takes any file of this machine for an upload
    app = server.create_app(workspace, host, password)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=theme(),
        css_paths=[STYLE],
        show_error=True,
    )
