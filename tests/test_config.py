"""RunConfig: JSON both ways, command-line overrides, and contradictions refused with a remedy."""

import ast
import dataclasses
import inspect
import json
import re
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
from jaxrl_llm.learner.publish import PublishConfig
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.model.hf_config import config_json
from jaxrl_llm.rollout.sglang import SGLangConfig
from tests.tiny import tiny_config, vary

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_to_run_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = config_json(
        tiny_config(tmp_path).model,
        dtype="bfloat16",
        max_length=32,
        stop_token_ids=(1,),
        pad_token_id=0,
    )
    (tmp_path / "config.json").write_text(json.dumps(described))
    monkeypatch.setenv("MODEL", str(tmp_path))  # for a template that asks for one
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


SERVER = SGLangConfig(servers=("http://127.0.0.1:30000",), max_length=28)


def on_servers(run_dir: Path, **settings: object) -> RunConfig:
    """The tiny experiment on a server, with some of its settings."""
    return vary(tiny_config(run_dir), "rollout", sglang=dataclasses.replace(SERVER, **settings))


def changed(values: dict, changes: dict) -> dict:
    """With the nested changes put in."""
    merged = dict(values)
    for name, value in changes.items():
        merged[name] = changed(values[name], value) if isinstance(value, dict) else value
    return merged


def check_refused(config: RunConfig, changes: dict, *parts: str) -> None:
    """The changed settings are refused as soon as they are read, with all of these words."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        from_json(changed(to_json(config), changes))
    for part in parts:
        assert part in str(error.value)


DENSE = {"model": {"moe": {"dense_layers": [1], "dense_width": 8}}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (DENSE, ["model.moe.dense_layers is (1,)", "leave rollout.sglang.servers empty"]),
        (
            {"rollout": {"temperature": 1e-7}},
            ["rollout.temperature is 1e-07", "takes for greedy", "make it at least 1e-06"],
        ),
        (
            {"evaluation": {"top_p": 0.9}},
            [
                "evaluation.top_p is 0.9 and evaluation.top_k 0",
                "top_k from 2 to 4096 alone",
                "set such a top_k, or neither",
            ],
        ),
        ({"evaluation": {"top_k": 1}}, ["evaluation.top_k 1", "set such a top_k, or neither"]),
        ({"evaluation": {"top_k": 4097}}, ["evaluation.top_k 4097", "set such a top_k"]),
        (
            {"rollout": {"max_new_tokens": 28}},
            ["rollout.max_new_tokens is 28", "rollout.sglang.max_length = 28; change one of them"],
        ),
        (
            {"learner": {"row_length": 26}},
            ["learner.row_length is 26", "rollout.sglang.max_length = 28", "at least 27, or 0"],
        ),
    ],
)
def test_what_servers_cannot_do_is_refused(tmp_path: Path, changes: dict, parts: list[str]) -> None:
    check_refused(on_servers(tmp_path / "run"), changes, *parts)


@pytest.mark.parametrize(
    "changes", [DENSE, {"rollout": {"temperature": 1e-7}}, {"evaluation": {"top_p": 0.9}}]
)
def test_what_servers_cannot_do_the_engine_in_process_can(tmp_path: Path, changes: dict) -> None:
    values = changed(to_json(tiny_config(tmp_path / "run")), changes)
    assert from_json(values) != tiny_config(tmp_path / "run")


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 2), (1.0, 4096)])
def test_servers_report_these_truncated_distributions(
    tmp_path: Path, top_p: float, top_k: int
) -> None:
    config = vary(on_servers(tmp_path / "run"), "evaluation", top_p=top_p, top_k=top_k)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_responses_of_two_versions_need_a_way_to_be_replayed(tmp_path: Path, mode: str) -> None:
    """tiny_config replays the sampler's routes."""
    config = on_servers(tmp_path / "run")
    spanning = {"rollout": {"sglang": {"on_publish": mode}, "buffer": {"max_staleness": 1}}}
    check_refused(
        config,
        spanning,
        f"rollout.sglang.on_publish is {mode!r}",
        "learner.replay r3 with learner.route_fallback 'error' refuses",
        "set route_fallback to 'live', on_publish to 'abort', or rollout.sglang.keep_spanning_rou",
    )
    values = changed(to_json(config), spanning)
    # Each remedy helps, and so does what leaves no such response or no replay.
    for changes in (
        {"learner": {"route_fallback": "live"}},
        {"rollout": {"sglang": {"on_publish": "abort"}}},
        {"rollout": {"sglang": {"keep_spanning_routes": True}}},
        {"rollout": {"buffer": {"max_staleness": 0}}},
        {"learner": {"replay": "r2"}},
        {"learner": {"replay": "none"}},
    ):
        from_json(changed(values, changes))


