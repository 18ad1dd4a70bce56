"""Profiles of devices: those that ship are whole, mistakes in one's own are named."""

from pathlib import Path

import pytest
import yaml

from megatron_ext.errors import UserError
from megatron_ext.planning.device_profile import device_profile_names, load_profile
from parallel.device_peaks import data_sheet

PROFILES = Path("megatron_ext/planning/profiles")


def test_the_devices_that_users_plan_for_ship() -> None:
    assert {"h100", "h200", "b200", "gb200", "mi250x", "mi300x", "cpu"} <= set(
        device_profile_names()
    )


@pytest.mark.parametrize("name", device_profile_names())
def test_profiles_agree_with_data_sheets(name: str) -> None:
    profile = load_profile(name)
    assert profile.fixed_bytes < profile.usable_bytes < profile.memory_bytes
    ends = [link.max_ranks for link in profile.links]
    assert ends[:-1] == sorted(end for end in ends[:-1] if end is not None)
    speeds = [link.gigabytes_per_second for link in profile.links]
    assert speeds == sorted(speeds, reverse=True)
    sheet = data_sheet(name.upper())
    if name != "cpu":
        assert sheet is not None
        assert profile.peak_flops("bf16") == sheet.flops_per_second["bfloat16"]
        assert profile.memory_gigabytes_per_second == sheet.memory_bytes_per_second / 1e9
        assert sheet.flops_per_second.get("float8_e4m3fn") == (
            profile.peak_flops("fp8") if "fp8" in profile.peak_tflops else None
        )


def test_what_a_device_lacks_is_emulated_in_bf16() -> None:
    mi250x = load_profile("mi250x")
    assert mi250x.peak_flops("fp8") == mi250x.peak_flops("fp4") == mi250x.peak_flops("bf16")


def test_links_by_distance() -> None:
    mi250x = load_profile("mi250x")
    speeds = [mi250x.link(ranks).gigabytes_per_second for ranks in (2, 4, 8, 9, 1024)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[3] == speeds[4] < speeds[2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"memory_gb": 80}, "memory_gb"),
        ({"gemm_efficiency": 1.5}, "gemm_efficiency"),
        ({"links": []}, "links"),
        (
            {"links": [{"max_ranks": 8, "gigabytes_per_second": 1, "microseconds": 0}]},
            "last of links",
        ),
        ({"peak_tflops": {"fp16": 1}}, "peak_tflops"),
    ],
)
def test_mistakes_in_a_file_are_named(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    tree = yaml.safe_load((PROFILES / "h100.yaml").read_text()) | change
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=named) as error:
        load_profile(str(file))
    assert str(file) in str(error.value)


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are b200, cpu"):
        load_profile("h1000")
    with pytest.raises(UserError, match="cannot be read"):
        load_profile(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="no device profile"):
        load_profile("../recipes/7b")
