"""The store when nothing goes wrong around it: finding, building, listing, evicting, moving."""

import hashlib
import io
import os
import stat
import tarfile
import threading
import time

import pytest

from llmapi import _env
from llmapi._build.store import evict as store_evict, lock as store_lock, manifest as store_manifest
from llmapi._build.key import Key
from llmapi._build.store import Store
from llmapi._build.store.disk import check_name
from llmapi.errors import CacheError, ConfigError


def key(n=0, **more):
    return Key.of(model="tiny", max_batch_size=n, **more)


def writes(files):
    def builder(staging):
        for name, data in files.items():
            staging.write(name, data)

    return builder


def put(store, n=0, size=1000, kind="engine", label="tiny"):
    with store.build(kind, key(n), label, writes({"a.bin": bytes([n % 256]) * size})) as entry:
        return entry.digest


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache", budget_bytes=10**9)


def tree(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


# ---- finding and building


def test_construction_and_lookup_touch_nothing(tmp_path):
    store = Store(tmp_path / "none" / "cache")
    assert store.get("engine", key()) is None
    assert store.entries() == [] and store.verify() == [] and store.nearest("engine", key()) is None
    assert not (tmp_path / "none").exists()


def test_build_then_hit(store):
    calls = []

    def builder(staging):
        calls.append(1)
        staging.write("plan", b"plan")
        with staging.open("shards/0.bin") as f:
            assert f.write(memoryview(b"0123")) == 4 and f.tell() == 4
            f.write(b"4567")
        staging.file("direct/x.txt").write_text("direct")

    with store.build("engine", key(), "tiny", builder) as entry:
        assert set(entry.manifest.files) == {"plan", "shards/0.bin", "direct/x.txt"}
    with store.build("engine", key(), "tiny", builder) as entry:
        assert entry.file("shards/0.bin").read_bytes() == b"01234567"
        assert entry.file("direct/x.txt").read_text() == "direct"
        assert entry.manifest.label == "tiny" and entry.manifest.key == key() and entry.digest == key().digest
    assert calls == [1]
    report = store.snapshot()
    assert (report.hits, report.misses, report.builds, report.written_bytes) == (1, 1, 1, 18)
    assert sorted(p.name for p in store.root.joinpath("v1").iterdir()) == [
        "clock", "engine", "locks", "quarantine", "staging",
    ]  # fmt: skip
    assert not list((store.root / "v1" / "locks").iterdir()) and not list((store.root / "v1" / "staging").iterdir())


def test_a_miss_names_the_nearest_entry_and_what_differs(store):
    assert store.get("engine", key(8)) is None
    assert store.snapshot().lines[-1] == "miss: engine: no entry of this kind yet"
    put(store, 8)
    put(store, 9, kind="weights")
    with store.build("engine", Key.of(model="other", max_batch_size=1), "", writes({"a": b""})):
        pass
    assert store.get("engine", key(16)) is None
    assert store.snapshot().lines[-1] == "miss: engine: nearest entry differs in max_batch_size: 8 -> 16"
    manifest, diff = store.nearest("engine", key(16))
    assert manifest.digest == key(8).digest and [d.name for d in diff] == ["max_batch_size"]
    assert store.nearest("engine", key(8))[1] == []


def test_files_are_for_the_user_only(store):
    old = os.umask(0)
    try:

        def builder(staging):
            staging.write("a", b"1")
            staging.file("sub/b").write_bytes(b"2")

        store.build("engine", key(), "", builder).close()
    finally:
        os.umask(old)
    for path in [store.root, *store.root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"


def test_builder_failure_leaves_nothing_and_frees_the_lock(store):
    for error in (RuntimeError("no"), KeyboardInterrupt(), SystemExit(1)):

        def builder(staging, error=error):
            staging.open("half").write(b"x" * 100)
            staging.write("whole", b"1")
            raise error

        with pytest.raises(type(error)):
            store.build("engine", key(), "", builder)
        assert tree(store.root) in ([], ["v1/clock"])
    put(store)


def hard_link(staging):
    staging.write("a", b"1")
    os.link(staging.path / "a", staging.path / "b")


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        (lambda s: None, "no file"),
        (lambda s: (s.path / "l").symlink_to("/etc/hostname"), "link"),
        (lambda s: (s.path / "l").symlink_to("/etc"), "link"),
        (lambda s: os.mkfifo(s.path / "f"), "plain file"),
        (hard_link, "link"),
        (lambda s: setattr(s, "kept", s.open("a")), "open"),
        (lambda s: s.write("../x", b""), "file name"),
        (lambda s: s.write("manifest.json", b""), "file name"),
        (lambda s: (s.path / "manifest.json").write_text("{}"), "file name"),
    ],
)
def test_a_builder_cannot_leave_odd_things(store, leave, reason):
    with pytest.raises(CacheError, match=reason):
        store.build("engine", key(), "", leave)
    assert tree(store.root) in ([], ["v1/clock"])


