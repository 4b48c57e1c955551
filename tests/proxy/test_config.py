"""Reading a configuration: what is accepted, and the exact words for everything that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import BackendConfig, Config, ConfigError, ModelConfig, ServerConfig
from proxy.config_load import Start, load, load_start, load_text
from proxy.config_shape import shape_problems

KEYS = sorted(
    {
        field.name
        for kind in (Config, ModelConfig, BackendConfig, ServerConfig)
        for field in msgspec.structs.fields(kind)
    }
)
LOCAL = """
[[devices.simulated]]
name = "sim0"
memory = "8GiB"

[[backends]]
name = "local"
kind = "simulated"
"""
CHAT = (
    LOCAL
    + """
[[models]]
id = "demo-chat"
backend = "local"
memory_bytes = "2GiB"
"""
)


def problems_of(text: str, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, "x.toml", **options)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("listen = 1", "listen is not a key; use one of backends, classes, defaults, devices, limits, models, observe, "
         "server, store, timeouts"),
        ("[sever]", "sever is not a key; did you mean server?"),
        ("[server]\nlistn = 'x'", "server.listn is not a key; did you mean listen?"),
        (CHAT + "ttl = 5", "models[demo-chat].ttl is not a key; did you mean ttl_s?"),
        ("server = 3", "server is 3; write it as a section, [server]"),
        ("[models]\nid = 'a'", "models is one section; write it with double brackets, [[models]]"),
        ("classes = 3", "classes is 3; write sections, [classes.NAME]"),
        ("[[models]]\nbackend = 'a'", "models[0].id is missing; what clients name in `model`"),
        (CHAT + "ttl_s = -5",
         "models[demo-chat].ttl_s is -5; use 0 to 31536000 seconds, or leave it out to keep the model loaded"),
        (CHAT + "ttl_s = 'never'",
         'models[demo-chat].ttl_s is "never"; use a number, or leave it out to keep the model loaded'),
        (CHAT + "pinned = 1", "models[demo-chat].pinned is 1; use true or false"),
        (CHAT + "max_sequences = 1.5", "models[demo-chat].max_sequences is 1.5; use a whole number"),
        (CHAT + "args = '--x'", 'models[demo-chat].args is "--x"; use a list of text in quotes'),
        (CHAT + "env = ['A=1']", 'models[demo-chat].env is ["A=1"]; use a table of text, { NAME = "value" }'),
        (CHAT + "task = 'chat'", 'models[demo-chat].task is "chat"; use one of embed, generate'),
        (CHAT + "[models.simulated]\nfault = 'crsh'",
         'models[demo-chat].simulated.fault is "crsh"; did you mean crash?'),
        (CHAT + "[models.simulated]\ntokens_per_s = 0",
         "models[demo-chat].simulated.tokens_per_s is 0; use more than 0, up to 1000000"),
        (CHAT + "kv_cache_bytes = '2 gigs'",
         'models[demo-chat].kv_cache_bytes is "2 gigs"; use a size like "4GiB" or "512MiB", '
         "or leave it out to have it chosen from the model's size"),
        (CHAT + "kv_cache_bytes = true",
         'models[demo-chat].kv_cache_bytes is true; use a size like "4GiB" or "512MiB", '
         "or leave it out to have it chosen from the model's size"),
        (CHAT + "kv_cache_bytes = 4",
         "models[demo-chat].kv_cache_bytes is 4; use 1MiB to 1PiB, "
         "or leave it out to have it chosen from the model's size"),
        (CHAT + "kv_cache_bytes = -4",
         'models[demo-chat].kv_cache_bytes is -4; use a size like "4GiB" or "512MiB", '
         "or leave it out to have it chosen from the model's size"),
        ("[devices]\npressure_threshold = 0", "devices.pressure_threshold is 0; use more than 0, up to 1"),
        ("[devices]\npressure_threshold = 1.2", "devices.pressure_threshold is 1.2; use more than 0, up to 1"),
        ("[timeouts]\nidle_s = nan", "timeouts.idle_s is nan; use more than 0, up to 86400 seconds"),
        ("[timeouts]\nidle_s = inf", "timeouts.idle_s is inf; use more than 0, up to 86400 seconds"),
        ("[timeouts]\nidle_s = -1", "timeouts.idle_s is -1; use more than 0, up to 86400 seconds"),
        ("[defaults]\nlatency_class = 'fats'", 'defaults.latency_class is "fats"; did you mean fast?'),
        ("[server]\nlisten = '8080'",
         'server.listen is "8080"; use HOST:PORT, e.g. 127.0.0.1:8080, with a port of 0 to 65535'),
        ("[server]\nlisten = '127.0.0.1:70000'",
         'server.listen is "127.0.0.1:70000"; use HOST:PORT, e.g. 127.0.0.1:8080, with a port of 0 to 65535'),
        ("[server]\nlisten = '::1:80'", 'server.listen is "::1:80"; write an IPv6 address in brackets, [::1]:80'),
        ("[server]\nlisten = ':8080'",
         'server.listen is ":8080"; name the address, e.g. 127.0.0.1:8080, '
         "or 0.0.0.0:8080 for all of this machine's"),
        ("[store]\ndir = ''", 'store.dir is ""; name a path'),
        (LOCAL + "[[models]]\nid = ' a'\nbackend = 'local'",
         'models[ a].id is " a"; use 1 to 200 printable characters without a space at either end'),
        ("[server]\napi_keys = ['sk-secret']",
         'server.api_keys is a bare string; use "env:NAME", "file:PATH", or "literal:..." for a key that is no secret'),
        ("[server]\napi_keys = 'sk-secret'", "server.api_keys is of the wrong type; use a list of text in quotes"),
        ("[server]\napi_keys = ['env:']",
         'server.api_keys is "env:" with nothing after it; '
         'use "env:NAME", "file:PATH", or "literal:..." for a key that is no secret'),
    ],
)  # fmt: skip
def test_a_key_that_the_structs_do_not_allow_is_refused_with_its_remedy(text: str, problem: str) -> None:
    assert problems_of(text) == [f"x.toml: {problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[server]\nlisten = '0.0.0.0:8080'",
         'server.listen is "0.0.0.0:8080", open to others, and server.api_keys is empty; '
         'set server.api_keys, e.g. ["file:keys.txt"], or listen on 127.0.0.1'),
        ("[server]\nadmin_listen = '[::]:8081'",
         'server.admin_listen is "[::]:8081", open to others, and server.admin_keys is empty; '
         'set server.admin_keys, e.g. ["file:keys.txt"], or listen on 127.0.0.1'),
        ("[server]\nadmin_listen = '127.0.0.1:8080'",
         'server.admin_listen is "127.0.0.1:8080", and server.listen has that port (127.0.0.1:8080); use another port'),
        ("[server]\nadmin_listen = 'localhost:8080'",
         'server.admin_listen is "localhost:8080", and server.listen has that port (127.0.0.1:8080); use another port'),
        ("[server]\nadmin_keys = ['env:K']\nadmin_listen = '0.0.0.0:8080'",
         'server.admin_listen is "0.0.0.0:8080", and server.listen has that port (127.0.0.1:8080); use another port'),
        ("[store]\nusage = ''", 'store.usage is ""; name a path'),
        ("[observe]\naccess_log = ''", 'observe.access_log is ""; name a path'),
        ("[[backends]]\nname = 'x'\nkind = 'ollama'",
         'backends[x].kind is "ollama"; use one of command, openai, simulated, vllm'),
        ("[server]\nworkers = 4\n[[backends]]\nname='r'\nkind='openai'\nbase_url='http://r/v1'\nmax_connections=3",
         "backends[r].max_connections is 3 for 4 workers; use at least one for each"),
        ("[classes.fats]\ndeadline_ms = 5", "classes.fats is not a latency class; did you mean fast?"),
        (LOCAL + "[[backends]]\nname = 'local'\nkind = 'simulated'",
         "backends[local].name is given twice; rename one of them"),
        ("[[devices.simulated]]\nname='s'\nmemory='1GiB'\n[[devices.simulated]]\nname='s'\nmemory='1GiB'",
         "devices.simulated[s].name is given twice; rename one of them"),
        ("[[devices.simulated]]\nname='host'\nmemory='1GiB'",
         "devices.simulated[host].name stands for real devices; use another name, e.g. sim0"),
        ("[[backends]]\nname='r'\nkind='openai'",
         'backends[r].base_url is missing; kind openai needs it, e.g. "https://llm.example.com/v1"'),
        (LOCAL + "base_url = 'http://h/v1'",
         "backends[local].base_url is for kind openai only, and kind is simulated; remove it"),
        ("[[backends]]\nname='r'\nkind='vllm'\ndevice='gpu'",
         'backends[r].device is "gpu"; use one of host, nvidia, simulated'),
        ("[devices]\nnvidia = false\n[[backends]]\nname='r'\nkind='vllm'\ndevice='nvidia'",
         'backends[r].device is "nvidia", and devices.nvidia is false; set it to true, or use host'),
        (LOCAL + "device = 'host'", 'backends[local].device is "host"; a simulated engine needs a simulated device'),
        ("[[backends]]\nname='r'\nkind='simulated'",
         "backends[r] uses simulated devices, and there is none; add [[devices.simulated]] with name and memory"),
        (CHAT.replace('backend = "local"', 'backend = "locla"'),
         'models[demo-chat].backend is "locla"; did you mean local?'),
        ("[[models]]\nid='a'\nbackend='b'", 'models[a].backend is "b"; there is none yet'),
        (CHAT + "[limits.models.demo-chta]\nconcurrency=1",
         "limits.models.demo-chta is no model; did you mean demo-chat?"),
        ("[[backends]]\nname='v'\nkind='vllm'\n[[models]]\nid='a'\nbackend='v'",
         "models[a].path is missing; kind vllm needs it: the folder with config.json and the weights"),
        ("[[backends]]\nname='c'\nkind='command'\n[[models]]\nid='a'\nbackend='c'\nmemory_bytes='1GiB'",
         'models[a].command is missing; kind command needs it, e.g. ["llama-server", "--port", "${PORT}"]'),
        ("[[backends]]\nname='c'\nkind='command'\n[[models]]\nid='a'\nbackend='c'\ncommand=['x']",
         'models[a].memory_bytes is missing; kind command needs it, e.g. "6GiB"'),
        (CHAT.replace('simulated"', 'command"') + "command=['x', '${MODEL_PATH}']",
         "models[demo-chat].path is missing; ${MODEL_PATH} in command or env stands for it"),
        (LOCAL + "[[models]]\nid='a'\nbackend='local'",
         'models[a].memory_bytes is missing; kind simulated needs it, e.g. "6GiB"'),
        (CHAT + "command = ['x']",
         "models[demo-chat].command is for kind command only, and kind is simulated; remove it"),
        (CHAT.replace("2GiB", "12GiB"),
         "models[demo-chat].memory_bytes is 12GiB, and the largest device for it has 8GiB; "
         "use a smaller model, or raise the device's memory"),
        (CHAT + "[[models]]\nid='demo-chat'\nbackend='local'\nmemory_bytes='1GiB'",
         "models[demo-chat] is given for two local engines; keep one of them, or give the other its own id"),
        (CHAT.replace("2GiB", "5GiB") + "pinned=true\n[[models]]\nid='b'\nbackend='local'\n"
         "memory_bytes='4GiB'\npinned=true",
         "models[demo-chat, b].pinned together need 9GiB, and there is 8GiB; unpin one"),
        ("[devices]\nhost_memory='4GiB'\n[[backends]]\nname='c'\nkind='command'\ndevice='host'\n[[models]]\nid='a'\n"
         "backend='c'\ncommand=['x']\nmemory_bytes='6GiB'",
         "models[a].memory_bytes is 6GiB, and the largest device for it has 4GiB; "
         "use a smaller model, or raise the device's memory"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_with_its_remedy(text: str, problem: str) -> None:
    assert problems_of(text) == [f"x.toml: {problem}"]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("https://u:hunter2@h.example/v1", "has a user or password in it (host h.example); "
         'put the key into api_key, e.g. "env:PROVIDER_KEY"'),
        ("ftp://h/v1", 'is "ftp://h/v1"; use http://HOST:PORT/v1 or https://HOST/v1'),
        ("localhost:9000", 'is "localhost:9000"; use http://HOST:PORT/v1 or https://HOST/v1'),
        ("http://h:99999/v1", 'is "http://h:99999/v1"; use http://HOST:PORT/v1 or https://HOST/v1'),
        ("http://h/v1?key=a", 'is "http://h/v1?key=a"; leave out everything from the ? or # on'),
    ],
)  # fmt: skip
def test_a_base_url_must_be_one_and_carry_no_credentials(url: str, problem: str) -> None:
    text = f"[[backends]]\nname = 'r'\nkind = 'openai'\nbase_url = '{url}'"
    assert problems_of(text) == [f"x.toml: backends[r].base_url {problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[server]\nlisten = ", "line 2, at the end: invalid value"),
        ("a = 1\na = 2", "line 2, at the end: cannot overwrite a value"),
        ("[server\nlisten = 1", "line 1, column 8: expected ']' at the end of a table declaration"),
    ],
)
def test_a_syntax_error_names_its_line(text: str, problem: str) -> None:
    assert problems_of(text) == [f"x.toml: {problem}; see toml.io for how TOML is written"]


def test_a_file_nested_without_end_is_refused() -> None:
    assert problems_of("a = " + "[" * 5000) == ["x.toml: is nested too deeply; no key takes lists in lists"]


def test_junk_is_reported_with_simulated_engines_too() -> None:
    text = "devices = 3\nmodels = [{ id = 'a', backend = ['b'] }, 3]\nbackends = [{ name = ['b'], kind = 'vllm' }]"
    assert problems_of(text, engine="simulated") == [
        "x.toml: devices is 3; write it as a section, [devices]",
        'x.toml: backends[0].name is ["b"]; use text in quotes',
        'x.toml: models[a].backend is ["b"]; use text in quotes',
        "x.toml: models[1] is 3; write it as a section, [[models]]",
    ]


def test_all_problems_are_reported_together_and_in_order() -> None:
    text = "[server]\nlistn = 1\ndrain_s = -1\n[defaults]\nmax_queue = 'many'\n"
    assert problems_of(text) == [
        "x.toml: server.listn is not a key; did you mean listen?",
        "x.toml: server.drain_s is -1; use 0 to 86400 seconds",
        'x.toml: defaults.max_queue is "many"; use a whole number',
    ]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["4GiB", "env:A", "h:1", "vllm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(), JUNK, max_size=4))
def test_whatever_the_file_holds_is_refused_in_words_or_fits_the_structs(data: dict[str, Any]) -> None:
    problems = shape_problems(data)
    if problems:
        assert all(len(f"{path} {says}".splitlines()) == 1 for path, says in problems)
    else:
        msgspec.convert(data, Config)


def test_an_empty_file_is_all_defaults_but_for_the_absolute_state_folder(tmp_path: Path) -> None:
    config = load_text("", "x.toml", base_dir=tmp_path)
    assert config.store.dir == str(Path.cwd() / ".state")
    assert (config.server, config.timeouts, config.models) == (Config().server, Config().timeouts, ())


def test_a_missing_file_and_one_that_is_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.problems == [f"{path}: cannot be read (No such file or directory); name a file that exists"]
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.problems == [f"{path}: byte 5 is not UTF-8; save the file as UTF-8"]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    text = "[[backends]]\nname='v'\nkind='vllm'\n[[models]]\nid='a'\nbackend='v'\npath='m'"
    at = f'x.toml: models[a].path is "{tmp_path}/m", which'
    assert problems_of(text, base_dir=tmp_path) == [f"{at} is no folder; put the model there, or name another"]
    (tmp_path / "m").mkdir()
    assert problems_of(text, base_dir=tmp_path) == [f"{at} has no config.json; name a model's own folder"]


def test_relative_paths_start_at_the_file(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "etc" / "vramp.toml"
    path.parent.mkdir()
    path.write_text(
        "[store]\ndir='state'\n[observe]\naccess_log='../access.log'\n"
        "[[backends]]\nname='v'\nkind='vllm'\npython='venv/bin/python'\n"
        "[[models]]\nid='a'\nbackend='v'\npath='../models/tiny'"
    )
    config = load(path)
    assert config.models[0].path == str(model_folder)
    assert config.backends[0].python == str(tmp_path / "etc/venv/bin/python")
    assert config.store.dir == str(tmp_path / "etc/state")
    assert config.observe.access_log == str(tmp_path / "access.log")


def test_an_override_wins_over_the_file_and_is_named_where_it_is_wrong() -> None:
    text = "[server]\nlisten = '127.0.0.1:1'"
    assert load_text(text, "x.toml", {"server.listen": "127.0.0.1:2"}).server.listen == "127.0.0.1:2"
    assert problems_of(text, overrides={"server.listen": "2"}) == [
        'command line: server.listen is "2"; use HOST:PORT, e.g. 127.0.0.1:8080, with a port of 0 to 65535'
    ]


def test_keys_make_a_public_address_good() -> None:
    text = "[server]\nlisten = '0.0.0.0:8080'\napi_keys = ['env:KEY']"
    assert load_text(text, "x.toml").server.listen == "0.0.0.0:8080"


def test_one_id_on_a_local_and_on_remote_backends_is_a_group() -> None:
    remote = "[[backends]]\nname='r'\nkind='openai'\nbase_url='https://h/v1'\n"
    entry = "[[models]]\nid='demo-chat'\nbackend='r'\n"
    assert [model.backend for model in load_text(CHAT + remote + entry + entry, "x").models] == ["local", "r", "r"]


@pytest.mark.parametrize("device", ["nvidia", "gpu3", "host", "simulated", "sim0"])
def test_a_backend_may_name_a_kind_of_device_or_one_device(device: str) -> None:
    text = LOCAL + f"[[backends]]\nname='c'\nkind='command'\ndevice='{device}'"
    assert load_text(text, "x").backends[1].device == device


def test_every_profile_name_of_the_design_is_accepted() -> None:
    profile = """
        strengths = ["code"]
        weaknesses = ["creative"]
        avg_ttft_ms = 80
        avg_tokens_per_sec = 120.5
        max_context = 32768
        supports_streaming = true
        supports_tools = true
        cost_tier = "free"
        licence = "Apache-2.0"
    """
    model = load_text(CHAT + profile, "x").models[0]
    assert (model.avg_ttft_ms, model.max_context, model.licence, model.memory_bytes) == (
        80,
        32768,
        "Apache-2.0",
        "2GiB",
    )


def test_simulated_engines_need_neither_folders_nor_programs() -> None:
    text = """
        devices.host_memory = "3GiB"
        backends = [
            { name = "v", kind = "vllm", device = "nvidia" },
            { name = "c", kind = "command" },
            { name = "r", kind = "openai", base_url = "https://h/v1" },
        ]
        models = [
            { id = "a", backend = "v", path = "/nowhere", memory_bytes = "2GiB" },
            { id = "b", backend = "c", command = ["x"] },
            { id = "d", backend = "r" },
        ]
    """
    config = load_text(text, "x.toml", engine="simulated")
    assert [backend.kind for backend in config.backends] == ["simulated", "simulated", "openai"]
    assert [(device.name, device.memory) for device in config.devices.simulated] == [("sim0", "3GiB")]
    assert [model.memory_bytes for model in config.models] == ["2GiB", "1GiB", None]


def test_without_a_file_the_named_folders_are_served(model_folder: Path, tmp_path: Path) -> None:
    embed = tmp_path / "bge"
    embed.mkdir()
    (embed / "config.json").write_text('{"architectures": ["BertModel"]}')
    config = load_start(Start(models=(str(model_folder), str(embed)))).config
    assert [(m.id, m.task, m.path) for m in config.models] == [
        ("tiny", "generate", str(model_folder)),
        ("bge", "embed", str(embed)),
    ]
    assert config.devices.host_memory is None


def test_two_folders_of_one_name_are_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_start(Start(models=(str(model_folder), str(model_folder))))
    assert caught.value.problems == [
        "--model: models[tiny] is given for two local engines; keep one of them, or give the other its own id"
    ]


def test_without_a_file_or_folders_the_demo_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = tmp_path / "demo.toml"
    demo.write_text(CHAT)
    monkeypatch.setattr("proxy.config_load.demo_path", lambda: demo)
    loaded = load_start(Start())
    assert (loaded.source, loaded.base_dir, loaded.config.models[0].id) == (str(demo), tmp_path, "demo-chat")


def test_a_demo_without_its_models_says_how_to_make_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = tmp_path / "demo.toml"
    demo.write_text("[[backends]]\nname='v'\nkind='vllm'\n[[models]]\nid='a'\nbackend='v'\npath='m'")
    monkeypatch.setattr("proxy.config_load.demo_path", lambda: demo)
    with pytest.raises(ConfigError) as caught:
        load_start(Start())
    assert caught.value.problems == [
        f'{demo}: models[a].path is "{tmp_path}/m", which is no folder; put the model there, or name another',
        "that was the demo; `make models` makes what it needs, --model PATH or --config FILE serve your own",
    ]
    assert load_start(Start(engine="simulated")).config.backends[0].kind == "simulated"


def test_where_there_is_no_demo_the_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.config_load.DEMO", "configs/no-such-demo.toml")
    with pytest.raises(ConfigError) as caught:
        load_start(Start())
    assert caught.value.problems == [
        "nothing to serve: name a model's folder with --model PATH, or a file with --config FILE"
    ]


def test_a_file_and_folders_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as caught:
        load_start(Start(config="x.toml", models=("m",)))
    assert caught.value.problems == ["--model: x.toml says what is served; add the model there as a [[models]] entry"]


@pytest.mark.parametrize("admin", ["[::1]:8080", "127.0.0.2:8080", "127.0.0.1:8081", "machine:8080", "[::]:8080"])
def test_two_listeners_may_share_a_port_at_different_addresses(admin: str) -> None:
    load_text(f"[server]\nadmin_listen = '{admin}'\nadmin_keys = ['env:K']", "x.toml")


def test_a_mark_that_an_editor_puts_in_front_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(CHAT, encoding="utf-8-sig")
    assert load(tmp_path / "x.toml").models[0].id == "demo-chat"


def test_the_home_of_nobody_is_a_path_that_is_not_there() -> None:
    assert "~no-such-user/state" in load_text("[store]\ndir = '~no-such-user/state'", "x.toml").store.dir
