"""From the config to the command line of a server, as an installed SGLang takes it (here a stand-in's help text)."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.core.config import GenerationConfig, Launch, ModelRef, RunConfig
from tasks.core.errors import InputError
from tasks.serving.launch import flags_probe, launch_spec
from tasks.serving.launch.flags import LaunchFailed, LaunchRefused
from tasks.serving.launch.launch_spec import (
    LaunchSpec,
    command,
    command_line,
    environment,
    from_launch,
    interpreter,
    specs_of,
)
from tests.serving.launch.sglang_flags import HELP, KNOWN, FakeSGLang, names_of, read, without

MODEL = ModelRef(path="org/name", revision="abc")


def specs(launch: dict[str, Any], generation: dict[str, Any] | None = None, role: str = "generator") -> list[LaunchSpec]:
    return from_launch(Launch.model_validate(launch), role=role, model=MODEL,
                       generation=GenerationConfig.model_validate(generation or {}))


def asked(launch: dict[str, Any], generation: dict[str, Any] | None = None) -> dict[str, Any]:
    """The options of a config's command line, as a parser reads them."""
    spec = dataclasses.replace(specs(launch, generation)[0], python="/py")
    return read(command(spec, 1, KNOWN)[2 if spec.device == "cpu" else 4:], KNOWN)


# --- from the config to the spec ---


def test_every_gpu_gets_a_server_of_its_own_on_the_next_port() -> None:
    made = specs({"gpus": [2, 0, 5], "port": 30000, "dtype": "bf16", "threads": 3, "mask_limit": 64,
                  "ready_timeout_s": 9, "python": "/py"}, role="judge")
    assert [(s.gpu, s.port, s.role) for s in made] == [(2, 30000, "judge"), (0, 30001, "judge"), (5, 30002, "judge")]
    one = made[0]
    assert (one.model, one.revision, one.dtype, one.threads, one.mask_limit, one.ready_timeout_s, one.python) == (
        "org/name", "abc", "bfloat16", 3, 64, 9, "/py")


def test_the_cpu_has_one_server_and_no_gpu() -> None:
    assert [(s.gpu, s.port, s.device) for s in specs({"device": "cpu", "gpus": [1, 2]})] == [(None, None, "cpu")]


def test_no_gpu_listed_is_an_error_that_names_the_key() -> None:
    with pytest.raises(InputError, match=r"servers\.judge: launch\.gpus is empty"):
        specs({"gpus": []}, role="judge")


def test_what_is_not_given_is_left_to_sglang_but_the_backend_that_honours_seeds() -> None:
    one = specs({})[0]
    assert (one.dtype, one.context_length, one.mem_fraction, one.max_total_tokens, one.mask_limit, one.port,
            one.speculation, one.sampling_backend) == (None, None, None, None, None, None, {}, "pytorch")


def test_the_launchs_own_context_length_comes_before_the_roles() -> None:
    assert [specs(launch, {"context_length": 4096})[0].context_length for launch in ({}, {"context_length": 2048})] == [
        4096, 2048]


@pytest.mark.parametrize(("role", "method", "flags", "found"), [
    ("judge", "pointwise", {}, {"is-embedding": True}), ("judge", "tournament", {}, {}),
    ("generator", "pointwise", {}, {}), ("judge", "pointwise", {"--Is_Embedding": True}, {"--Is_Embedding": True}),
])
def test_a_pointwise_judge_is_launched_as_a_reward_model(role: str, method: str, flags: Any, found: Any) -> None:
    entry = {"launch": {"gpus": [0], "flags": flags}}
    config = RunConfig.model_validate({
        "run": "r", "model": {"path": "org/name"}, "sources": [{"name": "s", "path": "p.jsonl"}],
        "heuristics": {"family": "qwen"}, "servers": {"generator": [entry], "judge": [entry]},
        "quality": {"method": method}})
    (made,) = specs_of(config, role, getattr(config.servers, role)[0])
    assert made.flags == found and made.embeds is bool(found)


