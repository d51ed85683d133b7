"""What a slot waits for, and what ends its waiting."""

from __future__ import annotations

import threading

import pytest

from actors.mailbox import Mailbox, SlotCancelledError

TIMEOUT_S = 60.0


def test_an_item_is_taken_once_whenever_it_comes() -> None:
    box = Mailbox()
    thread = threading.Thread(target=box.put, args=("a", 1))
    thread.start()
    assert box.take("a", TIMEOUT_S) == 1
    thread.join()
    with pytest.raises(TimeoutError, match="a did not come within 0 s"):
        box.take("a", 0.0)


def test_a_slot_that_is_taken_back_ends_at_its_next_wait_but_not_before_its_weights_came() -> None:
    box = Mailbox()
    box.check()
    box.cancel()
    box.put("input", 1)
    box.put("weights", 2)
    assert box.take("weights", TIMEOUT_S, cancellable=False) == 2
    with pytest.raises(SlotCancelledError):
        box.take("input", TIMEOUT_S)
    with pytest.raises(SlotCancelledError):
        box.check()


@pytest.mark.parametrize("cancellable", [True, False])
def test_what_goes_wrong_where_items_come_from_is_raised_to_who_waits(cancellable: bool) -> None:
    box = Mailbox()
    box.fail(KeyError("weights"))
    with pytest.raises(KeyError):
        box.take("weights", TIMEOUT_S, cancellable=cancellable)
