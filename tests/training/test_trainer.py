"""Day-one invariants of the trainer, on a model of seconds and a hundred reviews."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import adapter_of, changed, stopped_after, timeless, trainer_of, with_train

from grade.commands.evaluate import evaluate_run
from grade.commands.train import train
from grade.errors import GradeError
from grade.methods.base import kl_weight
from grade.methods.grade import tau_at
from grade.methods.metrics import add_sums, step_metrics, step_sums, unique_token_ratio
from grade.model.checkpoint import load_adapter, load_state, save_checkpoint
from grade.processes import make_accelerator
from grade.replay.score import Scores
from grade.rollout import Rollout
from grade.training.evaluation import evaluate
from grade.training.responses import prompt_numbers
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer


def one_step(config):
    """Adapter after one step, gradient-norm metrics and all."""
    trainer = trainer_of(config)
    metrics = trainer.train_step()
    return adapter_of(trainer.policy), metrics


def test_accumulation_equals_the_large_batch(tiny_config):
    whole, m1 = one_step(with_train(tiny_config, batch_size=8, accumulation_steps=1))
    split, m2 = one_step(with_train(tiny_config, batch_size=2, accumulation_steps=4))
    # AdamW's first step is lr * sign(gradient): compare what it was given, not only what it did.
    assert m1["grad_norm"] == pytest.approx(m2["grad_norm"], rel=1e-4)
    assert m1["reward"] == pytest.approx(m2["reward"], rel=1e-5)
    assert m1["completions/mean_length"] == m2["completions/mean_length"]
    assert m1["kl"] == pytest.approx(m2["kl"], abs=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_accumulated_gradient_is_the_large_batch_gradient(tiny_config, reduction):
    """The gradient itself, with an adapter that is not zero so that KL counts, ragged lengths and a small batch."""

    def gradient(batch_size, accumulation_steps):
        config = with_train(tiny_config, batch_size=batch_size, accumulation_steps=accumulation_steps)
        config = replace(config, method=replace(config.method, kl_reduction=reduction, kl_coef=1.0))
        trainer = trainer_of(config)
        torch.manual_seed(0)
        for name, parameter in trainer.policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        kept = []

        def update():
            kept.append(torch.cat([p.grad.flatten() for p in trainer.policy.parameters()]))
            return kept[0].norm().item()

        trainer.gate.update = update
        metrics = trainer.train_step()
        assert metrics["kl"] > 1e-3
        return kept[0]

    whole, split = gradient(8, 1), gradient(2, 4)
    assert (whole - split).norm() < 2e-4 * whole.norm()


def test_learning_rate_zero_leaves_every_parameter_bit_identical(tiny_config):
    trainer = trainer_of(with_train(tiny_config, learning_rate=0.0, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    trainer.train_step()
    for name, parameter in trainer.policy.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_step_changes_the_adapter_and_nothing_else(tiny_config):
    trainer = trainer_of(tiny_config)
    names = {name for name, p in trainer.policy.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    trainer.train_step()
    moved = {n for n, p in trainer.policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= names


def test_kl_is_zero_at_step_zero(tiny_config):
    """Exactly, when both passes have the same shapes; below rounding when the base reads a cached prompt."""
    same = replace(tiny_config, method=replace(tiny_config.method, prompt_cache=False))
    assert one_step(same)[1]["kl"] == 0.0
    assert 0.0 <= one_step(tiny_config)[1]["kl"] < 3e-7


VARIANTS = {
    "grade": {"method": {"name": "grade"}},
    "rao": {"method": {"estimator": "rao", "rao_samples": 4}},
    "straight_through": {"method": {"estimator": "straight_through"}},
    "reinmax": {"method": {"estimator": "reinmax"}},
    "sequence_sum, ref_policy": {"method": {"kl_reduction": "sequence_sum", "kl_direction": "ref_policy"}},
    "checkpointing": {"method": {"activation_checkpointing": True}},
    "replay_dropout": {"method": {"replay_dropout": True}},
    "samples per prompt": {"generation": {"samples_per_prompt": 2, "batch_size": 2}},
    "ignore_eos": {"generation": {"ignore_eos": True}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "response only": {"reward": {"input": "response"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_takes_a_step(tiny_config, variant):
    config = tiny_config
    for section, changes in VARIANTS[variant].items():
        config = replace(config, **{section: replace(getattr(config, section), **changes)})
    trainer = trainer_of(config)
    before = adapter_of(trainer.policy)
    metrics = trainer.train_step()
    assert 0 < metrics["grad_norm"] < 10 and 0 < metrics["reward"] < 1 and metrics["kl"] < 1e-4
    assert not torch.equal(before, adapter_of(trainer.policy))
    if variant == "ignore_eos":
        assert metrics["completions/mean_length"] == config.generation.max_new_tokens


def test_smaller_decoding_batches_draw_the_same_responses(tiny_config):
    trainer = trainer_of(tiny_config)
    (whole,) = trainer.rollouts(0)
    trainer.config.generation.batch_size = 1
    parts = list(trainer.rollouts(0))
    assert len(parts) == len(whole)
    for row, part in enumerate(parts):
        length = part.tokens.shape[1]
        assert torch.equal(part.tokens[0], whole.tokens[row, :length]) and whole.mask[row].sum() == length


@pytest.mark.slow
def test_reward_rises_on_real_reviews(tiny_config, imdb_lm, shared_imdb):
    """Ten steps on a pretrained model: the mean of the last three rewards is above the first three by 0.05."""
    config = with_train(tiny_config, learning_rate=4e-3, batch_size=16)
    config = replace(
        config,
        model=replace(config.model, name=str(imdb_lm)),
        task=replace(
            config.task, dataset=str(shared_imdb), reward_examples=300, policy_examples=100, validation_examples=50
        ),
        generation=replace(config.generation, max_new_tokens=16, top_k=128),
        reward=replace(config.reward, hidden_size=64, max_tokens=64),
    )
    trainer = trainer_of(config)
    rewards = []
    for trainer.step in range(10):
        rewards.append(trainer.train_step()["reward"])
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards


def test_run_writes_what_it_promises_and_resumes_exactly(tiny_config, tmp_path):
    """A run stopped after 2 of 4 steps and resumed equals the uninterrupted one, bit for bit."""
    config = with_train(tiny_config, steps=4, save_every=1, run_dir=str(tmp_path / "whole"))
    config = replace(config, evaluation=replace(config.evaluation, every=2))
    train(config)

    stopped = with_train(config, run_dir=str(tmp_path / "stopped"))
    stopped_after(stopped)
    train(with_train(stopped, resume=True))

    whole, resumed = tmp_path / "whole", tmp_path / "stopped"
    from safetensors.torch import load_file

    for checkpoint in ("best", "last"):
        file = f"checkpoints/{checkpoint}/adapter_model.safetensors"
        first, second = load_file(whole / file), load_file(resumed / file)
        assert first.keys() == second.keys() and first
        assert all(torch.equal(first[k], second[k]) for k in first), checkpoint
    assert json.loads((whole / "evaluation.json").read_text()) == json.loads((resumed / "evaluation.json").read_text())

    assert timeless(whole / "metrics.jsonl") == timeless(resumed / "metrics.jsonl")
    check_run_directory(whole, steps=4)


def test_resuming_is_exact_with_dropout_too(tiny_config):
    """Dropout masks follow from the seed and the step, whatever torch's own generator has been through."""
    lora = replace(tiny_config.model.lora, dropout=0.5)
    method = replace(tiny_config.method, replay_dropout=True)
    config = replace(tiny_config, method=method, model=replace(tiny_config.model, lora=lora))
    torch.manual_seed(1)
    first, _ = one_step(config)
    torch.manual_seed(2)
    second, _ = one_step(config)
    other, _ = one_step(replace(config, method=replace(config.method, replay_dropout=False)))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_evaluation_has_no_dropout(tiny_config):
    """Also where replay has: two validations of a trained adapter are equal."""
    lora = replace(tiny_config.model.lora, dropout=0.5)
    config = with_train(tiny_config, learning_rate=1e-2)
    config = replace(config, method=replace(config.method, replay_dropout=True), model=replace(config.model, lora=lora))
    trainer = trainer_of(config)
    trainer.train_step()
    rows = [
        evaluate(
            trainer.policy,
            trainer.reward,
            trainer.evaluation_prompts["validation"],
            config.evaluation,
            config.generation,
            config.method,
            split="validation",
            step=1,
        )
        for _ in range(2)
    ]
    assert rows[0] == rows[1] and rows[0].kl > 0


