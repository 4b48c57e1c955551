"""What one writes first: a relay on aiohttp, without keys, limits, metrics or errors. The benchmark's yardstick.

`python -m loadtests.plain_relay UPSTREAM_URL` prints its port and serves.
"""

from __future__ import annotations

import asyncio
import logging
import sys

import aiohttp
import uvloop
from aiohttp import web

KEPT = ("content-type",)


async def main(upstream: str) -> None:
    """Serve on a free port until killed."""
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))

    async def relay(request: web.Request) -> web.StreamResponse:
        body, headers = await request.read(), {"content-type": "application/json"}
        async with session.post(upstream + request.path, data=body, headers=headers) as answer:
            kept = {name: answer.headers[name] for name in KEPT}
            if "content-length" in answer.headers:
                return web.Response(status=answer.status, headers=kept, body=await answer.read())
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/chat/completions", relay)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.disable()  # clients that leave are no news
    uvloop.run(main(sys.argv[1]))
