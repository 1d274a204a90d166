"""A run as its cost depends on it: sizes, numbers of passes, and the devices that share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from grade.config import Config, trains_head
from grade.config.methods import DIFFERENTIATING, micro_batch_size
from grade.errors import GradeError
from grade.planning.adapter import Trained, adapter, whole_backbone
from grade.planning.devices import DEVICES, Device, DType, Efficiency
from grade.planning.prompt_pass import pays_in_run
from grade.planning.recording import layers_pay, recording_pays
from grade.planning.shape import ModelShape
from grade.planning.work import Passes

USUAL_HOPS = 6.0
"""Hops of a step where nobody has said how many: between those of trained models at tau 1 and at tau 0.5 in
docs/algorithm.md. A run's own number is `hops` in its metrics.jsonl."""
MOST_DEVICES = 2**20
_CHUNK_ARRAYS = 3
"""[rows, V] float32 arrays of a chunk of the head, as grade_kernels.common.chunks has them."""
_TILE_ROWS = 128
"""Rows of which larger chunks are multiples, as there."""
_BITS = {"4bit": 4.5, "8bit": 8.0}
"""Of a weight of a quantized base; 4 bits have a float32 scale for every 64 weights besides."""


@dataclass(frozen=True)
class Run:
    """What a step of `config` costs on devices.

    Args:
        shape: of model.name.
        classifier: of reward.model, where the reward is a model of its own.
        device, devices: of which kind and how many; each is a process with its own train.batch_size *
            train.accumulation_steps responses.
        shards: devices that hold the base's layers between them; 1: each has all of them.
        hops: of a step, for `grade` and `grade-ste`.
        recompute: whether activations are computed again in backward passes.
        passed, sampled: responses that pass, and that are sampled, together, where that is not as the settings have it.
        apart: whether the policy's pass is two, the prompts' first; None: where that pays.
    """

    config: Config
    shape: ModelShape
    device: Device
    devices: int = 1
    shards: int = 1
    hops: float = USUAL_HOPS
    recompute: bool = False
    passed: int | None = None
    sampled: int | None = None
    apart: bool | None = None
    classifier: ModelShape | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        config = self.config
        self.device.rate(self.dtype)
        if not 1 <= self.devices <= MOST_DEVICES:
            raise GradeError(f"--gpus is {self.devices}: it must be at least 1 and at most {MOST_DEVICES}.")
        if self.devices > 1 and not self.device.link:
            raise GradeError(
                f"--gpus is {self.devices}, but processes on a {self.device.name} share its cores and memory, and one "
                "was measured. Set --gpus to 1."
            )
        if self.devices % self.shards:
            raise GradeError(
                f"--shards is {self.shards}, which does not divide the {self.devices} devices: each group holds the "
                "base's layers once. Choose a divisor."
            )
        if not 0 <= self.hops <= config.method.max_hops:
            raise GradeError(
                f"--hops is {self.hops:g}: it must be at least 0 and at most method.max_hops, {config.method.max_hops}."
            )
        for name, value, plain in (
            ("model.adapter", config.model.adapter, None),
            ("model.reference", config.model.reference, "base"),
            ("method.replay_dropout", config.method.replay_dropout, False),
        ):
            if value != plain:
                raise GradeError(
                    f"{name} is {value}, whose cost `grade plan` does not know. Set it to "
                    f"{'null' if plain is None else str(plain).lower()}; a new adapter of the same rank and modules "
                    "costs what one to go on from costs."
                )
        if config.model.quantization is not None and self.shards > 1:
            raise GradeError(
                f"--shards is {self.shards}, but a base in {config.model.quantization} is held whole. Set --shards to "
                "1 or model.quantization to null."
            )
        if config.model.finetuning == "full" and self.shards > 1:
            raise GradeError(
                f"--shards is {self.shards}, but model.finetuning=full trains the layers, and a sharded base is "
                "frozen. Set --shards to 1, or train an adapter."
            )

    @property
    def records(self) -> bool:
        """Whether the rollout is a compiled, recorded step, which a sharded base and other attention cannot have."""
        if self.shards > 1 or self.config.model.attn_implementation not in (None, "sdpa"):
            return False
        wanted = self.config.rollout.compile
        return recording_pays(self.config, on_gpu=self.device.is_beside_host) if wanted == "auto" else wanted

    @property
    def compiles_layers(self) -> bool:
        """Whether the passes of training run compiled layers, which a sharded base cannot have."""
        if self.shards > 1:
            return False
        wanted = self.config.train.compile
        return layers_pay(self.config, on_gpu=self.device.is_beside_host) if wanted == "auto" else wanted

    # -- sizes -----------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> DType:
        return self.config.model.dtype

    @property
    def item(self) -> int:
        """Bytes of a number in model.dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def prompt(self) -> int:
        """P, of the longest."""
        return self.config.task.prompt_max_tokens

    @property
    def response(self) -> int:
        """S, of the longest."""
        return self.config.generation.max_new_tokens

    @property
    def whole(self) -> int:
        """P + S."""
        return self.prompt + self.response

    @property
    def responses(self) -> int:
        """Of a step, on one device."""
        return self.config.train.batch_size * self.config.train.accumulation_steps

    @property
    def micro_batch(self) -> int:
        """Responses that pass together."""
        if self.passed is not None:
            return self.passed
        return micro_batch_size(self.config.method, self.config.train.batch_size, self.responses)

    @property
    def together(self) -> int:
        """Responses that are sampled together."""
        if self.sampled is not None:
            return self.sampled
        generation = self.config.generation
        prompts = max((generation.batch_size or self.responses) // generation.samples_per_prompt, 1)
        return min(prompts * generation.samples_per_prompt, self.responses)

    def prompts_of(self, responses: float) -> float:
        """Distinct prompts of so many responses."""
        return max(responses / self.config.generation.samples_per_prompt, 1)

    @property
    def differentiates(self) -> bool:
        return self.config.method.name in DIFFERENTIATING

    @property
    def shares_base(self) -> bool:
        """Whether the reward is a head that reads the states of the reference's pass."""
        return trains_head(self.config.task, self.config.reward) and self.config.reward.input == "prompt+response"

    @property
    def judged(self) -> int:
        """Tokens of what a reward with a pass of its own reads; 0 where it has none."""
        reward = self.config.reward
        if self.classifier is None and (self.shares_base or not trains_head(self.config.task, reward)):
            return 0
        return self.response if reward.input == "response" else self.whole

    @property
    def samples_here(self) -> bool:
        return self.config.rollout.sampled_here

    @property
    def merges(self) -> bool:
        """Whether a rollout adds the adapter to copies of the weights."""
        return self.dtype == "float32" and not self.trained.everything and self.config.model.quantization is None

    @property
    def reads_prompt_cache(self) -> bool:
        return self.config.method.prompt_cache and not (self.recompute and self.differentiates)

    @property
    def prompts_apart(self) -> bool:
        """Whether the policy's pass is two, the prompts' first."""
        if self.apart is not None or self.recompute:
            return bool(self.apart)
        on_gpu = self.device.is_beside_host
        return pays_in_run(self.config, self.micro_batch, width=self.shape.width, item=self.item, on_gpu=on_gpu)

    @property
    def chunk_bytes(self) -> int:
        return self.config.method.head_chunk_bytes("cpu" if self.device.name == "cpu" else "cuda")

    @property
    def chunk_rows(self) -> int:
        """Rows of the head's logits at a time."""
        return self.rows_of_chunk(self.chunk_bytes)

    def rows_of_chunk(self, size: int) -> int:
        """Rows of the head's logits in chunks of so many bytes."""
        rows = size // (_CHUNK_ARRAYS * 4 * self.shape.vocabulary)
        return max(1, rows if rows < _TILE_ROWS else rows - rows % _TILE_ROWS)

    @property
    def trained(self) -> Trained:
        model = self.config.model
        if model.finetuning == "full":
            return whole_backbone(self.shape)
        return adapter(self.shape, model.lora.r, model.lora.target_modules)

    # -- weights ---------------------------------------------------------------------------------------------

    @property
    def layer_bytes(self) -> float:
        """Of the base's layers, wherever they are held."""
        bits = _BITS.get(self.config.model.quantization or "", 8 * self.item)
        return self.shape.products * bits / 8

    @property
    def other_bytes(self) -> float:
        """Of the base beside its layers' products, which every device holds: embedding table, head, norms, biases."""
        return (self.shape.parameters - self.shape.products) * self.item

    @property
    def passes(self) -> Passes:
        """Through policy and base, by layers' own code."""
        read = self.layer_bytes
        if self.config.model.quantization is not None:
            read += 2 * self.item * self.shape.products  # written out in model.dtype, and read again
        return Passes(
            self.shape,
            self.item,
            read,
            self.trained,
            self.efficiency.attention_square,
            self.efficiency.attention_backward,
            self.shards,
            self.device.name != "cpu",
        )

    @property
    def training_passes(self) -> Passes:
        """Of training, by compiled layers where there are any."""
        return replace(self.passes, fused=self.compiles_layers)

    @property
    def classifier_passes(self) -> Passes | None:
        """Through reward.model, which is held whole in model.dtype."""
        if self.classifier is None:
            return None
        read = float(self.classifier.products * self.item)
        return replace(self.passes, shape=self.classifier, layer_bytes=read, trained=None, shards=1)

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.device.per_node)


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        GradeError: there is none of this name.
    """
    if name not in DEVICES:
        raise GradeError(f"--gpu is {name!r}: there are numbers of {', '.join(DEVICES)}.")
    return DEVICES[name]
