"""Processes of a run end together: each learns at once, and says in one line, why another ended.

Every process keeps a connection to the first one. The kernel closes those of a process however it
dies (`kill -9`, a crash, out of memory) and probes find hosts that vanish, though the main thread
hangs in a collective. JAX's own heartbeats stay as the last resort: they abort with a C++ log.
"""

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import UserError

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: another process died, the same command may succeed
_PATIENCE_SECONDS = 3.0  # for the news that explain an error here
_GREETING_SECONDS = 30.0  # for a connection to say which process it is
_LONGEST_GREETING = 4096  # bytes
_GRACE_SECONDS = 0.5  # for this process to say itself what the others say
_FAREWELL_SECONDS = 5.0  # for the others to end before the first one, without which JAX aborts them


@contextlib.contextmanager
def ending_together(heartbeat_seconds: int = 100) -> Iterator[None]:
    """Around all that a process of several does, after `start_processes`. Alone: nothing.

    An error ends this process (2 after a UserError, else 1) and, by its message, the others; one
    that dies ends the others with `EXIT_CODE` within moments, or, where its host vanishes, within
    heartbeat_seconds. The others are waiting in a collective that nobody will finish, so the end is
    at once, from whatever thread. All processes must enter it, in the same order.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch(heartbeat_seconds)
    try:
        yield
    except UserError as error:
        watch.leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        watch.leave("interrupted", 130)
    except Exception as error:
        # Perhaps a collective that failed because another one is gone: the watch says so first.
        time.sleep(_PATIENCE_SECONDS)
        traceback.print_exc()
        watch.leave(" ".join(f"{type(error).__name__}: {error}".split())[:500], 1)
        raise
    watch.finish()


class _Peer:
    """The process at the other end of a connection."""

    def __init__(self, connection: socket.socket, process: int | None) -> None:
        self.connection, self.process = connection, process  # None: it has not said who it is
        self.unread = b""
        self.finished = self.warned = False
        self.heard = time.monotonic()


class _Watch:
    """A thread that hears of the other processes: all of them in the first, of it in the others."""

    def __init__(self, heartbeat_seconds: int) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self.process, self.count = jax.process_index(), jax.process_count()
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        self._leaving = self._finished = False
        self._listener: socket.socket | None = None
        if self.process == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._listener = socket.create_server(
                ("", 0), family=family, backlog=self.count, dualstack_ipv6=both
            )
            self._selector.register(self._listener, selectors.EVENT_READ)
        port = self._listener.getsockname()[1] if self._listener else 0
        # The secret keeps strangers out, who may knock at any port.
        mine = np.array([port, secrets.randbelow(2**31)], np.int32)
        port, self._secret = (int(n) for n in multihost_utils.broadcast_one_to_all(mine))
        if self.process != 0:
            self._connect(port)
        threading.Thread(target=self._run, name="clip_jax.together", daemon=True).start()

    def leave(self, reason: str, code: int) -> NoReturn:
        """Says why this process ends, to the user and to the others, and ends it."""
        self._leaving = True
        _say(reason)
        self._part(reason, code)

    def finish(self) -> None:
        """This process has done its part: its end is no death."""
        self._finished = True
        self._tell({"finished": True})

    def _connect(self, port: int) -> None:
        host = _coordinator_host()
        try:
            connection = socket.create_connection((host, port), timeout=10)
        except OSError as error:
            logger.warning(
                "no connection to process 0 at %s:%d (%s): where a process dies, this one hears "
                "of it after %d s, from JAX alone",
                *(host, port, error, self.heartbeat_seconds),
            )
            return
        peer = self._add(connection, 0)
        self._send(peer, {"secret": self._secret, "process": self.process})

    def _add(self, connection: socket.socket, process: int | None) -> _Peer:
        connection.settimeout(2)
        # Probes of a silent host give it up at 0.8 of the limit, before JAX does.
        probe = max(1, self.heartbeat_seconds // 5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", probe),
            ("TCP_KEEPINTVL", probe),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 4 * probe * 1000),
        ):
            if hasattr(socket, name):  # Linux has them all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        peer = _Peer(connection, process)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _run(self) -> None:
        beat = max(0.2, self.heartbeat_seconds / 10)
        next_beat = time.monotonic()
        while not (self._finished and not self._peers):
            self._listen(beat)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + beat
                self._tell({})
                self._warn_of_silence()
        self._selector.close()
        if self._listener is not None:
            self._listener.close()

    def _listen(self, seconds: float) -> None:
        if not self._selector.get_map():
            time.sleep(seconds)
            return
        for key, _ in self._selector.select(seconds):
            if key.data is not None:
                self._read(key.data)
            elif self._listener is not None:
                with contextlib.suppress(OSError):
                    self._add(self._listener.accept()[0], None)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(65536)
        except OSError:
            data = b""
        peer.heard, peer.warned = time.monotonic(), False
        *lines, peer.unread = (peer.unread + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if peer in self._peers:  # a stranger is gone after its first line
                self._handle(peer, message if isinstance(message, dict) else {})
        too_long = peer.process is None and len(peer.unread) > _LONGEST_GREETING
        if (not data or too_long) and peer in self._peers:
            self._drop(peer)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if message.get("secret") == self._secret:
            peer.process = int(message.get("process", 0))
        elif peer.process is None:
            self._drop(peer)
        elif "finished" in message:
            peer.finished = True
        elif "reason" in message:
            peer.finished = True
            # It may be this process's reason too: then its main thread says it.
            time.sleep(_GRACE_SECONDS)
            self._conclude(message["reason"], message["code"])

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        self._peers.remove(peer)
        peer.connection.close()
        if peer.process is not None and not (peer.finished or self._finished):
            self._conclude(
                f"process {peer.process} of {self.count} died (killed, out of memory or crashed: "
                "its own output may say), so this one ends; start them all again with the same "
                "command, and the run resumes from its last checkpoint",
                EXIT_CODE,
            )

    def _conclude(self, reason: str, code: int) -> None:
        if self._leaving:
            return
        self._leaving = True
        _say(reason)
        self._part(reason, code)

    def _part(self, reason: str, code: int) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        told = reason if reason.startswith("process ") else f"process {self.process}: {reason}"
        self._tell({"reason": told, "code": code})
        deadline = time.monotonic() + _FAREWELL_SECONDS
        listens = threading.current_thread().name == "clip_jax.together"
        while self.process == 0 and self._peers and time.monotonic() < deadline:
            if listens:
                self._listen(0.05)
            else:
                time.sleep(0.02)
        os._exit(code)

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in list(self._peers):
            self._send(peer, message)

    def _send(self, peer: _Peer, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its end is noticed by reading
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def _warn_of_silence(self) -> None:
        for peer in list(self._peers):
            silence = time.monotonic() - peer.heard
            if peer.process is None:
                if silence > _GREETING_SECONDS:
                    self._drop(peer)
                continue
            if silence > self.heartbeat_seconds / 2 and not (peer.warned or peer.finished):
                peer.warned = True
                logger.warning(
                    "no sign of process %s for %d s; after %d s JAX ends this one: then end all "
                    "processes and start them again, the run resumes from its last checkpoint",
                    *(peer.process, silence, self.heartbeat_seconds),
                )


def _coordinator_host() -> str:
    """Where process 0 is reached: JAX reached it there, and tells no one by a public name."""
    from jax._src import distributed

    address = str(distributed.global_state.coordinator_address)
    return address.rsplit(":", 1)[0].strip("[]")


def _say(line: str) -> None:
    """To stderr at once: another thread may hold Python's lock on it."""
    with contextlib.suppress(OSError):
        os.write(2, f"clip-jax: {line}\n".encode())
