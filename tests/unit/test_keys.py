"""Client keys: the file, the command, and what a gateway makes of it."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from stat import S_IMODE

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.keys import KeyRing, KeysError, add_key, new_key, read_keys, remove_key
from cluster.runstate import RunState, write_state


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MOTLEY_API_KEYS", raising=False)
    return tmp_path


def made(file: Path, name: str = "alice", *scopes: str) -> bytes:
    key, text = new_key(name, scopes or ("generate",))
    add_key(file, key)
    return text.encode()


def motley(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


# --- the file ---------------------------------------------------------------------------------


def test_a_key_is_kept_as_a_salted_hash_in_a_file_of_its_owners(file: Path) -> None:
    first, second = made(file, "alice"), made(file, "bob", "admin", "generate")

    text = file.read_text(encoding="utf-8")
    for key in (first, second):
        assert key.decode() not in text
        assert key.decode().split("-", 2)[2] not in text
    assert S_IMODE(file.stat().st_mode) == 0o600
    alice, bob = read_keys(file)
    assert (alice.scopes, bob.scopes) == (("generate",), ("generate", "admin"))
    assert alice.salt != bob.salt
    assert alice.salt not in repr(alice)


def test_a_name_is_taken_once_and_free_again_when_revoked(file: Path) -> None:
    made(file)

    with pytest.raises(KeysError, match="has a key called alice; revoke it"):
        made(file)
    assert remove_key(file, "alice").name == "alice"
    with pytest.raises(KeysError, match="no key called alice; it has none"):
        remove_key(file, "alice")
    made(file)


@pytest.mark.parametrize(
    ("name", "scopes", "message"),
    [
        ("owner", ("generate",), "`owner` names the holder"),
        ("two words", ("generate",), "name: String should match"),
        ("", ("generate",), "name: String should have at least 1"),
        ("alice", ("generate", "root"), "no scope root; scopes: generate, train, admin, edge"),
        ("alice", (), "scopes: Tuple should have at least 1"),
    ],
)
def test_what_cannot_be_a_key_is_refused(name: str, scopes: tuple[str, ...], message: str) -> None:
    with pytest.raises(KeysError, match=message):
        new_key(name, scopes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: Invalid JSON"),
        ('{"name": "x"}', "line 2: id: Field required"),
        ('{"key": "secret-in-clear"}', "line 2: name"),
    ],
)
def test_a_damaged_line_is_named_and_not_repeated(file: Path, line: str, message: str) -> None:
    made(file)
    with file.open("a", encoding="utf-8") as opened:
        opened.write(line + "\n")

    with pytest.raises(KeysError, match=message) as caught:
        read_keys(file)
    assert "secret-in-clear" not in str(caught.value)


def test_a_line_that_is_there_twice_is_refused(file: Path) -> None:
    made(file)
    file.write_text(file.read_text(encoding="utf-8") * 2, encoding="utf-8")

    with pytest.raises(KeysError, match="a key's name is there twice"):
        read_keys(file)


def test_two_who_write_at_once_lose_nothing(file: Path) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 5):
            made(file, f"client{number}")

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 5, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {key.name for key in read_keys(file)} == {f"client{i}" for i in range(15)}


# --- the ring ---------------------------------------------------------------------------------


def test_a_key_is_found_by_what_its_client_holds_and_by_nothing_else(file: Path) -> None:
    text = made(file)
    ring = KeyRing(file)

    found = ring.find(text)

    assert found is not None
    assert found.name == "alice"
    prefix, key_id, secret = text.decode().split("-", 2)
    for wrong in (
        b"", b"-", b"--", b"mk", b"\xff\xfe-\xff-\xff", text[:-1], text + b"x", text.upper(),
        f"{prefix}-{key_id}".encode(), f"{prefix}-{key_id}-".encode(), secret.encode(),
        f"xx-{key_id}-{secret}".encode(), f"mk-{'0' * 16}-{secret}".encode(),
        found.sha256.encode(), f"mk-{key_id}-{found.sha256}".encode(),
    ):  # fmt: skip
        assert ring.find(wrong) is None, wrong


def test_the_file_is_read_again_when_it_changes(file: Path) -> None:
    ring = KeyRing(file)  # not there yet
    text = made(file)

    assert ring.find(text) is not None
    second = made(file, "bob")
    assert ring.find(second) is not None
    remove_key(file, "alice")
    assert ring.find(text) is None
    assert ring.find(second) is not None
    file.unlink()
    assert ring.find(second) is None


def test_a_file_that_is_damaged_while_it_is_used_leaves_the_keys_read_before(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = made(file)
    ring = KeyRing(file)
    with caplog.at_level(logging.ERROR):
        with file.open("a", encoding="utf-8") as opened:
            opened.write("{\n")
        assert ring.find(text) is not None
        assert ring.find(text) is not None

    [record] = caplog.records
    assert "line 2" in record.getMessage()
    assert "the 1 keys read before stay valid" in record.getMessage()
    with pytest.raises(KeysError, match="line 2"):
        KeyRing(file)


# --- the command ------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_listed_and_revoked(file: Path, home: Path) -> None:
    result = motley(
        "create", "alice", "--scope", "generate", "--scope", "train", "--requests-per-minute",
        "60", "--tokens-per-minute", "1000", "--concurrent-requests", "4", "--file", str(file),
        "--json",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    found = KeyRing(file).find(shown["key"].encode())
    assert found is not None
    assert (found.scopes, found.requests_per_minute) == (("generate", "train"), 60)
    assert (found.tokens_per_minute, found.concurrent_requests) == (1000, 4)
    listed = motley("list", "--file", str(file), "--json")
    assert [key["name"] for key in json.loads(listed.stdout)["keys"]] == ["alice"]
    for secret in (shown["key"], found.sha256, found.salt):
        assert secret not in listed.output
    assert "alice" in motley("list", "--file", str(file)).stdout
    assert motley("revoke", "alice", "--file", str(file)).exit_code == 0
    assert KeyRing(file).find(shown["key"].encode()) is None

    lines = (home / "home" / "run" / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    acts = [json.loads(line) for line in lines]
    assert [(act["act"], act["key"]) for act in acts] == [
        ("create_key", "alice"),
        ("revoke_key", "alice"),
    ]
    assert acts[0]["scopes"] == "generate,train"
    assert shown["key"].split("-", 2)[2] not in json.dumps(acts)


def test_people_get_the_key_alone_on_stdout(file: Path) -> None:
    result = motley("create", "alice", "--scope", "generate", "--file", str(file))

    assert KeyRing(file).find(result.stdout.strip().encode()) is not None
    assert "as a hash" in result.stderr


def test_the_file_comes_from_the_settings_or_from_the_deployment_that_runs(
    file: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = home / "config.yaml"
    (home / "model").mkdir()
    config.write_text(
        f"model: {home / 'model'}\ngateway: {{api_keys_file: {file}}}\n", encoding="utf-8"
    )
    monkeypatch.setattr("cluster.runstate.is_running", lambda state: True)
    write_state(
        RunState(
            name="tiny", pid=1, started_unix_s=1, config_path="x", api_keys_file=str(file),
            audit_file=str(home / "acts.jsonl"),
        )
    )  # fmt: skip

    assert motley("create", "a", "--scope", "generate", "-c", str(config)).exit_code == 0
    assert motley("create", "b", "--scope", "generate").exit_code == 0

    assert [key.name for key in read_keys(file)] == ["a", "b"]
    assert '"key": "b"' in (home / "acts.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list"], 4, "no deployment runs"),
        (["revoke", "carl", "--file", "{file}"], 2, "no key called carl"),
        (["create", "carl", "--file", "{file}"], 2, "--scope"),
        (["create", "carl", "--scope", "root", "--file", "{file}"], 2, "there is no scope root"),
    ],
)
def test_what_cannot_be_done_is_said(
    file: Path, arguments: list[str], code: int, message: str
) -> None:
    result = motley(*(argument.replace("{file}", str(file)) for argument in arguments))

    assert result.exit_code == code
    assert message in result.output
    assert not file.exists()


def test_a_deployment_without_a_keys_file_says_which_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.runstate.is_running", lambda state: True)
    write_state(RunState(name="tiny", pid=1, started_unix_s=1, config_path="x"))

    result = motley("list")

    assert result.exit_code == 2
    assert "tiny runs without gateway.api_keys_file" in result.output
