"""Messages over real sockets: who is heard, in which order, and what is left behind."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from stat import S_IMODE

import pytest
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from actors import wire
from actors.engine.frames import decode_tensor, encode_tensor
from actors.wire import Address, Inbox, Outbox, WireError, WireKeys, machine_id

pytestmark = pytest.mark.engine

LONG_S = 10.0
"""Far longer than any message takes; waited out only by a failing test."""
ENDS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)

Open = Callable[[Address], Outbox]


@pytest.fixture
def keys() -> WireKeys:
    return WireKeys.make()


@pytest.fixture
def inbox(keys: WireKeys) -> Iterator[Inbox]:
    with closing(Inbox("stage 1", keys)) as made:
        yield made


@pytest.fixture
def open_outbox(keys: WireKeys) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda address: stack.enter_context(closing(Outbox(address, keys)))


def elsewhere(address: Address) -> Address:
    """The address as a sender on another machine sees it; its unix socket is out of reach."""
    return replace(address, machine="another", ipc="ipc:///nowhere/inbox")


def here(address: Address) -> Address:
    """The address as a sender on the same machine sees it; nobody listens on its TCP port."""
    return replace(address, tcp="tcp://127.0.0.1:1")


PATHS = pytest.mark.parametrize("reach", [here, elsewhere])
Reach = Callable[[Address], Address]


def receive(inbox: Inbox) -> list[bytes]:
    parts = inbox.receive(LONG_S)
    assert parts is not None, "no message came"
    return [bytes(part) for part in parts]


# --- both ways --------------------------------------------------------------------------------


@PATHS
def test_a_message_arrives_in_its_parts(reach: Reach, inbox: Inbox, open_outbox: Open) -> None:
    box = open_outbox(reach(inbox.address))

    box.send([wire.STEP, b"", memoryview(b"rows"), bytes(1_000_000)])

    assert receive(inbox) == [b"step", b"", b"rows", bytes(1_000_000)]
    assert box.bytes_sent == 4 + 0 + 4 + 1_000_000
    assert inbox.receive(0.0) is None


@PATHS
def test_a_tensor_arrives_without_pickle(reach: Reach, inbox: Inbox, open_outbox: Open) -> None:
    tensor = torch.randn(33, 48).bfloat16()

    open_outbox(reach(inbox.address)).send([b"step", *encode_tensor(tensor)])

    parts = inbox.receive(LONG_S)
    assert parts is not None
    assert torch.equal(decode_tensor(parts[1], parts[2]), tensor)


def test_several_senders_are_all_heard_each_in_its_own_order(
    inbox: Inbox, open_outbox: Open
) -> None:
    reaches = (here, elsewhere, here, elsewhere)
    boxes = [open_outbox(reach(inbox.address)) for reach in reaches]

    for number in range(100):
        for sender, box in enumerate(boxes):
            box.send([bytes([sender]), bytes([number])])
    heard = [receive(inbox) for _ in range(100 * len(boxes))]

    assert inbox.receive(0.0) is None
    for sender in range(len(boxes)):
        numbers = [parts[1][0] for parts in heard if parts[0][0] == sender]
        assert numbers == list(range(100))


def test_an_empty_inbox_gives_nothing_and_does_not_block(inbox: Inbox) -> None:
    assert inbox.receive(0.0) is None
    assert inbox.receive(0.01) is None


def test_what_was_sent_before_the_sender_looked_is_kept(inbox: Inbox, open_outbox: Open) -> None:
    first, second = open_outbox(here(inbox.address)), open_outbox(elsewhere(inbox.address))
    first.send([b"a"])
    second.send([b"b"])

    assert {receive(inbox)[0], receive(inbox)[0]} == {b"a", b"b"}


# --- who is let in ----------------------------------------------------------------------------


def handshake(address: Address, keys: WireKeys | None, server_key: bytes = b"") -> int:
    """Connect over TCP as a stranger would, send, and return how the handshake ended."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.PUSH) as push:
        push.linger = 0
        if keys is not None:
            push.curve_publickey, push.curve_secretkey = keys
            push.curve_serverkey = server_key
        with push.get_monitor_socket(ENDS) as monitor:
            push.connect(address.tcp)
            push.send(b"let me in")
            assert monitor.poll(round(LONG_S * 1000)), "the handshake did not end"
            event = int(recv_monitor_message(monitor)["event"])
            push.disable_monitor()
    return event


