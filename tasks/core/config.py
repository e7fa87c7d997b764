"""The run's configuration: one YAML file, typed, every field documented, unknown keys refused.

The text under each field is its help: in error messages, and in the form that a UI makes of the schema.
"""

from __future__ import annotations

import ipaddress
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused, docstrings are the fields' help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelRef(Section):
    """A model: its tokenizer, chat template and weights."""

    path: str = Field(min_length=1)
    """Folder or hub id of the model."""
    revision: str | None = None
    """Commit of a hub model; pin it, or the dataset can't be made again."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Launch(Section):
    """An SGLang server that the run starts and stops."""

    model: str | None = None
    """Folder or hub id to serve; the run's model where not given."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cuda`: one server per GPU listed; `cpu`: one server on the CPU."""
    gpus: list[int] = [0]
    """GPUs to use, one server each (device: cuda)."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """First port; a free one where not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and activations."""
    deterministic: bool = True
    """Honour a seed per request (--enable-deterministic-inference)."""
    custom_processors: bool = True
    """Allow custom logit processors, which most heuristics need. They let a client run code on the
    server, so a public address needs allow_public as well."""
    allow_public: bool = False
    """Yes, listen on a public address although custom processors are on."""
    context_length: int | None = Field(default=None, ge=16)
    """Longest sequence in tokens; the model's own where not given."""
    mem_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the device's memory for weights and cache (--mem-fraction-static)."""
    max_total_tokens: int | None = Field(default=None, ge=256)
    """Tokens in the cache; as much as fits where not given."""
    sampling_backend: Literal["pytorch", "flashinfer"] = "pytorch"
    """Which kernels sample; `pytorch` honours seeds and has one top_k/top_p dialect."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads (device: cpu); on a machine with other work, one is faster than two."""
    python: str | None = None
    """Interpreter of the environment that has SGLang; looked up where not given."""
    flags: dict[str, str | int | float | bool] = {}
    """More SGLang flags, by their long names without dashes in front: {tp-size: 2}."""
    ready_timeout_s: float = Field(default=600, gt=0)
    """Seconds until a server must answer."""

    @model_validator(mode="after")
    def _private(self) -> Launch:
        if self.custom_processors and not self.allow_public and not _is_loopback(self.host):
            raise ValueError(f"host {self.host} is not loopback, and custom logit processors let every client run "
                             "code on the server; say allow_public: true if that is meant, or use 127.0.0.1")
        return self


class ServerConfig(Section):
    """One server: someone runs it (`url`) or we do (`launch`)."""

    url: str | None = Field(default=None, pattern=r"^https?://[^\s/@]+(/.*)?$")
    """Address of a running SGLang server, such as http://10.0.0.1:30000."""
    launch: Launch | None = None
    """Start one (or one per GPU) with these settings, stop it at the end."""
    max_in_flight: int | None = Field(default=None, ge=1, le=4096)
    """Most requests in flight at this server; found out while running where not given."""

    @model_validator(mode="after")
    def _one_way(self) -> ServerConfig:
        if (self.url is None) == (self.launch is None):
            raise ValueError("give either url (a server that runs) or launch (one to start), not both or none")
        return self


class Servers(Section):
    """Who generates and who judges; a plain list is the generators."""

    generator: list[ServerConfig] = Field(
        default_factory=lambda: [ServerConfig(launch=Launch(device="cpu"))], min_length=1
    )
    """Servers that write the candidates; a real SGLang on the CPU where not given."""
    judge: list[ServerConfig] = []
    """Servers that compare candidates; the generators where not given."""

    @model_validator(mode="before")
    @classmethod
    def _plain_list(cls, value: Any) -> Any:
        return {"generator": value} if isinstance(value, list) else value


class Source(Section):
    """Where prompts come from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The source's name; part of every prompt's identity."""
    path: str = Field(min_length=1)
    """A .jsonl or .parquet file or an fsspec URL of one, or what `datasets` loads: hf://datasets/OWNER/NAME (or
    OWNER/NAME), or a folder."""
    split: str = "train"
    """Split of a `datasets` id or folder."""
    revision: str | None = None
    """Revision of a `datasets` id."""
    prompt_key: str | None = None
    """Column with the prompt's text (`prompt` where neither key is given)."""
    messages_key: str | None = None
    """Column with a list of {role, content} messages, in place of prompt_key."""
    answer_key: str | None = None
    """Column with the ground truth of the verifier."""
    verifier: Literal["gsm8k", "math", "ifeval"] | None = None
    """Checks correctness: gsm8k, math (both need answer_key) or ifeval (reads instruction_id_list
    and kwargs from the row)."""
    diversity: bool = False
    """Label diversity across seeds, where `labels` has diversity."""
    system_prompt: str | None = None
    """In place of generation.system_prompt for this source."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many rows."""
    license: str | None = None
    """Licence of the prompts, for the dataset's card."""
    on_malformed: Literal["error", "skip"] = "error"
    """What a row that can't be read does: stop before anything is sent, or be counted and left out."""

    @model_validator(mode="after")
    def _keys(self) -> Source:
        if self.prompt_key and self.messages_key:
            raise ValueError("give prompt_key or messages_key, not both")
        if self.verifier in ("gsm8k", "math") and not self.answer_key:
            raise ValueError(f"verifier {self.verifier} needs answer_key, the column with the right answer")
        if self.answer_key and not self.verifier:
            raise ValueError("answer_key needs a verifier: gsm8k or math")
        if self.verifier == "ifeval" and self.answer_key:
            raise ValueError("ifeval reads instruction_id_list and kwargs from the row, drop answer_key")
        return self

    @property
    def text_key(self) -> str:
        """The column the prompt is read from."""
        return self.messages_key or self.prompt_key or "prompt"


