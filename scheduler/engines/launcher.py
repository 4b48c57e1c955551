"""The warm launcher: imports vLLM once, then forks each engine asked for, in seconds instead of half a minute.

Of a plain start all but a few seconds are imports of vLLM, in two processes. Here they happen once, and the forks share
the imported pages. The file is run by its path with the Python of the engine's environment, where vramp may not be
installed: standard library and vLLM only. It holds no model, no key and no socket but the keeper's, and dies with the
keeper. The protocol, JSON packets over the socket named by VRAMP_LAUNCHER_FD, stands in `scheduler.engines.keeper`.

It is an optimisation with a fallback, so it checks what it builds on and says `unusable` rather than hope: another
vLLM than it was tried with, a second thread (a lock held by a thread that fork does not copy stays locked for ever),
an initialised CUDA (whose contexts do not survive a fork). An order it cannot carry out it answers with `failed`.

vLLM's own processes must be forks too, or the imports come back. On a GPU vLLM forks when its environment says so; on
the CPU it insists on `spawn`, and the function that hands out the method is replaced in the modules that use it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from typing import Any

PR_SET_PDEATHSIG = 1
PACKET_LIMIT = 1 << 18
TRIED_VERSIONS = ("0.32.",)
COMMON_ARCHITECTURE = "LlamaForCausalLM"  # its module brings in the layers that nearly every other is made of
IMPORTS = (
    "vllm",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.registry",
    "transformers",
    "xgrammar",
)
CPU_IMPORTS = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")
GPU_IMPORTS = ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner")
SPAWNING_MODULES = (
    "vllm.v1.engine.utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
    "vllm.utils.system_utils",
)

_LIBC = ctypes.CDLL(None, use_errno=True)

Order = dict[str, Any]


class Unusable(Exception):
    """Something this launcher builds on is not as it must be; engines are started the plain way instead."""


class ForkFailed(Exception):
    """This one engine could not be forked."""


# -- imports, once -------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Import vLLM, make its processes forks, and check that forking is safe. Some ten seconds. Raises Unusable."""
    try:
        vllm = importlib.import_module("vllm")
        version = str(getattr(vllm, "__version__", "unknown"))
        if not version.startswith(TRIED_VERSIONS):
            raise Unusable(f"vLLM {version} has not been tried with warm starts, only {', '.join(TRIED_VERSIONS)}x")
        for name in IMPORTS:
            importlib.import_module(name)
        on_cpu = bool(importlib.import_module("vllm.platforms").current_platform.is_cpu())
        for name in CPU_IMPORTS if on_cpu else GPU_IMPORTS:
            importlib.import_module(name)
        learn_architecture(COMMON_ARCHITECTURE)
        make_vllm_fork(on_cpu)
    except Unusable:
        raise
    except Exception as error:  # an import may raise anything
        raise Unusable(f"{type(error).__name__}: {error}") from error
    check_fork_is_safe()
    # What is here now lives as long as any fork: their collectors need not walk it, and so not copy its pages.
    gc.collect()
    gc.freeze()


def learn_architecture(name: str) -> None:
    """Import a model's module and register its class. Raises what the import raises.

    Otherwise every fork imports it again, and before it is known to vLLM's cache a whole process is started to inspect
    it. A name that vLLM does not know is left for the engine to complain about.
    """
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    known = registry.models.get(name)
    if known is not None and hasattr(known, "module_name"):  # lazy: named, not imported yet
        registry.register_model(name, known.load_model_cls())


def make_vllm_fork(on_cpu: bool) -> None:
    """Have vLLM fork its processes; raises AttributeError where it no longer has what is replaced here."""
    if not on_cpu:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        return
    context = multiprocessing.get_context("fork")
    for name in SPAWNING_MODULES:
        module = importlib.import_module(name)
        module.get_mp_context  # noqa: B018  replacing what is not there would silently bring `spawn` back
        module.get_mp_context = lambda: context  # type: ignore[attr-defined]


