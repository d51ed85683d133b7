"""A deployment's whole life with secrets that can be recognised: nothing it says holds one.

Real: the gateway, its dispatcher, a lane, the wire between them, `motley up` around it all, the
command line's reports. A thread stands in for the stages.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgpack
import pytest
import tokenizers
from typer.testing import CliRunner

from actors import wire
from actors.decode import DecodeWorker, LaneSpec
from actors.engine.batch import StepBatch, StepResult
from actors.engine.batching import LaneLimits
from actors.engine.checkpoint import Checkpoint
from actors.fleet import FleetSpec
from cluster.backend import ModelInfo
from cluster.cli import app
from cluster.client import AsyncMotleyClient, MotleyError
from cluster.commands.output import Output
from cluster.commands.status import HttpTarget
from cluster.commands.talk import GrpcTarget
from cluster.commands.up import bring_up
from cluster.config import MotleyConfig, default_config
from cluster.dispatch import Dispatcher
from cluster.events import LaunchEvent, Planned, Ready, Stopped
from cluster.gateway.auth import read_token
from cluster.gateway.server import open_audit, serve
from cluster.gateway.tokenizer import Tokenizer
from cluster.keys import add_key, new_key
from cluster.launch import Deployment
from cluster.planning import declared_topology, make_plan
from cluster.runstate import running_states, state_file
from placement.stages import StagesPlan
from placement.workload import ModelProfile

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend

TOKEN = "recognisable-token-of-the-owner"
Report = Callable[[LaunchEvent], None]
LIMITS = LaneLimits(
    num_blocks=64, block_tokens=4, max_running=8, max_step_tokens=32, max_model_tokens=64,
    max_waiting=64, eos_token_ids=(256,),
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("cluster.runstate.is_running", lambda state: True)
    return tmp_path


def config_in(folder: Path) -> MotleyConfig:
    (folder / "token").write_text(TOKEN + "\n", encoding="utf-8")
    tree = default_config().model_dump()
    tree["gateway"] |= {
        "http_port": 0,
        "grpc_port": 0,
        "token_file": folder / "token",
        "api_keys_file": folder / "keys.jsonl",
    }
    return MotleyConfig.model_validate(tree)


class Stages(threading.Thread):
    """Answers a lane's steps as the last of the stages would, and reports for all of them."""

    def __init__(self, keys: wire.WireKeys, monitor: wire.Address, devices: Sequence[str]) -> None:
        super().__init__(name="stages", daemon=True)
        self.inbox = wire.Inbox("stage 0", keys)
        self._keys = keys
        self._monitor = wire.Outbox(monitor, keys)
        self._devices = devices
        self._lane: wire.Outbox | None = None
        self._stopping = threading.Event()

    def connect(self, lane: wire.Address) -> None:
        self._lane = wire.Outbox(lane, self._keys)
        self.start()

    def run(self) -> None:
        while not self._stopping.is_set():
            parts = self.inbox.receive(0.05)
            if parts is not None and self._lane is not None:
                batch = StepBatch.decode(parts[1])
                result = StepResult([65] * len(batch.drawn))
                message = msgpack.packb([batch.step, result.to_wire()])
                self._lane.send([wire.RESULT, message, msgpack.packb([0.001])])
            for device in self._devices:
                report = {"stage": device, "active": True, "loaded_fraction": 1.0}
                self._monitor.send([wire.REPORT, msgpack.packb(report)])

    def stop(self) -> None:
        self._stopping.set()
        self.join(10.0)
        self.inbox.close()
        self._monitor.close()
        if self._lane is not None:
            self._lane.close()


