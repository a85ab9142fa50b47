"""What every test shares: 8 virtual CPU devices, caches of their own, and tiny models."""

# ruff: noqa: E402

import dataclasses
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

LONGEST = ("families", "check_mesh_pairs", "faults", "pipeline", "recipes", "sequence", "step_families")
"""The files that take longest, by what follows ``test_``: they start first, so that both processes end together."""
MAPPINGS = 20_000
"""Memory mappings from which on a process forgets its programs between two files of tests."""
BESIDE_TRAINING = ("data", "eval", "sample", "checkpoint", "init_from")
"""Fields of an experiment that its programs do not read."""
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "jax-compiled"
# Before JAX is imported, and for the processes that tests start too. Those after the first make compiling much faster;
# newer compilers do not know the last.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from goldens import Golden, load_golden
from jax._src.interpreters import mlir

from lmx.cli.main import COLLECT

gc.set_threshold(*COLLECT)
CONTEXT_USES = 100


def reused(make: Callable[[], Any]) -> Callable[[], Any]:
    """Makes an MLIR context for every hundredth program of a thread (JAX from 0.12 on: for every tenth): to make one
    takes as long as to compile a small program."""
    own = threading.local()

    def context() -> Any:
        own.count = getattr(own, "count", 0)
        if own.count % CONTEXT_USES == 0:
            own.context = make()
        own.count += 1
        return own.context

    return context


if version("jax").startswith("0.10."):
    mlir.make_ir_context = reused(mlir.make_ir_context)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else in its order."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_sessionfinish() -> None:
    """pytest collects garbage five times at the end, to tell of what was not closed: not through all programs."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMX_CACHE", str(tmp_path_factory.mktemp("lmx-cache")))
        yield Path(os.environ["LMX_CACHE"])


@pytest.fixture(scope="session", autouse=True)
def alike_runs_share_their_programs() -> Iterator[None]:
    """Runs that train alike compile once. That compiling anew changes no bit is for the check of faults."""
    from lmx.train import evaluation, loop, start

    programs: dict[Any, Any] = {}

    def shared(
        compile_: Callable[..., Any], read_by: Callable[[Any], Any], experiment: Any, sharding: Any, *more: Any
    ) -> Any:
        if any(more):  # frozen models are arrays, which are nobody's key
            return compile_(experiment, sharding, *more)
        key = compile_, read_by(experiment), sharding
        if key not in programs:
            programs[key] = compile_(experiment, sharding, *more)
        return programs[key]

    def by_init(experiment: Any) -> Any:
        return experiment.model, experiment.adapter, experiment.optimizer, experiment.train.ema

    def by_training(experiment: Any) -> Any:
        fields = (f.name for f in dataclasses.fields(experiment))
        return tuple(getattr(experiment, name) for name in fields if name not in BESIDE_TRAINING)

    patched = ((start, "jit_init", by_init), (loop, "jit_step", by_training), (evaluation, "jit_sums", by_training))
    with pytest.MonkeyPatch.context() as patch:
        for module, name, read_by in patched:
            patch.setattr(module, name, functools.partial(shared, getattr(module, name), read_by))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs_are_kept() -> Iterator[None]:
    """Compiled programs hold memory mappings, of which a process may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each tiny model in turn."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def gpt2() -> Golden:
    """Learned positions, biases, a tied table."""
    return load_golden("gpt2")


@pytest.fixture(scope="session")
def llama() -> Golden:
    """Rotary positions, grouped queries, a table of its own."""
    return load_golden("llama")
