"""The command line: one message and exit code 2 for bad input, and what it hands to the commands."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from grade import cli
from grade.config import Config
from grade.config import reading as config_io


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
    """Replace a module that a command imports by one function that records its calls."""

    def install(module: str, function: str) -> list:
        calls = []
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, lambda *args, **kwargs: calls.append((args, kwargs)))
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return install


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, expected",
    [
        ("--steps", "did you mean --train.steps?"),
        ("--train.stesp", "did you mean --train.steps?"),
        ("--train.step", "did you mean --train.steps?"),  # no abbreviations
        ("--method.steps", "did you mean --train.steps?"),
        ("--lora.r", "did you mean --model.lora.r?"),
        ("--kl_coeff", "did you mean --method.kl_coef?"),
        ("--learning-rate", "did you mean"),
        ("--generation.max_tokens", "did you mean --generation.max_new_tokens?"),
        ("--max_tokens", "did you mean --reward.max_tokens?"),
        ("--seeds", "did you mean --seed?"),
        ("--print_confg", "did you mean --print_config?"),
        ("--train.max_steps", "did you mean --train.steps?"),  # not the puzzles'
        ("--train.seed", "did you mean --seed?"),
        ("--method.epochs", "did you mean --method.ppo.epochs or --method.grpo.epochs?"),
        ("--method.tau", "did you mean --method.tau_start or --method.tau_end or --method.tau_steps?"),
        ("--train.epochs", "`grade train --help` lists them all"),  # the reward's and two methods' are others
        ("--generation.tau", "`grade train --help` lists them all"),
        ("--model.rank", "`grade train --help` lists them all"),
        ("--zzz", "`grade train --help` lists them all"),
    ],
)
def test_unknown_option_suggests_the_nearest(capsys, option, expected):
    message = run_error(capsys, "train", "imdb_small", option, "3")
    assert message.startswith(f"unknown option {option}") and expected in message


def test_unknown_option_in_several_sections_names_them_all(capsys):
    message = run_error(capsys, "train", "imdb_small", "--batch_size=3")
    for section in ("reward", "generation", "train", "evaluation"):
        assert f"--{section}.batch_size" in message


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--train.steps", "abc", "train.steps is abc: it must be a whole number."),
        ("--train.steps", "1.5", "train.steps is 1.5: it must be a whole number."),
        ("--train.learning_rate", "fast", "train.learning_rate is fast: it must be a number."),
        ("--train.resume", "maybe", "train.resume is maybe: it must be true or false or auto."),
        ("--method.name", "grad", "method.name is grad: it must be one of grade-ste, grade, ppo, reinforce, grpo."),
        ("--generation.batch_size", "2.5", "batch_size is 2.5: it must be a whole number or null."),
        ("--model.lora.target_modules", "q_proj", "model.lora.target_modules is q_proj: it must be a list"),
    ],
)
def test_wrong_type_names_the_setting(capsys, option, value, expected):
    assert expected in run_error(capsys, "train", "imdb_small", option, value)


def test_option_without_value(capsys):
    message = run_error(capsys, "train", "imdb_small", "--train.steps")
    assert message == "--train.steps needs a value: a whole number."
    message = run_error(capsys, "train", "imdb_small", "--train.resume", "--seed", "3")
    assert message == "--train.resume needs a value: true or false or auto."


def test_section_as_option(capsys):
    assert "--train is a section" in run_error(capsys, "train", "imdb_small", "--train", "x.yaml")


def test_rule_between_settings(capsys):
    message = run_error(capsys, "train", "imdb_small", "--generation.max_new_tokens", "4")
    assert message.startswith("generation.max_new_tokens (4) is below generation.min_new_tokens (8)")


@pytest.mark.parametrize("argv", [["train"], ["reward"], ["evaluate"]])
def test_missing_argument(capsys, argv):
    assert " is missing: grade " in run_error(capsys, *argv)


@pytest.mark.parametrize("argv", [["train", "imdb_small", "more"], ["demo", "more"], ["doctor", "more"]])
def test_unexpected_argument(capsys, argv):
    assert "unexpected argument 'more'" in run_error(capsys, *argv)


def test_unknown_command(capsys):
    assert "did you mean train?" in run_error(capsys, "trian", "imdb_small")
    assert "Commands: demo, reward" in run_error(capsys, "xyzzy")


def test_unknown_option_of_the_doctor(capsys):
    assert "did you mean --json?" in run_error(capsys, "doctor", "--jsn")


def test_demo_options(capsys):
    assert "pretrain_steps is 0" in run_error(capsys, "demo", "--pretrain_steps", "0")
    assert "did you mean --cache_dir?" in run_error(capsys, "demo", "--cache-dir", "x")


# --- config files ------------------------------------------------------------------------------------------


def test_unknown_config(capsys):
    message = run_error(capsys, "train", "imdb_smal")
    assert "did you mean imdb_small?" in message
    for name in config_io.shipped_configs():
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


def test_rule_between_settings_of_a_file(capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("generation:\n  max_new_tokens: 4\n")
    assert "generation.max_new_tokens (4) is below" in run_error(capsys, "train", path)


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
    assert config == config_io.load_config("imdb_small", ["--train.steps=10"])


def test_demo_gets_its_options(fake_module):
    calls = fake_module("grade.commands.demo", "run_demo")
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--cache_dir", "somewhere", "--pretrain_steps", "5", "--train.steps", "2"]) == 0
    assert calls[0][0] == (config_io.load_config("demo"), None, None)
    assert calls[1][0] == (config_io.load_config("demo", ["--train.steps=2"]), Path("somewhere"), 5)


def test_evaluate_reads_the_run(fake_module, tmp_path, capsys):
    calls = fake_module("grade.commands.evaluate", "evaluate_run")
    config = Config(name="mine")
    (tmp_path / "config.yaml").write_text(config_io.sealed_yaml(config))
    assert cli.main(["evaluate", str(tmp_path)]) == 0
    options = ["--checkpoint", "last", "--split=validation", "--seed", "5"]
    assert cli.main(["evaluate", str(tmp_path), *options]) == 0
    assert calls[0][0] == (config, tmp_path, "best", "test")
    assert calls[1][0] == (Config(name="mine", seed=5), tmp_path, "last", "validation")
    assert "split" in run_error(capsys, "evaluate", tmp_path, "--split", "train")


def test_print_config_is_a_config(capsys, tmp_path):
    assert cli.main(["train", "imdb_qwen3_4b", "--train.steps", "9", "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert config_io.load_config(path) == config_io.load_config("imdb_qwen3_4b", ["--train.steps=9"])


def test_interrupted_training_says_how_to_resume(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    stand_in = types.ModuleType("grade.commands.train")
    stand_in.train = interrupt
    monkeypatch.setitem(sys.modules, "grade.commands.train", stand_in)
    assert cli.main(["train", "imdb_small", "--train.overwrite", "true", "--seed=3"]) == 130
    assert "grade train imdb_small --seed=3 --train.resume auto\n" in capsys.readouterr().err


def test_unexpected_exceptions_keep_their_traceback(monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    stand_in = types.ModuleType("grade.commands.train")
    stand_in.train = fail
    monkeypatch.setitem(sys.modules, "grade.commands.train", stand_in)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "imdb_small"])


# --- in a process of its own -------------------------------------------------------------------------------


def run_process(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "grade", *argv], capture_output=True, text=True, timeout=60)


def test_process_exits_with_2_and_one_message():
    result = run_process("train", "imdb_small", "--steps", "10")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "grade: error: unknown option --steps; did you mean --train.steps?\n"


def test_process_prints_usage_without_a_command():
    result = run_process()
    assert result.returncode == 2 and "commands:" in result.stdout
    for command in cli.COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "imdb_small", "--print_config"]])
def test_help_does_not_load_torch(argv):
    code = (
        "import sys; from grade.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
