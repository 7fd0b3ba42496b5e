"""Names and paths that come from a browser stay in the workspace."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delora_diffusers.errors import InputError
from studio.workspace import Workspace, checked_name, open_workspace

HOSTILE = (
    *("", ".", "..", "../dog", "dog/..", "/etc", "C:\\dog", "C:dog", "dog\\cat", "dog/cat", "\\\\server\\share"),
    *(".hidden", "-rf", "--share", "dog.", "dog ", " dog", "dog\n", "dog\0", "dog\x1b[31m", "dog\u202egnp", "a" * 101),
    *(
        "<img src=x onerror=alert(1)>",
        "dog&amp;",
        'dog"',
        "dog'",
        "dog`",
        "$(reboot)",
        "dog;ls",
        "dog*",
        "nul",
        "Con.txt",
    ),
)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "studio")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["photo_set", "run", "output"])
def test_hostile_names_are_refused(workspace, kind, name):
    with pytest.raises(InputError, match="name"):
        getattr(workspace, kind)(name)


@pytest.mark.parametrize("name", ["dog", "my dog", "Käthes Hund 2", "犬", "run_1.5-lr+wd", "_", "a" * 100])
def test_ordinary_names_are_folders(workspace, name):
    assert workspace.photo_set(name) == workspace.root / "photos" / name
    workspace.run(name).mkdir()
    assert workspace.run_names() == [name]


@given(st.text(max_size=120))
def test_every_accepted_name_is_one_visible_part_of_a_path(name):
    try:
        checked_name(name)
    except InputError:
        return
    assert Path(name).parts == (name,) and name[0] not in ".-" and name.isprintable()
    assert not set(name) & set("/\\<>&\"'`:*?|\0") and len(name.encode()) <= 100


def test_links_that_leave_the_workspace_are_refused(workspace, tmp_path):
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "key.txt").write_text("secret")
    for parent, path_of in (("photos", workspace.photo_set), ("runs", workspace.run), ("outputs", workspace.output)):
        (workspace.root / parent / "link").symlink_to(outside)
        with pytest.raises(InputError, match="outside the workspace"):
            path_of("link")
    assert workspace.photo_sets() == workspace.run_names() == []
    for path in ("../secret/key.txt", outside / "key.txt", "photos/link/key.txt", "photos/../../secret", "a\0b"):
        with pytest.raises(InputError):
            workspace.within(path)


def test_links_inside_the_workspace_are_followed(workspace):
    workspace.run("first").mkdir()
    workspace.run("again").symlink_to(workspace.run("first"))
    assert workspace.within("runs/again/config.json") == workspace.run("first") / "config.json"
    assert workspace.within(workspace.run("again") / "..") == workspace.runs


def test_a_loop_of_links_is_no_path(workspace):
    (workspace.runs / "a").symlink_to(workspace.runs / "b")
    (workspace.runs / "b").symlink_to(workspace.runs / "a")
    assert workspace.run_names() == []


def test_a_part_of_the_workspace_that_is_a_link_out_is_refused(tmp_path):
    (tmp_path / "studio").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "studio" / "runs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside the workspace"):
        Workspace(tmp_path / "studio")


def test_a_workspace_may_itself_be_reached_by_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "studio")
    workspace = Workspace(tmp_path / "studio")
    assert workspace.within(tmp_path / "studio" / "runs" / "dog") == workspace.run("dog")


def test_a_file_is_no_workspace(tmp_path):
    (tmp_path / "studio").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        Workspace(tmp_path / "studio")


def test_the_first_start_has_photos_and_later_ones_leave_them_alone(tmp_path):
    workspace = open_workspace(tmp_path / "studio")
    files = sorted(path.name for path in workspace.photo_set("toy").iterdir())
    assert files == ["00.png", "01.png", "02.png", "03.png", "04.png"]
    workspace.photo_set("toy").rename(workspace.photo_set("mine"))
    assert open_workspace(tmp_path / "studio").photo_sets() == ["mine"]
