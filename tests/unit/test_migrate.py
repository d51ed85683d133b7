from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placement.costs import memory_cap_bytes
from placement.errors import InfeasiblePlanError
from placement.migrate import MigrationPlan, Outlook, migrate_experts, migrate_stages
from placement.moving.cutover import KvState
from placement.moving.handout import Holdings, renamed_holdings, renamed_stages
from placement.moving.moves import CopyTerms, Piece, Release, Step
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Link, LinkRate, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

OUTLOOK = Outlook(old_step_s=2.0, new_step_s=1.0, steps=100.0, slowdown_fraction=0.5)
IDLE = KvState(tokens_in_use=0)
LINK = LinkRate(bandwidth_bytes_per_s=100.0, latency_s=0.5)


def device(
    device_id: str, *, node: str | None = None, memory_bytes: int = 10**9, speed: float = 1e3
) -> Device:
    return Device(
        id=device_id,
        node=device_id if node is None else node,
        kind="paced",
        flops_per_s=1e12,
        memory_bytes_per_s=speed,
        memory_bytes=memory_bytes,
    )


def topology(
    devices: Sequence[Device], *, links: Sequence[Link] = (), default: LinkRate | None = LINK
) -> Topology:
    return Topology(devices=tuple(devices), links=tuple(links), default_link=default)


def model(
    num_layers: int, *, kv_bytes: int = 2, tied: bool = False, ends_bytes: int = 10
) -> ModelProfile:
    return ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=ends_bytes),
        layers=(LayerCost(flops_per_token=1.0, weight_bytes=1000, kv_bytes_per_token=kv_bytes),)
        * num_layers,
        head=LayerCost(flops_per_token=1.0, weight_bytes=ends_bytes),
        hidden_bytes_per_token=1,
        head_is_embedding=tied,
    )


def stages(profile: ModelProfile, where: Topology, counts: Mapping[str, int]) -> StagesPlan:
    """A forced cut, over the devices in the order of `counts`."""
    by_id = {each.id: each for each in where.devices}
    workload = ServingWorkload(
        lanes=1, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=1, step_tokens=1
    )
    roomy = Topology(
        devices=tuple(
            device(name, node=by_id[name].node if name in by_id else name) for name in counts
        ),
        default_link=LINK,
    )
    return plan_stages(profile, roomy, workload=workload, layer_counts=list(counts.values()))


def shift(
    old: Mapping[str, int],
    new: Mapping[str, int],
    where: Topology,
    *,
    profile: ModelProfile | None = None,
    **options: Any,
) -> MigrationPlan:
    profile = profile or model(sum(old.values()))
    arguments: dict[str, Any] = {"kv": IDLE, "outlook": OUTLOOK} | options
    return migrate_stages(
        stages(profile, where, old),
        stages(profile, where, new),
        profile,
        where,
        **arguments,
    )


def experts(
    old: Holdings, new: Holdings, where: Topology, *, room: int = 10**6, **options: Any
) -> MigrationPlan:
    num_layers = len(next(iter(new.values())))
    defaults: dict[str, Any] = {
        "expert_bytes": [100] * num_layers,
        "room_bytes": {each.id: room for each in where.devices},
        "outlook": OUTLOOK,
    }
    return migrate_experts(old, new, where, **defaults | options)


def layer(index: int) -> Piece:
    return Piece(part="layer", layer=index)


def expert(index: int, of_layer: int = 0) -> Piece:
    return Piece(part="expert", layer=of_layer, expert=index)


def summary(plan: MigrationPlan) -> list[tuple[list[str], list[str]]]:
    """Per step: what is released, and what is copied from where."""
    return [
        (
            [f"{r.piece} from {r.device_id}" for r in step.releases],
            [f"{m.piece}: {m.source} to {m.target}, {m.num_bytes}" for m in step.moves],
        )
        for step in plan.steps
    ]


