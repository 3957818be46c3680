"""The command that says what this machine and environment have, and what they lack."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from probe.cli.command import Command, add_json
from probe.errors import one_line

if TYPE_CHECKING:
    import torch


PACKAGE = "position-probe"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ACCURATE = 1e-5  # relative error of a product of float32 matrices; TF32 and bfloat16 have 1e-3 and more
GIB = 2**30


class Finding(NamedTuple):
    """What was looked at, how it is ("ok"; "note": something goes without it; "wrong": the package does not), and what
    to do about it."""

    what: str
    status: str
    found: str
    advice: str = ""


class Requirement(NamedTuple):
    """A distribution that is wanted, and its least version, "" for any."""

    name: str
    least: str
    extra: str = ""

    def __str__(self) -> str:
        return f"{self.name}>={self.least}" if self.least else self.name


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not ask whether the hub can be reached")
    add_json(parser)


def _doctor(options: argparse.Namespace) -> int:
    findings = list(diagnose(offline=options.offline))
    if options.json:  # without pandas, which may be what is missing
        for finding in findings:
            print(json.dumps(finding._asdict(), ensure_ascii=False))
    else:
        widths = [max(len(finding[column]) for finding in findings) for column in range(2)]
        for what, status, found, advice in findings:
            print(f"{status:{widths[1]}}  {what:{widths[0]}}  {found}{f'; {advice}' if advice else ''}")
    return 1 if any(finding.status == "wrong" for finding in findings) else 0


def diagnose(*, offline: bool = False) -> Iterator[Finding]:
    """Every finding about this machine and environment. Nothing is changed, and nothing but the hub is asked."""
    yield from packages(requirements())
    yield from machine()
    yield browser()
    try:
        yield from hub(offline=offline)
    except Exception as error:  # its library reads the environment when it is imported, and takes what is there
        yield Finding("hub", "wrong", f"cannot be asked: {one_line(error)}", "HF_… in the environment may be wrong")


def requirements() -> list[Requirement]:
    """What the package itself says that it wants, without what is for its development; empty where it is not
    installed."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        parts = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?(?:>=([\w.]+))?[^;]*(?:;(.*))?", line)
        assert parts is not None  # they are this package's own
        name, least, marker = parts.groups()
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker or "")
        found.append(Requirement(name, least or "", extra[1] if extra else ""))
    return [each for each in found if each.extra != "dev"]


def packages(wanted: list[Requirement]) -> Iterator[Finding]:
    """Python, this package, and all that it wants; of what others bring, what numbers depend on."""
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    if not wanted:
        advice = f"{_pip()} -e FOLDER, where its pyproject.toml is"
        yield Finding(PACKAGE, "wrong", "not installed: what it wants is not known", advice)
    else:
        yield Finding(PACKAGE, "ok", importlib.metadata.version(PACKAGE))
    for each in wanted:
        yield _package(each)
    for name in ("transformers", "tokenizers", "huggingface-hub", "numpy"):
        if name not in {each.name for each in wanted}:
            yield _package(Requirement(name, ""))


def _package(wanted: Requirement) -> Finding:
    advice = f"{_pip()} {shlex.quote(str(wanted))}"
    absent = "note" if wanted.extra else "wrong"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        what_for = f" (only for {PACKAGE}[{wanted.extra}])" if wanted.extra else ""
        return Finding(wanted.name, absent, f"missing{what_for}", advice)
    if wanted.least and _numbers(version) < _numbers(wanted.least):
        return Finding(wanted.name, absent, f"{version}, and {wanted.least} or newer is wanted", advice)
    return Finding(wanted.name, "ok", version)


def _numbers(version: str) -> list[int]:
    """The release's numbers: of "2.13.0rc1+cu130" 2, 13, 0. Zeros at the end say nothing."""
    numbers = [int(n) for n in re.findall(r"^[\d.]*", version)[0].split(".") if n]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip install"


