"""`grade doctor`: complete, machine-readable, and never stuck on the network."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from grade import cli
from grade.commands import doctor


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def online(monkeypatch):
    """The hub may be asked, with no proxy between the test and this machine."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_json_has_everything(offline, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    import torch

    assert report["versions"]["torch"] == torch.__version__
    assert set(doctor.PACKAGES) <= set(report["versions"]) and "python" in report["versions"]
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert report["hub"]["reachable"] is None
    assert {"hub cache", "datasets cache", "triton cache"} <= set(report["caches"])
    assert bool(report["devices"]) == torch.cuda.is_available()
    for backends in report["kernels"].values():
        assert backends["cpu"] in ("torch", "triton")


def test_every_public_kernel_is_listed(offline):
    kernels = pytest.importorskip("grade_kernels")
    report = doctor.examine()
    for name in "gumbel_topk soft_embedding logits_kl token_logprob vocab_head soft_token_vjp".split():
        assert name in kernels.__all__ and name in report["kernels"]
    assert not {"backend_for", "SparseTokens"} & set(report["kernels"])


def test_tables_are_printed(offline, capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("versions", "devices", "kernels", "torch", "transformers", "offline mode"):
        assert word in shown


def test_backend_that_cannot_run_is_a_problem_not_a_crash(offline, monkeypatch):
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "nonsense")
    report = doctor.examine()
    assert all(backends["cpu"] == "none" for backends in report["kernels"].values())
    assert any("GRADE_KERNELS_BACKEND" in problem for problem in report["problems"])


def test_missing_package_says_how_to_install_it(offline, monkeypatch):
    found = doctor.metadata.version

    def version(name):
        if name == "peft":
            raise doctor.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    report = doctor.examine()
    assert report["versions"]["peft"] is None
    assert "peft is missing: pip install peft" in report["problems"]


class _Answer(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status, reachable", [(200, True), (503, False)])
def test_hub_that_answers(online, monkeypatch, status, reachable):
    handler = type("Handler", (_Answer,), {"status": status})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        answer = doctor.check_hub()
    finally:
        server.shutdown()
        server.server_close()
    assert answer["reachable"] is reachable
    assert reachable or "503" in answer["detail"]


def test_hub_that_hangs_is_given_up(online, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        answer = doctor.check_hub(timeout=0.3)
        assert time.monotonic() - start < 2
    assert answer["reachable"] is False


def test_hub_that_refuses_is_a_problem(online, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    report = doctor.examine()
    assert report["hub"]["reachable"] is False
    assert any("hub is not reachable" in problem for problem in report["problems"])
