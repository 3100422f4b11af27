"""What is there after the end of a process, and what can be read from outside: clauses W6, F6, S1, S2, S5."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from persistence.errors import EncryptionError
from persistence.testing.fixtures import Opener
from persistence.testing.marks import clause
from persistence.testing.subject import Subject, Target, at, fresh

KEY = "0123456789abcdef"
NEW_KEY = "fedcba9876543210fedcba9876543210"
OTHER_KEY = "base64:AAAAAAAAAAAAAAAAAAAAAA=="
SECRET = "attack-at-dawn"


def fill(saver: Subject) -> str:
    thread = fresh()
    values: dict[str, Any] = {
        "text": SECRET,
        "list": [SECRET],
        "number": 918273645546372819,
        "float": 0.918273645,
    }
    config = saver.put(thread, "1", values, metadata={"public": "yes"})
    saver.put_writes(config, [("text", SECRET), ("__error__", SECRET), ("number", 918273645546372819)])
    saver.put(thread, "2", {"unversioned": SECRET}, parent="1", versions={"text": "1.text"}, new={})
    saver.put(thread, "3", {"text": SECRET + "!"}, parent="2", versions={"text": "1.text"})
    return thread


@clause("S1")
def test_no_value_is_stored_in_plaintext(target: Target, opened: Opener) -> None:
    saver = opened(encryption_key=KEY)
    thread = fill(saver)
    assert saver.values(thread, "1")["text"] == SECRET
    assert saver.values(thread, "2") == {"text": SECRET, "unversioned": SECRET}
    assert saver.values(thread) == {"text": SECRET + "!"}
    assert target.raw is not None
    stored = target.raw()
    assert b"public" in stored
    for plain in (SECRET.encode(), b"918273645", b"YXR0YWNrLWF0", (918273645546372819).to_bytes(8, "big")):
        assert plain not in stored
    assert saver.ids(at(thread), filter={"public": "yes"}) == ["1"]
    saver.close()
    plain_again = opened()
    with pytest.raises(EncryptionError):
        plain_again.get(thread, "1")


@clause("S1")
def test_plaintext_would_be_found(target: Target, opened: Opener) -> None:
    """The test above can fail: without a key the values are there to be seen."""
    fill(opened())
    assert target.raw is not None
    assert SECRET.encode() in target.raw()


@clause("S2")
@pytest.mark.parametrize("values", [{"x": [1]}, {"x": "short"}, {"x": 1}, {"x": None}], ids=str)
def test_plaintext_is_refused_under_encryption(
    target: Target, opened: Opener, values: dict[str, Any]
) -> None:
    plain = opened()
    config = plain.put("t", "1", values)
    plain.put_writes(config, [("x", values["x"])])
    plain.put("no writes", "1", values)
    plain.put_writes(plain.put("only writes", "1", {}), [("x", values["x"])])
    plain.close()
    strict = opened(encryption_key=KEY)
    for thread in ("t", "no writes", "only writes"):
        with pytest.raises(EncryptionError):
            strict.get(thread)
    with pytest.raises(EncryptionError):
        strict.list(at("t"))
    strict.close()
    lenient = opened(encryption_key=KEY, allow_plaintext=True)
    assert lenient.values("t") == values
    lenient.put("t", "2", {"y": [2]}, parent="1", versions={"x": "1.x", "y": 2}, new={"y": 2})
    assert lenient.values("t") == {**values, "y": [2]}


@clause("S5")
def test_old_keys_read_and_the_new_one_writes(opened: Opener) -> None:
    old = opened(encryption_key=KEY)
    thread = fill(old)
    old.put("grows", "1", {"kept": [SECRET], "short": SECRET}, versions={"kept": 1, "short": 1})
    changing = opened(encryption_key=NEW_KEY, encryption_old_keys=f"{OTHER_KEY},{KEY}")
    assert changing.list(at(thread)) == old.list(at(thread))
    versions, values = {"kept": 1, "short": 1, "new": 2}, {"kept": [SECRET], "short": SECRET, "new": SECRET}
    changing.put("grows", "2", values, parent="1", versions=versions, new={"new": 2})
    config = changing.put("later", "1", {"text": SECRET, "list": [SECRET]})
    changing.put_writes(config, [("text", SECRET), ("list", [SECRET])])
    again = opened(encryption_key=NEW_KEY, encryption_old_keys=KEY)
    assert again.values("grows") == changing.values("grows") == values
    only_new = opened(encryption_key=NEW_KEY)
    assert only_new.list(at("later")) == again.list(at("later")) != []
    for saver, under_another_key in (
        (only_new, thread),
        (old, "later"),
        (opened(encryption_key=KEY), "grows"),
    ):
        with pytest.raises(EncryptionError):
            saver.get(under_another_key)


@clause("V5", "W1")
def test_value_that_another_process_replaced_is_the_one_that_is_kept(opened: Opener) -> None:
    """Whatever a saver remembers of a checkpoint, the one that is stored counts."""
    for old, new in (("old", "new"), (["old"], ["new"]), ("old", ["new"]), (["old"], 7)):
        here, elsewhere, thread = opened(), opened(), fresh()
        here.put(thread, "1", {"x": old}, versions={"x": 1})
        here.get(thread)
        elsewhere.call("delete_thread", thread)
        elsewhere.put(thread, "1", {"x": new}, versions={"x": 1})
        here.put(thread, "2", {"x": old, "y": 1}, parent="1", versions={"x": 1, "y": 2}, new={"y": 2})
        assert here.values(thread) == elsewhere.values(thread) == {"x": new, "y": 1}


@clause("V2", "V5")
def test_value_that_another_process_deleted_is_stored_again_or_refused(opened: Opener) -> None:
    for value in ("x", ["x"]):
        here, elsewhere, thread = opened(), opened(), fresh()
        here.put(thread, "1", {"x": value}, versions={"x": 1})
        elsewhere.call("delete_thread", thread)
        with pytest.raises(TypeError):
            here.put(thread, "2", {"x": object()}, parent="1", versions={"x": 1}, new={})
        assert elsewhere.get(thread) is None
        here.put(thread, "2", {"x": [value]}, parent="1", versions={"x": 1}, new={})
        assert elsewhere.values(thread) == {"x": [value]}


OPENER = """
import os, sys, persistence
from persistence.settings import Settings
from persistence.testing.subject import at, bare

