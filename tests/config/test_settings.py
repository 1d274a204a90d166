"""What every setting may be: bounds on both sides, texts that files can hold, and numbers written in plain digits."""

import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml
from settings import set_setting

from grade import cli
from grade.config import NOISE_ROWS, Config, get_setting, settings_with_role, validate
from grade.config.bounds import Facts, check_text, facts_of, numeric, setting, shown
from grade.config.names import setting_types
from grade.config.number_texts import check_options
from grade.config.options import add_settings, new_parser
from grade.config.reading import config_from_yaml, config_to_yaml, load_config
from grade.config.yaml_files import read_yaml
from grade.errors import GradeError
from grade.processes import make_accelerator
from grade.seeds import epoch_seed
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer

FACTS = {name: (kind, facts) for name, kind, facts in facts_of(Config)}
NUMBERS = {name: found for name, found in FACTS.items() if numeric(found[0])}
TEXTS = [name for name, kind in setting_types().items() if kind in (str, str | None)]
EXTREMES = ["0", "-1", "1e30", "1e9", "1e308", "nan", ".nan", "inf", "-.inf", str(10**40), "1e400", "9" * 5000]


def with_value(name: str, value) -> Config:
    config = Config()
    is_list = "list[" in str(setting_types()[name])
    set_setting(config, name, [value] if is_list else value)
    return config


def refusal(config: Config) -> str:
    """What `validate` says; empty if it says nothing."""
    try:
        validate(config)
    except GradeError as error:
        return str(error)
    return ""


# --- bounds ------------------------------------------------------------------------------------------------


def test_the_declarations_are_those_of_all_settings():
    assert list(FACTS) == list(setting_types())


def test_what_may_change_when_a_run_is_resumed():
    changing = settings_with_role("resume", "speed", "place")
    assert {name for name in changing if not name.startswith(("compare.", "variance.", "guard."))} == {
        "name",
        "output_dir",
        "model.fsdp",
        "train.run_dir",
        "train.resume",
        "train.overwrite",
        "train.deterministic",
        "train.compile",
        "train.steps",
        "train.save_every",
        "train.keep_adapters",
        "train.keep_checkpoints",
        "train.tensorboard",
        "train.wandb",
        "train.wandb_project",
        "train.samples_logged",
        "train.samples_every",
        "train.log_every",
        "evaluation.samples",
        "task.judge_examples",
        "evaluation.batch_size",
        "generation.batch_size",
        "rollout.compile",
        "rollout.url",
        "rollout.adapter_dir",
        "rollout.server_adapter_dir",
        "rollout.concurrency",
        "rollout.retries",
        "rollout.timeout",
        "rollout.max_logprob_difference",
        "method.head_chunk_mib",
        "method.activation_checkpointing",
    }
    assert {name for name in FACTS if name.startswith(("compare.", "variance.", "guard."))} <= set(changing)
    assert sorted([*changing, *settings_with_role("identity")]) == sorted(FACTS)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_both_bounds(name):
    facts = NUMBERS[name][1]
    lower = [bound for bound in (facts.ge, facts.gt) if bound is not None]
    upper = [bound for bound in (facts.le, facts.lt) if bound is not None]
    assert len(lower) == len(upper) == 1 and lower[0] < upper[0]
    assert math.isfinite(float(lower[0])) and math.isfinite(float(upper[0]))


@pytest.mark.parametrize("name", NUMBERS)
def test_the_bounds_hold(name):
    kind, facts = NUMBERS[name]
    whole, subject = int in numeric(kind), f"{name} is "
    least, most = (facts.ge if facts.gt is None else facts.gt), (facts.le if facts.lt is None else facts.lt)
    step = 1 if whole else 1e-9
    for value in (least - step, *([least] if facts.gt is not None else [])):
        message = refusal(with_value(name, value))
        assert message.startswith(subject) and f" must be {'at least' if facts.gt is None else 'above'} " in message
    for value in (most * (1 + 1e-9) + whole, *([most] if facts.lt is not None else [])):
        message = refusal(with_value(name, int(value) if whole else value))
        assert message.startswith(subject) and f"at most {_typed(most)}." in message or f"below {most}." in message
    for value in ([least] if facts.gt is None else []) + ([most] if facts.lt is None else []):
        # A bound itself is fine, whatever rule between settings it may break.
        assert " must be " not in refusal(with_value(name, value))


