"""What a model costs, from the shapes of its tensors, and which shapes a config.json implies.

Knows names and numbers only: no file, no torch. A checkpoint that is here is described by its own
headers; one that is not (a plan before the download) by its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from placement.training_costs import saved_activation_bytes
from placement.workload import LayerCost, ModelProfile

_DEFAULT_EXPERT_KEYS = ("num_experts", "num_local_experts")
_QK_NORM_PER_HEAD = ("qwen3", "qwen3_moe")
_QK_NORM_WHOLE = ("olmoe",)
_MOE = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")


class Shape(NamedTuple):
    """One tensor, or one expert's part of one: the module parameter it fills, and its shape."""

    parameter: str
    shape: tuple[int, ...]

    @property
    def layer(self) -> int | None:
        parts = self.parameter.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else None

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


def model_profile(
    name: str, config: Mapping[str, Any], shapes: Sequence[Shape], *, dtype_bytes: int
) -> ModelProfile:
    """Return what each layer costs when held in a type of `dtype_bytes` bytes.

    Raises:
        ValueError: Experts without their number in the configuration.
    """
    hidden, vocab_size = int(config["hidden_size"]), int(config["vocab_size"])
    num_layers = int(config["num_hidden_layers"])
    by_layer: list[list[Shape]] = [[] for _ in range(num_layers)]
    for shape in shapes:
        if shape.layer is not None:
            by_layer[shape.layer].append(shape)
    return ModelProfile(
        name=name,
        embedding=LayerCost(flops_per_token=0, weight_bytes=vocab_size * hidden * dtype_bytes),
        layers=tuple(_layer_cost(config, layer, dtype_bytes) for layer in by_layer),
        head=LayerCost(
            flops_per_token=2 * vocab_size * hidden,
            weight_bytes=(vocab_size + 1) * hidden * dtype_bytes,
        ),
        hidden_bytes_per_token=hidden * dtype_bytes,
    )


def num_experts(config: Mapping[str, Any]) -> int:
    """Return the routed experts of one layer.

    Raises:
        ValueError: The configuration names none.
    """
    for key in _DEFAULT_EXPERT_KEYS:
        if key in config:
            return int(config[key])
    raise ValueError("has expert tensors but config.json no num_experts")


def _layer_cost(config: Mapping[str, Any], shapes: Sequence[Shape], dtype_bytes: int) -> LayerCost:
    routed_numel = sum(shape.numel for shape in shapes if ".experts." in shape.parameter)
    dense_numel = sum(shape.numel for shape in shapes) - routed_numel
    experts, per_token = 0, 0
    if routed_numel:
        experts, per_token = num_experts(config), int(config["num_experts_per_tok"])
    active_numel = dense_numel + (routed_numel * per_token // experts if experts else 0)
    by_name = {shape.parameter.split(".", 3)[-1]: shape.shape for shape in shapes}
    query_size = by_name["self_attn.q_proj.weight"][0]
    key_value_size = by_name["self_attn.k_proj.weight"][0]
    hidden = int(config["hidden_size"])
    # An expert is two matrices of hidden x width for gate and up and one back.
    expert_size = (
        routed_numel // (3 * hidden * experts) if experts else by_name["mlp.up_proj.weight"][0]
    )
    return LayerCost(
        flops_per_token=2 * active_numel,
        weight_bytes=(dense_numel + routed_numel) * dtype_bytes,
        kv_bytes_per_token=2 * key_value_size * dtype_bytes,
        attention_flops_per_context_token=4 * query_size,
        routed_bytes=routed_numel * dtype_bytes,
        num_experts=experts,
        experts_per_token=per_token,
        activation_bytes_per_token=saved_activation_bytes(
            hidden_size=hidden,
            query_size=query_size,
            key_value_size=key_value_size,
            expert_size=expert_size,
            experts_per_token=per_token or 1,
            dtype_bytes=dtype_bytes,
        ),
    )


def implied_shapes(config: Mapping[str, Any]) -> list[Shape]:
    """Return the tensors that a verified architecture has under this configuration.

    Raises:
        ValueError: A number is missing.
    """
    try:
        return list(_implied_shapes(config))
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}, which its tensors need") from None


def _implied_shapes(config: Mapping[str, Any]) -> Iterator[Shape]:
    hidden, vocab_size = int(config["hidden_size"]), int(config["vocab_size"])
    yield Shape("model.embed_tokens.weight", (vocab_size, hidden))
    for layer in range(int(config["num_hidden_layers"])):
        for name, shape in _layer_shapes(config, layer):
            yield Shape(f"model.layers.{layer}.{name}", shape)
    yield Shape("model.norm.weight", (hidden,))
    if not config.get("tie_word_embeddings", False):
        yield Shape("lm_head.weight", (vocab_size, hidden))


def _layer_shapes(config: Mapping[str, Any], layer: int) -> Iterator[Shape]:
    hidden = int(config["hidden_size"])
    yield Shape("input_layernorm.weight", (hidden,))
    yield Shape("post_attention_layernorm.weight", (hidden,))
    yield from _attention_shapes(config, hidden)
    if _is_sparse(config, layer):
        yield from _expert_shapes(config, hidden)
    else:
        width = int(config["intermediate_size"])
        yield Shape("mlp.gate_proj.weight", (width, hidden))
        yield Shape("mlp.up_proj.weight", (width, hidden))
        yield Shape("mlp.down_proj.weight", (hidden, width))


def _attention_shapes(config: Mapping[str, Any], hidden: int) -> Iterator[Shape]:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    query = heads * head_dim
    key_value = int(config.get("num_key_value_heads") or heads) * head_dim
    model_type = config["model_type"]
    has_bias = model_type == "qwen2" or bool(config.get("attention_bias", model_type == "gpt_oss"))
    for name, width in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        yield Shape(f"self_attn.{name}.weight", (width, hidden))
        if has_bias:
            yield Shape(f"self_attn.{name}.bias", (width,))
    yield Shape("self_attn.o_proj.weight", (hidden, query))
    if has_bias and model_type != "qwen2":
        yield Shape("self_attn.o_proj.bias", (hidden,))
    if model_type == "gpt_oss":
        yield Shape("self_attn.sinks", (heads,))
    if model_type in _QK_NORM_PER_HEAD + _QK_NORM_WHOLE:
        whole = model_type in _QK_NORM_WHOLE
        yield Shape("self_attn.q_norm.weight", (query if whole else head_dim,))
        yield Shape("self_attn.k_norm.weight", (key_value if whole else head_dim,))


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    if config["model_type"] not in _MOE:
        return False
    step = int(config.get("decoder_sparse_step") or 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _expert_shapes(config: Mapping[str, Any], hidden: int) -> Iterator[Shape]:
    experts = num_experts(config)
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    yield Shape("mlp.experts.gate_up_proj", (experts, 2 * width, hidden))
    yield Shape("mlp.experts.down_proj", (experts, hidden, width))
    router = "mlp.router" if config["model_type"] == "gpt_oss" else "mlp.gate"
    yield Shape(f"{router}.weight", (experts, hidden))
    if config["model_type"] == "gpt_oss":
        yield Shape(f"{router}.bias", (experts,))
        yield Shape("mlp.experts.gate_up_proj_bias", (experts, 2 * width))
        yield Shape("mlp.experts.down_proj_bias", (experts, hidden))