def machine() -> Iterator[Finding]:
    """Device, memory, disk, cores and threads, and whether products are as accurate as float32 can be."""
    try:
        import torch

        from probe.device import find_device
    except Exception as error:  # a broken installation can raise anything, and that is what is to be found out
        yield Finding("torch", "wrong", f"cannot be imported: {' '.join(str(error).split())}", f"{_pip()} torch")
        return
    device = find_device()
    yield Finding("device", "ok", _described(device))
    free = _free_memory()
    yield Finding("memory", "ok", "unknown" if free is None else f"{free / GIB:.1f} GiB free")
    folder = Path.cwd()
    yield Finding("disk", "ok", f"{shutil.disk_usage(folder).free / GIB:.1f} GiB free in {folder}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores}, of which torch uses {torch.get_num_threads()}")
    yield from _products(device)


def _described(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"cuda ({torch.cuda.get_device_name(device)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free)"
    return f"{device.type} ({platform.processor() or platform.machine()}; memory is the machine's)"


def _free_memory() -> float | None:
    """Bytes that can still be had: the machine's, or what is left of its container's share; None where nobody says."""
    found = []
    for path, unit in (("/proc/meminfo", 1024), ("/sys/fs/cgroup/memory.max", 1)):
        try:
            text = Path(path).read_text()
            if unit > 1:
                found.append(int(re.findall(r"MemAvailable:\s*(\d+)", text)[0]) * unit)
            elif text.strip() != "max":
                found.append(int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
        except (OSError, IndexError, ValueError):
            continue
    return min(found, default=None)


def _products(device: "torch.device", n: int = 256) -> Iterator[Finding]:
    """Whether products of float32 matrices are as exact as float32 is, and whose are taken for training."""
    import torch

    from probe.device import product_error, product_kernels

    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0)).to(device)
    off, setting = product_error(a, b), torch.get_float32_matmul_precision()
    said = f'relative error {off:.0e} (precision "{setting}")'
    if off < ACCURATE:
        yield Finding("float32 products", "ok", said)
    else:
        yield Finding("float32 products", "note", said, "torch.set_float32_matmul_precision('highest') corrects it")
    if device.type == "cpu":
        yield Finding("training products", "ok", product_kernels(device))


def browser() -> Finding:
    """The browser that draws figures as pictures, and that tests look at reports with."""
    names = [name for name in (os.environ.get("BROWSER_PATH"), *BROWSERS) if name]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return Finding("browser", "note", f"none of {', '.join(names)}", "figures as pictures want one")
    return Finding("browser", "ok", found)


def hub(*, offline: bool = False, seconds: float = 2.0) -> Iterator[Finding]:
    """The cache of released models, and whether more can be had.

    Args:
        offline: do not ask the hub.
        seconds: how long to wait for its answer.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return  # said among the packages
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if cache.is_dir():
        names = sum(1 for _ in cache.glob("models--*"))
        yield Finding("hub's cache", "ok", f"{cache}, {_size(cache) / GIB:.1f} GiB, models: {names}")
    else:
        yield Finding("hub's cache", "ok", f"{cache}, not there yet")
    if offline or constants.HF_HUB_OFFLINE:
        why = "--offline" if offline else "HF_HUB_OFFLINE is set"
        yield Finding("hub", "ok", f"not asked ({why}): models come from folders and from the cache")
        return
    answer = _within(seconds, lambda: _head(constants.ENDPOINT, seconds))
    if answer is None:
        yield Finding("hub", "ok", f"{constants.ENDPOINT} answers")
    else:
        advice = "models come from folders and from the cache; HF_HUB_OFFLINE=1 saves waiting for it"
        yield Finding("hub", "note", f"{constants.ENDPOINT} is out of reach ({answer})", advice)


def _head(url: str, seconds: float) -> str | None:
    """Why a server does not answer; None where it does, whatever it says."""
    import http.client
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return None
    # No network, no such name, time is up; a proxy's or endpoint's bad address.
    except (OSError, ValueError, http.client.HTTPException) as error:
        return one_line(getattr(error, "reason", error))
    return None


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """The answer, or that time is up: looking a name up has no time limit of its own."""
    answers: list[str | None] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds + 0.5)
    return answers[0] if answers else f"no answer in {seconds:g} s"


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; a link counts as the link that it is."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue  # gone since
    return total


COMMANDS = {"doctor": Command("what this machine and environment have, and what they lack", _add_doctor, _doctor)}
