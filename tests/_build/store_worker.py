"""One process that uses a store, for tests that kill it, run several at once or give it a bad disk.

    python store_worker.py ACTION JSON

Every action prints one JSON line. Content of entries is a function of the key, so any reader can check it.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from llmapi._build.store import lock as store_lock
from llmapi._build.key import Key
from llmapi._build.store import Store
from llmapi.errors import CacheError


def content(n: int, name: str, size: int) -> bytes:
    seed = hashlib.sha256(f"{n}/{name}".encode()).digest()
    return (seed * (size // len(seed) + 1))[:size]


def make_key(n: int) -> Key:
    return Key.of(model="tiny", n=n)


def builder_of(n: int, size: int = 20_000, files: int = 3):
    def builder(staging):
        for i in range(files):
            name = f"part-{i}.bin"
            with staging.open(name) as f:
                data = content(n, name, size)
                for start in range(0, size, 4096):
                    f.write(data[start : start + 4096])
        staging.file("sub/direct.bin").write_bytes(content(n, "sub/direct.bin", 100))

    return builder


def check(entry, n: int, size: int = 20_000) -> None:
    for name, record in entry.manifest.files.items():
        expected = content(n, name, 100 if name.startswith("sub/") else size)
        assert entry.file(name).read_bytes() == expected, f"{name} is wrong"
        assert record.size == len(expected)


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the other processes did not come"
        time.sleep(0.005)


def act_kill_at(root: str, n: int, at: int, what: str, archive: str = "") -> dict:
    """Do something, and die by SIGKILL just before the ``at``-th time the interpreter touches a file; 0: only count."""
    store = Store(Path(root), budget_bytes=10**9)
    seen = 0
    watched = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "fcntl.flock"}

    def hook(event: str, args: object) -> None:
        nonlocal seen
        if event in watched:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if what == "build":
        store.build("engine", make_key(n), "tiny", builder_of(n)).close()
    elif what == "prune":
        store.prune(0)
    elif what == "import":
        store.import_(Path(archive))
    return {"touched": seen}


def act_build_together(root: str, n: int, me: int, marks: str, others: int, die: bool = False) -> dict:
    """Build while ``others`` processes wait, each of which leaves a mark when it begins to wait."""
    marks_folder = Path(marks)
    built = False

    def builder(staging):
        nonlocal built
        built = True
        with (marks_folder / "builds").open("a") as f:
            f.write(f"{me}\n")
        until(lambda: len(list(marks_folder.glob("waits-*"))) >= others)
        first = not (marks_folder / "died").exists()
        builder_of(n)(staging)
        if die and first:
            (marks_folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    store = Store(Path(root))
    waits = marks_folder / f"waits-{me}"
    with store.build("engine", make_key(n), "tiny", builder, on_wait=lambda s: waits.touch()) as entry:
        check(entry, n)
    return {"built": built, "report": [store.snapshot().builds, store.snapshot().waits]}


def act_orphan(path: str) -> dict:
    """Take a lock, start a child without exec, and die; the child lives on until standard input ends."""
    lock = store_lock.try_lock(Path(path))
    assert lock is not None
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, b"x")
        sys.stdin.read()
        os._exit(0)
    os.read(read, 1)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def act_hold(root: str, n: int) -> dict:
    """Open an entry, say so, and keep it until standard input ends."""
    entry = Store(Path(root)).get("engine", make_key(n))
    assert entry is not None
    print(json.dumps({"held": True}), flush=True)
    sys.stdin.read()
    check(entry, n)
    return {"ok": True}


def act_build_slowly(root: str, n: int) -> dict:
    """Build until standard input says something; say when the first file is there."""

    def builder(staging):
        builder_of(n)(staging)
        print(json.dumps({"staging": str(staging.path)}), flush=True)
        sys.stdin.readline()

    Store(Path(root)).build("engine", make_key(n), "tiny", builder).close()
    return {"ok": True}


def act_churn(root: str, rounds: int, keys: int, seed: int) -> dict:
    """Open or build entries over and over under a budget of two of them; every byte read must be right."""
    store = Store(Path(root), budget_bytes=130_000)
    for i in range(rounds):
        n = (i * 7 + seed * 3) % keys
        with store.build("engine", make_key(n), "tiny", builder_of(n)) as entry:
            check(entry, n)
    report = store.snapshot()
    return {"evicted": report.evicted, "hits": report.hits, "builds": report.builds, "set_aside": report.set_aside}


def act_wait(root: str, n: int) -> dict:
    """Wait for another builder; say when the waiting begins."""
    said = []

    def on_wait(seconds):
        if not said:
            said.append(1)
            print(json.dumps({"waiting": True}), flush=True)

    Store(Path(root)).build("engine", make_key(n), "tiny", builder_of(n), on_wait=on_wait).close()
    return {"ok": True}


def act_full_disk(root: str, n: int, enlarge: list[str], need: bool = False, limit: int = 0) -> dict:
    """Build on a small disk: what was said, what is left, and whether it works once the disk is larger."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def builder(staging):
        if need:
            staging.need(60_100)
        builder_of(n)(staging)

    store = Store(Path(root))
    try:
        store.build("engine", make_key(n), "tiny", builder).close()
        result = {"built": True}
    except CacheError as error:
        result = {"built": False, "said": str(error), "left": leftovers(Path(root)) if Path(root).exists() else []}
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if enlarge:
        subprocess.run(enlarge, check=True)
    with store.build("engine", make_key(n), "tiny", builder) as entry:
        check(entry, n)
    return {**result, "left_after": leftovers(Path(root))}


def leftovers(root: Path) -> list[str]:
    """Everything a store has no reason to keep: all but sound entries and the clock."""
    sound = [root / "v1" / e.kind / e.digest for e in Store(root).entries()]
    keep = {"clock"}
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in keep and not any(path.is_relative_to(s) for s in sound):
            found.append(str(path.relative_to(root)))
        if path.is_dir() and path.parent.name in {"staging", "quarantine", "locks"}:
            found.append(str(path.relative_to(root)))
    return found


def act_read_only(root: str, n: int, other: int) -> dict:
    """Use a root that cannot be written."""
    store = Store(Path(root))
    with store.get("engine", make_key(n)) as entry:
        check(entry, n)
    said = {}
    for what, call in {
        "build": lambda: store.build("engine", make_key(other), "tiny", builder_of(other)),
        "prune": lambda: store.prune(0),
    }.items():
        try:
            call()
        except CacheError as error:
            said[what] = str(error)
    with store.build("engine", make_key(n), "tiny", builder_of(n)) as entry:
        check(entry, n)
    return {"hits": store.snapshot().hits, "said": said, "problems": len(store.verify())}


if __name__ == "__main__":
    print(json.dumps(globals()[f"act_{sys.argv[1]}"](**json.loads(sys.argv[2]))), flush=True)
