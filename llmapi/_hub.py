"""The Hugging Face hub: its cache on this disk first, the network only for what is missing there.

``huggingface_hub`` reads its own environment (``HF_HOME``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``,
``HF_ENDPOINT``), keeps finished files and resumes a connection that broke.
"""

from __future__ import annotations

import glob
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmapi._files import CONFIG, is_tokenizer_core
from llmapi._source import listing, needed, no_model
from llmapi.errors import GatedModelError, LLMAPIError, ModelNotFoundError, OfflineError, SourceError


@dataclass(frozen=True)
class _Cached:
    """What the hub's cache holds of one revision.

    ``missing`` is about the files that are known to be needed. ``known`` says whether they all are: without the hub's
    own list of files, a folder with weights but no tokenizer may be half a download or a whole model.
    """

    folder: Path
    files: list[str]
    missing: list[str]
    known: bool


def fetch(
    model: str,
    *,
    revision: str | None,
    token: str | bool | None,
    dummy: bool,
    trust_remote_code: bool,
    refresh: bool,
    progress: bool,
    calls: list[str],
    check: Callable[[Path], None] | None = None,
) -> tuple[Path, list[str]]:
    """Folder of the snapshot of ``model`` and the names of the files in it that the model needs.

    The folder's name is the commit hash. Every call that may use the network is noted in ``calls``, by name. See
    ``llmapi._source.resolve`` for the other arguments and the errors.
    """
    choose = _Chooser(dummy, trust_remote_code, check)
    cached = _look(model, revision, choose)
    usable = cached is not None and not cached.missing and not refresh
    if cached is not None and usable and cached.known:
        return cached.folder, cached.files
    try:
        with _explained(model, revision, cached):
            return _download(model, revision, token, choose, progress, calls)
    except SourceError:
        if cached is not None and usable:  # whole as far as this disk can tell, and the hub is of no help
            return cached.folder, cached.files
        raise


@dataclass(frozen=True)
class _Chooser:
    dummy: bool
    trust_remote_code: bool
    check: Callable[[Path], None] | None = None  # of config.json, before anything else is fetched

    def __call__(self, names: Collection[str], folder: Path | None) -> list[str]:
        if self.check is not None and CONFIG in names:
            if folder is None or not (folder / CONFIG).is_file():
                return [CONFIG]
            self.check(folder / CONFIG)
        return sorted(set(needed(names, folder, dummy=self.dummy, trust_remote_code=self.trust_remote_code)))


def _look(model: str, revision: str | None, choose: _Chooser) -> _Cached | None:
    """Look into the hub's cache, without any network; None where the revision is not there at all."""
    folder = _cached_folder(model, revision)
    if folder is None:
        return None
    here = listing(folder)
    listed = _listed(model, folder.name)
    names = here if listed is None else listed
    if no_model(model, names, dummy=choose.dummy) is not None:
        return _Cached(folder, [], ["its weights"], known=False)
    files = choose(names, folder)
    missing = [n for n in files if n not in here or here[n] != names.get(n, here[n])]
    whole = any(map(is_tokenizer_core, files)) and not choose.trust_remote_code
    return _Cached(folder, files, missing, known=listed is not None or whole)


def _cached_folder(model: str, revision: str | None) -> Path | None:
    """The snapshot folder of the revision in the hub's cache, if it has a ``config.json``."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, CONFIG, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _listed(model: str, commit: str) -> dict[str, int] | None:
    """Names and sizes of all files of the commit, where an earlier download left the hub's list of them; else None."""
    import huggingface_hub

    read: Callable[..., list[Any]] | None = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if read is None:
        return None
    try:
        return {f.path: f.size for f in read(model, revision=commit)}
    except Exception:  # no list was kept, or it cannot be read
        return None


