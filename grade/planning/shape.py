"""The sizes of a language model, from its config.json alone: what layers multiply and keep, and their parameters.

Decoders with dense layers, by the `model_type` of transformers. Mixtures of experts and recurrent layers are refused:
what a token costs there is another formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grade.config.bounds import shown
from grade.errors import GradeError


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        name: as transformers calls it inside a layer of the model, such as "self_attn.q_proj".
        stage: those of one stage read the same input: 0 before attention, 1 behind it, 2 and 3 of the MLP.
    """

    name: str
    inputs: int
    outputs: int
    stage: int
    bias: bool = False

    @property
    def products(self) -> int:
        """Multiplications for a token, which is also the numbers in the weight."""
        return self.inputs * self.outputs

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class ModelShape:
    """A decoder.

    Attributes:
        width: d, of the hidden states.
        heads, kv_heads, head_size: of attention; several query heads may share one of keys and values.
        inner: numbers between the two halves of the MLP.
        linears: of one layer, in the order of `Linear.stage`.
        layer_rest, model_rest: parameters of a layer, and of the model outside its layers, that are in no linear layer
            and no table of tokens: norms, and positions where they are learnt.
        gated: the MLP multiplies two products, one of them through the activation.
        float32_norms: norms compute in float32 and keep such a copy; others keep their input.
        head_norms: queries and keys have norms of their own.
        tied: the head is the embedding table.
        parallel: the MLP reads what attention reads, and not what it gives.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocabulary: int
    linears: tuple[Linear, ...]
    layer_rest: int
    model_rest: int
    gated: bool
    float32_norms: bool
    head_norms: bool
    tied: bool
    parallel: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def products(self) -> int:
        """Multiplications of all layers for a token, without attention's own: the numbers in their weights."""
        return self.layers * sum(linear.products for linear in self.linears)

    @property
    def table(self) -> int:
        """Numbers in the embedding table, and in a head."""
        return self.vocabulary * self.width

    @property
    def backbone_parameters(self) -> int:
        """All but the embedding table and a head of its own."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.products + self.layers * (biases + self.layer_rest) + self.model_rest

    @property
    def parameters(self) -> int:
        return self.backbone_parameters + self.table * (1 if self.tied else 2)


Config = Mapping[str, Any]
MOST = 2**30
"""Largest entry of a config.json that is taken for a size."""
_OPTIONAL = ("num_key_value_heads", "head_dim", "n_inner")
"""Sizes that may be null, or be left out."""
_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    *("n_embd", "n_head", "n_layer", "n_positions"),
    *_OPTIONAL,
)
_SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_parallel_residual")


def shape_of(config: Config, name: str) -> ModelShape:
    """The sizes that a config.json says.

    Args:
        name: of the model, for messages.

    Raises:
        GradeError: its `model_type` is none of `KNOWN`, or it lacks a size, or has one that no model can have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise GradeError(
            f"{name}: its config.json has the model_type {shown(repr(kind))}, whose cost is not known here. Known are "
            f"{', '.join(KNOWN)}."
        )
    _check_entries(config, name)
    try:
        shape = _FAMILIES[kind](config, name)
    except KeyError as error:
        raise GradeError(f"{name}: its config.json has no entry {error.args[0]!r}. Name a complete one.") from error
    if shape.heads % shape.kv_heads or not shape.head_size:
        raise GradeError(
            f"{name}: its config.json has {shape.heads} heads of queries, {shape.kv_heads} of keys and a width of "
            f"{shape.width}, which cannot be divided so. Name one of a model."
        )
    return shape


def _check_entries(config: Config, name: str) -> None:
    """Refuse sizes that are none: formulas would give a time for them too.

    Raises:
        GradeError: naming the entry and its value.
    """
    for key in _SIZES:
        size = config.get(key)
        missing = size is None and (key in _OPTIONAL or key not in config)
        if not missing and (type(size) is not int or not 1 <= size <= MOST):
            raise GradeError(
                f"{name}: its config.json has a size that is none: {key} is {shown(size)}, and must be a whole number "
                f"from 1 to {MOST}. Name a complete one."
            )
    for key in _SWITCHES:
        if not isinstance(config.get(key), bool | None):
            raise GradeError(f"{name}: its config.json has {key}={shown(config[key])}: it must be true or false.")


