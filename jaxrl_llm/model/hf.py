"""Hugging Face checkpoints of Qwen3-MoE: config.json and safetensors files, in and out.

    config.json                         the architecture, as transformers 4 and 5 and SGLang read it
    model-00001-of-00003.safetensors    tensors; a matrix is [out, in] there and [in, out] here
    model.safetensors.index.json        tensor name -> file

Nothing is held twice: an import reads, for each device in turn, what its shard of one parameter
needs; an export takes one layer of one parameter off the devices at a time and writes it at once.
Both are exact: bfloat16 and float16 widen to float32 without loss, and float32 that came from
bfloat16 narrows to the same bits. What it is not: a tokenizer, or models other than Qwen3-MoE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from etils import epath
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf_config import CONFIG, Dtype, PathLike, parse_config
from jaxrl_llm.model.transformer import Params, init_params, parameter_axes
from jaxrl_llm.sharding import Layout, parameter_shardings, whole_here

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FILE_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
READABLE = ("F32", "BF16", "F16")

Ranges = tuple[tuple[int, int], ...]  # from and to, of every dimension


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A file that was written, for a manifest."""

    name: str
    size: int  # bytes
    xxh128: str  # its digest, hexadecimal, as xxh128sum prints it


# Which tensor is which parameter


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a checkpoint, and its place among the parameters."""

    name: str
    shape: tuple[int, ...]  # in the file
    leaf: tuple[str, ...]  # path of the parameter in the tree
    index: tuple[int, ...]  # in it: (), (layer of the segment,) or (layer of the segment, expert)
    transposed: bool


_ATTENTION = {
    ("attention_norm",): "input_layernorm",
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("attention", "q_norm"): "self_attn.q_norm",
    ("attention", "k_norm"): "self_attn.k_norm",
    ("mlp_norm",): "post_attention_layernorm",
}
_MLP = {("mlp", part): f"{part}_proj" for part in ("gate", "up", "down")}


@functools.cache
def _shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    return functools.reduce(operator.getitem, path, tree)


@functools.cache
def _layout(config: ModelConfig) -> tuple[_Tensor, ...]:
    """All tensors in file order; those of one layer of one parameter follow one another.

    A tied embedding is there a second time, last, as lm_head: SGLang has a head of its own whatever
    config.json says, and leaves it random where no tensor fills it.
    """
    shapes = _shapes(config)

    def tensor(name: str, leaf: tuple[str, ...], *index: int) -> _Tensor:
        shape = _leaf(shapes, leaf).shape[len(index) :]
        transposed = leaf != ("embed",) and len(shape) == 2
        return _Tensor(f"{name}.weight", shape[:: -1 if transposed else 1], leaf, index, transposed)

    found, layer = [tensor("model.embed_tokens", ("embed",))], 0
    for number, (is_moe, count) in enumerate(config.segments):
        segment = ("segments", f"{number:02}")
        for i in range(count):
            prefix = f"model.layers.{layer}"
            found += [tensor(f"{prefix}.{n}", segment + leaf, i) for leaf, n in _ATTENTION.items()]
            if is_moe:
                found.append(tensor(f"{prefix}.mlp.gate", (*segment, "mlp", "router"), i))
                found += [
                    tensor(f"{prefix}.mlp.experts.{expert}.{name}", segment + leaf, i, expert)
                    for leaf, name in _MLP.items()
                    for expert in range(config.moe.num_experts)
                ]
            else:
                found += [
                    tensor(f"{prefix}.mlp.{n}", segment + leaf, i) for leaf, n in _MLP.items()
                ]
            layer += 1
    head = ("embed",) if config.tie_embeddings else ("head",)
    return (*found, tensor("model.norm", ("final_norm",)), tensor("lm_head", head))


# Import


def load_params(folder: PathLike, config: ModelConfig, layout: Layout) -> Params:
    """The parameters of a checkpoint on disk, float32, each shard read where it will live.

    Args:
      folder: a local one, with one safetensors file or with several and their index.
      config: of read_model_config(folder).
      layout: parameters are split over its mesh by its rules.

    At any time one shard of one parameter is on the host. Raises ValueError naming every tensor
    that is missing, unknown, of another shape or of an unreadable type, and files that are damaged.
    """
    shapes = _shapes(config)
    shardings = parameter_shardings(shapes, parameter_axes(config), layout)
    with contextlib.ExitStack() as stack:
        files = _open(Path(folder), stack)
        _check_tensors(files, config, folder)
        leaves: dict[tuple[str, ...], dict[tuple[int, ...], _Tensor]] = {}
        for tensor in _layout(config):
            # Not the second time: a tied head was compared and is not read again.
            leaves.setdefault(tensor.leaf, {}).setdefault(tensor.index, tensor)

        def load(path: tuple[Any, ...], shape: Any, sharding: NamedSharding) -> jax.Array:
            parts = leaves[tuple(key.key for key in path)]
            return _place(functools.partial(_read, files, parts), shape.shape, sharding)

        return jax.tree_util.tree_map_with_path(load, shapes, shardings)


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    names = [SINGLE]
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{folder / INDEX} is no index of tensors; fetch the checkpoint again"
            ) from None
    found: dict[str, Any] = {}
    for name in names:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder / name} cannot be read ({error}); fetch or export the checkpoint again"
            ) from None
        twice = sorted(found.keys() & set(file.keys()))
        if twice:
            raise ValueError(f"{folder}: {twice[0]} is in two files; delete the one not meant")
        found |= dict.fromkeys(file.keys(), file)
    return found


def _check_tensors(files: Mapping[str, Any], config: ModelConfig, folder: PathLike) -> None:
    layout = {tensor.name: tensor for tensor in _layout(config)}
    optional = {"lm_head.weight"} if config.tie_embeddings else set()
    slices = {name: files[name].get_slice(name) for name in layout.keys() & files.keys()}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    problems = {
        "missing": sorted(layout.keys() - files.keys() - optional),
        "unknown": sorted(files.keys() - layout.keys()),
        "of another shape": [
            f"{name} {list(shape)} for {list(layout[name].shape)}"
            for name, shape in sorted(shapes.items())
            if shape != layout[name].shape
        ],
        f"of a type other than {', '.join(READABLE)}": [
            f"{name} {part.get_dtype()}"
            for name, part in sorted(slices.items())
            if part.get_dtype() not in READABLE
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"{folder} does not hold the tensors of its {CONFIG}: {text}. Use the files that were "
            "saved with it"
        )
    if config.tie_embeddings and "lm_head.weight" in files:
        _check_tied(slices, folder)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _check_tied(slices: Mapping[str, Any], folder: PathLike) -> None:
    embed, head = slices["model.embed_tokens.weight"], slices["lm_head.weight"]
    rows, step = embed.get_shape()[0], 4096
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        if not np.array_equal(embed[part], head[part]):
            raise ValueError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight, though "
                f"tie_word_embeddings is true; set it to false in {CONFIG}"
            )


def _read(
    files: Mapping[str, Any], parts: Mapping[tuple[int, ...], _Tensor], ranges: Ranges
) -> np.ndarray:
    """A block of one parameter, f32, from the blocks of the tensors it is made of."""
    stacked = len(next(iter(parts)))
    block = np.empty([stop - start for start, stop in ranges], np.float32)
    within = tuple(slice(start, stop) for start, stop in ranges[stacked:])
    for position in np.ndindex(*block.shape[:stacked]):
        index = tuple(start + i for (start, _), i in zip(ranges, position, strict=False))
        stored = files[parts[index].name].get_slice(parts[index].name)
        block[position] = stored[within[::-1]].T if parts[index].transposed else stored[within]
    return block


def _place(
    read: Callable[[Ranges], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    """An array of what `read` gives for each shard, with one shard on the host at a time.

    jax.make_array_from_callback would hold those of all devices before it sends the first.
    """
    placed: dict[Ranges, jax.Array] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = (part.indices(size) for part, size in zip(index or (), shape, strict=True))
        ranges = tuple((start, stop) for start, stop, _ in bounds)
        source = placed[ranges] if ranges in placed else read(ranges)
        array = jax.block_until_ready(jax.device_put(source, device))
        placed.setdefault(ranges, array)
        arrays.append(array)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


# Export


class Piece(NamedTuple):
    """One layer of one parameter, as a file has it."""

    leaf: tuple[str, ...]  # its path among the parameters
    layer: tuple[int, ...]  # (index,) of one that is stacked over layers, else ()
    transposed: bool
    dtype: Dtype


Fetch = Callable[[Params, Piece], jax.Array]


def pieces(config: ModelConfig, dtype: Dtype) -> list[Piece]:
    """All pieces of a model, in the order in which tensors() fetches them."""
    parts = [(t.leaf, t.index[:1], t.transposed) for t in _layout(config)]
    return [Piece(*part, dtype) for part in dict.fromkeys(parts)]


def cut(params: Params, piece: Piece) -> jax.Array:
    """The piece, split over the devices as its parameter is."""
    array = _leaf(params, piece.leaf)
    return _cut(array, *piece.layer, dtype=piece.dtype, transposed=piece.transposed)


def fetch(params: Params, piece: Piece) -> jax.Array:
    """The piece, all of it visible to this process; all processes of a job must ask for it."""
    return whole_here(cut(params, piece))


def tensors(
    params: Params, config: ModelConfig, dtype: Dtype, fetch: Fetch = fetch
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a checkpoint's tensors, in file order, fetched one piece ahead.

    Args:
      params: on the devices, sharded in any way.
      dtype: float32 parameters are rounded to it on the devices, to the nearest.
      fetch: how to get a piece. Those of a job of several processes must all fetch the same.

    A piece is one layer of one parameter; there are two on the devices at once.
    """
    by_piece = itertools.groupby(_layout(config), lambda t: (t.leaf, t.index[:1]))
    previous: tuple[list[_Tensor], jax.Array] | None = None
    for (leaf, layer), group in by_piece:
        parts = list(group)
        # The devices compute it while the one before is consumed: nobody waits for it here.
        fetched = fetch(params, Piece(leaf, layer, parts[0].transposed, dtype))
        if previous is not None:
            yield from _named(*previous)
        previous = parts, fetched
    if previous is not None:
        yield from _named(*previous)