def test_a_run_keeps_its_reward(tiny_config, tmp_path):
    """Evaluating under settings that would train another head still judges with the run's own."""
    config = with_train(tiny_config, steps=1)
    train(config)
    run_dir = Path(config.run_dir)
    heads = set(Path(config.output_dir).glob("reward-*"))
    longer = replace(config, generation=replace(config.generation, max_new_tokens=10))
    rows = evaluate_run(longer, run_dir, "best", "validation")
    assert rows[0].mean_length > 0 and set(Path(config.output_dir).glob("reward-*")) == heads
    assert (run_dir / "reward" / "head.safetensors").is_file()


def test_a_finished_run_is_not_tested_again(tiny_config):
    config = with_train(tiny_config, steps=1)
    train(config)
    with pytest.raises(GradeError, match="has had 1 steps.*nothing left"):
        train(with_train(config, resume=True))


def test_overwriting_waits_until_everything_is_loaded(tiny_config):
    config = with_train(tiny_config, steps=1)
    train(config)
    kept = Path(config.run_dir) / "evaluation.json"
    broken = replace(with_train(config, overwrite=True), model=replace(config.model, name="./nowhere"))
    with pytest.raises(GradeError, match="model.name"):
        train(broken)
    assert kept.is_file()
    before = kept.stat().st_mtime_ns
    train(with_train(config, overwrite=True))
    assert kept.stat().st_mtime_ns > before


