"""What a report of a fault has to say: versions, machine, threads, variables and cache, each by a function of its own.

Nothing private is among it: the home directory is ``~``, and no user's or machine's name appears.  (The benchmark finds
some of it by itself, in ``bench/machine.py``: it also measures packages of older commits.)
"""

from __future__ import annotations

import getpass
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

import lstmcore
from lstmcore import backends
from lstmcore.backends import machine, self_check, tuning
from lstmcore.kernels.contract import Layer

CHECKOUT = Path(lstmcore.__file__).parents[1]
CODE = ("bench", ":(exclude)bench/results", "kernels", "lstmcore")  # what a commit says too little of, once changed
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "amx-bf16",
    "neon",
    "bf16",
    "sve",
)
CHECKED = (64, 512)  # hidden sizes: one that a single program of a GPU holds, one that several share
# Variables that change what torch, Numba, Triton or a library below them computes, and how fast.
VARIABLES = re.compile(
    r"(OMP|GOMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|BLIS|VECLIB|NUMEXPR|NUMBA|LLVMLITE|TORCH\w*|PYTORCH|ATEN|TRITON|"
    r"CUDA|CUDNN|CUBLAS|NCCL|NVIDIA_TF32|HIP|ROCR)_\w+|LD_PRELOAD|LD_LIBRARY_PATH|MALLOC_\w+|PYTHONMALLOC"
)
_CGROUP, _CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MAPS, _MEMINFO = Path("/proc/self/maps"), Path("/proc/meminfo")
_UNLIMITED = 1 << 60  # bytes; version 1 of cgroups writes about the largest integer where there is no limit


def told(fact: Callable[[], str]) -> str:
    """What ``fact`` returns, without what is private; where it fails, why: no report fails for what it reports."""
    try:
        return private(fact())
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return private(f"cannot be told: {type(error).__name__}: {first}")


def private(text: str) -> str:
    """The text with ``~`` for the home directory, and ``<user>`` for the user's name where a path has it."""
    for home in {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))} - {"/", "~"}:
        text = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # nobody that the system knows
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\:]|$)", "<user>", text)


# What is installed


def version(package: str) -> str:
    """The version of an installed package, and in the same words where it is missing or does not import."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(package)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"{found}, but it does not import: {type(error).__name__}: {first}"
    return found


@cache
def commit() -> str | None:
    """The short hash of the checkout, marked where its code has changes; None outside of one."""
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )

    head = git("rev-parse", "--short", "HEAD")
    if head.returncode != 0:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def package() -> str:
    """This package: its version, and the commit of a checkout."""
    at = commit()
    return f"{lstmcore.__version__}, {f'a checkout at {at}' if at else 'installed'}"


def torchs_build() -> str:
    """The libraries that torch was built with, and what it was built from."""
    text = torch.__config__.show()
    names = {"MKL": r"oneAPI Math Kernel Library Version ([\d.]+)", "oneDNN": r"MKL-DNN (v[\d.]+)"}
    found = [f"{name} {match[1]}" for name, pattern in names.items() if (match := re.search(pattern, text))]
    blas = re.search(r"BLAS_INFO=(\w+)", text)
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{name} {number}" for name, number in kinds.items() if number] or ["CPU build"]
    capability = f"runs {torch.backends.cpu.get_cpu_capability()}"
    commit = str(torch.version.git_version)[:10]
    return ", ".join([*built, f"BLAS {blas[1] if blas else 'unknown'}", *found, capability, f"commit {commit}"])


def openmp() -> str:
    """The OpenMP runtimes in this process: with more than one, threads of both fight for the cores."""
    if not _MAPS.exists():
        return "unknown on this system"
    found = set(re.findall(r"/([^/\s]*(?:gomp|iomp5|libomp)[^/\s]*\.so[^/\s]*)$", _MAPS.read_text(), re.MULTILINE))
    return ", ".join(sorted(found)) or "none loaded"


def numbas_threads() -> str:
    """What Numba's own parallel loops would use."""
    config = importlib.import_module("numba").config
    return f"{config.NUMBA_NUM_THREADS}, layer {config.THREADING_LAYER} (the kernels do not use them)"


# The GPU


