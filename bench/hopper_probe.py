"""Scratch: every variant in a process of its own, simplest shapes first; error maps; then times. Not to be kept."""

import json, os, subprocess, sys, time, traceback
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
VARIANTS = {
    # name: (groups, block_n, stages, keeps queries, head dim)
    "two": (2, 128, 2, 0, 128),
    "before-two": (2, 128, 2, 0, 128),
    "before-kept": (2, 128, 2, 1, 128),
    "three-n64": (3, 64, 4, 0, 128),
    "d64two": (2, 128, 4, 0, 64),
    "d64three": (3, 128, 4, 0, 64),
    "before-d64three": (3, 128, 4, 0, 64),
    "d64three-n64": (3, 64, 8, 0, 64),
    "before-d64four-n64": (4, 64, 6, 0, 64),
}


def tiles_of(name, gqa, dim):
    """Also patches which kernel the next PagedAttention has."""
    import hopper_before
    from headrace.kernels.triton import hopper_prefill, paged_attention
    before_tile = hopper_before.HopperTile
    paged_attention.HopperPrefill = (hopper_before if name.startswith("before") else hopper_prefill).HopperPrefill
    from headrace.kernels.triton.hopper_prefill import HopperTile
    from headrace.kernels.triton.paged_attention import AttentionTile, AttentionTiles, choose_tiles
    import torch

    g, n, s, kept, _ = VARIANTS[name]
    plain = choose_tiles(gqa, dim, torch.bfloat16, invariant=False)
    return AttentionTiles(
        plain.decode, AttentionTile(64 * g, 32, 4, 3), plain.few, (before_tile if name.startswith("before") else HopperTile)(g, n, s, *((bool(kept),) if name.startswith("before") else ()))
    )


