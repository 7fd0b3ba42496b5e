"""``python -m studio``: a page in the browser for training, generating, comparing and exporting."""

import argparse
import contextlib
import getpass
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError

PASSWORD_VARIABLE = "DELORA_STUDIO_PASSWORD"
LEAST_PASSWORD = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m studio", description=__doc__)
    parser.add_argument(
        "--workspace",
        type=Path,
        default=Path("studio-workspace"),
        help="folder for photos, runs and images; nothing outside it is read or served; default: studio-workspace",
    )
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine needs --password")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument(
        "--password",
        action="store_true",
        help=f"ask for a password; it is read from ${PASSWORD_VARIABLE} if that is set, else from the terminal",
    )
    return parser


def read_password(options: argparse.Namespace) -> str | None:
    """The password of the page; never from the command line, which other users of the machine can read.

    Raises:
        InputError: one is needed and not given, or it is too short.
    """
    from studio.server import is_loopback

    if not options.password:
        if not is_loopback(options.host):
            raise InputError(f"--host {options.host} opens the page to other machines; give --password too.")
        return None
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is None:
        if not sys.stdin.isatty():
            raise InputError(f"there is no terminal to ask for the --password; set ${PASSWORD_VARIABLE}.")
        password = getpass.getpass("Password of the page: ")
    if len(password) < LEAST_PASSWORD:
        raise InputError(f"the --password has fewer than {LEAST_PASSWORD} characters; choose a longer one.")
    return password


def listening(host: str, port: int):
    """A socket that listens.

    Raises:
        InputError: the port is taken or the host is not this machine's.
    """
    import socket

    if not 0 <= port < 65536:
        raise InputError(f"--port is {port}; give a number below 65536.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"--host {host} --port {port} cannot be used ({error.strerror}); give another.") from error


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    missing = next((name for name in ("gradio", "psutil") if find_spec(name) is None), None)
    if missing is not None:
        raise InputError(f"the package {missing} is missing; run `make studio`, or `pip install -e '.[studio]'`.")
    password = read_password(options)
    connection = listening(options.host, options.port)
    import uvicorn  # comes with gradio

    from studio.app import create_app
    from studio.workspace import open_workspace

    workspace = open_workspace(options.workspace)
    app = create_app(workspace, options.host, password)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"studio: http://{host}:{connection.getsockname()[1]}  (workspace {workspace.root})", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    # Ctrl-C cancels the streams of open pages, which uvicorn reports as errors, and is then raised again.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[connection])


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
