"""The store when everything goes wrong around it. Faults are injected for real: SIGKILL, full and read-only disks,
damaged bytes. No test proves anything by sleeping."""

import importlib.util
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llmapi._build.store import disk as store_disk, lock as store_lock, manifest as store_manifest, staging as store_staging, use as store_use
from llmapi._build.store import Store
from llmapi._build.store.disk import Layout
from llmapi.errors import CacheError

HERE = Path(__file__).resolve().parent
WORKER = HERE / "store_worker.py"
_spec = importlib.util.spec_from_file_location("store_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
make_key, builder_of, check, leftovers = worker.make_key, worker.builder_of, worker.check, worker.leftovers

LIMIT = 60  # seconds after which a child counts as hanging


def command(action, **arguments):
    return [
        sys.executable,
        str(WORKER),
        action,
        json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}),
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}


def start(action, **arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(action, **arguments), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()
    )


def finish(process):
    """The child's last line, or its exit code where a signal killed it."""
    out, err = process.communicate(timeout=LIMIT)
    if process.returncode < 0:
        return process.returncode
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def run(action, **arguments):
    return finish(start(action, **arguments))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def build(root, n, **options):
    store = Store(root, budget_bytes=10**9)
    with store.build("engine", make_key(n), "tiny", builder_of(n, **options)) as entry:
        check(entry, n, options.get("size", 20_000))
        return entry.path


# ---- killed processes


def moments(touched, count, seed):
    return sorted({1, touched, *random.Random(seed).sample(range(1, touched + 1), count - 2)})


def test_kill_at_20_moments_of_a_build(root):
    touched = run("kill_at", root=root, n=0, at=0, what="build")["touched"]
    assert touched > 30
    rebuilt = 0
    for n, at in enumerate(moments(touched, 20, seed=3), start=1):
        assert run("kill_at", root=root, n=n, at=at, what="build") == -signal.SIGKILL
        store = Store(root, budget_bytes=10**9)
        with store.build("engine", make_key(n), "tiny", builder_of(n)) as entry:
            check(entry, n)
        rebuilt += store.snapshot().builds
        assert leftovers(root) == [], f"killed at touch {at} of {touched}"
    assert 5 < rebuilt < 20  # some died before their entry was published, some after
    assert Store(root).verify() == []


def test_kill_at_moments_of_a_pruning(root, tmp_path):
    for n in range(3):
        build(tmp_path / "full", n)
    shutil.copytree(tmp_path / "full", root)
    touched = run("kill_at", root=root, n=0, at=0, what="prune")["touched"]
    for at in moments(touched, 8, seed=5):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "full", root)
        assert run("kill_at", root=root, n=0, at=at, what="prune") == -signal.SIGKILL
        store = Store(root, budget_bytes=10**9)
        assert store.verify() == []  # no half of an entry is left where an entry is looked for
        for n in range(3):
            build(root, n)
        assert leftovers(root) == []


def test_kill_at_moments_of_an_import(tmp_path):
    build(tmp_path / "source", 1)
    Store(tmp_path / "source").export([make_key(1).digest], tmp_path / "a.tar")
    touched = run("kill_at", root=tmp_path / "c0", n=1, at=0, what="import", archive=tmp_path / "a.tar")["touched"]
    for i, at in enumerate(moments(touched, 6, seed=7), start=1):
        root = tmp_path / f"c{i}"
        killed = run("kill_at", root=root, n=1, at=at, what="import", archive=tmp_path / "a.tar")
        assert killed == -signal.SIGKILL
        assert Store(root).verify() == []
        build(root, 1)
        assert leftovers(root) == []


def together(root, marks, count, die):
    marks.mkdir()
    processes = [
        start("build_together", root=root, n=1, me=i, marks=marks, others=count - 1, die=die) for i in range(count)
    ]
    return [finish(p) for p in processes], (marks / "builds").read_text().split()


def test_eight_processes_build_one_key_once(root, tmp_path):
    results, builds = together(root, tmp_path / "marks", 8, die=False)
    assert len(builds) == 1
    assert sum(r["built"] for r in results) == 1
    assert sorted(r["report"] for r in results) == [[0, 1]] * 7 + [[1, 0]]
    assert leftovers(root) == []