def replay(
    steps: Sequence[Step],
    held: Mapping[str, set[Piece]],
    sizes: Mapping[Piece, int],
    room: Mapping[str, int],
    budget: int | None,
    kv_bytes: int = 0,
) -> dict[str, set[Piece]]:
    """Carry the steps out, checking each of them; return who holds what at the end.

    A layer occupies `kv_bytes` beside its weights.
    """
    memory = {p: size + (kv_bytes if p.part == "layer" else 0) for p, size in sizes.items()}
    holds = {device_id: set(pieces) for device_id, pieces in held.items()}
    received: dict[tuple[str, Piece], int] = {}
    for step in steps:
        for release in step.releases:
            holds[release.device_id].remove(release.piece)
        live = set().union(*holds.values())
        assert step.is_live == (live == set(sizes))
        assert budget is None or sum(move.num_bytes for move in step.moves) <= budget
        arrived = []
        for move in step.moves:
            key = (move.target, move.piece)
            assert move.piece not in holds[move.target]
            assert move.source is None or move.piece in holds[move.source]
            assert move.first_byte == received.get(key, 0)
            received[key] = move.first_byte + move.num_bytes
            assert move.is_last == (received[key] == sizes[move.piece])
            if move.is_last:
                arrived.append(key)
        for device_id, pieces in holds.items():
            coming = [piece for target, piece in received if target == device_id]
            assert sum(memory[p] for p in [*pieces, *coming]) <= room[device_id]
        for key in arrived:
            del received[key]
            holds[key[0]].add(key[1])
    assert not received
    return holds


# Stages


def test_two_layers_move_in_the_background_and_their_kv_in_the_pause() -> None:
    where = topology([device("a"), device("b")])

    plan = shift({"a": 4, "b": 4}, {"a": 2, "b": 6}, where, kv=KvState(tokens_in_use=50))

    # Nearest first, so b always holds contiguous layers. 2000 bytes at 100 a second behind a
    # latency of 0.5 s; then the KV of two layers, 50 tokens of 2 bytes each.
    assert summary(plan) == [
        ([], ["layer 3: a to b, 1000", "layer 2: a to b, 1000"]),
        (["layer 2 from a", "layer 3 from a"], []),
    ]
    assert plan.least_bytes == plan.moved_bytes == 2000
    assert plan.background_s == pytest.approx(20.5)
    assert plan.kv_bytes == 200
    assert plan.pause_s == pytest.approx(2.5)
    assert plan.num_cut_overs == 1
    assert plan.gain_s == pytest.approx(100.0)
    assert plan.cost_s == pytest.approx(2.5 + 0.5 * 20.5)
    assert plan.worth_it
    assert plan.reason == (
        "2e+03 ms a step becomes 1e+03 ms, which saves 100 s over 100 steps; "
        "costs 2.5 s of pause and 50% of 20.5 s of background copying"
    )


def test_equal_plans_need_no_move_and_are_not_worth_it() -> None:
    where = topology([device("a"), device("b")])

    plan = shift({"a": 2, "b": 2}, {"a": 2, "b": 2}, where, kv=KvState(tokens_in_use=9))

    assert plan.steps == ()
    assert (plan.moved_bytes, plan.kv_bytes, plan.pause_s, plan.background_s) == (0, 0, 0.0, 0.0)
    assert not plan.worth_it
    assert "nothing moves" in plan.reason


def test_copies_on_different_links_overlap_and_on_one_link_add_up() -> None:
    apart = topology([device("a"), device("b"), device("c"), device("d")])
    together = topology(
        [device("a", node="x"), device("b", node="y"), device("c", node="x"), device("d", node="y")]
    )
    old, new = {"a": 3, "b": 1, "c": 3, "d": 1}, {"a": 2, "b": 2, "c": 2, "d": 2}

    # Layer 2 goes from a to b and layer 6 from c to d.
    overlapping = shift(old, new, apart, interchangeable=[])
    queueing = shift(old, new, together, interchangeable=[])

    assert overlapping.background_s == pytest.approx(0.5 + 10.0)
    assert queueing.background_s == pytest.approx(0.5 + 20.0)


def test_swapped_stages_of_equal_devices_on_one_node_stay_where_they_are() -> None:
    same = topology([device("a", node="n"), device("b", node="n")])
    unequal = topology([device("a", node="n"), device("b", node="n", speed=2e3)])
    apart = topology([device("a"), device("b")])
    old, new = {"a": 1, "b": 2}, {"b": 1, "a": 2}

    assert shift(old, new, same).steps == ()
    assert shift(old, new, unequal).moved_bytes == 3020
    assert shift(old, new, apart).moved_bytes == 3020
    assert shift(old, new, apart, interchangeable=[{"a", "b"}]).steps == ()
    assert shift(old, new, same, interchangeable=[]).moved_bytes == 3020


