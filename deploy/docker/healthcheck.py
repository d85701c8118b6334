"""Exit code 0 when the server in this container is alive: on its socket's path, or on its port."""

import os
import socket

PATIENCE = 3.0

path = os.environ.get("CHAT_PROXY_SERVER_SOCKET")
with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as client:
    client.settimeout(PATIENCE)
    client.connect(path or ("127.0.0.1", int(os.environ.get("CHAT_PROXY_SERVER_PORT", "8000"))))
    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    raise SystemExit(not client.recv(1024).startswith(b"HTTP/1.1 200 "))
