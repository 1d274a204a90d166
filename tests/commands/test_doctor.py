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
    monkeypatch.setenv("GRADE_KERNELS_CPU_PRODUCTS", "blas")
    report = doctor.examine()
    assert all(backends["cpu"] == "none" for backends in report["kernels"].values())
    for variable in ("GRADE_KERNELS_BACKEND", "GRADE_KERNELS_CPU_PRODUCTS"):
        assert any(variable in problem for problem in report["problems"])


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


def listening(status):
    """A server that answers with this status."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize("status, reachable, said", [(200, True, "127.0.0.1"), (503, False, "503")])
def test_hub_that_answers(online, monkeypatch, status, reachable, said):
    with listening(status) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        answer = doctor.check_hub()
        server.shutdown()
    assert answer["reachable"] is reachable and said in answer["detail"]


@pytest.mark.parametrize("hangs", [True, False])
def test_hub_that_does_not_answer_is_given_up_and_a_problem(online, monkeypatch, hangs):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            listener.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        answer = doctor.check_hub(timeout=0.3)
        assert time.monotonic() - start < 2
        report = {} if hangs else doctor.examine()
    assert answer["reachable"] is False
    assert hangs or any("hub is not reachable" in problem for problem in report["problems"])
