"""A name server of one name, so that the proxy finds replicas as it does in a network of containers."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

_A, _IN = 1, 1


class Names:
    """Answers questions for A records with the addresses that it holds at the moment, and others with nothing."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.questions = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(5)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                packet, sender = self._socket.recvfrom(4096)
            except OSError:
                return
            if not packet:
                return
            self.questions += 1
            with contextlib.suppress(OSError):
                self._socket.sendto(self._answer(packet), sender)

    def _answer(self, packet: bytes) -> bytes:
        end = packet.index(b"\0", 12) + 5  # the labels, the root, type and class (RFC 1035, 4.1.2)
        kind, class_ = struct.unpack("!HH", packet[end - 4 : end])
        addresses = self.addresses if (kind, class_) == (_A, _IN) else []
        records = b"".join(
            struct.pack("!HHHIH", 0xC00C, _A, _IN, 0, 4) + socket.inet_aton(address) for address in addresses
        )
        head = struct.pack("!2sHHHHH", packet[:2], 0x8180, 1, len(addresses), 0, 0)
        return head + packet[12:end] + records


@contextlib.contextmanager
def serving_names(addresses: Sequence[str]) -> Iterator[Names]:
    """A name server for the length of a block."""
    names = Names(addresses)
    try:
        yield names
    finally:
        names.close()