def check_fork_is_safe() -> None:
    """Raises Unusable. Called before every fork: a library may start a thread at any time."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise Unusable(f"the launcher has {threads} threads, and a fork copies only one")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise Unusable("CUDA is initialised in the launcher, and does not survive a fork")


# -- one engine ----------------------------------------------------------------------------------------------------


def fork_engine(order: Order) -> int | None:
    """Fork an engine and return its pid; returns None in the engine. Raises ForkFailed and Unusable in the launcher.

    Forked twice, so that the keeper, a subreaper, becomes its parent. The engine goes on only when it is told that the
    process between has gone: a parent-death signal asked for before that would be that process's death.
    """
    if order["argv"][1:2] != ["-m"] or len(order["argv"]) < 3:
        raise ForkFailed("only `python -m MODULE` can be forked")
    check_fork_is_safe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what is left in a buffer here would be written by every fork too
    try:
        with open(order["log"], "ab") as log:
            return _fork_twice(order, log.fileno())
    except OSError as error:
        raise ForkFailed(str(error)) from error


def _fork_twice(order: Order, log_fd: int) -> int | None:
    keeper = os.getppid()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        between = os.fork()
        if between == 0:
            ours.close()
            _leave_an_orphan(theirs)
            _become_engine(order, theirs, keeper, log_fd)
            return None
        theirs.close()
        os.waitpid(between, 0)
        pid = ours.recv(32)
        if not pid:
            raise ForkFailed("no memory or process left for it")
        ours.send(b"go")
        return int(pid)


def _leave_an_orphan(theirs: socket.socket) -> None:
    """Returns in the second fork only, which leads a session of its own; the first ends here."""
    try:
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        theirs.send(str(os.getpid()).encode())
    except BaseException:  # unwinding would leave a second launcher behind
        os._exit(1)


def _become_engine(order: Order, theirs: socket.socket, keeper: int, log_fd: int) -> None:
    try:
        if theirs.recv(8) != b"go":  # the launcher is dead; the keeper starts this engine in the plain way
            os._exit(1)
        die_with(keeper)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        reset_signals()
        os.environ.update(order["env"])
        os.environ.pop("VRAMP_LAUNCHER_FD", None)
        tempfile.tempdir = None  # found out again, in case the order's TMPDIR is another
        if order["cwd"]:
            os.chdir(order["cwd"])
    except OSError as error:
        os.write(2, f"{error}\n".encode())
        os._exit(1)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends; ends it now if that has happened already."""
    _LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def reset_signals() -> None:
    """Python's own handlers, as in a process just started."""
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def children_die_with_us() -> None:
    """Have each fork of this process die with it: kill -9 of vLLM's API server then takes its EngineCore along.

    Only forks of the main thread, because the signal comes when the forking *thread* ends.
    """
    parent = 0

    def before() -> None:
        nonlocal parent
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0

    def in_child() -> None:
        if parent:
            die_with(parent)

    os.register_at_fork(before=before, after_in_child=in_child)


def set_threads() -> None:
    """Obey OMP_NUM_THREADS of the order: the library read it when it was loaded, when it had to be 1.

    In the forks of the engine only, which do the arithmetic: threads started now would be lost to them.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if torch is not None and wanted.isdigit() and int(wanted) > 1:
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(int(wanted)))


def run_engine(order: Order) -> None:
    """What `python -m MODULE ARGS...` does. The interpreter then ends as after any program, exit handlers included."""
    children_die_with_us()
    set_threads()
    sys.argv[:] = order["argv"][2:]
    sys.modules.pop(sys.argv[0], None)  # imported already, and about to run as __main__, of which runpy warns
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


# -- the launcher --------------------------------------------------------------------------------------------------


def serve(keeper: socket.socket) -> Order | None:
    """Answer orders until the keeper hangs up: None. Returns an order in the engine that was forked for it."""
    while packet := keeper.recv(PACKET_LIMIT):
        order: Order = json.loads(packet)
        try:
            for name in architectures(order["argv"]):
                learn_architecture(name)
            pid = fork_engine(order)
        except Exception as error:  # learning a model runs its module, which may raise anything
            tell(keeper, op="failed", id=order["id"], reason=f"{type(error).__name__}: {error}")
            continue
        if pid is None:
            return order
        tell(keeper, op="forked", id=order["id"], pid=pid)
    return None


def architectures(argv: list[str]) -> list[str]:
    """The model classes that the engine will need, from the config.json of its model folder."""
    try:
        with open(os.path.join(argv[argv.index("--model") + 1], "config.json"), encoding="utf-8") as file:
            return [str(name) for name in json.load(file)["architectures"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # the engine will say what is wrong with it, and in its own log


def tell(keeper: socket.socket, **message: Any) -> None:
    """One packet. Raises OSError when the keeper has gone, which ends the launcher."""
    keeper.send(json.dumps(message).encode())


def main() -> None:
    """Prepare, then serve; in a forked engine go on as vLLM."""
    keeper = socket.socket(fileno=int(os.environ["VRAMP_LAUNCHER_FD"]))
    keeper.set_inheritable(False)
    with keeper:
        try:
            prepare()
        except Unusable as error:
            return tell(keeper, op="unusable", reason=str(error))
        tell(keeper, op="ready")
        order = serve(keeper)
    return run_engine(order) if order is not None else None


if __name__ == "__main__":
    # Python put this file's folder first, and the vllm.py beside it is not the one that is meant.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # read when the libraries are loaded, and they start threads otherwise
    die_with(os.getppid())
    main()