@pytest.mark.parametrize("setting", ["train.run_dir", "output_dir"])
def test_a_folder_that_cannot_be_written_is_told_first(tiny_config, tmp_path, setting):
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "below")
    config = (
        with_train(tiny_config, run_dir=place) if setting == "train.run_dir" else replace(tiny_config, output_dir=place)
    )
    with pytest.raises(GradeError, match=f"{setting}.*cannot be written"):
        train(config)


@pytest.mark.parametrize("damage", ["state", "adapter", "no adapter"])
def test_damaged_checkpoints_are_told_in_words(tiny_config, damage):
    config = with_train(tiny_config, steps=1)
    train(config)
    last = Path(config.run_dir) / "checkpoints" / "last"
    if damage == "state":
        (last / "trainer_state.safetensors").write_bytes(b"junk")
    elif damage == "adapter":
        (last / "adapter_model.safetensors").write_bytes(b"junk")
    else:
        (last / "adapter_model.safetensors").unlink()
    with pytest.raises(GradeError, match="cannot be read|is damaged"):
        train(with_train(config, resume=True, steps=2))


def test_a_model_with_missing_tensors_is_refused(tiny_config, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_config.model.name, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["num_hidden_layers"] += 1
    if "layer_types" in settings:
        del settings["layer_types"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(GradeError, match="its files lack"):
        trainer_of(replace(tiny_config, model=replace(tiny_config.model, name=str(folder))))


def test_a_checkpoint_of_another_alpha_is_refused(tiny_config, tmp_path):
    trainer = trainer_of(tiny_config)
    save_checkpoint(tmp_path / "adapter", trainer.policy, 1)
    other = replace(tiny_config, model=replace(tiny_config.model, lora=replace(tiny_config.model.lora, alpha=64)))
    with pytest.raises(GradeError, match="lora_alpha=8.*64"):
        load_adapter(tmp_path / "adapter", trainer_of(other).policy)
    load_adapter(tmp_path / "adapter", trainer.policy)


def test_ctrl_c_saves_the_finished_step(tiny_config, keyboard):
    """The signal lands inside a step; the step is finished, saved, and only then does the run stop."""
    config = with_train(tiny_config, save_every=1000)
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    step = trainer.train_step

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        return step()

    trainer.train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    with pytest.raises(GradeError, match=r"method.kl_coef \(0.05 then, 0.5 now\)"):
        prepare_run_dir(changed(config, train={"resume": True}, method={"kl_coef": 0.5}))
    assert prepare_run_dir(with_train(config, resume=True)) == Path(config.run_dir)


def check_run_directory(run_dir, steps):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in rows if "loss" in r]
    assert [r["step"] for r in training] == list(range(steps))
    for name in (
        "reward",
        "reward_std",
        "kl",
        "entropy",
        "grad_norm",
        "completions/mean_length",
        "tau",
        "hops",
        "hop_residual",
        "topk_mass",
        "soft_hard_gap",
        "unique_token_ratio",
        "tokens_per_second",
        "memory/peak_gib",
        "seconds/rollout",
        "seconds/policy_forward",
        "seconds/base_forward",
        "seconds/head",
        "seconds/base_backward",
        "seconds/hops",
        "seconds/policy_backward",
        "seconds/update",
    ):
        assert name in training[0], name
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["validation"][0]["model"] == "base"
    assert evaluation["best"]["step"] in [r["step"] for r in evaluation["validation"][1:]]
    assert max(r["reward"] for r in evaluation["validation"][1:]) == evaluation["best"]["reward"]
    assert set(evaluation["test"]) == {"base", "best"}
    assert evaluation["test"]["best"]["step"] == evaluation["best"]["step"]
    assert (run_dir / "config.yaml").is_file() and (run_dir / "run.json").is_file()
    assert any((run_dir / "tensorboard").iterdir())
    assert (run_dir / "samples.jsonl").read_text().strip()


def test_a_saved_adapter_loads_in_peft_and_gives_the_policy(tiny_config, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = trainer_of(with_train(tiny_config, learning_rate=1e-2))
    trainer.train_step()
    save_checkpoint(tmp_path / "adapter", trainer.policy, 1)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_config.model.name, dtype=torch.float32), str(tmp_path / "adapter")
    )
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.no_grad():
        ours, theirs = trainer.policy.model(ids).logits, loaded(ids).logits
        with trainer.policy.state(adapters=False):
            base = trainer.policy.model(ids).logits
    assert torch.equal(ours, theirs) and not torch.allclose(ours, base)


