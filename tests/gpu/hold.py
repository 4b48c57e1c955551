"""Hold so many bytes of the first visible GPU until the pipe on stdin closes: `python hold.py BYTES`."""

from __future__ import annotations

import sys

import torch

held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
held.fill_(1)
torch.cuda.synchronize()
print("held", flush=True)
sys.stdin.read()
