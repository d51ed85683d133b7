"""Spread the hottest experts over two nodes, so that losing a node loses none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from placement.packing.search import Change, Copy, LayerState, Trials, descend


def hottest_experts(loads: Sequence[float], num_hottest: int) -> list[int]:
    """Return the experts with the most rows, most first; ties to the lower id."""
    return sorted(range(len(loads)), key=lambda expert: -loads[expert])[:num_hottest]


def spread_experts(
    state: LayerState, nodes: Sequence[str], experts: Sequence[int], max_trials: int
) -> LayerState:
    """Give each of `experts` a second node while slots allow, then make up for lost speed.

    A slot is found, in this order: empty on another node; held there by a replica its expert can
    spare (the one with the fewest rows); made free there by moving a light expert to the first
    node. Copies on two nodes are then pinned against the search. `nodes` [devices].
    """
    pinned: set[Copy] = set()
    holders = state.holders
    for expert in experts:
        if len(_by_node(holders[expert], nodes)) < 2:
            change = next(_second_node(state, expert, nodes), None)
            if change is None:
                continue
            state = LayerState(
                state.problem,
                state.holders_after(change),
                frozenset({*pinned, *change.adds, (expert, holders[expert][0])}),
            )
            holders = state.holders
        first_two = list(_by_node(holders[expert], nodes).values())[:2]
        pinned.update((expert, device) for device in first_two)
    state = LayerState(state.problem, holders, frozenset(pinned))
    return descend(state, Trials(max_trials))


def on_two_nodes(held: Sequence[int], nodes: Sequence[str]) -> bool:
    """Say whether `held` devices lie on two nodes at least."""
    return len(_by_node(held, nodes)) > 1


def _by_node(held: Sequence[int], nodes: Sequence[str]) -> dict[str, int]:
    """Return the first holder on every node."""
    first: dict[str, int] = {}
    for device in held:
        first.setdefault(nodes[device], device)
    return first


def _second_node(state: LayerState, expert: int, nodes: Sequence[str]) -> Iterator[Change]:
    """Yield the ways to put a copy of `expert` on another node, the preferred first."""
    home = nodes[state.holders[expert][0]]
    free, spare = _free_devices(state), _spare_replicas(state, expert)
    for device in free:
        if nodes[device] != home:
            yield Change(0.0, ((expert, device),), ())
    for other, device in spare:
        if nodes[device] != home:
            yield Change(0.0, ((expert, device),), ((other, device),))
    # No room elsewhere: make some by moving a light expert to this node.
    rooms: list[tuple[int, tuple[Copy, ...]]] = [(d, ()) for d in free if nodes[d] == home]
    rooms += [(device, ((other, device),)) for other, device in spare if nodes[device] == home]
    for room, drops in rooms:
        for light, device in _single_copies(state):
            if nodes[device] != home:
                yield Change(0.0, ((light, room), (expert, device)), ((light, device), *drops))


def _free_devices(state: LayerState) -> list[int]:
    """Return the devices with an empty slot, those that finish first first."""
    num_free = list(state.problem.slots)
    for held in state.holders:
        for device in held:
            num_free[device] -= 1
    finish_s = state.weights.finish_s
    return sorted((d for d, free in enumerate(num_free) if free), key=lambda d: finish_s[d])


def _spare_replicas(state: LayerState, wanted: int) -> list[Copy]:
    """Return copies whose expert has another, fewest rows first."""
    copies = [
        (expert, device)
        for expert, held in enumerate(state.holders)
        for device in held
        if len(held) > 1 and expert != wanted and (expert, device) not in state.pinned
    ]
    return sorted(copies, key=lambda copy: state.weights.rows[copy[0]][copy[1]])


def _single_copies(state: LayerState) -> list[Copy]:
    """Return the experts with one copy, lightest first."""
    loads = state.problem.loads
    copies = [(expert, held[0]) for expert, held in enumerate(state.holders) if len(held) == 1]
    return sorted(copies, key=lambda copy: loads[copy[0]])