def test_run_directory_in_use_is_refused_and_nothing_is_lost(tiny_config, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    config = with_train(tiny_config, run_dir=str(run_dir))
    with pytest.raises(GradeError, match="train.run_dir.*not empty.*--train.run_dir"):
        prepare_run_dir(config)
    with pytest.raises(GradeError, match="nothing is deleted there"):
        prepare_run_dir(with_train(config, overwrite=True))
    with pytest.raises(GradeError, match="nothing to continue"):
        prepare_run_dir(with_train(config, resume=True))
    assert (run_dir / "notes.txt").read_text() == "mine"


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_config):
    trainer = trainer_of(changed(tiny_config, guard={"max_skipped": 1}))
    before = adapter_of(trainer.policy)
    accumulate = trainer.method.accumulate

    def poisoned(*args, **options):
        result = accumulate(*args, **options)
        trainer.policy.parameters()[0].grad[0] = float("nan")
        return result

    trainer.method.accumulate = poisoned
    with pytest.raises(GradeError, match=r"^step 0: the update was not made \(the gradient's norm is nan\)"):
        trainer.fit()
    assert torch.equal(before, adapter_of(trainer.policy))


def test_every_prompt_once_an_epoch():
    count, per_step = 10, 4
    numbers = [n for step in range(5) for n in prompt_numbers(step, per_step, count, seed=3)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert prompt_numbers(0, 4, 10, seed=3) != prompt_numbers(0, 4, 10, seed=4)
    assert len(prompt_numbers(0, 25, 10, seed=3)) == 25  # more than an epoch in one step


def test_tau_is_linear_then_constant():
    assert [tau_at(s, 2.0, 0.5, 10) for s in (0, 5, 10, 50)] == [2.0, 1.25, 0.5, 0.5]


def test_kl_weights_by_hand():
    """Two responses of 3 and 1 tokens, in a step of 8 tokens and 4 responses."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert kl_weight(mask, "token_mean", 0.4, 8, 4).tolist() == [[0.05, 0.05, 0.05], [0.05, 0.0, 0.0]]
    assert kl_weight(mask, "sequence_sum", 0.4, 8, 4).tolist() == [[0.1, 0.1, 0.1], [0.1, 0.0, 0.0]]


def test_unique_token_ratio_counts_real_tokens_only():
    tokens = torch.tensor([[5, 5, 7, 9], [0, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert unique_token_ratio(tokens, mask).tolist() == pytest.approx([2 / 3, 1 / 4])


def test_metrics_by_hand():
    """Two responses in two micro-batches: rewards 1 and 3, lengths 2 and 3, KL 2 and 6 nats; EOS is id 9."""

    def part(tokens, reward, kl):
        mask, ones = torch.ones(1, len(tokens), dtype=torch.bool), torch.ones(1, len(tokens))
        rollout = Rollout(
            prompt_ids=ones.long(),
            prompt_mask=mask,
            tokens=torch.tensor([tokens]),
            mask=mask,
            indices=ones.long()[..., None],
            token_weight=ones,
            rows=ones.long(),
        )
        scores = Scores(torch.tensor([reward]), torch.tensor([kl]), 2 * ones, -3 * ones, 0.5 * ones)
        return step_sums(
            rollout, scores, torch.tensor([9]), per_response={"hops": torch.tensor([2])}, per_token={"gap": ones}
        )

    sums = add_sums(add_sums({}, part([5, 9], 1.0, [0.5, 1.5])), part([7, 7, 7], 3.0, [1.0, 2.0, 3.0]))
    metrics = step_metrics(sums)
    assert metrics["reward"] == 2 and metrics["reward_std"] == pytest.approx(2**0.5)
    assert metrics["kl"] == pytest.approx(8 / 5) and metrics["kl_sequence"] == 4
    assert metrics["kl_sequence_std"] == pytest.approx(8**0.5)
    assert metrics["completions/mean_length"] == 2.5 and metrics["tokens"] == 5
    assert metrics["entropy"] == 2 and metrics["logprob"] == -3 and metrics["topk_mass"] == 0.5
    assert metrics["unique_token_ratio"] == pytest.approx((1 + 1 / 3) / 2) and metrics["eos_rate"] == 0.5
    assert metrics["hops"] == 2 and metrics["gap"] == 1
