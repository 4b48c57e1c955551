"""OpenAI's chat API over transformers, as a user's own script would have it: `python transformers_server.py FOLDER`.

Listens on 127.0.0.1:$PORT. The model of these tests knows no language, so a token is a byte of the prompt.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from aiohttp import web
from transformers import AutoModelForCausalLM

PLACE = "cuda" if torch.cuda.is_available() else "cpu"


class Server:
    """One model, one answer at a time."""

    def __init__(self, folder: str) -> None:
        began = time.monotonic()
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=None).to(PLACE)
        print(f"loaded in {time.monotonic() - began:.2f} s", flush=True)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def chat(self, request: web.Request) -> web.Response:
        asked: dict[str, Any] = await request.json()
        prompt = list(asked["messages"][-1]["content"].encode())[-64:]
        tokens = torch.tensor([prompt], device=PLACE)
        with torch.inference_mode():
            answer = self._model.generate(tokens, max_new_tokens=asked.get("max_tokens", 4), do_sample=False)
        made = answer.shape[1] - len(prompt)
        message = {"role": "assistant", "content": " ".join(str(int(token)) for token in answer[0, len(prompt) :])}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": made, "total_tokens": len(prompt) + made}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        about = {"id": "chatcmpl-test", "object": "chat.completion", "created": int(time.time())}
        return web.json_response({**about, "model": asked["model"], "choices": [choice], "usage": usage})


if __name__ == "__main__":
    server = Server(sys.argv[1])
    app = web.Application()
    app.add_routes([web.get("/health", server.health), web.post("/v1/chat/completions", server.chat)])
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), print=None)
