"""Files in the safetensors format, whole and broken, read and written; the library itself is the reference."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lmx.checkpoint.huggingface.files import DTYPES, read_header, write_file
from lmx.checkpoint.huggingface.tensors import find_tensors
from lmx.errors import UserError

SOME = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(3, dtype=np.int8),
    "c": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.float32),
}


def write(path, tensors):
    infos = {n: jax.ShapeDtypeStruct(np.shape(a), a.dtype) for n, a in tensors.items()}
    write_file(path, infos, tensors.__getitem__)


def test_reads_what_the_library_writes(tmp_path):
    save_file(SOME, tmp_path / "x")
    entries = read_header(tmp_path / "x")
    assert {n: (e.shape, e.dtype) for n, e in entries.items()} == {n: (a.shape, a.dtype) for n, a in SOME.items()}
    assert all(np.array_equal(entries[n].read(), a) for n, a in SOME.items())
    assert np.array_equal(entries["a"].read(slice(1, 3)), SOME["a"][1:3])
    assert entries["a"].read(slice(4, 4)).shape == (0, 6)


def test_what_is_read_owns_its_memory(tmp_path):
    """A mapped file would count as the process's memory."""
    save_file(SOME, tmp_path / "x")
    array = read_header(tmp_path / "x")["a"].read()
    while array.base is not None:
        array = array.base
    assert type(array) is np.ndarray
    assert array.flags.owndata


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "x", SOME)
    assert all(np.array_equal(a, SOME[n]) for n, a in load_file(tmp_path / "x").items())
    with safetensors.safe_open(tmp_path / "x", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(tmp_path, name):
    array = np.arange(6).reshape(2, 3).astype(DTYPES[name])
    write(tmp_path / "x", {"odd": np.zeros(3, np.int8), "array": array})
    entry = read_header(tmp_path / "x")["array"]
    assert entry.read().dtype == array.dtype
    assert entry.read().tobytes() == array.tobytes()
    assert entry.start % array.itemsize == 0
    stored = dict(safetensors.deserialize((tmp_path / "x").read_bytes()))["array"]
    assert (stored["dtype"], bytes(stored["data"])) == (name, array.tobytes())


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path):
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T
    write(tmp_path / "x", {"array": array})
    assert np.array_equal(read_header(tmp_path / "x")["array"].read(), array)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes, too few for its header"),
        (b"\0\0\0", "has 3 bytes, too few"),
        (file_of({"a": entry()})[:20], "has 20 bytes, too few"),
        (b"\xff" * 100, "too few for its header"),
        (file_of(b"{nonsense"), "its header cannot be understood .JSONDecodeError"),
        (file_of(b"\xff\xfe{}"), "its header cannot be understood .UnicodeDecodeError"),
        (file_of(b"[]"), "its header cannot be understood"),
        (file_of(b"[" * 99_999), "its header cannot be understood .RecursionError"),
        (file_of({"a": 3}), "its header cannot be understood"),
        (file_of({"a": {"dtype": "F32"}}), "its header cannot be understood .KeyError: 'data_offsets'"),
        (file_of({"a": entry("F31")}), "unknown dtype 'F31'"),
        (file_of({"a": entry(["F32"])}), "its header cannot be understood"),
        (file_of({"a": entry(shape=(-2,))}), "shape"),
        (file_of({"a": entry(shape=(2.0,))}), "shape"),
        (file_of({"a": entry(offsets=(0, 4))}), r"a \[2\] takes 8 bytes, but has 4"),
        (file_of({"a": entry(offsets=(4, 12))}), "a starts at byte"),
        (file_of({"a": entry(), "b": entry()}), "b starts at byte"),
        (file_of({"a": entry(), "b": entry(offsets=(8, 16))}), "its tensors end at byte .* but it has"),
        (file_of({"a": entry()}, b"\0" * 7), "its tensors end at byte .* but it has"),
        (file_of({"a": entry()}, b"\0" * 9), "its tensors end at byte .* but it has"),
    ],
)
def test_broken_files_are_named(tmp_path, content, words):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(UserError, match=rf"broken is not a whole safetensors file: .*{words}"):
        read_header(tmp_path / "broken")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_found_or_harmless(tmp_path, data):
    """Cut anywhere or with any byte changed, a file is refused, or what the header still says can be read."""
    write(tmp_path / "x", SOME)
    content = bytearray((tmp_path / "x").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "x").write_bytes(content)
    try:
        entries = read_header(tmp_path / "x")
    except UserError:
        return
    assert len(content) == sum(e.nbytes for e in entries.values()) + min(e.start for e in entries.values())
    assert all(e.read().shape == e.shape for e in entries.values())


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    write(tmp_path / "x", SOME)
    entries = read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-5])
    with pytest.raises(UserError, match="it ends within a tensor"):
        [e.read() for e in entries.values()]


def shard(path):
    """Two shards and their index."""
    write(path / "one.safetensors", {"a": SOME["a"]})
    write(path / "two.safetensors", {"b": SOME["b"]})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(tmp_path):
    shard(tmp_path)
    tensors = find_tensors(tmp_path)
    assert {n: tensors.info(n).shape for n in tensors} == {"a": (4, 6), "b": (3,)}
    assert np.array_equal(tensors.read("b", slice(1, 3)), [1, 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "two.safetensors").unlink(), "lacks two.safetensors of the 2 files that its model"),
        (lambda d: (d / "two.safetensors").write_bytes(b"x"), "two.safetensors is not a whole safetensors file"),
        (lambda d: write(d / "two.safetensors", {"c": SOME["b"]}), "lack b, which its model.safetensors.index.json"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json is not JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_bytes(b"\xff"), "index.json is not JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "a JSON list, expected an object"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one.safetensors"}}'),
            "has no weight_map from tensors to files beside it",
        ),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
    ],
    ids=["gone", "broken", "other tensors", "not JSON", "not text", "no object", "no map", "elsewhere", "no index"],
)
def test_broken_directories(tmp_path, damage, words):
    shard(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words):
        find_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=f"in {name} only, a pickle that can run any code"):
        find_tensors(tmp_path)
