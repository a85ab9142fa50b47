"""A small corpus, and pairs of files that are aligned by line."""

import random
from pathlib import Path

import pytest

from lmx.data.config import AlignedFiles, DataConfig, LocalFiles, TrainedBpe

TEXT = "the of and a to in is you that it he was for on are as with his they I x=1 def return self None"
WORDS = TEXT.split(" ")


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory, rng = tmp_path_factory.mktemp("documents"), random.Random(0)
    for index in range(40):
        words = rng.choices(WORDS, k=int(rng.lognormvariate(3, 1)) + 2)
        (directory / f"{index}.txt").write_text(f"{index} " + " ".join(words), encoding="utf-8")
    return DataConfig(sources=(LocalFiles(files=(str(directory),)),), tokenizer=TrainedBpe(320), held_out=0.1)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory, rng = tmp_path_factory.mktemp("pairs"), random.Random(1)
    lines = [rng.choices(WORDS, k=rng.randint(1, 12)) for _ in range(60)]
    write(directory / "en.txt", [" ".join(line) for line in lines])
    write(directory / "de.txt", [" ".join(reversed(line)) for line in lines])
    source = AlignedFiles(files=(str(directory / "en.txt"),), target_files=(str(directory / "de.txt"),))
    return DataConfig(sources=(source,), tokenizer=TrainedBpe(320), held_out=0.1)


def write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