BAD_NAMES = [
    "",
    ".",
    "..",
    "a/../b",
    "/a",
    "a//b",
    "a/",
    "a/..",
    "a\\b",
    "C:x",
    "a\x00",
    "a\n",
    "a. ",
    "x" * 91,
    "é" * 46,
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "use.json", "Manifest.json", None, 3])
def test_names_that_no_entry_takes(name):
    with pytest.raises(CacheError):
        check_name(name)


def test_kinds_that_no_store_takes(store):
    for kind in ("", "staging", "clock", "../x", "A", "a/b", ".a", "x" * 33):
        with pytest.raises(CacheError):
            store.get(kind, key())


def test_a_file_changed_after_it_was_hashed_is_hashed_again(store):
    def builder(staging):
        staging.write("a", b"old")
        staging.path.joinpath("a").write_bytes(b"new content")

    with store.build("engine", key(), "", builder):
        pass
    assert store.verify() == []


def test_entry_refuses_unknown_files_and_use_after_close(store):
    put(store)
    entry = store.get("engine", key())
    with pytest.raises(CacheError, match=r"no file 'b'.*a\.bin"):
        entry.file("b")
    entry.close()
    entry.close()
    with pytest.raises(CacheError, match="closed"):
        entry.file("a.bin")


def test_threads_of_one_process_build_once(store):
    calls, entries, start = [], [], threading.Barrier(4)

    def builder(staging):
        calls.append(1)
        staging.write("a", b"1")

    def work():
        start.wait()
        entries.append(store.build("engine", key(), "", builder))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1 and len(entries) == 4
    for e in entries:
        e.close()


def test_large_files_are_not_hashed_on_a_hit(store):
    size = 3 << 20
    store.build("weights", key(), "", writes({"w": bytes(size), "small": b"s"})).close()
    store.get("weights", key()).close()
    assert store.snapshot().hashed_bytes == 1
    os.utime(store.show(key().digest[:8]) and store.root / "v1/weights" / key().digest / "w")
    store.get("weights", key()).close()
    assert store.snapshot().hashed_bytes == 1 + size + 1  # its time changed: hashed once ...
    store.get("weights", key()).close()
    assert store.snapshot().hashed_bytes == 1 + size + 2  # ... and then known again


# ---- keeping house


def test_listing_show_and_remove(store):
    digests = [put(store, n, size=100 * (n + 1)) for n in range(3)]
    for _ in range(2):
        store.get("engine", key(0)).close()
    entries = store.entries()
    assert [e.digest for e in entries] == [digests[1], digests[2], digests[0]]
    assert [e.size for e in entries] == [200, 300, 100] and [e.hits for e in entries] == [0, 0, 2]
    assert all(abs(e.created - time.time()) < 60 and abs(e.last_used - time.time()) < 60 for e in entries)
    assert store.show(digests[2][:10]).size == 300
    with pytest.raises(CacheError, match="cache ls"):
        store.show("ffffffffffff")
    with pytest.raises(CacheError, match="cache ls"):
        store.show("")
    put(store, 0, kind="weights")
    with pytest.raises(CacheError, match="kind/digits"):
        store.show(digests[0][:10])
    assert store.show(f"weights/{digests[0][:10]}").kind == "weights"
    with store.get("engine", key(1)) as held:
        assert store.in_use(store.show(digests[1]))
        with pytest.raises(CacheError, match="in use"):
            store.remove(digests[1])
        assert held.file("a.bin").exists()
    assert not store.in_use(store.show(digests[1]))
    assert store.remove(digests[1]).digest == digests[1]
    assert store.get("engine", key(1)) is None


