"""Files and folders appear whole, with usual permissions, and what a killed process left is cleared."""

import multiprocessing
import os
import stat

import pytest
from PIL import Image
from safetensors.numpy import save_file

from delora_diffusers.atomic import atomic_folder, atomic_write, remove_parts, write_text
from delora_diffusers.errors import InputError
from delora_diffusers.locking import locked_folder, locked_folders
from delora_diffusers.outputs import check_new, check_run_folder, check_writable


@pytest.fixture
def dead_process() -> int:
    """The number of a process that has ended."""
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    return process


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, umask):
    import numpy as np

    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"x": np.zeros(2, np.float32)}, temporary)
        write_text(tmp_path / "b.txt", "b")
        with atomic_write(tmp_path / "c.png") as temporary:
            Image.new("RGB", (2, 2)).save(temporary, format="PNG")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "b.txt", "c.png"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name


def test_a_failure_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "old")
    for error, raised in ((OSError(28, "No space left on device"), InputError), (KeyError("x"), KeyError)):
        with pytest.raises(raised), atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error
        with pytest.raises(raised), atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "half").write_text("half")
            raise error
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path, dead_process):
    leftover, living = f".a.{dead_process}.part", f".a.{os.getppid()}.part"
    for name in (leftover, living, ".b.1.part", ".a.x.part", f".other.{dead_process}.part"):
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "a", "whole")
    assert not (tmp_path / leftover).exists()
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["a", living, ".b.1.part", ".a.x.part", f".other.{dead_process}.part"]
    )
    (tmp_path / f".folder.{dead_process}.part" / "sub").mkdir(parents=True)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "x").write_text("x")
    assert not (tmp_path / f".folder.{dead_process}.part").exists() and (tmp_path / "folder" / "x").is_file()


def test_all_leftovers_of_a_held_folder_are_removed(tmp_path):
    for name in (".a.1.part", "sub/.b.2.part", ".checkpoint-3.part/model", "kept.part", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_parts(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".hidden", "kept.part", "sub"]


def hold(folder, ready, release) -> None:
    with locked_folder(folder):
        ready.set()
        release.wait(60)


@pytest.mark.integration
def test_one_process_at_a_time_holds_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready, release))
    process.start()
    assert ready.wait(60)
    with (
        pytest.raises(InputError, match="another run is writing to .*out; wait until it ends"),
        locked_folder(tmp_path / "out"),
    ):
        pass
    with locked_folder(tmp_path / "elsewhere"):
        pass
    process.kill()  # a killed run holds nothing
    process.join()
    with locked_folder(tmp_path / "out"):
        (tmp_path / "out" / "result").write_text("x")
    assert os.listdir(tmp_path) == ["out"], "an empty folder that was created for the lock is removed"


def test_a_folder_is_held_once_even_if_it_is_given_twice(tmp_path):
    with locked_folders([tmp_path / "a", tmp_path / "b" / ".." / "a"]):
        assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a").exists()


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--output .*file already exists"):
        check_new(tmp_path / "file", "--output")
    with pytest.raises(InputError, match=r"--output_dir .* cannot be written: .*file is a file"):
        check_writable(tmp_path / "file" / "below", "--output_dir")
    with pytest.raises(InputError, match="is a file; give a folder"):
        check_run_folder(tmp_path / "file", None)
    check_run_folder(tmp_path / "new" / "deep", None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"cannot be written: .* is read-only for you"):
        check_run_folder(tmp_path / "new", None)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_with_leftovers_only_is_empty(tmp_path):
    (tmp_path / ".config.json.7.part").write_text("x")
    check_run_folder(tmp_path, None)
    (tmp_path / ".dotfile").write_text("x")
    with pytest.raises(InputError, match="contains files that are not of a run"):
        check_run_folder(tmp_path, None)