def _typed(bound) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}".replace("e+0", "e")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "1e5000"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name, value):
    number = 10 ** int(value[2:]) if value.startswith("1e") else float(value)
    message = refusal(with_value(name, number))
    assert message.startswith(f"{name} is ") and " must be " in message and len(message) < 600


def test_defaults_keep_to_their_bounds_and_lists_are_not_shared():
    @dataclasses.dataclass
    class Section:
        numbers: list = setting(default_factory=lambda: [1], ge=1, le=2)
        most: float = setting(1.0, gt=0, le=1e6)

    first, second = Section(), Section()
    first.numbers.append(2)
    assert second.numbers == [1] and first.most == 1.0
    assert str(dataclasses.fields(Section)[1].metadata["facts"]) == "above 0 and at most 1e6"
    assert refusal(Config()) == ""


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train.steps": 10**9, "train.batch_size": 2**16, "train.accumulation_steps": 2**16}, "noise for 2^52 tokens"),
        ({"task.name": "demo", "task.policy_examples": 10**8}, "writes its examples one by one, at most 1000000"),
        ({"task.name": "countdown", "method.name": "reinforce", "task.validation_examples": 10**8}, "one by one"),
    ],
)
def test_what_is_too_much_together(settings, message):
    config = Config()
    for name, value in settings.items():
        set_setting(config, name, value)
    assert message in refusal(config)


def test_noise_rows_of_the_largest_run_fit_into_64_bits():
    assert NOISE_ROWS * 2**10 < 2**63  # among a thousand processes
    assert epoch_seed(FACTS["seed"][1].le, FACTS["train.steps"][1].le) < 2**63


# --- the same values as texts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser():
    parser = new_parser()
    add_settings(parser)
    return parser


ONE_OF_EACH_TYPE = {str(kind): name for name, (kind, _) in reversed(NUMBERS.items())}.values()


@pytest.mark.parametrize("text", EXTREMES, ids=[text[:12] for text in EXTREMES])
@pytest.mark.parametrize("name", ONE_OF_EACH_TYPE)
def test_extreme_texts_end_in_words(name, text, parser, tmp_path, monkeypatch):
    """On the command line and in a file; every setting of a type is parsed alike, so one stands for all."""
    kind, facts = NUMBERS[name]
    written = f"[{text}]" if "list[" in str(kind) else text
    (tmp_path / "empty.yaml").write_text("")
    path = tmp_path / "one.yaml"
    section, last = name.rpartition(".")[::2]
    keys = [*filter(None, section.split(".")), last]
    path.write_text("".join("  " * i + f"{key}:\n" for i, key in enumerate(keys)).rstrip("\n") + f" {written}\n")
    monkeypatch.setattr("grade.config.reading.new_parser", lambda: parser)
    monkeypatch.setattr("grade.config.reading.add_settings", lambda _: None)
    for read in (lambda: load_config(tmp_path / "empty.yaml", [f"--{name}={written}"]), lambda: config_from_yaml(path)):
        defaults = parser.get_defaults()
        try:
            value = get_setting(read(), name)
        except GradeError as error:
            message = str(error).replace("\n", " ")
            assert name in message and "must be " in message and len(message) < 500
        else:
            assert all(facts.allow(entry) for entry in (value if isinstance(value, list) else [value]))
        finally:
            parser.set_defaults(defaults)


NOT_PLAIN = ["٣", "1_000", "0x10", "0b11", "0o17", "010", "1:30", "３", "1 000", "true"]


