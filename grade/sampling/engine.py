"""What an engine that samples elsewhere is asked, and how long it is asked for it.

A step's requests are sent by several threads at a time. One in which the engine fails is sent again, up to a number of
times; an engine that cannot be reached is waited for, and one that has started anew is given the adapter again. Where
no response comes for `timeout` seconds, or a stop is asked for, waiting ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from grade.errors import RolloutFailed
from grade.sampling.lines import StopAsked

T = TypeVar("T")

FIRST_PAUSE = 0.5
"""Seconds before a request is sent again; each pause is twice as long as the one before."""
_LONGEST_PAUSE = 10.0
_WAIT = 0.2  # seconds between two looks at whether a stop was asked


class Failing(Exception):
    """The engine failed in a request that it may answer the next time; the text says how."""


class Away(Exception):
    """The engine cannot be reached."""


class Forgotten(Exception):
    """The engine does not know the version, as after it has started anew."""


class Version(NamedTuple):
    """The adapter as it was after `step` optimizer steps, in a folder, by a name that no other has."""

    name: str
    step: int
    folder: Path


class Request(NamedTuple):
    """A response to ask for: to which token ids, with which seed."""

    prompt: list[int]
    seed: int


class Sampled(NamedTuple):
    """A response.

    Args:
        tokens: with the end-of-sequence token, if it ended.
        logprobs: of the tokens by the engine, nats.
        step: of the version that sampled it.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    step: int


class Engine(Protocol):
    """Samples from versions of an adapter; its methods are called from several threads.

    They raise `Away`, `Failing` or, where they need a version, `Forgotten`, and `RolloutFailed` for what no repetition
    would mend.
    """

    where: str
    """What names the engine in messages."""
    processed: bool
    """Whether its log-probabilities are of the candidates that it draws from, and not of the whole distribution;
    known once it has been opened."""

    def open(self, longest: int, prefix: str | None) -> None:
        """See whether it can do what is asked of it, and unload versions whose names begin with `prefix`, if
        one is given.

        Args:
            longest: tokens of a prompt and its response together.
        """

    def load(self, version: Version) -> None:
        """Take a version; one that it has stays."""

    def unload(self, version: Version) -> None:
        """Forget a version; one that it does not know is no mistake."""

    def observe(self, version: Version, prompt: list[int]) -> None:
        """Find out what its log-probabilities are of."""

    def complete(self, version: Version, request: Request) -> Sampled:
        """The response of a version to a request."""


class Patience(NamedTuple):
    """How long an engine is asked.

    Args:
        retries: of one request.
        timeout: seconds without any answer.
        concurrency: requests at a time.
    """

    retries: int
    timeout: float
    concurrency: int = 1


class Asking(Generic[T]):
    """Requests that threads send from the moment this is made.

    Args:
        requests: each asks the engine once, and raises what `Engine` says.
        where: what names the engine.
        remind: gives it the version again, where it has forgotten that.
    """

    def __init__(
        self,
        requests: Sequence[Callable[[], T]],
        patience: Patience,
        where: str,
        remind: Callable[[], object] = lambda: None,
    ) -> None:
        self._requests, self._patience, self._where, self._remind = list(requests), patience, where, remind
        self._found: dict[int, T] = {}
        self._left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(self._requests)):
            self._left.put(number)
        self._events: queue.SimpleQueue[Exception | str | None] = queue.SimpleQueue()  # None: an answer has come
        self._over, self._reminding = threading.Event(), threading.Lock()
        for _ in range(min(patience.concurrency, len(self._requests))):
            threading.Thread(target=self._work, daemon=True, name="rollout").start()

    def wait(self, should_stop: Callable[[], bool], tell: Callable[[str], None]) -> list[T]:
        """All answers, in the order of the requests.

        Args:
            should_stop: asked a few times a second.
            tell: is given the engine's troubles in words, each kind once.

        Raises:
            RolloutFailed: the engine was asked for long enough.
            StopAsked: `should_stop` said so.
        """
        timeout, trouble, told = self._patience.timeout, "", set()
        missing, deadline = len(self._requests), time.monotonic() + timeout
        try:
            while missing:
                try:
                    event = self._events.get(timeout=min(_WAIT, timeout))
                except queue.Empty:
                    event = ""
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    missing, deadline = missing - 1, time.monotonic() + timeout
                elif event:
                    trouble = event
                    if trouble not in told:
                        tell(f"{self._where}: {trouble}. It is waited for, up to {timeout:g} seconds.")
                        told.add(trouble)
                if missing and should_stop():
                    raise StopAsked
                if missing and time.monotonic() > deadline:
                    because = f", the last trouble being that {trouble}" if trouble else ""
                    raise RolloutFailed(
                        f"{self._where}: no answer in rollout.timeout={timeout:g} seconds{because}. See whether the "
                        "server runs and how fast it is, or raise rollout.timeout. Go on with --train.resume auto."
                    )
        finally:
            self.end()
        return [self._found[number] for number in range(len(self._requests))]

    def end(self) -> None:
        """Ask for nothing more; a thread that waits for an answer ends when that comes."""
        self._over.set()

    def _work(self) -> None:
        try:
            while not self._over.is_set():
                try:
                    number = self._left.get_nowait()
                except queue.Empty:
                    return
                self._ask(number)
        except Exception as error:  # of any class: whoever waits raises it
            self._events.put(error)

    def _ask(self, number: int) -> None:
        failures, pause = 0, FIRST_PAUSE
        while not self._over.is_set():
            try:
                self._found[number] = self._requests[number]()
                self._events.put(None)
                return
            except Forgotten:
                failures, trouble = failures + 1, "it has lost the adapter, which it is given again"
                with self._reminding:  # one at a time: the others find that it knows it
                    if self._over.is_set():  # it has been taken from the engine since then
                        return
                    try:
                        self._remind()
                        pause = 0.0
                    except (Away, Failing) as error:
                        trouble = f"it has lost the adapter, and {error}"
            except Failing as error:
                failures, trouble = failures + 1, str(error)
            except Away as error:
                trouble = f"it cannot be reached: {error}"
            if failures > self._patience.retries:
                raise RolloutFailed(
                    f"{self._where}: {trouble}. A request has failed {failures} times. Look into the server's log, or "
                    "raise rollout.retries. Go on with --train.resume auto."
                )
            self._events.put(trouble)
            self._over.wait(pause)
            pause = min(max(2 * pause, FIRST_PAUSE), _LONGEST_PAUSE)
