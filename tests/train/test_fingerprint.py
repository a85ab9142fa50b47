"""What bitwise repetition depends on is recorded, and told when it changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from lmx.errors import UserError
from lmx.experiment import RunDir
from lmx.files import write_json
from lmx.sharding.mesh import MeshConfig, build_mesh
from lmx.train import fingerprint as module
from lmx.train.fingerprint import compare, fingerprint


@pytest.fixture
def recorded() -> Any:
    """Makes this start's fingerprint."""
    prepared: Any = SimpleNamespace(fingerprint="data", tokenizer=SimpleNamespace(fingerprint="tokens"))
    return lambda: fingerprint(build_mesh(MeshConfig(data=1), jax.devices()[:1]), prepared)


def test_software_flags_settings_and_the_processor_are_recorded(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = RunDir(tmp_path), recorded()
    write_json(run.fingerprint, before)
    assert compare(run, recorded()) == []
    assert {"jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} <= set(before)
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("processor: 0\nmodel name\t: A Fast One\nflags\t: fpu avx2 fma sse2\n\nprocessor: 1\n")
    monkeypatch.setattr(module, "CPU", cpu)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--quick")
    monkeypatch.setattr(module, "version", lambda package: "9.9" if package == "optax" else before[package])
    with jax.default_matmul_precision("bfloat16"):
        changed = {sentence.split(" was ")[0]: sentence for sentence in compare(run, recorded())}
    assert set(changed) == {"optax", "device", "libtpu_init_args", "jax_default_matmul_precision"}
    assert "is now A Fast One (avx2 fma): losses agree up to rounding" in changed["device"]


def test_what_an_older_fingerprint_lacks_is_no_change(recorded: Any, tmp_path: Path) -> None:
    run, now = RunDir(tmp_path), recorded()
    write_json(run.fingerprint, {"jax": now["jax"], "data": "other", "tokenizer": "tokens"})
    with pytest.raises(UserError, match=r"the data of .* was other and is now data"):
        compare(run, now)
    write_json(run.fingerprint, {"jax": now["jax"], "data": "data", "tokenizer": "tokens"})
    assert compare(run, now) == []