def test_the_holder_of_the_key_pair_is_let_in(inbox: Inbox, keys: WireKeys) -> None:
    assert handshake(inbox.address, keys, keys.public) == zmq.EVENT_HANDSHAKE_SUCCEEDED


def test_another_key_pair_is_not_let_in_though_it_knows_the_public_key(
    inbox: Inbox, keys: WireKeys, open_outbox: Open
) -> None:
    assert handshake(inbox.address, WireKeys.make(), keys.public) == (
        zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )

    open_outbox(elsewhere(inbox.address)).send([b"friend"])
    assert receive(inbox) == [b"friend"]
    assert inbox.receive(0.0) is None


def test_another_deployment_is_not_let_in(inbox: Inbox, open_outbox: Open) -> None:
    stranger = WireKeys.make()
    assert handshake(inbox.address, stranger, stranger.public) != zmq.EVENT_HANDSHAKE_SUCCEEDED

    open_outbox(elsewhere(inbox.address)).send([b"friend"])
    assert receive(inbox) == [b"friend"]
    assert inbox.receive(0.0) is None


def test_a_sender_without_encryption_is_not_let_in(inbox: Inbox, open_outbox: Open) -> None:
    assert handshake(inbox.address, None) != zmq.EVENT_HANDSHAKE_SUCCEEDED

    open_outbox(elsewhere(inbox.address)).send([b"friend"])
    assert receive(inbox) == [b"friend"]
    assert inbox.receive(0.0) is None


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48),
        b"\x01\x00\x05hello" * 20,
    ],
    ids=["http", "no security", "ZMTP 1"],
)
def test_plain_tcp_is_hung_up_on(greeting: bytes, inbox: Inbox, open_outbox: Open) -> None:
    port = int(inbox.address.tcp.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as plain:
        plain.sendall(greeting)
        try:
            while plain.recv(4096):
                pass
        except ConnectionResetError:
            pass

    open_outbox(elsewhere(inbox.address)).send([b"friend"])
    assert receive(inbox) == [b"friend"]
    assert inbox.receive(0.0) is None


def test_keys_are_made_anew_each_time() -> None:
    assert WireKeys.make() != WireKeys.make()


# --- bounds -----------------------------------------------------------------------------------


@PATHS
def test_a_part_over_the_bound_is_dropped_and_its_sender_is_heard_again(
    reach: Reach, keys: WireKeys, open_outbox: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_PART_BYTES", 1000)
    with closing(Inbox("small", keys)) as inbox:
        box = open_outbox(reach(inbox.address))
        box.send([bytes(900)])
        assert receive(inbox) == [bytes(900)]

        box.send([bytes(1001)])

        # The connection is cut with what was on it, so say it until it is heard.
        for _ in range(100):
            box.send([b"again"])
            if (parts := inbox.receive(0.1)) is not None:
                break
        assert parts is not None
        assert bytes(parts[0]) == b"again"


def test_a_message_cut_off_after_its_first_part_does_not_hold_up_the_receiver(
    keys: WireKeys, open_outbox: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_PART_BYTES", 1000)
    with closing(Inbox("small", keys)) as inbox:
        heard: list[object] = []
        reader = threading.Thread(target=lambda: heard.append(inbox.receive(0.5)))
        reader.start()
        open_outbox(elsewhere(inbox.address)).send([b"kind", bytes(1001)])
        reader.join(3.0)
        is_stuck = reader.is_alive()
        open_outbox(here(inbox.address)).send([b"frees the reader"])
        reader.join(LONG_S)

        assert not is_stuck
        assert heard == [None]


def test_a_full_queue_to_a_receiver_that_is_gone_is_an_error_that_names_it(
    keys: WireKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_SEND_TIMEOUT_S", 0.01)
    monkeypatch.setattr(wire, "_QUEUED_MESSAGES", 2)
    gone = Address(name="stage 7", machine="x", ipc="ipc:///x", tcp="tcp://127.0.0.1:1")

    with closing(Outbox(gone, keys)) as box:
        box.send([b"1"])
        box.send([b"2"])
        with pytest.raises(WireError, match=r"stage 7 took no message for 0\.01 s with 2 queued"):
            box.send([b"3"])
        assert box.bytes_sent == 2


# --- what is left behind ----------------------------------------------------------------------


def directory(inbox: Inbox) -> Path:
    return Path(inbox.address.ipc.removeprefix("ipc://")).parent


def test_only_the_owner_may_enter_the_directory_and_it_goes_with_the_inbox(
    keys: WireKeys,
) -> None:
    old = os.umask(0)
    try:
        inbox = Inbox("stage 1", keys)
    finally:
        os.umask(old)
    place = directory(inbox)

    assert S_IMODE(place.stat().st_mode) == 0o700
    assert place.stat().st_uid == os.getuid()
    assert (place / "inbox").is_socket()
    inbox.close()
    assert not place.exists()


def test_an_inbox_beside_another_goes_with_it(keys: WireKeys, open_outbox: Open) -> None:
    outliving = Inbox("gateway", keys)
    inbox = Inbox("stage 1", keys, beside=outliving.address)
    assert directory(inbox) == directory(outliving)
    open_outbox(inbox.address).send([b"1"])
    assert receive(inbox) == [b"1"]

    inbox.close()
    assert [path.name for path in directory(outliving).iterdir()] == ["inbox"]

    left = Inbox("a stage that is killed", keys, beside=outliving.address)
    outliving.close()
    assert not directory(left).exists()
    left.close()
    with pytest.raises(WireError, match="starts too late: gateway is gone"):
        Inbox("a stage that starts too late", keys, beside=outliving.address)


def test_an_inbox_beside_one_of_another_machine_has_a_folder_of_its_own(keys: WireKeys) -> None:
    with closing(Inbox("gateway", keys)) as far:
        address = replace(far.address, machine="another")
        with closing(Inbox("stage 1", keys, beside=address)) as inbox:
            assert directory(inbox) != directory(far)


def test_what_a_process_left_is_removed_by_its_address(keys: WireKeys) -> None:
    with closing(Inbox("gateway", keys)) as outliving:
        beside = Inbox("stage 1", keys, beside=outliving.address)
        alone = Inbox("stage 2", keys)
        with closing(beside), closing(alone):
            wire.remove_socket(replace(alone.address, machine="another"))
            assert directory(alone).exists()
            wire.remove_socket(beside.address)
            wire.remove_socket(alone.address)
            assert not directory(alone).exists()
            assert [path.name for path in directory(outliving).iterdir()] == ["inbox"]


def test_an_inbox_listens_on_loopback_unless_told_otherwise(inbox: Inbox) -> None:
    assert inbox.address.tcp.startswith("tcp://127.0.0.1:")
    assert (inbox.address.name, inbox.address.machine) == ("stage 1", machine_id())


def test_inboxes_of_one_process_have_their_own_addresses(keys: WireKeys) -> None:
    with closing(Inbox("a", keys)) as a, closing(Inbox("b", keys)) as b:
        assert {a.address.ipc, a.address.tcp}.isdisjoint({b.address.ipc, b.address.tcp})


def test_an_inbox_closes_while_a_sender_still_sends(keys: WireKeys, open_outbox: Open) -> None:
    inbox = Inbox("stage 1", keys)
    for reach in (here, elsewhere):
        box = open_outbox(reach(inbox.address))
        for _ in range(50):
            box.send([bytes(10_000)])

    inbox.close()

    assert not directory(inbox).exists()


def test_a_machine_is_itself_and_tells_network_namespaces_apart() -> None:
    assert machine_id() == machine_id()
    assert machine_id().split()[-1].startswith("net:[")


def test_folders_of_killed_processes_are_swept_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keys = wire.WireKeys.make()
    alive = wire.Inbox("alive", keys)
    folders = [tmp_path / f"motley-{name}" for name in ("killed", "young")]
    for folder in folders:
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(folder / "inbox"))
    old = Path(alive.address.ipc.removeprefix("ipc://")).parent
    for folder in (folders[0], old):
        os.utime(folder, (0, 0))
    try:
        assert wire.sweep() == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [old.name, "motley-young"]
        )
    finally:
        alive.close()
