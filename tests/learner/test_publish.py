"""Publications: whole or absent, checked, few, and found by their label."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest
import xxhash
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from jaxrl_llm.learner import publish
from jaxrl_llm.learner.publish import PublishConfig, Publisher, PublishError, verify
from jaxrl_llm.model import hf
from jaxrl_llm.model.hf_config import read_model_config
from jaxrl_llm.model.transformer import Params, parameter_axes
from jaxrl_llm.sharding import MeshConfig, make_layout, parameter_shardings
from tests.learner.tiny import MODEL, make_params


def publisher(place: str | Path, **settings: Any) -> Publisher:
    """It publishes into `place`: the folder with the run directory's name in publish.folder."""
    run_dir = Path("runs") / Path(place).name
    config = PublishConfig(**{"dtype": "float32", "folder": str(Path(place).parent)} | settings)
    return Publisher(config, MODEL, run_dir, stop_token_ids=(1,), pad_token_id=None, max_length=32)


def weights(seed: int) -> Params:
    return make_params(seed=seed)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------ what is published


def test_a_publication_holds_the_weights_and_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    done = publisher(tmp_path / "a" / "w").publish(weights(0), 12)
    folder = Path(done.path)
    assert done.version == 12
    assert done.label.startswith("v12-")
    assert folder == tmp_path / "a" / "w" / f"v000012-{done.label[4:]}"
    assert verify(folder) == done.label
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 12
    assert manifest["digest"].startswith(done.label[4:])
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    del contents["manifest.json"]
    assert manifest["files"] == {
        name: {"bytes": len(content), "xxh128": xxhash.xxh128_hexdigest(content)}
        for name, content in contents.items()
    }
    config = read_model_config(folder)
    assert config == MODEL
    loaded = hf.load_params(folder, config, make_layout(MeshConfig()))
    jax.tree.map(np.testing.assert_array_equal, loaded, weights(0))
    described = json.loads((folder / "config.json").read_text())
    assert (described["eos_token_id"], described["max_position_embeddings"]) == ([1], 32)


def test_the_label_says_which_weights_and_not_where_they_were(tmp_path: Path) -> None:
    mesh = make_layout(MeshConfig(fsdp=2, expert=2, tensor=2))
    shardings = parameter_shardings(weights(0), parameter_axes(MODEL), mesh)
    split = jax.device_put(weights(0), shardings)
    here = publisher(tmp_path / "a").publish(weights(0), 3)
    there = publisher(tmp_path / "b").publish(split, 3)
    later = publisher(tmp_path / "b").publish(split, 4)
    assert here.label == there.label
    assert later.label == "v4" + here.label[2:]
    changed = weights(0)
    embed = changed["embed"].copy()
    embed[-1, -1] = np.nextafter(embed[-1, -1], np.float32(9))
    other = publisher(tmp_path / "a").publish(changed | {"embed": embed}, 3)
    assert other.label != here.label


def test_bfloat16_is_the_default_and_halves_the_file(tmp_path: Path) -> None:
    assert PublishConfig().dtype == "bfloat16"
    folder = Path(publisher(tmp_path, dtype="bfloat16").publish(weights(0), 0).path)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = hf.load_params(folder, MODEL, make_layout(MeshConfig()))
    wanted = jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), weights(0))
    jax.tree.map(np.testing.assert_array_equal, rounded, wanted)


def test_servers_are_given_the_path_that_they_see(tmp_path: Path) -> None:
    elsewhere = publisher("mine", folder=str(tmp_path), server_folder="/mnt/weights/")
    done = elsewhere.publish(weights(0), 5)
    assert done.path == f"/mnt/weights/mine/v000005-{done.label[3:]}"
    assert names(tmp_path / "mine") == [Path(done.path).name]


def test_a_relative_folder_is_given_to_servers_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(publisher("w").publish(weights(0), 0).path).parent == tmp_path / "w"
    default = publisher("run", folder="").publish(weights(0), 0)
    assert Path(default.path).parent == tmp_path / "runs" / "run" / "weights"


# ----------------------------------------------------------------------- one folder, several runs


def test_runs_that_share_the_setting_leave_each_other_alone(tmp_path: Path) -> None:
    """A template that is started twice, with other seeds."""
    first, second = publisher(tmp_path / "seed-0"), publisher(tmp_path / "seed-1")
    with first.alone(), second.alone():
        done = [Path(first.publish(weights(0), version).path) for version in (5, 6)]
        for version in range(4):
            second.publish(weights(1), version)
        assert names(tmp_path / "seed-0") == sorted([".lock", *(path.name for path in done)])
        assert [verify(path) for path in done] == [f"v{v}-{done[0].name[8:]}" for v in (5, 6)]


