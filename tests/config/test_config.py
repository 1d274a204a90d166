"""Settings: their bounds and rules, their YAML, the shipped configs, and that every field is documented."""

import dataclasses
from typing import get_type_hints

import pytest
import yaml
from settings import set_setting

from grade.config import Config, LoraSettings, MethodConfig, ModelConfig, TrainConfig, get_setting, validate
from grade.config.methods import method_named
from grade.config.names import setting_types
from grade.config.options import add_settings, new_parser
from grade.config.reading import config_from_yaml, config_to_yaml, find_config, load_config, shipped_configs
from grade.config.yaml_files import read_yaml
from grade.errors import GradeError

SHIPPED = ["countdown_qwen2.5_1.5b", "countdown_small", "demo", "imdb_gpt2_medium", "imdb_qwen3_4b", "imdb_small"]
SETTINGS = list(setting_types())


def with_settings(**settings) -> Config:
    """Defaults but for `section__field=value`."""
    config = Config()
    for name, value in settings.items():
        set_setting(config, name.replace("__", "."), value)
    return config


# --- validate ----------------------------------------------------------------------------------------------


def test_defaults_are_valid():
    validate(Config())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"evaluation__top_p": 1.5}, "evaluation.top_p is 1.5"),
        ({"model__lora__target_modules": []}, "target_modules is empty"),
        ({"generation__max_new_tokens": 4}, r"max_new_tokens \(4\) is below generation.min_new_tokens \(8\)"),
        ({"method__name": "grade", "method__replay_dropout": True}, "replay_dropout cannot be true"),
        ({"method__target_kl": 0.5, "method__kl_coef": 0.0}, "which leaves 0 what it is"),
        (
            {"method__target_kl": 0.5, "compare__kl_coefs": [0.2]},
            "compare.kl_coefs gives runs other weights of the KL, and method.target_kl moves .* one of the two to null",
        ),
        (
            {"compare__sweep_steps": 0, "compare__schedules": ["constant", "linear"]},
            r"compare.schedules is .*compare.sweep_steps is 0: there are none. Set it to 1 or more, or name one",
        ),
        ({"variance__step_responses": 319}, "variance.step_responses is 319: .*Raise it to 320 or more"),
        ({"method__name": "grade", "method__estimator": "rao"}, "estimator=rao needs method.name=grade-ste"),
        ({"train__batch_size": 3, "generation__samples_per_prompt": 2}, r"\(3\) is not a multiple"),
        (
            {"generation__batch_size": 3, "generation__samples_per_prompt": 4},
            r"batch_size \(3\) is below generation.samples_per_prompt \(4\): a prompt's samples are decoded together",
        ),
        ({"train__resume": True, "train__overwrite": True}, "choose one"),
    ],
)
def test_rules_between_settings(settings, message):
    with pytest.raises(GradeError, match=message):
        validate(with_settings(**settings))


def test_what_the_rules_allow():
    validate(with_settings(method__name="grade", method__estimator="gumbel"))
    validate(with_settings(method__replay_dropout=True))
    validate(with_settings(generation__max_new_tokens=8, generation__min_new_tokens=8))
    validate(with_settings(generation__samples_per_prompt=4))
    validate(with_settings(generation__samples_per_prompt=4, generation__batch_size=4))
    validate(with_settings(evaluation__top_p=1.0))
    validate(with_settings(method__target_kl=0.5))
    validate(with_settings(compare__kl_coefs=[0.2]))
    validate(with_settings(compare__sweep_steps=0, compare__schedules=["linear"]))
    validate(with_settings(variance__step_responses=320))


def test_what_is_for_another_method_is_not_for_grade():
    """Its estimator and the factor of its length; of a config that is for `grade` they are its own."""
    others = MethodConfig(name="grade-ste", estimator="rao", path_scale=3.0)
    assert method_named(others, "grade-ste") == others
    named = method_named(others, "grade")
    assert (named.name, named.estimator, named.path_scale) == ("grade", "gumbel", 1.0)
    assert method_named(others, "ppo").path_scale == 3.0
    own = MethodConfig(name="grade", path_scale=3.0)
    assert method_named(own, "grade") == own


