"""Values of training that the engine, the actors and the driver share. Loads without torch or Ray.

Shapes: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""The target of a row that takes no part in the loss."""
PADDING = -1
"""The document of a row that is only there to fill a sequence up."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that run together; several documents may be packed into one sequence."""

    tokens_BT: Tokens
    targets_BT: Tokens
    """The token that each row predicts, already shifted; `IGNORED` where none counts."""
    positions_BT: Tokens
    """Restart at 0 with every document."""
    documents_BT: Tokens
    """Which document of its sequence a row belongs to; attention stays within it. `PADDING` where
    the row belongs to none."""

    @property
    def num_tokens(self) -> int:
        return int((self.documents_BT != PADDING).sum())

    @property
    def num_targets(self) -> int:
        return int((self.targets_BT != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of a unit's flat tensor."""

    name: str
    """In the module tree, as model.layers.3.mlp.up_proj.weight; with adapters as PEFT injects
    them: model.layers.3.mlp.up_proj.base_layer.weight, ...up_proj.lora_A.default.weight."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is versioned, shipped and stepped as one: the embedding, a layer, or the head.

    Trained and frozen parameters lie in two flat tensors, each in the order given here. The first
    `num_decayed` values of the trained one are matrices, which weight decay applies to.
    """

    name: str
    trained: tuple[ParameterInfo, ...]
    frozen: tuple[ParameterInfo, ...]
    num_decayed: int

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel for parameter in self.trained)

    @property
    def num_frozen(self) -> int:
        return sum(parameter.numel for parameter in self.frozen)


EMBEDDING_UNIT = "embedding"
TIED_INPUT = "embedding, as input"
"""What the embedding gets as such in a slot that has it as the head's matrix too. Other plans have
the two in two slots, and the order of a sum decides its last bits."""
HEAD_UNIT = "head"
"""The final norm and, unless it is tied to the embedding, the head's matrix."""


def layer_unit(layer: int) -> str:
    """Return the name of a decoder layer's unit."""
    return f"layer {layer}"


@dataclass(frozen=True, slots=True)
class RouterLoads:
    """What the router loss of a micro-batch needs of the layers so far, over real rows.

    transformers' loss takes the means over all layers at once, so a layer's gradient depends on
    the counts of every other: they travel with the micro-batch.
    """

    counts_E: npt.NDArray[np.float64]
    """How often each expert was chosen, summed over layers and rows."""
    probabilities_E: npt.NDArray[np.float64]
    """Router probabilities summed over layers and rows."""
    rows: int
    """Rows times layers counted."""

    def __add__(self, other: RouterLoads) -> RouterLoads:
        return RouterLoads(
            self.counts_E + other.counts_E,
            self.probabilities_E + other.probabilities_E,
            self.rows + other.rows,
        )

    def loss(self) -> float:
        """Return experts x sum over experts of (share of choices x mean probability)."""
        if not self.rows:
            return 0.0
        shares: Any = (self.counts_E / self.rows) * (self.probabilities_E / self.rows)
        return float(len(self.counts_E) * shares.sum())


@dataclass(frozen=True, slots=True)
class LossScales:
    """What a micro-batch's losses are multiplied by before the backward pass.

    The loss of an optimizer step is the mean over its target tokens plus the router loss averaged
    over its micro-batches, so both factors depend on the whole step.
    """

    cross_entropy: float
    """1 / target tokens of the step."""
    router: float = 0.0
    """Router loss coefficient / micro-batches of the step; 0: no router loss."""
