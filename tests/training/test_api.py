"""Training from Python: models, rewards and prompts as objects, callbacks, and what is left in hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import datasets
import pytest
import torch
from in_processes import without_launcher
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny_run import adapter_of, changed, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import grade
from grade.commands.evaluate import evaluate_run
from grade.commands.generate import generate_from
from grade.config.reading import config_to_yaml
from grade.config.sealed import config_from_sealed
from grade.model.checkpoint import verified_step
from grade.tasks.given import GivenTask, read_prompts

PROMPTS = ["I watched this film last night.", "We saw it at home.", "This is a comedy.", "It tells the story."]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}answer: {% endif %}"
)


class Towards(grade.DifferentiableReward):
    """How far a response's mean embedding points along a direction, in the policy's own table."""

    raises = "the mean embedding's component"

    def __init__(self, policy, sign=1.0):
        self.tables = [grade.EmbeddingTable(policy.embedding, policy.embedding_scale)]
        self.direction = sign * torch.ones(policy.embedding.shape[1])

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return (fed[0].float() @ self.direction).sum(1) / rollout.mask.sum(1)


class Backwards(Towards):
    def __init__(self, policy):
        super().__init__(policy, -1.0)


class Length(grade.RewardFunction):
    def score(self, rollout):
        return rollout.mask.sum(1).float()


@pytest.fixture
def config(tiny_config):
    """Of a run of four steps; what objects decide is left at the defaults."""
    unnamed = {"name": grade.ModelConfig().name}
    return changed(tiny_config, task=grade.TaskConfig(), model=unnamed, reward=grade.RewardConfig())


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def make(model, config, reward=Towards, prompts=PROMPTS, **rest):
    return grade.GradeTrainer(model, reward, prompts, config=config, **rest)


def test_importing_grade_is_light_and_offers_everything():
    code = (
        "import sys, grade; heavy = {'torch', 'transformers', 'yaml', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy; assert set(grade.__all__) <= set(dir(grade)); "
        "grade.GradeConfig(); assert 'torch' not in sys.modules; "
        "assert all(getattr(grade, name) is not None for name in grade.__all__); "
        "assert not hasattr(grade, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_from_python(tiny_model, config, tmp_path):
    trainer = make(tiny_model, config, eval_prompts=PROMPTS[:2], test_prompts=PROMPTS[2:])
    before = adapter_of(trainer.policy)
    result = trainer.train()
    assert result.step == 4 and result.best_step in (2, 4) and result.run_dir == tmp_path / "run"
    assert len(timeless(result.metrics)) == 4 + 3  # steps and validations
    assert (result.base.split, result.best.split, result.best.prompts) == ("test", "test", 2)
    assert result.best.reward > result.base.reward and not torch.equal(adapter_of(trainer.policy), before)
    record = json.loads((result.run_dir / "run.json").read_text())
    assert record["reward"] == Towards.raises and record["task"]["splits"]["test"]["examples"] == 2
    with pytest.raises(grade.GradeError, match="trained already"):
        trainer.train()
    # Evaluation repeats itself, and the best checkpoint is what is in hand.
    assert trainer.evaluate(split="test").reward == result.best.reward
    assert trainer.evaluate(split="test", base=True).reward == result.base.reward
    assert trainer.evaluate(PROMPTS[:3]).prompts == 3
    answers = trainer.generate(PROMPTS[:2], samples=2)
    assert len(answers) == 4 and answers == trainer.generate(PROMPTS[:2], samples=2)
    assert answers[::2] != trainer.generate(PROMPTS[:2], base=True)

    ids = torch.tensor([trainer.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        expected = trainer.policy.model(ids).logits
        adapter = AutoPeftModelForCausalLM.from_pretrained(trainer.save(tmp_path / "adapter"))
        merged = AutoModelForCausalLM.from_pretrained(trainer.save(tmp_path / "merged", merge=True))
        torch.testing.assert_close(adapter(ids).logits, expected)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(trainer.policy.model(ids).logits, expected)  # merging was done on a copy
    assert "optimizer steps" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(grade.GradeError, match="not empty"):
        trainer.save(tmp_path / "merged")


def test_a_model_given_as_an_object_trains_as_its_folder_does(tiny_model, model, config, tmp_path):
    results = [
        make(given, changed(config, train={"run_dir": str(tmp_path / name)})).train()
        for name, given in (("folder", tiny_model), ("object", model))
    ]
    assert timeless(results[0].metrics) == timeless(results[1].metrics)
    assert results[0].best.split == "validation"  # there is no test
    run_dir = tmp_path / "object"
    made = config_from_sealed(run_dir / "config.yaml")
    for use in (lambda: generate_from(made, run_dir, ["a"]), lambda: evaluate_run(made, run_dir, "best", "validation")):
        with pytest.raises(grade.GradeError, match=r"given as an object.*save\(folder, merge=True\)"):
            use()


def test_a_peft_model_keeps_its_adapter(model, tokenizer, config):
    given = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    given.requires_grad_(False)  # as it is loaded for inference
    before = adapter_of_names(given)
    trainer = make(given, changed(config, train={"steps": 1}), tokenizer=tokenizer)
    assert torch.equal(adapter_of_names(trainer.policy.model), before) and not trainer.policy.has_reference
    result = trainer.train()
    assert abs(result.base.kl) < 1e-9 and not torch.equal(adapter_of_names(trainer.policy.model), before)
    kept = config_from_sealed(result.run_dir / "config.yaml").model.lora
    assert (kept.r, kept.alpha, kept.target_modules) == (3, 5, ["down_proj", "q_proj"])


def test_a_peft_model_as_it_started_may_be_the_reference(model, tokenizer, config):
    given = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    config = changed(config, model={"reference": "initial"}, train={"steps": 2})
    trainer = make(given, config, tokenizer=tokenizer)
    result = trainer.train()
    kl = [row["kl"] for row in timeless(result.metrics) if "kl" in row]
    assert trainer.policy.has_reference and abs(kl[0]) < 1e-5 < abs(result.base.kl)


@pytest.mark.parametrize("more", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"bias": "lora_only"}])
def test_a_peft_model_with_more_than_lora_is_refused(model, tokenizer, config, more):
    given = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **more))
    with pytest.raises(grade.GradeError, match="more than a LoRA adapter .*(pissa|use_dora|bias)"):
        make(given, config, tokenizer=tokenizer)


IN_TWO_PROCESSES = """
import os, sys, torch, grade
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from grade.config.reading import config_from_yaml
rank, folder, moved = int(os.environ["RANK"]), sys.argv[2], sys.argv[3] == "moved"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
if moved:
    model.model.norm.weight.data += rank