def test_the_renamed_plan_is_what_the_moves_reach() -> None:
    profile = model(3)
    where = topology([device("a", node="n"), device("b", node="n"), device("c", node="n")])
    old, new = (
        stages(profile, where, counts) for counts in ({"a": 1, "b": 2, "c": 0}, {"b": 1, "c": 2})
    )

    plan = migrate_stages(old, new, profile, where, kv=IDLE, outlook=OUTLOOK)
    reached = renamed_stages(new, plan.renamed, where)

    assert plan.moved_bytes == 0
    assert [stage.device_id for stage in reached.stages] == ["a", "b"]
    assert [stage.num_layers for stage in reached.stages] == [1, 2]


def test_kv_in_use_counts_when_parts_are_handed_out() -> None:
    where = topology([device("a", node="n"), device("b", node="n")])
    profile = model(5, ends_bytes=600)
    old, new = {"a": 1, "b": 4}, {"a": 4, "b": 1}

    # As planned 3 layers move; traded, 2 layers and both ends of 600 bytes.
    without = shift(old, new, where, profile=profile)
    with_kv = shift(old, new, where, profile=profile, kv=KvState(tokens_in_use=200))

    assert (without.moved_bytes, without.renamed) == (3000, ())
    assert (with_kv.moved_bytes, with_kv.kv_bytes) == (3200, 800)


def test_a_tied_head_is_copied_from_the_embedding() -> None:
    where = topology([device("a"), device("b")])

    plan = shift({"a": 2}, {"a": 1, "b": 1}, where, profile=model(2, tied=True))

    assert summary(plan) == [
        ([], ["the embedding: a to b, 10", "layer 1: a to b, 1000"]),
        (["layer 1 from a"], []),
    ]


def test_a_full_receiver_releases_before_it_receives() -> None:
    # b passes layer 4 on to c before it has room for layer 2.
    room = {"a": 3100, "b": 2100, "c": 3100}
    where = topology([device(name, memory_bytes=math.ceil(b / 0.9)) for name, b in room.items()])

    plan = shift({"a": 3, "b": 2, "c": 2}, {"a": 2, "b": 2, "c": 3}, where)

    assert summary(plan) == [
        ([], ["layer 4: b to c, 1000"]),
        (["layer 4 from b"], ["layer 2: a to b, 1000"]),
        (["layer 2 from a"], []),
    ]
    assert plan.num_cut_overs == 2


def full_swap(
    spare: Sequence[str] = (), links: Sequence[Link] = (), tokens: int = 0, **terms: Any
) -> MigrationPlan:
    """Two full devices that trade their layers; each of `spare` has room for one."""
    kv_bytes = 2 * tokens
    tight = math.ceil((1020 + kv_bytes) / 0.9)
    devices = [device("a", memory_bytes=tight), device("b", memory_bytes=tight)]
    devices += [device(name, memory_bytes=tight) for name in spare]
    return shift(
        {"a": 1, "b": 1}, {"b": 1, "a": 1}, topology(devices, links=links),
        terms=CopyTerms(**terms), profile=model(2, ends_bytes=0),
        kv=KvState(tokens_in_use=tokens, recompute_tokens_per_s=1.0),
    )  # fmt: skip


def test_full_devices_that_wait_for_each_other_use_a_third_one_with_room() -> None:
    plan = full_swap(["c"])

    assert summary(plan) == [
        ([], ["the embedding: a to b, 0", "the head: b to a, 0"]),
        ([], ["layer 0: a to c, 1000"]),
        (["layer 0 from a"], ["layer 1: b to a, 1000"]),
        (["the head from b", "layer 1 from b"], ["layer 0: c to b, 1000"]),
        (["the embedding from a", "layer 0 from c"], []),
    ]
    assert plan.steps[1].moves[0].is_detour
    assert plan.moved_bytes - plan.least_bytes == 1000
    assert all(step.is_live for step in plan.steps)


def test_a_detour_goes_where_the_way_there_and_on_is_shortest() -> None:
    def fast(source: str, target: str) -> Link:
        return Link(
            source_node=source, target_node=target, bandwidth_bytes_per_s=500.0, latency_s=0.5
        )

    # c takes 2.5 s to reach and 100.5 s to leave, d 10.5 s either way.
    there = [fast("a", "c"), fast("b", "c")]
    slow = [
        Link(source_node="c", target_node=name, bandwidth_bytes_per_s=10.0, latency_s=0.5)
        for name in "ab"
    ]

    plan = full_swap(["c", "d"], [*there, *slow])

    [detour] = [move for step in plan.steps for move in step.moves if move.is_detour]
    assert detour.target == "d"


