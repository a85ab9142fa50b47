import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lmx.data import parts
from lmx.data.builders import local_files, python_stdlib
from lmx.data.builders.local_files import GROUP_BYTES, LINE_LIMIT
from lmx.data.config import LocalFiles, PythonStdlib, Source, Tfds
from lmx.data.documents import Documents, prepare_documents
from lmx.errors import UserError

ZIPPED = gzip.compress(b'{"text": "a line"}\n' * 3, mtime=0)


def documents_of(source: Source, tmp_path: Path) -> Documents:
    return prepare_documents(source, tmp_path / "cache", progress=False)


def texts(source: Source, tmp_path: Path) -> dict[str, str]:
    found = documents_of(source, tmp_path)
    names = [Path(found.document_name(i)).name for i in range(len(found))]
    return dict(zip(names, found.texts(range(len(found))), strict=True))


def test_each_small_text_file_is_a_document(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "b.txt").write_text("bé\r\n", newline="")
    (corpus / "sub" / "a.md").write_bytes(b"\xef\xbb\xbfmark")
    (corpus / "c.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (corpus / "blank.txt").write_text(" \n")
    source = LocalFiles(files=(str(corpus),))
    assert texts(source, tmp_path) == {"b.txt": "bé\r\n", "c.txt.gz": "zipped", "a.md": "mark"}
    assert documents_of(source, tmp_path).dropped == 1


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_a_large_text_becomes_documents_without_loss(tmp_path: Path, separator: str) -> None:
    text = separator.join(f"paragraph {i} of ünïcödé words" for i in range(40_000))
    (tmp_path / "big.txt").write_text(text)
    found = texts(LocalFiles(files=(str(tmp_path / "*.txt"),)), tmp_path)
    assert "".join(found.values()) == text
    assert max(len(t.encode()) for t in found.values()) <= 2 * LINE_LIMIT
    assert len(found) > len(text) / (2 * LINE_LIMIT)
    if separator == "\n\n":
        assert all(t.endswith("\n\n") for t in list(found.values())[:-1])
        assert np.median([len(t.encode()) for t in found.values()]) < 1.1 * GROUP_BYTES


def test_a_text_without_spaces_is_cut_between_characters(tmp_path: Path) -> None:
    text = "日本語é" * 150_000
    (tmp_path / "big.txt").write_text(text)
    assert "".join(texts(LocalFiles(files=(str(tmp_path / "*.txt"),)), tmp_path).values()) == text


def test_split_says_what_a_document_is(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(("word " * 400 + "\n\n") * 20)
    files = (str(tmp_path / "t.txt"),)
    assert len(texts(LocalFiles(files=files), tmp_path)) == 1
    assert len(texts(LocalFiles(files=files, split="paragraphs"), tmp_path)) == 4


def test_json_lines_in_stretches_give_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    rows = [{"body": f"row {i} " + "é" * (i % 40), "n": i} for i in range(200)]
    lines = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
    (tmp_path / "r.jsonl").write_text(lines)
    found = texts(LocalFiles(files=(str(tmp_path / "r.jsonl"),), text_column="body"), tmp_path)
    assert list(found.values()) == [row["body"] for row in rows]
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    zipped = texts(LocalFiles(files=(str(tmp_path / "z.jsonl.gz"),), text_column="body"), tmp_path)
    assert list(zipped.values()) == [row["body"] for row in rows]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    text = pyarrow.array([f"row {i}" for i in range(50)])
    for name, column in (("t.parquet", text), ("categories.parquet", text.dictionary_encode())):
        table = pyarrow.table({"text": column, "id": list(range(50))})
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=7)
        found = texts(LocalFiles(files=(str(tmp_path / name),)), tmp_path)
        assert found == {f"{name}#{i}": f"row {i}" for i in range(50)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", '[{"text": "one", "n": 1}, {"text": "LONG", "n": 2}]'),
        ("t.csv", "n,text\n1,one\n2,LONG\n"),
        ("t.jsonl", '{"text": "one"}\n{"text": "LONG"}\n'),
    ],
)
def test_every_kind_of_table_gives_its_column(tmp_path: Path, name: str, content: str) -> None:
    long = "two " * 50_000
    (tmp_path / name).write_text("\ufeff" + content.replace("LONG", long), encoding="utf-8")  # as Windows writes it
    assert list(texts(LocalFiles(files=(str(tmp_path / name),)), tmp_path).values()) == ["one", long]


def test_a_prepared_tfds_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    own = documents_of(LocalFiles(files=(str(tmp_path / "*.txt"),)), tmp_path)
    found = documents_of(Tfds(name=own.dataset.directory), tmp_path)
    assert list(found.texts(range(2))) == ["one", "two"]
    assert found.fingerprint == own.fingerprint
    assert found.name == "local_files"
    assert len(documents_of(Tfds(name=own.dataset.directory, split="train[:1]"), tmp_path)) == 1


