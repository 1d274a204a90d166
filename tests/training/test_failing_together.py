"""Two processes of a run, and a reward that fails in the second of them alone."""

from __future__ import annotations

import json

import pytest
from in_processes import without_launcher
from tiny_run import changed

from grade import ModelConfig, RewardConfig, TaskConfig
from grade.config.reading import config_to_yaml
from grade.files import latest
from grade.model.checkpoint import load_state

PROGRAM = """
import os, sys, torch, grade
from dataclasses import replace
from grade.config.reading import config_from_yaml

class Fails:
    def __init__(self, policy):
        self._policy = policy
        self.tables = [grade.EmbeddingTable(policy.embedding, policy.embedding_scale)] if self.differentiable else ()

    def fail(self, now):
        # After the first update: until then one half of an adapter is 0.
        trained = all(p.abs().sum() > 0 for p in self._policy.parameters())
        if os.environ["RANK"] == "1" and trained and now:
            raise ConnectionError("the judge is away")

class InAStep(Fails, grade.RewardFunction):
    def score(self, rollout):
        self.fail(rollout.split == "policy")
        return (rollout.tokens * rollout.mask).float().mean(1)

class InAnEvaluation(Fails, grade.RewardFunction):
    def score(self, rollout):
        self.fail(rollout.split == "validation")
        return (rollout.tokens * rollout.mask).float().mean(1)

class InAReplay(Fails, grade.DifferentiableReward):
    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        self.fail(rollout.split == "policy" and fed[0].requires_grad)
        return fed[0].float().mean((1, 2))

class InATrial(InAReplay):
    def fail(self, now):
        if os.environ["RANK"] == "1":
            raise ConnectionError("the judge is away")

failed = []
for reward, method, fsdp in (
    (InAStep, "reinforce", False),
    (InAnEvaluation, "reinforce", False),
    (InAReplay, "grade-ste", False),
    (InATrial, "grade-ste", False),
    (InAnEvaluation, "reinforce", True),  # of sharded layers, through which all processes pass or none
    (InAReplay, "grade-ste", True),
    (InATrial, "grade-ste", True),
):
    config = config_from_yaml(sys.argv[1])
    config = replace(
        config,
        model=replace(config.model, fsdp=fsdp),
        method=replace(config.method, name=method),
        train=replace(config.train, run_dir=f"{config.train.run_dir}-{reward.__name__}{'-sharded' * fsdp}"),
    )
    trainer = grade.GradeTrainer(sys.argv[2], reward, ["I saw this film", "It is", "We saw it", "A"], config=config)
    try:
        trainer.train()
    except grade.GradeError as error:
        failed.append(reward)
        print(error, flush=True)

class NoNumberOnce(Fails, grade.RewardFunction):
    _said = False

    def score(self, rollout):
        value = (rollout.tokens * rollout.mask).float().mean(1)
        trained = all(p.abs().sum() > 0 for p in self._policy.parameters())
        if os.environ["RANK"] == "1" and trained and rollout.split == "policy" and not self._said:
            NoNumberOnce._said, value[0] = True, float("inf")
        return value

config = config_from_yaml(sys.argv[1])
config = replace(config, method=replace(config.method, name="reinforce"))
trainer = grade.GradeTrainer(sys.argv[2], NoNumberOnce, ["I saw this film", "It is", "We saw it", "A"], config=config)
trainer.train()
print("weights", [p.double().sum().item() for p in trainer.policy.parameters()], flush=True)
sys.exit(2 if len(failed) == 7 else 1)
"""


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_ends_all_and_the_main_one_saves(tiny_model, tiny_config, tmp_path):
    """In a step, an evaluation, a replay and a trial before the first step: nobody waits, and what was done is kept.
    Where it gives no number once, all leave that step out."""
    unnamed = {"name": ModelConfig().name}
    config = changed(tiny_config, task=TaskConfig(), model=unnamed, reward=RewardConfig(), train={"save_every": 100})
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    (tmp_path / "program.py").write_text(PROGRAM)
    # Without a launcher, which would end one process where the other does.
    said = without_launcher(tmp_path / "config.yaml", tiny_model, program=tmp_path / "program.py")
    assert [code for code, _, _ in said] == [2, 2], said
    for number, (_, out, _) in enumerate(said):
        lines = out.splitlines()
        assert lines.pop() == said[0][1].splitlines()[-1]  # weights that stayed the same
        whole = {"InAStep": 1, "InAnEvaluation": 2, "InAReplay": 1, "InATrial": None}
        steps = [(name, step, "") for name, step in whole.items()]
        steps += [(name, whole[name], "-sharded") for name in ("InAnEvaluation", "InAReplay", "InATrial")]
        for (name, step, kind), line in zip(steps, lines, strict=True):
            where = "" if number else "in process 1 of 2: "
            assert line.startswith(f"{where}the reward {name} failed (ConnectionError: the judge is away)."), line
            if step is not None:
                assert f"checkpoints/last (step {step})" in line
                folder = latest(tmp_path / f"run-{name}{kind}" / "checkpoints" / "last")
                assert load_state(folder)["step"] == step
    (left_out,) = json.loads((tmp_path / "run" / "run.json").read_text())["guard"]["skipped_updates"]
    assert left_out["step"] == 1 and "gave inf for a response" in left_out["reason"]
    skipped = json.loads((tmp_path / "run" / "skipped" / "step-1.json").read_text())
    assert skipped["processes"] == 2 and len(skipped["responses"]) == 2 * config.train.batch_size