def test_the_launchs_own_model_has_no_revision_of_the_roles() -> None:
    one = specs({"model": "other/name"})[0]
    assert (one.model, one.revision) == ("other/name", None)


def test_the_launchs_own_flags_come_before_the_roles_engine_however_they_are_spelled() -> None:
    generation = {"engine": {"tp_size": 2, "log-requests-level": 1, "random_seed": 5}}
    assert specs({"flags": {"--TP-size": 4}}, generation)[0].flags == {"log-requests-level": 1, "random_seed": 5,
                                                                       "--TP-size": 4}
    assert "tp_size" not in specs({"flags": {"tensor-parallel-size": 4}}, generation)[0].flags  # an alias of it
    got = asked({"flags": {"tensor-parallel-size": 4, "log_requests_level": 0}}, generation)
    assert (got["tp-size"], got["log-requests-level"], got["random-seed"]) == ("4", "0", "5")


def test_a_spec_survives_being_written_down() -> None:
    for launch in ({}, {"speculation": {"algorithm": "eagle", "draft_model": "d/e", "steps": 3, "topk": 1,
                                        "draft_tokens": 4}, "flags": {"tp": 2, "x": True}, "mask_limit": 9}):
        for spec in specs(launch):
            again = LaunchSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
            assert again == spec and again.digest == spec.digest


def test_the_digest_tells_settings_apart_and_not_ports() -> None:
    base = LaunchSpec(model="org/name")
    assert dataclasses.replace(base, port=5, ready_timeout_s=1).digest == base.digest
    others = [dataclasses.replace(base, **{k: v}) for k, v in
              {"model": "b", "dtype": "float32", "gpu": 1, "role": "judge", "flags": {"x": 1}, "mask_limit": 4,
               "speculation": {"algorithm": "ngram"}}.items()]
    assert len({base.digest, *(o.digest for o in others)}) == 8


# --- from the spec to the command line ---


def test_a_gpu_server_gets_its_flags() -> None:
    spec = LaunchSpec(model="org/name", gpu=3, dtype="bfloat16", revision="abc", context_length=4096, mask_limit=100,
                      mem_fraction=0.8, python="/py", flags={"tp_size": 2, "skip-server-warmup": True,
                                                             "is-embedding": False})
    argv = command(spec, 30001, KNOWN)
    assert argv[:4] == ["/py", "-P", "-m", "sglang.launch_server"]
    assert read(argv[4:], KNOWN) == {
        "model-path": "org/name", "revision": "abc", "host": "127.0.0.1", "port": "30001", "device": "cuda",
        "base-gpu-id": "3", "dtype": "bfloat16", "context-length": "4096", "mem-fraction-static": "0.8",
        "sampling-backend": "pytorch", "sampling-mask-max-tokens": "100", "enable-deterministic-inference": True,
        "enable-custom-logit-processor": True, "enable-metrics": True, "tp-size": "2", "skip-server-warmup": True}


def test_a_cpu_server_gets_what_a_cpu_needs(tmp_path: Path) -> None:
    spec = LaunchSpec(model=str(tmp_path), device="cpu", threads=2, python="/py")
    argv = command(spec, 1, KNOWN)
    assert argv[1].endswith("sglang_cpu/launch.py")
    got = read(argv[2:], KNOWN)
    assert (got["attention-backend"], got["sampling-backend"], got["model-path"], got["max-total-tokens"],
            got["mem-fraction-static"], got["device"]) == ("torch_native", "pytorch", str(tmp_path), "32768", "0.3",
                                                           "cpu")
    assert got["disable-overlap-schedule"] is True and "base-gpu-id" not in got
    env = environment(spec)
    assert env["OMP_NUM_THREADS"] == "2" and env["KMP_BLOCKTIME"] == "0" and env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment(dataclasses.replace(spec, model="org/name"))


