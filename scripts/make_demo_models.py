"""Make the demo's models: four real model folders in .models/, in about a minute, from nothing but this repository.

Each chat model is a Llama of 2.6 M parameters that learns one page of questions and answers (scripts/demo_pages/) by
heart, so that a question from the page gets its sentence back from a real engine, whatever the sampling; everything
else gets nonsense of the same vocabulary. demo-embed has the same body and is trained so that a question lies nearer
to its answer than to the others. The refused alternative, random weights, shows as much of the proxy, but nobody can
see from the outside whether the right model answered.

A folder is made beside its place and renamed into it, so an interrupted run leaves nothing that looks finished; it
is kept until this script or its pages change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import LlamaModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
PAGES = Path(__file__).resolve().parent / "demo_pages"
CHAT_MODELS = {"demo-chat": "chat", "demo-code": "code", "demo-story": "story"}
EMBED_MODEL = "demo-embed"
NAMES = (*CHAT_MODELS, EMBED_MODEL)

CONTEXT = 4096
VOCABULARY = 4096  # an upper bound: the pages yield fewer tokens than that
LEARNED = 0.002  # mean loss per answer token, in nats: each token of a page then has a probability over 0.99
MOST_STEPS = 300
ROUNDS = 36  # the page in that many different contexts, in turn
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a helpful, honest assistant.")
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML with tool calls in Hermes' form, which vLLM's "hermes" parser reads.
CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content if part.type in ('text', 'input_text', 'output_text') -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system_roles = ('system', 'developer') -%}
{%- set has_system = messages and messages[0].role in system_roles -%}
{%- if has_system or tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if has_system -%}{{- text_of(messages[0].content) -}}{%- endif -%}
    {%- if tools -%}
        {{- '\n' if has_system -}}
        {{- 'You may call these tools:\n<tools>\n' -}}
        {%- for tool in tools -%}{{- tool | tojson -}}{{- '\n' -}}{%- endfor -%}
        {{- '</tools>\nTo call one, write:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user\n<tool_response>\n' + text_of(message.content) + '\n</tool_response>' -}}
    {%- else -%}
        {{- '<|im_start|>' + ('system' if message.role in system_roles else message.role) + '\n' -}}
        {{- text_of(message.content) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\n<tool_call>\n{"name": "' + function.name + '", "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


class Pair(NamedTuple):
    """One question of a page and the answer that belongs to it."""

    question: str
    answer: str


Report = Callable[[float, str], None]  # done from 0 to 1, and what is being done


# ------------------------------------------------------------------ pages and stamps


def read_page(name: str) -> list[Pair]:
    """The pairs of a page: a second-level heading is a question, the text below it the answer."""
    sections = (PAGES / f"{name}.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return [Pair(*(part.strip() for part in section.split("\n", 1))) for section in sections]


def all_pairs() -> list[Pair]:
    """The pairs of all pages: the tokenizer's text and demo-embed's lesson."""
    return [pair for page in CHAT_MODELS.values() for pair in read_page(page)]


def stamp() -> str:
    """A hash of what the models are made from."""
    hashed = hashlib.sha256(Path(__file__).read_bytes())
    for page in sorted(PAGES.glob("*.md")):
        hashed.update(page.read_bytes())
    return hashed.hexdigest()


def is_made(folder: Path) -> bool:
    """Whether a folder was made from just these pages by just this script."""
    mark = folder / "made-from.txt"
    return mark.exists() and mark.read_text(encoding="utf-8") == stamp()


# ------------------------------------------------------------------ the parts of a model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over all pages: any bytes round-trip, and the pages' words are few tokens each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for pair in all_pairs() for text in pair] + ["user\n", "assistant\n", "system\n"] * 2
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_config(tokenizer: PreTrainedTokenizerFast) -> object:
    """The smallest body that every engine takes: heads of 64, the least that vLLM's CPU attention kernel has."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def context(pairs: list[Pair], at: int, round_: int) -> list[dict[str, str]]:
    """What stands before a question: nothing, a system prompt or an earlier turn, so that chat programs that send
    either get the sentence too."""
    kind = (at + round_) % 3
    if kind == 0:
        return []
    if kind == 1:
        return [{"role": "system", "content": SYSTEM_PROMPTS[(at + round_) // 3 % len(SYSTEM_PROMPTS)]}]
    earlier = pairs[(at + 1 + round_ * 5) % len(pairs)]
    return [{"role": "user", "content": earlier.question}, {"role": "assistant", "content": earlier.answer}]


def lesson(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], round_: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The page as conversations with their labels, padded to one batch. Only answers count: questions are given."""
    import torch

    rows: list[tuple[list[int], list[int]]] = []
    for at, pair in enumerate(pairs):
        turns = [*context(pairs, at, round_), {"role": "user", "content": pair.question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        answered = tokenizer.encode(pair.answer + END, add_special_tokens=False)
        rows.append((asked + answered, [-100] * len(asked) + answered))
    longest = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    return ids, labels


def learn(parameters: list[torch.nn.Parameter], loss_of: Callable[[int], torch.Tensor], enough: float, say: Report) -> float:
    """AdamW on the whole page at once until the loss is `enough`. Returns the last loss."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    last = float("inf")
    for step in range(MOST_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 10)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = loss.item()
        say(min(1.0, (step + 1) / 100), f"loss {last:.3f}")
        if last < enough:
            break
    return last


# ------------------------------------------------------------------ one model each


def make_chat(page: str, folder: Path, say: Report) -> None:
    """Train one page into a chat model. Raises RuntimeError when it did not learn it."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(llama_config(tokenizer))
    rounds = [lesson(tokenizer, read_page(page), round_) for round_ in range(ROUNDS)]

    def loss(step: int) -> torch.Tensor:
        ids, labels = rounds[step % ROUNDS]
        # What follows the last label is padding, which a causal model does not see before it: no mask is needed.
        return model(input_ids=ids, labels=labels).loss

    last = learn(list(model.parameters()), loss, LEARNED, say)
    if last >= LEARNED * 10:
        raise RuntimeError(f"the model did not learn {page}.md: loss {last:.2f} after {MOST_STEPS} steps")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Greedy unless a request says otherwise, and top_k keeps it so at any temperature: a plain curl gets the sentence.
    sampling = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "temperature": 0.0}
    (folder / "generation_config.json").write_text(json.dumps({**sampling, "top_k": 1}, indent=2) + "\n")


def make_embed(folder: Path, say: Report) -> None:
    """Train the embedding model on all pages: the mean of a question's last hidden states is pulled to its answer's."""
    import torch
    from transformers import LlamaModel

    tokenizer = make_tokenizer()
    model = LlamaModel(llama_config(tokenizer))
    pairs = all_pairs()
    questions = tokenizer([pair.question for pair in pairs], padding=True, return_tensors="pt")
    answers = tokenizer([pair.answer for pair in pairs], padding=True, return_tensors="pt")

    def loss(_: int) -> torch.Tensor:
        # 10: the usual inverse temperature of contrastive losses is 20; half of it keeps unseen text apart.
        alike = pooled(model, questions) @ pooled(model, answers).T * 10
        return torch.nn.functional.cross_entropy(alike, torch.arange(len(pairs)))

    learn(list(model.parameters()), loss, 0.05, say)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # sentence-transformers' way of saying "mean pooling, then unit length", which vLLM reads too.
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")


def pooled(model: LlamaModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors: the mean of the last hidden states over the tokens that are not padding."""
    import torch

    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def make(name: str, out: Path, say: Report) -> None:
    """Make one model folder under `out`, all of it or nothing."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for a file of 5 MB would cut ours in two
    torch.manual_seed(0)
    folder, half = out / name, out / f".{name}.{os.getpid()}"
    half.mkdir(parents=True)
    try:
        if name == EMBED_MODEL:
            make_embed(half, say)
        else:
            make_chat(CHAT_MODELS[name], half, say)
        (half / "made-from.txt").write_text(stamp(), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)


# ------------------------------------------------------------------ the command


def make_all(names: list[str], out: Path) -> None:
    """Make the models with a bar on a terminal and a plain line each elsewhere."""
    if not sys.stderr.isatty():
        for name in names:
            started = time.monotonic()
            make(name, out, lambda done, what: None)
            print(f"models: {name} made in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        for name in names:
            bar = bars.add_task(name, total=1.0)
            make(name, out, lambda done, what, bar=bar: bars.update(bar, completed=done))
            bars.update(bar, completed=1.0)


def main() -> int:
    """Make what is missing or out of date. A few milliseconds when nothing is."""
    parser = argparse.ArgumentParser(description="Make the demo's tiny models from the pages in scripts/demo_pages/.")
    parser.add_argument("--only", choices=NAMES, action="append", help="just this one (may be repeated)")
    parser.add_argument("--out", type=Path, default=ROOT / ".models", help="where the folders go (default .models)")
    options = parser.parse_args()
    names = [name for name in options.only or NAMES if not is_made(options.out / name)]
    if names:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        print(f"models: making {', '.join(names)} in {options.out}", file=sys.stderr, flush=True)
        make_all(names, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