@pytest.mark.parametrize("text", NOT_PLAIN)
@pytest.mark.parametrize("name", ["train.steps", "generation.batch_size", "train.learning_rate", "variance.hops"])
def test_a_number_is_written_in_plain_digits(name, text, tmp_path):
    if (name, text) == ("train.learning_rate", "010"):
        text = "0_10"  # of a number with a point, a zero in front is no other number
    written = f"[1, {text}]" if name == "variance.hops" else text
    with pytest.raises(GradeError, match=f"^{re.escape(name)} is {re.escape(text)}: it must be "):
        check_options([f"--{name}", written], setting_types())
    path = tmp_path / "one.yaml"
    section, last = name.split(".")
    path.write_text(f"{section}:\n  {last}: {written}\n", encoding="utf-8")
    with pytest.raises(GradeError, match=f"line 2: {re.escape(name)} is {re.escape(text)}: it must be "):
        read_yaml(path)


def test_the_program_asks_for_plain_digits(tmp_path, capsys):
    assert cli.main(["train", "demo", "--train.steps=1_000"]) == 2
    assert capsys.readouterr().err == (
        "grade: error: train.steps is 1_000: it must be a whole number. Write numbers in plain digits, such as 1000.\n"
    )


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("train.steps", "+7", 7),
        ("train.steps", "7", 7),
        ("generation.batch_size", "null", None),
        ("generation.batch_size", "~", None),
        ("train.learning_rate", "1e-05", 1e-05),
        ("train.learning_rate", "5", 5.0),
        ("train.learning_rate", ".5", 0.5),
        ("train.learning_rate", "1.", 1.0),
        ("variance.hops", "[0, 3]", [0, 3]),
        ("variance.taus", "[1, 2.5e0]", [1.0, 2.5]),
        ("variance.lengths", "null", None),
        ("method.activation_checkpointing", "true", True),
        ("task.positive_label", "٣", "٣"),
    ],
)
def test_plain_numbers_are_read_as_before(name, text, value, tmp_path):
    section, last = name.split(".")
    path = tmp_path / "one.yaml"
    path.write_text(f"{section}:\n  {last}: {text}\n", encoding="utf-8")
    for config in (load_config("demo", [f"--{name}", text]), config_from_yaml(path)):
        assert get_setting(config, name) == value and type(get_setting(config, name)) is type(value)


def test_one_more_entry_of_a_list_is_checked_too():
    assert load_config("demo", ["--variance.hops+", "9"]).variance.hops[-1] == 9
    with pytest.raises(GradeError, match="variance.hops is 0x9: it must be"):
        load_config("demo", ["--variance.hops+", "0x9"])


@pytest.mark.parametrize(
    "argv",
    [
        ["demo", "--pretrain_steps", "1_0"],
        ["demo", "--pretrain_steps", "1" + "0" * 40],
        ["compare", "demo", "--seeds", "٣"],
        ["compare", "demo", "--seeds", "1e3"],
        ["compare", "demo", "--seeds", "9" * 5000],
    ],
)
def test_the_commands_own_numbers(argv, capsys):
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"grade: error: {argv[-2].lstrip('-') if argv[0] == 'demo' else argv[-2]} is ")
    assert message.count("\n") == 1 and len(message) < 300


def test_yaml_nested_without_end_is_told_in_words(tmp_path):
    (tmp_path / "deep.yaml").write_text("train: " + "[" * 20_000)
    with pytest.raises(GradeError, match="malformed YAML"):
        config_from_yaml(tmp_path / "deep.yaml")


# --- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", ["a\0b", "a\ud800b", "x" * 5000], ids=["zero", "surrogate", "long"])
def test_no_text_breaks_a_file(name, value):
    message = refusal(with_value(name, value))
    assert message.startswith(f"{name} is ") and message.isprintable() and len(message) < 400


@pytest.mark.parametrize("value", ["", " ", "a/b", "../a", "a\\b", "a\nb", "\x1b[31m", "\x85", "n" * 201, "漢" * 67])
def test_a_name_becomes_part_of_file_names(value, tmp_path):
    assert refusal(with_value("name", value)).startswith("name is ")


@pytest.mark.parametrize("value", ["", "a\tb", "p" * 241, "漢" * 81, "/".join(["p" * 99] * 40)])
@pytest.mark.parametrize("name", ["output_dir", "train.run_dir", "reward.path"])
def test_a_path_can_be_made(name, value):
    assert refusal(with_value(name, value)).startswith(f"{name} is ")