def test_a_second_publisher_of_one_folder_is_refused(tmp_path: Path) -> None:
    with (
        publisher(tmp_path / "w").alone(),
        pytest.raises(ValueError, match=rf"writing to {tmp_path}/w; .* another publish.folder"),
        publisher(tmp_path / "w").alone(),
    ):
        pass
    with publisher(tmp_path / "w").alone():
        pass


def test_a_folder_that_cannot_be_made_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("mine")
    with (
        pytest.raises(PublishError, match=rf"^{tmp_path}/w/run: weights cannot .* move the file"),
        publisher(tmp_path / "w" / "run").alone(),
    ):
        pass


# ------------------------------------------------------------------------------------ what stays


def test_the_newest_stay_and_older_ones_go(tmp_path: Path) -> None:
    writer = publisher(tmp_path, keep=2)
    done = [Path(writer.publish(weights(version), version).path).name for version in range(4)]
    assert names(tmp_path) == done[2:]
    # The run goes back to step 1, and servers still hold version 3.
    again = Path(writer.publish(weights(9), 1).path).name
    assert names(tmp_path) == [again, done[3]]
    # What it published before it went back is of no use to it any more.
    third = Path(writer.publish(weights(7), 2).path).name
    assert names(tmp_path) == [again, third]
    last = Path(publisher(tmp_path).publish(weights(8), 0).path).name
    assert names(tmp_path) == [last, third]


def test_the_last_publication_stays_whatever_its_digest(tmp_path: Path) -> None:
    """And so does the one before it, which a server may be reading."""
    for seed in range(6):
        done = Path(publisher(tmp_path).publish(weights(seed), 5).path).name
        assert done in names(tmp_path)
        assert len(names(tmp_path)) == min(2, seed + 1)


def test_the_same_weights_are_not_written_again(tmp_path: Path) -> None:
    first = publisher(tmp_path).publish(weights(0), 7)
    file = next(Path(first.path).glob("*.safetensors"))
    before = file.stat().st_ino, file.stat().st_mtime_ns
    assert publisher(tmp_path).publish(weights(0), 7) == first
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    assert names(tmp_path) == [Path(first.path).name]


