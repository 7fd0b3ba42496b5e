"""The command line: what it says of wrong words and of Ctrl-C."""

import signal
import sys

import pytest

from delora_diffusers.dispatch import INTERRUPTED, TERMINATED, Parser, exit_on_bad_input
from delora_diffusers.training.arguments import positive_int


def parser() -> Parser:
    made = Parser(prog="train")
    made.add_argument("-r", "--rank", type=positive_int)
    made.add_argument("--rate", type=float)
    made.add_argument("--steps", type=int)
    made.add_argument("--kind", choices=["a", "b"])
    made.add_argument("--output_dir", required=True)
    return made


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rank", "three"], "-r is three, not a whole number of at least 1"),
        (["--rank", "0"], "-r: 0 is less than 1"),
        (["--rate", "1,5"], "--rate is 1,5, not a number"),
        (["--steps", "1.5"], "--steps is 1.5, not a whole number"),
        (["--kind", "c"], "--kind c does not exist; choose from a, b"),
        (["--rate"], "--rate expected one argument"),
        (["--output_dir", "x", "--nope", "3"], "there is no flag --nope"),
        (["--output_dir", "x", "--ste", "3"], "there is no flag --ste"),
        ([], "--output_dir is missing"),
    ],
)
def test_a_wrong_command_line_is_answered_with_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}; --help lists the flags.\n"


def test_an_error_names_the_file_that_the_words_are_from(capsys):
    from_file = parser()
    from_file.source = "config.yaml"
    with pytest.raises(SystemExit):
        from_file.parse_args(["--rank", "three"])
    assert capsys.readouterr().err.startswith("error: config.yaml: -r is three, not a whole number")


def test_newer_and_older_argparse_say_the_same(capsys):
    """Python 3.12 quotes the choices, 3.14 does not."""
    for choices in ("'a', 'b'", "a, b"):
        with pytest.raises(SystemExit):
            parser().error(f"argument --kind: invalid choice: 'c' (choose from {choices})")
        assert capsys.readouterr().err.startswith("error: --kind c does not exist; choose from a, b;")


def test_ctrl_c_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input():
        raise KeyboardInterrupt
    assert (
        stopped.value.code == INTERRUPTED
        and capsys.readouterr().err == "interrupted; run the same command again to go on\n"
    )


def test_sigterm_ends_with_clean_up(capsys):
    before, cleaned = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # a launcher's copy
            cleaned.append(True)
    assert stopped.value.code == TERMINATED == 143 and cleaned
    assert capsys.readouterr().err == "terminated; run the same command again to go on\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_subparsers_answer_in_the_same_way(capsys, monkeypatch):
    from delora_diffusers.__main__ import main

    monkeypatch.setattr(sys, "argv", ["delora"])
    for words, sentence in (
        (["generate", "--seed", "1.5", "--prompt", "a"], "--seed is 1.5, not a whole number"),
        (["nothing"], "COMMAND nothing does not exist; choose from generate, merge, export, extract, import, info"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().err == f"error: {sentence}; --help lists the flags.\n"