def test_builder_dies_while_seven_wait(root, tmp_path):
    results, builds = together(root, tmp_path / "marks", 8, die=True)
    assert results.count(-signal.SIGKILL) == 1 and len(builds) == 2
    living = [r for r in results if r != -signal.SIGKILL]
    assert sorted(r["report"] for r in living) == [[0, 1]] * 6 + [[1, 0]]
    assert leftovers(root) == []


def test_a_live_build_is_not_swept_and_a_dead_one_is(root):
    process = start("build_slowly", root=root, n=1)
    staging = Path(json.loads(process.stdout.readline())["staging"])
    build(root, 2)
    Store(root).prune(0)
    assert (staging / "part-0.bin").exists()
    process.stdin.write("go\n")
    process.stdin.flush()
    assert finish(process) == {"ok": True}
    assert leftovers(root) == []

    process = start("build_slowly", root=root, n=3)
    staging = Path(json.loads(process.stdout.readline())["staging"])
    process.kill()
    finish(process)
    assert (staging / "part-0.bin").exists()
    build(root, 2)  # another key, even
    assert leftovers(root) == []


def test_ctrl_c_ends_a_wait(root):
    build(root, 0)
    with store_lock.try_lock(Layout(root).key_lock("engine", make_key(1).digest)):
        process = start("wait", root=root, n=1)
        assert json.loads(process.stdout.readline()) == {"waiting": True}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in err and process.returncode != 0
    assert leftovers(root) == []


def test_a_child_that_outlives_a_builder_does_not_keep_its_lock(tmp_path):
    process = start("orphan", path=tmp_path / "x.lock")
    assert process.wait(timeout=LIMIT) == -signal.SIGKILL
    with store_lock.try_lock(tmp_path / "x.lock") as lock:
        assert lock is not None
    process.stdin.close()  # now the child may go
    process.stdin = None
    process.communicate(timeout=LIMIT)


def test_a_lock_held_for_a_moment_is_waited_out(root, monkeypatch):
    path = build(root, 1)
    real, refusals = store_lock.try_lock, []

    def busy_twice(lock_path):
        refusals.append(lock_path)
        return None if len(refusals) <= 2 else real(lock_path)

    monkeypatch.setattr(store_lock, "try_lock", busy_twice)
    Store(root).remove(path.name)
    assert not path.exists() and len(refusals) > 2


def test_sweepers_disturb_nobody(root):
    """A sweeper holds every lock it finds for a moment; nobody may take that for a broken disk or for use."""
    build(root, 0)
    done = threading.Event()

    def sweep():
        while not done.is_set():
            store_staging.sweep(Layout(root))
            Store(root).in_use(Store(root).entries()[0])

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for t in sweepers:
        t.start()
    try:
        for n in range(1, 25):
            store = Store(root, budget_bytes=10**9)
            store.build("engine", make_key(n), "tiny", builder_of(n)).close()
            store.remove(make_key(n).digest)
    finally:
        done.set()
        for t in sweepers:
            t.join()
    assert leftovers(root) == []


# ---- eviction beside readers


def test_an_entry_in_use_by_another_process_outlives_any_pruning(root):
    path = build(root, 1)
    process = start("hold", root=root, n=1)
    assert json.loads(process.stdout.readline()) == {"held": True}
    store = Store(root)
    report = store.prune(0)
    assert [e.digest for e in report.in_use] == [path.name] and path.is_dir()
    with pytest.raises(CacheError, match="in use"):
        store.remove(path.name)
    process.stdin.close()
    process.stdin = None
    assert finish(process) == {"ok": True}

    process = start("hold", root=root, n=1)
    assert json.loads(process.stdout.readline()) == {"held": True}
    process.kill()
    process.communicate(timeout=LIMIT)
    assert len(store.prune(0).removed) == 1 and not path.exists()  # a dead process holds nothing


def test_evicting_under_a_budget_while_others_read(root):
    processes = [start("churn", root=root, rounds=40, keys=5, seed=i) for i in range(3)]
    results = [finish(p) for p in processes]
    assert sum(r["evicted"] for r in results) > 10 and sum(r["builds"] for r in results) > 15
    assert sum(r["set_aside"] for r in results) == 0
    assert Store(root).verify() == [] and leftovers(root) == []