def test_kv_takes_the_detour_with_its_layer() -> None:
    plan = full_swap(["c"], tokens=10)

    # Layer 0 hands over twice and layer 1 once, 20 bytes each time.
    assert plan.kv_bytes == 60
    assert plan.pause_s == pytest.approx(3 * 0.7)


def test_full_devices_without_a_third_are_refused_with_bytes_and_knobs() -> None:
    with pytest.raises(InfeasiblePlanError) as caught:
        full_swap()

    message = str(caught.value)
    assert "needs 1000 bytes on" in message
    assert "no device has room to keep a piece meanwhile" in message
    assert "Free 980 bytes (fewer reserved KV tokens, a lower headroom_fraction" in message
    assert "allow_outage" in message


def test_an_allowed_outage_reads_the_piece_back_from_the_checkpoint_within_the_pause() -> None:
    rates = {"a": 50.0, "b": 50.0}

    plan = full_swap(allow_outage=True, checkpoint_bytes_per_s=rates)

    # Layer 1 takes 10.5 s from b while layer 0 is nowhere; layer 0 takes 20 s from the checkpoint.
    outages = [step for step in plan.steps if not step.is_live]
    assert [move.source for step in outages for move in step.moves] == ["b", None]
    assert plan.pause_s == pytest.approx(10.5 + 20.0)
    assert plan.steps[-1].is_live
    with_kv = full_swap(tokens=10, allow_outage=True, checkpoint_bytes_per_s=rates)
    assert with_kv.kv_bytes == 0
    assert with_kv.pause_s == pytest.approx(plan.pause_s + 10.0)
    with pytest.raises(InfeasiblePlanError, match="allow_outage with a checkpoint rate"):
        full_swap(allow_outage=True)


def test_a_new_plan_over_a_cap_is_refused_with_its_bytes() -> None:
    where = topology([device("a"), device("b", memory_bytes=3000)])

    with pytest.raises(InfeasiblePlanError, match=r"b would hold 3010 bytes .* and offers 2700"):
        shift({"a": 3, "b": 1}, {"a": 1, "b": 3}, where)


def test_reserved_kv_and_activations_count_against_the_cap() -> None:
    where = topology([device("a"), device("b", memory_bytes=3000)])
    options: list[dict[str, Any]] = [
        {"kv": KvState(tokens_in_use=0, reserved_tokens=200)},
        {"activation_bytes": 691},
    ]

    assert shift({"a": 3, "b": 1}, {"a": 2, "b": 2}, where).moved_bytes == 1000
    for option in options:
        with pytest.raises(InfeasiblePlanError, match="b would hold"):
            shift({"a": 3, "b": 1}, {"a": 2, "b": 2}, where, **option)


def test_kv_copied_ahead_leaves_only_what_was_added_for_the_pause() -> None:
    where = topology([device("a"), device("b")])
    kv = KvState(tokens_in_use=100, growth_tokens_per_s=8.0)

    plan = shift({"a": 3, "b": 1}, {"a": 2, "b": 2}, where, kv=kv)

    # 200 bytes take 2.5 s, in which 20 tokens are added: 40 bytes in the pause.
    assert plan.kv_bytes == 240
    assert plan.background_s == pytest.approx(10.5 + 2.5)
    assert plan.pause_s == pytest.approx(0.5 + 0.4)


def test_kv_is_computed_again_when_that_is_quicker() -> None:
    where = topology([device("a"), device("b")])
    old, new = {"a": 3, "b": 1}, {"a": 2, "b": 2}

    quick = shift(
        old, new, where, kv=KvState(tokens_in_use=100, recompute_tokens_per_s=100.0),
        terms=CopyTerms(switch_s=0.25),
    )  # fmt: skip
    slow = shift(old, new, where, kv=KvState(tokens_in_use=100, recompute_tokens_per_s=10.0))

    assert (quick.kv_bytes, slow.kv_bytes) == (0, 200)
    assert [quick.pause_s, slow.pause_s] == pytest.approx([1.25, 2.5])


