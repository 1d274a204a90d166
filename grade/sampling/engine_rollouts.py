"""Training's responses from an engine that samples elsewhere, from the policy as it is at every step.

A step publishes the adapter under a name of its own, asks for its responses by that name, and makes a rollout of them
with the policy's own candidates (`grade.sampling.external`). With rollout.max_lag 1 the next step's responses are asked
for while this step learns, so that a step learns from the policy of the step before. What the engine says of its
probabilities is compared with the policy's, token by token.

The main process publishes, and every process asks for its own share.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from torch import Tensor

from grade.config import Config
from grade.errors import GradeError, RolloutFailed, present
from grade.model.checkpoint import write_adapter
from grade.model.policy import Policy
from grade.processes import everywhere, main_process_first, shared
from grade.rollout import Rollout
from grade.sampling.draw import Sampling, sampling_of
from grade.sampling.engine import Asking, Away, Engine, Failing, Patience, Request, Sampled, Version
from grade.sampling.external import Limits, Response, recreate_with_states
from grade.sampling.lines import StopAsked
from grade.sampling.mismatch import Mismatch, importance_weights, padded, policy_logprobs, together
from grade.sampling.vllm import vllm_server
from grade.seeds import derived_seed

T = TypeVar("T")

FOLDER = "rollout"
"""Of a run's folder, where versions of the adapter are written unless rollout.adapter_dir says otherwise."""
FORGETTING = 10.0
"""Seconds that an engine has at most to forget a version."""
_PROBES = 4  # responses that a session compares before its first step


def engine_rollouts(config: Config, policy: Policy, run_dir: Path, accelerator: Accelerator) -> EngineRollouts | None:
    """The engine that the settings name; None where responses are sampled here or come from a file."""
    if config.rollout.engine == "here":
        return None
    server = vllm_server(config.rollout, config.generation, policy)
    folder = run_dir / FOLDER if config.rollout.adapter_dir is None else Path(config.rollout.adapter_dir)
    return EngineRollouts(server, policy, config, folder, str(run_dir.absolute()), accelerator)


