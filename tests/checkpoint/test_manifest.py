import json

import pytest
from etils import epath

from lmx.checkpoint import manifest


@pytest.fixture
def step(tmp_path):
    directory = epath.Path(tmp_path) / "7"
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "meta.json").write_text('{"row": 3}')
    (directory / "state" / "d" / "0").write_bytes(bytes(range(256)) * 9)
    (directory / "state" / "empty").write_bytes(b"")
    manifest.write(directory, 7)
    return directory


def test_good_data_has_no_problem(step):
    assert manifest.exists(step)
    assert manifest.problem(step, 7) is None


def test_lists_every_file_for_a_person(step):
    files = json.loads((step / "manifest.json").read_text())["files"]
    assert set(files) == {"meta.json", "state/d/0", "state/empty"}
    assert files["state/d/0"]["bytes"] == 256 * 9


def test_finds_any_flipped_bit(step):
    for name in ("meta.json", "state/d/0", "manifest.json"):
        file = step / name
        good = file.read_bytes()
        for position in range(0, 8 * len(good), 61):
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            file.write_bytes(bytes(bad))
            assert manifest.problem(step, 7), (name, position)
        file.write_bytes(good)
    assert manifest.problem(step, 7) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda d: (d / "state" / "d" / "0").write_bytes(b"x" * 100),
            "state/d/0 has 100 bytes, expected 2304",
        ),
        (lambda d: (d / "state" / "empty").unlink(), "state/empty cannot be read"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda d: (d / "manifest.json").write_text('{"step": 7'), "manifest.json is damaged"),
        (lambda d: (d / "manifest.json").write_text("[]\n"), "manifest.json is damaged"),
    ],
)
def test_names_the_damage(step, damage, reason):
    damage(step)
    assert reason in str(manifest.problem(step, 7))


def test_a_step_under_another_name_is_not_that_step(step):
    assert "belongs to step 7" in str(manifest.problem(step, 8))


def test_processes_share_the_work_of_verifying(step):
    file = step / "state" / "d" / "0"
    file.write_bytes(file.read_bytes()[::-1])
    reasons = [manifest.problem(step, 7, part, 3) for part in range(3)]
    assert sum(r is not None for r in reasons) == 1
