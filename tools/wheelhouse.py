"""Everything Headrace needs on a host without a network, as one folder of wheels.

    python tools/wheelhouse.py list > have.txt          on that host: what it has already
    python tools/wheelhouse.py download DIR --have have.txt --extras test
    python tools/wheelhouse.py install DIR [--target FOLDER]      on that host: from DIR alone
    python tools/wheelhouse.py verify DIR                         on that host: are all requirements met?

`download` runs where there is a package index, for another Python, machine and C library if need be. It computes the
closure of Headrace's requirements from the metadata of the wheels themselves, for the host's environment markers.
Whatever the host has and is good enough stays; everything else comes in the version that constraints.txt names, or,
where that does not fit the rest, in the newest that does. torch, triton, numpy and transformers of the host are never
replaced. `install` and `verify` need no more than Python and pip, and fetch nothing.

`packaging` must be installed where `download` runs; it is in the folder for the host.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.closure import Closure, Host, Resolver, Wheel, WheelhouseError, applies, normal, requirement

if TYPE_CHECKING:
    from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "wheelhouse.json"


class Downloads:
    """The folder being filled: at most one wheel of a name. Runs pip."""

    def __init__(self, folder: Path, host: Host) -> None:
        self._folder = folder
        self._host = host

    def fetch(self, wants: list[str]) -> dict[str, Wheel]:
        """See `Fetch`."""
        platforms = [word for tag in self._host.platforms() for word in ("--platform", tag)]
        target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", self._host.python, *platforms]
        return self._take(["download", "--no-deps", *target, *wants], "--dest")

    def build(self, project: Path) -> Wheel:
        """The wheel of a source tree."""
        isolation = ["--no-build-isolation"] if "hatchling" in dict(installed()) else []
        (wheel,) = self._take(["wheel", "--no-deps", *isolation, str(project)], "--wheel-dir").values()
        return wheel

    def keep_only(self, wheels: Iterable[Wheel]) -> None:
        """Remove the wheels that are not among these."""
        kept = {wheel.path for wheel in wheels}
        for path in self._folder.glob("*.whl"):
            if path not in kept:
                path.unlink()

    def _take(self, command: list[str], folder_flag: str) -> dict[str, Wheel]:
        found: dict[str, Wheel] = {}
        with tempfile.TemporaryDirectory(dir=self._folder) as incoming:
            pip([*command, folder_flag, incoming])
            for path in sorted(Path(incoming).glob("*.whl")):
                for old in self._folder.glob("*.whl"):
                    if normal(old.name.split("-")[0]) == normal(path.name.split("-")[0]):
                        old.unlink()
                wheel = Wheel.read(Path(shutil.move(path, self._folder / path.name)))
                found[wheel.name] = wheel
        return found


def pip(words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run this interpreter's pip. Raises `WheelhouseError` if it fails; it has said why on standard error."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", words[0], "--quiet", *words[1:]]
    if subprocess.run(command, env=environment, check=False).returncode:
        raise WheelhouseError(f"pip {words[0]} failed")


def offline_environment() -> dict[str, str]:
    """The environment without any setting of pip's, so that no index can be meant."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {**kept, "PIP_CONFIG_FILE": os.devnull}


def read_pins(path: Path) -> dict[str, str]:
    """name -> version of the lines `name==version` of a constraints file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(_pinned(line) for line in lines if line)


def _pinned(line: str) -> tuple[str, str]:
    name, separator, version = line.partition("==")
    if not separator or not name.strip() or not version.strip():
        raise WheelhouseError(f"{line!r} does not name a version: NAME==VERSION")
    return normal(name.strip()), version.strip()


def read_have(values: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(name -> version, facts of the host) from words that are `name==version` or files made by `list`."""
    have: dict[str, str] = {}
    facts: dict[str, str] = {}
    for value in values:
        lines = [value]
        if "==" not in value:
            try:
                lines = Path(value).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise WheelhouseError(f"--have {value} is neither NAME==VERSION nor a file: {error}") from None
        for line in filter(None, map(str.strip, lines)):
            if fact := re.fullmatch(r"# (python|machine|glibc) (\S+)", line):
                facts[fact[1]] = fact[2]
            elif not line.startswith("#"):
                have.update([_pinned(line)])
    return have, facts