def _download(
    model: str,
    revision: str | None,
    token: str | bool | None,
    choose: _Chooser,
    progress: bool,
    calls: list[str],
) -> tuple[Path, list[str]]:
    """Fetch what is missing: everything at once, or the index first where one names the shards."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    calls.append("model_info")
    info = HfApi(token=token, library_name="llmapi").model_info(model, revision=revision, files_metadata=True)
    sizes = {s.rfilename: s.size for s in info.siblings or []}
    if (why := no_model(f"{model} on the hub", sizes, dummy=choose.dummy)) is not None:
        raise ModelNotFoundError(why)
    folder = _cached_folder(model, info.sha)
    asked, fetched = revision, set[str]()
    with _Bar(progress) as bar:
        while new := [n for n in choose(sizes, folder) if n not in fetched]:
            if absent := [n for n in new if n not in sizes]:
                raise ModelNotFoundError(f"{model} on the hub lacks {', '.join(absent[:3])}, which its index names")
            here = {} if folder is None else listing(folder)
            damaged = [n for n in new if n in here and sizes[n] not in (None, here[n])]
            to_come = sum(sizes[n] or 0 for n in new if n not in here or n in damaged)
            _check_space(model, to_come)
            bar.expect(to_come)
            patterns = [glob.escape(n) for n in new]
            calls.append("snapshot_download")
            folder = Path(
                snapshot_download(
                    model,
                    revision=asked,
                    token=token,
                    library_name="llmapi",
                    allow_patterns=patterns,
                    tqdm_class=bar.part,
                )
            )
            if folder.name != info.sha:
                raise SourceError(f"{model} was updated on the hub while it was fetched; run this again")
            for name in damaged:  # snapshot_download takes a file that is there for whole
                calls.append("hf_hub_download")
                hf_hub_download(model, name, revision=info.sha, token=token, force_download=True, tqdm_class=bar.part)
            bar.settle()
            fetched.update(new)
            asked = info.sha
    assert folder is not None
    return folder, sorted(fetched)


def _check_space(model: str, size: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next((p for p in (cache, *cache.parents) if p.exists()), None)
    if there is not None and (free := shutil.disk_usage(there).free) < size:
        raise SourceError(
            f"{model} needs {size / 1e9:.1f} GB and {cache} has {free / 1e9:.1f} GB free; free some space there, or "
            "set HF_HOME to a folder on a larger disk"
        )


@contextmanager
def _explained(model: str, revision: str | None, cached: _Cached | None) -> Iterator[None]:
    """Turn the errors of ``huggingface_hub``, and of the HTTP library under it, into llmapi's own."""
    try:
        yield
    except LLMAPIError:
        raise
    except Exception as error:
        explained = _explain(error, model, revision, cached)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, model: str, revision: str | None, cached: _Cached | None) -> SourceError | None:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{constants.ENDPOINT}/{model}"
    if isinstance(error, errors.GatedRepoError):
        return GatedModelError(
            f"{model} is gated: accept its licence at {page}, then pass hf_token= (or set HF_TOKEN, or run "
            "'hf auth login') with a token of the account that accepted it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{model} has no revision {revision!r}; the branches, tags and commits it has are at {page}/tree/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"there is no model {model!r} on the hub, and no folder of that name here; check the spelling, or, if it "
            "is private, pass hf_token= or set HF_TOKEN"
        )
    if status in (401, 403):
        return GatedModelError(
            f"the hub refused {model} ({status}): the token is invalid or lacks the right to read it; pass another "
            "hf_token=, set HF_TOKEN, or run 'hf auth login'"
        )
    if status is not None:
        return SourceError(f"the hub answered {status} for {model}; wait a little and try again")
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.is_offline_mode():
        return OfflineError(f"{_state(model, cached)}, and HF_HUB_OFFLINE forbids to fetch it; {_remedy('unset it')}")
    http = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
    if http or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return OfflineError(
            f"{_state(model, cached)}, and the hub at {constants.ENDPOINT} cannot be reached "
            f"({type(error.__cause__ or error).__name__}); {_remedy('check the network, the proxy and HF_ENDPOINT')}"
        )
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{model!r} is not a Hugging Face id of the form 'org/name' ({error})")
    if isinstance(error, OSError):
        where = constants.HF_HUB_CACHE
        return SourceError(f"fetching {model} failed: {error}; check that {where} can be written, then try again")
    return None


def _state(model: str, cached: _Cached | None) -> str:
    if cached is None:
        return f"{model} is not on this disk"
    if cached.missing:
        return f"{model} is incomplete on this disk ({', '.join(cached.missing[:3])} missing or cut short)"
    return f"{model} could not be checked against the hub"


def _remedy(first: str) -> str:
    return f"{first}, set HF_HOME to a cache that has it, or pass a local folder"


class _Bar:
    """The bar ``fetch``: one, in bytes, whatever bars ``huggingface_hub`` would draw.

    The library counts the same bytes more than once (received, written), and files besides. Each of its bars becomes a
    silent ``part``; the byte part that is furthest moves the bar.
    """

    def __init__(self, progress: bool) -> None:
        self._progress = progress
        self._bar: Any = None  # drawn once there is something to fetch
        self._lock = threading.Lock()
        self._expected = self._settled = self._shown = 0
        self.part: Any = type("Part", (_Part,), {"bar": self})

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def expect(self, size: int) -> None:
        """``size`` more bytes are to come."""
        self._expected += size
        if self._bar is None and size:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=size, desc="fetch", unit="B", unit_scale=True, disable=not self._progress)
        elif size:
            self._bar.total = self._expected
            self._bar.refresh()

    def moved(self, n: float) -> None:
        """Some part has counted ``n`` bytes since the last ``settle``."""
        with self._lock:
            self._show(min(self._settled + int(n), self._expected))

    def settle(self) -> None:
        """All expected bytes are here."""
        with self._lock:
            self._show(self._expected)
            self._settled = self._expected

    def _show(self, n: int) -> None:
        if n > self._shown:
            self._bar.update(n - self._shown)
            self._shown = n


class _Part:
    """Stands in for the tqdm bars of ``huggingface_hub``: counts, draws nothing, and takes any other call."""

    bar: _Bar

    def __init__(self, iterable: Iterable[Any] = (), *_: object, **kwargs: Any) -> None:
        self._iterable = iterable
        self._in_bytes = kwargs.get("unit") == "B"
        self.total, self.n = kwargs.get("total"), kwargs.get("initial") or 0
        self.format_dict: dict[str, Any] = {}

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0
        if self._in_bytes:
            self.bar.moved(self.n)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or name == "update_transfer":  # having that one would mean: one bar for both counts
            raise AttributeError(name)
        return lambda *_, **__: None