def test_a_draft_model_of_the_hub_keeps_the_server_online(tmp_path: Path) -> None:
    spec = LaunchSpec(model=str(tmp_path), speculation={"algorithm": "standalone", "draft_model": "org/draft"})
    assert environment(spec) == {}
    assert environment(dataclasses.replace(spec, speculation={"algorithm": "eagle", "draft_model": str(tmp_path)}))


@pytest.mark.parametrize(("speculation", "words"), [
    ("off", {}),
    (None, {}),
    ("ngram", {"algorithm": "NGRAM"}),
    ({"algorithm": "n-gram", "draft_tokens": 8, "max_breadth": 4},
     {"algorithm": "NGRAM", "num-draft-tokens": "8", "ngram-min-bfs-breadth": "1", "ngram-max-bfs-breadth": "4"}),
    ({"algorithm": "NGRAM", "min_breadth": 2},
     {"algorithm": "NGRAM", "ngram-min-bfs-breadth": "2", "ngram-max-bfs-breadth": "10"}),
    ({"algorithm": "eagle3", "draft_model": "a/b", "draft_revision": "c0ffee"},
     {"algorithm": "EAGLE3", "draft-model-path": "a/b", "draft-model-revision": "c0ffee"}),
    ({"algorithm": "EAGLE", "draft_model": "a/b", "steps": 3, "topk": 1, "draft_tokens": 4},
     {"algorithm": "EAGLE", "draft-model-path": "a/b", "num-steps": "3", "eagle-topk": "1", "num-draft-tokens": "4"}),
    ("mtp", {"algorithm": "NEXTN"}),
    ({"algorithm": "standalone", "draft_model": "a/b"}, {"algorithm": "STANDALONE", "draft-model-path": "a/b"}),
])
def test_speculation_becomes_flags(speculation: Any, words: dict[str, str]) -> None:
    got = asked({"speculation": speculation})
    assert {name[12:]: value for name, value in got.items() if name.startswith("speculative-")} == words


def test_a_draft_model_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchRefused, match=r"launch\.speculation\.draft_model: there is no folder .*nowhere"):
        asked({"speculation": {"algorithm": "eagle", "draft_model": "./nowhere"}})


def test_a_model_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchRefused, match=r"launch\.model: there is no folder .*nowhere"):
        command(LaunchSpec(model="./nowhere", python="/py"), 1, KNOWN)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::", "some.name"])
def test_custom_processors_on_a_public_address_need_a_yes(host: str) -> None:
    spec = LaunchSpec(model="org/name", host=host, python="/py")
    with pytest.raises(LaunchRefused, match="allow_public"):
        command(spec, 1, KNOWN)
    assert f"--host={host}" in command(dataclasses.replace(spec, allow_public=True), 1, KNOWN)
    command(dataclasses.replace(spec, custom_processors=False), 1, KNOWN)


@pytest.mark.parametrize("changes", [{}, {"deterministic": False, "device": "cpu"}])
def test_a_sampling_backend_that_sglang_would_quietly_replace_is_refused(changes: dict[str, Any]) -> None:
    spec = LaunchSpec(model="org/name", sampling_backend="flashinfer", python="/py", **changes)
    with pytest.raises(LaunchRefused, match=r"launch\.sampling_backend: flashinfer does not go with"):
        command(spec, 1, KNOWN)
    free = dataclasses.replace(spec, deterministic=False, device="cuda")
    assert "--sampling-backend=flashinfer" in command(free, 1, KNOWN)


