"""What the kernel alone takes for a relayed chunk: one `send` of a chunk's size on a loopback connection.

A router that gives each client its token at each step cannot go below it. The sends are paced as engine steps are,
since a send that wakes a sleeping reader costs more than one to a busy reader.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
import time

CHUNK_BYTES = 250
ROUNDS = 100


def send_cost_us(connections: int, gap_s: float) -> float:
    """CPU per send in microseconds: bursts to that many connections, `gap_s` seconds apart."""
    with socket.create_server(("127.0.0.1", 0), backlog=connections) as server:
        port = server.getsockname()[1]
        reader = subprocess.Popen([sys.executable, "-m", "loadtests.floor", str(port), str(connections)])
        try:
            opened = [server.accept()[0] for _ in range(connections)]
            for connection in opened:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = bytes(CHUNK_BYTES)
            began = time.process_time()
            for _ in range(ROUNDS):
                for connection in opened:
                    connection.send(data)
                time.sleep(gap_s)
            cost = 1e6 * (time.process_time() - began) / ROUNDS / connections
            for connection in opened:
                connection.close()
        finally:
            reader.wait(30)
    return cost


def _read(port: int, connections: int) -> None:
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            selector.register(socket.create_connection(("127.0.0.1", port)), selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(30):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if not connection.recv(1 << 16):
                    selector.unregister(connection)
                    connection.close()


if __name__ == "__main__":
    _read(int(sys.argv[1]), int(sys.argv[2]))