# --- YAML --------------------------------------------------------------------------------------------------


def test_default_values_round_trip(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(Config()), encoding="utf-8")
    assert config_from_yaml(path) == Config()


def test_round_trip_keeps_every_value_and_type(tmp_path):
    """Values that YAML is known to change: 1e-05, 'no', '1', a whole float, non-ASCII text."""
    config = with_settings(
        name="прогон",
        train__learning_rate=1e-05,
        train__adam_epsilon=1e-300,
        train__run_dir="runs/1e5",
        task__positive_label="no",
        task__text_column="1",
        reward__model="a/classifier",
        reward__positive_label="0",
        model__revision="0123",
        model__lora__alpha=7.0,
        model__lora__target_modules=["yes", "2"],
        generation__batch_size=3,
    )
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    again = config_from_yaml(path)
    assert again == config
    assert config_to_yaml(again) == config_to_yaml(config)
    assert type(again.model.lora.alpha) is float


def test_result_is_typed_dataclasses():
    config = load_config("imdb_small", ["--model.lora.r=4", "--train.learning_rate", "1"])
    assert type(config) is Config and type(config.train) is TrainConfig
    assert type(config.model) is ModelConfig and type(config.model.lora) is LoraSettings
    assert config.model.lora.r == 4 and config.train.learning_rate == 1.0


def test_no_two_configs_share_a_list():
    load_config("imdb_small").model.lora.target_modules.append("head")
    assert "head" not in load_config("imdb_small").model.lora.target_modules
    assert "head" not in Config().model.lora.target_modules


def test_precedence_is_default_file_option(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  steps: 7\n  learning_rate: 1e-3\n")
    config = load_config(path, ["--train.steps", "9"])
    assert config.train.steps == 9
    assert config.train.learning_rate == 1e-3
    assert config.train.accumulation_steps == TrainConfig().accumulation_steps


def test_empty_file_and_empty_section_mean_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert config_from_yaml(path) == Config()
    path.write_text("train:\n  # steps: 3\n")
    assert config_from_yaml(path) == Config()


def test_lists_and_null_on_the_command_line():
    config = load_config(
        "imdb_small",
        [
            *("--model.lora.target_modules", "[q_proj, v_proj]"),
            *("--generation.batch_size", "null"),
            *("--train.resume", "true"),
        ],
    )
    assert config.model.lora.target_modules == ["q_proj", "v_proj"]
    assert config.generation.batch_size is None and config.train.resume is True


# --- shipped configs ---------------------------------------------------------------------------------------


def test_the_shipped_configs():
    assert shipped_configs() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_loads_and_says_how_to_launch_it(name):
    config = load_config(name)
    assert config.name == name
    command = "grade demo" if name == "demo" else f"grade train {name}"
    assert f"#   {command}\n" in find_config(name).read_text(encoding="utf-8")


def test_qwen_config_is_table_3():
    config = load_config("imdb_qwen3_4b")
    lora, train, method, generation = config.model.lora, config.train, config.method, config.generation
    assert config.model.name == "Qwen/Qwen3-4B" and config.model.dtype == "bfloat16"
    assert (lora.r, lora.alpha, lora.dropout) == (16, 32, 0.05)
    assert lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (train.learning_rate, train.batch_size * train.accumulation_steps) == (1e-5, 16)
    assert (train.steps, train.max_grad_norm) == (250, 1.0)
    assert (generation.max_new_tokens, generation.min_new_tokens, generation.top_k) == (64, 8, 256)
    assert (method.tau_start, method.tau_end, method.tau_steps) == (2.0, 0.5, 2000)
    assert (method.kl_coef, method.kl_reduction) == (0.1, "token_mean")
    task = config.task
    assert (task.prompt_sentences, task.prompt_max_chars, task.prompt_max_tokens) == (2, 200, 32)
    assert config.evaluation.every == 100


def test_gpt2_config_is_the_first_experiment():
    config = load_config("imdb_gpt2_medium")
    train, method, generation = config.train, config.method, config.generation
    assert config.model.name == "openai-community/gpt2-medium" and config.model.dtype == "float32"
    assert config.model.lora.target_modules == ["c_attn", "c_proj"]
    assert (train.batch_size, train.accumulation_steps, train.steps) == (4, 4, 2000)
    assert train.learning_rate == 1e-4
    assert (generation.max_new_tokens, generation.min_new_tokens) == (48, 16)
    assert (method.tau_steps, method.kl_reduction) == (1000, "sequence_sum")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("countdown_qwen2.5_1.5b", ("Qwen/Qwen2.5-1.5B-Instruct", "bfloat16", 500, 16, 4, 1e-5, 500, 2000)),
        ("countdown_small", ("built-in:countdown", "float32", 100, 128, 1, 1e-3, 500, 2000)),
        ("demo", ("built-in:demo", "float32", 40, 16, 1, 3e-3, 200, 400)),
        ("imdb_gpt2_medium", ("openai-community/gpt2-medium", "float32", 2000, 4, 4, 1e-4, 500, 2000)),
        ("imdb_qwen3_4b", ("Qwen/Qwen3-4B", "bfloat16", 250, 16, 1, 1e-5, 500, 2000)),
        ("imdb_small", ("../shared/models/imdb-lm", "float32", 60, 16, 1, 3e-3, 500, 2000)),
    ],
)
def test_what_a_shipped_config_says_of_its_scale_is_its_own(name, expected):
    """None of it is left to the defaults, which are for a small model on one device and may change."""
    settings = (
        "model.name",
        "model.dtype",
        "train.steps",
        "train.batch_size",
        "train.accumulation_steps",
        "train.learning_rate",
        "evaluation.validation_prompts",
        "evaluation.test_prompts",
    )
    own = read_yaml(find_config(name))
    assert tuple(own[setting] for setting in settings) == expected