@pytest.mark.parametrize(("name", "key"), [
    ("host", "launch.host"), ("--host", "launch.host"), ("HOS", "launch.host"), ("port", "launch.port"),
    ("model", "launch.model"), ("Model_Path", "launch.model"), ("revision", "model.revision"),
    ("enable_custom_logit_processor", "launch.custom_processors"), ("enable-custom", "launch.custom_processors"),
    ("dtype", "launch.dtype"), ("dty", "launch.dtype"), ("context-length", "launch.context_length"),
    ("mem_fraction_static", "launch.mem_fraction"), ("max-total-tokens", "launch.max_total_tokens"),
    ("sampling-backend", "launch.sampling_backend"), ("device", "launch.device"), ("base-gpu-id", "launch.gpus"),
    ("enable-deterministic-inference", "launch.deterministic"), ("sampling-mask", "launch.mask_limit"),
    ("speculative-algo", "launch.speculation.algorithm"), ("speculative-draft-model", "draft_model"),
    ("speculative_num_steps", "launch.speculation.steps"), ("speculative-ngram-max", "max_breadth"),
])
@pytest.mark.parametrize("old", [False, True])
def test_flags_cannot_go_around_a_key_of_the_config(name: str, key: str, old: bool) -> None:
    """Nor where this SGLang has no such flag: the config is as wrong there."""
    known = without(*(flag for flag in launch_spec._KEYS if flag != "model-path")) if old else KNOWN
    with pytest.raises(LaunchRefused, match=f"key of its own .*{key}"):
        command(LaunchSpec(model="org/name", python="/py", flags={name: "0.0.0.0"}), 1, known)


def test_flags_cannot_bring_a_file_of_flags() -> None:
    with pytest.raises(LaunchRefused, match="names a file of more flags"):
        command(LaunchSpec(model="org/name", python="/py", flags={"config": "x.yaml"}), 1, KNOWN)


def test_without_sglang_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tasks.serving.launch.launch_spec.ROOT", tmp_path)
    with pytest.raises(LaunchFailed, match="make install-sglang"):
        interpreter(LaunchSpec(model="org/name"))


@pytest.mark.parametrize(("name", "on"), [("is-embedding", True), ("--Is_Embedding", True), ("is-embedding", False)])
def test_an_embedding_model_is_known_however_its_flag_is_spelled(name: str, on: bool) -> None:
    assert LaunchSpec(model="m", flags={name: on}).embeds is on


# --- what an older SGLang lacks ---


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSGLang:
    monkeypatch.setattr(flags_probe, "_KNOWN", {})
    return FakeSGLang(tmp_path)


