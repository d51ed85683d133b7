"""Tiny random models of every verified architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)

COMMON: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
MOE = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")


def num_experts(model_type: str) -> int:
    """Of each layer of a model in `MOE`."""
    sizes = ARCHITECTURES[model_type]
    return int(sizes.get("num_experts") or sizes["num_local_experts"])


def make_model(model_type: str, seed: int = 0, **sizes: Any) -> Any:
    """A random model whose best two logits are well apart (its head is scaled up)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(COMMON | ARCHITECTURES[model_type] | sizes))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Library initialisation is so small that attention hardly matters; some biases and
            # sinks start at zero and would go untested.
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5))
        model.get_input_embeddings().weight.mul_(6.0)
        if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            model.get_output_embeddings().weight.mul_(4.0)
    return model.eval()