def converse(name):
    # The first to come makes the tables, where there are none.
    with persistence.open(sys.argv[1], settings=Settings(setup_on_open=True)) as db:
        saver = db.checkpointer
        for i in range(5):
            config = saver.put(at(name), bare(str(i), {"x": [i]}), {}, {"x": 1})
            saver.put_writes(config, [("x", i)], "task")
            saver.put(at("shared"), bare(f"{name}-{i}", {"x": [i]}), {}, {"x": f"{name}-{i}"})
            assert saver.get_tuple(at(name)).checkpoint["channel_values"] == {"x": [i]}
            assert any(found.checkpoint["id"] == f"{name}-{i}" for found in saver.list(at("shared")))

# A program that begins ten times is slow: this one imports what it needs, and forks when it has no thread.
persistence.open("sqlite://", settings=Settings(setup_on_open=True)).close()
persistence.provider_for(sys.argv[1])
children = []
for number in range(10):
    if not (child := os.fork()):
        converse(f"t{number}")
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
PROCESSES = 10


@clause("F6", "R7", "W3")
def test_ten_processes_on_one_database(target: Target, opened: Opener) -> None:
    """They open it at once, while it is empty, and write at once."""
    command = [sys.executable, "-c", target.preamble + OPENER, target.dsn]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
    saver = opened()
    assert len(saver.ids(at("shared"))) == PROCESSES * 5
    for number in range(PROCESSES):
        assert [found.pending_writes for found in saver.list(at(f"t{number}"))] == [
            [("task", "x", i)] for i in reversed(range(5))
        ]


