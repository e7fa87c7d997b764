"""Every table the pipeline writes, in one place: Arrow schemas whose fields say unit and source.

Missing is null, never 0, -999 or NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
PROCESSOR = pa.struct([
    pa.field("name", pa.string()), pa.field("value", pa.float64()), pa.field("min_tokens_to_keep", pa.int32()),
])


def _field(name: str, kind: pa.DataType, about: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": about})


def _key(name: str, about: str) -> pa.Field:
    return _field(name, pa.string(), about, nullable=False)


PROMPTS = pa.schema([
    _key("prompt_id", "digest of source name and canonical row"),
    _key("source", "name of the source in the config"),
    _field("messages", pa.list_(MESSAGE), "chat messages as rendered, system prompt included"),
    _field("prompt", pa.string(), "text of the last user message"),
    _field("prompt_ids", pa.list_(pa.int32()), "token ids sent, chat template applied"),
    _field("ground_truth", pa.string(), "what the verifier compares with; null without a verifier"),
    _field("verifier", pa.string(), "verifier's name; null where correctness is not checked"),
    _field("diversity", pa.bool_(), "whether diversity is labelled"),
    _field("copies", pa.int32(), "equal rows folded into this one"),
    _field("origin", pa.string(), "file and line (or row) of the first copy"),
])

CANDIDATES = pa.schema([
    _key("candidate_id", "digest of prompt, heuristic, seed, model, revision and generation config"),
    _key("prompt_id", "prompt asked"),
    _key("heuristic_id", "digest of the ordered processors with their parameters"),
    _field("seed", pa.int64(), "seed's label in the grid", nullable=False),
    _field("source", pa.string(), "name of the prompt's source"),
    _field("prompt_ids", pa.list_(pa.int32()), "token ids sent"),
    _field("output_ids", pa.list_(pa.int32()), "token ids received, the stop token included"),
    _field("text", pa.string(), "output_ids decoded, special tokens left out"),
    _field("output_logprobs", pa.list_(pa.float32()),
           "log-probability (nats) of each output id as the server reports it: after temperature and custom "
           "processors, before native top_k, top_p and min_p"),
    _field("kept_ids", pa.list_(pa.list_(pa.int32())),
           "per output id, the ids that the engine's truncation kept, likeliest first; null: not recorded"),
    _field("kept_logprobs", pa.list_(pa.float32()),
           "log-probability (nats) of each output id among kept_ids, as it was drawn: after temperature, renormalised; "
           "null: not recorded"),
    _field("finish_reason", pa.string(), "stop, length or abort, from the server"),
    _field("status", pa.string(), "ok, or a typed failure", nullable=False),
    _field("error", pa.string(), "the failure's text"),
    _field("attempts", pa.int32(), "times the request was sent"),
    _field("server", pa.string(), "address that answered last"),
    _field("model", pa.string(), "model that was asked for"),
    _field("latency_s", pa.float64(), "seconds from sending to the last answer's end, last attempt"),
    _field("request_seed", pa.int64(), "sampling seed sent, its own for every request"),
    _field("seed_effective", pa.bool_(), "whether the server honours a seed per request"),
    _field("dialect", pa.string(), "how top_k and top_p combine where the row was sampled: joint (native) or "
                                   "sequential (custom processor, each step renormalised)"),
    _field("sampling_params", pa.string(), "JSON of the sampling parameters as sent"),
    _field("completion_tokens", pa.int32(), "output tokens"),
])

VERIFIED = pa.schema([*CANDIDATES, _field("usable", pa.bool_(), "status ok and the prompt kept by policy",
                                          nullable=False)])

COMPARISONS = pa.schema([
    _key("prompt_id", "group: prompt"),
    _field("seed", pa.int64(), "group: seed", nullable=False),
    _field("round", pa.int32(), "round of the tournament, from 0"),
    _key("a", "candidate_id of the first player"),
    _key("b", "candidate_id of the second player"),
    _field("p_first", pa.float64(), "probability of the first shown when a was shown first; null: abstained"),
    _field("p_second", pa.float64(), "probability of a when b was shown first; null: abstained"),
    _field("outcome", pa.float64(), "a's share of the win: the logistic of the mean log-odds of p_first and p_second, "
                                    "in which a preference for a place cancels; null: abstained"),
    _field("outside", pa.float64(), "mean probability of tokens that are no verdict"),
    _field("reason", pa.string(), "why the judge abstained"),
    _field("judge", pa.string(), "the judge's model"),
    _field("template", pa.string(), "digest of the judge template"),
])

QUALITY = pa.schema([
    _key("candidate_id", "candidate rated"),
    _field("rating", pa.float64(), "Bradley-Terry strength in logits, mean 0 over the distinct texts of its (prompt, "
                                   "seed)"),
    _field("rating_se", pa.float64(), "standard error of rating in logits: the root mean square distance of the true "
                                      "one, with what is unknown of the prior (the Hessian's by a given prior_sd)"),
    _field("comparisons", pa.int32(), "judged pairs the candidate's text was in"),
    _field("rating_flags", pa.string(), "why rating leans on its prior: disconnected (the comparisons fall apart), "
                                        "separated (some players never lost to the rest), not_converged; null: none"),
    _field("player", pa.string(), "candidate_id that stands for all equal texts of the group"),
    _field("settled", pa.bool_(), "whether the group's tournament reached its aim (quality.confidence or "
                                  "quality.reliability); null: nothing to settle"),
    _field("reliability", pa.float64(), "share of the variance of the group's true ratings that its ratings explain, "
                                        "as the fit estimates it; equal in a group"),
    _field("prior_sd", pa.float64(), "standard deviation (logits) of the prior in the group's fit"),
    _field("dispersion", pa.float64(), "variance of the group's outcomes around the fit, 1 for coin tosses; each "
                                       "comparison has the weight 1 / dispersion"),
    _field("rm_score", pa.float64(), "scalar of the pointwise reward model, as its server gives it"),
    _field("rm_reason", pa.string(), "why there is no rm_score"),
])

DIVERSITY = pa.schema([
    _key("candidate_id", "candidate in the (prompt, heuristic) group"),
    _field("self_bleu", pa.float64(), "mean sentence BLEU (0-100) of each seed's text against the others; "
                                      "null below two texts"),
    _field("embedding_entropy", pa.float64(), "von Neumann entropy (nats) of the texts' embeddings; null below "
                                              "two texts"),
    _field("diversity_texts", pa.int32(), "texts in the group"),
])

VERDICTS = pa.schema([
    _key("candidate_id", "candidate checked"),
    _field("reward", pa.float64(), "1 right, 0 wrong (IFEval: strict); null: no verdict"),
    _field("reward_loose", pa.float64(), "IFEval's loose verdict"),
    _field("extracted", pa.string(), "what was taken as the answer"),
    _field("verdict_reason", pa.string(), "why there is no verdict, or how it was reached"),
])

SCORES = pa.schema([
    _key("candidate_id", "candidate scored"),
    _key("prompt_id", "group: prompt"),
    _field("seed", pa.int64(), "group: seed", nullable=False),
    _field("z_quality", pa.float64(), "z-score over the run of rating or, by method pointwise, of rm_score less its "
                                      "mean in the (prompt, seed)"),
    _field("z_diversity", pa.float64(), "mean z-score of embedding_entropy and -self_bleu over the run"),
    _field("z_correctness", pa.float64(), "z-score of reward over the run"),
    _field("score", pa.float64(), "weighted mean of the z-scores there are"),
    _field("rank", pa.int32(), "place in the group, 1 is best; ties by candidate_id"),
    _field("kept", pa.bool_(), "in the dataset", nullable=False),
    _field("dropped", pa.string(), "why not: unusable, incorrect, unlabelled, below_top_k"),
])

_FROM_CANDIDATES = ("candidate_id", "prompt_id", "heuristic_id", "seed", "source", "prompt_ids", "output_ids",
                    "text", "output_logprobs", "kept_ids", "kept_logprobs", "finish_reason", "model", "request_seed",
                    "seed_effective", "dialect", "sampling_params", "completion_tokens")

DATASET = pa.schema([
    *(CANDIDATES.field(name) for name in _FROM_CANDIDATES),
    PROMPTS.field("messages"), PROMPTS.field("prompt"), PROMPTS.field("ground_truth"),
    _field("heuristic", pa.string(), "the heuristic's name"),
    _field("processors", pa.list_(PROCESSOR), "the heuristic's processors in the order they were applied"),
    QUALITY.field("rating"), QUALITY.field("rating_se"), QUALITY.field("comparisons"), QUALITY.field("reliability"),
    QUALITY.field("rm_score"),
    DIVERSITY.field("self_bleu"), DIVERSITY.field("embedding_entropy"),
    VERDICTS.field("reward"),
    _field("corpus_coverage", pa.float64(), "share of the text found in a reference corpus; null: not labelled"),
    SCORES.field("score"), SCORES.field("rank"),
])


def table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`; a missing key is null, an unknown one an error."""
    rows = list(rows)
    known = set(schema.names)
    for row in rows:
        if unknown := set(row) - known:
            raise KeyError(f"columns not in the schema: {', '.join(sorted(unknown))}")
    return pa.Table.from_pylist(rows, schema=schema)


def with_signatures(schema: pa.Schema, signatures: Mapping[str, str]) -> pa.Schema:
    """`schema` with a metric signature (versions and settings) on the columns named."""
    fields = [f.with_metadata((f.metadata or {}) | {b"signature": signatures[f.name].encode()})
              if f.name in signatures else f for f in schema]
    return pa.schema(fields, metadata=schema.metadata)
