"""The run's configuration: one YAML file, typed, every field documented, unknown keys refused.

The text under each field is its help: in error messages, and in the form that a UI makes of the schema.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from tasks.core.config_generation import Generation, GenerationConfig
from tasks.core.config_servers import Launch, ServerConfig, Servers, Settings, Speculation
from tasks.core.section import Address, Section, one_of

__all__ = ["Diversity", "Generation", "GenerationConfig", "HeuristicsConfig", "Launch", "Limits", "ModelRef", "Quality",
           "RunConfig", "Scoring", "Section", "ServerConfig", "Servers", "Settings", "Source", "Speculation"]


class ModelRef(Section):
    """A model: its tokenizer, chat template and weights."""

    path: str = Field(min_length=1)
    """Folder or hub id of the model."""
    revision: str | None = None
    """Commit of a hub model; pin it, or the dataset can't be made again."""

    @property
    def pinned(self) -> str:
        """PATH, or PATH@REVISION."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def is_local(self) -> bool:
        """Whether `path` means a folder here (also one that is missing), not OWNER/NAME on the hub."""
        return Path(self.path).exists() or self.path.startswith(("/", ".", "~")) or self.path.count("/") != 1


class Source(Section):
    """Where prompts come from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The source's name; part of every prompt's identity."""
    path: Address = Field(min_length=1)
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
    limit: int | None = Field(default=None, ge=1, lt=2**62)
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
    fill_from_model: bool = False
    """Let generation_config.json fill in the temperature and cuts that a heuristic does not name. Without it, a
    heuristic that names processors has no others, and only one that names none takes the model's."""


_TOP = 5


def _off(value: Any) -> Any:
    """`off` is YAML's word for false."""
    return "off" if value is False or (isinstance(value, str) and value.strip().lower() == "off") else value


def _local(folder: str) -> str:
    if "://" in folder:
        raise ValueError("a folder on a local disk is needed, or off: its locks do not hold elsewhere")
    return folder


