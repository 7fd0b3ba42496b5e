"""Text files as people write them, in one reader: encodings, line ends, JSON lines and YAML."""

import argparse
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.benchmark import load_benchmark
from data.palettes import read_palette
from data.photographs import find_photographs
from delora_diffusers.commands.generate_requests import read_prompts
from delora_diffusers.errors import InputError, printable
from delora_diffusers.image_files import read_caption
from delora_diffusers.json_lines import GENERATED, LineFormat, read_json_lines, write_json_lines
from delora_diffusers.names import is_folder_name, stays_inside
from delora_diffusers.text_files import as_bool, as_int, decode, read_json, read_lines, read_text, read_yaml
from tests.helpers import write_photos

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]))


@given(texts, st.booleans(), st.sampled_from(["\n", "\r\n", "\r"]))
def test_utf_8_is_read_with_any_mark_and_line_ends(tmp_path_factory, text, mark, end):
    file = tmp_path_factory.getbasetemp() / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" * mark + f"first{end}{text}{end}".encode())
    assert read_text(file) == f"first\n{text}\n"


@given(texts, st.sampled_from(["cp1252", "utf-16", "utf-16-le", "utf-32", "shift_jis", "gb18030", "koi8-r"]))
def test_other_encodings_are_refused_with_the_byte(text, encoding):
    content = text.encode(encoding, "ignore")
    try:
        expected = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        expected = "\0"
    if "\0" in expected:
        with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text \(byte 0x[0-9a-f]{2} at position \d+\)"):
            decode(content, "a.txt")
    else:
        assert decode(content, "a.txt") == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_separate_lines(tmp_path, separator):
    file = tmp_path / "lines"
    text = f"a{separator}b"
    file.write_text(f"\n{text}\r\n\n  c  \n", newline="")
    assert read_lines(file) == [(2, text), (4, "c")]
    write_json_lines(file, [{"file_name": "x.png", "prompt": text}])
    assert read_json_lines(file, GENERATED) == [(1, {"file_name": "x.png", "prompt": text})]


def test_every_reader_accepts_a_byte_order_mark(tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    mark = "\ufeff"
    (photos / "00.txt").write_text(f"{mark}a dog\r\n", newline="")
    (tmp_path / "prompts").write_text(f"{mark}# two\r\na dog\r\na cat\r\n", newline="")
    (tmp_path / "palette").write_text(f"{mark}1 2 3\r\n#0a0b0c\r\n", newline="")
    (tmp_path / "json").write_text(mark + "{}")
    shipped = load_benchmark("toybox")
    (tmp_path / "b.yaml").write_text(
        mark
        + "images_per_prompt: 2\nprompts: {live: ['a {identifier} {class}']}\nsubjects: {no: {class: on, kind: live}}\n"
    )
    assert find_photographs(photos)[0].caption == "a dog"
    assert read_prompts(argparse.Namespace(prompt=None, prompts_file=tmp_path / "prompts")) == ["a dog", "a cat"]
    assert read_palette(str(tmp_path / "palette")).tolist() == [[1, 2, 3], [10, 11, 12]]
    assert read_json(tmp_path / "json") == {}
    subject = load_benchmark(tmp_path / "b.yaml").subjects[0]
    assert (subject.name, subject.class_name) == ("no", "on") and shipped.subjects


@pytest.mark.parametrize("value", ["5", "null", "[1]", '{"a": 1}', "true", '"\\ud800"'])
def test_only_text_is_taken_for_text(tmp_path, value):
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "a.png", "prompt": "fine"}\n' + f'{{"file_name": "a.png", "prompt": {value}}}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl line 2 is not a record like .*its prompt is"):
        read_json_lines(file, GENERATED)


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a/../../x.png", "\\x.png", "C:\\x.png", "c:/x.png", "..\\x.png", "", ".."]
)
def test_a_file_that_a_line_names_must_be_inside_the_folder(tmp_path, name):
    assert not stays_inside(name)
    for line_format, key in ((GENERATED, "file_name"), (LineFormat((), ("map",), ""), "map")):
        (tmp_path / "m").write_text(json.dumps({"file_name": "a.png", "prompt": "p"} | {key: name}))
        with pytest.raises(InputError, match=f"its {key} is"):
            read_json_lines(tmp_path / "m", line_format)


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b.png", "C:", "~"]), max_size=5), st.sampled_from("/\\"))
def test_a_path_that_stays_inside_never_leaves(parts, separator):
    import os

    path = separator.join(parts)
    if stays_inside(path):
        assert os.path.normpath(os.path.join("/root/folder", path.replace("\\", "/"))).startswith("/root/folder")


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "/x", "..", ".", "", ".base", "a\nb", "a\x1b[1m", "x" * 101])
def test_a_subject_must_be_able_to_name_a_folder(tmp_path, name):
    assert not is_folder_name(name)
    file = tmp_path / "b.yaml"
    content = {"prompts": {"live": ["a {identifier} {class}"]}, "subjects": {name: {"class": "dog", "kind": "live"}}}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot name a folder"):
        load_benchmark(file)


