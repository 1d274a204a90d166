"""`grade push`: what is uploaded, and what is refused before anything is loaded; the hub is a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import RepoUrl

import grade.commands.push
from grade import cli


class Hub:
    """Takes the place of HfApi; `calls` are those of all its instances."""

    def __init__(self, failing: str | None = None):
        self.calls: list[tuple[str, dict]] = []
        self.failing = failing
        self.uploaded: set[str] = set()

    def __call__(self):
        return self

    def _call(self, name, **given):
        self.calls.append((name, given))
        if name == self.failing:
            raise RuntimeError(f"403 Forbidden: {name}")

    def whoami(self):
        self._call("whoami")

    def create_repo(self, repo, **given):
        self._call("create_repo", repo=repo, **given)
        return RepoUrl(f"https://huggingface.co/{repo if '/' in repo else 'me/' + repo}")

    def create_branch(self, repo, **given):
        self._call("create_branch", repo=repo, **given)

    def upload_folder(self, *, folder_path, **given):
        self.uploaded = {path.name for path in Path(folder_path).iterdir()}
        self._call("upload_folder", **given)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(grade.commands.push.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(grade.commands.push.huggingface_hub, "get_token", lambda: "a token")
    hub = Hub()
    monkeypatch.setattr(grade.commands.push, "HfApi", hub)
    return hub


def push(*arguments):
    return cli.main(["push", *map(str, arguments)])


def test_an_adapter_is_uploaded(trained_run, hub, capsys):
    assert push(trained_run, "tiny", "--private", "--checkpoint", "last") == 0
    (_, _), (_, created), (_, uploaded) = hub.calls
    assert created == {"repo": "tiny", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/tiny" and uploaded["revision"] is None
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= hub.uploaded
    assert not any(name.startswith("trainer_state") for name in hub.uploaded)
    out = capsys.readouterr().out
    assert "https://huggingface.co/me/tiny" in out and "nobody can load the adapter" in out  # its base is a folder


def test_what_is_said_is_the_runs_own_whatever_loads_it(trained_run, hub, capsys):
    assert push(trained_run, "tiny", "--name", "another", "--model.name", "some/model") == 0
    assert hub.calls[-1][1]["commit_message"] == "tiny, checkpoint best, by grade push"
    out = capsys.readouterr().out
    assert "nobody can load the adapter" in out and "some/model" not in out


def test_a_merged_model_is_uploaded_to_a_branch(trained_run, hub, capsys):
    assert push(trained_run, "me/tiny", "--merge", "--revision", "first") == 0
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "create_branch", "upload_folder"]
    assert hub.calls[2][1] == {"repo": "me/tiny", "branch": "first", "exist_ok": True}
    assert hub.calls[3][1]["revision"] == "first" and hub.calls[1][1]["private"] is False
    assert "model.safetensors" in hub.uploaded and "adapter_config.json" not in hub.uploaded
    out = capsys.readouterr().out
    assert "to the bit" in out and "nobody" not in out


def test_mistakes_are_told_before_anything_is_loaded(trained_run, hub, monkeypatch, capsys):
    monkeypatch.setattr(grade.commands.push, "write_export", None)

    def refused(words, *arguments):
        assert push(*arguments, "--merge") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1

    refused("REPO is missing", trained_run)
    refused("unexpected argument 'third'", trained_run, "me/x", "third")
    for name in ("a b", "me/x/y", "-x"):
        refused("is no name of a repository" if name[0] != "-" else "unknown option", trained_run, name)
    refused("holds no adapter", trained_run, "me/x", "--checkpoint", "step-1")
    assert hub.calls == []
    hub.failing = "whoami"
    refused("the hub does not let you in: 403 Forbidden", trained_run, "me/x")
    monkeypatch.setattr(grade.commands.push.huggingface_hub, "get_token", lambda: None)
    refused("there is no token", trained_run, "me/x")
    monkeypatch.setattr(grade.commands.push.constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", trained_run, "me/x")
    assert [name for name, _ in hub.calls] == ["whoami"]


@pytest.mark.parametrize("failing", ["create_repo", "upload_folder"])
def test_what_the_hub_refuses_is_told_in_words(trained_run, hub, capsys, failing):
    hub.failing = failing
    assert push(trained_run, "me/x") == 2
    assert f"REPO=me/x cannot be uploaded: 403 Forbidden: {failing}." in capsys.readouterr().err
