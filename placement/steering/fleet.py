"""What the controller knows of its nodes: who is there, how they are joined, who may be used."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from placement.steering.settings import ControllerSettings
from placement.steering.speeds import Speeds, slowed
from placement.topology import Device, Link, Topology


class Fleet:
    """Nodes, devices and links, in the order in which they were first told.

    A device keeps its place in that order while its node is away, so a plan in the order given
    finds it there when it comes back.
    """

    def __init__(self, topology: Topology, settings: ControllerSettings) -> None:
        self._settings = settings
        self._devices = {device.id: device for device in topology.devices}
        self._links = {(link.source_node, link.target_node): link for link in topology.links}
        self._default_link = topology.default_link
        self._away: dict[str, str] = {}
        """Node -> why it is away."""
        self._losses_s: dict[str, list[float]] = {}
        """When each device lost a stage, within the loss window."""
        self._draining: dict[str, bool] = {}
        """Node -> whether it has been released, in the order in which drains were asked for."""
        self.speeds = Speeds(settings)

    @property
    def draining(self) -> tuple[str, ...]:
        """Nodes that drain or have been released, the first asked for first."""
        return tuple(self._draining)

    @property
    def away(self) -> tuple[str, ...]:
        """Nodes that are lost."""
        return tuple(self._away)

    @property
    def released(self) -> tuple[str, ...]:
        return tuple(node for node, is_released in self._draining.items() if is_released)

    @property
    def ids(self) -> frozenset[str]:
        """Of every device that is known."""
        return frozenset(self._devices)

    def join(self, node: str, devices: Collection[Device], links: Collection[Link]) -> None:
        """Take in a node as it is now: what is known of its devices' speed is forgotten.

        Devices that it no longer names are gone with what they hold; ask `has_device`.
        """
        offered = {device.id for device in devices}
        for device_id in sorted(offered & self._devices.keys()):
            if self._devices[device_id].node != node:
                raise ValueError(
                    f"node {node} joins with device {device_id}, which is on node "
                    f"{self._devices[device_id].node}; give every device its own id"
                )
        for known in [d for d in self._devices.values() if d.node == node]:
            if known.id not in offered:
                del self._devices[known.id]
        for device in devices:
            if device != self._devices.get(device.id):
                self._losses_s.pop(device.id, None)
            self._devices[device.id] = device
            self.speeds.forget(device.id)
        for link in links:
            self.set_link(link)
        self._away.pop(node, None)

    def lose_node(self, node: str, reason: str) -> set[str]:
        """Return the devices that are lost. A drain of the node ends with it."""
        self._away[node] = reason
        self._draining.pop(node, None)
        return {device.id for device in self._devices.values() if device.node == node}

    def lose_stage(self, device_id: str, now_s: float) -> bool:
        """Note that a stage died; returns whether the device may still be used."""
        losses = [*self._recent_losses_s(device_id, now_s), now_s]
        self._losses_s[device_id] = losses
        return len(losses) < self._settings.max_device_losses

    def set_link(self, link: Link) -> None:
        self._links[link.source_node, link.target_node] = link

    def drain(self, node: str) -> bool:
        """Use a node no more; returns whether it is there to be drained."""
        if not self.has_node(node):
            return False
        self._draining.setdefault(node, False)
        return True

    def cancel_drain(self, node: str) -> None:
        self._draining.pop(node, None)

    def release(self, node: str) -> None:
        self._draining[node] = True

    def has_node(self, node: str) -> bool:
        return node not in self._away and any(d.node == node for d in self._devices.values())

    def has_device(self, device_id: str) -> bool:
        device = self._devices.get(device_id)
        return device is not None and device.node not in self._away

    def present(self) -> list[Device]:
        """Return the devices that are there, at the speed they have now."""
        return [
            slowed(device, self.speeds.factor(device.id))
            for device in self._devices.values()
            if device.node not in self._away
        ]

    def factors(self) -> dict[str, float]:
        """Return the slowness of every device that is known."""
        return {device_id: self.speeds.factor(device_id) for device_id in self._devices}

    def topology(self, devices: Collection[Device]) -> Topology | None:
        """Return some of the devices with all links; None: there are no devices."""
        if not devices:
            return None
        links = tuple(self._links.values())
        return Topology(devices=tuple(devices), links=links, default_link=self._default_link)

    def choices(self, now_s: float) -> Iterator[list[Device]]:
        """Yield the devices that plans may use, as they should be first.

        Only where nothing fits are devices used that keep losing stages, and then nodes that
        drain, the last to be asked for first: a drain takes no service down. Released nodes are
        never used.
        """
        present = [
            d for d in self.present() if not self._draining.get(d.node) and self._is_priced(d)
        ]
        pending = [node for node, is_released in self._draining.items() if not is_released]
        seen: list[list[Device]] = []
        for num_drained in range(len(pending), -1, -1):
            kept = [d for d in present if d.node not in pending[:num_drained]]
            steady = [d for d in kept if not self._keeps_dying(d.id, now_s)]
            for devices in (steady, kept):
                if devices not in seen:
                    seen.append(devices)
                    yield devices

    def why_unused(self, device_id: str, now_s: float) -> str:
        """Say why a device is not among the first of `choices`; empty: it is."""
        device = self._devices.get(device_id)
        if device is None:
            return "its node no longer has it"
        if device.node in self._away:
            return f"its node {device.node} is lost: {self._away[device.node]}"
        if device.node in self._draining:
            return f"its node {device.node} drains"
        if not self._is_priced(device):
            return "its active_power_w is not known and the objective is energy"
        if self._keeps_dying(device_id, now_s):
            return (
                f"{len(self._recent_losses_s(device_id, now_s))} stages died on it within "
                f"{self._settings.device_loss_window_s:g} s (max_device_losses "
                f"{self._settings.max_device_losses})"
            )
        return ""

    def unused(self, now_s: float) -> dict[str, str]:
        """Return why devices may not be used now, by device."""
        reasons = {device_id: self.why_unused(device_id, now_s) for device_id in self._devices}
        return {device_id: reason for device_id, reason in reasons.items() if reason}

    def _is_priced(self, device: Device) -> bool:
        return self._settings.objective != "energy" or device.active_power_w is not None

    def _keeps_dying(self, device_id: str, now_s: float) -> bool:
        losses = len(self._recent_losses_s(device_id, now_s))
        return losses >= self._settings.max_device_losses

    def _recent_losses_s(self, device_id: str, now_s: float) -> list[float]:
        since_s = now_s - self._settings.device_loss_window_s
        return [at_s for at_s in self._losses_s.get(device_id, ()) if at_s > since_s]
