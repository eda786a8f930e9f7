#!/usr/bin/env python3
"""The yardstick of HTTP: a ThreadingHTTPServer that reads a request in the leanest way and answers a constant.

    bare.py PORT

No method, path, header or token is looked at, nothing is kept, nothing is written down: what is left is the cost of a thread
a connection, of recv and of send in this Python. The answer has about the size of a heartbeat's.
"""

import re
import socket
import socketserver
import sys
from http.server import ThreadingHTTPServer

LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)")
BODY = b'{"acknowledged":true,"job":null,"cancel":[],"interval":5}\n'
ANSWER = (
    b"HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 10:00:00 GMT\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
    b"Content-Length: %d\r\nContent-Type: application/json\r\nConnection: keep-alive\r\n\r\n%b" % (len(BODY), BODY)
)


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receive, send, data = self.request.recv, self.request.sendall, b""
        while True:
            while (end := data.find(b"\r\n\r\n")) < 0:
                chunk = receive(65536)
                if not chunk:
                    return
                data += chunk
            length = LENGTH.search(data, 0, end)
            size = end + 4 + (int(length[1]) if length else 0)
            while len(data) < size:
                chunk = receive(65536)
                if not chunk:
                    return
                data += chunk
            data = data[size:]
            send(ANSWER)


class Server(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without the look-up of our own name

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error."""


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