torch.manual_seed(rank)
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
trainer = grade.GradeTrainer(
    model, lambda prompts, completions, **rest: [1.0 * len(c) for c in completions], ["We saw it."] * 4,
    config=config_from_yaml(sys.argv[1]),
)
trainer.train()
total = sum(p.double().abs().sum().item() for p in trainer.policy.parameters())
print(f"sum {total}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("moved", ["same", "moved"])
def test_a_peft_model_is_the_same_in_every_process(tiny_model, config, tmp_path, moved):
    config = changed(config, method={"name": "reinforce"}, train={"steps": 1})
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    (tmp_path / "program.py").write_text(IN_TWO_PROCESSES)
    arguments = (tmp_path / "config.yaml", tiny_model, moved)
    done = without_launcher(*arguments, program=tmp_path / "program.py", timeout=200)
    if moved == "moved":
        words = "do not have the same inputs, but different ones: the base model's weights"
        assert all(code != 0 and words in errors for code, _, errors in done), done
    else:
        assert [code for code, _, _ in done] == [0, 0], done
        sums = [line for _, said, _ in done for line in said.splitlines() if line.startswith("sum")]
        assert len(sums) == 2 and sums[0] == sums[1]


def adapter_of_names(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_" in name]).clone()


def test_a_model_with_another_adapter_is_refused(model, tokenizer, config):
    given = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(grade.GradeError, match="called default"):
        make(given, config, tokenizer=tokenizer)
    for field, value in (("finetuning", "full"), ("adapter", "a-folder"), ("quantization", "4bit")):
        with pytest.raises(grade.GradeError, match=f"model.{field} is {value}, but .* given as an object"):
            make(model, changed(config, model={field: value}), tokenizer=tokenizer)
    with pytest.raises(grade.GradeError, match="float16"):
        make(AutoModelForCausalLM.from_config(model.config).half(), config, tokenizer=tokenizer)
    with pytest.raises(grade.GradeError, match="no name by which to find its tokenizer"):
        make(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=2)), config)


