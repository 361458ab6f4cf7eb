"""The closure of requirements: what the host keeps, what must come, in which versions, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.projects import make_wheel
from tools.closure import Closure, Host, Resolver, Wheel, WheelhouseError, requirement

HOST = Host(python="3.12", machine="x86_64", glibc="2.39")

INDEX: dict[str, dict[str, tuple[str, ...]]] = {
    "mill": {"1.0": ("wheel>=1", "sluice[deep]>=2", 'old-python; python_version < "3.12"', 'pump; extra == "fast"')},
    "wheel": {"1.0": ("axle",), "2.0": ("axle>=2",)},
    "sluice": {"2.0": ("gate==1.5", 'depth; extra == "deep"'), "3.0": ("gate==2.0", 'depth; extra == "deep"')},
    "gate": {"1.5": (), "2.0": ()},
    "depth": {"1.0": ("wheel<2",)},
    "axle": {"1.0": (), "2.0": ()},
    "pump": {"1.0": ('sluice; sys_platform == "win32"', "mill")},
    "torch": {"2.13": ()},
}
"""name -> version -> requirements."""


class Index:
    """Fetches from `INDEX` as pip would: the newest version that fits. Remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def fetch(self, wants: list[str]) -> dict[str, Wheel]:
        self.asked += wants
        found = {}
        for needed in map(requirement, wants):
            versions = [v for v in sorted(INDEX[needed.name], reverse=True) if needed.specifier.contains(v)]
            if not versions:
                raise WheelhouseError(f"no {needed}")
            found[needed.name] = Wheel(needed.name, versions[0], INDEX[needed.name][versions[0]])
        return found


def resolve(
    *roots: str, have: dict[str, str] | None = None, pins: dict[str, str] | None = None, omit: tuple[str, ...] = ()
) -> Closure:
    return Resolver(HOST, have or {}, pins or {}, Index().fetch, omit).resolve(map(requirement, roots), {})


def versions(closure: Closure) -> dict[str, str]:
    return {name: wheel.version for name, wheel in closure.wheels.items()}


def test_conditions_found_later_choose_again_and_markers_are_the_hosts() -> None:
    closure = resolve("mill")
    assert versions(closure) == {
        "mill": "1.0",
        "wheel": "1.0",  # 2.0 was the newest until depth, of an extra of sluice, asked for less
        "sluice": "3.0",
        "gate": "2.0",
        "depth": "1.0",
        "axle": "2.0",
    }
    assert closure.keep == {}


def test_extras_are_followed_and_circles_end() -> None:
    assert versions(resolve("mill[fast]"))["pump"] == "1.0"


def test_a_pin_is_taken_where_it_fits() -> None:
    assert versions(resolve("mill", pins={"sluice": "2.0", "wheel": "2.0"})) | {"axle": ""} == {
        "mill": "1.0",
        "wheel": "1.0",
        "sluice": "2.0",
        "gate": "1.5",
        "depth": "1.0",
        "axle": "",
    }


def test_what_the_host_has_stays_and_what_is_not_good_enough_is_replaced() -> None:
    closure = resolve("mill", have={"sluice": "2.5", "wheel": "0.9", "axle": "1.0"}, pins={"sluice": "3.0"})
    assert versions(closure) == {"mill": "1.0", "wheel": "2.0", "axle": "2.0"}
    assert closure.keep == {"sluice": "2.5"}
    assert closure.why["sluice"].specifier() == ">=2"


def test_torch_of_the_host_is_never_replaced() -> None:
    assert resolve("torch>=2.11", have={"torch": "2.11.0+cu130"}).keep == {"torch": "2.11.0+cu130"}
    with pytest.raises(WheelhouseError, match=r"the host's torch 2\.10 will not do: .* asks for torch>=2\.11"):
        resolve("torch>=2.11", have={"torch": "2.10"})
    assert versions(resolve("torch>=2.11")) == {"torch": "2.13"}, "a host without any gets one"


def test_what_is_left_out_is_not_followed() -> None:
    assert set(resolve("mill", omit=("Sluice",)).wheels) == {"mill", "wheel", "axle"}


def test_versions_that_cannot_fit_are_refused() -> None:
    with pytest.raises(WheelhouseError, match="no axle"):
        resolve("axle>=9")


def test_platform_tags_go_down_from_the_hosts_c_library() -> None:
    tags = HOST.platforms()
    assert tags[0] == "manylinux_2_39_x86_64" and "manylinux_2_17_x86_64" in tags and "manylinux2014_x86_64" in tags
    assert "manylinux_2_40_x86_64" not in tags
    assert Host("3.12", "aarch64", "2.28").platforms()[0] == "manylinux_2_28_aarch64"


def test_a_wheel_says_what_it_needs(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "Mill_Race", "1.0", ["wheel>=1", 'pump; extra == "fast"'], extras=("fast",))
    wheel = Wheel.read(path)
    assert (wheel.name, wheel.version, wheel.extras) == ("mill-race", "1.0", ("fast",))
    assert wheel.requires == ("wheel>=1", 'pump; extra == "fast"')


def test_an_ill_formed_requirement_is_named() -> None:
    with pytest.raises(WheelhouseError, match="'>=1' is not a requirement"):
        requirement(">=1")