def test_settings_left_out_are_those_of_a_small_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  batch_size: 8\n")
    config = load_config(path)
    assert config.train.batch_size * config.train.accumulation_steps == 8
    assert "4B" not in config.model.name


# --- documentation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_text() -> str:
    parser = new_parser(prog="grade train")
    add_settings(parser)
    return " ".join(parser.format_help().split())


@pytest.fixture(scope="module")
def docstrings() -> dict:
    """{dotted name: docstring} read from the classes' source, independently of jsonargparse."""
    import ast
    from pathlib import Path

    import grade.config

    classes = {}
    files = sorted(Path(grade.config.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            texts = {}
            for statement, following in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(statement, ast.AnnAssign) and is_text:
                    texts[statement.target.id] = following.value.value
            classes[node.name] = texts

    def collect(section, prefix):
        for name, kind in get_type_hints(section).items():
            if dataclasses.is_dataclass(kind):
                yield from collect(kind, f"{prefix}{name}.")
            else:
                yield prefix + name, classes[section.__name__].get(name, "")

    return dict(collect(Config, ""))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_documented_in_help(name, help_text, docstrings):
    text = " ".join(docstrings[name].split())
    assert text.endswith(".") and len(text) >= 5, f"{name} has no docstring"
    # argparse may break a line after a hyphen, which leaves a space behind when lines are joined again.
    squeezed = help_text.replace("- ", "-")
    assert f"--{name} " in squeezed
    after = squeezed.split(f"--{name} ", 1)[1]
    assert text.replace("- ", "-") in after
    default = get_setting(Config(), name)
    shown = "null" if default is None else str(default)
    assert f"default: {shown})" in after.split(text.replace("- ", "-"), 1)[1][:200]


def test_help_says_of_every_section_all_that_its_class_says(help_text):
    def texts(section):
        yield " ".join(section.__doc__.split())
        for kind in get_type_hints(section).values():
            if dataclasses.is_dataclass(kind):
                yield from texts(kind)

    said = list(texts(Config))
    assert len(said) > 10 and all(text.endswith(".") and text in help_text for text in said)


def test_help_shows_a_named_config_as_defaults(capsys):
    from grade.cli import main

    assert main(["train", "imdb_small", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Optimizer steps. (type: int, default: 60)" in shown


def test_yaml_of_a_config_lists_every_setting():
    def leaves(tree, prefix=""):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]

    assert list(leaves(yaml.safe_load(config_to_yaml(Config())))) == SETTINGS