def check(name):
    import numpy as np, torch
    from headrace.kernels.paged_kv import AttentionShape
    from headrace.kernels.triton.paged_attention import PagedAttention
    from headrace.kernels.triton.work_items import AttentionPlanner, LaunchBounds, WorkLimits
    from tests.kernels.oracles import reference_attention

    torch.manual_seed(0)
    dim, limits = VARIANTS[name][4], WorkLimits(8192, 8192, 16384)
    for label, heads, kv, page, rows, pdl, dtype in [
        ("one block", 1, 1, 16, [(0, 0, 128)], False, torch.bfloat16),
        ("two blocks", 1, 1, 16, [(0, 128, 128)], False, torch.bfloat16),
        ("long", 1, 1, 16, [(0, 3000, 200)], False, torch.bfloat16),
        ("ends, gqa 4, 2 kv", 8, 2, 16, [(0, 37, 51)], True, torch.bfloat16),
        ("many pairs", 8, 2, 16, [(0, 0, 1500), (1, 700, 900), (2, 5, 33), (3, 0, 2000)], True, torch.bfloat16),
        ("gqa 7, parts", 14, 2, 64, [(0, 2500, 700), (1, 0, 1), (2, 31, 300)], True, torch.float16),
    ]:
        columns = -(-max(s + n for _, s, n in rows) // page) + 3
        table = (torch.randperm(len(rows) * columns, device="cuda").view(len(rows), columns) + 1).int()
        pools = [torch.randn((len(rows) * columns + 1) * kv * page, dim, device="cuda").to(dtype) for _ in range(2)]
        for pool in pools:
            pool[: kv * page] = 0
        total = sum(n for *_, n in rows)
        q = torch.randn(total, heads + 3, dim, device="cuda").to(dtype)[:, :heads]
        shape = AttentionShape(heads, kv, dim)
        attention = PagedAttention(
            shape, page, limits, dtype, torch.device("cuda"), tiles=tiles_of(name, heads // kv, dim), pdl=pdl
        )
        planner = AttentionPlanner(limits, attention.tile_sizes, page, kv)
        buffer, a = np.full(limits.size, 7, np.int32), np.array(rows).T
        summary = planner.fill(buffer, a[0], a[1], a[2], np.zeros((0, 3), np.int32))
        out = torch.full((total, heads, dim), float("nan"), device="cuda", dtype=dtype)
        metadata = torch.from_numpy(buffer).cuda()

        def run(extra=0):
            attention.run(
                q, *pools, table, metadata, out, LaunchBounds(summary.num_decode, summary.num_prefill + extra, total)
            )

        begun = time.time()
        run()
        torch.cuda.synchronize()
        took = time.time() - begun
        expected = reference_attention(q, *pools, table, rows, kv, page).double()
        found = out.double()
        error = float((found - expected).norm() / expected.norm())
        again = out.clone()
        out.fill_(float("nan"))
        run(500)
        torch.cuda.synchronize()
        same = torch.equal(again, out)
        good = error < 1e-2 and same
        print(
            f"{name:10s} {label:22s} {str(dtype)[6:]:9s} error {error:.2e} same {same} items {summary.num_prefill} partials {summary.num_partials} first {took:.1f} s {'ok' if good else 'WRONG'}",
            flush=True,
        )
        if not good:
            worst = (found - expected).abs().amax(-1)  # token, head
            bad = ~(worst < 0.05)
            where = bad.nonzero()
            print(
                "  bad (token, head):",
                len(where),
                "of",
                bad.numel(),
                "first",
                where[:6].tolist(),
                "last",
                where[-3:].tolist(),
                "nan",
                int(found.isnan().sum()),
            )
            t, h = where[0].tolist() if len(where) else (0, 0)
            print(
                "  dims bad of the first:", (~((found - expected)[t, h].abs() < 0.05)).nonzero().flatten().tolist()[:40]
            )
            print("  found   ", found[t, h, :10].tolist())
            print("  expected", expected[t, h, :10].tolist())
            print("  ratio", (found[t, h] / expected[t, h])[:8].tolist())
            if label != "one block":
                return 1
    return 0


def build(name):
    import numpy as np, torch
    from gpu_prefill import SHAPES, Prompts

    for heads, kv, d in SHAPES.values():
        for page in (16, 64):
            if d == VARIANTS[name][4] and page == 16:
                Prompts(np.full(1, 256), heads, kv, d, page, num_q=256).ours(tiles_of(name, heads // kv, d))()
                torch.cuda.synchronize()
    print("built", name)
    return 0


def timing(names):
    """All variants of one head size side by side: rounds of each, interleaved; medians and the clock."""
    import statistics, threading
    import torch, triton
    from gpu_prefill import SHAPES, STEPS, Prompts
    from headrace.kernels.triton.paged_attention import choose_tiles

    names = names.split(",")
    dim = VARIANTS[names[0]][4]
    for shape, (heads, kv, d) in SHAPES.items():
        for step in STEPS:
            if d != dim or (shape.startswith("16q") and step not in ("16 x 1024", "2048 over 16384")):
                continue
            case = Prompts.make(shape, step, 16)
            calls = {n: case.ours(tiles_of(n, heads // kv, d)) for n in names}
            calls["old"] = case.ours(choose_tiles(heads // kv, d, torch.bfloat16, invariant=False))
            found = {n: [] for n in calls}
            errors = {}
            for n, call in calls.items():
                case.out.fill_(float("nan"))
                call()
                errors[n] = case.error()
            clocks = []
            stop = threading.Event()

            def watch():
                while not stop.is_set():
                    words = subprocess.run(
                        ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"],
                        capture_output=True,
                        text=True,
                    ).stdout.split(",")
                    clocks.append([float(w) for w in words])

            watcher = threading.Thread(target=watch)
            watcher.start()
            for turn in range(3):
                for n, call in calls.items():
                    if n == "old" and turn:
                        continue
                    us = 1e3 * float(triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median"))
                    found[n].append(case.flops / us / 1e6)
            stop.set()
            watcher.join()
            busy = [c for c in clocks if c[1] > 400] or clocks
            print(
                f"{step}, {shape}: "
                + ", ".join(
                    f"{n} {statistics.median(v):.0f} ({min(v):.0f}-{max(v):.0f})"
                    + ("" if errors[n] < 1e-2 else f" WRONG {errors[n]}")
                    for n, v in found.items()
                )
                + f"; clock {statistics.median(c[0] for c in busy):.0f} MHz, {statistics.median(c[1] for c in busy):.0f} W",
                flush=True,
            )
            del case, calls
            torch.cuda.empty_cache()
    return 0


def trace(dims):
    """Clocks of one program's steps, by the traced copy."""
    import statistics
    import torch
    import hopper_traced
    from headrace.kernels.triton import paged_attention
    from gpu_prefill import SHAPES, STEPS, Prompts
    from gpu_timing import time_us

    for shape, step, name in (("32q/8kv x 128", "8192 over 16384", "two"), ("32q/8kv x 128", "16 x 1024", "two"), ("14q/2kv x 64", "8192 over 60000", "d64three"), ("14q/2kv x 64", "16 x 1024", "d64three")):
        heads, kv, d = SHAPES[shape]
        case = Prompts.make(shape, step, 16)
        tiles = tiles_of(name, heads // kv, d)
        paged_attention.HopperPrefill = hopper_traced.HopperPrefill
        attention, metadata, summary = case.build(tiles=tiles)
        from headrace.kernels.triton.work_items import LaunchBounds
        keys, values = case.pools[0]
        for _ in range(2):
            attention._lse.zero_()
            attention.run(case.q, keys, values, case.table, metadata, case.out, LaunchBounds(summary.num_decode, summary.num_prefill, 0))
        torch.cuda.synchronize()
        words = attention._lse.view(-1).view(torch.int32).cpu()
        for group in (0, 1):
            steps = words[group * 8000 : (group + 1) * 8000].view(-1, 8)[:, :6]
            seen = [i for i in range(4, 990) if int(steps[i, 5]) and int(steps[i - 1, 5])]
            gaps = [[(int(steps[i, j + 1]) - int(steps[i, j])) % 2**32 for j in range(5)] + [(int(steps[i, 0]) - int(steps[i - 1, 5])) % 2**32] for i in seen]
            gaps = [g for g in gaps if max(g) < 60000]
            if gaps:
                print(f"{step} {shape} group {group}: {len(gaps)} steps; K wait, V wait+issue, scores, weights, PV wait, rest:", [round(statistics.median(g[j] for g in gaps)) for j in range(6)], "sum of means", round(sum(statistics.mean(g[j] for g in gaps) for j in range(6))))
            ends = words[32000 + group * 2400 :][:2400].view(-1, 8)[:, :7]
            seen = [i for i in range(1, 290) if int(ends[i, 6])]
            gaps = [[(int(ends[i, j + 1]) - int(ends[i, j])) % 2**32 for j in range(6)] + [(int(ends[i, 0]) - int(ends[i - 1, 6])) % 2**32] for i in seen]
            if gaps:
                print(f"   pairs {len(gaps)}: q load+PV issue, put q, K wait+QK issue, PV wait, write, scores wait, blocks:", [round(statistics.median(g[j] for g in gaps)) for j in range(7)])
        if group:
            print("   raw of group 0:", [int(x) - int(steps[5, 0]) for x in words[40:88].tolist() if x])
        del case
    return 0


def plain(dims):
    """16 x 1024 from a graph, where nothing empties the cache between calls."""
    from gpu_prefill import SHAPES, Prompts
    from gpu_timing import time_us

    for shape, name in (("32q/8kv x 128", "two"), ("16q/8kv x 128", "two"), ("14q/2kv x 64", "d64two"), ("14q/2kv x 64", "d64three")):
        heads, kv, d = SHAPES[shape]
        case = Prompts.make(shape, "16 x 1024", 16)
        us = time_us(case.ours(tiles_of(name, heads // kv, d)))
        print(f"16 x 1024, {shape}, {name}, graph: {case.flops / us / 1e6:.0f} TFLOP/s, {us:.0f} us", flush=True)
    import time as clock
    call = case.ours(tiles_of(name, heads // kv, d))
    call()
    import torch
    torch.cuda.synchronize()
    begun = clock.perf_counter()
    for _ in range(50):
        call()
    print("host, one launch:", round((clock.perf_counter() - begun) / 50 * 1e6), "us")
    return 0


def start(mode, name):
    return subprocess.Popen(
        [sys.executable, str(HERE), mode, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, seconds, lines=40):
    try:
        out, _ = process.communicate(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        out += "\nTIMED OUT"
    print("\n".join(out.strip().splitlines()[-lines:]), flush=True)
    return process.returncode


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit({"check": check, "time": timing, "build": build, "trace": trace, "plain": plain}[sys.argv[1]](sys.argv[2]))
    begun, limit = time.time(), float(sys.argv[1]) if len(sys.argv) > 1 else 110
    running = {name: start("check", name) for name in VARIANTS}
    codes = {name: finish(process, begun + 40 - time.time(), 22) for name, process in running.items()}
    print("checked", codes, round(time.time() - begun), "s", flush=True)
    for dim in (64, 128):
        good = [n for n, v in VARIANTS.items() if v[4] == dim and codes[n] == 0]
        builds = [start("build", n) for n in good] + ([start("trace", "x")] if dim == 64 else [])
        for process in builds:
            finish(process, 30, 30)
        if good:
            finish(start("time", ",".join(good)), begun + limit * (0.6 if dim == 64 else 0.95) - time.time(), 12)
    finish(start("plain", "x"), begun + limit - time.time(), 12)
    print("done", round(time.time() - begun), "s")
