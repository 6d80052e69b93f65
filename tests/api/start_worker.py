"""Starts of real models in processes of their own, forked from one that has imported and warmed up everything.

    python start_worker.py MODEL FOLDER

Reads one JSON list of jobs a line, runs all of a list at once, each in a forked child, and answers with a JSON list of
their results: what the child said, or ``{"signal": n}``. The first line it writes says that it is ready.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from llmapi import LLM, LLMAPIError, SamplingParams
from llmapi._build import weights
from llmapi._build.store import Store, hashing_file

PROMPT = [5, 9, 17, 33, 65]
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096


def start(model: str, root: str, **options: Any) -> dict[str, Any]:
    """One start and a few tokens."""
    with LLM(model, cache_dir=root, progress=False, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        tokens = llm.generate(PROMPT, params, use_tqdm=False).outputs[0].token_ids
        report = llm.build_report
        return {
            "tokens": list(tokens),
            "built": [kind for line in report.cache if line.startswith("built: ") for kind in [line.split()[1]]],
            "cache": report.cache,
            "text": llm.generate("hello", params, use_tqdm=False).text,
        }


def job_start(model: str, root: str, at: int = 0, limit: int = 0, **options: Any) -> dict[str, Any]:
    """Start, and die by SIGKILL just before the ``at``-th time something below the root is touched; 0: only count."""
    touched = 0
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.truncate"}

    def touch() -> None:
        nonlocal touched
        touched += 1
        if touched == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "fcntl.flock" or (event in events and str(args[0]).startswith(root)):
            touch()

    append = hashing_file.HashingFile._append

    def counted(self: Any, view: memoryview) -> None:
        half = len(view) // 2
        append(self, view[:half])
        touch()  # in the middle of a file, too
        append(self, view[half:])

    hashing_file.HashingFile._append = counted  # type: ignore[method-assign]
    sys.addaudithook(hook)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return {**start(model, root, **options), "touched": touched}


def job_together(model: str, root: str, marks: str, me: int, others: int, die: bool) -> dict[str, Any]:
    """Start beside others. Who converts the weights first waits for the others to wait, and may die half way."""
    folder = Path(marks)

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another process is building weights" in record.getMessage():
                (folder / f"waits-{me}").touch()

    log = logging.getLogger("llmapi")
    log.setLevel(logging.INFO)
    log.addHandler(Waits())
    write = weights.write_weights

    def slow(out: Any, specs: Any, values: Any, progress: Any) -> None:
        with (folder / "conversions").open("a") as f:
            f.write(f"{me}\n")
        first = not (folder / "died").exists()
        end = time.monotonic() + 60
        while first and len(list(folder.glob("waits-*"))) < others:
            assert time.monotonic() < end, "the others did not come"
            time.sleep(0.01)
        if first and die:
            (folder / "died").touch()
            write(out, specs[: len(specs) // 2], values, progress)
            os.kill(os.getpid(), signal.SIGKILL)
        write(out, specs, values, progress)

    weights.write_weights = slow
    return start(model, root)


def job_full_disk(model: str, root: str, size: int) -> dict[str, Any]:
    """Start on a disk of ``size`` bytes, then once more when it is large enough."""
    _own_mounts()
    _mount("tmpfs", root, "tmpfs", 0, f"size={size}")
    try:
        said = start(model, f"{root}/cache") and "it fitted"
    except LLMAPIError as error:
        said = f"{type(error).__name__}: {error}"
    left = garbage(Path(root) / "cache")
    _mount("tmpfs", root, "tmpfs", _MS_REMOUNT, "size=100m")
    return {"said": said, "left": left, **start(model, f"{root}/cache"), "after": garbage(Path(root) / "cache")}


def job_read_only(model: str, root: str, **options: Any) -> dict[str, Any]:
    """Start from a root that cannot be written."""
    _own_mounts()
    _mount(root, root, None, _MS_BIND, None)
    _mount(None, root, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None)
    return start(model, root, **options)


def garbage(root: Path) -> list[str]:
    """Everything but sound entries, the clock and notes on digests."""
    sound = [root / "v1" / e.kind / e.digest for e in Store(root).entries()]
    found = [p for p in sorted(root.rglob("*")) if p.is_file() and not any(p.is_relative_to(s) for s in sound)]
    found = [p for p in found if p.name != "clock" and not (p.suffix == ".json" and p.parent.parent.name == "digests")]
    found += [p for p in root.rglob("*") if p.is_dir() and p.parent.name in {"staging", "quarantine", "locks"}]
    return [str(p.relative_to(root)) for p in found]


class CannotMount(Exception):
    """This user may not mount anything, even in a namespace of his own."""


def _own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)):
        raise CannotMount(os.strerror(ctypes.get_errno()))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, "/", None, 16384 | (1 << 18), None)  # MS_REC | MS_PRIVATE: nobody else sees what follows


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [t.encode() if t is not None else None for t in (source, target, kind, data)]
    if libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]):
        raise CannotMount(os.strerror(ctypes.get_errno()))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job; whatever it raises is its result."""
    job = dict(job)
    try:
        result: dict[str, Any] = globals()[f"job_{job.pop('do')}"](**job)
    except CannotMount as error:
        return {"cannot_mount": str(error)}
    except LLMAPIError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except BaseException:
        return {"crash": traceback.format_exc()}
    return result


def fork(job: dict[str, Any]) -> tuple[int, int]:
    """Start a job in a child: its process and the end of a pipe to read its result from."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        data = json.dumps(run(job)).encode()
        while data:
            data = data[os.write(write, data) :]
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    """Warm up, then serve."""
    torch.set_num_threads(1)
    model, folder = sys.argv[1:]
    start(model, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        children = [fork(job) for job in json.loads(line)]
        results = []
        for child, read in children:
            with os.fdopen(read, "rb") as pipe:
                said = pipe.read()
            _, status = os.waitpid(child, 0)
            results.append({"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else json.loads(said))
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