def test_what_is_no_model_or_reward_is_told_first_and_by_name(tiny_model, config):
    for given, words in (
        (None, "^model is None: give a hub name"),
        (torch.nn.Linear(2, 2), "^model is a Linear: give"),
    ):
        with pytest.raises(grade.GradeError, match=words):
            make(given, config)
    with pytest.raises(grade.GradeError, match="^reward is None: give a function"):
        make(tiny_model, config, reward=None)


@pytest.mark.parametrize("argument", ["prompts", "eval_prompts", "test_prompts"])
def test_a_prompt_that_is_too_long_is_told_by_its_argument(tiny_model, model, config, argument):
    long = [PROMPTS[0], " ".join(PROMPTS * 60)]
    given = {"prompts": PROMPTS, argument: long}
    for named in (tiny_model, model):
        with pytest.raises(
            grade.GradeError, match=rf"^{argument}\[1\] has \d+ tokens, .*config.generation.max_new_tok"
        ):
            make(named, config, **given)
    if argument == "prompts":
        trainer = make(tiny_model, config)
        with pytest.raises(grade.GradeError, match=r"^prompts\[1\] has .* or lower config.generation.max_new_tokens"):
            trainer.evaluate(long)
        with pytest.raises(grade.GradeError, match=r"^prompts\[0\] has .* or lower max_new_tokens"):
            trainer.generate(PROMPTS, max_new_tokens=10**4)


def test_the_commands_say_what_was_given_in_python(tiny_model, config):
    result = make(tiny_model, changed(config, train={"steps": 2})).train()
    made = config_from_sealed(result.run_dir / "config.yaml")
    for split, argument in (("test", "test_prompts"), ("validation", "eval_prompts")):
        with pytest.raises(grade.GradeError, match=rf"prompts that were given in Python.*{argument}=.*--task.dataset"):
            evaluate_run(made, result.run_dir, "best", split)
    with pytest.raises(grade.GradeError, match="task.dataset is given:prompts: those were given as objects in Python"):
        grade.GradeTrainer.from_config(changed(made, train={"run_dir": f"{made.train.run_dir}-2"})).train()
    with pytest.raises(grade.GradeError, match="model.name is given:Llama: that was given as an object in Python"):
        grade.GradeTrainer.from_config(changed(made, model={"name": "given:Llama"})).policy  # noqa: B018
    longer = [*PROMPTS, " ".join(PROMPTS)]
    with pytest.raises(
        grade.GradeError, match=r"the prompts' longest, in tokens \(\d+ then, \d+ now\).*config.train.run"
    ):
        make(tiny_model, changed(config, train={"resume": "auto"}), prompts=longer).train()


def test_prompts_of_every_kind_have_the_ids_of_the_tokenizer(tokenizer):
    texts = read_prompts(PROMPTS, tokenizer)
    assert texts.ids == tokenizer(PROMPTS)["input_ids"] and texts.conversations is None
    assert read_prompts(texts.ids, tokenizer).ids == texts.ids
    assert [texts.kind, read_prompts(texts.ids, tokenizer).kind] == ["texts", "token ids"]
    assert read_prompts([torch.tensor(row) for row in texts.ids], tokenizer).ids == texts.ids
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS, "answer": [3, 1, 4, 1]})
    read = read_prompts(rows, tokenizer)
    assert read.ids == texts.ids and read.columns == {"answer": [3, 1, 4, 1]}
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    answered = [[*chat, {"role": "assistant", "content": "Fine."}] for chat in chats]  # as data for fine-tuning is
    rows = [{"prompt": chat} for chat in chats]
    for given in (chats, answered, rows, datasets.Dataset.from_dict({"messages": chats})):
        read = read_prompts(given, tokenizer)
        assert read.ids == expected and read.conversations == chats
    chat = grade.TokenizerConfig(chat=True, system_prompt="Be brief.")
    chats = [[{"role": "system", "content": "Be brief."}, *chat_] for chat_ in chats]
    expected = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    read = read_prompts(PROMPTS, tokenizer, chat=chat)
    assert read.ids == expected and GivenTask({"policy": read}).describe()["prompts"] == "conversations"


