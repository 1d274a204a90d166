"""A vLLM server as an engine: its run-time loading of LoRA adapters, and completions of token ids.

The server is started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. Every request names the version of
the adapter as its model, and every answer must name the same. What a completion is drawn from is said in full, since a
server's defaults come from the model's generation_config.json: temperature 1 among the top_k candidates, no penalties,
and end-of-sequence not before min_new_tokens (vLLM's min_tokens counts the tokens before it, so it is one less).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grade.config import Config, GenerationConfig, RolloutConfig
from grade.errors import RolloutFailed, present
from grade.model.policy import Policy
from grade.sampling.engine import Away, Failing, Forgotten, Request, Sampled, Version
from grade.sampling.http_json import Answer, Broken, JsonServer, Unreachable

KEY = "VLLM_API_KEY"
"""The environment variable with the server's key."""
_START = (
    "Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment and the options --enable-lora and "
    "--max-lora-rank."
)
_NEVER = -9998.0  # vLLM writes -9999 for a log-probability of minus infinity
_MOST_SUPPRESSED = 4096  # ids in the bias of every request


class VllmServer:
    """Implements `grade.sampling.engine.Engine`.

    Args:
        url: rollout.url.
        suppressed: ids that may not be sampled.
        ends: ids that end a response.
        theirs: the folder of the versions by the server's name for it; None: by ours.
        timeout: seconds of silence in an answer.

    Raises:
        RolloutFailed: there are more suppressed ids than can be sent with every request, or the key cannot be sent.
    """

    def __init__(
        self,
        url: str,
        generation: GenerationConfig,
        *,
        suppressed: Sequence[int],
        ends: Sequence[int],
        theirs: str | None,
        timeout: float,
    ) -> None:
        self.where = f"rollout.url={url}"
        self.processed = False
        self._server = JsonServer(url.rstrip("/").removesuffix("/v1"), key=_key(), timeout=timeout)
        self._theirs = theirs
        if len(suppressed) > _MOST_SUPPRESSED:
            raise RolloutFailed(
                f"rollout.engine=vllm: the model has {len(suppressed)} ids that its tokenizer does not know, and at "
                f"most {_MOST_SUPPRESSED} can be kept from being sampled there. Use rollout.engine here."
            )
        self._drawn: dict[str, Any] = {
            "max_tokens": generation.max_new_tokens,
            "min_tokens": 0 if generation.ignore_eos else max(generation.min_new_tokens - 1, 0),
            "ignore_eos": generation.ignore_eos,
            "stop_token_ids": [] if generation.ignore_eos else list(ends),
            "top_k": generation.top_k,
            "temperature": 1.0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "logprobs": 0,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if suppressed:
            self._drawn["logit_bias"] = {str(token): -100.0 for token in suppressed}

    def open(self, longest: int, prefix: str | None) -> None:
        content = self._good(self._ask(lambda: self._server.get("/v1/models")), "/v1/models")
        try:
            models: dict[str, Any] = {model["id"]: model for model in content["data"]}
            if not all(isinstance(name, str) for name in models):
                raise TypeError
            base = next(model for model in models.values() if not model.get("parent"))
        except (KeyError, TypeError, StopIteration, AttributeError):
            raise RolloutFailed(
                f"{self.where}: /v1/models is no list of models as vLLM gives it. Name a vLLM server."
            ) from None
        context = base.get("max_model_len")
        if isinstance(context, int) and context < longest:
            raise RolloutFailed(
                f"{self.where}: its context is {context} tokens, and prompt and response may have {longest} "
                f"(task.prompt_max_tokens + generation.max_new_tokens). Start it with --max-model-len {longest}, or "
                "lower one of them."
            )
        for name in models if prefix is not None else ():
            if name.startswith(present(prefix)):
                self.unload(Version(name, 0, Path()))

    def load(self, version: Version) -> None:
        folder = Path(self._theirs) / version.folder.name if self._theirs is not None else version.folder.absolute()
        body = {"lora_name": version.name, "lora_path": str(folder)}
        answer = self._ask(lambda: self._server.post("/v1/load_lora_adapter", body), adapters=True)
        if answer.status == 200 or (answer.status == 400 and "already been loaded" in answer.text):
            return
        said = _said(answer)
        if answer.status in (404, 405) and "adapter" not in said.lower():
            raise RolloutFailed(f"{self.where}: it does not take adapters while it runs ({said}). {_START}")
        if "found" in said.lower() or "no such file" in said.lower():
            raise RolloutFailed(
                f"{self.where}: it finds no adapter in {folder} ({said}). Both must see the folder: name one in "
                "rollout.adapter_dir, and in rollout.server_adapter_dir if it has another name there."
            )
        raise RolloutFailed(f"{self.where}: it does not take the adapter {version.name} ({said}). {_START}")

    def unload(self, version: Version) -> None:
        body = {"lora_name": version.name}
        self._ask(lambda: self._server.post("/v1/unload_lora_adapter", body), adapters=True)

    def observe(self, version: Version, prompt: list[int]) -> None:
        # Of one candidate, all others are impossible by the distribution that it draws from.
        body = {**self._drawn, "top_k": 1, "logprobs": 2, "max_tokens": 1, "min_tokens": 0, "seed": 0}
        choice = self._completed(version, prompt, body)
        try:
            found = list(choice["logprobs"]["top_logprobs"][0].values())
        except (KeyError, TypeError, IndexError, AttributeError):
            found = []
        if not found or not all(map(_is_number, found)):
            raise RolloutFailed(f"{self.where}: it gives no log-probabilities of other tokens. {_NEWER}")
        self.processed = min(found) <= _NEVER

    def complete(self, version: Version, request: Request) -> Sampled:
        choice = self._completed(version, request.prompt, {**self._drawn, "seed": request.seed})
        tokens, said = choice["token_ids"], choice.get("logprobs")
        logprobs: Any = said.get("token_logprobs") if isinstance(said, dict) else None
        if not isinstance(logprobs, list) or len(logprobs) != len(tokens) or not all(map(_is_number, logprobs)):
            raise RolloutFailed(f"{self.where}: it gave {len(tokens)} tokens without their log-probabilities. {_NEWER}")
        return Sampled(request.prompt, tokens, [float(value) for value in logprobs], version.step)

    def _completed(self, version: Version, prompt: list[int], body: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of an answer that is about the prompt, by the version that was asked."""
        path = "/v1/completions"
        answer = self._ask(lambda: self._server.post(path, {"model": version.name, "prompt": prompt, **body}))
        if answer.status == 404 and "does not exist" in answer.text:
            raise Forgotten
        content = self._good(answer, path)
        if content.get("model") != version.name:
            raise RolloutFailed(
                f"{self.where}: it answered as {content.get('model')!r} and not as {version.name!r}, which was asked: "
                "another policy's responses are not trained on. Name the vLLM server itself, without a router."
            )
        choices = content.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            count = len(choices) if isinstance(choices, list) else "no list of"
            raise RolloutFailed(f"{self.where}: it gave {count} choices where one was asked for. Name a vLLM server.")
        choice = choices[0]
        if "token_ids" not in choice or "prompt_token_ids" not in choice:
            raise RolloutFailed(f"{self.where}: its answer has no token ids. {_NEWER}")
        if choice["prompt_token_ids"] != prompt:
            raise RolloutFailed(
                f"{self.where}: it continued another prompt than the {len(prompt)} token ids that it was given. Name "
                "the vLLM server itself, without anything that rewrites requests."
            )
        tokens = choice["token_ids"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise RolloutFailed(f"{self.where}: its token ids are no list of whole numbers. {_NEWER}")
        return choice

    def _ask(self, question: Callable[[], Answer], *, adapters: bool = False) -> Answer:
        """An answer that is not the server's own failure.

        Args:
            adapters: it is asked to load or unload one, and reports what is wrong with that, such as its rank, as a
                failure of its own.
        """
        try:
            answer = question()
        except Unreachable as error:
            raise Away(str(error)) from None
        except Broken as error:
            raise Failing(str(error)) from None
        failed = answer.status >= 500 and not (adapters and "lora" in answer.text.lower())
        if failed or answer.status in (408, 425, 429):
            raise Failing(f"it answered {_said(answer)}")
        return answer

    def _good(self, answer: Answer, path: str) -> dict[str, Any]:
        """The object in an answer with status 200."""
        if answer.status in (401, 403):
            raise RolloutFailed(
                f"{self.where}: it refuses the key ({_said(answer)}). Put the server's key into the environment "
                f"variable {KEY}."
            )
        if answer.status != 200:
            raise RolloutFailed(f"{self.where}: {path} gave {_said(answer)}.")
        if not isinstance(answer.content, dict):
            raise RolloutFailed(
                f"{self.where}: {path} gave no JSON object but {answer.text[:80]!r}. Name a vLLM server."
            )
        return answer.content


def vllm_server(rollout: RolloutConfig, generation: GenerationConfig, policy: Policy) -> VllmServer:
    """The server that the settings name, for what this policy may sample."""
    return VllmServer(
        present(rollout.url),
        generation,
        suppressed=policy.suppressed.tolist(),
        ends=policy.eos_ids.tolist(),
        theirs=rollout.server_adapter_dir,
        timeout=rollout.timeout,
    )


def check_server(config: Config) -> None:
    """Refuse a server that cannot serve a run, before anything is loaded.

    Raises:
        RolloutFailed: it does not answer, is none of vLLM's, or its context is too short.
    """
    rollout, model = config.rollout, config.model
    if rollout.engine == "here":
        return
    server = VllmServer(
        present(rollout.url), config.generation, suppressed=(), ends=(), theirs=None, timeout=rollout.timeout
    )
    try:
        server.open(config.task.prompt_max_tokens + config.generation.max_new_tokens, None)
    except (Away, Failing) as error:
        raise RolloutFailed(
            f"{server.where}: no vLLM server answers there ({error}). Start one and wait until it does: "
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {model.name} --enable-lora --max-lora-rank "
            f"{least_rank(model.lora.r)}"
        ) from None


def least_rank(rank: int) -> int:
    """The least --max-lora-rank that vLLM takes and an adapter of this rank fits into."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), 512)


_NEWER = "Use vLLM 0.10.2 or newer."


def _key() -> str | None:
    """The server's key, without the line's end that a file of it has.

    Raises:
        RolloutFailed: a header of HTTP cannot hold it; the message does not either.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RolloutFailed(
            f"The environment variable {KEY} holds a character that no key can have. Set it to the server's key alone."
        )
    return key or None


def _is_number(value: object) -> bool:
    """Whether it is one that float can hold: JSON's whole numbers have any number of digits, and NaN is below none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _said(answer: Answer) -> str:
    """`HTTP 404: The model x does not exist.`, in one line."""
    content: Any = answer.content
    if isinstance(content, dict):
        content = content.get("error", content)
    if isinstance(content, dict):
        content = content.get("message") or content.get("detail") or content
    text = " ".join(str(answer.text if content is None else content).split())
    return f"HTTP {answer.status}: {text[:300]}" if text else f"HTTP {answer.status}"
