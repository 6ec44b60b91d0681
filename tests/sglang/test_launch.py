"""The scripts that start SGLang: which flags they give it, what they keep secret, what they refuse.

`sglang` is a stub here, but for one test that asks the real one's argument parser.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).parent.parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
KEY = "open-sesame-4711"

STUB = """
import json, logging, os, sys
from pathlib import Path

def main():
    command_line = Path("/proc/self/cmdline").read_text().split("\\0")
    seen = {"arguments": sys.argv, "command_line": command_line}
    Path(os.environ["STUB_SEEN"]).write_text(json.dumps(seen))
    # sglang replaces the handlers and logs all its settings.
    logging.basicConfig(level="INFO", format="%(message)s", force=True)
    logging.info("server_args=%s", {"arguments": sys.argv})
    logging.info(f"server_args={sys.argv}")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Enough of a checkpoint for the scripts."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder with a package named sglang that prints its arguments."""
    package = tmp_path / "stub" / "sglang" / "cli"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(STUB)
    return tmp_path / "stub"


def run(
    script: Path, *arguments: object, environment: Mapping[str, object] | None = None
) -> subprocess.CompletedProcess[str]:
    """A script's result, without anything of SGLang's in the environment but what is given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG", "PYTHON"))}
    given = {k: str(v) for k, v in (environment or {}).items()}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(
        command, env=inherited | given, capture_output=True, text=True, timeout=120
    )


def start(model: Path, stub: Path, *flags: str, key: str = "") -> dict[str, Any]:
    """What sglang_server.sh calls the stub with, and all that is printed."""
    seen = stub / "seen.json"
    environment = {"PYTHONPATH": stub, "STUB_SEEN": seen, "SGLANG_PYTHON": sys.executable}
    environment["SGLANG_API_KEY"] = key
    done = run(LAUNCH / "sglang_server.sh", model, *flags, environment=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(seen.read_text()) | {"printed": done.stdout + done.stderr}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_server_captures_routes_and_listens_on_loopback(model: Path, stub: Path) -> None:
    arguments = start(model, stub)["arguments"]
    assert arguments[:4] == ["sglang", "serve", "--model-path", str(model)]
    assert "--enable-return-routed-experts" in arguments
    assert "--enable-metrics" in arguments
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert "--api-key" not in arguments


def test_flags_of_the_user_come_last(model: Path, stub: Path) -> None:
    flags = ("--tp-size", "8", "--host", "10.0.0.5", "--quantization", "fp8")
    assert tuple(start(model, stub, *flags)["arguments"][-6:]) == flags


def test_the_api_key_is_given_and_not_shown(model: Path, stub: Path) -> None:
    seen = start(model, stub, key=KEY)
    assert seen["arguments"][-2:] == ["--api-key", KEY]
    assert not any(KEY in word for word in seen["command_line"])  # that is what `ps` shows
    assert KEY not in seen["printed"]
    assert seen["printed"].count("'--api-key', '(the API key)'") == 2


@pytest.mark.parametrize("name", ["sglang_server.sh", "sglang_cpu.sh"])
@pytest.mark.parametrize("arguments", [(), ("--port", "30001")])
def test_no_model_is_refused_with_the_usage(name: str, arguments: tuple[str, ...]) -> None:
    done = run(LAUNCH / name, *arguments)
    assert done.returncode == 2
    assert f"Usage: bash launch/{name} MODEL_FOLDER" in done.stderr


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused_with_the_remedy(
    model: Path, stub: Path, missing: str
) -> None:
    (model / missing).unlink()
    environment = {"PYTHONPATH": stub, "SGLANG_PYTHON": sys.executable}
    done = run(LAUNCH / "sglang_server.sh", model, environment=environment)
    assert done.returncode == 1
    assert f"{model} is no folder with a config.json and *.safetensors" in done.stderr
    assert "jaxrl-llm export" in done.stderr


def documented_flags() -> list[str]:
    """Those in the header of sglang_server.sh, each with its example value."""
    lines = (LAUNCH / "sglang_server.sh").read_text().splitlines()
    table = [line.removeprefix("#   ") for line in lines if line.startswith("#   --")]
    words = [word.strip(";,") for line in table for word in line.split("  ")[0].split()]
    assert len(words) > 20
    return words


def test_the_real_sglang_knows_every_flag(model: Path, stub: Path) -> None:
    """Its own argument parser reads what the scripts put together; no GPU is needed for that."""
    arguments = start(model, stub, *documented_flags())["arguments"][2:]
    script = (LAUNCH / "sglang_cpu.sh").read_text()
    own = script[script.index("--host") : script.index('"${@:2}"')].replace("\\\n", " ").split()
    program = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(allow_abbrev=False)
ServerArgs.add_cli_args(parser)
parsed = [vars(parser.parse_args(arguments)) for arguments in json.load(sys.stdin)]
print(json.dumps(parsed, default=str))
"""
    command = [str(server_python()), "-c", program]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["SGLANG_USE_CPU_ENGINE"] = "1"
    lists = json.dumps([arguments, ["--model-path", "x", *own]])
    done = subprocess.run(
        command, env=environment, input=lists, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gpu, cpu = json.loads(done.stdout.splitlines()[-1])
    assert gpu["model_path"] == str(model)
    assert (gpu["tp_size"], gpu["quantization"], gpu["port"]) == (8, "fp8", 30001)
    assert gpu["enable_return_routed_experts"]
    assert cpu["enable_return_routed_experts"]
    assert cpu["device"] == "cpu"
    assert cpu["dtype"] == "float32"


def server_python() -> Path:
    """The interpreter of the server's environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    venv = Path(os.environ.get("SGLANG_VENV") or cache / "jaxrl_llm" / "sglang_cpu")
    python = venv / "bin" / "python"
    assert python.exists(), f"{venv} is not there; bash launch/sglang_cpu.sh --install makes it"
    return python


PIP_STUB = """#!/usr/bin/env bash
# Stands for Python: notes how pip is called, and makes a copy of itself where a venv is asked for.
case "$*" in
  --version) echo "Python 3.11.0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *pip*) echo "$*" >>"$PIP_LOG" ;;
esac
"""


def test_the_environment_is_installed_once_and_the_stand_ins_when_they_change(
    tmp_path: Path,
) -> None:
    launch = tmp_path / "launch"
    shutil.copytree(LAUNCH, launch)
    python, log = tmp_path / "python", tmp_path / "pip.log"
    python.write_text(PIP_STUB)
    python.chmod(0o755)
    environment = {"SGLANG_VENV": tmp_path / "venv", "SGLANG_PYTHON": python, "PIP_LOG": log}

    def install() -> list[str]:
        log.write_text("")
        done = run(launch / "sglang_cpu.sh", "--install", environment=environment)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    first = install()
    assert len(first) == 3
    assert "--requirement" in first[0]
    assert "sglang==0.5.23" in first[1]
    assert "--no-deps" in first[1]
    assert install() == []
    with (launch / "sglang_cpu" / "sgl_kernel.py").open("a") as file:
        file.write("# changed\n")
    (again,) = install()
    assert "--force-reinstall" in again
    with (launch / "sglang_cpu" / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert len(install()) == 3