def test_entry_deleted_by_hand_while_in_use(root):
    path = build(root, 1)
    store = Store(root)
    entry = store.get("engine", make_key(1))
    with entry.file("part-0.bin").open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        shutil.rmtree(path)
        assert mapped[:] == worker.content(1, "part-0.bin", 20_000)
        with pytest.raises(CacheError, match="deleted while in use"):
            entry.file("part-0.bin")
        assert store.get("engine", make_key(1)) is None
        build(root, 1)
    entry.close()
    store.get("engine", make_key(1)).close()


# ---- damaged bytes

BIG = (1 << 20) + 5


def files_of(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def flip(file, silently):
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    if silently:  # as a failing disk does: not even the file's time changes
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 2_000_000_000))
    assert file.stat().st_size == before.st_size


def test_verify_finds_a_flipped_bit_in_any_file(root):
    names = files_of(build(root, 1, size=BIG))
    assert len(names) == 7
    for name in names:
        path = build(root, 1, size=BIG)
        flip(path / name, silently=True)
        problems = Store(root).verify()
        if name in ("use.json", "stamps.json"):  # hints only: nothing can be wrong but an age
            assert problems == []
        else:
            assert len(problems) == 1 and name in problems[0].reason and problems[0].moved.is_dir()
            assert not path.exists()
    assert Store(root, budget_bytes=10**9).prune(0).left == 0 and leftovers(root) == []


def test_a_flipped_bit_is_never_loaded(root):
    for name in files_of(build(root, 1, size=BIG)):
        path = build(root, 1, size=BIG)
        flip(path / name, silently=False)
        store = Store(root, budget_bytes=10**9)
        found = store.get("engine", make_key(1))
        if name in ("use.json", "stamps.json"):
            check(found, 1, BIG)
            found.close()
        else:
            assert found is None
            assert name in store.snapshot().lines[-1] and "set aside" in store.snapshot().lines[-1]
            assert store.snapshot().set_aside == 1


def test_every_bit_of_a_manifest_counts(root):
    data = bytearray((build(root, 1) / "manifest.json").read_bytes())
    for i in range(len(data)):
        data[i] ^= 1 << i % 8
        with pytest.raises(CacheError):
            store_manifest.Manifest.load(bytes(data))
        data[i] ^= 1 << i % 8
    store_manifest.Manifest.load(bytes(data))