class HeuristicsConfig(Section):
    """Which sampling heuristics every prompt is sampled with."""

    family: Literal["llama", "qwen", "gemma", "generic"] | None = None
    """The full grid of a model family (`winnow heuristics FAMILY` lists it)."""
    files: list[str] = []
    """YAML files with `sampling_pipelines`."""


class Generation(Section):
    """How candidates are written, whatever the heuristic."""

    max_new_tokens: int = Field(default=250, ge=1)
    """Longest answer in tokens."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Shortest answer in tokens."""
    system_prompt: str | None = None
    """System message in front of every prompt that brings none."""
    stop: list[str] = []
    """Texts that end an answer."""
    sampling_mask: bool = False
    """Record the token ids that the engine kept at each step, and the exact log-probability of the sampled one, where
    it can: native top_k."""

    @model_validator(mode="after")
    def _ordered(self) -> Generation:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens "
                             f"({self.max_new_tokens})")
        return self

    def identity(self) -> dict[str, Any]:
        """The part that decides which tokens are asked for, and so the candidates' ids.

        Not `sampling_mask`: a candidate is the same whether or not what the engine kept is recorded beside it.
        """
        return self.model_dump(mode="json", exclude={"sampling_mask"})


class Quality(Section):
    """How candidates are ranked."""

    method: Literal["tournament"] = "tournament"
    """Swiss rounds of pairwise comparisons by an LLM judge, rated by Bradley-Terry."""
    extra_rounds: int = Field(default=1, ge=0)
    """Rounds beyond ceil(log2(players))."""
    template: str = "few_shot"
    """Judge prompt: few_shot, gram, or a YAML file of your own."""
    model: ModelRef | None = None
    """The judge's model; what servers.judge launches, else the run's model, where not given."""
    max_prompt_tokens: int = Field(default=2048, ge=64)
    """Longest judge prompt; longer texts lose their middle."""
    prior_sd: float = Field(default=2.5, gt=0)
    """Standard deviation of the Gaussian prior on ratings, in logits."""


class Diversity(Section):
    """How diversity is measured."""

    embedding_model: str | None = None
    """sentence-transformers model; all-MiniLM-L6-v2 where not given."""
    device: str = "cpu"
    """Torch device of the embedding model."""
    batch_size: int = Field(default=32, ge=1)
    """Texts embedded at once."""


class Verifiers(Section):
    """How correctness is checked."""

    workers: int = Field(default=2, ge=1)
    """Worker processes per shard."""
    time_limit_s: float = Field(default=10, gt=0)
    """Seconds until a check is killed; its verdict is then null."""


class Weights(Section):
    """Weight of each z-score in the final score; 0 leaves one out."""

    quality: float = Field(default=0.9, ge=0)
    """Weight of the Bradley-Terry rating."""
    diversity: float = Field(default=0.1, ge=0)
    """Weight of diversity (embedding entropy and 1 - self-BLEU)."""
    correctness: float = Field(default=0.9, ge=0)
    """Weight of the verifier's reward."""


class Scoring(Section):
    """How labels become a score, and which candidates are kept."""

    weights: Weights = Weights()
    """How much each label counts."""
    top_k: int = Field(default=1, ge=1)
    """Candidates kept per group."""
    per: list[Literal["prompt", "seed"]] = ["prompt", "seed"]
    """The group that top_k counts in: [prompt, seed] or [prompt]."""
    incorrect: Literal["drop", "keep"] = "drop"
    """What a failed verification does to a candidate; it is never credited."""

    @field_validator("per")
    @classmethod
    def _prompt_first(cls, value: list[str]) -> list[str]:
        if value not in (["prompt", "seed"], ["prompt"]):
            raise ValueError("must be [prompt, seed] or [prompt]")
        return value


