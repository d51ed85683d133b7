"""Slots read one expert and nothing else, refuse what does not fit, and change beside calls."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, MOE

from actors.engine.checkpoint import Checkpoint, CheckpointError
from actors.engine.expert_calls import ExpertError, ExpertMapError
from actors.engine.expert_host import ExpertHost
from actors.engine.expert_slots import ExpertSlots
from actors.engine.fingerprint import expert_fingerprint
from actors.engine.skeleton import fill_expert

pytestmark = pytest.mark.engine

WIDTH = 48


@pytest.fixture
def olmoe(checkpoint_dir: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(str(checkpoint_dir("olmoe")))


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", MOE)
def test_an_expert_computes_what_transformers_own_does(
    model_type: str,
    fused: bool,
    checkpoint_dir: Callable[..., Path],
    reference: Callable[[Path], Any],
) -> None:
    path = checkpoint_dir(model_type, fused=fused)
    slots = ExpertSlots(Checkpoint.open(str(path)), 6)
    layer = slots.layers[-1]
    mlp = reference(path).model.layers[layer].mlp
    x = rows(7)
    for expert in (3, 1):
        slots.load(layer, expert)

    got = slots.run(layer, [(1, 5), (3, 2)], x)

    chosen = torch.tensor([[1]] * 5 + [[3]] * 2)
    with torch.inference_mode():
        wanted = mlp.experts(x, chosen, torch.ones(7, 1))
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", MOE)
def test_loading_an_expert_reads_its_share_of_the_layer(
    model_type: str, fused: bool, checkpoint_dir: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint.open(str(checkpoint_dir(model_type, fused=fused)))
    slots = ExpertSlots(checkpoint, 4)
    layer = slots.layers[0]
    layer_bytes = sum(
        t.num_bytes for t in checkpoint.tensors if t.layer == layer and ".experts." in t.parameter
    )

    slots.load(layer, 0)
    slots.load(layer, 2)
    slots.load(layer, 2)

    assert slots.bytes_read * slots.num_experts == 2 * layer_bytes
    assert slots.slot_bytes * slots.num_experts == layer_bytes
    assert slots.held == {(layer, 0), (layer, 2)}


def test_a_fused_tensor_is_sliced_never_taken_whole(
    checkpoint_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = ExpertSlots(Checkpoint.open(str(checkpoint_dir("gpt_oss", fused=True))), 1)
    taken: list[str] = []

    class Spy:
        def __init__(self, *args: Any, **how: Any) -> None:
            assert how["backend"] == "mmap"
            self._handle: Any = safe_open(*args, **how)

        def __enter__(self) -> Spy:
            self._handle.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._handle.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            raise AssertionError(name)

        def get_slice(self, name: str) -> Any:
            taken.append(name.rpartition(".")[2])
            return self._handle.get_slice(name)

    monkeypatch.setattr("actors.engine.skeleton.safe_open", Spy)
    slots.load(3, 1)

    assert sorted(taken) == ["down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"]


def test_values_are_converted_to_the_asked_type(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 1, dtype=torch.bfloat16)
    slots.load(0, 0)

    got = slots.run(0, [(0, 2)], rows(2))

    assert got.dtype == torch.float32
    assert torch.equal(got, slots.run(0, [(0, 2)], rows(2).bfloat16()).float())
    assert slots.slot_bytes * 2 == ExpertSlots(olmoe, 1).slot_bytes


def test_a_slot_takes_an_expert_of_any_layer(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 1)
    outs = []
    for layer, expert in ((0, 7), (5, 2), (0, 7)):
        slots.load(layer, expert)
        outs.append(slots.run(layer, [(expert, 3)], rows(3)))
        slots.drop(layer, expert)

    assert torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[1], atol=1e-2)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "expert", "message"),
    [
        (1, 0, r"layer 1 has no routed experts; original has some in \[0, 2, 3, 4, 5\]"),
        (9, 0, "layer 9 has no routed experts"),
        (0, 8, "layer 0 has no expert 8; original has 8 a layer"),
        (0, -1, "layer 0 has no expert -1"),
    ],
)
def test_experts_that_do_not_exist_are_refused(
    layer: int, expert: int, message: str, checkpoint_dir: Callable[..., Path]
) -> None:
    slots = ExpertSlots(Checkpoint.open(str(checkpoint_dir("qwen3_moe"))), 2)

    with pytest.raises(ExpertError, match=message):
        slots.load(layer, expert)
    assert slots.held == frozenset()


def test_a_full_device_says_so_and_a_dropped_expert_makes_room(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 2)
    slots.load(0, 0)
    slots.load(0, 1)

    with pytest.raises(ExpertError, match="expert 2 of layer 0 finds all 2 slots taken; drop one"):
        slots.load(0, 2)
    slots.drop(0, 0)
    slots.load(0, 2)

    assert slots.held == {(0, 1), (0, 2)}
    with pytest.raises(ExpertError, match=r"num_slots \(0\) must be at least 1"):
        ExpertSlots(olmoe, 0)


def test_rows_that_do_not_fit_are_refused(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 2)
    slots.load(0, 3)

    for bad in (rows(3)[:, :40], rows(4), rows(3)[0]):
        with pytest.raises(ExpertError, match=r"for layer 0; its experts take \(3, 48\)"):
            slots.run(0, [(3, 3)], bad)
    with pytest.raises(ExpertError, match=r"experts \[1, 2\] of layer 0 are not loaded here"):
        slots.run(0, [(1, 1), (2, 1), (3, 1)], rows(3))


def test_a_model_without_experts_is_refused(checkpoint_dir: Callable[..., Path]) -> None:
    with pytest.raises(ExpertError, match="routed experts of 0 shapes"):
        ExpertSlots(Checkpoint.open(str(checkpoint_dir("qwen3"))), 2)


def test_an_expert_that_is_not_stored_leaves_its_slot_free(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = changed(
        checkpoint_dir("olmoe"), tmp_path, lambda name, t: None if ".5.up" in name else t
    )
    slots = ExpertSlots(Checkpoint.open(str(path)), 1)

    with pytest.raises(CheckpointError, match="gate_up_proj of expert 5 has 3072 of 6144 values"):
        slots.load(0, 5)
    slots.load(0, 4)

    assert slots.held == {(0, 4)}


def changed(
    source: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Path:
    """Save a checkpoint again in one file, each tensor changed, or left out (None)."""
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                tensor = change(name, handle.get_tensor(name))
                if tensor is not None:
                    tensors[name] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors")
    shutil.copy(source / "config.json", target / "config.json")
    return target


# --- fingerprints -----------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_experts_and_not_of_the_files(
    checkpoint_dir: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint_dir("mixtral")
    changes: Mapping[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
        "same": lambda _, tensor: tensor,
        "other head": lambda name, tensor: tensor + 1 if name == "lm_head.weight" else tensor,
        "other expert": lambda name, t: t + 1e-3 if ".3.block" in name and ".2.w1" in name else t,
    }
    prints = {}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        path = changed(source, tmp_path / name, change)
        prints[name] = expert_fingerprint(Checkpoint.open(str(path)))

    original = expert_fingerprint(Checkpoint.open(str(source)))
    assert prints["same"] == prints["other head"] == original
    assert prints["other expert"] != original
    config = tmp_path / "same" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert expert_fingerprint(Checkpoint.open(str(config.parent))) != original


@pytest.mark.parametrize("model_type", MOE)
def test_architectures_have_their_own_fingerprints(
    model_type: str, checkpoint_dir: Callable[..., Path]
) -> None:
    prints = {
        other: expert_fingerprint(Checkpoint.open(str(checkpoint_dir(other)))) for other in MOE
    }

    assert len(set(prints.values())) == len(MOE)
    assert len(prints[model_type]) == 16
    assert model_type in ARCHITECTURES


# --- versions ---------------------------------------------------------------------------------


def test_versions_live_side_by_side_until_they_are_retired(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 4)
    host = ExpertHost(slots)
    host.prepare(1, {0: [0, 1], 2: [5]})
    host.prepare(2, {0: [1, 3]})
    x = rows(2)

    old = host.run(1, 0, [(0, 1), (1, 1)], x)
    new = host.run(2, 0, [(1, 1), (3, 1)], x)

    assert host.versions == (1, 2)
    assert torch.equal(host.run(1, 0, [(0, 1), (1, 1)], x), old)
    with pytest.raises(
        ExpertError, match=r"experts \[0\] of layer 0 are not here in map version 2"
    ):
        host.run(2, 0, [(0, 2)], x)
    host.retire(2)
    assert slots.held == {(0, 1), (0, 3)}
    assert torch.equal(host.run(2, 0, [(1, 1), (3, 1)], x), new)
    with pytest.raises(ExpertError, match=r"map version 1 is not here, there are \[2\]"):
        host.run(1, 0, [(1, 2)], x)


def test_a_version_that_cannot_be_prepared_changes_nothing(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 3)
    host = ExpertHost(slots)
    host.prepare(1, {0: [0, 1]})

    for bad in ({0: [2], 1: [3]}, {0: [2, 8]}, {6: [0]}):
        with pytest.raises(ExpertError):
            host.prepare(2, bad)
        assert slots.held == {(0, 0), (0, 1)}
        assert host.versions == (1,)
    host.prepare(1, {0: [1, 0]})
    with pytest.raises(ExpertError, match="map version 1 has other experts here already"):
        host.prepare(1, {0: [0]})


def test_a_version_that_is_forgotten_frees_what_only_it_needed(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 3)
    host = ExpertHost(slots)
    host.prepare(1, {0: [0, 1]})
    host.prepare(2, {0: [0, 2]})

    host.forget(2)

    assert slots.held == {(0, 0), (0, 1)}
    host.forget(3)
    host.prepare(3, {0: [0, 2]})
    assert host.versions == (1,)
    assert slots.held == {(0, 0), (0, 1)}


def test_an_expert_fetched_for_a_version_to_come_stays_until_it_is_released(
    olmoe: Checkpoint,
) -> None:
    slots = ExpertSlots(olmoe, 3)
    host = ExpertHost(slots)
    host.prepare(1, {0: [1]})
    host.fetch(0, 2)
    host.fetch(0, 2)
    host.retire(1)
    assert slots.held == {(0, 1), (0, 2)}

    with pytest.raises(ExpertError, match="are not here in map version 1"):
        host.run(1, 0, [(2, 1)], rows(1))
    host.prepare(2, {0: [2]})
    host.retire(2)
    assert slots.held == {(0, 2)}, "the version holds it from now on"

    host.fetch(0, 3)
    host.release(0, 3)
    host.release(0, 2)
    assert slots.held == {(0, 2)}, "what a version has stays"


def test_an_expert_that_finds_no_slot_is_not_kept_in_mind(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 1)
    host = ExpertHost(slots)
    host.prepare(1, {0: [1]})
    with pytest.raises(ExpertError, match="finds all 1 slots taken"):
        host.fetch(0, 2)

    host.prepare(2, {})
    host.retire(2)
    assert slots.held == frozenset()


def test_an_expert_is_read_in_parts_and_is_there_with_the_last(
    olmoe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engine.skeleton._CHUNK_BYTES", 4096)
    whole = ExpertHost(ExpertSlots(olmoe, 2))
    whole.prepare(1, {0: [0, 2]})
    slots = ExpertSlots(olmoe, 2)
    host = ExpertHost(slots)
    host.prepare(1, {0: [0]})
    one_bytes, x = slots.bytes_read, rows(3)

    for quarter in (1, 2, 3):
        host.fetch(0, 2, share=quarter / 4)
        read = slots.bytes_read - one_bytes
        assert quarter * one_bytes <= 4 * read < quarter * one_bytes + 4 * 4096
        assert slots.held == {(0, 0)}
    host.fetch(0, 2)
    assert slots.bytes_read == 2 * one_bytes
    host.prepare(2, {0: [0, 2]})

    split = [(0, 1), (2, 2)]
    assert torch.equal(host.run(2, 0, split, x), whole.run(1, 0, split, x))


def test_an_expert_that_is_given_up_half_read_frees_its_slot(
    olmoe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engine.skeleton._CHUNK_BYTES", 4096)
    slots = ExpertSlots(olmoe, 2)
    host = ExpertHost(slots)
    host.prepare(1, {0: [0]})
    host.fetch(0, 2, share=0.5)
    with pytest.raises(ExpertError, match="finds all 2 slots taken"):
        host.fetch(0, 3)

    host.release(0, 2)
    host.fetch(0, 3)

    assert slots.held == {(0, 0), (0, 3)}


def test_in_place_a_version_takes_the_room_of_those_before(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 2)
    host = ExpertHost(slots)
    host.prepare(1, {0: [0, 1]})
    with pytest.raises(ExpertError, match="finds all 2 slots taken"):
        host.prepare(2, {0: [0, 2]})
    assert host.versions == (1,)

    host.prepare(2, {0: [0, 2]}, in_place=True)

    assert host.versions == (2,)
    assert slots.held == {(0, 0), (0, 2)}
    with pytest.raises(ExpertMapError, match="version 1 is not here"):
        host.run(1, 0, [(0, 1)], rows(1))


def test_a_guest_that_a_version_is_prepared_with_does_not_leave_meanwhile(
    olmoe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ExpertHost(ExpertSlots(olmoe, 4), num_guests=1)
    host.prepare(1, {0: [0]})
    host.run(1, 0, [(1, 1)], rows(1), guests=[1])
    is_reading, may_go_on = threading.Event(), threading.Event()

    def slow(checkpoint: Any, stored: Any, expert: int, *args: Any) -> Any:
        if expert == 2:
            is_reading.set()
            assert may_go_on.wait(10.0)
        return fill_expert(checkpoint, stored, expert, *args)

    monkeypatch.setattr("actors.engine.expert_slots.fill_expert", slow)
    loader = threading.Thread(target=host.prepare, args=(2, {0: [1, 2]}))
    loader.start()
    assert is_reading.wait(10.0)
    other = threading.Thread(
        target=host.run, args=(1, 0, [(3, 1)], rows(1)), kwargs={"guests": [3]}
    )
    other.start()
    may_go_on.set()
    loader.join()
    other.join()

    assert host.run(2, 0, [(1, 1), (2, 1)], rows(2)).shape == (2, WIDTH)


# --- guests -----------------------------------------------------------------------------------


def test_a_guest_is_read_once_and_computes_as_where_it_is_held(olmoe: Checkpoint) -> None:
    everywhere = ExpertHost(ExpertSlots(olmoe, 4))
    everywhere.prepare(1, {0: [0, 1, 2, 3]})
    slots = ExpertSlots(olmoe, 4)
    host = ExpertHost(slots, num_guests=2)
    host.prepare(1, {0: [0, 2]})
    x = rows(9)
    split = [(0, 2), (1, 3), (2, 1), (3, 3)]

    for _ in range(2):
        got = host.run(1, 0, split, x, guests=[1, 3])
        assert torch.equal(got, everywhere.run(1, 0, split, x))
    assert host.num_taken_in == 2
    with pytest.raises(ExpertError, match=r"experts \[1\] of layer 0 are not here"):
        host.run(1, 0, [(1, 2)], x[:2])


def test_guests_are_read_while_other_rows_are_computed(
    olmoe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = ExpertSlots(olmoe, 3)
    host = ExpertHost(slots, num_guests=1)
    host.prepare(1, {0: [0, 2]})
    has_computed = threading.Event()
    compute = slots.run

    def computed(*args: Any) -> torch.Tensor:
        out = compute(*args)
        has_computed.set()
        return out

    def slow(*args: Any) -> Any:
        assert has_computed.wait(10.0)
        return fill_expert(*args)

    monkeypatch.setattr("actors.engine.expert_slots.fill_expert", slow)
    monkeypatch.setattr(slots, "run", computed)

    assert host.run(1, 0, [(0, 1), (1, 2), (2, 1)], rows(4), guests=[1]).shape == (4, WIDTH)


def test_guests_leave_when_others_come_but_not_what_a_version_holds(olmoe: Checkpoint) -> None:
    slots = ExpertSlots(olmoe, 4)
    host = ExpertHost(slots, num_guests=2)
    host.prepare(1, {0: [0]})
    host.run(1, 0, [(1, 1), (2, 1)], rows(2), guests=[1, 2])
    host.prepare(2, {0: [0, 2]})
    host.retire(2)
    assert slots.held == {(0, 0), (0, 1), (0, 2)}

    host.run(2, 0, [(1, 1)], rows(1), guests=[1])
    host.run(2, 0, [(3, 1)], rows(1), guests=[3])
    assert slots.held == {(0, 0), (0, 1), (0, 2), (0, 3)}
    host.run(2, 1, [(3, 1)], rows(1), guests=[3])

    assert slots.held == {(0, 0), (0, 2), (0, 3), (1, 3)}, "1 was used before 3"


def test_guests_that_cannot_be_taken_in_are_refused_and_calls_go_on(
    olmoe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ExpertHost(ExpertSlots(olmoe, 2), num_guests=1)
    host.prepare(1, {0: [0]})
    with pytest.raises(ExpertError, match="brings 2 guests and there is room for 1; raise plan"):
        host.run(1, 0, [(1, 1), (2, 1)], rows(2), guests=[1, 2])
    with pytest.raises(ExpertError, match="has no expert 99"):
        host.run(1, 0, [(0, 1)], rows(1), guests=[99])

    def unreadable(*args: Any) -> int:
        raise OSError("the disk is gone")

    monkeypatch.setattr("actors.engine.expert_slots.fill_expert", unreadable)
    with pytest.raises(OSError, match="the disk is gone"):
        host.run(1, 0, [(0, 1), (1, 1)], rows(2), guests=[1])
    monkeypatch.undo()

    assert host.run(1, 0, [(0, 1), (1, 1)], rows(2), guests=[1]).shape == (2, WIDTH)
    host.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        host.run(1, 0, [(2, 1)], rows(1), guests=[2])


def test_calls_run_while_an_expert_is_read(
    olmoe: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ExpertHost(ExpertSlots(olmoe, 3))
    host.prepare(1, {0: [0, 1]})
    x = rows(4)
    wanted = host.run(1, 0, [(0, 4)], x)
    is_reading, may_go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        is_reading.set()
        assert may_go_on.wait(10.0)
        return fill_expert(*args)

    monkeypatch.setattr("actors.engine.expert_slots.fill_expert", slow)
    loader = threading.Thread(target=host.prepare, args=(2, {0: [1, 2]}))
    loader.start()
    assert is_reading.wait(10.0)

    during = host.run(1, 0, [(0, 4)], x)
    versions_during = host.versions
    may_go_on.set()
    loader.join()

    assert torch.equal(during, wanted)
    assert versions_during == (1,)
    assert host.versions == (1, 2)
