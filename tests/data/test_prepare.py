import base64
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmx.data import cache, parts, records, tokens
from lmx.data import prepare as preparing
from lmx.data.config import DataConfig, LocalFiles, Tokenizer, TokenizerFile, TrainedBpe
from lmx.data.layout import NextTokens
from lmx.data.prepare import Prepared, prepare
from lmx.errors import Interrupted, LmxError, UserError
from lmx.experiment import Experiment
from lmx.models.families.llama import Llama
from tests.data.conftest import config_of, write_corpus


def contents(prepared: Prepared) -> dict[str, bytes]:
    """All tokens of the store and the tokenizer, by file name."""
    found = [f for d in ("tokens", "tokenizers") for f in (prepared.root / d).rglob("*") if f.is_file()]
    return {str(f.relative_to(prepared.root)): f.read_bytes() for f in found}


def test_texts_and_counts_agree(prepared: Prepared, corpus: Path) -> None:
    files = {f.read_text(encoding="utf-8") for f in corpus.glob("*.txt")}
    train, held_out = list(prepared.texts("train")), list(prepared.texts("held_out"))
    assert {*train, *held_out} == files
    assert not set(train) & set(held_out)
    assert 0 < len(held_out) < 20
    stats = prepared.stats()["sources"]["local_files"]
    assert stats["documents"] == len(files) == 80
    assert stats["held_out_documents"] == len(held_out)
    assert stats["bytes"] == sum(len(t.encode()) for t in files)
    assert stats["tokens"] == sum(len(prepared.tokenizer.encode(t)) for t in files)
    assert stats["dropped"] == 0
    assert "<|endoftext|>" in (next((prepared.root / "tokenizers").rglob("tokenizer.json"))).read_text()


