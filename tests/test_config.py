"""RunConfig: JSON both ways, command-line overrides, and contradictions refused with a remedy."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import get_type_hints

import pytest
import tyro

from jaxrl_llm.config import (
    RunConfig,
    differences,
    from_json,
    load_config,
    read_config,
    to_json,
)
from jaxrl_llm.losses.clipping import ClipConfig
from tests.tiny import tiny_config, vary

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    for word in ("command", "hardware", "expect"):
        assert word in header, f"{path} does not state its {word}"


def test_a_seed_gets_a_directory_of_its_own() -> None:
    config = load_config(ROOT / "configs/quickstart.py")
    assert config.directory == Path("runs/quickstart-0")
    assert dataclasses.replace(config, seed=3).directory == Path("runs/quickstart-3")


def test_flags_override_nested_settings() -> None:
    default = load_config(ROOT / "configs/quickstart.py")
    flags = ["--loss.clip.high", "0.3", "--rollout.engine.precision", "int8", "--seed", "7"]
    config = tyro.cli(RunConfig, default=default, args=flags)
    assert (config.loss.clip.high, config.rollout.engine.precision, config.seed) == (0.3, "int8", 7)
    assert [line.split(":")[0] for line in differences(default, config)] == [
        "loss.clip.high",
        "rollout.engine.precision",
        "seed",
    ]


def config_classes(root: type) -> set[type]:
    """The dataclass and all that its fields nest."""
    nested = {kind for kind in get_type_hints(root).values() if dataclasses.is_dataclass(kind)}
    return {root}.union(*(config_classes(kind) for kind in nested))


KINDS = sorted(config_classes(RunConfig), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_the_comment_that_help_shows(kind: type) -> None:
    lines = inspect.getsource(kind).splitlines()
    for field in dataclasses.fields(kind):
        number = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        above = lines[number - 1].strip().startswith("#")
        assert above or "  # " in lines[number], f"{kind.__name__}.{field.name} has no comment"


def test_help_shows_flags_values_and_comments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(RunConfig, default=load_config(ROOT / "configs/quickstart.py"), args=["--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--loss.clip.high FLOAT" in printed
    assert "on the side where a token with A > 0 is pushed (default: 0.27)" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"clip": {"hihg": 0.3}}}, r"hihg.*config\.loss\.clip"),
        ({"loss": {"clip": {"low": -1.0}}}, "clip.low is -1"),
        ({"steps": "many"}, r"config\.steps"),
        ({"learner": {"replay": "r4"}}, r"config\.learner\.replay"),
    ],
)
def test_stored_settings_are_checked_by_name(tmp_path: Path, change: dict, message: str) -> None:
    values = to_json(tiny_config(tmp_path / "run"))
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    values = to_json(tiny_config(tmp_path / "run"))
    del values["rollout"]["groups"], values["model"]
    with pytest.raises(ValueError, match=r"required field missing @ config\.model"):
        from_json(values)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("learner", {"replay": "r2", "mini_batches": 1}, "replay r2 changes nothing.*mini_batches"),
        ("learner", {"replay": "r2", "old_logprobs": "none"}, "r2.*set old_logprobs to score"),
        ("learner", {"old_logprobs": "none"}, "old_logprobs is 'none'.*set .* to 'score'"),
        ("learner", {"mini_batches": 3}, "groups is 4, which does not split"),
        ("learner", {"row_length": 5}, "row_length is 5, too short"),
        ("rollout", {"groups": 0}, r"rollout\.groups is 0"),
        ("rollout", {"samples": 1}, r"rollout\.samples is 1"),
        ("rollout", {"temperature": 0.0}, "temperature is 0"),
        ("rollout", {"max_new_tokens": 28}, "leaves no token for a prompt"),
        ("evaluation", {"top_p": 0.0}, "top_p is 0"),
        ("cold_start", {"batch": 0}, r"cold_start\.batch 0"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(
    tmp_path: Path, part: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        vary(tiny_config(tmp_path / "run"), part, **settings)


def test_without_old_logprobs_the_loss_may_anchor_on_the_sampler(tmp_path: Path) -> None:
    config = vary(tiny_config(tmp_path / "run"), "loss", clip=ClipConfig(anchor="sampler"))
    assert vary(config, "learner", old_logprobs="none").learner.mini_batches == 2


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    with pytest.raises(ValueError, match="is no file"):
        load_config(path)
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"defines no get_config\(\)"):
        load_config(path)
    path.write_text("def get_config():\n    return 1\n")
    with pytest.raises(ValueError, match="returned int, no RunConfig"):
        load_config(path)