@settings(deadline=None)
@given(
    st.one_of(
        st.sampled_from(["no", "No", "NO", "off", "yes", "on", "y", "n", "true", "~x", "010", "0o17", "0x1F"]),
        st.sampled_from(["1_000", "1:30", "2026-01-02", ".5", "1e-4", "+1", ".inf", "="]),
        st.dates().map(str),
        st.integers().map(str),
        st.floats(allow_nan=False).map(repr),
    )
)
def test_a_yaml_scalar_is_what_was_typed(tmp_path_factory, scalar):
    file = tmp_path_factory.getbasetemp() / "scalar.yaml"
    file.write_text(f"key: {scalar}\nlist: [{scalar}]\n")
    assert read_yaml(file) == {"key": scalar, "list": [scalar]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice"),
        ("[" * 5000, "nested too deeply"),
        ("a: [1", "is not valid YAML"),
        ("a: !!int x", "is not valid YAML"),
        ("a: !!timestamp 2026-13-45", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [x]", "is not valid YAML"),
        ("a: &x [*x]\n\x07", "is not valid YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "x.yaml")


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")


def test_null_is_none_unless_it_is_quoted(tmp_path):
    (tmp_path / "x.yaml").write_text("a: null\nb: ~\nc:\nd: 'null'\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": None, "b": None, "c": None, "d": "null"}


def test_conversions():
    assert [as_bool(text) for text in ("yes", "Off", "false", "TRUE", "maybe")] == [True, False, False, True, None]
    assert [as_int(text) for text in ("010", "-3", "+3")] == [10, -3, 3]
    assert not any(map(as_int, ("0x1", "1e3", "", "9" * 30, True, None)))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("center_crop: 'false'", {"center_crop": False}),
        ("center_crop: off", {"center_crop": False}),
        ("center_crop: YES", {"center_crop": True}),
        ("cuda_graph: no", {"cuda_graph": False}),
        ("cuda_graph: null", {"cuda_graph": None}),
        ("instance_prompt: 2026-01-02", {"instance_prompt": "2026-01-02"}),
        ("hub_model_id: 010", {"hub_model_id": "010"}),
        ("instance_prompt: -starts with a dash", {"instance_prompt": "-starts with a dash"}),
        ("report_to: none", {"report_to": "none"}),
        ("validation_prompt: [yes, 'a: b', 3]", {"validation_prompt": ["yes", "a: b", "3"]}),
        ("validation_prompt: one", {"validation_prompt": ["one"]}),
        ("validation_prompt: []", {"validation_prompt": []}),
        ("learning_rate: 1e-4\nseed: 7", {"learning_rate": 1e-4, "seed": 7}),
    ],
)
def test_a_configuration_file_means_what_flags_mean(tmp_path, text, flags):
    from train_dreambooth_delora import parse_arguments

    (tmp_path / "c.yaml").write_text(text)
    args = parse_arguments(["--config", str(tmp_path / "c.yaml")])
    assert {name: getattr(args, name) for name in flags} == flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("center_crop: maybe", "sets center_crop to 'maybe'; write true or false"),
        ("rank: [1, 2]", r"sets rank to \['1', '2'\]; give one value"),
        ("rank: {a: 1}", "sets rank to .*; give one value"),
        ("validation_prompt: [[a]]", "sets validation_prompt to .*; give values"),
        ("5", "is not a mapping"),
        ("1: 2", "sets '1', which is not a flag"),
    ],
)
def test_a_configuration_file_that_is_refused(tmp_path, text, message):
    from train_dreambooth_delora import parse_arguments

    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse_arguments(["--config", str(tmp_path / "c.yaml")])


@given(st.text())
def test_an_error_message_never_controls_a_terminal(text):
    message = str(InputError(f"the name {text} is bad"))
    assert "\n" not in message and "\x1b" not in message and "\u202e" not in message
    assert message.replace("\u200d", "").isprintable() or " " in message
    assert printable(printable(text)) == printable(text)


def test_two_caption_files_must_agree(tmp_path):
    image = tmp_path / "a.jpg"
    (tmp_path / "a.caption").write_text("a cat")
    assert read_caption(image) == "a cat"
    (tmp_path / "a.TXT").write_text("a cat")
    assert read_caption(image) == "a cat"
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(InputError, match=r"give a\.jpg different captions"):
        read_caption(image)
