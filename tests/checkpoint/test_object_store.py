"""Checkpoints in an object store: the interface of Google Cloud Storage over a directory."""

import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from lmx.checkpoint.checkpointer import Checkpointer, load_subtree
from lmx.checkpoint.config import CheckpointConfig
from lmx.errors import UserError
from lmx.experiment import Experiment, RunDir


class Bucket(LocalFileSystem):
    """What etils reads and writes through: gs://bucket/x is the file bucket/x."""

    root: ClassVar[str]

    def __init__(self, **_: Any) -> None:
        super().__init__(auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).replace("gs://", f"{cls.root}/"))

    def glob(self, path: Any, **options: Any) -> list[str]:
        return [found.removeprefix(f"{self.root}/") for found in super().glob(path, **options)]


class Objects(BaseHTTPRequestHandler):
    """What Orbax's arrays go through: downloads, whole or in part, and uploads."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path(unquote(urlsplit(self.path).path.rpartition("/o/")[2]))
        if not path.is_file():
            return self._answer(404, b"")
        content, part = path.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None:
            return self._answer(200, content)
        first, last = int(part[1]), min(int(part[2]), len(content) - 1)
        where = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._answer(206, content[first : last + 1], where)

    def do_POST(self) -> None:
        (name,) = parse_qs(urlsplit(self.path).query)["name"]
        self._path(name).parent.mkdir(parents=True, exist_ok=True)
        self._path(name).write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, json.dumps({"name": name, "generation": "1"}).encode())

    def _path(self, name: str) -> Path:
        return Path(Bucket.root) / "bucket" / name

    def _answer(self, code: int, content: bytes, more: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": len(content), "x-goog-generation": 1, **more}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of what is in gs://bucket."""
    Bucket.root = str(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Objects) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GCE_METADATA_ROOT", f"127.0.0.1:{server.server_port}")  # where credentials would be
        monkeypatch.setitem(sys.modules, "gcsfs", ModuleType("gcsfs"))
        monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda _: Bucket())
        yield tmp_path / "bucket"
        server.shutdown()


def test_checkpoints_in_an_object_store(store: Path) -> None:
    state = {"params": {"w": jnp.arange(6000.0).reshape(60, 100)}, "step": jnp.int32(0)}
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    with Checkpointer("gs://bucket/run", CheckpointConfig(keep=2)) as checkpointer:
        assert checkpointer.restore(target) is None
        for step in (1, 2, 3):
            checkpointer.save(step, jax.tree.map(lambda a, s=step: a + s, state), {"rows": 8 * step})
    assert checkpointer.steps() == (2, 3)
    assert (store / "run" / "3" / "manifest.json").is_file()
    with Checkpointer("gs://bucket/run", CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore(target)
        assert restored is not None
        assert (restored.step, restored.meta, restored.skipped) == (3, {"rows": 24}, ())
        np.testing.assert_array_equal(restored.state["params"]["w"], state["params"]["w"] + 3)
        (array,) = (p for p in (store / "run" / "3").rglob("*") if p.is_file() and p.stat().st_size > 20_000)
        array.write_bytes(array.read_bytes()[:-1] + b"?")
        damaged = checkpointer.restore(target)
    assert damaged is not None
    assert (damaged.step, [step for step, _ in damaged.skipped]) == (2, [3])
    np.testing.assert_array_equal(load_subtree("gs://bucket/run", "params").state["w"], state["params"]["w"] + 2)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("gs://bucket/run", r"gs://bucket/run is in an object store, which needs gcsfs: pip install 'lmx\[gcs\]'"),
        ("s3://bucket/run", "s3://bucket/run: Orbax writes to file systems and to gs://; mount the bucket"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_sentence(
    address: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=words):
        Checkpointer(address, CheckpointConfig())
    with pytest.raises(UserError, match=words):  # asked before anything is prepared
        RunDir(tmp_path).checkpoints_of(Experiment(checkpoint=CheckpointConfig(directory=address)))
