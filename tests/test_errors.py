"""Files that cannot be written: words that name the setting, the file, the reason and the fix."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from grade.errors import GradeError, writing

FULL = Path("/dev/full")


@pytest.mark.parametrize(
    "error, reason, fix",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", "Make room on its disk, or name"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded", "Make room on its disk, or name"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", "Name"),
        (OSError("nothing but words\nand more"), "nothing but words", "Name"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space left on device (os error 28)",
            "Make room on its disk, or name",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "unexpected pos 576 vs 534",
            "Make room on its disk, or name",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failed_write_is_told_in_words(error, reason, fix):
    with pytest.raises(GradeError) as caught, writing(Path("runs/a/b.json"), "output_dir"):
        raise error
    message = str(caught.value)
    assert message.startswith("output_dir: runs/a/b.json could not be written (") and "\n" not in message
    assert reason in message and message.endswith(f"{fix} another folder with output_dir.")


def test_the_fix_of_the_caller_stands_instead():
    words = r"\(No space\)\. Continue later\.$"
    with pytest.raises(GradeError, match=words), writing(Path("x"), "a", "Continue later."):
        raise OSError(errno.ENOSPC, "No space")


@pytest.mark.parametrize("error", [GradeError("its own words: I/O error"), RuntimeError("a mistake"), KeyError("a")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, writing(Path("x"), "output_dir"):
        raise error
    assert caught.value is error


@pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full here")
def test_a_full_disk_is_told_in_words():
    with pytest.raises(GradeError, match="output_dir: /dev/full could not be written .No space left on device"):
        with writing(FULL, "output_dir"):
            FULL.write_text("x" * 100_000)


def test_torch_into_a_missing_folder_is_told_in_words(tmp_path):
    with pytest.raises(GradeError, match="output_dir: .*state.pt could not be written"):
        with writing(tmp_path / "none" / "state.pt", "output_dir"):
            torch.save({"a": torch.zeros(2)}, tmp_path / "none" / "state.pt")
