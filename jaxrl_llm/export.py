"""A policy as a Hugging Face checkpoint: of a run, or as a config starts from it.

What it is: what `jaxrl-llm export` does, so that a server can be started on a model before the
learner publishes to it, and a trained one used elsewhere. What it is not: publishing during a run
(learner/publish.py), or the format (model/hf.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from jaxrl_llm.assembly import initial_params
from jaxrl_llm.config import RunConfig
from jaxrl_llm.data.tokenizer import TokenizerConfig, make_tokenizer
from jaxrl_llm.engines import CONTEXT_MARGIN
from jaxrl_llm.model.hf import tensors, write
from jaxrl_llm.model.hf_config import Dtype, config_json
from jaxrl_llm.stored import layout_here, newest_checkpoint, stored_config

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What may lie beside a tokenizer.json and belongs to it."""


def export_policy(source: RunConfig | Path, folder: Path, dtype: Dtype) -> str:
    """Write weights, config.json and tokenizer into `folder`; returns what was written.

    Args:
      source: a run directory, of which the newest checkpoint is taken, or a config, of which the
        weights are those that its first step starts from.
      folder: made if need be.
      dtype: of the tensors; float32 is exact.

    Raises ValueError if the folder has anything in it, or where the source is no run with a
    checkpoint.
    """
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        # A run directory has a config.json too, and a loader takes weights of any name.
        raise ValueError(f"{folder} is there already and is no empty folder; give a new one")
    if isinstance(source, RunConfig):
        config, what = source, "the initial weights"
        params = initial_params(config, layout_here(config))
    else:
        if not (source / "config.json").is_file():
            raise ValueError(
                f"{source} is neither a file nor a run directory, which has a config.json; give a "
                "config such as configs/quickstart.py, or the directory of a run"
            )
        config = stored_config(source)
        checkpoint = newest_checkpoint(config)
        params, what = checkpoint.state.params, f"the weights of step {checkpoint.step}"
    tokenizer = make_tokenizer(config.task.tokenizer)
    described = config_json(
        config.model,
        dtype=dtype,
        max_length=config.rollout.max_length + CONTEXT_MARGIN,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    files = write(folder, tensors(params, config.model, dtype), described)
    size = sum(file.size for file in files)
    copied = _copy_tokenizer(config.task.tokenizer, folder)
    dense = config.model.moe.dense_layers
    warning = f"; not for SGLang, which has no dense layers: moe.dense_layers is {dense}"
    return f"{what} in {dtype}, {size / 2**20:,.1f} MiB; {copied}{warning if dense else ''}"


def _copy_tokenizer(config: TokenizerConfig, folder: Path) -> str:
    if config.kind == "character":
        # Rollouts are token ids: the learner decodes them itself.
        return "no tokenizer, a server needs --skip-tokenizer-init"
    beside = Path(config.path).parent
    present = [name for name in TOKENIZER_FILES[1:] if (beside / name).is_file()]
    shutil.copyfile(config.path, folder / TOKENIZER_FILES[0])
    for name in present:
        shutil.copyfile(beside / name, folder / name)
    return f"tokenizer: {', '.join((TOKENIZER_FILES[0], *present))}"
