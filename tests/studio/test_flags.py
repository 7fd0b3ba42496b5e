"""The form of the training script: its fields, and values that become a command and come back from it."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_dreambooth_delora as script
from delora_diffusers import InputError
from studio import flags
from studio.flags import LAUNCH, Field, check, command, effective, fields, shown

FIELDS = {field.name: field for field in fields()}
WORD = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=30
)
TEXT = WORD.map(str.strip).filter(lambda text: text and not text.startswith("-"))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def values_of(field: Field) -> st.SearchStrategy:
    """What a form can have in a field, as the parser returns it."""
    if field.name == "resolution":
        return st.lists(st.integers(8, 4096), min_size=1, max_size=3)
    if field.name == "timestep_shift":
        return st.just("resolution") | NUMBERS
    if field.kind == "choice" and field.choices == ("yes", "no"):
        return st.booleans()
    return {
        "text": TEXT,
        "path": TEXT.map(Path),
        "int": st.integers(1, 10**9),
        "float": NUMBERS,
        "bool": st.booleans(),
        "list": st.lists(TEXT, min_size=1, max_size=3),
        "choice": st.sampled_from(field.choices or ("",)),
    }[field.kind]


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional={name: values_of(field) for name, field in FIELDS.items()}), st.booleans())
def test_a_command_parses_to_the_values_that_it_was_made_from(values, as_text):
    if as_text:  # what text fields of a form have
        values = {
            name: value
            if isinstance(value, bool)
            else "\n".join(map(str, value))
            if isinstance(value, list)
            else str(value)
            for name, value in values.items()
        } | {name: values[name] for name in values if isinstance(values[name], float)}
    words = command(values)
    assert shlex.split(shlex.join(words)) == words and tuple(words[: len(LAUNCH)]) == LAUNCH
    parsed = vars(script.build_parser().parse_args(words[len(LAUNCH) :]))
    defaults = defaults_for(values.get("pretrained_model_name_or_path"))
    given_flags = {word.split("=")[0].replace("--no-", "--") for word in words if word.startswith("--")}
    for name, field in FIELDS.items():
        value = values.get(name)
        if field.flag in given_flags:
            expected, result = flags._normalized(value, _action(name)), parsed[name]
            assert result == expected and type(result) is type(expected)
            assert result != defaults[name] or name in ("pretrained_model_name_or_path", "recipe")
        elif value is not None:  # left out, since it is the default
            default = (
                script.build_parser().get_default(name) if name == "pretrained_model_name_or_path" else defaults[name]
            )
            assert flags._normalized(value, _action(name)) == default


def defaults_for(base_model: str | None) -> dict:
    return flags._defaults({"pretrained_model_name_or_path": base_model})


def _action(name: str):
    return next(action for action in script.build_parser()._actions if action.dest == name)


def test_every_flag_of_the_script_is_offered_or_left_out_on_purpose():
    names = {action.dest for action in script.build_parser()._actions}
    assert names == FIELDS.keys() | set(flags.NOT_OFFERED)
    assert [field.name for field in fields()[: len(flags.BASIC)]] == list(flags.BASIC)
    assert all(field.help and "%(" not in field.help for field in FIELDS.values() if field.name != "variant")


def test_defaults_are_those_of_the_base_model_and_left_out_of_the_command():
    assert defaults_for(None)["resolution"] == [128] == defaults_for("mini-sd")["resolution"]
    assert defaults_for("owner/model")["resolution"] == [512] and defaults_for("owner/model")["max_train_steps"] == 1200
    assert command(defaults_for(None)) == list(LAUNCH)
    assert command({"max_train_steps": 1200}) == [*LAUNCH, "--max_train_steps", "1200"]
    assert command({"max_train_steps": 300.0, "method": "delora", "seed": "  ", "rank": None}) == list(LAUNCH)
    assert command({"pretrained_model_name_or_path": "owner/model", "max_train_steps": 1200})[3:] == [
        "--pretrained_model_name_or_path",
        "owner/model",
    ]


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("default: 16", ""),
        ("side in pixels; with several, at each; default: 512", "side in pixels; with several, at each"),
        ("default: adamw; docs/optimizers.md compares them", "docs/optimizers.md compares them"),
        ("of a GPU; default: off; slower", "of a GPU; slower"),
        ("a copy of the start (default), or B = 0", "a copy of the start (default), or B = 0"),
    ],
)
def test_a_form_that_shows_a_default_does_not_name_another(text, without):
    assert flags.without_default(text) == without


def test_what_the_script_would_use_depends_on_the_method():
    assert effective({})["learning_rate"] == 1e-2 and effective({"method": "lora"})["learning_rate"] == 6e-4
    assert effective({"resolution": "256 128"})["resolution"] == [128, 256]
    paper = effective({"recipe": "paper"})
    assert paper["learning_rate"] == 1e-2 and paper["relative_bound"] == 0.35


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": "many"}, "--rank 'many' is not a whole number"),
        ({"rank": 2.5}, r"--rank '2\.5' is not a whole number"),
        ({"rank": 0}, "--rank: 0 is less than 1"),
        ({"learning_rate": "fast"}, "--learning_rate 'fast' is not a number"),
        ({"learning_rate": float("nan")}, "--learning_rate nan is not between"),
        ({"method": "<b>"}, "--method '<b>' is not one of delora, lora"),
        ({"random_flip": "perhaps"}, "--random_flip is 'perhaps'; choose yes or no"),
        ({"cuda_graph": "perhaps"}, "--cuda_graph is 'perhaps'; choose yes or no"),
        ({"instance_prompt": "a\0b"}, "contains characters that a command cannot have"),
        ({"instance_prompt": "a\ud800b"}, "contains characters that a command cannot have"),
        ({"validation_prompt": ["a", "--push_to_hub"]}, "'--push_to_hub' would be read as a flag"),
        ({"resolution": "100"}, "--resolution 100 is not a multiple of 8; use 96"),
        ({"keep_best": "loss"}, "--keep_best loss needs held-out photos"),
        ({"pretrained_model_name_or_path": "owner/model"}, "no photos were given"),
        ({"instance_data_dir": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_bad_values_are_refused_with_the_script_s_sentence(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        check(values | {"output_dir": tmp_path / "out"})


def test_a_flag_in_a_value_stays_a_value(tmp_path):
    words = command({"instance_prompt": "--push_to_hub", "validation_prompt": ["-x"], "hub_token": "secret"})
    args = script.build_parser().parse_args(words[len(LAUNCH) :])
    assert args.instance_prompt == "--push_to_hub" and args.validation_prompt == ["-x"]
    assert not args.push_to_hub and args.hub_token is None


def test_the_photos_are_checked_as_the_script_does(photographs, tmp_path):
    with pytest.raises(InputError, match="--instance_prompt"):
        check({"instance_data_dir": photographs, "output_dir": tmp_path / "out"})
    check({"instance_data_dir": photographs, "output_dir": tmp_path / "out", "instance_prompt": "a sks toy"})


def test_the_line_that_is_shown_can_be_pasted_and_is_relative_to_the_repository():
    words = command({"output_dir": flags.ROOT / "runs" / "a b", "instance_prompt": "a <b>'toy'</b> $HOME"})
    assert shown(words) == (
        "accelerate launch train_dreambooth_delora.py --instance_prompt "
        """'a <b>'"'"'toy'"'"'</b> $HOME' --output_dir 'runs/a b'"""
    )
    assert shown(["--output_dir=/elsewhere/a"]) == "--output_dir=/elsewhere/a"
