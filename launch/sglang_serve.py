"""`sglang serve` whose API key comes from the environment and stays out of `ps` and of the log.

    SGLANG_API_KEY=... python launch/sglang_serve.py --model-path FOLDER [flags of sglang serve]

What it is: sglang takes the key as a flag alone, which every user of the machine can read in `ps`,
and writes all its settings into its log. Here the flag is added inside the process, and the key is
taken out of every log record. An unset or empty SGLANG_API_KEY means no key. What it is not:
anything else; all other flags are sglang's own (`--help`). launch/sglang_cpu.sh and
launch/sglang_server.sh start it.
"""

import logging
import os
import sys
from pathlib import Path

KEY = os.environ.get("SGLANG_API_KEY", "")
_record = logging.getLogRecordFactory()


def _without_key(*args, **kwargs):
    """A log record that does not hold the key."""
    record = _record(*args, **kwargs)
    message = record.getMessage()
    if KEY in message:
        record.msg, record.args = message.replace(KEY, "(the API key)"), ()
    return record


# Not below the guard: sglang's other processes import this file too, and log.
if KEY:
    logging.setLogRecordFactory(_without_key)


def check_model(arguments: list[str]) -> None:
    """Refuse what would fail only minutes later, or be fetched from somewhere else."""
    folder = Path(arguments[arguments.index("--model-path") + 1])
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        sys.exit(
            f"{folder} is no folder with a config.json and *.safetensors. Write one with "
            "`jaxrl-llm export`, or fetch a model with `hf download MODEL --local-dir FOLDER`."
        )


if __name__ == "__main__":
    check_model(sys.argv)
    sys.argv[:1] = ["sglang", "serve"]
    if KEY:
        sys.argv += ["--api-key", KEY]
    from sglang.cli.main import main

    main()