def parquet(text: list[bytes]) -> bytes:
    """A file whose column is said to be UTF-8."""
    file, binary = io.BytesIO(), pyarrow.array(text)
    column = pyarrow.StringArray.from_buffers(len(text), *binary.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file, compression="none", use_dictionary=False)
    return file.getvalue()


def write(tmp_path: Path, name: str, data: bytes) -> Path:
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.txt", b"fine \xff not", r"bad.txt is not valid UTF-8 \(byte 5 is 0xff\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', r"bad.jsonl@14 \(a byte offset\) is not a line of JSON"),
        ("other.jsonl", b'{"body": "a"}\n', r"no column 'text' \(it has body\): set text_column"),
        ("number.jsonl", b'{"text": 3}\n', "column 'text' is 3, expected text"),
        ("bad.parquet", b"PAR", "is not a Parquet file"),
        ("text.parquet", parquet([b"fine", b"\xff"]), "text.parquet, row group 0, has text that is not valid UTF-8"),
        ("page.parquet", parquet([b"fine"]).replace(b"PAR1\x15", b"PAR1\xff", 1), "row group 0, cannot be read"),
        ("bad.txt.gz", b"plain", "is not a whole gzip file"),
        ("half.txt.gz", ZIPPED[: len(ZIPPED) // 2], "is not a whole gzip file"),
        ("half.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], "is not a whole gzip file"),
        ("bits.jsonl.gz", ZIPPED[:10] + b"\xff" + ZIPPED[11:], "is not a whole gzip file"),
        ("config.json", b'{"layers": 2}', "config.json is neither a list of objects nor SQuAD"),
        ("blank.txt", b"  \n", "no documents with text in LocalFiles"),
        ("empty.txt", b"", "no documents with text in LocalFiles"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    source = LocalFiles(files=(str(write(tmp_path, name, data)),))
    with pytest.raises(UserError, match=message):
        documents_of(source, tmp_path)


def test_invalid_utf8_far_into_a_large_file_is_placed(tmp_path: Path) -> None:
    data = b"line of text\n" * 200_000
    write(tmp_path, "big.txt", data + b"\xfe\n")
    with pytest.raises(UserError, match=rf"byte {len(data)} is 0xfe"):
        documents_of(LocalFiles(files=(str(tmp_path / "big.txt"),)), tmp_path)


def test_a_parquet_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="column 'text' is int64, expected text"):
        documents_of(LocalFiles(files=(str(tmp_path / "t.parquet"),)), tmp_path)
    with pytest.raises(UserError, match=r"no column 'body' \(it has text\)"):
        documents_of(LocalFiles(files=(str(tmp_path / "t.parquet"),), text_column="body"), tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LocalFiles(), "LocalFiles has no files"),
        (LocalFiles(files=("/nowhere/*.txt",)), "no file matches '/nowhere"),
        (Tfds(), "Tfds has no name"),
        (Tfds(name="no_such_dataset"), "'no_such_dataset' cannot be loaded without TensorFlow"),
        (Source(), "Source is no source of documents"),
    ],
)
def test_sources_that_name_nothing_are_refused(tmp_path: Path, source: Source, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents_of(source, tmp_path)


def test_a_tfds_directory_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", b"one")
    directory = documents_of(LocalFiles(files=(str(tmp_path / "a.txt"),)), tmp_path).dataset.directory
    with pytest.raises(UserError, match=r"no feature 'body' \(it has .*text"):
        documents_of(Tfds(name=directory, text_column="body"), tmp_path)
    with pytest.raises(UserError, match=r"no split 'test' \(it has train\)"):
        documents_of(Tfds(name=directory, split="test"), tmp_path)
    info = Path(directory) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="in tfrecord files, which need TensorFlow"):
        documents_of(Tfds(name=directory), tmp_path)


def test_the_standard_library_has_modules_with_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = python_stdlib.PythonStdlib.spans(PythonStdlib())
    assert len(spans) > 500
    assert not any("site-packages" in span.path for span in spans)
    [span] = [s for s in spans if s.path.endswith("/textwrap.py")]
    [record] = python_stdlib.PythonStdlib.records(PythonStdlib(), span)
    assert record is not None
    assert record["path"] == "textwrap.py"
    assert record["text"] == Path(span.path).read_text()
    found = {name: (code, doc) for name, code, doc in json.loads(record["docstrings"])}
    code, doc = found["dedent"]
    assert doc.startswith("Remove any common leading whitespace")
    assert code.startswith("def dedent(text):")
    assert "Remove any common" not in code
    assert "return text" in code


def test_a_module_that_does_not_decode_is_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, "bad.py", b"# coding: utf-8\nx = '\xff'\n")
    span = local_files.Span(str(path), 10)
    assert list(python_stdlib.PythonStdlib.records(PythonStdlib(), span)) == [None]
