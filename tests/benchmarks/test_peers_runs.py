"""A run of `benchmarks.peers`: TRL's trainers are given what ours are, and both are timed and evaluated alike."""

from __future__ import annotations

import pytest
import torch
from tiny_run import changed, make_tiny_config

from benchmarks.peers_run import Order, run
from benchmarks.peers_text import objective_of
from benchmarks.peers_trl import Judged, copy_adapter, generation_options, rollout_of, settings_of
from grade.processes import make_accelerator
from grade.rollout import pad_prompts
from grade.sampling.draw import sampling_of
from grade.sampling.sample import sample
from grade.training.responses import prompt_numbers
from grade.training.setup import set_up


@pytest.fixture(scope="module")
def loaded_config(tiny_model, tiny_data, shared_output, tmp_path_factory):
    config = make_tiny_config(tiny_model, tiny_data, shared_output, tmp_path_factory.mktemp("peers") / "run")
    # What is left of the training texts is the judge's.
    return changed(config, generation={"samples_per_prompt": 2}, train={"run_dir": None}, task={"policy_examples": 20})


@pytest.fixture(scope="module")
def loaded(loaded_config):
    return set_up(loaded_config, make_accelerator(loaded_config))


def test_the_reward_that_trl_is_given_is_ours(loaded, loaded_config):
    policy, reward = loaded.policy, loaded.reward
    prompts = loaded.task.prompts("policy", loaded.tokenizer, limit=3)
    ids, mask = pad_prompts(prompts, policy.pad_id, policy.device)
    rows = torch.arange(3) * 8
    drawn = sample(policy, ids, mask, sampling_of(loaded_config.generation), seed=0, first_rows=rows)
    judged = Judged(policy, reward, prompts)
    found = judged.rewards(["0", "1", "2"], drawn.real_tokens())
    alone = [Judged(policy, reward, prompts).rewards([str(i)], [drawn.real_tokens()[i]])[0] for i in range(3)]
    assert found == pytest.approx(alone, abs=1e-5)
    assert len(set(found)) > 1
    again = rollout_of(prompts, drawn.real_tokens(), policy)
    assert torch.equal(again.tokens, drawn.tokens) and torch.equal(again.mask, drawn.mask)
    assert torch.equal(again.prompt_ids, drawn.prompt_ids)
    assert judged.take_tokens() == int(drawn.mask.sum()) and judged.take_tokens() == 0


def test_trl_is_told_the_same_draw_and_the_same_objective(loaded, loaded_config, tmp_path):
    told = settings_of(loaded_config, loaded.policy, tmp_path)
    assert told["per_device_train_batch_size"] == 4 and told["num_generations"] == 2
    assert told["beta"] == pytest.approx(0.05 / 8)
    # An end as token number 2 is allowed: to transformers it comes after one new token.
    assert generation_options(loaded_config, loaded.policy)["min_new_tokens"] == 1
    assert told["gradient_checkpointing"] is False and told["bf16"] is False


def test_an_adapter_is_copied_by_name(loaded):
    source, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    copy_adapter(source, target)
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(ValueError, match="the adapters differ"):
        copy_adapter(source, loaded.policy.model)


def test_a_run_of_ours_is_timed_and_evaluated(loaded_config, tmp_path):
    order = Order("run", "grade-ste", 1, 1e-3, "cosine", 2, (1.0,))
    found = run(order, loaded_config, tmp_path)
    assert len(found["step_seconds"]) == len(found["step_tokens"]) == 2
    (point,) = found["curve"]
    assert point["step"] == 2 and point["seconds"] == pytest.approx(sum(found["step_seconds"]))
    assert 0 <= point["judge"] <= 1 and objective_of(found) == point["objective"]
    assert found["peak_gib"] >= found["loaded_gib"] > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["trl-grpo", "trl-rloo"])
def test_a_run_of_trl_learns_on_our_prompts(loaded, loaded_config, tmp_path, monkeypatch, method):
    pytest.importorskip("trl", reason="the extra `peers` is not installed")
    seen, rewards = [], Judged.rewards

    def seeing(self, prompts, completion_ids, **others):
        seen.append([int(number) for number in prompts])
        return rewards(self, prompts, completion_ids, **others)

    monkeypatch.setattr(Judged, "rewards", seeing)
    order = Order("run", method, 1, 3e-2, "cosine", 2, (0.5, 1.0), {"num_iterations": 2})
    found = run(order, loaded_config, tmp_path)
    assert len(found["step_seconds"]) == 2
    count = len(loaded.task.prompts("policy", loaded.tokenizer, limit=None))
    asked = [prompt_numbers(step, 2, count, order.seed) for step in range(2)]
    assert seen == [[number for number in numbers for _ in range(2)] for numbers in asked]
    assert all(0 < tokens <= 4 * 8 for tokens in found["step_tokens"])
    first, last = found["curve"]
    assert first["kl"] > 0  # the policy that is evaluated has what TRL's model has learned
    assert (first["step"], last["step"]) == (1, 2) and last["seconds"] > first["seconds"]
    assert last["kl"] != first["kl"]
