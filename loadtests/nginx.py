"""nginx with duties that it can do: check the client's key, put the upstream's in its place, pool connections.

It is the yardstick for what a proxy must cost; where it is not installed, the benchmark leaves it out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from loadtests import canned

# buffering off, since streams must pass; bodies up to 1 MB stay in memory; one worker, no log
_CONF = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
worker_rlimit_nofile 20000;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_body_buffer_size 1m;
    keepalive_requests 1000000;
    upstream engine {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000; }}
    map $http_authorization $known {{ default 0; "Bearer {key}" 1; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /readyz {{ return 200; }}
        location / {{
            if ($known = 0) {{ return 401; }}
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Authorization "Bearer sk-upstream";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def program() -> str | None:
    """Where nginx is, if it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def command(folder: str, port: int, upstream_port: int) -> list[str]:
    """Its command line, once its configuration is written into `folder`."""
    conf = Path(folder, "nginx.conf")
    conf.write_text(_CONF.format(folder=folder, port=port, upstream=upstream_port, key=canned.KEY), encoding="utf-8")
    return [program() or "nginx", "-p", folder, "-e", f"{folder}/error.log", "-c", str(conf)]
