"""How a stage and a lane compute: the settings that `actors` owns. Loads without torch or Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EngineConfig(BaseModel):
    """Settings of every stage and lane of one deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on CUDA."""
    kv_block_tokens: int = Field(16, ge=1, le=1024)
    """Tokens in one KV block; a smaller block wastes less and is gathered slower."""
    num_kv_blocks: int | None = Field(None, ge=2)
    """KV blocks of each lane. None: as many as fit the tightest stage, at most
    `max_model_tokens x max_running` tokens."""
    max_model_tokens: int | None = Field(None, ge=2)
    """Longest prompt plus output; None: what the checkpoint declares."""
    max_running: int = Field(32, ge=1, le=1024)
    """Sequences of one lane that decode together."""
    max_step_tokens: int = Field(512, ge=1)
    """Token budget of one step: decodes first, then prompt chunks."""
    max_waiting: int = Field(256, ge=1)
    """Requests that may wait in one lane; one more is refused with Retry-After."""
    prefix_cache: bool = True
    cpu_threads: int = Field(1, ge=1, le=1024)
    """Torch threads of a stage on a CPU. Two on contended cores are far slower than one."""
    step_timeout_s: float = Field(60.0, gt=0)
    """A step that no stage answers within this time fails its requests."""
    allow_unverified_architectures: bool = False
    """Serve an architecture that uses both transformers interfaces but is not in the verified
    list. Its tokens have not been compared with transformers' own."""

    @model_validator(mode="after")
    def _budget_covers_decodes(self) -> EngineConfig:
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_running "
                f"({self.max_running}), or some sequences would never decode"
            )
        return self
