"""What a vLLM engine will take, from its model folder alone: for models that nobody has measured yet.

memory = weights + KV cache + one step's activations and logits + what the runtime takes without a model. It is the
ledger's first guess and errs upwards; the first load replaces it by a measurement. The weights come from the headers of
the safetensors files (a folder cloned without its large files has tiny ones, which is told here rather than minutes
later), everything else from config.json. Each call reads some kilobytes.

Not modelled: sliding windows, recurrent layers and a quantised cache, which all take less.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MIB = 1 << 20
FLOAT_BYTES = 2  # vLLM computes in 16 bits unless told otherwise, models stored in 32 included
BLOCK_TOKENS = 128  # the KV cache is handed out in blocks: 128 tokens on the CPU, less, and a divisor of it, on GPUs
SEQUENCE_TOKENS = 1024
KV_CACHE_LEAST = 64 * MIB
HEADER_LIMIT = 100 * MIB  # the safetensors format's own

# What the processes take without a model. On the CPU measured with vLLM 0.32 (USS of both less weights and cache, and
# a tenth on top): a fork shares its imports with the launcher, a plain start does not. The GPU's is what a CUDA
# context, CUDA graphs and the allocator's slack take on current cards; it has not been measured by us.
OVERHEAD_WARM_CPU, OVERHEAD_PLAIN_CPU, OVERHEAD_GPU = 320 * MIB, 960 * MIB, 2048 * MIB
LARGE_WEIGHTS = 256 * MIB
# vLLM's sleep (level 1) and wake, between a card and pinned host memory. Published: 61 GB in 2.8 s to sleep and 2.9 s
# to wake, 64 GiB in 3 s, 1.2 GB in 0.26 s, each on one card; 235 GB on four cards in 5.8 and 5.5 s, as on two.
COPY_BASE_S, COPY_BYTES_PER_S, COPY_CARDS = 0.2, 22e9, 2
STEP_TOKENS_CPU, STEP_TOKENS_GPU = 2048, 8192  # the most tokens that vLLM computes in one step


def copy_s(size: int, cards: int = 1) -> float:
    """Seconds to put so many bytes to sleep, or to wake them, when they are spread over so many cards."""
    return COPY_BASE_S + size / (COPY_BYTES_PER_S * min(cards, COPY_CARDS))


class NotAModel(ValueError):
    """The folder holds no model that can be served; the message names the file and what is wrong with it."""


def estimate_memory(path: str, *, kv_cache_bytes: int, cpu: bool, warm: bool = True, max_sequences: int = 32) -> int:
    """Bytes that the engine takes on its device when loaded. Raises NotAModel."""
    config = _config(path)
    step = (STEP_TOKENS_CPU if cpu else STEP_TOKENS_GPU) * _activation_bytes_per_token(config)
    logits = 4 * max_sequences * _number(config, "vocab_size") * 4  # in float32, and the sampler's copies
    overhead = (OVERHEAD_WARM_CPU if warm else OVERHEAD_PLAIN_CPU) if cpu else OVERHEAD_GPU
    return weight_bytes(path) + kv_cache_bytes + step + logits + overhead


def kv_tokens(path: str, *, kv_cache_bytes: int) -> int:
    """How many tokens the KV cache holds, in whole blocks: "KV cache size" in vLLM's log. Raises NotAModel."""
    return kv_cache_bytes // (_kv_bytes_per_token(_config(path)) * BLOCK_TOKENS) * BLOCK_TOKENS


def default_kv_cache(path: str, *, max_sequences: int, max_context: int | None = None) -> int:
    """Bytes for a KV cache that nobody has set: 1,024 tokens for every sequence, or `max_context` for one.

    Without `max_context` the model's own context may be longer than this cache holds: vLLM must be told to fit it.
    Raises NotAModel.
    """
    tokens = max(max_sequences * SEQUENCE_TOKENS, max_context or 0)
    blocks = -(-tokens // BLOCK_TOKENS) + 1  # vLLM keeps one for itself
    return max(KV_CACHE_LEAST, blocks * BLOCK_TOKENS * _kv_bytes_per_token(_config(path)))


def default_threads(path: str) -> int:
    """Threads for arithmetic on the CPU: all cores for a large model, one for a small one.

    A small model's steps are shorter than the waiting of threads for each other: 2,200 tokens a second with one thread
    and 300 with two were measured for one of 6 million parameters on two busy cores.
    """
    try:
        large = weight_bytes(path) >= LARGE_WEIGHTS
    except NotAModel:
        large = False  # the start itself will say what is wrong with it
    return len(os.sched_getaffinity(0)) if large else 1


def weight_bytes(path: str) -> int:
    """Bytes of the weights as stored. Raises NotAModel."""
    files = _weight_files(Path(path))
    if not files:
        raise NotAModel(f"{path} holds no weights (*.safetensors or *.bin)")
    return sum(_tensor_bytes(file) if file.suffix == ".safetensors" else file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index).get("weight_map", {})
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise NotAModel(f"{index} names no files; download it again")
        return [folder / name for name in sorted(set(named.values()))]
    # "model*" first: some folders hold the same weights twice, under a second naming scheme
    for pattern in ("model*.safetensors", "*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _tensor_bytes(file: Path) -> int:
    """Of one safetensors file: a length (8 bytes, little endian), a JSON header of that length, then the tensors."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length) if length <= HEADER_LIMIT else b"")
        size = file.stat().st_size
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotAModel(f"{file} is not a safetensors file; was the model downloaded whole?") from error
    if 8 + length + end > size:
        raise NotAModel(f"{file} ends early: {size} bytes of {8 + length + end}; download the model again")
    return int(end)


def _config(path: str) -> dict[str, Any]:
    """The text model's part of config.json: models that also see or hear nest it."""
    file = Path(path) / "config.json"
    config = _read_json(file)
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise NotAModel(f"{file} does not exist; is {file.parent} a model folder?") from error
    except (OSError, ValueError) as error:
        raise NotAModel(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise NotAModel(f"{file} is not a JSON object")
    return content


def _kv_bytes_per_token(config: dict[str, Any]) -> int:
    layers = _first(config, ("num_hidden_layers", "n_layer"))
    if rank := _number(config, "kv_lora_rank"):  # latent attention: one compressed vector for keys and values
        return layers * (rank + _number(config, "qk_rope_head_dim")) * FLOAT_BYTES
    heads = _first(config, ("num_attention_heads", "n_head"))
    head_dim = _number(config, "head_dim") or _first(config, ("hidden_size", "n_embd")) // heads
    return 2 * layers * (_number(config, "num_key_value_heads") or heads) * head_dim * FLOAT_BYTES


def _activation_bytes_per_token(config: dict[str, Any]) -> int:
    """A few hidden states and the two halves and the product of a gated MLP are alive at once."""
    hidden = _first(config, ("hidden_size", "n_embd"))
    return (8 * hidden + 3 * (_number(config, "intermediate_size") or 4 * hidden)) * FLOAT_BYTES


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        if (number := _number(config, name)) > 0:
            return number
    raise NotAModel(f"config.json states no {' or '.join(names)}")


def _number(config: dict[str, Any], name: str) -> int:
    """A size in config.json; of a list, which some models have with an entry for each layer, the largest. 0 where none
    is stated, or null, as models without latent attention say it."""
    value = config.get(name)
    return max((each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)), default=0)
