"""What an operator asks of the controller, over HTTP: only what is understood is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx

    from tests.unit.conftest import FakeBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")

WOULD = {"verdict": "0.12 s instead of 0.15 s", "cut": {"a": 3, "b": 5}}


class FakeSteering:
    """Remembers what it was asked to do."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    async def would_move(self) -> dict[str, object]:
        return dict(WOULD)

    def rebalance(self) -> None:
        self.done.append("rebalance")

    def drain(self, node: str, *, cancel: bool) -> None:
        self.done.append((node, cancel))


@pytest.fixture
def steering(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> FakeSteering:
    made = FakeSteering()
    monkeypatch.setattr(backend, "steering", lambda: made)
    return made


@pytest.mark.parametrize("body", ["", "{}", '{"dry_run": false}'])
async def test_rebalance_moves(body: str, http: httpx.AsyncClient, steering: FakeSteering) -> None:
    response = await http.post("/controller/rebalance", content=body)

    assert (response.status_code, response.json()) == (202, {"would": WOULD})
    assert steering.done == ["rebalance"]


async def test_a_dry_run_moves_nothing(http: httpx.AsyncClient, steering: FakeSteering) -> None:
    response = await http.post("/controller/rebalance", json={"dry_run": True})

    assert (response.status_code, response.json()) == (200, {"would": WOULD})
    assert steering.done == []


@pytest.mark.parametrize("body", ['{"dryrun": true}', '{"dry_run": 7}', "[]", "{", "yes"])
async def test_what_is_not_understood_moves_nothing(
    body: str, http: httpx.AsyncClient, steering: FakeSteering
) -> None:
    response = await http.post("/controller/rebalance", content=body)

    assert response.status_code in (400, 422)
    assert steering.done == []


@pytest.mark.parametrize("cancel", [False, True])
async def test_a_node_is_drained(
    cancel: bool, http: httpx.AsyncClient, steering: FakeSteering
) -> None:
    body = {"node": "b"} | ({"cancel": True} if cancel else {})
    response = await http.post("/controller/drain", json=body)

    assert (response.status_code, response.json()) == (202, {"node": "b", "cancelled": cancel})
    assert steering.done == [("b", cancel)]