def test_given_prompts_are_known_by_their_columns_names_and_values(tokenizer):
    def known(**columns):
        rows = [{"prompt": PROMPTS[0], **columns}]
        return GivenTask({"policy": read_prompts(rows, tokenizer)}).describe()["splits"]["policy"]["sha256"]

    long = torch.zeros(2000)
    other = long.clone()
    other[1000] = 1  # where repr leaves out
    same = known(answer=long), known(answer=long.clone()), known(answer=long.tolist())
    assert len({*same}) == 1 and len({same[0], known(answer=other), known(question=long), known()}) == 4
    with pytest.raises(grade.GradeError, match="column 'answer' holds <object .* which is no JSON"):
        known(answer=object())


def test_a_head_is_trained_on_data_of_ones_own(tiny_model, config):
    texts = [f"{prompt} The plot was {word}." for prompt in PROMPTS for word in ("great", "awful")]
    settings = grade.RewardConfig(epochs=2, hidden_size=8, max_tokens=32)
    reward = grade.RewardModel(texts, labels=[1, 0] * 4, settings=settings)
    assert 0 < make(tiny_model, config, reward=reward).evaluate().reward < 1


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ("one text", "not a sequence"),
        ([], "is empty"),
        (["a", [1]], "unlike the first"),
        ([1.5], "no prompt"),
        ([[10**6]], "does not know"),
        ([{"text": "a"}], "none called prompt"),
        (["fine", ""], "no tokens"),
    ],
)
def test_prompts_that_are_none(tokenizer, prompts, why):
    with pytest.raises(grade.GradeError, match=why):
        read_prompts(prompts, tokenizer)


def test_a_reward_is_known_again_by_its_source_and_prompts_by_their_content(tiny_model, config):
    half = changed(config, train={"steps": 2})
    make(tiny_model, half).train()
    go_on = changed(config, train={"resume": "auto"})
    with pytest.raises(grade.GradeError, match="something else: the reward"):
        make(tiny_model, go_on, reward=Backwards).train()
    with pytest.raises(grade.GradeError, match="something else: the data"):
        make(tiny_model, go_on, prompts=PROMPTS[::-1]).train()
    record = json.loads((make(tiny_model, go_on).train().run_dir / "run.json").read_text())
    assert record["inputs"]["reward"].startswith("test_api.Towards ")
    assert [session["after_step"] for session in record["sessions"]] == [0, 2]


def test_a_reward_that_is_none(tiny_model, config):
    with pytest.raises(grade.GradeError, match="^reward is 3"):
        make(tiny_model, config, reward=3)

    def of_another_vocabulary(policy):
        made = Towards(policy)
        made.tables = [grade.EmbeddingTable(policy.embedding[:-1])]
        return made

    with pytest.raises(grade.GradeError, match="same vocabulary"):
        make(tiny_model, config, reward=of_another_vocabulary)


def test_a_reward_function_is_followed_by_a_policy_gradient(tiny_model, config):
    config = changed(config, method={"name": "reinforce"}, train={"steps": 2})
    assert make(tiny_model, config, reward=Length).train().step == 2


def test_a_plain_function_reads_texts_and_columns(tiny_model, config):
    seen = []

    def short(prompts, completions, wanted, completion_ids):
        seen.append((prompts, completions, wanted))
        return [-abs(len(ids) - want) if want else None for ids, want in zip(completion_ids, wanted, strict=True)]

    config = changed(config, method={"name": "reinforce"}, train={"steps": 2})
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS, "wanted": [2, 4, 6, 0]})
    trainer = make(tiny_model, config, reward=short, prompts=rows)
    trainer.train()
    wanted = dict(zip(PROMPTS, rows["wanted"], strict=True))
    assert all([wanted[p] for p in prompts] == given for prompts, _, given in seen)
    seen.clear()
    trainer.evaluate([{"prompt": PROMPTS[0], "wanted": 7}])
    assert seen[-1][2] == [7]