class Life:
    """One deployment from its plan to its end; `said` is all that anybody was told."""

    def __init__(self, home: Path, tokenizer: Tokenizer, raw: tokenizers.Tokenizer) -> None:
        self.config = config_in(home)
        self.said: list[str] = []
        self.secrets: dict[str, str] = {"token": TOKEN}
        self._tokenizer = tokenizer
        self._raw = raw
        for name, scopes in (("alice", ["generate"]), ("carol", ["admin"])):
            key, text = new_key(name, scopes)
            add_key(home / "keys.jsonl", key)
            self.secrets |= {name: text, f"{name}'s secret": text.split("-", 2)[2]}
            self.secrets |= {f"{name}'s hash": key.sha256, f"{name}'s salt": key.salt}
            self.said += [repr(key), str(key)]

    def launch(self, config: MotleyConfig, report: Report) -> None:
        """What `cluster.launch.run` does, without Ray."""
        asyncio.run(self._launch(config, report))

    async def _launch(self, config: MotleyConfig, report: Report) -> None:
        checkpoint = await asyncio.to_thread(Checkpoint.open, config.model)
        profile = checkpoint.profile(dtype_bytes=4)
        plan = make_plan(config, profile, declared_topology(config))
        report(Planned(plan, "split: because"))
        assert config.gateway.token_file is not None
        token = await asyncio.to_thread(read_token, config.gateway.token_file)
        info = _model_info(config)
        dispatcher = Dispatcher(info, plan, LIMITS)
        self.secrets["CURVE secret"] = dispatcher.keys.secret.decode()
        monitor = dispatcher.open("127.0.0.1")
        audit = open_audit(config.gateway, config.served_name)
        gateway = await serve(dispatcher, self._tokenizer, config.gateway, token, audit=audit)
        stages = Stages(dispatcher.keys, monitor, [stage.device_id for stage in plan.stages])
        spec = LaneSpec(index=0, limits=LIMITS, step_timeout_s=60.0)
        lane = DecodeWorker(spec, self._raw.to_str(), dispatcher.keys, monitor)
        try:
            stages.connect(lane.ready())
            lane.connect(stages.inbox.address)
            await dispatcher.connect({0: lane.ready()}, _NoHost())
            await dispatcher.serving.wait()
            report(Ready(gateway.http_url, gateway.grpc_target, token, 1.0))
            self._specifications(plan, profile, dispatcher)
            await self._clients(gateway.http_url, gateway.grpc_target)
            await self._command_line()
            dispatcher.fail("stage 1 is lost")
            await self._clients(gateway.http_url, gateway.grpc_target)
        finally:
            await gateway.close(0)
            await asyncio.to_thread(lane.stop)
            await asyncio.to_thread(stages.stop)
            await dispatcher.close()
            audit.close()
        report(Stopped("signal"))

    def _specifications(
        self, plan: StagesPlan, profile: ModelProfile, dispatcher: Dispatcher
    ) -> None:
        """What is quoted in errors and logs of whoever handles them."""
        fleet = holding(FleetSpec, keys=dispatcher.keys, profile=profile)
        deployment = holding(Deployment, token=TOKEN, dispatcher=dispatcher)
        values = (
            fleet, dispatcher.keys, deployment, Ready("h", "g", TOKEN, 1.0), self.config,
            HttpTarget(url="h", token=TOKEN), GrpcTarget(target="g", token=TOKEN),
        )  # fmt: skip
        self.said += [repr(value) for value in values] + [str(value) for value in values]
        self.said.append(json.dumps(plan.to_json()))

    async def _clients(self, http_url: str, grpc_target: str) -> None:
        """Everybody calls everything, rightly and wrongly, over both protocols."""
        alice, carol = self.secrets["alice"], self.secrets["carol"]
        almost = [TOKEN + "x", alice + "x", f"mk-{alice.split('-', 2)[1]}-{TOKEN}"]
        body = {"prompt": "ab", "max_tokens": 3}
        async with httpx.AsyncClient(base_url=http_url) as http:
            for credential in (TOKEN, alice, carol, *almost):
                http.headers["Authorization"] = f"Bearer {credential}"
                for method, path, sent in (
                    ("GET", "/status", None), ("GET", "/plan", None), ("GET", "/metrics", None),
                    ("GET", "/ready", None), ("GET", "/health", None), ("GET", "/no", None),
                    ("GET", "/v1/models", None), ("GET", "/v1/models/x", None),
                    ("POST", "/v1/completions", body), ("POST", "/v1/completions", {"n": 0}),
                    ("POST", "/v1/chat/completions", {"messages": []}),
                    ("POST", "/v1/adapter", {}), ("DELETE", "/v1/adapter", None),
                ):  # fmt: skip
                    answer = await http.request(method, path, json=sent)
                    self.said += [answer.text, str(answer.headers)]
        for credential in (TOKEN, alice, carol, *almost):
            async with AsyncMotleyClient(grpc_target, credential) as client:
                for call in (
                    client.ready(), client.plan(), client.model_info(), client.abort("nobody"),
                    client.complete("ab", max_tokens=3), client.complete("", max_tokens=-1),
                ):  # fmt: skip
                    try:
                        self.said.append(repr(await call))
                    except MotleyError as error:
                        self.said.append(repr(error))

    async def _command_line(self) -> None:
        """What the other verbs print."""
        self.said += [repr(state) for state in running_states()]
        for arguments in (
            ["status"], ["status", "--json"], ["keys", "list"], ["keys", "list", "--json"],
            ["generate", "ab", "--max-tokens", "2", "--json"], ["status", "--token", "wrong-one"],
            ["generate", "ab", "--token", self.secrets["carol"]],
            ["publish", "--remove", "--token", self.secrets["alice"]],
            ["keys", "revoke", "nobody"],
        ):  # fmt: skip
            result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
            self.said += [result.output, repr(result.exception)]


