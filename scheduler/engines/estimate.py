"""What a vLLM engine will take, from its model folder alone: for models that nobody has measured yet.

memory = weights + KV cache + one step's activations and logits + what the runtime takes without a model. It is the
ledger's first guess and errs upwards; the first load replaces it by a measurement. The weights come from the headers of
the safetensors files (a folder cloned without its large files has tiny ones, which is told here rather than minutes
later), everything else from config.json. Each call reads some kilobytes.

Not modelled: sliding windows, recurrent layers and a quantised cache, which all take less.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

MIB = 1 << 20
DEFAULT_SEQUENCE_TOKENS = 1024
KV_CACHE_LEAST = 64 * MIB
HEADER_LIMIT = 100 * MIB  # the format's own
FLOAT_BYTES = 2  # vLLM computes in 16 bits unless told otherwise, models stored in 32 included


class Runtime(Enum):
    """What the processes take without a model: bytes, tokens of a step, tokens of a KV block.

    On the CPU measured with vLLM 0.32 (both processes' USS less weights and cache, and a tenth on top): a fork shares
    its imports with the launcher, a plain start does not. The GPU's is what a CUDA context, CUDA graphs and the
    allocator's slack take on current cards; it has not been measured by us.
    """

    CPU_WARM = (290 * MIB, 2048, 128)
    CPU_PLAIN = (960 * MIB, 2048, 128)
    GPU = (2048 * MIB, 8192, 16)

    @property
    def overhead_bytes(self) -> int:
        """Bytes without a model."""
        return self.value[0]

    @property
    def step_tokens(self) -> int:
        """The most tokens that one step computes."""
        return self.value[1]

    @property
    def block_tokens(self) -> int:
        """The KV cache is handed out in blocks of so many tokens."""
        return self.value[2]


class NotAModel(ValueError):
    """The folder holds no model that can be served; the message names the file and what is wrong with it."""


def estimate_memory(path: str, *, kv_cache_bytes: int, max_sequences: int, runtime: Runtime) -> int:
    """Bytes that the engine takes on its device when loaded. Raises NotAModel."""
    config = _config(path)
    step = runtime.step_tokens * _activation_bytes_per_token(config)
    logits = 4 * max_sequences * int(config.get("vocab_size", 0)) * 4  # in float32, and the sampler's copies
    return weight_bytes(path) + kv_cache_bytes + step + logits + runtime.overhead_bytes


def kv_tokens(path: str, kv_cache_bytes: int, runtime: Runtime) -> int:
    """How many tokens the KV cache holds, as vLLM's log will say ("KV cache size"). Raises NotAModel."""
    block = runtime.block_tokens
    return kv_cache_bytes // (_kv_bytes_per_token(_config(path)) * block) * block


def choose_kv_cache(path: str, *, max_sequences: int, max_context: int | None, runtime: Runtime) -> int:
    """Bytes for a KV cache that nobody has set: every sequence 1,024 tokens, or one as long as `max_context` allows.

    Raises NotAModel. Without `max_context` a model's own context may be longer than this cache: vLLM is then to fit
    the length to the cache.
    """
    tokens = max(max_sequences * DEFAULT_SEQUENCE_TOKENS, max_context or 0)
    blocks = -(-tokens // runtime.block_tokens) + 1  # vLLM keeps one for itself
    return max(KV_CACHE_LEAST, blocks * runtime.block_tokens * _kv_bytes_per_token(_config(path)))


def weight_bytes(path: str) -> int:
    """Bytes of the weights as stored. Raises NotAModel."""
    files = _weight_files(Path(path))
    if not files:
        raise NotAModel(f"{path} holds no weights (*.safetensors or *.bin)")
    return sum(_tensor_bytes(file) if file.suffix == ".safetensors" else file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index).get("weight_map", {}).values()
        return [folder / name for name in sorted(set(named))]
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
    if "kv_lora_rank" in config:  # latent attention: one compressed vector for keys and values
        return layers * (int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim", 0))) * FLOAT_BYTES
    heads = _first(config, ("num_attention_heads", "n_head"))
    head_dim = int(config.get("head_dim") or _first(config, ("hidden_size", "n_embd")) // heads)
    return 2 * layers * int(config.get("num_key_value_heads") or heads) * head_dim * FLOAT_BYTES


def _activation_bytes_per_token(config: dict[str, Any]) -> int:
    """A few hidden states and the two halves and the product of a gated MLP are alive at once."""
    hidden = _first(config, ("hidden_size", "n_embd"))
    return (8 * hidden + 3 * int(config.get("intermediate_size") or 4 * hidden)) * FLOAT_BYTES


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    raise NotAModel(f"config.json states no {' or '.join(names)}")