def driver() -> str:
    """The version of NVIDIA's driver, as its own tool says it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown: nvidia-smi is not on the PATH"
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=15,
        check=False,
    )
    return done.stdout.strip().replace("\n", ", ") or "unknown: nvidia-smi did not say"


def gpus() -> str:
    """The devices that torch finds."""
    if not torch.cuda.is_available():
        return "none that torch finds"
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "; ".join(
        f"{each.name}, compute capability {each.major}.{each.minor}, {each.multi_processor_count} multiprocessors, "
        f"{each.total_memory / 2**30:.1f} GiB"
        for each in properties
    )


# The machine


def instructions() -> str:
    """What LLVM calls the processor, and those of its instructions that matter here."""
    binding = importlib.import_module("llvmlite.binding")
    host = binding.get_host_cpu_features()
    return f"{binding.get_host_cpu_name()} ({', '.join(name for name in FEATURES if host.get(name)) or '-'})"


def system() -> str:
    """Kernel, distribution and C library."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:  # not of the kind that has one
        distribution = platform.mac_ver()[0]
    libc = " ".join(platform.libc_ver())
    words = (f"{platform.system()} {platform.release()} {platform.machine()}", distribution, libc.strip())
    return ", ".join(filter(None, words))


def cores() -> str:
    """How many the system has, this process may use, and its container is limited to."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = cpu_limit()
    return f"{os.cpu_count()}, {usable} usable, container limit {'none' if limit is None else f'{limit:g}'}"


def _groups(controller: str) -> Iterator[Path]:
    """The directories in which the limits of this process may be written, version 2 first."""
    lines = _CGROUPS.read_text().splitlines() if _CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from (_CGROUP / path.lstrip("/"), _CGROUP)
        elif controller in controllers.split(","):
            yield from (_CGROUP / controller / path.lstrip("/"), _CGROUP / controller)


def _numbers(*files: Path) -> list[str]:
    return [word for file in files for word in file.read_text().split()] if all(f.exists() for f in files) else []


def cpu_limit() -> float | None:
    """The cores' worth of time that a container may take; None without a limit."""
    for group in _groups("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            words = _numbers(*(group / name for name in files))
            if len(words) == 2 and words[0] not in ("max", "-1"):
                return int(words[0]) / int(words[1])
    return None


def memory() -> str:
    """What the system has, and what its container is limited to."""
    limits = [
        int(words[0])
        for group in _groups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (words := _numbers(group / name)) and words[0] != "max" and int(words[0]) < _UNLIMITED
    ]
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB", _MEMINFO.read_text(), re.MULTILINE))
    total, free = (int(sizes[name]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    return f"{total:.1f} GiB, {free:.1f} available, container limit " + (
        f"{min(limits) / 2**30:.1f} GiB" if limits else "none"
    )


# The kernels


def threads() -> str:
    """How many the kernels use, and whose; torch's, for comparison."""
    from lstmcore.kernels.cpu import threads as kernel_threads

    torchs = f"torch's: {torch.get_num_threads()}, between operations {torch.get_num_interop_threads()}"
    return f"{kernel_threads.count()}, {kernel_threads.describe()} ({torchs})"


def gpu_kernels() -> str:
    """Whether the GPU kernels are right on each CUDA device: two sizes of them, compiled and checked here."""
    if not torch.cuda.is_available():
        return "on no device: there is no CUDA device that torch finds"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"{device}: {', '.join(_verdicts(device))}" for device in devices)


def _verdicts(device: torch.device) -> Iterator[str]:
    for name, entry in backends.REGISTRY.items():
        for hidden in CHECKED if entry.checked else ():
            layer = Layer(device, torch.bfloat16, 64, 16, hidden, hidden, ragged=True, training=True)
            reason = backends.load(name).supports(layer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # this says the same
                reason = reason or self_check.refusal(name, layer, extended=True)
            yield f"H {hidden} " + ("right" if reason is None else f"not used by 'auto': {reason}")


def blocks() -> str:
    """The instruction set that the CPU kernels are shaped for, and the size of their blocks in float32."""
    from lstmcore.kernels.cpu import tiling

    isa = tiling.cpu_isa()
    block = tiling.block_shape(isa, torch.float32)
    return f"{isa}, float32 in blocks of {block.rows} x {block.panel} on {block.registers} registers"


def bfloat16_products() -> str:
    """The instruction that multiplies matrices of bfloat16 in the CPU kernels, and why not a faster one."""
    from lstmcore.kernels.cpu import products, tiling

    found = products.this_machines(torch.bfloat16, tiling.cpu_isa())
    if found.tiled:
        return f"{found.instruction} (AMX)"
    why = (
        "; the system does not permit AMX"
        if products.features().get("amx-bf16") and not products.tiles_permitted()
        else ""
    )
    return f"{found.instruction} (AVX512-BF16){why}" if found.paired else f"{found.instruction}, in float32{why}"


def kernel_cache() -> str:
    """Where compiled kernels are kept, how much is there, and whether it can be written."""
    from lstmcore.kernels.cpu import jit

    place = jit.cache_directory()
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else []
    parent = next(path for path in (place, *place.parents) if path.exists())
    size = sum(path.stat().st_size for path in files) / 1e6
    writable = "writable" if os.access(parent, os.W_OK) else "not writable: kernels compile again in every process"
    return f"{place} ({len(files)} files, {size:.1f} MB, {writable})"


def tuned() -> Iterator[tuple[str, str]]:
    """Each device, and what was tuned of it."""
    from lstmcore.kernels.cpu import threads as kernel_threads

    yield "tuned, CPU", told(lambda: tuned_device(torch.device("cpu"), kernel_threads.count()))
    for index in range(torch.cuda.device_count()):
        yield f"tuned, GPU {index}", told(lambda index=index: tuned_device(torch.device("cuda", index), 0))  # type: ignore[misc]


def tuned_device(where: torch.device, threads: int) -> str:
    """The tables of timings that ``"auto"`` goes by on a device, and why others are not used."""
    known = tuning.known(where, threads)
    found = [
        f"{len(table.timings)} shapes {source}, last on {table.date}, {path}" for source, path, table in known.tables
    ]
    if not any(source == tuning.HERE for source, _, _ in known.tables):
        found.append(f"not tuned: {tuning.COMMAND}")
    return "; ".join([*found, *known.ignored])


def backend(name: str) -> str:
    """Whether a backend can be loaded here."""
    try:
        backends.load(name)
    except ImportError as error:
        return f"cannot be loaded: {error}"
    return "loads"


def variables() -> Iterator[tuple[str, str]]:
    """Those of the environment that matter, by name."""
    for name, value in sorted(os.environ.items()):
        if VARIABLES.fullmatch(name):
            yield name, value


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """All of it, in order: a title, and names with values."""
    packages = ("numba", "llvmlite", "numpy", "triton")
    yield (
        "versions",
        [
            ("lstmcore", told(package)),
            ("Python", told(lambda: f"{platform.python_version()}, {platform.python_implementation()}")),
            ("torch", torch.__version__),
            ("torch's build", told(torchs_build)),
            *((name, told(lambda name=name: version(name))) for name in packages),  # type: ignore[misc]
            ("OpenMP", told(openmp)),
            ("Numba's threads", told(numbas_threads)),
        ],
    )
    yield (
        "machine",
        [
            ("system", told(system)),
            ("processor", told(machine.processor)),
            ("to LLVM", told(instructions)),
            ("cores", told(cores)),
            ("memory", told(memory)),
            ("GPU", told(gpus)),
            ("GPU driver", told(driver)),
            ("cuDNN", told(lambda: machine.cudnn() or "none")),
        ],
    )
    yield (
        "kernels",
        [
            ("threads", told(threads)),
            ("CPU kernels for", told(blocks)),
            ("bfloat16 multiplied by", told(bfloat16_products)),
            ("kernel cache", told(kernel_cache)),
            ("GPU kernels checked", told(gpu_kernels)),
            *tuned(),
            *((f"backend {name!r}", told(lambda name=name: backend(name))) for name in backends.REGISTRY),  # type: ignore[misc]
        ],
    )
    found = [(name, private(value)) for name, value in variables()]
    yield "environment", found or [("variables", "none that matter is set")]


def summary() -> str:
    """One line for the head of a report."""
    numba = told(lambda: version("numba"))
    return f"lstmcore {lstmcore.__version__}, torch {torch.__version__}, numba {numba}, {sys.platform}"