def test_kv_without_a_way_is_refused() -> None:
    where = topology([device("a"), device("b")], default=None)
    terms = CopyTerms(checkpoint_bytes_per_s={"b": 100.0})
    old, new = {"a": 3, "b": 1}, {"a": 2, "b": 2}

    plan = shift(old, new, where, terms=terms)

    assert summary(plan)[0] == ([], ["layer 2: None to b, 1000"])
    with pytest.raises(InfeasiblePlanError, match=r"a link is missing \(a to b\)"):
        shift(old, new, where, terms=terms, kv=KvState(tokens_in_use=1))


def test_a_piece_without_a_way_is_refused() -> None:
    where = topology([device("a"), device("b")], default=None)

    with pytest.raises(InfeasiblePlanError, match="layer 2 cannot reach b: a holds it, no link"):
        shift({"a": 3, "b": 1}, {"a": 2, "b": 2}, where)


def test_the_checkpoint_is_read_when_it_is_quicker_than_a_busy_link() -> None:
    where = topology([device("a"), device("b")])

    plan = shift(
        {"a": 4, "b": 1}, {"a": 1, "b": 4}, where,
        terms=CopyTerms(checkpoint_bytes_per_s={"b": 90.0}),
    )  # fmt: skip

    # 10.5 s by link, 11.1 by checkpoint, and the third piece goes where it is done first.
    assert [move.source for move in plan.steps[0].moves] == ["a", None, "a"]
    assert plan.background_s == pytest.approx(20.5)


def test_a_lost_device_makes_the_migration_worth_it_and_all_of_it_a_pause() -> None:
    where = topology([device("a"), device("b")])
    terms = CopyTerms(checkpoint_bytes_per_s={"b": 100.0})
    kv = KvState(tokens_in_use=10, recompute_tokens_per_s=5.0)
    hopeless = Outlook(old_step_s=1.0, new_step_s=2.0, steps=1.0, slowdown_fraction=0.0)

    plan = shift({"a": 1, "gone": 1}, {"a": 1, "b": 1}, where, terms=terms, kv=kv, outlook=hopeless)

    assert summary(plan) == [([], ["the head: None to b, 10", "layer 1: None to b, 1000"])]
    assert plan.pause_s == pytest.approx(10.1 + 2.0)
    assert plan.background_s == 0.0
    assert plan.worth_it
    assert "nothing is served until" in plan.reason
    with pytest.raises(InfeasiblePlanError, match="KV of 10 tokens is lost"):
        shift(
            {"a": 1, "gone": 1}, {"a": 1, "b": 1}, where, terms=terms, kv=KvState(tokens_in_use=10)
        )
    with pytest.raises(InfeasiblePlanError, match="cannot reach b: no live device holds it"):
        shift({"a": 1, "gone": 1}, {"a": 1, "b": 1}, where)


@pytest.mark.parametrize(
    ("outlook", "reason"),
    [
        ({"steps": 12.0}, "saves 12 s over 12 steps; costs 2.5 s"),
        ({"new_step_s": 3.0}, "3e+03 ms, which saves nothing"),
    ],
)
def test_a_gain_below_the_cost_is_not_worth_it(outlook: dict[str, float], reason: str) -> None:
    where = topology([device("a"), device("b")])
    values = {"old_step_s": 2.0, "new_step_s": 1.0, "steps": 100.0, "slowdown_fraction": 0.5}

    plan = shift(
        {"a": 4, "b": 4}, {"a": 2, "b": 6}, where, kv=KvState(tokens_in_use=50),
        outlook=Outlook(**values | outlook),
    )  # fmt: skip

    assert not plan.worth_it
    assert plan.moved_bytes == 2000
    assert reason in plan.reason


