"""A policy whose responses can all be enumerated, its exact gradient, and one gradient per response through `replay`.

The policy is a transformers Llama with a LoRA adapter in float64 that knows `symbols` tokens, all of them candidates
of every draw, so an expectation over responses is a sum of `symbols ** length` terms and the gradient of

    J = E[-r(Y) + kl_coef * sum over tokens of kl(policy‖ref)]

is autograd through that sum. Tokens are drawn at temperature 1: tau shapes what the estimators differentiate, never
the probabilities here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from grade.model.passes import BasePass
from grade.model.policy import Policy
from grade.replay.replay import ReplaySettings, prepare, replay
from grade.rewards.base import DifferentiableReward, EmbeddingTable
from grade.rollout import Rollout
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample

PROMPT = [0, 1]


class SymbolTokenizer:
    """The part of a tokenizer that `Policy` reads."""

    pad_token_id = eos_token_id = 0

    def __init__(self, symbols: int):
        self.symbols = symbols

    def get_vocab(self) -> dict:
        return {f"<{i}>": i for i in range(self.symbols)}


def symbol_policy(symbols: int, spread: float, seed: int) -> Policy:
    """Random weights, large enough for distributions that are far from uniform and from the reference's.

    Args:
        spread: standard deviation of the token embeddings about a common vector, in units of that vector's. The
            larger, the less a derivative at one token says about the others: near 0 the model is linear in the choice.
    """
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=symbols,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).requires_grad_(False)
    table = base.get_input_embeddings().weight
    table.copy_((torch.randn(table.shape[1]) + spread * torch.randn_like(table)) / (1 + spread**2) ** 0.5)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return Policy(model.double(), SymbolTokenizer(symbols))


class EmbeddingReward(DifferentiableReward):
    """`function`, a smooth one, of the embeddings [B, S, d] of a response's tokens, in the policy's own table."""

    def __init__(self, policy: Policy, function: Callable[[Tensor], Tensor]):
        self.tables, self.function = [EmbeddingTable(policy.embedding, policy.embedding_scale)], function

    def value(
        self, rollout: Rollout, base: BasePass, fed: Sequence[Tensor] = (), *, activation_checkpointing: bool = False
    ) -> Tensor:
        return self.function(fed[0])


def network_reward(policy: Policy, length: int, seed: int) -> EmbeddingReward:
    """A random two-layer tanh network on all tokens at once, its inputs to tanh of standard deviation about 1."""
    generator = torch.Generator().manual_seed(seed)
    table = policy.embedding
    first = torch.randn(length * table.shape[1], 16, generator=generator, dtype=table.dtype)
    first /= table.std() * first.shape[0] ** 0.5
    second = torch.randn(16, generator=generator, dtype=table.dtype) / 4
    return EmbeddingReward(policy, lambda x: torch.tanh(x.flatten(1) @ first) @ second)


class LogitGradient(NamedTuple):
    """The exact gradient of -J, at every token's logits; [Y, S, V] in the order of the responses, where
    those with the same tokens before a step have the same values at it.

    Args:
        p: distributions of the tokens.
        probability: [Y] of the responses.
        returns: [Y, S], the reward less KL's weight times that of the steps after, by whose means tokens differ.
        gradient: the whole one; `kl_gradient` is KL's at the step itself, a part of it.
    """

    p: Tensor
    probability: Tensor
    returns: Tensor
    gradient: Tensor
    kl_gradient: Tensor


@dataclass
class Problem:
    """What is to be differentiated. Y = symbols ** length responses, P parameters."""

    policy: Policy
    reward: EmbeddingReward
    length: int
    kl_coef: float

    @property
    def responses(self) -> Tensor:
        """[Y, S] int64."""
        return torch.cartesian_prod(*[torch.arange(self.policy.vocab_size)] * self.length).view(-1, self.length)

    def rollout(self, tokens: Tensor, rows: Tensor, seed: int = 0) -> Rollout:
        """Responses `tokens` [B, S] as if they had been drawn with the noise of `rows` [B, S]."""
        ids = torch.tensor([PROMPT]).expand(len(tokens), -1)
        return Rollout(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            torch.arange(self.policy.vocab_size).expand(*tokens.shape, -1),
            torch.ones(tokens.shape),
            rows,
            ignore_eos=True,
            seed=seed,
            samples_per_prompt=len(tokens),
        )

    def drawn(self, count: int, seed: int) -> Rollout:
        """`count` responses from the sampler."""
        ids = torch.tensor([PROMPT])
        sampling = Sampling(max_new_tokens=self.length, top_k=self.policy.vocab_size, ignore_eos=True)
        return sample(
            self.policy,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            sampling,
            seed=seed,
            first_rows=torch.arange(count) * self.length,
            samples_per_prompt=count,
        )

    def logits(self, tokens: Tensor, *, adapters: bool = True) -> Tensor:
        """[B, S, V] of the policy, or of the reference, from transformers' own forward over prompt and response."""
        ids = torch.cat([torch.tensor([PROMPT]).expand(len(tokens), -1), tokens], dim=1)
        with self.policy.state(adapters=adapters):
            return self.policy.causal_lm(input_ids=ids, use_cache=False).logits[:, len(PROMPT) - 1 : -1]

    def terms(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability, reward, sum of KL) of responses `tokens`, [B] each; differentiable but for the reward."""
        logp = self.logits(tokens).log_softmax(-1)
        with torch.no_grad():
            logq = self.logits(tokens, adapters=False).log_softmax(-1)
            reward = self.reward.function(self.policy.embed(tokens))
        kl = (logp.exp() * (logp - logq)).sum((1, 2))
        return logp.gather(-1, tokens[..., None]).sum((1, 2)), reward, kl

    def probability(self) -> Tensor:
        """[Y] of all responses."""
        with torch.no_grad():
            return self.terms(self.responses)[0].exp()

    def exact_gradient(self) -> Tensor:
        """[P], grad J by autograd through the sum over all responses."""
        logprob, reward, kl = self.terms(self.responses)
        loss = (logprob.exp() * (self.kl_coef * kl - reward)).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.policy.parameters())])

    def replayed(self, rollout: Rollout, settings: ReplaySettings) -> Tensor:
        """[B, P], the gradient of every response by itself, from one `replay` of them all."""
        ones = torch.ones(rollout.tokens.shape, dtype=self.policy.dtype)
        weights = dict(reward_weight=ones[:, 0], kl_weight=self.kl_coef * ones)
        settings = replace(settings, prompt_cache=False)  # all responses to a prompt would share its pass's gradient
        return response_gradients(self.policy, lambda: replay(self.policy, self.reward, rollout, settings, **weights))

    def at_logits(self, rollout: Rollout, settings: ReplaySettings) -> Tensor:
        """[B, S, V], minus the gradient of every response at its steps' logits: KL's at its own step left out."""
        ones = torch.ones(rollout.tokens.shape, dtype=self.policy.dtype)
        prepared = prepare(
            self.policy, self.reward, rollout, settings, reward_weight=ones[:, 0], kl_weight=self.kl_coef * ones
        )
        gradient = -prepared.done.real.dense(prepared.logit_gradient(settings))
        return torch.zeros_like(gradient).scatter(-1, rollout.indices, gradient)  # the sampler sorts its candidates

    def exact_at_logits(self) -> LogitGradient:
        """By autograd through the sum over all responses, the logits of every prefix being parameters."""
        tokens = self.responses
        with torch.no_grad():
            logits = self.logits(tokens)
            logq = self.logits(tokens, adapters=False).log_softmax(-1)
            reward = self.reward.function(self.policy.embed(tokens))
        logits.requires_grad_()
        logp = logits.log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)  # [Y, S]
        probability = logp.gather(-1, tokens[..., None]).sum((1, 2)).exp()
        objective = (probability * (reward - self.kl_coef * kl.sum(1))).sum()
        (shares,) = torch.autograd.grad(objective, logits, retain_graph=True)  # of a prefix, from every response
        (kl_gradient,) = torch.autograd.grad(-self.kl_coef * kl.sum(), logits)
        p, probability, kl = logp.detach().exp(), probability.detach(), kl.detach()
        returns = reward[:, None] - self.kl_coef * (kl.sum(1, keepdim=True) - kl.cumsum(1))
        gradient = self.prefix_mean(shares / probability[:, None, None], probability)
        return LogitGradient(p, probability, returns, gradient, kl_gradient)

    def prefix_mean(self, values: Tensor, probability: Tensor) -> Tensor:
        """[Y, S, V], at every step the mean of values [Y, S, V] over responses with the same tokens before it."""
        symbols, found = self.policy.vocab_size, []
        for step in range(self.length):
            prefixes = (symbols**step, -1)
            weight = probability.view(prefixes)  # responses of a prefix stand next to each other
            weight = weight / weight.sum(1, keepdim=True)
            mean = torch.einsum("py,pyv->pv", weight, values[:, step].unflatten(0, prefixes))
            found.append(mean.repeat_interleave(weight.shape[1], dim=0))
        return torch.stack(found, dim=1)

    def score_function(self) -> tuple[Tensor, Tensor]:
        """Per response, (kl_coef * KL - r) * grad log pi + kl_coef * grad KL, and grad log pi; [Y, P] each.

        The first minus b times the second is REINFORCE's gradient with the baseline -b.
        """

        def of(loss: Callable[..., Tensor]) -> Tensor:
            return response_gradients(self.policy, lambda: loss(*self.terms(self.responses)).sum().backward())

        def surrogate(logprob: Tensor, reward: Tensor, kl: Tensor) -> Tensor:
            return (self.kl_coef * kl - reward).detach() * logprob + self.kl_coef * kl

        return of(surrogate), of(lambda logprob, reward, kl: logprob)


def response_gradients(policy: Policy, run: Callable[[], object]) -> Tensor:
    """[B, P], response by response, the gradient that `run`, one pass of the policy and its backward, adds up.

    The adapter's parameters are the weights of linear layers, so a response's share is the product of what went into
    the layer at its positions and the last gradient that came back there: hops go through the graph before it.
    """
    layers = {m.weight: m for m in policy.model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    inputs, outputs = {}, {}

    def record(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        if layer in inputs:
            raise RuntimeError("a layer was passed twice, and its gradient is that of one pass")
        inputs[layer] = args[0].detach()
        output.register_hook(lambda gradient: outputs.update({layer: gradient}))

    hooks = [layer.register_forward_hook(record) for layer in layers.values()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    shares = []
    for parameter in policy.parameters():
        parameter.grad = None
        layer = layers[parameter]
        shares.append(torch.einsum("bto,bti->boi", outputs[layer], inputs[layer]).flatten(1))
    return torch.cat(shares, dim=1)
