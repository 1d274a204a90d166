"""What is read runs no code, and names in it lead nowhere else."""

from __future__ import annotations

import ast
import json
import pickle
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from report_runs import VARIANCE, write_run

from grade.config import TaskConfig
from grade.config.reading import load_config
from grade.errors import GradeError
from grade.model.adapter import adapter_folder
from grade.model.checkpoint import verified_step

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("grade", "grade_kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
# What runs code that it reads, or may; and where it stands all the same, with the reason.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "unsafe_load", "full_load", "load_module"}
ALLOWED = {
    ("grade/model/pretrained.py", "pickle"): "the error that a refused pickle raises",
    ("grade/model/checkpoint.py", "pickle"): "the same",
    ("grade/rewards/function.py", "exec"): "a file of Python that reward.function names",
}


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def dangers(path: Path) -> set[str]:
    """Modules and calls that run what they read, and keywords that let others do so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.add(str(node.module))
        elif isinstance(node, ast.Call):
            name, owner = name_of(node.func), name_of(getattr(node.func, "value", ast.Constant(0)))
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            constants = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
            name = f"os.{name}" if owner == "os" else name
            if name in CALLS and not (name == "eval" and isinstance(node.func, ast.Attribute)):  # model.eval()
                found.add(name)
            if owner == "torch" and name == "load" and constants.get("weights_only") is not True:
                found.add("torch.load without weights_only=True")
            if owner == "yaml" and name in ("load", "load_all"):
                found.add("yaml.load")
            found |= {
                f"{key}=True" for key in ("allow_pickle", "shell", "trust_remote_code") if constants.get(key) is True
            }
    return found


def test_nothing_that_is_read_is_run():
    found = {(path.relative_to(ROOT).as_posix(), danger) for path in SOURCES for danger in dangers(path)}
    assert found - set(ALLOWED) == set()


def test_the_look_for_dangers_finds_them(tmp_path):
    text = (
        "import pickle, joblib\nfrom dill import loads\nimport torch, yaml, subprocess, numpy as np\n"
        "torch.load('x')\ntorch.load('x', weights_only=False)\nyaml.load('x', Loader=yaml.Loader)\neval('1')\n"
        "np.load('x', allow_pickle=True)\nsubprocess.run('x', shell=True)\nmodel.eval()\n"
    )
    (tmp_path / "x.py").write_text(text)
    torch_load = "torch.load without weights_only=True"
    expected = {"pickle", "joblib", "dill", torch_load, "yaml.load", "eval", "allow_pickle=True", "shell=True"}
    assert dangers(tmp_path / "x.py") == expected
    for (name, what), reason in ALLOWED.items():
        assert reason and what in dangers(ROOT / name)


class Evil:
    """A pickle that runs code where it is read without care."""

    def __reduce__(self):
        return (exec, ("import sys; sys.modules['evil_ran'] = sys",))


def test_a_pickle_as_an_adapter_runs_nothing(tmp_path):
    """peft reads adapter_model.bin where there is no safetensors file."""
    from tiny import tiny_policy

    from grade.model.checkpoint import load_adapter

    policy = tiny_policy()
    policy.model.save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(GradeError, match="its adapter is a pickle .* could run code. Save it as safetensors"):
        load_adapter(tmp_path, policy)
    assert "evil_ran" not in sys.modules


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "a/b", "a\\b", "a\0b", "", "x\n"])
def test_no_name_of_an_experiment_leaves_the_output_folder(name):
    with pytest.raises(GradeError, match="^name is"):
        load_config("demo", ["--name", name])


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    from benchmarks.damage import seal

    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "step": 1, "files": {name: "0"}, "sha256": ""}))
    seal(manifest)
    with pytest.raises(GradeError, match=f"names '{name}', which does not lie in"):
        verified_step(tmp_path)


def test_a_report_writes_into_its_output_folder_alone(tmp_path):
    """Whatever the files call methods, settings and lengths, of which figures and tables are named."""
    pytest.importorskip("matplotlib")
    from grade.commands.report import run_report

    escape = "../../../escaped"
    run = write_run(tmp_path / "runs" / "run", method=escape, settings={"name": escape, "task.name": escape})
    rows = [{**row, "length": escape, "top_k": escape, "method": escape} for row in VARIANCE["rows"]]
    (run / "variance.json").write_text(json.dumps({**VARIANCE, "rows": rows}), encoding="utf-8")
    before = {path for path in tmp_path.rglob("*")}
    page = run_report(run, tmp_path / "out")
    fresh = {path for path in tmp_path.rglob("*")} - before
    assert page in fresh and all(path.is_relative_to(tmp_path / "out") for path in fresh)
    assert "variance.json of run: rows[0].length is" in page.read_text(encoding="utf-8").replace("&#x27;", "'")


# -- the hub -------------------------------------------------------------------------------------------------

COMMIT = "0" * 40
ESCAPING = "adapter_model./../../../../../../escaped"


class Hub(BaseHTTPRequestHandler):
    """A hub whose repository lists a file that would lie outside of the cache."""

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self._answer(b"{}")

    def do_GET(self):
        listed = {"id": "some/adapter", "sha": COMMIT, "siblings": [{"rfilename": ESCAPING}]}
        listing = [{"type": "file", "path": ESCAPING, "oid": COMMIT, "size": 2}]
        self._answer(json.dumps(listing if "/tree/" in self.path else listed).encode())

    def _answer(self, content: bytes):
        self.send_response(200)
        for name, value in {
            "Content-Length": str(len(content)),
            "ETag": '"abc"',
            "X-Repo-Commit": COMMIT,
            "Content-Type": "application/json",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def test_names_of_the_hub_do_not_leave_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "a" / "b" / "cache"))
        with pytest.raises(GradeError, match="model.adapter=some/adapter"):
            adapter_folder("some/adapter")
    finally:
        server.shutdown()
        server.server_close()
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "a" / "b" / "cache")]
    assert outside == []


def test_a_data_set_of_a_task_that_is_a_path_is_not_asked_for_at_the_hub(tmp_path):
    from grade.tasks import load_task

    with pytest.raises(GradeError, match="there is no such folder"):
        load_task(TaskConfig(name="prompts", dataset="../nowhere"))
