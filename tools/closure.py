"""What must be carried to a host: the closure of requirements, from what wheels say of themselves.

Owns the host's tags and markers, and the search for versions that fit together. Downloads nothing and must not
know pip: `Resolver` is given a function that fetches.
"""

from __future__ import annotations

import email.parser
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

NEVER_REPLACED = frozenset({"torch", "triton", "numpy", "transformers"})
MAX_ROUNDS = 100
OLD_PLATFORMS = {"x86_64": ("manylinux2014", "manylinux2010", "manylinux1"), "aarch64": ("manylinux2014",)}


class WheelhouseError(Exception):
    """What the person at the keyboard can mend."""


@dataclass(frozen=True)
class Host:
    """The machine that wheels are for: Python "3.12", machine "x86_64", the C library's version "2.39"."""

    python: str
    machine: str
    glibc: str

    @classmethod
    def here(cls) -> Host:
        """This interpreter's."""
        glibc = platform.libc_ver()[1] or "2.28"
        return cls(".".join(map(str, sys.version_info[:2])), platform.machine(), glibc)

    def platforms(self) -> list[str]:
        """Every platform tag that this machine can install; pip compares them literally."""
        newest = int(self.glibc.split(".")[1])
        tags = [f"manylinux_2_{minor}" for minor in range(newest, 4, -1)]
        tags += [*OLD_PLATFORMS.get(self.machine, ()), "linux"]
        return [f"{tag}_{self.machine}" for tag in tags]

    def markers(self) -> dict[str, str]:
        """The values of environment markers there (PEP 508)."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "platform_release": "",
            "platform_version": "",
            "sys_platform": "linux",
            "os_name": "posix",
        }


@dataclass(frozen=True)
class Wheel:
    """What a distribution says of itself."""

    name: str
    version: str
    requires: tuple[str, ...]
    extras: tuple[str, ...] = ()
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> Wheel:
        """From the METADATA inside a wheel file."""
        with zipfile.ZipFile(path) as archive:
            (name,) = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            text = archive.read(name).decode("utf-8")
        found = email.parser.Parser().parsestr(text, headersonly=True)
        requires, extras = found.get_all("Requires-Dist") or [], found.get_all("Provides-Extra") or []
        return cls(normal(found["Name"]), found["Version"], tuple(requires), tuple(extras), path)


@dataclass
class Wanted:
    """All that is asked of one package: by whom, and with which extras."""

    requirements: list[tuple[str, Requirement]] = field(default_factory=list)
    extras: set[str] = field(default_factory=set)

    def accepts(self, version: str) -> bool:
        """True if `version` is good enough for everybody."""
        return all(r.specifier.contains(version, prereleases=True) for _, r in self.requirements)

    def specifier(self) -> str:
        """Every condition, comma-separated."""
        return ",".join(sorted({str(s) for _, r in self.requirements for s in r.specifier}))

    def why(self) -> str:
        """Who asks for what, for people."""
        return ", ".join(f"{by} asks for {r.name}{r.specifier}" for by, r in self.requirements)


Fetch = Callable[[list[str]], dict[str, Wheel]]
"""Gets wheels for pip's requirement strings, one each, without what they require; by normalised name."""


def normal(name: str) -> str:
    """A package name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement(text: str) -> Requirement:
    """A parsed requirement. Raises `WheelhouseError` where it cannot be parsed, or `packaging` is not installed."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        raise WheelhouseError("the package 'packaging' is needed; install it first") from None
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise WheelhouseError(f"{text!r} is not a requirement: {error}") from None


def applies(needed: Requirement, extras: Collection[str], markers: Mapping[str, str]) -> bool:
    """True if a requirement holds on a host with `markers`, of a package that was asked for with `extras`."""
    marker = needed.marker
    return marker is None or any(marker.evaluate({**markers, "extra": extra}) for extra in (extras or {""}))


@dataclass(frozen=True)
class Closure:
    """`wheels` to carry and packages of the host to `keep`, by name; `why` has the conditions on each."""

    wheels: dict[str, Wheel]
    keep: dict[str, str]
    why: dict[str, Wanted]


class Resolver:
    """Finds the closure of requirements: what the host keeps, and what must come. Downloads through `fetch` alone."""

    def __init__(
        self, host: Host, have: Mapping[str, str], pins: Mapping[str, str], fetch: Fetch, omit: Collection[str] = ()
    ) -> None:
        self._markers = host.markers()
        self._have = have
        self._pins = pins
        self._fetch = fetch
        self._omit = {normal(name) for name in omit}

    def resolve(self, roots: Iterable[Requirement], given: Mapping[str, Wheel]) -> Closure:
        """The closure of `roots`, whose own wheels may be `given`. Raises `WheelhouseError` if there is none."""
        roots = list(roots)
        chosen = dict(given)
        for _ in range(MAX_ROUNDS):
            wanted = self._walk(roots, chosen)
            missing = [name for name in wanted if not self._is_met(name, wanted[name], chosen)]
            if not missing:
                wheels = {name: chosen[name] for name in wanted if name in chosen}
                keep = {name: self._have[name] for name in wanted if name not in chosen}
                return Closure(wheels, keep, wanted)
            for name in missing:
                self._refuse_replacing(name, wanted[name])
            chosen.update(self._fetch([self._ask(name, wanted[name]) for name in missing]))
        raise WheelhouseError(f"no versions found that fit together: {', '.join(missing)}")

    def _walk(self, roots: list[Requirement], chosen: Mapping[str, Wheel]) -> dict[str, Wanted]:
        """Everything reachable. What the host keeps is not looked into: it works there already."""
        wanted: dict[str, Wanted] = {}
        queue = [("the command line", root) for root in roots]
        while queue:
            by, needed = queue.pop(0)
            name = normal(needed.name)
            if name in self._omit:
                continue
            entry = wanted.setdefault(name, Wanted())
            is_known = any(needed == earlier and by == who for who, earlier in entry.requirements)
            if is_known and needed.extras <= entry.extras:
                continue
            entry.requirements.append((by, needed))
            entry.extras |= needed.extras
            if name in chosen:
                every = [requirement(text) for text in chosen[name].requires]
                queue += [(name, each) for each in every if applies(each, entry.extras, self._markers)]
        return wanted

    def _is_met(self, name: str, wanted: Wanted, chosen: Mapping[str, Wheel]) -> bool:
        version = chosen[name].version if name in chosen else self._have.get(name)
        return version is not None and wanted.accepts(version)

    def _refuse_replacing(self, name: str, wanted: Wanted) -> None:
        if name in NEVER_REPLACED and name in self._have:
            raise WheelhouseError(f"the host's {name} {self._have[name]} will not do: {wanted.why()}")

    def _ask(self, name: str, wanted: Wanted) -> str:
        pin = self._pins.get(name)
        return f"{name}=={pin}" if pin is not None and wanted.accepts(pin) else f"{name}{wanted.specifier()}"