WRITER = """
import sys, persistence
from persistence.settings import Settings
from persistence.testing.subject import at, bare

with persistence.open(sys.argv[1], settings=Settings(setup_on_open=False)) as db:
    for i in range(10_000):
        config = db.checkpointer.put(at("t"), bare(f"{i:05}", {"x": [i], "y": i}), {}, {"x": 1, "y": 1})
        db.checkpointer.put_writes(config, [("a", i), ("b", [i])], "task")
        print(i, flush=True)
"""


@clause("W3", "W6")
def test_what_was_acknowledged_survives_a_kill(target: Target, saver: Subject) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", target.preamble + WRITER, target.dsn], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 40:
            os.kill(process.pid, signal.SIGKILL)
            break
    acknowledged = [int(line), *(int(more) for more in process.stdout.read().split())]
    process.stdout.close()
    process.wait(60)
    stored = {int(found.config["configurable"]["checkpoint_id"]): found for found in saver.list(at("t"))}
    assert set(range(max(acknowledged) + 1)) <= set(stored)
    for i in range(max(acknowledged) + 1):
        assert stored[i].checkpoint["channel_values"] == {"x": [i], "y": i}
        assert stored[i].pending_writes == [("task", "a", i), ("task", "b", [i])]


INTERRUPTED = """
import asyncio, signal, sys, persistence
from persistence.settings import Settings
from persistence.testing.subject import at, bare

# A process that was started in the background would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings = Settings(setup_on_open=False)
last, done = 0, []

def checkpoint():
    global last
    last += 1
    return at("t"), bare(f"{last:06}", {"x": [last], "y": last}), {}, {"x": 1, "y": 1}

def synchronous():
    with persistence.open(sys.argv[1], settings=settings) as db:
        for _ in range(10):
            try:
                enough = len(done) + 5
                while True:
                    if len(done) == enough:
                        print("ready", flush=True)
                    config = db.checkpointer.put(*checkpoint())
                    db.checkpointer.put_writes(config, [("a", last), ("b", [last])], "task")
                    done.append(last)
                    assert db.checkpointer.get_tuple(at("t")).checkpoint["channel_values"]["y"] == last
            except KeyboardInterrupt:
                pass
        assert db.checkpointer.get_tuple(at("t")) is not None

async def asynchronous():
    async with await persistence.aopen(sys.argv[1], settings=settings) as db:
        enough = len(done) + 5
        while True:
            if len(done) == enough:
                print("ready", flush=True)
            config = await db.checkpointer.aput(*checkpoint())
            await db.checkpointer.aput_writes(config, [("a", last), ("b", [last])], "task")
            done.append(last)
            await asyncio.sleep(0)  # a saver need not give way, and SIGINT only cancels this task

if sys.argv[2] == "sync":
    synchronous()
else:
    for _ in range(3):
        try:
            asyncio.run(asynchronous())
        except KeyboardInterrupt:
            pass
print("done", *done, flush=True)
"""


@clause("F5", "W3")
def test_interrupt_from_the_keyboard_leaves_whole_checkpoints(target: Target, saver: Subject) -> None:
    """A process gets SIGINT again and again while it writes, and goes on writing."""
    command = [sys.executable, "-c", target.preamble + INTERRUPTED, target.dsn, target.colour]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pause = random.Random(0)  # noqa: S311 - not a secret
    for line in process.stdout:
        if line.startswith("ready"):
            time.sleep(0.05 + pause.random() / 10)
            process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert process.wait(60) == 0
    done = [int(number) for number in line.split()[1:]]
    assert len(done) > 10
    stored = {int(found.checkpoint["id"]): found for found in saver.list(at("t"))}
    assert set(done) <= set(stored)
    for number, found in stored.items():
        assert found.checkpoint["channel_values"] == {"x": [number], "y": number}
        assert found.pending_writes in ([], [("task", "a", number), ("task", "b", [number])])
        assert found.pending_writes or number not in done
