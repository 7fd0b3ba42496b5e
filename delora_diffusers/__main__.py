"""The command line: ``python -m delora_diffusers COMMAND``."""

from delora_diffusers.commands import export, extract, generate, import_peft, info, merge
from delora_diffusers.dispatch import run_command

COMMANDS = {
    "generate": generate,
    "merge": merge,
    "export": export,
    "extract": extract,
    "import": import_peft,
    "info": info,
}


def main(arguments: list[str] | None = None) -> None:
    run_command("python -m delora_diffusers", "Use a trained adapter.", COMMANDS, arguments)


if __name__ == "__main__":
    main()