def lines_without(*names: str) -> str:
    """The help text of a SGLang that lacks these options."""
    return "\n".join(line for line in HELP.splitlines() if not line.startswith(tuple(f"  --{name}" for name in names)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_sglang_that_is_started_is_asked_for_its_flags(sglang: FakeSGLang, device: Any, tmp_path: Path) -> None:
    spec = LaunchSpec(model="org/name", device=device, python=str(sglang.python), mask_limit=50)
    argv = command(spec, 1, cache_dir=tmp_path / "cache")
    assert argv == command(spec, 1, KNOWN)
    command(dataclasses.replace(spec, model=str(tmp_path), threads=3), 2, cache_dir=tmp_path / "cache")
    assert sglang.times_asked == 1
    start = argv[1:2] if device == "cpu" else argv[1:4]
    assert " ".join([*start, "--help"]) in sglang.log.read_text().splitlines()
    assert len(list((tmp_path / "cache").glob("sglang-flags-*.json"))) == 1


def test_what_is_forced_but_not_supported_is_left_out_with_a_warning_that_names_it(
        sglang: FakeSGLang, caplog: pytest.LogCaptureFixture) -> None:
    lacking = ("enable-deterministic-inference", "sampling-mask-max-tokens", "sampling-backend", "revision")
    sglang.answers(lines_without(*lacking))
    spec = LaunchSpec(model="org/name", revision="abc", python=str(sglang.python), mask_limit=50,
                      flags={"enable-metrix": True})
    line = command_line(spec, 1)
    assert not set(names_of(line.argv)) & {f"--{name}" for name in lacking}
    assert {f"--{name}" for name in (*lacking, "enable-metrix")} == {w.split()[4].rstrip(":") for w in line.warnings}
    assert not any("did you mean" in w for w in line.warnings if "metrix" not in w)
    with caplog.at_level(logging.WARNING, "winnow.servers"):
        assert command(spec, 1) == line.argv
    assert [record.getMessage() for record in caplog.records] == [f"generator server: {w}" for w in line.warnings]


def test_what_is_off_and_not_supported_is_not_worth_a_word() -> None:
    spec = LaunchSpec(model="org/name", python="/py", deterministic=False, custom_processors=False)
    line = command_line(spec, 1, without("enable-deterministic-inference", "enable-custom-logit-processor"))
    assert line.warnings == () and "--sampling-backend=pytorch" not in line.argv


def test_speculation_that_is_not_supported_is_left_out_as_a_whole() -> None:
    spec = LaunchSpec(model="org/name", python="/py", speculation={"algorithm": "ngram", "max_breadth": 4})
    line = command_line(spec, 1, without("speculative-algorithm"))
    assert not any("speculative" in word for word in line.argv)
    assert len(line.warnings) == 1 and "no --speculative-algorithm: started without speculative" in line.warnings[0]


def test_an_interpreter_without_sglang_says_so(sglang: FakeSGLang) -> None:
    sglang.does("import sys; sys.exit(\"No module named 'sglang'\")")
    with pytest.raises(LaunchFailed, match=r"make install-sglang.*launch\.python"):
        command(LaunchSpec(model="org/name", python=str(sglang.python)), 1)


# --- every config ---

TREE = ("steps", "topk", "draft_tokens")


@st.composite
def speculations(draw: st.DrawFn) -> dict[str, Any]:
    algorithm = draw(st.sampled_from(["off", "ngram", "eagle", "eagle3", "nextn", "standalone"]))
    number = st.integers(1, 30)
    out: dict[str, Any] = {"algorithm": algorithm}
    if algorithm == "ngram":
        low, high = sorted((draw(number), draw(number)))
        some = {"min_breadth": low, "max_breadth": high, "draft_tokens": draw(number)}
        out |= {name: value for name, value in some.items() if draw(st.booleans())}
        assume(out.get("draft_tokens", 12) >= out.get("max_breadth", 10))
        return out
    if algorithm != "off":
        if algorithm != "nextn" or draw(st.booleans()):
            out |= {"draft_model": "org/draft"} | ({"draft_revision": "d1"} if draw(st.booleans()) else {})
        if draw(st.booleans()):
            out |= {name: draw(number) for name in TREE}
    return out


FLAGS: dict[str, st.SearchStrategy[Any]] = {
    "tp-size": st.integers(1, 8), "tensor_parallel_size": st.integers(1, 8), "Enable-Metrics": st.booleans(),
    "attention-backend": st.sampled_from(["triton", "FA3", "torch_native"]), "nnodes": st.integers(1, 4),
    "kv_cache_dtype": st.sampled_from(["fp8_e5m2", "auto", "BF16"]), "chunked-prefill-size": st.sampled_from([-1, 512]),
    "enable-tf32-matmul": st.booleans(), "no-enable-tf32-matmul": st.booleans(), "--random_seed": st.integers(0, 99),
    "json-model-override-args": st.just('{"a": "b c"}'), "dist-init-addr": st.just("10.0.0.1:1"),
    "speculative-ngram-match-type": st.sampled_from(["bfs", "PROB"]), "no-such-flag": st.booleans(),
    "grammar_backend": st.sampled_from(["none", "xgrammar"]), "disable-overlap-schedule": st.booleans(),
}


@st.composite
def launches(draw: st.DrawFn) -> dict[str, Any]:
    """Every key of Launch that shapes a command line, each there or not."""
    keys: dict[str, st.SearchStrategy[Any]] = {
        "device": st.sampled_from(["cuda", "cpu"]), "gpus": st.just([1, 3]), "port": st.integers(1, 60000),
        "dtype": st.sampled_from(["auto", "bf16", "half", "float32"]), "deterministic": st.booleans(),
        "custom_processors": st.booleans(), "context_length": st.integers(16, 9999), "mask_limit": st.integers(2, 5000),
        "mem_fraction": st.sampled_from([0.1, 0.85]), "max_total_tokens": st.integers(256, 99999),
        "speculation": speculations(), "host": st.sampled_from(["127.0.0.1", "localhost", "::1"]),
        "sampling_backend": st.sampled_from(["pytorch", "flashinfer"]), "model": st.just("other/model"),
        "flags": st.fixed_dictionaries({}, optional=FLAGS),
    }
    out = {name: draw(strategy) for name, strategy in keys.items() if draw(st.booleans())}
    if out.get("device") == "cpu" or out.get("deterministic", True):
        out.pop("sampling_backend", None)
    if out.get("device") == "cpu":
        out.pop("speculation", None)
    return out


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    return {"engine": draw(st.fixed_dictionaries({}, optional=FLAGS))} | (
        {"context_length": draw(st.integers(16, 9999))} if draw(st.booleans()) else {})


OWN = {"dtype": "dtype", "context_length": "context-length", "mask_limit": "sampling-mask-max-tokens",
       "mem_fraction": "mem-fraction-static", "max_total_tokens": "max-total-tokens", "host": "host",
       "sampling_backend": "sampling-backend", "device": "device", "model": "model-path"}
DRAFTED = {"draft_model": "draft-model-path", "draft_revision": "draft-model-revision", "steps": "num-steps",
           "topk": "eagle-topk", "draft_tokens": "num-draft-tokens", "min_breadth": "ngram-min-bfs-breadth",
           "max_breadth": "ngram-max-bfs-breadth"}
WORDS = {"bf16": "bfloat16", "half": "float16"}


@given(launches(), engines(), st.sets(st.sampled_from([option.name[2:] for option in KNOWN.options]), max_size=12))
def test_every_config_gives_a_command_line_that_says_it_once_and_whole(
        launch: dict[str, Any], generation: dict[str, Any], lacking: set[str]) -> None:
    known = without(*lacking)
    for n, spec in enumerate(specs(launch, generation)):
        line = command_line(dataclasses.replace(spec, python="/py"), 7 + n, known)
        words = line.argv[2 if spec.device == "cpu" else 4:]
        named = names_of(words)
        canonical = [known.find(name, whole=True) for name in named]
        assert None not in canonical and len(named) == len(words)
        assert len({found[0] for found in canonical if found}) == len(named)
        got = read(words, known)
        # every key that was given arrives, or a warning names its flag
        said = " ".join(line.warnings).replace(":", " ").replace(",", " ").replace("=", " ").split()
        expected = {OWN[key]: WORDS.get(str(value), str(value)) for key, value in launch.items() if key in OWN
                    and value != "auto"} | {"port": str(7 + n)}
        expected |= {"context-length": str(generation["context_length"])} if "context_length" in generation and (
            "context_length" not in launch) else {}
        guess = launch.get("speculation", {"algorithm": "off"})
        if guess["algorithm"] != "off":
            expected |= {"speculative-algorithm": guess["algorithm"].upper()}
            expected |= {f"speculative-{DRAFTED[key]}": str(value) for key, value in guess.items() if key in DRAFTED}
        else:
            assert not any("speculative" in name and "match-type" not in name for name in named)
        for name, value in expected.items():
            assert got.get(name) == value or (name not in got and any(w.strip("()") == f"--{name}" for w in said)), name
        # what belongs together is together
        tree = [name for name in ("num-steps", "eagle-topk", "num-draft-tokens") if f"speculative-{name}" in got]
        assert guess["algorithm"] == "ngram" or len(tree) in (0, 3)
        least, most = (got.get(f"speculative-ngram-{end}-bfs-breadth") for end in ("min", "max"))
        assert (least is None and most is None) or int(least or 0) <= int(most or 0)
        assert (least is None) == (most is None)
        if "speculative-algorithm" not in got:
            assert not any(name.startswith("--speculative") for name in named) or guess["algorithm"] == "off"
        assert ("--enable-deterministic-inference" in named) == (
            launch.get("deterministic", True) and "enable-deterministic-inference" not in lacking)
        if {"nnodes", "dist-init-addr"} <= {*launch.get("flags", {}), *generation["engine"]}:
            assert len({"nnodes", "dist-init-addr"} & {*got}) in (0, 2)