def _named(parts: Sequence[_Tensor], fetched: jax.Array) -> Iterator[tuple[str, np.ndarray]]:
    values = np.ascontiguousarray(jax.device_get(fetched))
    for part in parts:
        yield part.name, values[part.index[1:]]


@functools.partial(jax.jit, static_argnames=("dtype", "transposed"))
def _cut(
    array: jax.Array, layer: int | None = None, *, dtype: Dtype, transposed: bool
) -> jax.Array:
    """One layer of a stacked parameter, or all of another one, as a file has it."""
    part = array if layer is None else array[layer]
    return (jnp.swapaxes(part, -1, -2) if transposed else part).astype(dtype)


def write(
    folder: PathLike,
    tensors: Iterable[tuple[str, np.ndarray]],
    config_json: Mapping[str, Any],
    *,
    max_shard_bytes: int = 4 * 2**30,
) -> tuple[WrittenFile, ...]:
    """Writes a checkpoint: safetensors files, their index and config.json; returns what it wrote.

    Args:
      folder: made if need be; a local one, or gs:// or s3:// (etils.epath).
      tensors: of tensors(); each is written before the next is asked for.
      config_json: of config_json(); it says which tensors there must be and of what dtype.
      max_shard_bytes: a file has no more bytes of tensors, unless a single one is larger.

    Raises ValueError if the folder has weights already, or where tensors are not those of
    config_json; OSError, and what an object store's library raises, where writing fails.
    """
    root = epath.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    # An object store has no folder before there is a file in it.
    inside = root.iterdir() if root.exists() else ()
    there = sorted(path.name for path in inside if path.suffix == ".safetensors")
    if there:
        raise ValueError(f"{root} has weights already, {there[0]}; give an empty folder")
    dtype = np.dtype(config_json["dtype"])
    plan = _plan(_layout(parse_config(config_json, CONFIG)), dtype.itemsize, max_shard_bytes)
    stream, written = iter(tensors), []
    where: dict[str, str] = {}
    for number, part in enumerate(plan, 1):
        name = f"model-{number:05}-of-{len(plan):05}.safetensors"
        chunks = _contents(part, dtype, stream)
        written.append(_write_file(root / name, chunks))
        where |= {tensor.name: name for tensor in part}
    if next(stream, None) is not None:
        raise ValueError(f"{root}: there are more tensors than {CONFIG} describes")
    total = sum(math.prod(tensor.shape) for part in plan for tensor in part) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": where}
    for name, value in ((INDEX, index), (CONFIG, config_json)):
        written.append(_write_file(root / name, [json.dumps(value, indent=2).encode()]))
    return tuple(written)


