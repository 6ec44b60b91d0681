"""Weights for servers: every version in a folder of its own that the servers read too.

    FOLDER/RUN/v000012-5f0c31aa90be/    config.json, safetensors files, their index (model/hf.py)
                      manifest.json     label, and size and XXH128 of every other file

FOLDER/RUN is weights/ in the run directory, or the directory's name in publish.folder, so that
runs of several seeds may share that setting. What is old in it is removed, so no two may publish
there at once: in a local folder a lock sees to it, in an object store nobody does.

A publication is whole or absent. In a local folder it is written beside its place, flushed to disk
and renamed; in an object store, which cannot rename, manifest.json comes last, and a folder without
one does not count. What it is not: telling servers about it (rollout/sglang.py), or checkpoints to
go on from (checkpoint.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from etils import epath

from jaxrl_llm.lock import locked
from jaxrl_llm.model import hf
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf_config import Dtype, config_json
from jaxrl_llm.model.transformer import Params

FORMAT = "jaxrl_llm weights 2"
MANIFEST = "manifest.json"
WEIGHTS = "weights"
"""Folder of a run directory: its publications, unless publish.folder names another place."""

_NAME = re.compile(r"v(\d{6,})-[0-9a-f]{12}")
_PARTIAL = "partial-"


class PublishError(ValueError):
    """Weights that could not be published or are damaged; the message names folder and remedy."""


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """Where weights are left for servers."""

    # A local one, or gs:// or s3://; each run has a folder in it, with the name of its run
    # directory. "": weights/ in the run directory.
    folder: str = ""
    server_folder: str = ""  # the same folder as servers see it, such as a mount; "": the same path
    dtype: Dtype = "bfloat16"  # of the files; servers round to their own
    keep: int = 2  # newest publications that stay; one more exists while another is written

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(
                f"publish.keep is {self.keep}: a server that comes back may be reading the "
                "publication before the newest; make it at least 2"
            )
        if self.server_folder and not self.folder:
            raise ValueError(
                f"publish.server_folder is {self.server_folder} without the folder that it is; "
                "give its path here as publish.folder"
            )
        if _is_store(self.folder) and not self.server_folder:
            raise ValueError(
                f"publish.folder is {self.folder}, which servers cannot read; mount the bucket "
                "beside them and give its path there as publish.server_folder"
            )


@dataclasses.dataclass(frozen=True)
class Publication:
    """Weights that servers can be told to read."""

    version: int
    label: str  # v12-5f0c31aa90be: the version and a digest of the files, so of all weights
    path: str  # as the servers see it
    leftovers: tuple[str, ...] = ()  # what should have been removed and could not be, and why


class Publisher:
    """Writes versions of one run's model into one folder, alone; see the module for which."""

    def __init__(
        self,
        config: PublishConfig,
        model: ModelConfig,
        run_dir: Path,
        *,
        stop_token_ids: Sequence[int],
        pad_token_id: int | None,
        max_length: int,
        fetch: hf.Fetch = hf.fetch,
    ) -> None:
        """Args:
        run_dir: of the run.
        fetch: how to get a piece of the parameters, see hf.tensors.
        stop_token_ids, pad_token_id, max_length: for config.json, see hf_config.config_json.
        """
        self._config = config
        self._model = model
        self._fetch = fetch
        run_dir = run_dir.resolve()
        place = (config.folder, run_dir.name) if config.folder else (run_dir, WEIGHTS)
        root = epath.Path(*place)
        self._root = root if _is_store(root) else root.resolve()
        seen = config.server_folder.rstrip("/")
        self._seen = f"{seen}/{run_dir.name}" if seen else str(self._root)
        self._config_json = config_json(
            model,
            dtype=config.dtype,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            pad_token_id=pad_token_id,
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from publishing into this folder, if it is a local one.

        Raises ValueError if one does; PublishError if the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                if not _is_store(self._root):
                    remedy = "wait until it has ended, or use another publish.folder"
                    stack.enter_context(locked(Path(self._root), remedy))
            except OSError as error:
                raise PublishError(_explain(error, self._root, "weights")) from error
            yield

    def publish(self, params: Params, version: int) -> Publication:
        """Writes these weights, and removes what is older than the newest `keep` and unfinished.

        Args:
          params: on the devices; they may be donated as soon as this returns.
          version: the learner's step, 0 or more.

        The same version and weights once more give the publication that is there already. Raises
        PublishError, and leaves the other publications as they are, if anything fails.
        """
        if version < 0:
            raise ValueError(f"version is {version}; it must be 0 or more")
        staged = self._root / self._staged_name(version)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._remove(self._unfinished())
            tensors = hf.tensors(params, self._model, self._config.dtype, self._fetch)
            files = hf.write(staged, tensors, self._config_json)
            manifest = _manifest(version, files)
            final = self._commit(staged, manifest)
            leftovers = self._remove([*self._unfinished(), *self._outdated(final, version)])
        except Exception as error:  # the libraries of object stores raise all kinds
            _remove(staged)
            what = f"version {version} of the weights"
            raise PublishError(_explain(error, self._root, what)) from error
        return Publication(version, manifest["label"], f"{self._seen}/{final.name}", leftovers)

    def _staged_name(self, version: int) -> str:
        token = uuid.uuid4().hex[:12]
        return f"v{version:06}-{token}" if _is_store(self._root) else f"{_PARTIAL}{token}"

    def _commit(self, staged: Any, manifest: Mapping[str, Any]) -> Any:
        """The folder of the publication: `staged`, perhaps renamed, or an identical older one."""
        name = f"v{manifest['version']:06}-{manifest['digest'][:12]}"
        for other in self._folders():
            same = other != staged and _read_manifest(other).get("label") == manifest["label"]
            if same and not _damage(other):
                _remove(staged)
                return other
        text = json.dumps(manifest, indent=2)
        (staged / MANIFEST).write_text(text)
        if _is_store(self._root):
            return staged
        for path in (*staged.iterdir(), staged):
            _flush(path)
        final = self._root / name
        if final.exists():  # and is damaged
            final.rmtree()
        staged.rename(final)
        _flush(self._root)
        return final

    def _inside(self) -> list[Any]:
        # An object store has no folder before there is a file in it.
        return sorted(self._root.iterdir()) if self._root.exists() else []

    def _folders(self) -> list[Any]:
        return [path for path in self._inside() if _NAME.fullmatch(path.name)]

    def _unfinished(self) -> list[Any]:
        """What killed writers left behind."""
        partial = [path for path in self._inside() if path.name.startswith(_PARTIAL)]
        return partial + [path for path in self._folders() if not (path / MANIFEST).exists()]

    def _outdated(self, final: Any, version: int) -> list[Any]:
        """All publications but `final` and the newest others.

        Versions above this one are of a future that the run went back from: they count as oldest.
        """

        def age(path: Any) -> tuple[bool, bool, int]:
            number = int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
            return path != final, number > version, -number

        return sorted(self._folders(), key=age)[self._config.keep :]

    def _remove(self, folders: Sequence[Any]) -> tuple[str, ...]:
        return tuple(filter(None, (_remove(folder) for folder in folders)))


def verify(path: str | os.PathLike[str]) -> str:
    """The label of a publication, after all of its files were read and compared with its manifest.

    Raises PublishError naming the folder and each file that is missing or damaged.
    """
    folder = epath.Path(path)
    damage = _damage(folder)
    if damage:
        raise PublishError(
            f"{folder} is no whole publication: {'; '.join(damage)}. Copy it again, or publish "
            "these weights again"
        )
    return str(_read_manifest(folder)["label"])


def _manifest(version: int, files: Sequence[hf.WrittenFile]) -> dict[str, Any]:
    entries = {file.name: {"bytes": file.size, "xxh128": file.xxh128} for file in files}
    digest = _digest(entries)
    label = f"v{version}-{digest[:12]}"
    return {
        "format": FORMAT,
        "version": version,
        "label": label,
        "digest": digest,
        "files": entries,
    }


def _digest(entries: Mapping[str, Any]) -> str:
    return xxhash.xxh128_hexdigest(json.dumps(entries, sort_keys=True).encode())


def _read_manifest(folder: Any) -> dict[str, Any]:
    """{} where there is none that can be read."""
    try:
        value = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _damage(folder: Any) -> list[str]:
    """What is wrong with a publication; nothing if it is whole."""
    manifest = _read_manifest(folder)
    if (other := manifest.get("format", FORMAT)) != FORMAT:
        return [f"{MANIFEST} has the format {other!r}, and this version reads {FORMAT!r}"]
    entries = manifest.get("files", {})
    if not manifest or _digest(entries) != manifest.get("digest"):
        return [f"{MANIFEST} is missing or damaged"]
    found = []
    for name, entry in entries.items():
        path = folder / name
        if not path.exists():
            found.append(f"{name} is missing")
            continue
        with path.open("rb") as file:
            digest = xxhash.xxh128()
            while chunk := file.read(2**24):
                digest.update(chunk)
        if digest.hexdigest() != entry["xxh128"]:
            found.append(f"{name} is damaged")
    return found


def _remove(folder: Any) -> str:
    """Removes a folder; why it could not, or ""."""
    try:
        # First, so that one that is half removed does not count as finished.
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)
    except Exception as error:  # as in publish()
        return f"{folder}: {error}"
    return ""


def _flush(path: Any) -> None:
    """Waits until a local file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_store(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


_REMEDIES = {
    errno.ENOSPC: "free space there, or lower publish.keep",
    errno.EDQUOT: "raise the quota, or lower publish.keep",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "mount it writable, or choose another publish.folder",
    errno.EACCES: "allow this user to write there, or choose another publish.folder",
    errno.EPERM: "allow this user to write there, or choose another publish.folder",
    errno.EEXIST: "move the file that is in its place, or choose another publish.folder",
    errno.ENOTDIR: "move the file that is in its place, or choose another publish.folder",
}


def _explain(error: Exception, root: Any, what: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    remedy = _REMEDIES.get(number or 0, "look at the cause; publications of before are unharmed")
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{root}: {what} cannot be published ({cause}); {remedy}"
