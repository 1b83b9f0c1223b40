"""What is read of a processor's caches: files as Linux has them, recorded on machines of several kinds."""

import pathlib

import pytest
import torch
from lstmcore.kernels.cpu import caches, tiling


def record(folder: pathlib.Path, processors: dict[int, dict[str, str]]) -> pathlib.Path:
    """A tree like /sys/devices/system/cpu: of each processor its siblings, and the size and sharers of its caches."""
    for number, said in processors.items():
        processor = folder / f"cpu{number}"
        (processor / "topology").mkdir(parents=True)
        (processor / "topology" / "thread_siblings_list").write_text(said["siblings"] + "\n")
        for index, (level, kind, name) in enumerate(
            (("1", "Data", "l1d"), ("1", "Instruction", "l1i"), ("2", "Unified", "l2"))
        ):
            cache = processor / "cache" / f"index{index}"
            cache.mkdir(parents=True)
            size, _, shared = said.get(name, f"32K {said['siblings']}").partition(" ")
            for field, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                (cache / field).write_text(value + "\n")
    return folder


XEON = {0: {"siblings": "0,56", "l2": "2048K 0,56"}}  # Sapphire Rapids
EPYC = {0: {"siblings": "0", "l2": "512K 0"}, 1: {"siblings": "1", "l2": "512K 1"}}  # Zen 3, a virtual machine
ZEN_4 = {0: {"siblings": "0,8", "l2": "1024K 0,8"}}
HYBRID = {
    0: {"siblings": "0-1", "l2": "1280K 0-1"},
    8: {"siblings": "8", "l2": "2048K 8-11"},
}  # P cores, E cores by four


@pytest.mark.parametrize(
    ("machine", "allowed", "size"),
    [
        (XEON, [0], 2 << 20),
        (EPYC, [0, 1], 512 << 10),
        (ZEN_4, [0], 1 << 20),
        (HYBRID, [0], 1280 << 10),
        (HYBRID, [0, 8], 512 << 10),
    ],
    ids=["xeon", "epyc", "zen 4", "p core", "both kinds"],
)
def test_recorded_machines(machine, allowed, size, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_allowed", lambda: allowed)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n")
    assert caches.read(record(tmp_path / "cpu", machine), cpuinfo) == caches.Caches(size, "AuthenticAMD")


@pytest.mark.parametrize("said", [{}, {0: {"siblings": "0", "l2": "many 0"}}, {0: {"siblings": "", "l2": "1M 0"}}])
def test_a_system_that_does_not_say(said, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_allowed", lambda: [0])
    assert caches.read(record(tmp_path / "cpu", said), tmp_path / "none") == caches.Caches(caches.UNKNOWN, "")


def test_this_machine_has_a_cache():
    assert 64 << 10 <= caches.read().second_level <= 64 << 20


@pytest.mark.parametrize(
    ("isa", "found", "steps", "shared"),
    [  # measured: inference with two threads, H = I = 256, 8 rows, and the Xeon's H = 512
        ("avx512", caches.Caches(2 << 20, "GenuineIntel"), (8, 512), "units"),
        ("avx512", caches.Caches(1 << 20, "AuthenticAMD"), (8, 256), "units"),
        ("avx512", caches.Caches(2 << 20, "GenuineIntel"), (32, 128), "rows"),
        ("avx2", caches.Caches(512 << 10, "AuthenticAMD"), (16, 128), "rows"),
        ("avx2", caches.Caches(512 << 10, "AuthenticAMD"), (16, 192), "rows"),
        ("avx2", caches.Caches(512 << 10, "AuthenticAMD"), (32, 384), "rows"),
        ("avx2", caches.Caches(512 << 10, "AuthenticAMD"), (8, 768), "units"),
    ],
)
def test_plans_that_measured_best(isa, found, steps, shared):
    batch, hidden = steps
    block = tiling.block_shape(isa, torch.float32)
    plan = tiling.plan(100, batch, hidden, hidden, hidden, block, 4, 2, core=tiling.core_of(isa, found))
    assert (plan.row_groups, plan.unit_groups) == ((2, 1) if shared == "rows" else (1, 2))