def test_prune_takes_the_least_recently_used_and_spares_what_is_in_use(store):
    digests = [put(store, n) for n in range(5)]
    store.get("engine", key(0)).close()
    with store.get("engine", key(1)) as held:
        store.get("engine", key(4)).close()  # order of use now: 2 3 0 1 4
        report = store.prune(3000)
        assert [e.digest for e in report.removed] == [digests[2], digests[3]]
        assert (report.freed, report.left, report.in_use) == (2000, 3000, ())
        report = store.prune(0)
        assert [e.digest for e in report.removed] == [digests[0], digests[4]]
        assert [e.digest for e in report.in_use] == [digests[1]] and report.left == 1000
        assert held.file("a.bin").read_bytes() == b"\x01" * 1000
    assert [e.digest for e in store.prune(0).removed] == [digests[1]]
    assert store.entries() == [] and tree(store.root) == ["v1/clock"]


def test_a_build_over_the_budget_evicts_but_never_itself(tmp_path):
    store = Store(tmp_path, budget_bytes=2500)
    for n in range(4):
        put(store, n)
    assert [e.manifest.key for e in store.entries()] == [key(2), key(3)]
    assert store.snapshot().evicted == 2 and store.snapshot().evicted_bytes == 2000
    with store.build("engine", key(9), "", writes({"a": bytes(5000)})) as entry:
        assert entry.file("a").exists()
    assert [e.manifest.key for e in store.entries()] == [key(9)]


