"""``python -m eval COMMAND``."""

from delora_diffusers.dispatch import run_command
from eval.commands import benchmark, dreambooth, map2img, page, report, study

COMMANDS = {
    "dreambooth": dreambooth,
    "benchmark": benchmark,
    "study": study,
    "report": report,
    "map2img": map2img,
    "page": page,
}


def main(arguments: list[str] | None = None) -> None:
    run_command("python -m eval", "Score generated images.", COMMANDS, arguments)


if __name__ == "__main__":
    main()
