"""A stand-in for a vLLM server: its HTTP interface, as far as training uses it, with a tiny model that samples.

Written after vLLM 0.32: names of fields, statuses and messages are the same. It samples token by token, by plain torch,
so that what it reports is computed otherwise than the trainer computes it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import load_peft_weights, set_peft_model_state_dict


class StandIn:
    """Serves `policy`'s model, whose adapter it changes.

    Attributes:
        faults: what goes wrong with the next completions, one each; names of `Handler.FAULTS`.
        asked: (model, prompt, seed) of every completion that was answered rightly.
        answers: (prompt, token ids) by seed, of the last completion with it.
        loaded: the adapters it has, by name.
        mode: of its log-probabilities, "raw", "processed" or "logits".
        offset: added to every log-probability that it reports.
        key: that it asks for.
        before: called with every request's path before it is answered.
    """

    def __init__(self, policy, *, context=64, mode="raw"):
        self.policy, self.context, self.mode, self.offset = policy, context, mode, 0.0
        self.loaded: dict[str, dict] = {}
        self.asked: list[tuple[str, tuple[int, ...], int]] = []
        self.answers: dict[int, tuple[list[int], list[int]]] = {}
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.faults: deque[str] = deque()
        self.key, self.takes_adapters, self.before = None, True, lambda path: None
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Begin to listen, always on the same port, with no adapters, as after a start."""
        stand_in = self

        class Own(Handler):
            owner = stand_in

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Own)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.loaded.clear()
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    @torch.no_grad()
    def sample(self, body):
        """(token ids, log-probabilities, those of the two best tokens at the first position)."""
        model, generator = self.policy.model, torch.Generator().manual_seed(body["seed"])
        set_peft_model_state_dict(model, self.loaded[body["model"]])
        tokens, logprobs, best = [], [], []
        while len(tokens) < body["max_tokens"]:
            with self.policy.state(adapters=True):
                logits = self.policy.causal_lm(torch.tensor([body["prompt"] + tokens])).logits[0, -1].double()
            masked = logits.clone()
            for token, bias in body.get("logit_bias", {}).items():
                masked[int(token)] += bias
            if len(tokens) < body["min_tokens"]:
                masked[body["stop_token_ids"]] = -torch.inf
            masked[masked < masked.topk(body["top_k"]).values[-1]] = -torch.inf
            token = int(torch.multinomial(masked.softmax(-1), 1, generator=generator))
            values = {"raw": logits.log_softmax(-1), "processed": masked.log_softmax(-1), "logits": logits}[self.mode]
            values = values.clamp_min(-9999.0) + self.offset
            tokens.append(token)
            logprobs.append(float(values[token]))
            best.append({f"token_id:{int(i)}": float(values[i]) for i in values.topk(2).indices})
            if token in body["stop_token_ids"]:
                break
        return tokens, logprobs, best


class Handler(BaseHTTPRequestHandler):
    """One request."""

    owner: StandIn
    protocol_version = "HTTP/1.1"
    FAULTS = {
        "500": lambda answer: None,
        "500 in LoRA": lambda answer: None,
        "drop": lambda answer: None,
        "torn": lambda answer: None,
        "slow": lambda answer: None,
        "html": lambda answer: None,
        "forget": lambda answer: None,
        "stale": lambda answer: answer.update(model="grade-another-3"),
        "no choices": lambda answer: answer.update(choices=[]),
        "two choices": lambda answer: answer.update(choices=answer["choices"] * 2),
        "another prompt": lambda answer: answer["choices"][0].update(prompt_token_ids=[1]),
        "no ids": lambda answer: answer["choices"][0].pop("token_ids"),
        "unknown id": lambda answer: answer["choices"][0]["token_ids"].__setitem__(0, 10**6),
        "cut": lambda answer: answer["choices"][0].update(
            token_ids=answer["choices"][0]["token_ids"][:1], logprobs={"token_logprobs": [-1.0]}
        ),
        "no logprobs": lambda answer: answer["choices"][0].update(logprobs=None),
        "too many digits": lambda answer: answer["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, 10**400),
        "words as ids": lambda answer: answer["choices"][0]["token_ids"].__setitem__(0, "5"),
        "a huge id": lambda answer: answer["choices"][0]["token_ids"].__setitem__(0, 10**30),
        "infinite": lambda answer: answer["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, float("nan")),
    }

    def log_message(self, *arguments):
        return None

    def give(self, status, content, *, raw=False):
        data = content if raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status, message):
        self.give(status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})

    def allowed(self):
        owner = self.owner
        owner.headers.append(dict(self.headers))
        owner.before(self.path)
        if owner.key is not None and self.headers.get("Authorization") != f"Bearer {owner.key}":
            self.give(401, {"error": "Unauthorized"})
            return False
        return True

    def do_GET(self):
        if not self.allowed():
            return
        models = [{"id": "base", "parent": None, "max_model_len": self.owner.context}]
        models += [{"id": name, "parent": "base", "max_model_len": None} for name in self.owner.loaded]
        self.give(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        paths = {"/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload}
        if self.path == "/v1/completions":
            self.complete(body)
        elif self.path in paths and self.owner.takes_adapters:
            paths[self.path](body)
        else:
            self.give(404, {"detail": "Not Found"})

    def load(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.owner.loaded:
            self.error(
                400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in ..."
            )
        elif not (folder / "adapter_config.json").is_file():
            self.error(500, f"Worker failed with error 'Loading lora {name} failed: No adapter found for {folder}'")
        else:
            self.owner.loaded[name] = load_peft_weights(str(folder), device="cpu")
            self.give(200, b"Success: LoRA adapter added successfully.", raw=True)

    def unload(self, body):
        if self.owner.loaded.pop(body["lora_name"], None) is None:
            self.error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        else:
            self.give(200, b"Success: LoRA adapter removed successfully.", raw=True)

    def complete(self, body):
        owner = self.owner
        with owner.lock:
            fault = owner.faults.popleft() if owner.faults and body["max_tokens"] > 1 else ""
            if fault == "forget":
                owner.loaded.clear()
            if body["model"] not in owner.loaded:
                self.error(404, f"The model `{body['model']}` does not exist. Valid aliases: base.")
                return
            tokens, logprobs, best = owner.sample(body)
        if fault in ("500", "500 in LoRA"):
            self.error(500, f"EngineCore encountered an issue{fault.removeprefix('500')}.")
            return
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "html":
            self.give(200, b"<html>a page</html>", raw=True)
            return
        if fault == "slow":
            time.sleep(1.0)
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": best},
            "finish_reason": "stop",
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
        }
        answer = {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
        if fault:
            self.FAULTS[fault](answer)
        elif body["max_tokens"] > 1:
            owner.asked.append((body["model"], tuple(body["prompt"]), body["seed"]))
            owner.answers[body["seed"]] = body["prompt"], tokens
            owner.bodies.append(body)
        if fault == "torn":
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.give(200, answer)
