"""Whether a policy is still one: what must be finite before an update counts, a checkpoint is written or chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from grade.errors import GradeError
from grade.model.policy import Policy
from grade.training.checkpoints import Checkpoints
from grade.training.optimization import Optimization

_MEASURES = ("loss", "reward", "kl", "entropy", "grad_norm")


def broken_measure(values: Mapping[str, float]) -> str | None:
    """The first measure of a step or a validation that no sound policy has, as words; None if there is none."""
    wrong = next((name for name in _MEASURES if name in values and not math.isfinite(values[name])), None)
    return None if wrong is None else f"{wrong} is {values[wrong]}"


@torch.no_grad()
def broken_policy(policy: Policy, trained: Iterable[Tensor], prompt: list[int]) -> str | None:
    """What is not finite of a policy, as words; None of a sound one.

    Args:
        trained: its trained parameters and those of its method.
        prompt: token ids whose next token's logits are looked at.
    """
    if not torch.stack([parameter.isfinite().all() for parameter in trained]).all():
        return "its weights are not finite"
    ids = torch.tensor([prompt], device=policy.device)
    with policy.state(adapters=True):
        hidden = policy.hidden(policy.embed(ids), torch.ones_like(ids, dtype=torch.bool), padded=False)
    return None if (hidden[:, -1] @ policy.head.weight.T).isfinite().all() else "its logits are not finite"


class Soundness:
    """Ends a run before a broken policy is saved or chosen.

    Args:
        prompts: token ids of the training split.
    """

    def __init__(
        self, policy: Policy, optimization: Optimization, prompts: Sequence[list[int]], checkpoints: Checkpoints
    ) -> None:
        self._policy, self._optimization, self._prompts = policy, optimization, prompts
        self._checkpoints = checkpoints
        self._sound_at: int | None = None  # the step after which the policy was last found to be sound

    def check(self, step: int) -> None:
        """Look at the policy after `step` optimizer steps, unless it was looked at there.

        Raises:
            GradeError: it is broken.
        """
        if self._sound_at != step:
            broken = broken_policy(self._policy, self._optimization.parameters(), self._prompts[0])
            self.refuse(f"after {step} steps", broken)
            self._sound_at = step

    def forget(self) -> None:
        """The policy is another one, though it may come to the same step."""
        self._sound_at = None

    def refuse(self, when: str, broken: str | None) -> None:
        """End the run.

        Args:
            broken: what is wrong with the policy, from `broken_measure` or `broken_policy`; None: nothing is.

        Raises:
            GradeError: with the checkpoints there are.
        """
        if broken is not None:
            raise GradeError(
                f"{when}: the policy is broken ({broken}), and nothing of it is saved. {self._checkpoints.kept()} "
                "Start another run with a lower train.learning_rate."
            )