def test_budget(tmp_path, monkeypatch):
    usage = type("usage", (), {"total": 10**12, "free": 9 * 10**11})
    monkeypatch.setattr(store_evict.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(_env.os, "environ", {})
    store = Store(tmp_path / "x")
    assert store.budget() == 2 * 10**11
    usage.total, usage.free = 10**11, 8 * 10**10
    assert store.budget() == 5 * 10**10
    usage.free = 10**10
    assert store.budget() == 2 * 10**10
    monkeypatch.setattr(_env.os, "environ", {"LLMAPI_CACHE_BYTES": "123"})
    assert store.budget() == 123 and Store(tmp_path, budget_bytes=7).budget() == 7
    monkeypatch.setattr(_env.os, "environ", {"LLMAPI_CACHE_BYTES": "lots"})
    with pytest.raises(ConfigError, match="LLMAPI_CACHE_BYTES"):
        store.budget()
    with pytest.raises(CacheError, match="budget_bytes=-1"):
        Store(tmp_path, budget_bytes=-1)


def test_need_makes_room_or_refuses(store, monkeypatch):
    for n in range(3):
        put(store, n)
    monkeypatch.setattr(
        "llmapi._build.store.disk.free_bytes", lambda path: 500 + 1000 * (3 - len(store.entries()))
    )  # a disk of 3500 bytes
    store.build("engine", key(7), "", lambda s: (s.need(1500), s.write("a", b"1"))).close()
    assert [e.manifest.key for e in store.entries()] == [key(1), key(2), key(7)]
    with pytest.raises(CacheError, match=r"needs 9\.0 kB.*are free.*LLMAPI_CACHE_DIR"):
        store.build("engine", key(8), "", lambda s: s.need(9000))


def test_foreign_files_are_never_touched(store):
    digest = put(store, 1)
    entry = store.root / "v1/engine" / digest
    foreign = [
        store.root / "notes.txt",
        store.root / "v2/engine" / digest / "manifest.json",
        store.root / "v1/notes.txt",
        store.root / "v1/engine/notes.txt",
        store.root / "v1/engine/backup/manifest.json",
        store.root / "v1/staging/mine.txt",
        store.root / "v1/staging/mine.lock",
        store.root / "v1/locks/mine.lock",
        store.root / "v1/quarantine/mine/data.bin",
        entry / "sub/mine.txt",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    store.get("engine", key(1)).close()  # more files than declared do no harm
    assert store.verify() == []
    assert len(store.prune(0).removed) == 1
    assert store.get("engine", key(1)) is None
    assert all(p.read_text() == "mine" for p in foreign)
    assert sorted(p.name for p in entry.rglob("*")) == ["mine.txt", "sub"]
    put(store, 1)  # a folder in the way of a new entry is moved, not deleted
    moved = list((store.root / "v1/quarantine").glob(f"engine-{digest}-*/sub/mine.txt"))
    assert [p.read_text() for p in moved] == ["mine"]
    store.prune(0)
    assert moved[0].read_text() == "mine"


# ---- locks


def test_forked_child_neither_keeps_nor_frees_its_parents_lock(tmp_path):
    path = tmp_path / "x.lock"
    lock = store_lock.try_lock(path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock.release()  # not the child's: must change nothing
        os.write(write, b"y" if lock.mine else b"n")
        os.close(write)
        os.read(read, 0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"n"
    assert store_lock.try_lock(path) is None and path.exists()
    lock.release()
    assert not path.exists()
    with store_lock.try_lock(path) as again:
        assert again is not None
    os.close(read)
    os.close(write)


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Its owner removes the lock file on release; who had opened it before must not think he owns the name."""
    path = tmp_path / "x.lock"
    first, real = store_lock.try_lock(path), store_lock._flock
    monkeypatch.setattr(store_lock, "_flock", lambda fd, **how: (first.release(), real(fd, **how))[1])
    assert store_lock.try_lock(path) is None
    assert store_lock.try_lock(path) is not None


@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", False),
        ("nfs", "rw,vers=3,nolock", True),
        ("nfs", "rw,local_lock=all", True),
        ("lustre", "rw,flock", False),
        ("lustre", "rw,localflock", True),
        ("cifs", "rw,nobrl", True),
        ("fuse.sshfs", "rw", True),
        ("fuse.gcsfuse", "rw", True),
        ("fuse.s3fs", "rw", True),
        ("gfs2", "rw,localflocks", True),
        ("ceph", "rw", False),
        ("tmpfs", "rw", False),
        ("ext4", "rw", False),
    ],
)
def test_mounts_whose_locks_other_hosts_do_not_see(kind, options, refused):
    assert (store_lock.local_lock_reason(kind, options) is not None) == refused


@pytest.mark.parametrize("broken", ["enosys", "no-op"])
def test_a_file_system_without_locks_is_refused(store, monkeypatch, broken):
    def flock(fd, operation):
        if broken == "enosys":
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(store_lock.fcntl, "flock", flock)
    with pytest.raises(CacheError, match=r"locks do not work.*LLMAPI_CACHE_DIR"):
        put(store)
    assert tree(store.root) == []


# ---- archives


@pytest.fixture
def archive(store, tmp_path):
    files = {"plan": b"p" * 5000, "sub/t.bin": b"t" * 512, "z-empty": b""}
    store.build("engine", key(1), "tiny", writes(files)).close()
    put(store, 2, kind="weights")
    path = tmp_path / "engine.tar"
    size = store.export([key(1).digest[:12], f"weights/{key(2).digest}"], path)
    assert size == path.stat().st_size and stat.S_IMODE(path.stat().st_mode) == 0o600
    return path


def test_export_and_import(archive, store, tmp_path):
    other = Store(tmp_path / "other", budget_bytes=10**9)
    assert {(e.kind, e.digest) for e in other.import_(archive)} == {
        ("engine", key(1).digest),
        ("weights", key(2).digest),
    }
    with other.get("engine", key(1)) as a, store.get("engine", key(1)) as b:
        assert a.manifest == b.manifest
        assert all(a.file(n).read_bytes() == b.file(n).read_bytes() for n in b.manifest.files)
    assert other.verify() == []
    assert len(other.import_(archive)) == 2 and len(other.entries()) == 2  # once more changes nothing
    with tarfile.open(archive) as tar:  # and it is a plain tar
        assert tar.getnames()[0] == "llmapi-cache.json" and len(tar.getnames()) == 7


def test_import_refuses_what_this_machine_cannot_run(archive, tmp_path):
    other = Store(tmp_path / "other")
    with pytest.raises(CacheError, match=r"cannot be used on this machine.*needs sm_90"):
        other.import_(archive, accept=lambda m: "needs sm_90" if m.kind == "weights" else None)
    assert tree(other.root) == []


def test_export_of_a_damaged_entry_leaves_the_old_archive(archive, store):
    before = archive.read_bytes()
    path = store.root / "v1/engine" / key(1).digest / "plan"
    path.write_bytes(b"q" * 5000)
    with pytest.raises(CacheError, match="plan"):
        store.export([key(1).digest], archive)
    assert archive.read_bytes() == before and len(list(archive.parent.glob("*.tar*"))) == 1
    with pytest.raises(CacheError, match="cannot be written"):
        store.export([f"weights/{key(2).digest}"], archive / "x" / "y.tar")


def members(archive):
    with tarfile.open(archive) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar.getmembers()]


def rewrite(archive, found, target):
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in found:
            tar.addfile(info, io.BytesIO(data))


def resealed(data, **changes):
    return store_manifest.seal({**store_manifest.unseal(data), **changes})


def _rename(name):
    return lambda f: setattr(f[2][0], "name", name)


def _retype(kind, link=""):
    def change(found):
        info, data = found[2]
        info.type, info.linkname = kind, link
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
            info.size, data = 0, b""
        found[2] = (info, data)

    return change


def _manifest(**changes):
    def change(found):
        info, data = found[1]
        data = resealed(data, **changes)
        info.size = len(data)
        found[1] = (info, data)

    return change


def _content(found):
    info, data = found[2]
    found[2] = (info, bytes([data[0] ^ 1]) + data[1:])


def _add(found):
    info = tarfile.TarInfo("0001/extra")
    info.size = 3
    found.append((info, b"xyz"))


ok = {"size": 5000, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename("../../escape"), "escape' where"),
        (_rename("/tmp/escape"), "escape' where"),
        (_rename("0000/other"), "other' where"),
        (_retype(tarfile.SYMTYPE, "/etc/passwd"), "no plain file"),
        (_retype(tarfile.LNKTYPE, "0000/manifest.json"), "no plain file"),
        (_retype(tarfile.CHRTYPE), "no plain file"),
        (_retype(tarfile.DIRTYPE), "no plain file"),
        (_retype(tarfile.FIFOTYPE), "no plain file"),
        (_retype(tarfile.CONTTYPE), "no plain file"),
        (_retype(tarfile.GNUTYPE_LONGNAME), "no plain file"),
        (_retype(tarfile.GNUTYPE_SPARSE), "no plain file"),
        (_manifest(files={"../../escape": ok}), "file name"),
        (_manifest(files={"/escape": ok}), "file name"),
        (_manifest(files={"a": ok, "a/b": ok}), "file and a folder"),
        (_manifest(files={"plan": {"size": 10**15, "sha256": "0" * 64}}), "claims 1000.0 TB"),
        (_manifest(files={"plan": {"size": -1, "sha256": "0" * 64}}), "size -1"),
        (_manifest(files={"plan": ok}), "digest"),
        (_manifest(files={}), "at least one"),
        (_manifest(files={"manifest.json": ok}), "file name"),
        (_manifest(schema=2), "schema"),
        (_manifest(kind="../x"), "kind"),
        (_manifest(kind="weights"), "another entry"),
        (_manifest(digest="0" * 64), "digest"),
        (_manifest(key=[["model", "other"]]), "digest"),
        (_content, "digest"),
        (_add, "more than it declares"),
        (lambda f: f.pop(2), "where '0000/plan' should be"),
        (lambda f: f.pop(), "ends"),
        (lambda f: f.insert(2, f[2]), "where '0000/sub/t.bin' should be"),
        (lambda f: f.clear(), "ends"),
        (lambda f: f.reverse(), "where 'llmapi-cache.json' should be"),
    ],
)
def test_hostile_archives_are_refused_and_leave_nothing(archive, tmp_path, change, reason):
    found = members(archive)
    change(found)
    rewrite(archive, found, tmp_path / "bad.tar")
    inside = tmp_path / "deep" / "er" / "other"
    with pytest.raises(CacheError, match="refused") as caught:
        Store(inside).import_(tmp_path / "bad.tar")
    assert reason in str(caught.value)
    assert tree(tmp_path / "deep") == []
    assert not list(tmp_path.rglob("escape"))


def test_every_truncation_and_a_claim_of_exabytes_are_refused(archive, tmp_path):
    data = archive.read_bytes()
    other = Store(tmp_path / "other")
    bad = tmp_path / "bad.tar"
    for end in [0, 1, 511, 512, 600, 2000, *range(3000, len(data) - 1600, 900)]:
        bad.write_bytes(data[:end])
        with pytest.raises(CacheError, match="refused"):
            other.import_(bad)
    info = tarfile.TarInfo("llmapi-cache.json")
    info.size = 1 << 62
    bad.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + data[512:])
    with pytest.raises(CacheError, match=r"refused.*claims.*bytes"):
        other.import_(bad)
    bad.write_bytes(data + b"tail")
    with pytest.raises(CacheError, match="more than it declares"):
        other.import_(bad)
    with pytest.raises(CacheError, match="cannot be read"):
        other.import_(tmp_path / "none.tar")
    assert tree(other.root) == []


def test_digests_on_record_are_those_of_the_content(store):
    store.build("engine", key(), "", writes({"a": b"abc" * 999})).close()
    with store.get("engine", key()) as entry:
        assert entry.manifest.files["a"].sha256 == hashlib.sha256(b"abc" * 999).hexdigest()
