"""Prove that conversations outlive their process: boot the example service, chat, kill it, start it again.

The service is killed with SIGKILL twice: while the conversation waits for an answer, and while a request is
being answered. Each time the history must be in the database, which is opened here for that, and in the
service that is started again. The conversation is a new one and is removed in the end::

    python tools/verify_persistence.py --dsn postgresql://localhost/chat

Exit code 0: all of it holds. 1: it does not, and the last line says what.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import persistence  # noqa: E402
from examples.fastapi_chat import view  # noqa: E402
from examples.trip_planner import build, settings  # noqa: E402
from persistence.dsn import Dsn, mask_secrets  # noqa: E402
from persistence.errors import PersistenceError  # noqa: E402

Conversation = dict[str, Any]
START_SECONDS = 60
ATTEMPTS = 5


class VerifyError(Exception):
    """What does not hold."""


class Service:
    """The example service in a process of its own, and one conversation with it."""

    def __init__(self, dsn: Dsn | None, thread: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.dsn = dsn
        self.path = f"/threads/{thread}"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = dict(os.environ)
        if self.dsn is not None:
            environment.pop("PERSISTENCE_DSN_FILE", None)
            environment["PERSISTENCE_DSN"] = str.__str__(self.dsn.url)
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(ROOT), "examples.fastapi_chat:app"]
        command += ["--port", str(self.port), "--log-level", "warning"]
        with tempfile.TemporaryFile("w+") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603
            until = time.monotonic() + START_SECONDS
            while not self._answers():
                if self.process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    said = log.read().strip().splitlines() or ["it says nothing"]
                    raise VerifyError(f"the service does not start: {self._masked(said[-1])}")
                time.sleep(0.1)

    def kill(self) -> None:
        """End it without a chance to write anything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def show(self) -> Conversation:
        """The conversation, as the service tells it."""
        return self._checked(self.client.get(self.path))

    def say(self, text: str) -> Conversation:
        """Say something and wait for the answer."""
        return self._checked(self.client.post(self.path, json={"text": text}))

    def say_and_kill(self, text: str) -> bool:
        """Kill it when its first words arrive; whether that cut the answer off."""
        with self.client.stream("POST", f"{self.path}/stream", json={"text": text}) as answer:
            received = ""
            try:
                for chunk in answer.iter_text():
                    received += chunk
                    self.kill()
            except httpx.TransportError:
                pass
        return "event: conversation" not in received

    def _answers(self) -> bool:
        try:
            self.show()
        except httpx.TransportError:
            return False
        return True

    def _checked(self, answer: httpx.Response) -> Conversation:
        if answer.status_code != httpx.codes.OK:
            raise VerifyError(f"the service answers {answer.status_code}: {self._masked(answer.text)}")
        conversation: Conversation = answer.json()
        return conversation

    def _masked(self, text: str) -> str:
        return mask_secrets(text, *([self.dsn] if self.dsn else []))


def verify(dsn: Dsn | None, thread: str, service: Service, ok: Callable[[str], None]) -> None:
    """Run all steps; ``ok`` hears of each that holds."""
    service.start()
    told = service.say("3 nights in Lisbon")
    if not told["waiting_for_answer"]:
        raise VerifyError(f"the service asks no question: {told}")
    service.kill()
    ok(f"killed while it waits for an answer to: {told['waiting_for_answer'][0]}")
    _is_kept(told, _stored(dsn, thread), "the database")
    ok(f"the database holds the {len(told['messages'])} messages and the question")
    service.start()
    _is_kept(told, service.show(), "the service that was started again")
    told = service.say("yes")
    ok(f"started again, it shows the same and takes the answer: {told['messages'][-1]['text']}")

    for _ in range(ATTEMPTS):
        cut_off = service.say_and_kill("2 nights in Oslo")
        _begins_with(told, _stored(dsn, thread), "the database")
        service.start()
        _begins_with(told, service.show(), "the service that was started again")
        before, told = told, service.say("no")
        finished = _texts(told)[len(before["messages"]) :]
        if finished not in _ENDINGS:
            raise VerifyError(
                f"after a kill in the middle of a request the conversation goes on with {finished}"
            )
        if cut_off:
            ok(f"killed while it answers; nothing acknowledged is lost, and it goes on: {finished[-1]}")
            return
    raise VerifyError(f"the service answered too fast to be killed while it does, {ATTEMPTS} times")


_ENDINGS = (
    ["2 nights in Oslo", "Looking for 2 nights in Oslo.", "Not booked."],  # what was cut off is finished
    ["no", "Your 3 nights in Lisbon are booked."],  # or it was not stored yet; nobody had an answer
)


def _stored(dsn: Dsn | None, thread: str) -> Conversation:
    """The conversation as the database holds it, with the service dead."""
    with _open(dsn) as db:
        return view(build(db.checkpointer).get_state({"configurable": {"thread_id": thread}}))


def _open(dsn: Dsn | None) -> persistence.Persistence:
    return persistence.open(dsn, settings=settings().model_copy(update={"fallback": "never"}))


def _is_kept(told: Conversation, found: Conversation, where: str) -> None:
    _begins_with(told, found, where)
    if found != told:
        raise VerifyError(f"{where} has {found} and not {told}")


def _begins_with(told: Conversation, found: Conversation, where: str) -> None:
    if not found["messages"]:
        raise VerifyError(f"{where} has nothing of the conversation, only the process that was killed had it")
    if found["messages"][: len(told["messages"])] != told["messages"]:
        raise VerifyError(f"{where} has {_texts(found)}, but this was acknowledged: {_texts(told)}")


def _texts(conversation: Conversation) -> list[str]:
    return [message["text"] for message in conversation["messages"]]


def main(argv: list[str]) -> int:
    """Verify, tell each step, and clean up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", help="the database; default: the settings (PERSISTENCE_DSN)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    arguments = parser.parse_args(argv)
    steps: list[str] = []

    def ok(step: str) -> None:
        steps.append(step)
        if not arguments.json:
            print(f"ok: {step}", flush=True)

    failure = None
    try:
        _run(arguments.dsn, ok)
    except (VerifyError, PersistenceError) as error:
        failure = str(error)
    if arguments.json:
        print(json.dumps({"ok": failure is None, "steps": steps, "failure": failure}))
    else:
        print(f"FAILED: {failure}" if failure else "verified")
    return 1 if failure else 0


def _run(text: str | None, ok: Callable[[str], None]) -> None:
    dsn = Dsn.parse(text) if text else settings().resolve_dsn()
    ok(f"the database is {dsn or 'not set, so it is memory'}")
    thread = f"verify-persistence-{uuid.uuid4()}"
    service = Service(dsn, thread)
    try:
        verify(dsn, thread, service, ok)
    finally:
        service.kill()
        with _open(dsn) as db:
            if db.checkpointer is not None:
                db.checkpointer.delete_thread(thread)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
