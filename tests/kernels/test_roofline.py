from dataclasses import dataclass

import jax
import pytest

from lmx.kernels import roofline


@dataclass(frozen=True)
class Device:
    """What is asked of a device."""

    id: int
    platform: str
    process_index: int


def test_the_devices_whose_peaks_add_up() -> None:
    """The virtual devices of a process share its cores; chips are each their own."""
    assert len(jax.devices()) == 8
    assert roofline.side_by_side(jax.devices()) == 1
    hosts, chips = ([Device(i, platform, i // 4) for i in range(8)] for platform in ("cpu", "tpu"))
    assert roofline.side_by_side(hosts) == 2
    assert roofline.side_by_side(chips) == 8


def test_a_peak_is_the_product_over_its_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def seconds(function, a, b, repeats) -> float:
        asked.append((a.shape, b.shape, a.dtype, repeats))
        return 0.5

    monkeypatch.setattr(roofline, "median_seconds", seconds)
    roofline.known_matmul_flops_per_second.cache_clear()
    try:
        assert roofline.matmul_flops_per_second("float32") == 2 * 2048**3 / 0.5
        assert [roofline.known_matmul_flops_per_second("float32") for _ in range(2)] == [2 * 2048**3 / 0.5] * 2
    finally:
        roofline.known_matmul_flops_per_second.cache_clear()
    square = (2048, 2048)
    assert asked == [(square, square, "float32", 5), (square, square, "float32", 2)]