class DatasetConfig(Section):
    """The published dataset."""

    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts in the validation split (a prompt is never in both)."""
    license: str | None = None
    """Licence on the card; `other` where not given."""


class Limits(Section):
    """When a run is good enough, and how long it tries."""

    max_failed: float = Field(default=0.01, ge=0, le=1)
    """Share of failed candidates above which the run ends with exit code 3."""
    incomplete_prompts: Literal["repair", "drop", "keep"] = "repair"
    """A prompt with failed cells: ask for those cells once more, leave the prompt out, or keep it."""
    request_timeout_s: float = Field(default=300, gt=0)
    """Seconds until one attempt at a request counts as timed out."""
    attempts: int = Field(default=4, ge=1)
    """Times a request may fail before its row is a failure (a server that is full or gone is no failure)."""
    request_deadline_s: float = Field(default=1800, gt=0)
    """Seconds of attempts and pauses, all together, until a request's row is a failure."""
    wait_for_servers_s: float = Field(default=60, ge=0)
    """Seconds to wait when no server works, then exit code 4."""


class Engine(Section):
    """How the work is spread on this machine or many."""

    task_runner: Literal["threads", "dask", "ray"] = "threads"
    """Prefect task runner; dask and ray need the extra of that name."""
    max_workers: int = Field(default=4, ge=1, le=256)
    """Shards worked on at once."""
    shard_prompts: int = Field(default=64, ge=1)
    """Prompts in a shard; part of the run's identity."""


class RunConfig(Section):
    """A run: prompts in, training set out."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name and folder."""
    runs_dir: str = "data/runs"
    """Where runs live: a folder or an fsspec URL."""
    run_seed: int = Field(default=0, ge=0)
    """Everything random derives from it."""
    model: ModelRef
    """The model that candidates come from."""
    servers: Servers = Servers()
    """Who generates and who judges."""
    sources: list[Source] = Field(min_length=1)
    """Where prompts come from."""
    heuristics: HeuristicsConfig
    """Which sampling heuristics every prompt is sampled with."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Each (prompt, heuristic) is sampled once per seed."""
    generation: Generation = Generation()
    """How candidates are written."""
    labels: list[Literal["quality", "diversity", "verifiers"]] = ["quality", "diversity", "verifiers"]
    """Labellers to run; [] ends with the verified candidates."""
    quality: Quality = Quality()
    """How candidates are ranked."""
    diversity: Diversity = Diversity()
    """How diversity is measured."""
    verifiers: Verifiers = Verifiers()
    """How correctness is checked."""
    scoring: Scoring = Scoring()
    """How labels become a score."""
    dataset: DatasetConfig = DatasetConfig()
    """The published dataset."""
    limits: Limits = Limits()
    """When a run is good enough."""
    engine: Engine = Engine()
    """How the work is spread."""

    @field_validator("seeds", "labels")
    @classmethod
    def _unique(cls, value: list[Any]) -> list[Any]:
        twice = sorted({v for v in value if value.count(v) > 1})
        if twice:
            raise ValueError(f"given twice: {', '.join(map(str, twice))}")
        if any(isinstance(v, int) and v < 0 for v in value):
            raise ValueError("must be 0 or more")
        return value

    @model_validator(mode="after")
    def _sources_unique(self) -> RunConfig:
        names = [s.name for s in self.sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"sources: two sources are named {', '.join(twice)}")
        return self

    @property
    def url(self) -> str:
        """The run directory."""
        return f"{self.runs_dir.rstrip('/')}/{self.run}"

    @property
    def judge_model(self) -> ModelRef:
        """The judge's model: named, launched, or the run's own."""
        if self.quality.model:
            return self.quality.model
        launched = [s.launch.model for s in self.servers.judge if s.launch and s.launch.model]
        return ModelRef(path=launched[0]) if launched else self.model

    def identity(self) -> dict[str, Any]:
        """The part of the config that decides the dataset's rows.

        Servers, limits, worker counts and folders may change between two runs under one name. Recording the sampling
        mask changes no token, but a run whose rows have it in part is no use: where on, it is part of this, and not of
        the candidates' ids.
        """
        out = self.model_dump(mode="json", exclude={
            "run", "runs_dir", "servers", "limits", "dataset", "diversity", "verifiers", "engine",
        })
        out["generation"] = self.generation.identity()
        if self.generation.sampling_mask:
            out["generation"]["sampling_mask"] = True
        out["diversity"] = {"embedding_model": self.diversity.embedding_model}
        out["dataset"] = {"validation": self.dataset.validation, "license": self.dataset.license}
        out["engine"] = {"shard_prompts": self.engine.shard_prompts}
        out["limits"] = {"incomplete_prompts": self.limits.incomplete_prompts}
        out["judge_model"] = self.judge_model.model_dump(mode="json")
        for source in out["sources"]:
            source["path"] = str(PurePosixPath(source["path"]))
        return out
