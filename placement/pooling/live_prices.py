"""What slots cost by what was measured of them so far, and which devices are equal by that."""

from __future__ import annotations

from collections.abc import Collection

from placement.pooling.averages import SlotAverages
from placement.pooling.plan_table import PlanTable
from placement.pooling.pool import SlotOption

FIRST_PATIENCE, LONGEST_PATIENCE = 4, 64
"""Rounds after which a device that got slower, and was given nothing since, is tried again as if it
had recovered; doubled each time that it has not."""
EQUAL_WITHIN = 0.10
"""Devices whose seconds differ by no more than this share take turns ..."""
PARTED_AT = 0.20
"""... until they differ by more than this one."""


class LivePrices:
    """Planned seconds times running averages of measured over planned ones.

    Measured speeds outlive plans: planned seconds count relative to the first costs that named a
    device, whatever later costs say of it.
    """

    def __init__(self) -> None:
        self.is_in_turn = False
        """The devices took turns when they were last asked for."""
        self._averages = SlotAverages()
        self._first_alone_s: dict[str, float] = {}
        """Per device, what a micro-batch would take alone by the first costs that named it."""
        self._options: dict[str, dict[tuple[int, int], SlotOption]] = {}
        """Per device, by table and slot; forgotten when a measurement comes."""
        self._turns: dict[tuple[int, frozenset[str]], list[str]] = {}
        """By table and available devices, those that take turns; forgotten likewise."""
        self._last_round: dict[str, int] = {}
        """Per device, the latest of which it was given a slot."""
        self._patience: dict[str, int] = {}
        """Rounds; see `FIRST_PATIENCE`."""

    def add(self, table: PlanTable) -> None:
        """Take another plan into account."""
        for device_id, alone_s in table.alone_s.items():
            self._first_alone_s.setdefault(device_id, alone_s)
        self._options.clear()
        self._turns.clear()

    def option(self, table: PlanTable, slot_index: int, device_id: str) -> SlotOption:
        """Return what is expected of a slot on a device."""
        options = self._options.setdefault(device_id, {})
        key = table.first_round, slot_index
        if key not in options:
            scale = self._averages.scale(device_id, table.slots[slot_index])
            options[key] = _scaled(self._planned(table, slot_index, device_id), scale)
        return options[key]

    def hopeful_option(
        self, table: PlanTable, slot_index: int, device_id: str, round_index: int
    ) -> SlotOption:
        """Return the same, as if the device had recovered where that is to be tried."""
        option = self.option(table, slot_index, device_id)
        if self._is_tried(device_id, round_index):
            return _scaled(option, 1.0 / self._averages.slow_down(device_id))
        return option

    def used(self, device_id: str, round_index: int) -> None:
        """A device was given a slot of a round."""
        if self._is_tried(device_id, round_index):
            patience = self._patience.get(device_id, FIRST_PATIENCE)
            self._patience[device_id] = min(2 * patience, LONGEST_PATIENCE)
        self._last_round[device_id] = max(self._last_round.get(device_id, 0), round_index)

    def observe(
        self, table: PlanTable, slot_index: int, device_id: str, micro_batch_s: float
    ) -> None:
        """Take a measured micro-batch into account.

        Raises:
            ValueError: `micro_batch_s` is not above 0 and finite.
        """
        planned_s = self._planned(table, slot_index, device_id).total_s
        self._averages.observe(device_id, table.slots[slot_index], planned_s, micro_batch_s)
        if self._averages.seems_faster(device_id):
            self._patience[device_id] = 1
        elif self._averages.slow_down(device_id) == 1.0:
            self._patience.pop(device_id, None)
        # Devices that have not run the slot are priced by those that have.
        self._options.clear()
        self._turns.clear()

    def factor(self, device_id: str) -> float:
        """Return by what factor a device is slower than the first costs that named it say."""
        return self._averages.factor(device_id)

    def devices_in_turn(self, table: PlanTable, available: Collection[str]) -> list[str]:
        """Return the available devices in order of id where they are equal; else none."""
        key = table.first_round, frozenset(available)
        if key not in self._turns:
            devices = [device_id for device_id in table.device_ids if device_id in available]
            limit = PARTED_AT if self.is_in_turn else EQUAL_WITHIN
            self.is_in_turn = table.may_take_turns(devices) and table.are_equal(
                devices, lambda slot, device_id: self.option(table, slot, device_id).total_s, limit
            )
            self._turns[key] = devices if self.is_in_turn else []
        return self._turns[key]

    def _planned(self, table: PlanTable, slot_index: int, device_id: str) -> SlotOption:
        """Return the planned option in terms of the first costs that named the device."""
        option = table.options[slot_index][device_id]
        return _scaled(option, self._first_alone_s[device_id] / table.alone_s[device_id])

    def _is_tried(self, device_id: str, round_index: int) -> bool:
        """Whether a device is to be priced as fast as it once was."""
        idle_rounds = round_index - self._last_round.get(device_id, 0)
        return (
            idle_rounds >= self._patience.get(device_id, FIRST_PATIENCE)
            and self._averages.slow_down(device_id) > 1.0
        )


def _scaled(option: SlotOption, factor: float) -> SlotOption:
    return option._replace(lead_s=factor * option.lead_s, total_s=factor * option.total_s)