class EngineRollouts:
    """The engine of a run.

    Args:
        config: of the run.
        folder: where versions of the adapter are written.
        run: what tells the run from all others that use the engine.
    """

    def __init__(
        self, engine: Engine, policy: Policy, config: Config, folder: Path, run: str, accelerator: Accelerator
    ) -> None:
        self.engine, self.policy, self.config, self.folder = engine, policy, config, folder
        self._accelerator, self._steps = accelerator, config.train.steps
        settings, longest = config.rollout, config.task.prompt_max_tokens
        self._settings, self._longest = settings, longest + config.generation.max_new_tokens
        self._patience = Patience(settings.retries, settings.timeout, settings.concurrency)
        self._limits = Limits(policy, config.generation, longest)
        # A server keeps what it was given before a kill: no name of this session's was there before it.
        self._prefix = f"grade-{hashlib.sha256(run.encode()).hexdigest()[:8]}-"
        self._session = secrets.token_hex(4)
        self._version: Version | None = None
        self._ahead: tuple[int, Asking[Sampled]] | None = None  # a later step's responses
        self._found: tuple[int, list[Sampled]] | None = None  # a step's responses
        self._mismatch, self._lag, self._told = Mismatch(), 0, 0.0
        self._should_stop: Callable[[], bool] = lambda: False
        self._warn: Callable[[str], None] = lambda line: None

    # -- a session -------------------------------------------------------------------------------------------

    @contextmanager
    def running(
        self, step: int, prompts: Sequence[list[int]], should_stop: Callable[[], bool], warn: Callable[[str], None]
    ) -> Iterator[str]:
        """Use the engine while the block runs; yields a line about it.

        Args:
            step: optimizer steps that the policy has had.
            prompts: of training, of which the first are asked to compare probabilities.
            should_stop: asked while something is waited for.
            warn: is given what there is to know meanwhile.

        Raises:
            RolloutFailed: the engine cannot do what is asked of it, or has other weights than the policy.
            StopAsked: `should_stop` said so.
        """
        self._should_stop, self._warn = should_stop, warn
        self._session = shared(self._accelerator, self._session)
        try:
            with main_process_first(self._accelerator):
                if self._accelerator.is_main_process:
                    self._patiently(partial(self.engine.open, self._longest, self._prefix))
                    for left in self.folder.glob(f"{self._prefix}*"):
                        shutil.rmtree(left, ignore_errors=True)
            yield self._compared(step, prompts)
        finally:
            self.forget()
            if self._accelerator.is_main_process:
                with suppress(OSError):
                    self.folder.rmdir()  # if it is empty: it may be the user's own

    def _compared(self, step: int, prompts: Sequence[list[int]]) -> str:
        """See that the engine samples from this policy, by some responses that nothing is learnt from."""
        version, config = self._published(step), self.config
        requests = [Request(p, derived_seed(config.seed, step, n)) for n, p in enumerate(prompts[:_PROBES])]

        def sampled() -> list[Sampled]:
            self._patiently(lambda: self.engine.observe(version, prompts[0]))
            return self._checked(self._asking(version, requests).wait(self._should_stop, self._warn), step)

        responses = self._agreed(sampled)
        rows = self.policy.eos_ids.new_zeros(len(responses))
        self.rollout(responses, sampling_of(config.generation), seed=config.seed, first_rows=rows, copies=1)
        # Over all processes, so that all of them go on or none.
        found, self._mismatch = together(everywhere(self._accelerator, self._mismatch)), Mismatch()
        said = f"log-probabilities differ by {found.mean:.2g} nats on average, {found.largest:.2g} at most"
        if not found.mean <= self._settings.max_logprob_difference:
            raise RolloutFailed(
                f"{self.engine.where}: it has other weights than the policy, or reports something else than log-"
                f"probabilities: over {found.tokens:.0f} tokens {said}. Start it with the model of model.name="
                f"{config.model.name} and without --logprobs-mode, or with --logprobs-mode processed_logprobs; for a "
                "server of much lower precision raise rollout.max_logprob_difference."
            )
        kind = "among the candidates" if self.engine.processed else "over the whole vocabulary"
        return f"{self.engine.where}: over {found.tokens:.0f} tokens its {said} from the policy's, taken {kind}"

    def forget(self) -> None:
        """The policy is no longer what it was after as many steps: what was sampled from it is dropped, and its next
        versions have other names. All processes call this together."""
        if self._ahead is not None:
            self._ahead[1].end()
        if self._accelerator.is_main_process:
            self._retire(self._version)
        self._session += "0"
        self._version = self._ahead = self._found = None

    # -- a step ----------------------------------------------------------------------------------------------

    def sampled(self, step: int, requests: Callable[[int], Sequence[Request]]) -> list[Sampled]:
        """This process' responses of a step. A step that is tried again is given the same ones.

        Args:
            requests: this process' of any step.

        Raises:
            RolloutFailed: they could not be had, are too old, or cannot be used; in every process.
            StopAsked: a stop was asked for while they were waited for.
        """
        self._mismatch = Mismatch()
        if self._found is not None and self._found[0] == step:
            return self._found[1]
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            asking = ahead[1]
        else:  # the first step of a session, or no lag
            asking = self._asking(self._published(step), requests(step))
        found = self._agreed(lambda: self._checked(asking.wait(self._should_stop, self._warn), step))
        if self._settings.max_lag and step + 1 < self._steps:
            self._ahead = step + 1, self._asking(self._published(step), requests(step + 1))
        self._lag, self._found = step - found[0].step, (step, found)
        return found

    def rollout(
        self, responses: Sequence[Sampled], sampling: Sampling, *, seed: int, first_rows: Tensor, copies: int
    ) -> Rollout:
        """The rollout of some responses; arguments as of `grade.sampling.external.recreate`."""
        plain = [Response(r.prompt, r.tokens) for r in responses]
        rollout, hidden = recreate_with_states(
            self.policy, plain, sampling, seed=seed, first_rows=first_rows, copies=copies
        )
        ours = policy_logprobs(self.policy, rollout, hidden, processed=self.engine.processed)
        log_ratio = (ours - padded([r.logprobs for r in responses], ours)) * rollout.mask
        cap = self._settings.importance_cap
        if cap is not None:
            rollout.importance = importance_weights(log_ratio, cap)
        self._mismatch.add(log_ratio, rollout, cap)
        return rollout

    def measures(self) -> dict[str, float]:
        """What the step's rollouts say of engine and trainer, over all processes; starts again.

        `rollout/logprob_difference_mean` and `_max` are nats; `rollout/lag` is the age of the adapter that sampled, in
        steps. With importance weights their mean, and the share of tokens at the cap.
        """
        found, self._mismatch = together(everywhere(self._accelerator, self._mismatch)), Mismatch()
        limit = max(self._settings.max_logprob_difference, 2 * self._told)
        if found.largest > limit:
            self._told = found.largest
            self._warn(
                f"{self.engine.where}: a token's log-probability differs by {found.largest:.2g} nats from the policy's "
                f"(mean {found.mean:.2g}), rollout.max_logprob_difference is "
                f"{self._settings.max_logprob_difference:g}. What is sampled there is no longer quite this policy's."
            )
        metrics = {
            "rollout/logprob_difference_mean": found.mean,
            "rollout/logprob_difference_max": found.largest,
            "rollout/lag": float(self._lag),
        }
        if self._settings.importance_cap is not None:
            metrics["rollout/importance_mean"] = found.weights / max(found.tokens, 1.0)
            metrics["rollout/importance_capped"] = found.capped / max(found.tokens, 1.0)
        return metrics

    # -- versions --------------------------------------------------------------------------------------------

    def _published(self, step: int) -> Version:
        """The policy as it is now, after `step` steps, at the engine; nothing is asked of the version before."""
        if self._version is not None and self._version.step == step:
            return self._version
        name = f"{self._prefix}{self._session}-{step}"
        before, version = self._version, Version(name, step, self.folder / name)
        with main_process_first(self._accelerator):
            if self._accelerator.is_main_process:
                try:
                    write_adapter(version.folder, self.policy, "rollout.adapter_dir")
                except GradeError as error:
                    raise RolloutFailed(str(error)) from error
                self._version = version
                self._patiently(partial(self.engine.load, version))
                self._retire(before)
        self._version = version
        return version

    def _retire(self, version: Version | None) -> None:
        """Take a version from the engine, if it can be, and delete its folder."""
        if version is None:
            return

        def unload() -> None:
            with suppress(Away, Failing, RolloutFailed):
                self.engine.unload(version)

        with suppress(RolloutFailed):  # an engine that hangs must not keep a run from being saved
            patience = Patience(0, min(FORGETTING, self._settings.timeout))
            Asking([unload], patience, self.engine.where).wait(lambda: False, lambda line: None)
        shutil.rmtree(version.folder, ignore_errors=True)

    # -- asking ----------------------------------------------------------------------------------------------

    def _asking(self, version: Version, requests: Sequence[Request]) -> Asking[Sampled]:
        asked = [partial(self.engine.complete, version, request) for request in requests]
        return Asking(asked, self._patience, self.engine.where, remind=partial(self.engine.load, version))

    def _patiently(self, act: Callable[[], None]) -> None:
        """With the patience that a response is asked with. A stop is heard where no other process waits for this."""
        alone = self._accelerator.num_processes == 1
        Asking([act], self._patience, self.engine.where).wait(self._should_stop if alone else bool, self._warn)

    def _checked(self, responses: list[Sampled], step: int) -> list[Sampled]:
        """The responses, which the policy of a step can learn from."""
        for number, response in enumerate(responses):
            self._limits.check(f"{self.engine.where}: response {number}", Response(response.prompt, response.tokens))
            lag = step - response.step
            if not 0 <= lag <= self._settings.max_lag:
                raise RolloutFailed(
                    f"{self.engine.where}: response {number} was sampled by the adapter of step {response.step}, and "
                    f"step {step} learns from adapters of {self._settings.max_lag} steps before at most "
                    "(rollout.max_lag)."
                )
        return responses

    def _agreed(self, act: Callable[[], T]) -> T:
        """What `act` gives; where it fails or is stopped in one process, all of them raise that."""
        found: T | None = None
        failed: RolloutFailed | StopAsked | None = None
        try:
            found = act()
        except (RolloutFailed, StopAsked) as error:
            failed = error
        if self._accelerator.num_processes > 1:
            said = everywhere(self._accelerator, None if failed is None else (type(failed), str(failed)))
            if failed is None:
                failed = next((kind(text) for kind, text in filter(None, said)), None)
        if failed is not None:
            raise failed
        return present(found)