def test_the_store_holds_each_document_between_two_ends(prepared: Prepared) -> None:
    [source] = prepared.sources
    end = prepared.tokenizer.end_id
    for index, text in enumerate(source.documents.texts(range(80))):
        stream = [end, *prepared.tokenizer.encode(text), end]
        assert source.tokens.lengths[index] == len(stream) - 2
        for start in (0, 1, len(stream) // 2):
            got = source.tokens.stream(index, start, len(stream) - start)
            assert got.dtype == np.int32
            assert got.tolist() == stream[start:]
        assert source.tokens.stream(index, 0, 2).tolist() == stream[:2]


@pytest.mark.parametrize("kind", ["trained", "file"])
def test_a_tokenizer_may_be_refused_before_any_text_is_tokenized(
    kind: str, prepared: Prepared, corpus: Path, tmp_path: Path
) -> None:
    prepared.save_tokenizer(tmp_path / "own")
    given = {"trained": TrainedBpe(vocab_size=300), "file": TokenizerFile(path=str(tmp_path / "own"))}[kind]
    config = config_of(corpus, tmp_path / "cache", tokenizer=given)
    small = Experiment(data=config, model=Llama(vocab=200))
    with pytest.raises(UserError, match=r"model\.vocab 200 is smaller than the tokenizer's \d+ tokens"):
        prepare(config, progress=False, accept=small.check_tokenizer)
    made = {path.name for path in (tmp_path / "cache").glob("*")}
    assert "tokens" not in made
    assert ("documents" in made) == (kind == "trained")


def test_a_tiktoken_file_read_in_another_way_is_another_tokenizer(corpus: Path, tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (tmp_path / "own.tiktoken").write_text("\n".join(lines))
    for pattern in (r"\S+|\s+", r"\w+|\W+"):
        own = TokenizerFile(path=str(tmp_path / "own.tiktoken"), pattern=pattern, special_tokens=(("<|end|>", 256),))
        config = config_of(corpus, tmp_path / "cache", tokenizer=replace(own, end_token="<|end|>"))
        assert prepare(config, progress=False).tokenizer.vocab_size == 257


def test_statistics_are_json_and_say_what_packing_gives(prepared: Prepared) -> None:
    stats = json.loads(json.dumps(prepared.stats(64)))["sources"]["local_files"]
    positions = stats["tokens"] + stats["documents"] - stats["held_out_tokens"] - stats["held_out_documents"]
    assert stats["rows"] * 64 * (1 - stats["padding"]) == pytest.approx(positions, rel=1e-4)
    assert stats["cut"] > 0
    assert stats["truncated"] == 0
    assert "truncated" not in prepared.stats()["sources"]["local_files"]  # nobody knows before it is packed
    tokens, rows = stats["tokens"], stats["rows"] + stats["held_out_rows"]
    (told,) = prepared.notes(NextTokens(64))
    assert told.startswith(f"local_files: 80 documents (10 held out), {tokens:,} tokens in {rows} rows, 0 dropped, ")
    assert told.endswith(f"0 truncated, {stats['padding']:.2%} padding")


class Bar:
    """Takes the place of a progress bar."""

    def __init__(self) -> None:
        self.labels, self.bytes = list[str](), 0

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, label: str, total: int) -> None:
        self.labels.append(label)

    def update(self, task: None, description: str, completed: int) -> None:
        self.labels.append(description)

    def advance(self, task: None, size: int) -> None:
        self.bytes += size


def test_training_a_tokenizer_shows_progress(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = list[Bar]()
    monkeypatch.setattr(parts, "bytes_progress", lambda: bars.append(Bar()) or bars[-1])
    prepare(dataclasses.replace(prepared.config, cache_dir=str(tmp_path)), progress=True)
    (own,) = (bar for bar in bars if "Training the tokenizer" in bar.labels)
    assert own.bytes == sum(len(text.encode()) for text in prepared.texts("train"))


def test_preparing_again_reads_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "run_parts", None)
    monkeypatch.setattr(records, "open_records", None)
    start = time.perf_counter()
    again = prepare(prepared.config, progress=False)
    assert time.perf_counter() - start < 0.3
    assert again.fingerprint == prepared.fingerprint


def test_copies_on_another_machine_have_the_same_fingerprint(prepared: Prepared, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "moved")
    moved = prepare(config_of(tmp_path / "moved", tmp_path / "cache"), progress=False)
    assert moved.fingerprint == prepared.fingerprint


def test_held_out_documents_stay_held_out_as_the_corpus_grows(prepared: Prepared, tmp_path: Path) -> None:
    bigger = write_corpus(tmp_path / "bigger")
    for index in range(40):
        (bigger / f"0{index}new.txt").write_text(f"new {index}")
    grown = prepare(config_of(bigger, tmp_path / "cache"), progress=False)
    assert set(prepared.texts("held_out")) <= set(grown.texts("held_out"))
    assert set(prepared.texts("train")) <= set(grown.texts("train"))


def test_a_small_corpus_holds_one_document_out(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=3)
    few = prepare(config_of(corpus, tmp_path / "cache", held_out=1e-9), progress=False)
    assert len(list(few.texts("held_out"))) == 1
    none = prepare(config_of(corpus, tmp_path / "cache", held_out=0.0), progress=False)
    assert list(none.texts("held_out")) == []


def test_workers_give_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    config = dataclasses.replace(prepared.config, cache_dir=str(tmp_path / "cache"))
    assert contents(prepare(config, workers=2, progress=False)) == contents(prepared)


@pytest.mark.parametrize("stage", ["write_part", "index_part", "encode_part"])
def test_preparation_goes_on_where_it_stopped(
    stage: str, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmx.data.builders import base

    monkeypatch.setattr(parts, "PART_BYTES", 2_000)
    config = dataclasses.replace(prepared.config, cache_dir=str(tmp_path / "cache"))
    module = {"write_part": base, "index_part": records, "encode_part": tokens}[stage]
    original, calls = getattr(module, stage), list[Path]()

    def stops_at_the_third(part: object) -> object:
        calls.append(Path())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(part)

    monkeypatch.setattr(module, stage, stops_at_the_third)
    with pytest.raises(Interrupted, match="finished parts are kept: run the same command again") as stopped:
        prepare(config, progress=False)
    assert stopped.value.exit_code == 75
    made = list[Path]()
    whole_dir = cache.whole_dir
    monkeypatch.setattr(cache, "whole_dir", lambda target: made.append(target) or whole_dir(target))
    monkeypatch.setattr(module, stage, original)
    again = prepare(config, progress=False)
    assert again.fingerprint == prepared.fingerprint
    assert list(again.texts("train")) == list(prepared.texts("train"))
    folder = {"write_part": "parts", "index_part": "index", "encode_part": "tokens"}[stage]
    names = sorted(t.name for t in made if folder in (t.parent.name, t.parent.parent.name))
    assert names[0] == "000002"  # the first two parts are there


KILLED = """
import sys
from pathlib import Path
from lmx.data import parts
from lmx.data.prepare import prepare
from tests.data.conftest import config_of
parts.PART_BYTES = 2_000
print("ready", flush=True)
prepare(config_of(Path(sys.argv[1]), Path(sys.argv[2])), progress=False)
"""


def test_killed_at_random_moments_it_ends_with_the_same_data(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    monkeypatch.setattr(parts, "PART_BYTES", 2_000)  # as the killed ones: parts are known by their numbers alone
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.3, 1.0))
            child.send_signal(signal.SIGKILL)
    after = prepare(config_of(corpus, tmp_path), progress=False)
    assert after.sources[0].documents.fingerprint == prepared.sources[0].documents.fingerprint
    assert after.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    assert after.fingerprint == prepared.fingerprint
    assert list(after.texts("train")) == list(prepared.texts("train"))
    assert [after.sources[0].tokens.stream(i, 0, 3).tolist() for i in range(80)] == [
        prepared.sources[0].tokens.stream(i, 0, 3).tolist() for i in range(80)
    ]
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not list(tmp_path.rglob("incomplete.*"))


def test_a_changed_source_is_prepared_anew(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=10)
    config = config_of(corpus, tmp_path / "cache")
    before = prepare(config, progress=False)
    (corpus / "005.txt").write_text("something else")
    after = prepare(config, progress=False)
    assert after.fingerprint != before.fingerprint
    assert "something else" in [*after.texts("train"), *after.texts("held_out")]


def drop_last_merge(file: Path) -> None:
    data = json.loads(file.read_text())
    del data["model"]["merges"][-1]
    file.write_text(json.dumps(data))


def test_a_tokenizer_file_that_changed_is_refused(prepared: Prepared, corpus: Path, tmp_path: Path) -> None:
    prepared.tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    config = config_of(corpus, tmp_path / "cache", tokenizer=TokenizerFile(path=str(file)))
    assert prepare(config, progress=False).fingerprint == prepared.fingerprint
    drop_last_merge(file)
    with pytest.raises(UserError, match=r"tokenizer.json has changed since tokens were made with it"):
        prepare(config, progress=False)


def test_a_trained_tokenizer_changed_in_the_cache_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = config_of(corpus, tmp_path)
    prepare(config, progress=False)
    file = next((tmp_path / "tokenizers").rglob("tokenizer.json"))
    drop_last_merge(file)
    with pytest.raises(UserError, match="has changed since tokens were made with it"):
        prepare(config, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "no sources"),
        ({"held_out": 1.5}, "held_out is 1.5"),
        ({"held_out": -0.1}, "held_out is -0.1"),
        ({"sources": (LocalFiles(weight=0.0),)}, "LocalFiles has weight 0.0"),
        ({"sources": (LocalFiles(weight=float("nan")),)}, "LocalFiles has weight nan"),
        ({"tokenizer": Tokenizer()}, "Tokenizer is no tokenizer"),
        ({"tokenizer": TokenizerFile(path="none.json")}, "no tokenizer file 'none.json'"),
        ({"tokenizer": TrainedBpe(vocab_size=9)}, "vocab_size is 9"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, object], message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config_of(corpus, tmp_path, **changes), progress=False)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("800 requested and 0 written"),
        RuntimeError("write() failed: No space left on device; writing x"),
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing_half_made(
    error: Exception, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = np.save

    def full(file: Path, array: np.ndarray) -> None:
        if Path(file).name == "offsets.npy":
            Path(file).write_bytes(b"half")
            raise error
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="no space left for prepared data in"):
        prepare(config_of(corpus, tmp_path), progress=False)
    assert not list(tmp_path.rglob("offsets.npy"))
    monkeypatch.setattr(np, "save", save)
    prepare(config_of(corpus, tmp_path), progress=False)


def test_other_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), preparing.explained(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_errors_in_a_worker_process_arrive(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=3)
    (corpus / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"zz.txt is not valid UTF-8"):
        prepare(config_of(corpus, tmp_path / "cache"), workers=2, progress=False)


def test_a_killed_worker_is_said() -> None:
    job = records.RecordsPart(records.Dataset("nowhere"), 0, 1, 1, Path())
    with pytest.raises(LmxError, match="a worker process was killed"):
        parts.run_parts(die, [job], label="", workers=2, progress=False)


def die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_cache_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMX_CACHE", str(tmp_path))
    assert cache.cache_root("") == tmp_path
    assert cache.cache_root(str(tmp_path / "own")) == tmp_path / "own"
    monkeypatch.delenv("LMX_CACHE")
    assert cache.cache_root("") == Path.home() / ".cache" / "lmx"


def test_configurations_are_data() -> None:
    from lmx import config

    tokenizer = TokenizerFile(path="x", special_tokens=(("<e>", 5),))
    written = DataConfig(sources=(LocalFiles(files=("a", "b")),), tokenizer=tokenizer)
    assert config.from_data(DataConfig, json.loads(json.dumps(config.to_data(written)))) == written