@st.composite
def cuts(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    """Two ways to cut the same layers over two to four devices, in their own orders."""
    names = [f"d{i}" for i in range(draw(st.integers(2, 4)))]
    counts = st.lists(st.integers(0, 3), min_size=len(names), max_size=len(names))
    old, new = draw(counts), draw(counts)
    new[-1] += sum(old) - sum(new)
    assume(sum(old) > 0 and new[-1] >= 0)
    order = draw(st.permutations(names))
    return dict(zip(names, old, strict=True)), dict(zip(order, new, strict=True))


def pieces(cut: StagesPlan) -> dict[str, set[Piece]]:
    """What every device of a plan holds, in a stage or left out."""
    held: dict[str, set[Piece]] = {device_id: set() for device_id, _ in cut.left_out}
    for stage in cut.stages:
        own = held.setdefault(stage.device_id, set())
        own |= {layer(i) for i in range(stage.first_layer, stage.end_layer)}
        if stage.index == 0:
            own.add(Piece(part="embedding"))
        if stage is cut.stages[-1]:
            own.add(Piece(part="head"))
    return held


@settings(max_examples=200, deadline=None)
@given(cuts(), st.integers(0, 30), st.integers(0, 1500), st.sampled_from([None, 700]))
def test_stages_move_within_memory_and_budget_and_stay_live(
    case: tuple[dict[str, int], dict[str, int]], tokens: int, spare: int, budget: int | None
) -> None:
    profile = model(sum(case[0].values()), ends_bytes=300)
    anywhere = topology([device(name) for name in case[0]])
    old, new = (stages(profile, anywhere, counts) for counts in case)
    sizes = {p: 1000 if p.part == "layer" else 300 for p in set().union(*pieces(old).values())}
    kv_bytes = 2 * tokens
    room = {
        name: spare
        + max(
            sum(sizes[p] + (kv_bytes if p.part == "layer" else 0) for p in pieces(plan)[name])
            for plan in (old, new)
        )
        for name in case[0]
    }
    where = topology(
        [device(name, memory_bytes=math.ceil((b + 1) / 0.9)) for name, b in room.items()]
    )
    room = {each.id: memory_cap_bytes(each.memory_bytes, 0.1) for each in where.devices}
    try:
        plan = migrate_stages(
            old, new, profile, where, kv=KvState(tokens_in_use=5, reserved_tokens=tokens),
            outlook=OUTLOOK, terms=CopyTerms(step_budget_bytes=budget),
        )  # fmt: skip
    except InfeasiblePlanError:
        # Full devices wait for each other; with room for one more layer on each they do not.
        assert spare < 1000 + kv_bytes
        return

    assert replay(plan.steps, pieces(old), sizes, room, budget, kv_bytes) == pieces(new)
    assert all(step.is_live for step in plan.steps)


@settings(max_examples=120, deadline=None)
@given(cuts(), st.integers(0, 20))
def test_no_hand_out_among_equal_devices_moves_fewer_bytes(
    case: tuple[dict[str, int], dict[str, int]], tokens: int
) -> None:
    names = list(case[0])
    where = topology([device(name, node="n") for name in names])
    profile = model(sum(case[0].values()), ends_bytes=300)
    old, new = (stages(profile, where, counts) for counts in case)

    plan = migrate_stages(
        old, new, profile, where, kv=KvState(tokens_in_use=tokens), outlook=OUTLOOK
    )

    sizes = {p: 1000 if p.part == "layer" else 300 for p in set().union(*pieces(old).values())}
    least = min(
        (
            sum(
                sizes[p] + (2 * tokens if p.part == "layer" else 0)
                for name, other in zip(names, permuted, strict=True)
                for p in pieces(new)[name] - pieces(old)[other]
            ),
            sum(name != other for name, other in zip(names, permuted, strict=True)),
        )
        for permuted in itertools.permutations(names)
    )
    assert (plan.moved_bytes + plan.kv_bytes, len(plan.renamed)) == least
    room = dict.fromkeys(names, 10**9)
    reached = replay(plan.steps, pieces(old), sizes, room, None)
    assert reached == pieces(renamed_stages(new, plan.renamed, where))
    assert MigrationPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


# Experts


def test_a_replica_is_copied_and_the_surplus_one_released() -> None:
    where = topology([device("a"), device("b")])

    plan = experts({"a": [{0, 1}], "b": [{0, 2}]}, {"a": [{0, 1}], "b": [{1, 2}]}, where)

    assert summary(plan) == [
        ([], ["expert 1 of layer 0: a to b, 100"]),
        (["expert 0 of layer 0 from b"], []),
    ]
    assert (plan.kv_bytes, plan.pause_s) == (0, 0.0)
    assert plan.background_s == pytest.approx(1.5)


def test_a_replica_is_released_first_where_room_is_short() -> None:
    where = topology([device("a"), device("b")])
    old, new = {"a": [{0, 1}], "b": [{0, 2}]}, {"a": [{0, 1}], "b": [{1, 2}]}

    plan = experts(old, new, where, room=200)

    assert summary(plan) == [
        (["expert 0 of layer 0 from b"], ["expert 1 of layer 0: a to b, 100"]),
    ]


def test_a_copy_larger_than_the_budget_takes_several_steps() -> None:
    where = topology([device("a"), device("b")])

    plan = experts(
        {"a": [{0, 1}], "b": [{2}]}, {"a": [{0}], "b": [{1, 2}]}, where,
        terms=CopyTerms(step_budget_bytes=40),
    )  # fmt: skip

    assert [(m.first_byte, m.num_bytes, m.is_last) for s in plan.steps for m in s.moves] == [
        (0, 40, False),
        (40, 40, False),
        (80, 20, True),
    ]
    assert plan.background_s == pytest.approx(3 * 0.5 + 1.0)


def test_equal_devices_trade_experts_layer_by_layer() -> None:
    where = topology([device("a", node="n"), device("b", node="n")])
    old = {"a": [{0}, {0}], "b": [{1}, {1}]}
    new = {"a": [{1}, {0}], "b": [{0}, {1}]}

    plan = experts(old, new, where)

    assert plan.steps == ()
    assert renamed_holdings(new, plan.renamed) == {
        name: tuple(frozenset(x) for x in layers) for name, layers in old.items()
    }


def test_layers_are_traded_together_where_a_device_would_run_out_of_room() -> None:
    where = topology([device("a", node="n"), device("b", node="n")])
    old = {"a": [{0, 1, 2}, {0, 1, 2}], "b": [{3, 4, 5}, {3, 4, 5}]}
    new = {"a": [{0, 1, 2, 3}, {4, 5}], "b": [{4, 5}, {0, 1, 2, 3}]}

    roomy, tight = experts(old, new, where, room=800), experts(old, new, where, room=700)

    # Layer by layer a would keep the larger half of either.
    assert roomy.moved_bytes == 200
    assert [(r.planned, r.actual, r.layer) for r in roomy.renamed] == [("a", "b", 1), ("b", "a", 1)]
    assert tight.renamed == ()
    assert tight.moved_bytes == 100 * (1 + 0 + 2 + 3)


def test_a_dropped_expert_is_refused() -> None:
    where = topology([device("a"), device("b")])

    with pytest.raises(ValueError, match=r"no copy of 1 experts .* .expert 1 of layer 0 first"):
        experts({"a": [{0, 1}]}, {"a": [{0}]}, where)


def test_holdings_of_other_layers_or_devices_are_refused() -> None:
    where = topology([device("a")])

    with pytest.raises(ValueError, match="a has experts for 2 layers and expert_bytes has 1"):
        experts({"a": [{0}, {0}]}, {"a": [{0}]}, where)
    with pytest.raises(ValueError, match=r"1 devices are not in the topology \(z\)"):
        experts({"a": [{0}]}, {"z": [{0}]}, where)
    with pytest.raises(ValueError, match="interchangeable names a in 2 groups"):
        experts({"a": [{0}]}, {"a": [{0}]}, where, interchangeable=[{"a"}, {"a"}])


def test_stages_of_another_model_are_refused() -> None:
    where = topology([device("a")])
    one, two = model(1), model(2)

    with pytest.raises(ValueError, match="the old plan covers 1 layers of toy and toy has 2"):
        migrate_stages(
            stages(one, where, {"a": 1}), stages(two, where, {"a": 2}), two, where,
            kv=IDLE, outlook=OUTLOOK,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CopyTerms(step_budget_bytes=0), r"step_budget_bytes \(0\)"),
        (lambda: CopyTerms(switch_s=-1.0), r"switch_s \(-1.0\)"),
        (lambda: CopyTerms(checkpoint_bytes_per_s={"n": 0.0}), "checkpoint_bytes_per_s of n"),
        (lambda: KvState(tokens_in_use=-1), r"tokens_in_use \(-1\)"),
        (lambda: KvState(tokens_in_use=1, recompute_tokens_per_s=0.0), "recompute_tokens_per_s"),
        (
            lambda: Outlook(old_step_s=1, new_step_s=1, steps=math.inf, slowdown_fraction=0),
            r"steps \(inf\)",
        ),
        (
            lambda: Outlook(old_step_s=1, new_step_s=1, steps=1, slowdown_fraction=1.5),
            r"slowdown_fraction \(1.5\)",
        ),
    ],
)
def test_malformed_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@st.composite
def placements(draw: st.DrawFn) -> tuple[Holdings, Holdings, list[str], int]:
    """Two placements of the same experts over two to four devices, and the experts per device."""
    names = [f"d{i}" for i in range(draw(st.integers(2, 4)))]
    num_layers, num_experts = draw(st.integers(1, 2)), draw(st.integers(1, 4))

    def placement() -> Holdings:
        held: dict[str, list[set[int]]] = {
            name: [set() for _ in range(num_layers)] for name in names
        }
        for index in range(num_layers):
            for each in range(num_experts):
                for name in draw(st.sets(st.sampled_from(names), min_size=1, max_size=2)):
                    held[name][index].add(each)
        return held

    old, new = placement(), placement()
    most = max(sum(map(len, layers)) for part in (old, new) for layers in part.values())
    return old, new, names, most