def installed() -> Iterator[tuple[str, str]]:
    """(name, version) of what this interpreter can import, the first on its path of each name."""
    seen: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and normal(name) not in seen:
            seen[normal(name)] = distribution.version
    yield from sorted(seen.items())


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, host: Host, roots: Iterable[Requirement], closure: Closure, omit: list[str]) -> None:
    """Say in the folder what it holds, for whom, and what it relies on."""
    manifest = {
        "host": {"python": host.python, "machine": host.machine, "glibc": host.glibc},
        "roots": [str(root) for root in roots],
        "wheels": {w.path.name: digest(w.path) for w in closure.wheels.values() if w.path is not None},
        "keep": {name: closure.why[name].specifier() for name in closure.keep},
        "omit": sorted(map(normal, omit)),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote. Raises `WheelhouseError` where there is none."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WheelhouseError(f"{folder} is not a wheelhouse: {error}") from None


def run_list() -> int:
    """Print this host's facts and packages."""
    here = Host.here()
    print(f"# python {here.python}\n# machine {here.machine}\n# glibc {here.glibc}")
    for name, version in installed():
        print(f"{name}=={version}")
    return 0


def run_download(arguments: argparse.Namespace) -> int:
    """Fill the folder."""
    have, facts = read_have(arguments.have)
    here = Host.here()
    host = Host(*(getattr(arguments, n) or facts.get(n) or getattr(here, n) for n in ("python", "machine", "glibc")))
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    downloads = Downloads(folder, host)
    own = downloads.build(arguments.project)
    extras = [extra for extra in arguments.extras.split(",") if extra]
    if unknown := [extra for extra in extras if extra not in own.extras]:
        raise WheelhouseError(f"no extra {', '.join(unknown)}; there are {', '.join(own.extras) or 'none'}")
    roots = [
        requirement(f"{own.name}[{','.join(extras)}]"),
        requirement("packaging"),
        *map(requirement, arguments.also),
    ]
    resolver = Resolver(host, have, read_pins(arguments.constraints), downloads.fetch, arguments.omit)
    closure = resolver.resolve(roots, {own.name: own})
    downloads.keep_only(closure.wheels.values())
    write_manifest(folder, host, roots, closure, arguments.omit)
    _say_what_is_there(host, closure, have)
    return 0


def _say_what_is_there(host: Host, closure: Closure, have: Mapping[str, str]) -> None:
    total = 0
    for name, wheel in sorted(closure.wheels.items()):
        size = wheel.path.stat().st_size if wheel.path else 0
        total += size
        instead = f"   instead of the host's {have[name]}" if name in have else ""
        print(f"{name:32s} {wheel.version:20s} {size / 1e6:8.1f} MB{instead}")
    print(f"{len(closure.wheels)} wheels, {total / 1e6:.1f} MB, for Python {host.python} on {host.machine}")
    print(f"the host keeps: {', '.join(f'{n} {v}' for n, v in sorted(closure.keep.items())) or 'nothing'}")


def run_install(arguments: argparse.Namespace) -> int:
    """Install from the folder alone, then verify."""
    folder: Path = arguments.folder
    manifest = read_manifest(folder)
    check_folder(folder, manifest)
    check_host(manifest)
    target: Path | None = arguments.target
    into = ["--upgrade", "--target", str(target)] if target else []
    files = [str(folder / name) for name in sorted(manifest["wheels"])]
    pip(["install", "--no-index", "--no-deps", "--no-warn-script-location", *into, *files], offline_environment())
    path = os.pathsep.join(filter(None, [str(target.resolve()) if target else "", os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(Path(__file__).resolve()), "verify", str(folder)]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    if status == 0 and target:
        print(f"add it to the path of Python: export PYTHONPATH={target.resolve()}")
    return status


def check_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `WheelhouseError` unless every wheel is there and as it was made."""
    gone = [name for name in manifest["wheels"] if not (folder / name).is_file()]
    if gone:
        raise WheelhouseError(f"{folder} lacks {', '.join(sorted(gone))}; nothing was installed")
    changed = [name for name, expected in manifest["wheels"].items() if digest(folder / name) != expected]
    if changed:
        raise WheelhouseError(f"damaged: {', '.join(sorted(changed))}; nothing was installed")


def check_host(manifest: Mapping[str, Any]) -> None:
    """Raise `WheelhouseError` unless this host is the one meant, with the packages that it was said to have."""
    here, meant = Host.here(), manifest["host"]
    if (here.python, here.machine) != (meant["python"], meant["machine"]):
        raise WheelhouseError(
            f"made for Python {meant['python']} on {meant['machine']}; this is {here.python} on {here.machine}"
        )
    have = dict(installed())
    gone = [f"{name}{specifier}" for name, specifier in manifest["keep"].items() if name not in have]
    if gone:
        raise WheelhouseError(f"neither on this host nor in the folder: {', '.join(sorted(gone))}; nothing installed")


def run_verify(arguments: argparse.Namespace) -> int:
    """Print what is amiss; exit code 1 if anything is."""
    manifest = read_manifest(arguments.folder)
    carried = {normal(name.split("-")[0]) for name in manifest["wheels"]}
    found = problems(map(requirement, manifest["roots"]), carried, manifest["omit"])
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"every requirement of {', '.join(manifest['roots'])} is met")
    return 1 if found else 0


def problems(roots: Iterable[Requirement], carried: Collection[str], omit: Collection[str]) -> list[str]:
    """Requirements that are not met in this interpreter, walking from `roots`.

    Of what the host had before, only what concerns the carried packages counts: its own gaps are not ours to judge.
    """
    found: dict[str, None] = {}
    seen: set[tuple[str, str, str]] = set()
    queue = [("", root) for root in roots]
    while queue:
        by, needed = queue.pop(0)
        name = normal(needed.name)
        if name in omit or (by, name, str(needed)) in seen:
            continue
        seen.add((by, name, str(needed)))
        is_ours = by in carried or name in carried or not by
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if is_ours:
                found[f"{name} is missing; {by or 'you'} asked for {needed}"] = None
            continue
        if is_ours and not needed.specifier.contains(distribution.version, prereleases=True):
            found[f"{name} is {distribution.version}; {by or 'you'} asked for {needed}"] = None
        every = map(requirement, distribution.requires or [])
        queue += [(name, each) for each in every if applies(each, needed.extras, {})]
    return list(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="wheelhouse.py", description="Headrace for a host without a network.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print what this host has, for --have")
    download = commands.add_parser("download", help="fill a folder with wheels for a host")
    download.add_argument("folder", type=Path, metavar="DIR")
    download.add_argument("--have", nargs="+", action="extend", default=[], help="NAME==VERSION, or a file from list")
    download.add_argument("--extras", default="", help="extras of Headrace, comma-separated (see pyproject.toml)")
    download.add_argument("--also", action="append", default=[], metavar="REQUIREMENT", help="one more package")
    download.add_argument("--omit", action="append", default=[], metavar="NAME", help="a package to do without")
    download.add_argument("--python", help="the host's, e.g. 3.12; default: as in --have, else this one's")
    download.add_argument("--machine", help="the host's, e.g. x86_64; default: likewise")
    download.add_argument("--glibc", help="the host's, e.g. 2.39; default: likewise")
    download.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="versions to prefer")
    download.add_argument("--project", type=Path, default=ROOT, help=argparse.SUPPRESS)
    install = commands.add_parser("install", help="install from a folder alone")
    install.add_argument("folder", type=Path, metavar="DIR")
    install.add_argument("--target", type=Path, help="a folder to install into, instead of this Python's own")
    verify = commands.add_parser("verify", help="check that all requirements are met")
    verify.add_argument("folder", type=Path, metavar="DIR")
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parser().parse_args(words)
    try:
        if arguments.command == "list":
            return run_list()
        return {"download": run_download, "install": run_install, "verify": run_verify}[arguments.command](arguments)
    except WheelhouseError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
