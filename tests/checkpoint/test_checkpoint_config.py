import pytest

from lmx.checkpoint.config import CheckpointConfig
from lmx.errors import UserError


def test_due_on_multiples_and_never_at_the_start():
    config = CheckpointConfig(every=10)
    assert [s for s in range(31) if config.due(s)] == [10, 20, 30]
    assert not any(CheckpointConfig(every=0).due(s) for s in range(31))


def test_keeps_the_newest_and_the_lasting():
    steps = [10, 20, 30, 40, 50, 60]
    assert CheckpointConfig(keep=2).kept(steps) == {50, 60}
    assert CheckpointConfig(keep=1, keep_every=20).kept(reversed(steps)) == {20, 40, 60}
    assert CheckpointConfig(keep=1, keep_best=True).kept(steps, best=30) == {30, 60}
    assert CheckpointConfig(keep=1).kept(steps, best=30) == {60}
    assert CheckpointConfig(keep=9).kept(steps) == set(steps)


@pytest.mark.parametrize("wrong", [{"every": -1}, {"keep": 0}, {"keep_every": -5}])
def test_refuses_senseless_numbers(wrong):
    with pytest.raises(UserError, match=f"checkpoint.{next(iter(wrong))} is"):
        CheckpointConfig(**wrong)
