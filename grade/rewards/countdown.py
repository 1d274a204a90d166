"""The reward of the Countdown task: responses are decoded, read and rewarded by a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grade.model.passes import BasePass
from grade.model.policy import Policy
from grade.rewards.base import RewardFunction
from grade.rollout import Rollout
from grade.tasks.arithmetic import hindsight_rewards
from grade.tasks.countdown import CountdownTask, Puzzle


class CountdownReward(RewardFunction):
    """Rewards responses by reading their text (see `grade.tasks.arithmetic.response_reward`); it has no gradient.

    A response has ended if its last token ends a sequence; one that was cut off at its maximum length is no solution.
    That token is not part of the text. All others are, so a special token in a response is an error.
    """

    raises = "the score of task.name=countdown"

    def __init__(self, policy: Policy, task: CountdownTask):
        self.policy, self.task = policy, task

    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32 rewards, in [0, 1]."""
        return self._tensor([final for _, _, final in self._read(rollout)], rollout)

    def in_trial(self) -> CountdownReward:
        return self

    def details(self, rollout: Rollout, values: Tensor) -> dict[str, Tensor]:
        """Whether responses with these rewards [B] are solutions, as float32: only they have a reward of 1."""
        return {"solve_rate": (values == 1.0).float()}

    def prefix_values(self, rollout: Rollout, base: BasePass | None = None) -> Tensor:
        """[B, 1 + S] float32, what nothing (0) and the tokens up to each have contributed to the reward.

        They never fall. In hindsight: a step counts with the token that completes its number, though only what
        follows tells that the number is complete; ending with the solution counts with the token that ends. The last
        real token has the whole reward, and padding repeats it.
        """
        rows = []
        for ids, earned, final in self._read(rollout):
            row, reached = [], 0.0
            for count in range(len(ids)):
                # A character of several tokens decodes to replacement characters before it is complete.
                length = len(self._text(ids[:count]).rstrip("\ufffd"))
                reached = max(reached, earned[min(length, len(earned) - 1)])
                row.append(reached)
            rows.append(row + [final] * (1 + rollout.tokens.shape[1] - len(row)))
        return self._tensor(rows, rollout)

    def _read(self, rollout: Rollout) -> list[tuple[list[int], list[float], float]]:
        """Per response its real ids, what its text's beginnings have contributed, and its reward."""
        settings = self.task.settings.countdown
        ended = rollout.ended_by(self.policy.eos_ids).tolist()
        read = []
        for row, has_ended in enumerate(ended):
            puzzle = self._puzzle(rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist())
            ids = rollout.tokens[row][rollout.mask[row]].tolist()
            earned, final = hindsight_rewards(
                self._text(ids[:-1] if has_ended else ids),
                puzzle.numbers,
                puzzle.target,
                max_steps=settings.max_steps,
                ended=has_ended,
                partial_credit=settings.partial_credit,
            )
            read.append((ids, earned, final))
        return read

    def _puzzle(self, prompt: list[int]) -> Puzzle:
        puzzle = self.task.by_prompt.get(tuple(prompt))
        if puzzle is None:
            raise ValueError(f"no puzzle has the prompt {self._text(prompt)!r}: CountdownTask.prompts did not give it")
        return puzzle

    def _text(self, ids: list[int]) -> str:
        return self.policy.tokenizer.decode(ids, skip_special_tokens=False)

    @staticmethod
    def _tensor(values: Sequence[float] | Sequence[Sequence[float]], rollout: Rollout) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=rollout.tokens.device)
