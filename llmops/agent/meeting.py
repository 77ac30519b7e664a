"""A listening socket and who came in by it: each says first who it is, and has a token to prove it."""

from __future__ import annotations

import abc
import hmac
import selectors
import socket
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llmops.agent.log import log
from llmops.agent.wire import Connection, Message, ProtocolError


@dataclass
class Member:
    """One that was let in."""

    node: int
    host: str
    connection: Connection


M = TypeVar("M", bound=Member)


class Meeting(abc.ABC, Generic[M]):
    """Whoever holds one waits on ``selector``, and hands what is ready to :meth:`accept` or :meth:`receive`."""

    def __init__(self, server: socket.socket, token: str) -> None:
        self.server, self.token = server, token
        self.members: dict[int, M] = {}
        self.selector = selectors.DefaultSelector()

    @abc.abstractmethod
    def join(self, node: int, connection: Connection, message: Message) -> M:
        """Let ``node`` in. Raises ProtocolError for one that is not expected."""

    @abc.abstractmethod
    def heard(self, member: M, message: Message) -> None:
        """A member has said something."""

    @abc.abstractmethod
    def gone(self, member: M) -> None:
        """A member's connection is lost."""

    def accept(self) -> None:
        """Take a connection, whose first message will say who it is."""
        try:
            sock, _ = self.server.accept()
        except BlockingIOError:
            return
        connection = Connection(sock)
        self.selector.register(connection, selectors.EVENT_READ, connection)

    def receive(self, source: Any) -> None:
        """Take what has come from ``source``, a member or a connection of nobody yet."""
        connection: Connection = source.connection if isinstance(source, Member) else source
        descriptor = connection.fileno()
        try:
            messages = connection.receive()
            for message in messages or []:
                if isinstance(source, Member):
                    self.heard(source, message)  # type: ignore[arg-type]
                else:
                    source = self._admit(connection, message)
        except (ProtocolError, KeyError, TypeError, ValueError) as error:
            log(f"a connection spoke out of turn and was closed: {error}")
            messages = None
            connection.close()
        if messages is None:
            self.selector.unregister(descriptor)
            if isinstance(source, Member):
                self.gone(source)  # type: ignore[arg-type]

    def _admit(self, connection: Connection, message: Message) -> M:
        if not hmac.compare_digest(str(message.get("token", "")), self.token):
            raise ProtocolError("wrong token")
        member = self.join(int(message["node"]), connection, message)
        self.members[member.node] = member
        self.selector.modify(connection, selectors.EVENT_READ, member)
        return member
