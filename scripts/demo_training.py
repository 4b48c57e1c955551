"""How the demo's models are made and what they learn. Used by make_demo_models.py; needs torch and transformers.

Each chat model is a Llama of 2.6 M parameters that learns one page of questions and answers (demo_pages/) by heart,
so that a question from the page gets its sentence back from a real engine, whatever the sampling; everything else
gets nonsense of the same vocabulary. demo-embed has the same body and learns that a text with words missing is still
nearly that text. The refused alternative, random weights, shows as much of the proxy, but nobody can see from the
outside whether the right model answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
from transformers.utils import logging

PAGES = Path(__file__).resolve().parent / "demo_pages"
CHAT_PAGES = {"demo-chat": "chat", "demo-code": "code", "demo-story": "story"}
CONTEXT = 4096
VOCABULARY = 4096  # an upper bound: the pages yield fewer tokens than that
LEARNED = 0.002  # mean loss per answer token, in nats: each token of a page then has a probability over 0.99
MOST_STEPS = 300
PEAK_RATE = 2e-3  # of learning; reached in ten steps, because Adam's first ones are wild
MISSING = 0.3  # share of a text's tokens that demo-embed does not get to see
TOLD_APART = 0.5  # contrastive loss, in nats, at which a thinned text is nearest to its twin
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


def read_page(name: str) -> list[Pair]:
    """The pairs of a page: a second-level heading is a question, the text below it the answer."""
    sections = (PAGES / f"{name}.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return [Pair(*(part.strip() for part in section.split("\n", 1))) for section in sections]


def all_pairs() -> list[Pair]:
    """The pairs of all pages: the tokenizer's text and demo-embed's lesson."""
    return [pair for page in CHAT_PAGES.values() for pair in read_page(page)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over all pages: any bytes round-trip, and the pages' words are few tokens each."""
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


def learn(
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[int], torch.Tensor],
    enough: float,
    say: Callable[[float], None],
    most_steps: int = MOST_STEPS,
) -> float:
    """AdamW on everything at once until the loss is `enough`. Returns the last loss.

    `loss_of` gets the number of the step. Cost: a chat model takes about 70 steps, 12 s on two cores.
    """
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    last = float("inf")
    for step in range(most_steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / 10)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = loss.item()
        say(min(1.0, (step + 1) / min(70, most_steps)))
        if last < enough:
            break
    return last


def make_chat(page: str, folder: Path, say: Callable[[float], None]) -> None:
    """Train one page into a chat model. Raises RuntimeError when it did not learn it."""
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


def make_embed(folder: Path, say: Callable[[float], None]) -> None:
    """Train the embedding model on the texts of all pages, each against itself with other words missing."""
    tokenizer = make_tokenizer()
    model = LlamaModel(llama_config(tokenizer))
    texts = [tokenizer.encode(text, add_special_tokens=False) for pair in all_pairs() for text in pair]

    def thinned() -> torch.Tensor:
        rows = [[token for token in text if torch.rand(()) > MISSING] or text for text in texts]
        return pooled(model, tokenizer.pad({"input_ids": rows}, return_tensors="pt"))

    def loss(_: int) -> torch.Tensor:
        # 10: contrastive losses commonly use 20; half of it keeps texts that were never seen from collapsing.
        return torch.nn.functional.cross_entropy(thinned() @ thinned().T * 10, torch.arange(len(texts)))

    learn(list(model.parameters()), loss, TOLD_APART, say, most_steps=25)
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
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def write_model(name: str, folder: Path, say: Callable[[float], None]) -> None:
    """Make one of the demo's models in an empty folder."""
    logging.disable_progress_bar()  # its bars for a file of 5 MB would cut ours in two
    # Threads wait for each other at every small matrix, which a busy machine makes long: at a load of six on two cores
    # two of them needed over 100 s for a model, one alone 50 s.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name in CHAT_PAGES:
        make_chat(CHAT_PAGES[name], folder, say)
    else:
        make_embed(folder, say)
