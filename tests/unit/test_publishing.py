"""An adapter comes into use everywhere or nowhere, and one at a time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from plain_adapters import write_adapter

from actors.engine.adapter import Adapter, AdapterError
from cluster.backend import AdapterStatus, PublishFailed, PublishInProgress
from cluster.publishing import Publisher


class Stages:
    """Holds versions as stages do, and refuses what it is told to."""

    def __init__(self) -> None:
        self.held: set[int] = {0}
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.may_load = threading.Event()
        self.may_load.set()

    def check(self, adapter: Adapter) -> None:
        if self.refusal is not None:
            raise self.refusal

    def load(self, version: int, adapter: Adapter, *, keep: int) -> None:
        self.may_load.wait(10.0)
        self.held = {0, keep, version}
        if self.failure is not None:
            raise self.failure


class Lanes:
    """Use a version; what they are told must be held by then."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.used = [0]
        self.failure: Exception | None = None

    async def switch(self, version: int) -> float:
        assert version in self.stages.held
        if self.failure is not None:
            raise self.failure
        self.used.append(version)
        return 0.5


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return Adapter.read(write_adapter(tmp_path / "step-000100"))


async def test_versions_are_counted_and_none_is_0(adapter: Adapter) -> None:
    stages = Stages()
    lanes = Lanes(stages)
    publisher = Publisher(stages, lanes.switch)
    assert publisher.current == AdapterStatus(name=None, version=0)

    first = await publisher.publish(adapter)
    second = await publisher.publish(adapter)
    removed = await publisher.publish(None)
    third = await publisher.publish(adapter)

    assert [p.version for p in (first, second, removed, third)] == [1, 2, 0, 3]
    assert [p.name for p in (second, removed)] == ["step-000100", None]
    assert first.pause_s == 0.5
    assert lanes.used == [0, 1, 2, 0, 3]
    assert publisher.current == AdapterStatus(name="step-000100", version=3)


async def test_removing_what_is_not_there_disturbs_no_lane() -> None:
    stages = Stages()
    lanes = Lanes(stages)

    removed = await Publisher(stages, lanes.switch).publish(None)

    assert (removed.version, removed.pause_s, lanes.used) == (0, 0.0, [0])


async def test_what_does_not_fit_reaches_no_stage(adapter: Adapter) -> None:
    stages = Stages()
    publisher = Publisher(stages, Lanes(stages).switch)
    stages.refusal = AdapterError("another model's")

    with pytest.raises(AdapterError):
        await publisher.publish(adapter)

    assert stages.held == {0}
    assert publisher.current.version == 0


async def test_after_a_failure_the_version_in_use_is_kept_and_the_number_is_not_used_again(
    adapter: Adapter,
) -> None:
    stages = Stages()
    lanes = Lanes(stages)
    publisher = Publisher(stages, lanes.switch)
    await publisher.publish(adapter)
    stages.failure = PublishFailed("stage 1 died")
    with pytest.raises(PublishFailed):
        await publisher.publish(adapter)
    stages.failure = None
    assert publisher.current.version == 1
    lanes.failure = PublishFailed("lane 0 did not switch")
    with pytest.raises(PublishFailed):
        await publisher.publish(adapter)
    assert publisher.current.version == 1
    lanes.failure = None

    published = await publisher.publish(adapter)

    assert published.version == 4
    assert lanes.used == [0, 1, 4]
    assert stages.held == {0, 1, 4}


async def test_a_second_at_the_same_time_is_refused(adapter: Adapter) -> None:
    stages = Stages()
    publisher = Publisher(stages, Lanes(stages).switch)
    stages.may_load.clear()
    first = asyncio.create_task(publisher.publish(adapter))
    await asyncio.sleep(0)

    with pytest.raises(PublishInProgress, match="another adapter is being published"):
        await publisher.publish(adapter)
    with pytest.raises(PublishInProgress):
        await publisher.publish(None)
    stages.may_load.set()

    assert (await first).version == 1
    assert (await publisher.publish(adapter)).version == 2
