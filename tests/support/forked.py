"""Programs run in processes that are forked from one in which torch, transformers and grade are imported already.

Importing them takes four seconds of every process that begins from nothing, which is most of what a small run takes.
What is forked has imported and done nothing else: there are no threads, no random numbers drawn, no state of a run. Its
standard streams, environment and working folder are its own, and it ends as any Python program does. Where a start from
nothing, or a launcher, is what a test is about, it starts one itself.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVED = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a library that asks for a GPU leaves it fit for forks
}
"""In the environment of the process that is forked, and of all that are."""
_server: subprocess.Popen | None = None


def forked(
    programs: Sequence[tuple[Sequence[str | Path], Mapping[str, str]]], *, cwd: str | Path | None = None, timeout: float
) -> list[tuple[int, str, str]]:
    """Run programs at once, each as (arguments of `python`, what is added to the environment).

    Arguments begin with the path of a program or with "-m" and a module.

    Returns:
        Of each the exit code, negative for a signal, and what it wrote to its output and its errors.

    Raises:
        subprocess.TimeoutExpired: one still ran after `timeout` seconds, and was killed with its process group. A code
            of its own would read as that of a program that failed as it should.
    """
    global _server
    if _server is None or _server.poll() is not None:
        support = Path(__file__).resolve().parent
        paths = [str(support), str(support.parents[1]), os.environ.get("PYTHONPATH", "")]
        _SERVED["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        own = {**os.environ, **_SERVED}
        command = [sys.executable, __file__]
        _server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own, text=True)
        atexit.register(_server.communicate)  # which closes its input, at which it ends
    assert _server.stdin is not None and _server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        streams = [(f"{folder}/{number}.out", f"{folder}/{number}.err") for number in range(len(programs))]
        orders = [
            {
                "arguments": [str(argument) for argument in arguments],
                "environment": {**os.environ, **_SERVED, **added},  # of this test, not of the first one
                "streams": paths,
            }
            for (arguments, added), paths in zip(programs, streams, strict=True)
        ]
        said = json.dumps({"programs": orders, "cwd": str(cwd or os.getcwd()), "timeout": timeout})
        _server.stdin.write(said + "\n")
        _server.stdin.flush()
        answer = _server.stdout.readline()
        assert answer, "the process that is forked has ended; what it wrote to its errors says why"
        codes = json.loads(answer)
        if None in codes:
            late = codes.index(None)
            said, errors = (Path(path).read_text() for path in streams[late])
            raise subprocess.TimeoutExpired([*map(str, programs[late][0])], timeout, said, errors)
        return [(code, *(Path(path).read_text() for path in paths)) for code, paths in zip(codes, streams, strict=True)]


def _serve() -> dict | None:
    """Fork and wait for what standard input asks for; in a process that was forked, what it is to run."""
    for line in sys.stdin:
        asked = json.loads(line)
        running = {}
        for program in asked["programs"]:
            child = os.fork()
            if child == 0:
                return {**program, "cwd": asked["cwd"]}
            os.setpgid(child, child)  # to be killed with what it starts
            running[child] = len(running)
        codes = _codes_of(running, time.monotonic() + asked["timeout"])
        print(json.dumps(codes), flush=True)
    return None


def _codes_of(running: dict[int, int], until: float) -> list[int | None]:
    """Exit codes of processes, by their places in the list; None of one that did not end in time, and was killed."""
    codes: list[int | None] = [None] * len(running)
    try:
        while running and time.monotonic() < until:
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    finally:
        for child in running:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


def _code_of(program: dict) -> int:
    """Run a program; the exit code that Python would give it."""
    try:
        _become(program)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _become(program: dict) -> None:
    """Take over the streams, the environment and the place of a program, and run it."""
    sources = [os.open(os.devnull, os.O_RDONLY)]
    sources += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in program["streams"]]
    for number, descriptor in enumerate(sources):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["cwd"])
    first, *rest = program["arguments"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import in_processes  # noqa: F401  and with it all that a run imports

    import grade.cli
    import grade.commands.train  # noqa: F401

    gc.freeze()  # so that a forked process does not copy every page of it to look for what can be freed
    asked_for = _serve()
    if asked_for is None:
        os._exit(0)
    code = _code_of(asked_for)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking down the modules one by one, which takes a second
