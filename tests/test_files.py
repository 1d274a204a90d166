"""Files that are always whole: every moment at which a process can be killed has its turn."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import two_kills
from two_kills import version_of, write

from grade.errors import GradeError
from grade.files import check_writable, locked, replace_text, replaced_folder, sha256


def test_a_folder_survives_two_kills_at_any_two_moments(tmp_path):
    """A first one while version 2 is written over version 1, a second one while version 3 is."""
    program = [sys.executable, two_kills.__file__, str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(program, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "moments" in done.stdout, done.stderr


def test_an_error_leaves_what_was_there(tmp_path):
    folder = tmp_path / "last"
    write(folder, "1")
    with pytest.raises(ZeroDivisionError), replaced_folder(folder) as fresh:
        (fresh / "a").write_text("2")
        raise ZeroDivisionError
    assert version_of(folder) == "1" and [path.name for path in tmp_path.iterdir()] == ["last"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with replaced_folder(tmp_path / "last") as fresh:
            (fresh / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "last" / "private").stat().st_mode & 0o777 == 0o644


def test_a_file_keeps_its_content_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    replace_text(path, "before")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_hash_follows_the_content(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    path.write_bytes(b"abd")
    os.utime(path, ns=(1, 1))
    assert sha256(path) != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_lock_is_held_once_and_released(tmp_path):
    with locked(tmp_path / "lock", "output_dir", "in use"):
        with pytest.raises(GradeError, match="in use"), locked(tmp_path / "lock", "output_dir", "in use"):
            pass
    with locked(tmp_path / "lock", "output_dir", "in use"):
        pass


def test_writability_is_found_out_without_a_trace(tmp_path):
    check_writable("output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(GradeError, match="output_dir.*cannot be written"):
        check_writable("output_dir", tmp_path / "file" / "below")