def holding(kind: type[Any], **values: Any) -> Any:
    """Return a value of a dataclass that holds these, and None for the rest."""
    return kind(**dict.fromkeys((field.name for field in fields(kind)), None) | values)


class _NoHost:
    """Holds no adapters."""

    def check(self, adapter: object) -> None:
        raise AssertionError("no adapter is published here")

    def load(self, version: int, adapter: object, *, keep: int) -> None:
        raise AssertionError("no adapter is published here")


def _model_info(config: MotleyConfig) -> ModelInfo:
    return ModelInfo(
        name=config.served_name, architecture="TinyForCausalLM", vocab_size=257, num_layers=8,
        max_model_tokens=64, eos_token_ids=(256,), num_parameters=1, dtype="float32",
        created_unix_s=1,
    )  # fmt: skip


@contextmanager
def everything_logged() -> Iterator[list[str]]:
    """Collect every record of every logger, traces included."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logging.Formatter("%(name)s %(message)s").format(record))

    root, collector = logging.getLogger(), Collector()
    level = root.level
    root.addHandler(collector)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.removeHandler(collector)
        root.setLevel(level)


def test_nothing_that_a_deployment_says_holds_a_secret(
    home: Path,
    tokenizer: Tokenizer,
    raw_tokenizer: tokenizers.Tokenizer,
    capfd: pytest.CaptureFixture[str],
) -> None:
    life = Life(home, tokenizer, raw_tokenizer)

    with everything_logged() as logged:
        bring_up(life.config, "x.yaml", Output(as_json=False), life.launch)

    out, err = capfd.readouterr()
    audit = (home / "home" / "run" / "audit.jsonl").read_text(encoding="utf-8")
    told = "\n".join([*life.said, *logged, out, err, audit])
    # It was a life worth looking at.
    for expected in (
        '"text":"AAA"', "stage 1 is lost", "insufficient_scope", "invalid_api_key", "scope admin",
        "shut_down", "remove_adapter", "authorize", "WireKeys(public=", "alice",
    ):  # fmt: skip
        assert expected in told, expected
    for name, secret in life.secrets.items():
        assert secret not in told, f"{name} was told: ...{told[max(0, told.index(secret) - 200) :]}"
    assert not state_file(life.config.served_name).exists()


def test_the_secret_is_in_no_form_of_the_keys(backend: FakeBackend) -> None:
    keys = wire.WireKeys.make()

    for text in (repr(keys), str(keys), f"{keys}", repr([keys]), repr({"keys": keys})):
        assert keys.secret.decode() not in text
        assert keys.public.decode() in text
    assert tuple(keys) == (keys.public, keys.secret)