class Quality(Section):
    """How candidates are ranked."""

    method: Literal["tournament", "pointwise"] = "tournament"
    """tournament: pairwise comparisons by an LLM judge, rated by Bradley-Terry. pointwise: a scalar score of each
    candidate by a reward model (in its own column, rm_score)."""
    schedule: Literal["top_k", "ranking"] = "top_k"
    """Whom a tournament compares. top_k: those whose place among the best `top` is least settled, at a fraction of the
    calls; ranking: everyone, in Swiss rounds."""
    top: int | None = Field(default=None, ge=1)
    """How many of the best a top_k tournament tells from the rest; 5, or scoring.top_k if that is more, where not
    given."""
    stop: Literal["settled", "rounds"] = "settled"
    """When a tournament ends. settled: once its aim is reached (`confidence`, `reliability`), at the latest after its
    rounds; rounds: after its rounds."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """top_k: settled once this share of the best named is expected to be of the true best (at 0.95 and 5: 4.75)."""
    reliability: float = Field(default=0.95, gt=0, lt=1)
    """ranking: settled when the ratings explain this share of the variance of the true ones."""
    rounds: int | None = Field(default=None, ge=1)
    """Most rounds of a tournament, or of a top_k one as many comparisons as these rounds have. Where not given:
    ceil(log2(players)) + extra_rounds for a ranking, and for top_k two fifths of their comparisons (in small groups
    players + 2 top, if that is more)."""
    extra_rounds: int = Field(default=1, ge=0)
    """What is added to ceil(log2(players)), where `rounds` is not given."""
    template: str = "few_shot"
    """Judge prompt: few_shot, gram, or a YAML file of your own."""
    model: ModelRef | None = None
    """The judge's model; what servers.judge launches or expects, else the run's model, where not given."""
    max_prompt_tokens: int = Field(default=2048, ge=64)
    """Longest judge prompt; longer texts lose their middle."""
    prior_sd: Annotated[Annotated[float, Field(ge=1e-3, le=1e3)] | Literal["auto"],
                        one_of("a number of logits from 0.001 to 1000, or auto")] = "auto"
    """Standard deviation of the Gaussian prior on ratings, in logits; auto: each group's own, from its comparisons."""
    solver: Literal["newton", "choix"] = "newton"
    """Who fits the ratings: Newton's method, or the choix library (slower; the cross-check)."""
    cache: Annotated[str, Field(min_length=1), BeforeValidator(_off), AfterValidator(_local)] | None = None
    """Folder of the judgements that are kept, so that none is asked for twice, also by another run; off: none are kept
    across runs. Where not given: beside the runs (runs_dir), or in the user's cache where that is no local folder."""


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
    runs_dir: Address = "data/runs"
    """Where runs live: a folder or an fsspec URL."""
    run_seed: int = Field(default=0, ge=0, lt=2**62)
    """Everything random derives from it."""
    model: ModelRef
    """The model that candidates come from."""
    servers: Servers = Servers()
    """Who generates and who judges."""
    allow_mismatch: bool = False
    """Use a `url` server although it is not what is expected; what differs is recorded in run.json."""
    sources: list[Source] = Field(min_length=1)
    """Where prompts come from."""
    heuristics: HeuristicsConfig
    """Which sampling heuristics every prompt is sampled with."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Each (prompt, heuristic) is sampled once per seed."""
    generation: Generation = Generation()
    """How each role's servers are asked to generate."""
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
        if any(isinstance(v, int) and not 0 <= v < 2**62 for v in value):
            raise ValueError("must be 0 or more, and below 2**62")
        return value

    @model_validator(mode="after")
    def _sources_unique(self) -> RunConfig:
        names = [s.name for s in self.sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"sources: two sources are named {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _places_settled(self) -> RunConfig:
        if "quality" in self.labels and (self.quality.method, self.quality.schedule) == ("tournament", "top_k") and (
                self.quality_top < self.scoring.top_k):
            raise ValueError(f"quality.top: the best {self.quality_top} are told from the rest, and scoring.top_k "
                             f"keeps {self.scoring.top_k}: leave quality.top out, or take quality.schedule: ranking")
        return self

    @property
    def quality_top(self) -> int:
        """How many of the best a top_k tournament tells from the rest."""
        return self.quality.top or max(_TOP, self.scoring.top_k)

    @property
    def url(self) -> str:
        """The run directory."""
        return f"{self.runs_dir.rstrip('/')}/{self.run}"

    @property
    def judge_model(self) -> ModelRef:
        """The judge's model: named, launched or expected of a server, or the run's own."""
        if self.quality.model:
            return self.quality.model
        served = [s.settings.model for s in self.servers.judge if s.settings.model]
        return ModelRef(path=served[0]) if served else self.model

    def model_of(self, role: str) -> ModelRef:
        """The model of a role."""
        return self.judge_model if role == "judge" else self.model

    def identity(self) -> dict[str, Any]:
        """The part of the config that decides the dataset's rows, but for heuristics and generation.

        Those two stand for more than the config says; `flows.prepare.Plan.identity` adds what they come to. Servers,
        limits, worker counts and folders may change between two runs under one name.
        """
        out = self.model_dump(mode="json", exclude={
            "run", "runs_dir", "servers", "allow_mismatch", "limits", "dataset", "diversity", "verifiers", "engine",
            "heuristics", "generation",
        })
        out["diversity"] = {"embedding_model": self.diversity.embedding_model}
        out["dataset"] = {"validation": self.dataset.validation, "license": self.dataset.license}
        out["engine"] = {"shard_prompts": self.engine.shard_prompts}
        out["limits"] = {"incomplete_prompts": self.limits.incomplete_prompts}
        del out["quality"]["cache"]  # where judgements are kept decides none of them
        out["judge_model"] = self.judge_model.model_dump(mode="json")
        for source in out["sources"]:
            source["path"] = str(PurePosixPath(source["path"]))
        return out
