"""The demo's models: pages that can be learned, folders that are whole or absent, and answers by heart."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("chat", "code", "story")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("make_demo_models")


def write_something(name: str, folder: Path, say: Callable[[float], None]) -> None:
    (folder / "config.json").write_text(json.dumps({"name": name}))
    say(1.0)


def test_a_model_is_kept_until_its_page_or_script_changes(
    scripts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not scripts.is_made(tmp_path / "demo-chat")
    scripts.make("demo-chat", tmp_path, lambda _: None, write_something)
    assert scripts.is_made(tmp_path / "demo-chat")
    monkeypatch.setattr(scripts, "stamp", lambda: "another page")
    assert not scripts.is_made(tmp_path / "demo-chat")


def test_an_interrupted_run_leaves_the_old_model_and_the_next_run_makes_it(scripts: ModuleType, tmp_path: Path) -> None:
    def interrupted(name: str, folder: Path, say: Callable[[float], None]) -> None:
        write_something("half", folder, say)
        raise KeyboardInterrupt

    scripts.make("demo-chat", tmp_path, lambda _: None, write_something)
    with pytest.raises(KeyboardInterrupt):
        scripts.make("demo-chat", tmp_path, lambda _: None, interrupted)
    assert json.loads((tmp_path / "demo-chat" / "config.json").read_text()) == {"name": "demo-chat"}
    scripts.make("demo-chat", tmp_path, lambda _: None, write_something)
    assert [path.name for path in tmp_path.iterdir()] == ["demo-chat"]


def test_nothing_to_make_imports_no_torch(scripts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in scripts.NAMES:
        scripts.make(name, tmp_path, lambda _: None, write_something)
    monkeypatch.setattr(sys, "argv", ["make_demo_models.py", "--out", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "demo_training", None)
    assert scripts.main() == 0


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_ten_to_fourteen_questions_each_asked_once(page: str) -> None:
    sections = (ROOT / "scripts" / "demo_pages" / f"{page}.md").read_text(encoding="utf-8").split("\n## ")[1:]
    questions = [section.split("\n", 1)[0] for section in sections]
    assert 10 <= len(questions) <= 14
    assert len(set(questions)) == len(questions)
    assert all(section.split("\n", 1)[1].strip() for section in sections)


def test_the_prompts_that_the_demo_suggests_are_on_the_pages() -> None:
    headings = "".join((ROOT / "scripts" / "demo_pages" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)
    text = (ROOT / "configs" / "demo.toml").read_text(encoding="utf-8")
    suggested = [line.split('"')[1] for line in text.splitlines() if line.startswith("sample_prompt")]
    assert len(suggested) == 3
    assert [prompt for prompt in suggested if f"\n## {prompt}\n" not in headings] == []


@pytest.mark.engine
@pytest.mark.timeout(180)
def test_a_trained_model_says_its_page_by_heart(scripts: ModuleType, tmp_path: Path) -> None:
    demo_training = pytest.importorskip("demo_training", exc_type=ImportError)
    scripts.make("demo-story", tmp_path, lambda _: None)
    folder = tmp_path / "demo-story"
    model = demo_training.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = demo_training.PreTrainedTokenizerFast.from_pretrained(folder)
    for pair in demo_training.read_page("story"):
        turns = [{"role": "user", "content": pair.question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**asked, max_new_tokens=80, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True) == pair.answer
