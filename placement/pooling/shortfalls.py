"""Which devices hold no slot, and what to say where memory holds no plan."""

from __future__ import annotations

from placement.errors import InfeasiblePlanError
from placement.pooling.slot_prices import SlotPrices
from placement.training import Slot, TrainingCosts


def _finest_needs(costs: TrainingCosts) -> list[tuple[str, int]]:
    """Return (what, bytes) of every slot that cannot be made smaller."""
    prices = SlotPrices(costs)
    last = costs.num_layers
    head = Slot(kind="fused", first_layer=last, end_layer=last)
    needs = [("the head", prices.alone_bytes(head, "none"))]
    for layer in range(costs.num_layers):
        forward = Slot(kind="forward", first_layer=layer, end_layer=layer + 1)
        backward = Slot(kind="backward", first_layer=layer, end_layer=layer + 1)
        needs.append((f"layer {layer}, forward", prices.alone_bytes(forward, "none")))
        needs.append((f"layer {layer}, backward", prices.alone_bytes(backward, "layer")))
    return needs


def too_small(costs: TrainingCosts) -> dict[str, str]:
    """Return why each device that holds no slot at all is left out."""
    what, least_bytes = min(_finest_needs(costs), key=lambda need: need[1])
    return {
        device_id: (
            f"its {cap} bytes hold no slot; the smallest ({what}) needs {least_bytes}, weights "
            f"twice because the next slot's are brought meanwhile"
        )
        for device_id, cap in zip(costs.device_ids, costs.memory_bytes, strict=True)
        if cap < least_bytes
    }


def check_feasible(costs: TrainingCosts) -> None:
    what, need_bytes = max(_finest_needs(costs), key=lambda need: need[1])
    cap, device_id = max(zip(costs.memory_bytes, costs.device_ids, strict=True))
    if need_bytes > cap:
        raise InfeasiblePlanError(
            f"{what} needs {need_bytes} bytes (weights twice, because the next slot's are brought "
            f"meanwhile, gradients, and one micro-batch's activations); the roomiest of "
            f"{costs.num_devices} devices, {device_id}, offers {cap} after headroom. Use fewer "
            f"sequences or tokens per micro-batch, a smaller dtype or frozen weights, lower "
            f"headroom_fraction, or add a device with more memory."
        )


def no_room_to_prefetch(costs: TrainingCosts) -> str:
    what, need_bytes = max(_finest_needs(costs), key=lambda need: need[1])
    return (
        f"every layer fits some device alone, but in no tried cut does every slot find one that "
        f"also has room for the next slot's weights: {what} needs {need_bytes} bytes, and the "
        f"devices offer {', '.join(map(str, costs.memory_bytes))}. Use fewer sequences or tokens "
        f"per micro-batch, lower headroom_fraction, or add memory or devices."
    )