def test_a_file_cut_short_is_noticed_without_hashing(root):
    path = build(root, 1, size=BIG) / "part-1.bin"
    before = path.stat()
    os.truncate(path, BIG - 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    store = Store(root)
    assert store.get("engine", make_key(1)) is None
    assert f"part-1.bin has {BIG - 1} bytes, its manifest says {BIG}" in store.snapshot().lines[-1]


def test_damaged_entries_are_set_aside_and_rebuilt(root):
    def truncate_manifest(path):
        data = (path / "manifest.json").read_bytes()
        for end in [*range(0, len(data), 97), len(data) - 1]:
            yield lambda end=end: (path / "manifest.json").write_bytes(data[:end])

    path = build(root, 1)
    damages = [
        *truncate_manifest(path),
        lambda: (path / "part-1.bin").unlink(),
        lambda: (path / "part-1.bin").write_bytes(b""),
        lambda: (path / "part-1.bin").open("ab").write(b"x"),
        lambda: ((path / "part-1.bin").unlink(), (path / "part-1.bin").symlink_to(path / "part-0.bin")),
        lambda: ((path / "part-1.bin").unlink(), (path / "part-1.bin").mkdir()),
        lambda: shutil.rmtree(path / "sub"),
        lambda: (path / "manifest.json").write_text("[" * 100_000),
        lambda: (path / "manifest.json").write_bytes(store_manifest.seal({"schema": 1})),
    ]
    for damage in damages:
        build(root, 1)
        damage()
        store = Store(root, budget_bytes=10**9)
        with store.build("engine", make_key(1), "tiny", builder_of(1)) as entry:
            check(entry, 1)
        assert store.snapshot().set_aside == 1 and "cannot be used" in store.snapshot().lines[0]
    assert len(list((root / "v1/quarantine").iterdir())) == len(damages)
    Store(root).prune(10**9)
    assert len(list((root / "v1/quarantine").iterdir())) == len(damages)  # kept while there is room
    Store(root).prune(100_000)
    assert leftovers(root) == [] and len(Store(root).entries()) == 1


def test_an_entry_under_another_key_is_not_believed(root):
    path = build(root, 1)
    path.rename(path.with_name(make_key(2).digest))
    store = Store(root)
    assert store.get("engine", make_key(2)) is None and "is that of" in store.snapshot().lines[-1]


def test_a_folder_without_manifest_is_in_nobodys_way(root):
    path = build(root, 1)
    (path / "manifest.json").unlink()
    assert Store(root).get("engine", make_key(1)) is None
    build(root, 1)


def test_damage_found_by_two_at_once_spares_the_new_entry(root):
    """Between finding damage and moving it, another process may have set it aside and built anew."""
    path = build(root, 1)
    (path / "part-0.bin").write_bytes(b"")
    real = store_lock.try_briefly
    raced = []

    def rebuild_first(lock_path):
        if not raced:
            raced.append(1)
            build(root, 1)
        return real(lock_path)

    store = Store(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmapi._build.store.open.store_lock.try_briefly", rebuild_first)
        found = store.get("engine", make_key(1))
    check(found, 1)
    found.close()
    assert store.snapshot().set_aside == 0


# ---- clocks and versions


def test_a_clock_going_backwards_does_not_turn_the_order_of_use(root, monkeypatch):
    now = [2_000_000_000.0]
    monkeypatch.setattr(store_use.time, "time", lambda: now[0])
    monkeypatch.setattr(store_use.time, "time_ns", lambda: int(now[0] * 1e9))
    store = Store(root, budget_bytes=10**9)
    for n in range(4):
        build(root, n)
    now[0] -= 10**9  # thirty years
    store.get("engine", make_key(0)).close()
    build(root, 4)
    now[0] -= 5
    store.get("engine", make_key(1)).close()
    order = [make_key(n).digest for n in (2, 3, 0, 4, 1)]
    assert [e.digest for e in store.entries()] == order
    for damage in (b"", b"garbage", b"9" * 30, b"-5"):  # nor does losing the store's own clock
        (root / "v1/clock").write_bytes(damage)
        oldest = order.pop(0)
        store.get("engine", store.show(oldest).manifest.key).close()
        order.append(oldest)
        assert [e.digest for e in store.entries()] == order
    assert [e.digest for e in store.prune(130_000).removed] == order[:3]


def test_two_versions_share_a_root(root, monkeypatch):
    build(root, 1)
    build(root, 2)
    before = {p: p.read_bytes() for p in (root / "v1").rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        for module in (store_disk, store_manifest):
            patch.setattr(module, "SCHEMA", 2)
        store = Store(root, budget_bytes=10**9)
        assert store.entries() == [] and store.get("engine", make_key(1)) is None
        build(root, 1)
        (root / "v1/staging/deadbeef").mkdir()
        assert store.verify() == [] and len(store.prune(0).removed) == 1
    (root / "v1/staging/deadbeef").rmdir()
    assert {p: p.read_bytes() for p in (root / "v1").rglob("*") if p.is_file()} == before
    # A manifest of another schema under our name is damage, not something to guess at.
    path = build(root, 1)
    fields = store_manifest.unseal((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(store_manifest.seal({**fields, "schema": 2}))
    store = Store(root)
    assert store.get("engine", make_key(1)) is None and "schema is 2" in store.snapshot().lines[-1]


def test_a_path_with_spaces_quotes_and_non_ascii(tmp_path):
    root = tmp_path / "my cache 'ünï' \"模型\" \n 100% #1"
    assert run("build_together", root=root, n=1, me=0, marks=tmp_path, others=0)["built"]
    build(root, 1)
    store = Store(root, budget_bytes=10**9)
    archive = tmp_path / "ex pört 模.tar"
    store.export([make_key(1).digest], archive)
    assert len(store.prune(0).removed) == 1
    store.import_(archive)
    assert store.verify() == []
    build(root, 1)
    assert leftovers(root) == []


# ---- bad disks


def namespace(script, *arguments, **kwargs):
    """Run a shell script as root of its own mount namespace, whose mounts vanish with it."""
    return subprocess.run(
        ["unshare", "-rm", "sh", "-euc", script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment(),
        **kwargs,
    )


@pytest.fixture
def mounts(tmp_path):
    """Skip where this user may not mount a file system, even in a namespace of his own."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed, so no small disk can be mounted")
    (tmp_path / "probe").mkdir()
    probe = namespace('mount -t tmpfs -o size=64k tmpfs "$1"', tmp_path / "probe")
    if probe.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.strip()}")


def full_disk(tmp_path, options, larger, **arguments):
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    enlarge = ["mount", "-o", f"remount,{larger}", str(disk)]
    child = command("full_disk", root=disk / "cache", n=1, enlarge=enlarge, **arguments)
    done = namespace('mount -t tmpfs -o "$1" tmpfs "$2"; shift 2; exec "$@"', options, disk, *child)
    assert done.returncode == 0, f"{options}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def check_full(results):
    for r in results:
        assert r["left_after"] == []
        if not r["built"]:
            assert r["left"] == []
            assert "disk of the cache is full" in r["said"] and "are free" in r["said"]
            assert "LLMAPI_CACHE_DIR" in r["said"]
    assert sum(not r["built"] for r in results) >= 5 and results[-1]["built"]


def test_disk_full_at_any_write(mounts, tmp_path):
    """A disk of 1, 2, 3 ... pages fails at a later write each time, until it is large enough."""
    pages = [1, 2, 3, 5, 8, 11, 15, 16, 17, 18, 19, 20, 21, 26]
    check_full([full_disk(tmp_path, f"size={4 * n}k", "size=1m") for n in pages])


def test_disk_out_of_inodes_at_any_file(mounts, tmp_path):
    inodes = [*range(2, 18), 24]
    check_full([full_disk(tmp_path, f"size=1m,nr_inodes={n}", "nr_inodes=100") for n in inodes])


def test_disk_too_small_is_refused_before_the_work(mounts, tmp_path):
    result = full_disk(tmp_path, "size=40k", "size=1m", need=True)
    assert "an entry needs 60.1 kB" in result["said"] and result["left"] == [] and result["left_after"] == []


def test_a_limit_on_file_sizes_reads_like_a_full_disk(tmp_path):
    """Needs no mount: a quota answers with another error number."""
    for limit in (10, 30, 300, 5000, 19_999):
        result = run("full_disk", root=tmp_path / str(limit), n=1, enlarge=[], limit=limit)
        assert not result["built"] and result["left"] == [] and result["left_after"] == []
        assert "disk of the cache is full" in result["said"]


def test_read_only_root(mounts, root):
    build(root, 1)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}
    script = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; shift; exec "$@"'
    done = namespace(script, root, *command("read_only", root=root, n=1, other=2))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["hits"] == 2 and result["problems"] == 0
    for what in ("build", "prune"):
        assert "cannot be written" in result["said"][what] and "LLMAPI_CACHE_DIR" in result["said"][what]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()} == before


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("mine")
    for root in (tmp_path / "cache", tmp_path / "cache" / "deeper"):
        with pytest.raises(CacheError, match="LLMAPI_CACHE_DIR"):
            Store(root).build("engine", make_key(1), "", builder_of(1))
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_builders_own_errors_pass_unchanged(root):
    def builder(staging):
        open("/nowhere/model.safetensors")  # noqa: PTH123, SIM115

    with pytest.raises(FileNotFoundError, match="nowhere"):
        Store(root).build("engine", make_key(1), "", builder)


def test_a_full_disk_told_by_a_library(root):
    """Native writers have an error type of their own, which keeps only the text."""
    torch = pytest.importorskip("safetensors")

    def builder(staging):
        raise torch.SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CacheError, match="disk of the cache is full"):
        Store(root).build("engine", make_key(1), "", builder)
    assert leftovers(root) == []
