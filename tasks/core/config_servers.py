"""The config of servers: what one must be (`Settings`), how one is started (`Launch`), which there are."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.core.section import Flags, Section, words

DTYPES = {"float32": ("float", "fp32", "f32"), "bfloat16": ("bf16",), "float16": ("half", "fp16", "f16")}
"""Number formats, each with its other names."""
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], words(**DTYPES)]
Algorithm = Annotated[
    Literal["off", "ngram", "eagle", "eagle3", "nextn", "standalone"],
    words(off=("none", "no", "disable", "disabled", False, None), ngram=("n-gram",), nextn=("mtp",))]
"""YAML reads a bare `off` as False."""
# SGLang 0.5.23's own: it guesses draft_tokens // max_breadth tokens in a row
_NGRAM_TOKENS, _NGRAM_BREADTH = 12, 10


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Speculation(Section):
    """Speculative decoding of a generator: `off`, or an algorithm and its settings."""

    algorithm: Algorithm = "off"
    """off, ngram (guesses from what was written before), eagle, eagle3, nextn (the model's own extra layers) or
    standalone (a smaller model guesses)."""
    draft_model: str | None = None
    """Folder or hub id of the model that guesses (eagle, eagle3, standalone)."""
    draft_revision: str | None = None
    """Commit of a hub draft model."""
    steps: int | None = Field(default=None, ge=1, le=64)
    """Tokens guessed in a row; given together with topk and draft_tokens (eagle, eagle3, nextn, standalone)."""
    topk: int | None = Field(default=None, ge=1, le=64)
    """Branches of a guess at each step."""
    draft_tokens: int | None = Field(default=None, ge=1, le=256)
    """Guessed tokens that are checked at once."""
    min_breadth: int | None = Field(default=None, ge=1)
    """Fewest branches of a guess (ngram); 1 where only max_breadth is given."""
    max_breadth: int | None = Field(default=None, ge=1)
    """Most branches of a guess (ngram); at least min_breadth."""

    @model_validator(mode="before")
    @classmethod
    def _plain_word(cls, value: Any) -> Any:
        return value if isinstance(value, (dict, Speculation)) else {"algorithm": value}

    @model_validator(mode="after")
    def _together(self) -> Speculation:
        drafted, tree = ("draft_model", "draft_revision"), ("steps", "topk", "draft_tokens")
        breadth = ("min_breadth", "max_breadth")
        refused = {"off": (*drafted, *tree, *breadth), "ngram": (*drafted, "steps", "topk"),
                   "nextn": breadth}.get(self.algorithm, breadth)
        if given := [name for name in refused if getattr(self, name) is not None]:
            raise ValueError(f"{', '.join(given)}: {'is' if len(given) == 1 else 'are'} of no use with algorithm "
                             f"{self.algorithm}; drop {'it' if len(given) == 1 else 'them'}")
        if self.algorithm in ("eagle", "eagle3", "standalone") and not self.draft_model:
            raise ValueError(f"algorithm {self.algorithm} needs draft_model, the model that guesses")
        if self.draft_revision and not self.draft_model:
            raise ValueError("draft_revision needs draft_model")
        missing = [name for name in tree if getattr(self, name) is None]
        if self.algorithm not in ("off", "ngram") and 0 < len(missing) < len(tree):
            raise ValueError(f"steps, topk and draft_tokens belong together; {' and '.join(missing)} "
                             f"{'is' if len(missing) == 1 else 'are'} missing (or give none: SGLang then chooses)")
        guessed, widest = self.draft_tokens or _NGRAM_TOKENS, self.max_breadth or _NGRAM_BREADTH
        if self.algorithm == "ngram" and guessed < widest:
            raise ValueError(f"draft_tokens ({guessed}) is below max_breadth ({widest}): nothing would be guessed")
        if self.min_breadth and self.max_breadth and self.min_breadth > self.max_breadth:
            raise ValueError(f"min_breadth ({self.min_breadth}) is above max_breadth ({self.max_breadth})")
        return self

    @property
    def on(self) -> bool:
        """Whether anything is guessed."""
        return self.algorithm != "off"


class Settings(Section):
    """What a server must be. What is not given is left to SGLang, and a server that was told otherwise is another."""

    model: str | None = None
    """Folder or hub id that it serves; the role's model where not given."""
    dtype: Dtype = "auto"
    """Number format of weights and activations."""
    deterministic: bool = True
    """Honour a seed per request (--enable-deterministic-inference)."""
    custom_processors: bool = True
    """Allow custom logit processors, which most heuristics need. They let a client run code on the
    server, so a public address needs allow_public as well."""
    context_length: int | None = Field(default=None, ge=16)
    """Longest sequence in tokens; the role's (generation.ROLE.context_length), else the model's own, where not
    given."""
    sampling_backend: Annotated[Literal["pytorch", "flashinfer"], words()] = "pytorch"
    """Which kernels sample; `pytorch` honours seeds and has one top_k/top_p dialect."""
    speculation: Speculation = Speculation()
    """Speculative decoding, `off` or a mapping. It ignores custom logit processors and min_p, so it goes with
    temperatures and single native cuts alone."""
    mask_limit: int | None = Field(default=None, ge=2, le=1_000_000)
    """Most token ids of a step's sampling mask (--sampling-mask-max-tokens); SGLang's own where not given."""
    flags: Flags = {}
    """More SGLang flags, by their long names without dashes in front: {tp-size: 2}."""

    @model_validator(mode="after")
    def _one_sampler(self) -> Settings:
        if self.deterministic and self.sampling_backend != "pytorch":
            raise ValueError(f"sampling_backend {self.sampling_backend}: SGLang samples with pytorch where it honours "
                             "seeds; say deterministic: false, or leave sampling_backend out")
        return self


class Launch(Settings):
    """An SGLang server that the run starts and stops."""

    device: Annotated[Literal["cuda", "cpu"], words(cuda=("gpu",))] = "cuda"
    """`cuda`: one server per GPU listed; `cpu`: one server on the CPU."""
    gpus: list[int] = [0]
    """GPUs to use, one server each (device: cuda)."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """First port; a free one where not given."""
    allow_public: bool = False
    """Yes, listen on a public address although custom processors are on."""
    mem_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the device's memory for weights and cache (--mem-fraction-static)."""
    max_total_tokens: int | None = Field(default=None, ge=256)
    """Tokens in the cache; as much as fits where not given."""
    threads: int = Field(default=1, ge=1)
    """OpenMP threads (device: cpu); on a machine with other work, one is faster than two."""
    python: str | None = None
    """Interpreter of the environment that has SGLang; looked up where not given."""
    ready_timeout_s: float = Field(default=600, gt=0)
    """Seconds until a server must answer."""

    @model_validator(mode="after")
    def _private(self) -> Launch:
        if self.custom_processors and not self.allow_public and not is_loopback(self.host):
            raise ValueError(f"host {self.host} is not loopback, and custom logit processors let every client run "
                             "code on the server; say allow_public: true if that is meant, or use 127.0.0.1")
        if self.device == "cpu" and self.speculation.on:
            raise ValueError("speculation needs a GPU: SGLang has no kernels for it here on a CPU")
        return self


class ServerConfig(Section):
    """One server: someone runs it (`url`) or we do (`launch`)."""

    url: str | None = Field(default=None, pattern=r"^https?://[^\s/@]+(/.*)?$")
    """Address of a running SGLang server, such as http://10.0.0.1:30000."""
    expect: Settings = Settings()
    """What the server behind `url` must be; one that is not is refused, with the difference shown."""
    launch: Launch | None = None
    """Start one (or one per GPU) with these settings, stop it at the end."""
    max_in_flight: int | None = Field(default=None, ge=1, le=4096)
    """Most requests in flight at this server; found out while running where not given."""

    @model_validator(mode="after")
    def _one_way(self) -> ServerConfig:
        if (self.url is None) == (self.launch is None):
            raise ValueError("give either url (a server that runs) or launch (one to start), not both or none")
        if self.launch and "expect" in self.model_fields_set and self.expect != Settings():
            raise ValueError("expect is for a url; what a launched server shall be stands in launch")
        return self

    @property
    def settings(self) -> Settings:
        """What it must be, whoever runs it."""
        return self.launch or self.expect


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

    @model_validator(mode="after")
    def _judges_guess_nothing(self) -> Servers:
        for n, server in enumerate(self.judge):
            if server.settings.speculation.on:
                raise ValueError(f"judge.{n}: speculation is for generators; a judge's verdict is one token")
        return self