def test_several_rewards_with_weights_are_logged_by_name(tiny_model, config):
    def length(prompts, completions):
        return [float(len(text)) for text in completions]

    rewards = [Towards, (length, 0.01), grade.Term(length, "scaled", scale=0.1, normalize=True), (Length(), 0)]
    result = make(tiny_model, config, reward=rewards).train()
    row = timeless(result.metrics)[1]
    names = {name.split("/")[1] for name in row if name.startswith("rewards/")}
    assert names == {"Towards", "length", "scaled", "Length"}
    parts = result.base.details
    expected = parts["rewards/Towards/mean"] + 0.11 * parts["rewards/length/mean"]
    assert result.base.reward == pytest.approx(expected)
    with pytest.raises(grade.GradeError, match="no pair of a reward and a weight"):
        make(tiny_model, config, reward=[(Towards, "much")])


class Listener(grade.Callback):
    def __init__(self, stop_at=None, fails_at=None):
        self.heard, self.stop_at, self.fails_at = [], stop_at, fails_at

    def on_step(self, trainer, step, metrics):
        self.heard.append(("step", step, metrics["reward"], len(trainer.generate(PROMPTS[:1]))))
        if step == self.fails_at:
            raise ValueError("of my own")
        return "stop" if step == self.stop_at else None

    def on_validation(self, trainer, evaluation):
        self.heard.append(("validation", evaluation.step, evaluation.model))

    def on_save(self, trainer, folder):
        self.heard.append(("save", folder.name, (folder / "adapter_config.json").is_file()))

    def on_end(self, trainer):
        self.heard.append(("end",))


def test_callbacks_hear_of_a_run_and_change_nothing_of_it(tiny_model, config, tmp_path):
    quiet = make(tiny_model, changed(config, train={"run_dir": str(tmp_path / "quiet")})).train()
    listener = Listener()
    result = make(tiny_model, config, callbacks=[listener]).train()
    assert timeless(result.metrics) == timeless(quiet.metrics)
    kinds = [heard[0] for heard in listener.heard]
    assert kinds.count("step") == 4 and kinds.count("validation") == 3 and kinds[0] == "validation"
    assert kinds[-1] == "end" and ("save", "last", True) in listener.heard and ("save", "best", True) in listener.heard


def test_a_callback_ends_a_run_which_goes_on_later(tiny_model, config):
    listener = Listener(stop_at=3)
    result = make(tiny_model, config, callbacks=[listener]).train()
    assert result.step == 3 and listener.heard[-1] == ("end",)
    assert ("validation", 3, "policy") in listener.heard
    assert make(tiny_model, changed(config, train={"resume": "auto"})).train().step == 4


def test_a_callback_that_raises_ends_a_run_in_words_after_saving(tiny_model, config):
    with pytest.raises(grade.GradeError, match="Listener.on_step raised ValueError: of my own. Kept .*step 1"):
        make(tiny_model, config, callbacks=[Listener(fails_at=1)]).train()
    assert make(tiny_model, changed(config, train={"resume": "auto"})).train().step == 4
    with pytest.raises(grade.GradeError, match="is no grade.Callback"):
        make(tiny_model, config, callbacks=[print])


class Interrupted(grade.Callback):
    def on_step(self, trainer, step, metrics):
        if step == 3:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_policy_has_the_steps_that_it_had(tiny_model, config, tmp_path, keyboard):
    trainer = make(tiny_model, config, callbacks=[Interrupted()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.evaluate().step == 3  # which was not validated: the best checkpoint is that of step 2
    assert verified_step(trainer.save(tmp_path / "adapter")) == 3


def test_from_config_is_what_the_command_line_runs(tiny_config):
    trainer = grade.GradeTrainer.from_config(tiny_config)
    result = trainer.train()
    assert result.best.split == "test" and result.best.reward == trainer.evaluate(split="test").reward
    with pytest.raises(grade.GradeError, match="those of its settings"):
        trainer.evaluate(PROMPTS)