def as_pieces(holdings: Holdings) -> dict[str, set[Piece]]:
    return {
        name: {expert(each, index) for index, held in enumerate(layers) for each in held}
        for name, layers in holdings.items()
    }


@settings(max_examples=250, deadline=None)
@given(
    placements(),
    st.integers(0, 2),
    st.sampled_from([None, 30, 100, 250]),
    st.booleans(),
    st.booleans(),
)
def test_every_step_fits_memory_and_budget_and_keeps_every_expert_live(
    case: tuple[Holdings, Holdings, list[str], int],
    spare: int,
    budget: int | None,
    on_one_node: bool,
    allow_outage: bool,
) -> None:
    old, new, names, most = case
    where = topology([device(name, node="n" if on_one_node else name) for name in names])
    room = 100 * (most + spare)
    rates = {each.node: 10.0 for each in where.devices} if allow_outage else {}
    terms = CopyTerms(
        step_budget_bytes=budget, allow_outage=allow_outage, checkpoint_bytes_per_s=rates
    )
    try:
        plan = experts(old, new, where, room=room, terms=terms)
    except InfeasiblePlanError:
        # Only full devices that wait for each other are given up.
        assert not allow_outage
        assert spare == 0
        return

    held, universe = as_pieces(old), set().union(*as_pieces(new).values())
    sizes = dict.fromkeys(sorted(universe), 100)
    reached = replay(plan.steps, held, sizes, dict.fromkeys(names, room), budget)
    assert reached == as_pieces(renamed_holdings(new, plan.renamed))
    assert allow_outage or all(step.is_live for step in plan.steps)
    assert plan.moved_bytes >= plan.least_bytes
    detours = sum(m.num_bytes for s in plan.steps for m in s.moves if m.is_detour)
    assert plan.moved_bytes == plan.least_bytes + detours
    assert MigrationPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@settings(max_examples=80, deadline=None)
