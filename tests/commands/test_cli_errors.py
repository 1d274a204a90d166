"""The command line: one message and exit code 2 for bad input, and what it hands to the commands."""

import shlex
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from grade import cli, terminal
from grade.config import Config
from grade.config.reading import load_config, shipped_configs
from grade.config.sealed import sealed_yaml


def run_error(capsys, *argv: str) -> str:
    """The message of a command line that must fail, without its prefix."""
    assert cli.main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("grade: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("grade: error: ").strip()


@pytest.fixture(autouse=True)
def no_real_command(monkeypatch):
    """A mistake that slips through must not start training, or ask a hub for a model: the imports fail."""
    modules = ("commands.train", "commands.reward", "commands.evaluate", "commands.demo")
    for module in (f"grade.{name}" for name in modules):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def fake_module(monkeypatch):
    """Replace a module that a command imports by one function, or one that records its calls."""

    def install(module: str, name: str, function=None) -> list:
        calls = []
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, function or (lambda *args, **kwargs: calls.append((args, kwargs))))
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return install


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, expected",
    [
        ("train imdb_small --steps 3", "unknown option --steps; did you mean --train.steps?"),
        ("train imdb_small --train.stesp 3", "unknown option --train.stesp; did you mean --train.steps?"),
        (
            "train imdb_small --train.step 3",
            "unknown option --train.step; did you mean --train.steps?",
        ),  # not abbreviated
        ("train imdb_small --method.steps 3", "did you mean --train.steps?"),
        ("train imdb_small --lora.r 3", "did you mean --model.lora.r?"),
        ("train imdb_small --kl_coeff 3", "did you mean --method.kl_coef?"),
        ("train imdb_small --learning-rate 3", "did you mean"),
        ("train imdb_small --generation.max_tokens 3", "did you mean --generation.max_new_tokens?"),
        ("train imdb_small --max_tokens 3", "did you mean --reward.max_tokens?"),
        ("train imdb_small --seeds 3", "did you mean --seed?"),
        ("train imdb_small --print_confg 3", "did you mean --print_config?"),
        ("train imdb_small --train.max_steps 3", "did you mean --train.steps?"),  # not the puzzles'
        ("train imdb_small --train.seed 3", "did you mean --seed?"),
        ("train imdb_small --method.epochs 3", "did you mean --method.ppo.epochs or --method.grpo.epochs?"),
        ("train imdb_small --method.tau 3", "--method.tau_start or --method.tau_end or --method.tau_steps?"),
        # The epochs of the reward and of two methods are others.
        ("train imdb_small --train.epochs 3", "--train.epochs; `grade train --help` lists them all"),
        ("train imdb_small --generation.tau 3", "--generation.tau; `grade train --help` lists them all"),
        ("train imdb_small --model.rank 3", "--model.rank; `grade train --help` lists them all"),
        ("train imdb_small --zzz 3", "`grade train --help` lists them all"),
        ("train imdb_small --train.steps abc", "train.steps is abc: it must be a whole number."),
        ("train imdb_small --train.steps 1.5", "train.steps is 1.5: it must be a whole number."),
        ("train imdb_small --train.learning_rate fast", "train.learning_rate is fast: it must be a number."),
        ("train imdb_small --train.resume maybe", "train.resume is maybe: it must be true or false or auto."),
        (
            "train imdb_small --method.name x",
            "method.name is x: it must be one of grade-ste, grade, ppo, reinforce, grpo.",
        ),
        ("train imdb_small --generation.batch_size 2.5", "batch_size is 2.5: it must be a whole number or null."),
        ("train imdb_small --model.lora.target_modules q", "target_modules is q: it must be a list of texts, written"),
        ("train imdb_small --train.steps", "--train.steps needs a value: a whole number."),
        ("train imdb_small --train.resume --seed 3", "--train.resume needs a value: true or false or auto."),
        ("train imdb_small --train x.yaml", "--train is a section"),
        (
            "train imdb_small --generation.max_new_tokens 4",
            "generation.max_new_tokens (4) is below generation.min_new_tok",
        ),
        ("train imdb_small more", "unexpected argument 'more'"),
        ("train", "CONFIG is missing: grade train CONFIG"),
        ("reward", "CONFIG is missing: grade reward CONFIG"),
        ("evaluate", "RUN_DIR is missing: grade evaluate RUN_DIR [--checkpoint"),
        ("trian imdb_small", "did you mean train?"),
        ("xyzzy", "Commands: demo, reward"),
        ("demo more", "unexpected argument 'more'"),
        ("demo --pretrain_steps 0", "pretrain_steps is 0"),
        ("demo --cache-dir x", "did you mean --cache_dir?"),
        ("train demo --log_level loud", "--log_level is 'loud': it must be one of warning, info, debug."),
        ("train demo --quiet --log_level=debug", "--quiet is --log_level warning: leave one of the two out."),
        ("doctor more", "unexpected argument 'more'"),
        ("doctor --jsn", "did you mean --json?"),
        ("doctor --json=1", "--json is a switch and takes no value: leave '1' out."),
        ("generate runs/x --base True words", "--base is a switch and takes no value: leave 'True' out."),
        ("compare demo --seeds 0,00,1", "--seeds names 0 twice: leave one of them out."),
        ("compare demo --seeds ,", "--seeds is ',': write whole numbers"),
        ("compare demo --methods ppo,grpo,ppo", "--methods names ppo twice: leave one of them out."),
        ("compare demo --methods ,", "--methods is empty: name some of grade-ste"),
        ("compare demo --methods ''", "--methods is empty: name some of grade-ste"),
        ("compare demo --compare.learning_rate_factors abc", "it must be a list of numbers, written [1, 2]."),
        ("compare demo --variance.hops [a]", "it must be a list of whole numbers, written [1, 2]."),
        ("compare demo --variance.estimators '[rao, x]'", "a list of gumbel or rao or straight_through or reinmax"),
    ],
)
def test_a_wrong_command_line(capsys, line, expected):
    assert expected in run_error(capsys, *shlex.split(line))