def _llama_like(
    *,
    query_bias: bool | None = None,
    output_bias: bool | None = None,
    norms: int = 2,
    head_norms: str = "",
    tied: bool = False,
    head_size: int | None = None,
    fused: bool = False,
) -> Callable[[Config, str], ModelShape]:
    """Models with rotary positions, RMS norms and a gated MLP.

    Args:
        query_bias, output_bias: of the layers before and behind attention; None: `attention_bias` says.
        norms: of a layer.
        head_norms: "head": queries and keys have a norm over each head; "all": over all heads together.
        tied, head_size: what transformers takes where config.json does not say.
        fused: queries, keys and values are one linear layer, and so are the two halves of the MLP.
    """

    def shape(config: Config, name: str) -> ModelShape:
        width, inner = config["hidden_size"], config["intermediate_size"]
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        size = config.get("head_dim") or head_size or width // heads
        queries, keys = heads * size, kv_heads * size
        biased = bool(config.get("attention_bias", False))
        first, behind = (biased if x is None else x for x in (query_bias, output_bias))
        mlp = bool(config.get("mlp_bias", False))
        if fused:
            linears = [
                Linear("self_attn.qkv_proj", width, queries + 2 * keys, 0),
                Linear("self_attn.o_proj", queries, width, 1),
                Linear("mlp.gate_up_proj", width, 2 * inner, 2),
            ]
        else:
            linears = [
                Linear("self_attn.q_proj", width, queries, 0, first),
                Linear("self_attn.k_proj", width, keys, 0, first),
                Linear("self_attn.v_proj", width, keys, 0, first),
                Linear("self_attn.o_proj", queries, width, 1, behind),
                Linear("mlp.gate_proj", width, inner, 2, mlp),
                Linear("mlp.up_proj", width, inner, 2, mlp),
            ]
        of_heads = {"": 0, "head": 2 * size, "all": queries + keys}[head_norms]
        return ModelShape(
            name=name,
            layers=config["num_hidden_layers"],
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            inner=inner,
            vocabulary=config["vocab_size"],
            linears=(*linears, Linear("mlp.down_proj", inner, width, 3, mlp)),
            layer_rest=norms * width + of_heads,
            model_rest=width,
            gated=True,
            float32_norms=True,
            head_norms=bool(head_norms),
            tied=bool(config.get("tie_word_embeddings", tied)),
        )

    return shape


def _gpt2(config: Config, name: str) -> ModelShape:
    width, heads = config["n_embd"], config["n_head"]
    inner = config.get("n_inner") or 4 * width
    linears = (
        Linear("attn.c_attn", width, 3 * width, 0, True),
        Linear("attn.c_proj", width, width, 1, True),
        Linear("mlp.c_fc", width, inner, 2, True),
        Linear("mlp.c_proj", inner, width, 3, True),
    )
    return _with_layer_norms(
        name=name,
        layers=config["n_layer"],
        width=width,
        heads=heads,
        inner=inner,
        vocabulary=config["vocab_size"],
        linears=linears,
        tied=bool(config.get("tie_word_embeddings", True)),
        rest=config["n_positions"] * width,
    )


def _gpt_neox(config: Config, name: str) -> ModelShape:
    width, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    bias = bool(config.get("attention_bias", True))
    linears = (
        Linear("attention.query_key_value", width, 3 * width, 0, bias),
        Linear("attention.dense", width, width, 1, bias),
        Linear("mlp.dense_h_to_4h", width, inner, 2, True),
        Linear("mlp.dense_4h_to_h", inner, width, 3, True),
    )
    return _with_layer_norms(
        name=name,
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        inner=inner,
        vocabulary=config["vocab_size"],
        linears=linears,
        tied=bool(config.get("tie_word_embeddings", False)),
        parallel=bool(config.get("use_parallel_residual", True)),
    )


def _with_layer_norms(*, width: int, heads: int, rest: int = 0, **sizes: Any) -> ModelShape:
    """A model with a key of every head, an MLP without a gate, and two layer norms a layer and one at the end.

    Args:
        rest: parameters beside layers, table, head and norms.
        sizes: further ones of `ModelShape`.
    """
    return ModelShape(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        layer_rest=4 * width,
        model_rest=2 * width + rest,
        gated=False,
        float32_norms=False,
        head_norms=False,
        **sizes,
    )


_FAMILIES: dict[Any, Callable[[Config, str], ModelShape]] = {
    "gemma": _llama_like(tied=True, head_size=256),
    "gemma2": _llama_like(norms=4, tied=True, head_size=256),
    "gemma3_text": _llama_like(norms=4, head_norms="head", tied=True, head_size=256),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "granite": _llama_like(),
    "llama": _llama_like(),
    "mistral": _llama_like(query_bias=False, output_bias=False),
    "olmo2": _llama_like(head_norms="all"),
    "phi3": _llama_like(fused=True),
    "qwen2": _llama_like(query_bias=True, output_bias=False),
    "qwen3": _llama_like(head_norms="head", head_size=128),
    "smollm3": _llama_like(tied=True),
}
KNOWN = tuple(_FAMILIES)
"""`model_type`s whose cost is known."""