@given(placements())
def test_no_trade_of_experts_among_equal_devices_moves_fewer_bytes(
    case: tuple[Holdings, Holdings, list[str], int],
) -> None:
    old, new, names, _ = case
    where = topology([device(name, node="n") for name in names])

    plan = experts(old, new, where)

    least = 0
    for index in range(len(old[names[0]])):
        least += min(
            sum(
                len(new[name][index] - old[other][index])
                for name, other in zip(names, permuted, strict=True)
            )
            for permuted in itertools.permutations(names)
        )
    assert plan.moved_bytes == 100 * least


@settings(max_examples=60, deadline=None)
@given(placements(), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_does_not_matter(
    case: tuple[Holdings, Holdings, list[str], int], random: Any
) -> None:
    old, new, names, most = case
    devices = [device(name, node=f"n{int(name[1:]) // 2}") for name in names]

    def shuffled(items: Any) -> Any:
        return random.sample(list(items), len(items))

    def outcome(where: Topology, old: Holdings, new: Holdings) -> object:
        try:
            return experts(old, new, where, room=100 * most)
        except InfeasiblePlanError as error:
            return str(error)

    first = outcome(topology(devices), old, new)
    again = outcome(
        topology(shuffled(devices)), dict(shuffled(old.items())), dict(shuffled(new.items()))
    )

    assert first == again


def test_a_replica_that_is_no_longer_wanted_is_only_released() -> None:
    where = topology([device("a"), device("b")])

    plan = experts({"a": [{0}], "b": [{0}]}, {"a": [{0}], "b": [set()]}, where)

    [step] = plan.steps
    assert step.releases == (Release(device_id="b", piece=expert(0)),)
    assert (step.moves, step.copy_s) == ((), 0.0)