def _plan(layout: Sequence[_Tensor], itemsize: int, max_shard_bytes: int) -> list[list[_Tensor]]:
    """The tensors of each file."""
    plan: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in layout:
        more = math.prod(tensor.shape) * itemsize
        if plan[-1] and size + more > max_shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(tensor)
        size += more
    return plan


def _header(part: Sequence[_Tensor], dtype: np.dtype) -> bytes:
    """The head of a safetensors file: the length of a JSON text, and that text.

    The library writes to local files only, or copies all tensors of a file twice on the way.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in part:
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        head[tensor.name] = {
            "dtype": FILE_DTYPES[dtype.name],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _contents(
    part: Sequence[_Tensor], dtype: np.dtype, stream: Iterator[tuple[str, np.ndarray]]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its head, and its tensors, each checked against what the head says."""
    yield _header(part, dtype)
    for tensor in part:
        name, value = next(stream, ("no tensor", np.empty(0)))
        if (name, value.shape, value.dtype) != (tensor.name, tensor.shape, dtype):
            raise ValueError(
                f"{CONFIG} asks for {tensor.name}, {dtype}{list(tensor.shape)}, and there came "
                f"{name}, {value.dtype}{list(value.shape)}; use the same config and dtype for both"
            )
        # As bytes: bfloat16 has no buffer of its own kind.
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _write_file(path: Any, chunks: Iterable[bytes | memoryview]) -> WrittenFile:
    digest, size = xxhash.xxh128(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
            size += len(chunk)
    return WrittenFile(path.name, size, digest.hexdigest())
