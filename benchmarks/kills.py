"""Kill training runs at random moments, kill them again while they recover, and compare what they end with.

    python -m benchmarks.kills --kills 20                 two kills each, then resumed to the end
    python -m benchmarks.kills --kills 3 --seed 5         fewer, elsewhere

A kill is SIGKILL: at a random moment, or just before a random operation on a file of the run, so that every gap between
two of them has its turn: inside a checkpoint, between renames, inside a log. The second one comes while the run is
being resumed. At the end every file is compared with an undisturbed run's: metrics, samples, evaluations, adapters,
optimizer; times and memory aside. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from grade.built_in.demo_model import demo_model
from grade.commands.train import train
from grade.config import Config
from grade.config.reading import config_to_yaml, load_config
from grade.tasks.demo import write_reviews
from grade.training.sessions import SESSIONS

_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree")
_RECOVERY_EVENTS = 40  # of a resumed run, within which the second kill falls
_NOT_COMPARED = ("seconds", "tokens_per_second", "memory")


def small_run(folder: Path) -> Config:
    """A run of seconds: six steps, a checkpoint every two, a validation every three."""
    reviews = write_reviews(160, seed=11)
    for name, part in (("train", reviews[:140]), ("test", reviews[140:])):
        rows = [json.dumps({"text": review.text, "label": review.label}) for review in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = demo_model(folder / "cache", steps=10, progress=False)
    return load_config(
        "demo",
        [
            "--name",
            "kills",
            "--device",
            "cpu",
            "--output_dir",
            str(folder),
            "--task.name",
            "sentiment",
            "--task.dataset",
            str(folder),
            "--task.reward_examples",
            "60",
            "--task.policy_examples",
            "50",
            "--task.validation_examples",
            "20",
            "--task.judge_examples",
            "0",
            "--model.name",
            str(model),
            "--model.lora.r",
            "4",
            "--reward.epochs",
            "2",
            "--reward.max_tokens",
            "16",
            "--generation.max_new_tokens",
            "4",
            "--generation.min_new_tokens",
            "1",
            "--generation.top_k",
            "16",
            "--train.steps",
            "6",
            "--train.batch_size",
            "4",
            "--train.accumulation_steps",
            "1",
            "--train.save_every",
            "2",
            "--train.keep_adapters",
            "true",
            "--train.samples_every",
            "1",
            "--evaluation.every",
            "3",
            "--evaluation.validation_prompts",
            "4",
            "--evaluation.test_prompts",
            "4",
            "--train.resume",
            "auto",
        ],
    )


def in_child(work: Callable[[], None], log: Path) -> int:
    """Process number of a copy of this process that does the work and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def training(config: Config, kill_before: int | None = None, counted: Path | None = None) -> Callable[[], None]:
    """The work of a child: a run, killed before its n-th operation on a file of its folder.

    Args:
        kill_before: n, from 1; None: not killed.
        counted: gets the number of such operations.
    """

    def work() -> None:
        seen = 0
        place = str(config.run_dir)

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in _EVENTS and any(isinstance(a, (str, Path)) and str(a).startswith(place) for a in arguments):
                seen += 1
                if seen == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        train(config)
        if counted is not None:
            counted.write_text(str(seen))

    return work


def ended(child: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Files of two runs, relative to their folders, that do not say the same."""
    names = {
        path.relative_to(folder)
        for folder in (run, undisturbed)
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }
    return [str(name) for name in sorted(names) if _content(run / name) != _content(undisturbed / name)]


def _content(path: Path) -> object:
    """What a file says, without times, memory, the folder's own name, and what depends on those."""
    if not path.is_file():
        return None
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [{k: v for k, v in row.items() if not k.startswith(_NOT_COMPARED)} for row in rows]
    if path.name == "trainer_state.json":
        return {k: v for k, v in json.loads(path.read_text()).items() if k != "logs"}
    if path.name == "run.json":  # who made a run, and when
        return {k: v for k, v in json.loads(path.read_text()).items() if k != SESSIONS}
    if path.name == "manifest.json":
        return json.loads(path.read_text())["step"]
    if path.name == "config.yaml":
        own = ("run_dir", "resume", "overwrite", "# SHA-256")
        return [line for line in path.read_text().split("\n") if not line.strip().startswith(own)]
    return path.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed twice")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    if options.kills < 1:  # of none, all would end well
        parser.error(f"--kills is {options.kills}: it must be at least 1")
    chance, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="grade-kills-") as temporary:
        folder = Path(temporary)
        log = folder / "log"
        made = folder / "made.yaml"

        def prepare() -> None:
            made.write_text(config_to_yaml(small_run(folder)))

        if ended(in_child(prepare, log)):
            print(log.read_text())
            return 1
        config = load_config(str(made))

        def run_in(name: str) -> Config:
            return replace(config, train=replace(config.train, run_dir=str(folder / name)))

        begin = time.monotonic()
        if ended(in_child(training(run_in("undisturbed"), counted=folder / "count"), log)):
            print(log.read_text())
            return 1
        seconds, operations = time.monotonic() - begin, int((folder / "count").read_text())
        print(f"undisturbed: {seconds:.1f} s, {operations} operations on files of the run", flush=True)
        number = 0
        while number < options.kills:
            run = run_in(f"killed-{chance.getrandbits(32):08x}")
            first = _kill(run, chance, operations, seconds, log)
            second = _kill(run, chance, _RECOVERY_EVENTS, seconds / 3, log) if first else None
            if first is None or second is None:
                continue  # it had ended by then: another one
            number += 1
            code = ended(in_child(training(run), log))
            wrong = differences(Path(run.run_dir), folder / "undisturbed") if code == 0 else [f"exit code {code}"]
            failed += bool(wrong)
            print(f"{number:>3}  {first}; {second}: {', '.join(wrong) or 'identical'}", flush=True)
            if code:
                print(log.read_text()[-2000:])
    print(f"{options.kills - failed} of {options.kills} runs, killed twice each, end as the undisturbed one")
    return int(failed > 0)


def _kill(config: Config, chance: random.Random, operations: int, seconds: float, log: Path) -> str | None:
    """Start or resume a run and kill it; says when, or None if it had ended before."""
    if chance.random() < 0.7:
        moment = chance.randint(1, operations)
        code = ended(in_child(training(config, kill_before=moment), log))
        where = f"before operation {moment}"
    else:
        wait = chance.uniform(0, seconds)
        child = in_child(training(config), log)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        code, where = ended(child), f"after {wait:.2f} s"
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{where}: a run that was to be killed ended by itself with {code}\n{log.read_text()[-4000:]}")
    return where if code else None


if __name__ == "__main__":
    sys.exit(main())
