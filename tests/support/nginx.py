"""Real nginx: with the site that `deploy/nginx` ships, as it stands there (`front`), or with any other (`serving`).

What differs from one machine to the next is put in by `Site.fitted`: places to listen, the name, the certificate, the
log, the upstreams, and which of the file's own commented lines are in use. Each replacement must find what it replaces.
nginx is handed sockets that listen already (its environment variable NGINX, made for upgrades of its binary): no
other process can take a port between two steps.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from support.harness import PATIENCE, STARTING, environment, eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
HOST = "chat.example.org"
PROGRAM = shutil.which("nginx") or "/usr/sbin/nginx"
WORKERS = 2

MAIN = """\
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
worker_processes {workers};
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/temp; proxy_temp_path {folder}/temp;
    fastcgi_temp_path {folder}/temp; uwsgi_temp_path {folder}/temp; scgi_temp_path {folder}/temp;
{http}}}
"""

# As hostile to streams as a main file can be: what the site does not say itself, this says wrongly.
HOSTILE = """\
    include /etc/nginx/mime.types;
    proxy_buffering on; gzip on; gzip_proxied any; gzip_types *; gzip_min_length 1; proxy_read_timeout 1s;
    include {folder}/chat-proxy.conf;
"""


@dataclass(frozen=True)
class Site:
    """What one test's site is: its instances, and what else differs from the file as shipped.

    `changes` are replacements in any of the files, text for text; each must be found.
    """

    instances: Sequence[str]
    host: str = HOST
    page: Path | None = None  # serve the page from this folder of nginx's own disk
    accounts: str = ""  # the address of an oauth2-proxy: use sign-in.conf
    changes: dict[str, str] = field(default_factory=dict)

    def fitted(self, files: dict[str, str], listen: dict[str, str], folder: Path) -> dict[str, str]:
        """The shipped files with this site's places in them."""
        servers = "\n    ".join(f"server {instance} max_fails=0;" for instance in self.instances)
        replacements = {
            r"listen 80;": f"listen {listen['http']};",
            r"listen \[::\]:80;": f"listen unix:{folder}/80.sock;",
            r"listen 443 ssl http2;": f"listen {listen['https']} ssl http2;",
            r"listen \[::\]:443 ssl http2;": f"listen unix:{folder}/443.sock ssl http2;",
            r"chat\.example\.org;": f"{self.host};",
            r"/etc/letsencrypt/live/chat\.example\.org/": f"{folder}/",
            r"/var/log/nginx/": f"{folder}/",
            r"/var/www/html;": f"{folder}/html;",
            r"server unix:/run/chat-proxy/1\.sock max_fails=0;": servers,
            r"server unix:/run/chat-proxy/2\.sock max_fails=0;": "",
        }
        if self.page:
            replacements[r"include chat-proxy/page-through\.conf;"] = ""
            replacements[r"# include chat-proxy/page-on-disk\.conf;"] = "include chat-proxy/page-on-disk.conf;"
            replacements[r"/usr/share/chat-proxy/page\b(?=;)"] = str(self.page)
        if self.accounts:
            replacements[r"# include chat-proxy/sign-in\.conf;"] = "include chat-proxy/sign-in.conf;"
            replacements[r"http://127\.0\.0\.1:4180"] = self.accounts
        replacements |= {re.escape(old): new for old, new in self.changes.items()}
        for pattern, new in replacements.items():
            matches = re.compile(pattern)
            assert any(matches.search(text) for text in files.values()), f"the shipped files have no {pattern}"
            files = {name: matches.sub(new.replace("\\", r"\\"), text) for name, text in files.items()}
        return files


@dataclass
class Front:
    """A running nginx."""

    folder: Path
    port: int
    plain_port: int
    host: str
    trust: ssl.SSLContext

    def errors(self) -> str:
        return (self.folder / "error.log").read_text(encoding="utf-8")

    def logged(self) -> list[str]:
        return (self.folder / "access.log").read_text(encoding="utf-8").splitlines()

    def connect(self, protocol: str = "http/1.1") -> ssl.SSLSocket:
        """A connection that trusts the test's authority, and speaks this protocol (ALPN)."""
        context = self.trust
        context.set_alpn_protocols([protocol])
        raw = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        raw.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # as browsers do; else a word may wait 40 ms for an ACK
        wrapped = context.wrap_socket(raw, server_hostname=self.host)
        assert wrapped.selected_alpn_protocol() == protocol
        return wrapped


def shipped() -> dict[str, str]:
    """The files of deploy/nginx by their names in it."""
    root = DEPLOY / "nginx"
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.conf"))}


@contextmanager
def front(folder: Path, site: Site, authority: trustme.CA | None = None) -> Iterator[Front]:
    """nginx with this site, ready, in a new folder of its own."""
    authority = authority or trustme.CA()
    folder.mkdir(parents=True, exist_ok=True)
    certificate = authority.issue_cert(site.host, "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "privkey.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "fullchain.pem", append=True)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with listening(2) as (http, https):
        listen = {name: "{}:{}".format(*one.getsockname()) for name, one in (("http", http), ("https", https))}
        write(folder, site.fitted(shipped(), listen, folder))
        with serving(folder, HOSTILE.format(folder=folder), [http, https], workers=WORKERS):
            running = Front(folder, https.getsockname()[1], http.getsockname()[1], site.host, trust)
            running.connect().close()
            yield running


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


@contextmanager
def listening(number: int) -> Iterator[list[socket.socket]]:
    """Sockets for nginx, each on a port of its own: an early client waits until nginx is ready."""
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024)) for _ in range(number)]


@contextmanager
def serving(folder: Path, http: str, listeners: Iterable[socket.socket], *, workers: int = 1) -> Iterator[None]:
    """nginx with this in its http block, listening on these sockets only."""
    user = "user root;" if os.getuid() == 0 else ""  # who else may read pytest's folders
    configuration = folder / "nginx.conf"
    configuration.write_text(MAIN.format(user=user, folder=folder, workers=workers, http=http), encoding="utf-8")
    (folder / "temp").mkdir()
    handed = [listener.fileno() for listener in listeners]
    for number in handed:
        os.set_blocking(number, False)  # as it expects of what it inherits, or one worker waits for another's visitor
    command = [PROGRAM, "-p", str(folder), "-c", str(configuration), "-e", str(folder / "error.log")]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=STARTING, check=False)
    assert tested.returncode == 0, tested.stderr
    assert_clean(tested.stderr)
    told = environment() | {"NGINX": "".join(f"{number};" for number in handed)}
    process = subprocess.Popen(command, env=told, pass_fds=handed)
    try:
        eventually((folder / "nginx.pid").exists, STARTING)
        yield
    finally:
        process.terminate()
        process.wait(STARTING)


def assert_clean(said: str) -> None:
    """`nginx -t` has nothing to object to. From 1.25.1 on it would rather have http2 on a line of its own."""
    lines = [line for line in said.splitlines() if 'the "listen ... http2" directive is deprecated' not in line]
    assert not [line for line in lines if "[" in line], said
    assert any("test is successful" in line for line in lines)
