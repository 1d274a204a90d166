"""`grade generate`: responses on the command line, from a pipe, and in a conversation."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import torch

from grade import cli
from grade.config.reading import config_from_yaml
from grade.errors import GradeError
from grade.rollout import pad_prompts
from grade.sampling.sample import sample
from grade.tasks.countdown import CountdownTask, Puzzle, puzzle_of
from grade.tasks.encoding import encode
from grade.training.answers import Answers
from grade.training.evaluation import evaluation_sampling, text_of
from grade.training.trained import load_trained


def generate(capsys, *arguments):
    code = cli.main(["generate", *map(str, arguments)])
    out, error = capsys.readouterr()
    assert code == 0, error
    return out


class Terminal(io.StringIO):
    """Standard input that a person types into, and then ends as `end` says."""

    def __init__(self, text: str, end: type[BaseException] | None = None):
        super().__init__(text)
        self.end = end

    def isatty(self):
        return True

    def readline(self, *arguments):
        line = super().readline(*arguments)
        if not line and self.end is not None:
            raise self.end
        return line


@pytest.fixture(scope="session")
def trained(trained_run):
    """Config and policy of the run's best checkpoint."""
    config = config_from_yaml(trained_run / "config.yaml")
    policy = load_trained(config, trained_run, trained_run / "checkpoints" / "best", torch.device("cpu"))
    return config, policy


def expected(trained, prompts, adapters, rows):
    """Responses by the evaluation's sampler, by hand."""
    config, policy = trained
    ids, mask = pad_prompts(encode(policy.tokenizer, prompts, None), policy.pad_id, policy.device)
    first_rows = torch.tensor(rows) * config.generation.max_new_tokens
    rollout = sample(
        policy,
        ids,
        mask,
        evaluation_sampling(config.evaluation, config.generation),
        seed=config.seed,
        first_rows=first_rows,
        adapters=adapters,
    )
    return [text_of(policy, rollout.tokens[i], rollout.mask[i]) for i in range(len(rollout))]


def test_one_prompt_gives_the_response_alone(trained, trained_run, capsys):
    (response,) = expected(trained, ["the film was"], True, [0])
    assert generate(capsys, trained_run, "the film was") == response + "\n"
    other = generate(capsys, trained_run, "the film was", "--seed", 5)
    assert other != response + "\n" and other == generate(capsys, trained_run, "the film was", "--seed=5")
    assert len(generate(capsys, trained_run, "--max_new_tokens", 1, "--", "--the film").split()) <= 1


def test_samples_and_prompts_have_noise_of_their_own_and_the_base_has_the_same(trained):
    config, policy = trained
    prompts = ["the film was", "this movie"]
    answers = list(Answers(config, policy, base=True, samples=2).to(prompts))
    twice = [prompt for prompt in prompts for _ in range(2)]
    assert [answer.prompt for answer in answers] == twice
    assert [answer.policy for answer in answers] == expected(trained, twice, True, range(4))
    assert [answer.base for answer in answers] == expected(trained, twice, False, range(4))
    assert answers[0].policy != answers[1].policy
    one_by_one = Answers(config, policy)
    assert [next(one_by_one.to([prompt])).policy for prompt in twice] == [answer.policy for answer in answers]


@pytest.mark.parametrize("most", [2, 3])
def test_no_more_responses_are_sampled_together_than_in_an_evaluation(trained, monkeypatch, most):
    config, policy = trained
    together = []

    def counted(*arguments, **options):
        together.append(len(rollout := sample(*arguments, **options)))
        return rollout

    monkeypatch.setattr("grade.training.answers.sample", counted)
    config = replace(config, evaluation=replace(config.evaluation, batch_size=most))
    prompts = ["the film was", "this movie"]
    answers = list(Answers(config, policy, samples=5).to(prompts))
    five = [prompt for prompt in prompts for _ in range(5)]
    assert [(answer.prompt, answer.policy) for answer in answers] == list(
        zip(five, expected(trained, five, True, range(10)), strict=True)
    )
    assert sum(together) == 10 and max(together) == most


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_lines_of_a_pipe_are_prompts(trained, trained_run, capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the film was\n\nthis [b]movie[/b]\n"))
    out = generate(capsys, trained_run, *arguments)
    responses = expected(trained, ["the film was", "this [b]movie[/b]"], True, [0, 1])
    assert out == f"> the film was\n{responses[0]}\n\n> this [b]movie[/b]\n{responses[1]}\n\n"


@pytest.mark.parametrize("width, end", [(100, None), (60, KeyboardInterrupt)])
def test_a_conversation_shows_base_and_policy_and_ends_quietly(trained, trained_run, capsys, monkeypatch, width, end):
    """Side by side where there is room. A prompt that cannot be used ends nothing."""
    monkeypatch.setattr(sys, "stdin", Terminal("the film was\n\n" + "word " * 400 + "\nthe film was\n", end))
    monkeypatch.setenv("COLUMNS", str(width))
    out = generate(capsys, trained_run)
    assert "exceed the context" in out.replace("\n", " ")
    (first, second), (base, _) = (
        expected(trained, ["the film was"] * 2, adapters, [0, 1]) for adapters in (True, False)
    )
    if width >= 80:
        titles, row = (next(line for line in out.split("\n") if words in line) for words in ("base model", base[:20]))
        assert "policy" in titles and first[:20] in row
    else:
        assert f"base model: {base}\npolicy: {first}\n" in out
    assert second[:20] in out


def test_a_puzzle_is_asked_as_the_task_asks_it(trained):
    """A line as a person types it, where the task's own prompts end with a newline."""
    config, policy = trained
    config = replace(config, task=replace(config.task, name="countdown", prompt_max_tokens=64))
    puzzle = Puzzle((3, 5, 7), 22, ())
    for text in ("numbers=3,5,7 target=22", "3 5 7 target: 22\n"):
        assert puzzle_of(text) == puzzle
        (row,) = CountdownTask("", config.task, [puzzle], [], []).prompts("policy", policy.tokenizer)
        assert Answers(config, policy)._ids(text) == row
    with pytest.raises(GradeError, match="write one such as numbers=3,5,7 target=22"):
        list(Answers(config, policy).to(["make 22 of 3, 5 and 7"]))
    with pytest.raises(GradeError, match="exceed the context"):
        list(Answers(config, policy, max_new_tokens=4000).to(["numbers=3,5,7 target=22"]))


def test_mistakes_are_told_before_anything_is_loaded(trained_run, capsys, monkeypatch):
    monkeypatch.setattr("grade.commands.generate.load_trained", None)
    for arguments, words in (
        ([trained_run, " "], "a prompt is empty"),
        ([trained_run, "x", "--samples", 0], "--samples is 0"),
        ([trained_run, "x", "--max_new_tokens", -1], "--max_new_tokens is -1"),
        ([trained_run, "x", "--checkpoint", "step-1"], "holds no adapter"),
        ([trained_run, "x", "--bas"], "did you mean --base"),
    ):
        assert cli.main(["generate", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