def test_unknown_option_in_several_sections_names_them_all(capsys):
    message = run_error(capsys, "train", "imdb_small", "--batch_size=3")
    for section in ("reward", "generation", "train", "evaluation"):
        assert f"--{section}.batch_size" in message


def test_help_names_what_a_comparison_sets_itself(capsys):
    assert cli.main(["compare", "--help"]) == 0
    description = " ".join(capsys.readouterr().out.partition("options:")[0].split())
    assert all(name in description for name in ("sets seed", "train.resume", "train.overwrite", "train.run_dir"))


# --- config files ------------------------------------------------------------------------------------------


def test_unknown_config(capsys):
    message = run_error(capsys, "train", "imdb_smal")
    assert "did you mean imdb_small?" in message
    for name in shipped_configs():
        assert name in message


def test_missing_file(capsys, tmp_path):
    assert "does not exist" in run_error(capsys, "train", tmp_path / "none.yaml")
    assert "is a folder" in run_error(capsys, "train", tmp_path)
    assert "has no config.yaml" in run_error(capsys, "evaluate", tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train:\n  steps: 3\n  stesp: 3\n", "line 3: unknown setting train.stesp; did you mean train.steps"),
        ("steps: 3\n", "line 1: unknown setting steps; did you mean train.steps?"),
        ("\ntrian:\n  steps: 3\n", "line 2: unknown setting trian.steps; did you mean train.steps?"),
        ("lora:\n  r: 3\n", "line 1: unknown setting lora.r; did you mean model.lora.r?"),
        ("model:\n  lora:\n    rank: 3\n", "line 3: unknown setting model.lora.rank"),
        ("train:\n  steps: 3\n  steps: 4\n", "line 3: train.steps is set a second time"),
        ("train: 3\n", "line 1: train is a section"),
        ("train:\n  steps: abc\n", "train.steps is abc: it must be a whole number"),
        ("train:\n  steps: [1]\n", "train.steps is [1]: it must be a whole number"),
        ("train:\n  steps:\n", "line 2: train.steps is null: it must be a whole number"),
        ("task:\n  positive_label: 1\n", "positive_label is 1: it must be text. In YAML, put it in quotes."),
        ("train:\n  steps: {a: 1}\n", "train.steps is {'a': 1}: it must be a whole number"),
        ("train:\n  steps: 3\n bad: [1\n", "line 3"),
        ("train: [1, 2\nseed: 3\n", "malformed YAML"),
        ("train:\n\tsteps: 3\n", "line 2, column 1: malformed YAML"),
        ("seed: !!python/object:os.system x\n", "malformed YAML"),
        ("- 1\n- 2\n", "is not a settings file"),
        ("just words\n", "is not a settings file"),
        ("a: 1\n---\nb: 2\n", "malformed YAML"),
    ],
)
def test_bad_file(capsys, tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = run_error(capsys, "train", path)
    assert expected in message and message.startswith(str(path))


def test_binary_file(capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert f"cannot read {path}" in run_error(capsys, "train", path)


# --- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, module, function",
    [("train", "grade.commands.train", "train"), ("reward", "grade.commands.reward", "train_reward")],
)
def test_command_gets_the_settings(fake_module, command, module, function):
    calls = fake_module(module, function)
    assert cli.main([command, "--train.steps", "10", "imdb_small"]) == 0
    assert len(calls) == 1
    (config,) = calls[0][0]
    assert config == load_config("imdb_small", ["--train.steps=10"])


def test_demo_gets_its_options(fake_module):
    calls = fake_module("grade.commands.demo", "run_demo")
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--cache_dir", "somewhere", "--pretrain_steps", "5", "--train.steps", "2"]) == 0
    assert calls[0][0] == (load_config("demo"), None, None)
    assert calls[1][0] == (load_config("demo", ["--train.steps=2"]), Path("somewhere"), 5)


def test_evaluate_reads_the_run(fake_module, tmp_path, capsys):
    calls = fake_module("grade.commands.evaluate", "evaluate_run")
    config = Config(name="mine")
    (tmp_path / "config.yaml").write_text(sealed_yaml(config))
    assert cli.main(["evaluate", str(tmp_path)]) == 0
    options = ["--checkpoint", "last", "--split=validation", "--seed", "5"]
    assert cli.main(["evaluate", str(tmp_path), *options]) == 0
    assert calls[0][0] == (config, tmp_path, "best", "test")
    assert calls[1][0] == (Config(name="mine", seed=5), tmp_path, "last", "validation")
    assert run_error(capsys, "evaluate", tmp_path, "--split", "train") == (
        "--split is 'train': it must be one of test, validation."
    )


@pytest.mark.parametrize(
    "options, level",
    [([], "info"), (["--quiet"], "warning"), (["--log_level", "debug"], "debug"), (["--log_level=warning"], "warning")],
)
def test_how_much_a_command_says(fake_module, options, level):
    fake_module("grade.commands.train", "train", lambda config: levels.append(terminal._level))
    levels: list[str] = []
    with warnings.catch_warnings():
        assert cli.main(["train", "demo", *options]) == 0
    assert levels == [level]
    terminal.set_level("info")


def test_print_config_is_a_config(capsys, tmp_path):
    assert cli.main(["train", "imdb_qwen3_4b", "--train.steps", "9", "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config("imdb_qwen3_4b", ["--train.steps=9"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_training_ends_with(fake_module, capsys, error):
    """An interruption says how to resume; what nobody expects keeps its traceback."""

    def fail(config):
        raise error

    fake_module("grade.commands.train", "train", fail)
    line = ["train", "imdb_small", "--train.overwrite", "true", "--seed=3"]
    if error is ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            cli.main(line)
    else:
        assert cli.main(line) == 130
        assert "grade train imdb_small --seed=3 --train.resume auto\n" in capsys.readouterr().err


# --- in a process of its own -------------------------------------------------------------------------------


def run_process(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "grade", *argv], capture_output=True, text=True, timeout=60)


def test_process_exits_with_2_and_one_message():
    result = run_process("train", "imdb_small", "--steps", "10")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "grade: error: unknown option --steps; did you mean --train.steps?\n"
    result = run_process()
    assert result.returncode == 2 and "commands:" in result.stdout
    assert all(command in result.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "imdb_small", "--print_config"]])
def test_help_does_not_load_torch(argv):
    code = (
        "import sys; from grade.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