def test_the_same_weights_replace_a_damaged_publication(tmp_path: Path) -> None:
    first = publisher(tmp_path).publish(weights(0), 7)
    file = next(Path(first.path).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert publisher(tmp_path).publish(weights(0), 7) == first
    assert verify(first.path) == first.label


class Killed(BaseException):
    """As good as kill -9: no handler of the program runs."""


def killing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next publication is written up to its manifest, and then the process ends."""

    def kill(*arguments: Any) -> None:
        raise Killed

    monkeypatch.setattr(publish, "_manifest", kill)


def test_what_a_killed_writer_left_is_removed_and_never_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = publisher(tmp_path, keep=2)
    first = writer.publish(weights(0), 0)
    with monkeypatch.context() as patch:
        killing(patch)
        with pytest.raises(Killed):
            writer.publish(weights(1), 1)
    left = set(names(tmp_path)) - {Path(first.path).name}
    assert len(left) == 1
    assert left.pop().startswith("partial-")
    second = publisher(tmp_path, keep=2).publish(weights(2), 2)
    assert names(tmp_path) == [Path(first.path).name, Path(second.path).name]


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    for name in ("notes.txt", "v1", "base"):
        (tmp_path / name).mkdir()
    done = [publisher(tmp_path).publish(weights(version), version) for version in range(3)]
    kept = [Path(one.path).name for one in done[1:]]
    assert names(tmp_path) == sorted(["base", "notes.txt", "v1", *kept])


def test_a_publication_that_cannot_be_removed_is_reported(tmp_path: Path) -> None:
    writer = publisher(tmp_path)
    first = writer.publish(weights(0), 0)
    second = writer.publish(weights(1), 1)

    def busy(original: Any, path: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with epath.testing.mock_epath(rmtree=busy):
        third = writer.publish(weights(2), 2)
    assert len(third.leftovers) == 1
    assert first.path in third.leftovers[0]
    assert "busy" in third.leftovers[0]
    again = writer.publish(weights(2), 2)
    assert again.leftovers == ()
    assert names(tmp_path) == [Path(one.path).name for one in (second, third)]


def test_everything_is_on_disk_before_the_publication_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush = publish._flush

    def recording(path: Any) -> None:
        flush(path)
        done.append(Path(path).name)

    def rename(original: Any, path: Any, target: Any) -> None:
        done.append("rename")
        original(path, target)

    monkeypatch.setattr(publish, "_flush", recording)
    with epath.testing.mock_epath(rename=rename):
        folder = Path(publisher(tmp_path).publish(weights(0), 0).path)
    before = done[: done.index("rename")]
    assert sorted(before[:-1]) == names(folder)
    assert before[-1].startswith("partial-")
    assert done[done.index("rename") + 1 :] == [tmp_path.name]


# ---------------------------------------------------------------------------------------- damage


def test_verify_names_what_is_damaged_or_missing(tmp_path: Path) -> None:
    folder = Path(publisher(tmp_path).publish(weights(0), 0).path)
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (folder / "config.json").unlink()
    with pytest.raises(PublishError, match=rf"{file.name} is damaged; config.json is missing"):
        verify(folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: str) -> None:
    folder = Path(publisher(tmp_path).publish(weights(0), 0).path)
    (folder / "manifest.json").write_text(damage)
    with pytest.raises(PublishError, match=r"manifest.json is missing or damaged"):
        verify(folder)


def test_a_publication_of_another_format_is_named(tmp_path: Path) -> None:
    folder = Path(publisher(tmp_path).publish(weights(0), 0).path)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": "weights 7"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PublishError, match=r"has the format 'weights 7', and this version reads"):
        verify(folder)


def test_a_manifest_that_was_changed_with_its_file_is_noticed(tmp_path: Path) -> None:
    folder = Path(publisher(tmp_path).publish(weights(0), 0).path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"]["xxh128"] = "0" * 32
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PublishError, match=r"manifest.json is missing or damaged"):
        verify(folder)


# ---------------------------------------------------------------------------------------- faults


def failing_open(number: int, *, after: int) -> Any:
    """Replaces open() of weights: `after` bytes can be written, then an OSError of this number."""

    def opener(original: Any, path: Any, mode: str) -> Any:
        file = original(path, mode)
        if "w" not in mode or not str(path).endswith(".safetensors"):
            return file
        write, left = file.write, [after]

        def limited(data: Any) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(number, os.strerror(number), str(path))
            return write(data)

        class File:
            def __enter__(self) -> Any:
                self.write = limited
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

        return File()

    return opener


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space there, or lower publish.keep"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EIO, "look at the cause"),
    ],
)
def test_a_full_folder_is_named_and_older_publications_stay(
    tmp_path: Path, number: int, remedy: str
) -> None:
    writer = publisher(tmp_path)
    first = writer.publish(weights(0), 0)
    with (
        epath.testing.mock_epath(open=failing_open(number, after=5000)),
        pytest.raises(PublishError) as caught,
    ):
        writer.publish(weights(1), 1)
    for part in (str(tmp_path), "version 1 ", os.strerror(number), remedy):
        assert part in str(caught.value)
    assert names(tmp_path) == [Path(first.path).name]
    assert verify(first.path) == first.label
    assert verify(writer.publish(weights(1), 1).path).startswith("v1-")


def test_a_write_that_the_system_cuts_short_is_noticed(tmp_path: Path) -> None:
    """The kernel itself refuses here, in the middle of a file."""
    writer = publisher(tmp_path)
    first = writer.publish(weights(0), 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(PublishError, match=r"File too large.*raise the limit"):
            writer.publish(weights(1), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [Path(first.path).name]
    assert verify(first.path) == first.label


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, number: int) -> None:
    first = publisher(tmp_path).publish(weights(0), 0)

    def refuse(original: Any, path: Any, *, exist_ok: bool) -> None:
        if not os.path.exists(path):
            raise OSError(number, os.strerror(number), str(path))

    with (
        epath.testing.mock_epath(makedirs=refuse),
        pytest.raises(PublishError, match=r"version 1 .* or choose another publish.folder"),
    ):
        publisher(tmp_path).publish(weights(1), 1)
    assert verify(first.path) == first.label


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("mine")
    with pytest.raises(PublishError, match=r"move the file that is in its place"):
        publisher(tmp_path / "w").publish(weights(0), 0)
    with pytest.raises(PublishError, match=r"move the file that is in its place"):
        publisher(tmp_path / "w" / "deeper").publish(weights(0), 0)
    assert (tmp_path / "w").read_text() == "mine"


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"publish.keep is 1: a server .* make it at least 2"):
        PublishConfig(keep=1)
    with pytest.raises(ValueError, match=r"server_folder is /mnt/w .* here as publish.folder"):
        PublishConfig(server_folder="/mnt/w")
    with pytest.raises(ValueError, match=r"publish.folder is gs://b/w, .* publish.server_folder"):
        PublishConfig(folder="gs://b/w")
    with pytest.raises(ValueError, match=r"version is -1"):
        publisher(tmp_path).publish(weights(0), -1)


# ----------------------------------------------------------------------------------- object store


class Bucket(MemoryFileSystem):
    """An object store in memory, behind s3:// of etils.epath: keys, no folders, no rename."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012  (of all instances, as in the base class)
    pseudo_dirs = [""]  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012  (in order)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).replace("s3://", "memory://"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def exists(self, path: str, **_: Any) -> bool:
        prefix = self._strip_protocol(path)
        return any(key == prefix or key.startswith(f"{prefix}/") for key in self.store)

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store cannot rename a folder")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            self.written.append(path)
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    fsspec.register_implementation("s3", Bucket, clobber=True)
    for kept in (Bucket.store, Bucket.written):
        kept.clear()
    yield fsspec.filesystem("s3")
    Bucket.store.clear()


def in_bucket(keep: int = 2) -> Publisher:
    return publisher("w", folder="s3://b", server_folder="/mnt/b", keep=keep)


def folders() -> list[str]:
    return sorted({key.split("/")[3] for key in Bucket.store})


def test_an_object_store_gets_the_manifest_last(bucket: Bucket) -> None:
    done = in_bucket().publish(weights(0), 3)
    name = Path(done.path).name
    assert done.path == f"/mnt/b/w/{name}"
    assert folders() == [name]
    assert Bucket.written[-1] == f"/b/w/{name}/manifest.json"
    assert verify(f"s3://b/w/{name}") == done.label
    assert done.label == f"v3-{_digest_of(name)}"


def _digest_of(name: str) -> str:
    manifest = json.loads(Bucket.store[f"/b/w/{name}/manifest.json"].getvalue())
    return manifest["digest"][:12]


def test_an_object_store_knows_no_lock(bucket: Bucket) -> None:
    with in_bucket().alone(), in_bucket().alone():
        assert Bucket.store == {}


def test_an_object_store_holds_what_a_folder_holds(bucket: Bucket, tmp_path: Path) -> None:
    there, here = in_bucket().publish(weights(0), 3), publisher(tmp_path).publish(weights(0), 3)
    assert there.label == here.label
    for path in Path(here.path).iterdir():
        stored = Bucket.store[f"/b/w/{Path(there.path).name}/{path.name}"].getvalue()
        assert stored == path.read_bytes()


def test_an_object_store_keeps_the_newest_and_reuses_the_same(bucket: Bucket) -> None:
    done = [in_bucket().publish(weights(version), version) for version in range(3)]
    assert folders() == [Path(one.path).name for one in done[1:]]
    assert in_bucket().publish(weights(2), 2) == done[2]
    assert folders() == [Path(one.path).name for one in done[1:]]


def test_a_writer_killed_in_an_object_store_left_nothing_that_counts(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_bucket().publish(weights(0), 0)
    with monkeypatch.context() as patch:
        killing(patch)
        with pytest.raises(Killed):
            in_bucket().publish(weights(1), 1)
    left = next(name for name in folders() if name != Path(first.path).name)
    with pytest.raises(PublishError, match=r"manifest.json is missing"):
        verify(f"s3://b/w/{left}")
    second = in_bucket().publish(weights(1), 1)
    assert folders() == [Path(first.path).name, Path(second.path).name]


def test_an_object_store_that_refuses_is_named(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_bucket().publish(weights(0), 0)

    class RefusedError(Exception):
        """Libraries of object stores do not keep to OSError."""

    def refuse(self: Any, path: str, mode: str = "rb", **_: Any) -> Any:
        raise RefusedError("403 Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_open", refuse)
        with pytest.raises(PublishError, match=r"s3://b/w: version 1 .*403 Forbidden"):
            in_bucket().publish(weights(1), 1)
    assert folders() == [Path(first.path).name]