def test_the_longest_names_can_be_made(tmp_path):
    for name in ("n" * 200, "漢" * 66, "$\\frac{$".replace("\\", ""), "a b", "=1+1", "прогон", "...", "-x"):
        assert refusal(with_value("name", name)) == ""
        for made in (f"{name}-seed{2**43}", f"compare-{name}", f"variance-{name}.json"):
            (tmp_path / made).mkdir()
    check_text("output_dir", str(tmp_path / ("p" * 240)), "path")
    (tmp_path / ("p" * 240 + ".yaml")).touch()


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "x" * 300],
        ["train", "x" * 300 + ".yaml"],
        ["evaluate", "x" * 5000],
        ["report", "x" * 300],
        ["report", ".", "--output", "x" * 300],
        ["variance", "demo", "--checkpoint", "x" * 300],
        ["demo", "--cache_dir", "x" * 300],
        ["train", "demo", "--name", "x" * 300],
    ],
)
def test_paths_that_cannot_be(argv, capsys):
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("grade: error: ") and message.count("\n") == 1 and len(message) < 400
    assert "bytes" in message or "characters, and must have" in message


@pytest.mark.parametrize(
    "value, text",
    [
        ("a\nb", "a\\nb"),
        ("a\ud800", "a\\ud800"),
        (10**5000, "a number of thousands of digits"),
        ([1, 2], "[1, 2]"),
        ("x" * 200, "x" * 60 + "... (200 characters)"),
        ("漢", "漢"),
    ],
    ids=["line", "surrogate", "digits", "list", "long", "print"],
)
def test_values_are_shown_on_one_line(value, text):
    assert shown(value) == text


def test_facts_in_words():
    assert str(Facts(ge=1, le=10**9)) == "at least 1 and at most 1000000000"
    assert str(Facts(ge=1e-4, lt=1)) == "at least 0.0001 and below 1"


# --- through the program -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"train.batch_size": 2**16, "train.accumulation_steps": 2**10},
            "cannot fit. Set .*train.batch_size below 65536",
        ),
        (
            {"train.accumulation_steps": 2**16, "method.name": "grade"},
            "that cannot fit. Set .*generation.batch_size below",
        ),
        ({"model.lora.r": 8192}, "model.lora.r is 8192: its adapter would take .* GiB are free"),
        ({"task.prompt_max_tokens": 2**20}, "but the context of .* is 256 tokens"),
        ({"generation.top_k": 2**20}, "exceeds the vocabulary"),
    ],
)
def test_what_is_legal_and_cannot_fit_is_told_before_work(tiny_config, monkeypatch, settings, message):
    config = copy.deepcopy(tiny_config)
    for name, value in settings.items():
        set_setting(config, name, value)
    validate(config)
    for module in ("training.trial", "model.loading"):
        monkeypatch.setattr(f"grade.{module}.free_bytes", lambda *_: 2**26)
    with pytest.raises(GradeError, match=message):
        Trainer(config, make_accelerator(config), prepare_run_dir(config)).fit()
    assert not Path(config.run_dir).exists()


def test_the_largest_counts_start_like_any_others(tiny_config):
    config = copy.deepcopy(tiny_config)
    for name in (
        "train.steps",
        "train.warmup_steps",
        "train.save_every",
        "train.samples_every",
        "evaluation.every",
        "evaluation.validation_prompts",
        "evaluation.samples",
        "method.tau_steps",
        "seed",
        "evaluation.seed",
    ):
        set_setting(config, name, FACTS[name][1].le)
    validate(config)
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    trainer.memory.check()
    assert len(list(trainer.rollouts(config.train.steps - 1))) == 1  # noise and order of the last step


def test_settings_survive_yaml_at_their_bounds(tmp_path):
    config = Config()
    for name, (kind, facts) in NUMBERS.items():
        if "list[" not in str(kind) and facts.le is not None:
            set_setting(config, name, int(facts.le) if int in numeric(kind) else float(facts.le))
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert yaml.safe_load(path.read_text()) == dataclasses.asdict(config)
    with pytest.raises(GradeError, match="noise for 2.52 tokens"):  # each alone is fine
        config_from_yaml(path)