NUMBERS = [
    field.name
    for field in dataclasses.fields(SGLangConfig)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1])
def test_every_number_of_the_servers_is_positive(tmp_path: Path, name: str, value: int) -> None:
    message = rf"sglang\.{name} is {value}(\.0)?; it must be positive"
    with pytest.raises(ValueError, match=message):
        from_json(changed(to_json(on_servers(tmp_path)), {"rollout": {"sglang": {name: value}}}))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sglang": {"servers": ["host:1"]}}, ["servers has 'host:1'; write http://HOST:PORT"]),
        ({"sglang": {"servers": ["http://a:1/"]}}, ["servers has 'http://a:1/'; write http://"]),
        ({"sglang": {"servers": ["http://a:1"] * 2}}, ["sglang.servers, ", "names a server twice"]),
        ({"sglang": {"on_publish": "wait"}}, ["@ config.rollout.sglang.on_publish"]),
        ({"publish": {"keep": 1}}, ["publish.keep is 1: a server that comes back", "at least 2"]),
        ({"publish": {"server_folder": "/mnt/w"}}, ["server_folder is /mnt/w without the folder"]),
        ({"publish": {"dtype": "float16"}}, ["@ config.rollout.publish.dtype"]),
        (
            {"publish": {"folder": "gs://bucket/w"}},
            ["publish.folder is gs://bucket/w", "as publish.server_folder"],
        ),
    ],
)
def test_settings_of_servers_and_publishing_are_checked_by_name(
    tmp_path: Path, changes: dict, parts: list[str]
) -> None:
    check_refused(on_servers(tmp_path / "run"), {"rollout": changes}, *parts)


# For each setting of the servers and of publishing: another value, and whether that makes another
# experiment.
OTHERWISE: dict[str, tuple[object, bool]] = {
    "sglang.servers": (["http://127.0.0.1:30001", "http://127.0.0.1:30002"], False),
    "sglang.api_key_env": ("OTHER_KEY", False),
    "sglang.max_length": (64, True),
    "sglang.concurrency": (7, False),
    "sglang.request_seconds": (7.0, False),
    "sglang.attempts": (7, False),
    "sglang.health_seconds": (7.0, False),
    "sglang.update_seconds": (7.0, False),
    "sglang.on_publish": ("retract", True),
    "sglang.keep_spanning_routes": (True, True),
    "sglang.probe_tolerance": (0.5, False),
    "sglang.journal": (False, False),
    "publish.folder": ("/shared/w", False),
    "publish.server_folder": ("/mnt/w", False),
    "publish.dtype": ("float32", True),
    "publish.keep": (7, False),
}


def test_every_setting_of_servers_and_publishing_is_of_the_experiment_or_not() -> None:
    """A new one has to be put into this table."""
    kinds = {"sglang": SGLangConfig, "publish": PublishConfig}
    names = {f"{part}.{f.name}" for part, kind in kinds.items() for f in dataclasses.fields(kind)}
    assert set(OTHERWISE) == names


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_run_may_go_on_with_other_servers_but_not_as_another_experiment(
    tmp_path: Path, name: str
) -> None:
    value, counts = OTHERWISE[name]
    part, field = name.split(".")
    config = on_servers(tmp_path / "run")
    config = vary(config, "rollout", publish=PublishConfig(folder="/x"))
    other = from_json(changed(to_json(config), {"rollout": {part: {field: value}}}))
    assert other != config
    found = [line.split(":")[0] for line in differences(config, other)]
    assert found == ([f"rollout.{name}"] if counts else [])


def test_servers_instead_of_none_are_another_engine(tmp_path: Path) -> None:
    served = on_servers(tmp_path / "run")
    local = on_servers(tmp_path / "run", servers=())
    expected = "rollout.sglang.servers: ['http://127.0.0.1:30000'] != []"
    assert differences(served, local) == [expected]
    assert [line.split(":")[0] for line in differences(local, served)] == ["rollout.sglang.servers"]


def test_where_a_run_is_makes_no_other_experiment(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "a")
    assert differences(config, dataclasses.replace(config, run_dir="elsewhere")) == []


def test_a_bucket_with_a_mount_for_servers_is_a_folder_of_publications(tmp_path: Path) -> None:
    publish = PublishConfig(folder="s3://bucket/w", server_folder="/mnt/w")
    assert vary(on_servers(tmp_path / "run"), "rollout", publish=publish).rollout.publish == publish


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
