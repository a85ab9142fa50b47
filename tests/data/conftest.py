import random
from pathlib import Path

import pytest

from lmx.data.config import DataConfig, LocalFiles, TrainedBpe
from lmx.data.prepare import Prepared, prepare

TEXT = "the of and a to in is you that it he was for on are as with his they I café 日本 naïve x=1 def\n\n"
WORDS = TEXT.split(" ")


def write_corpus(directory: Path, documents: int = 80, seed: int = 0) -> Path:
    """Text files of very different lengths."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index in range(documents):
        words = rng.choices(WORDS, k=int(rng.lognormvariate(4, 1)) + 1)
        (directory / f"{index:03d}.txt").write_text(f"{index} " + " ".join(words), encoding="utf-8")
    return directory


def config_of(corpus: Path, cache: Path, **changes: object) -> DataConfig:
    defaults = {
        "sources": (LocalFiles(files=(str(corpus),)),),
        "tokenizer": TrainedBpe(vocab_size=300),
        "held_out": 0.1,
        "cache_dir": str(cache),
    }
    return DataConfig(**(defaults | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(config_of(corpus, tmp_path_factory.mktemp("cache")), progress=False)


@pytest.fixture(scope="session")
def mixture(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    other = write_corpus(tmp_path_factory.mktemp("other"), documents=25, seed=1)
    sources = (
        LocalFiles(files=(str(corpus),), weight=3.0),
        LocalFiles(files=(str(other),), weight=1.0),
    )
    return prepare(config_of(corpus, tmp_path_factory.mktemp("cache"), sources=sources), progress=False)
