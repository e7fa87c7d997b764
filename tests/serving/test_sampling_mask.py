from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from tasks.serving import sampling_mask
from tasks.serving.sampling_mask import read_mask

# Answers of SGLang 0.5.23 with SmolLM2-135M-Instruct (bf16, pytorch backend) to input_ids [1, 200, 300, 400, 500, 600],
# with deterministic inference unless said otherwise; the fields that have no part in it are left out.
TOP_K_3 = json.loads("""{"id": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "finish_reason": {"type": "length", "length": 4},
 "output_token_logprobs": [[-2.377377986907959, 344, null], [-2.251431941986084, 376, null],
  [-2.2819442749023438, 30, null], [-1.714706540107727, 198, null]], "output_token_logprobs_length": 4,
 "output_token_sampling_mask": [[6430, 99, 344], [376, 366, 198], [30, 28, 198], [198, 824, 669]],
 "output_token_sampling_logprobs": [-1.369338035583496, -0.6689178347587585, -0.9026339054107666, -0.5131808519363403],
 "output_token_sampling_mask_length": 4, "completion_tokens": 4}""")
TOP_K_2 = json.loads("""{"output_token_logprobs": [[-1.8773781061172485, 6430, null], [-1.6723614931106567, 30, null],
  [-1.480945110321045, 198, null], [-0.6394050717353821, 198, null]],
 "output_token_sampling_mask": [[6430, 99], [30, 28], [198, 339], [198, 504]],
 "output_token_sampling_logprobs": [-0.5759393572807312, -0.5759394764900208, -0.38687098026275635,
  -0.05488216504454613], "output_token_sampling_mask_length": 4, "completion_tokens": 4}""")
GREEDY = json.loads("""{"output_token_logprobs": [[-1.8773781061172485, 6430, null], [-1.6723614931106567, 30, null],
  [-1.480945110321045, 198, null], [-0.6394050717353821, 198, null]],
 "output_token_sampling_mask": [[6430], [30], [198], [198]], "output_token_sampling_logprobs": [0.0, 0.0, 0.0, 0.0],
 "output_token_sampling_mask_length": 4, "completion_tokens": 4}""")
# top_k 20 and min_p 0.1, without deterministic inference: kept sets of another size at each step
WITH_MIN_P = json.loads("""{"output_token_logprobs": [[-3.327744245529175, 749, null], [-4.606454372406006, 535, null],
  [-3.5056495666503906, 288, null], [-1.6730326414108276, 260, null]],
 "output_token_sampling_mask": [[6430, 99, 344, 18174, 81, 749, 316, 960, 663, 23, 1415],
  [257, 98, 309, 89, 524, 254, 92, 366, 99, 277, 30, 358, 269, 535], [30, 282, 28, 198, 42, 288, 338, 314, 281], [260]],
 "output_token_sampling_logprobs": [-2.781015157699585, -3.8910536766052246, -2.7345945835113525, 0.0],
 "output_token_sampling_mask_length": 4, "completion_tokens": 4}""")
# top_k 5 without return_logprob, so that the sampled ids are not in it
ALONE = json.loads("""{"output_token_sampling_mask": [[6430, 99, 344, 18174, 81], [28, 30, 980, 327, 282],
  [527, 837, 253, 564, 260], [2518, 314, 1530, 416, 436]], "output_token_sampling_logprobs": [-2.1117639541625977,
  -1.239381194114685, -0.5971570611000061, -1.0024209022521973], "output_token_sampling_mask_length": 4,
 "completion_tokens": 4}""")
# sampling_logprobs_mode "support", which nothing here asks for
OTHER_MODE = json.loads("""{"output_token_sampling_mask": [[350, 254, 318], [276, 1555, 5018]],
 "output_token_sampling_logprobs": [[-0.978813886642456, -1.103813886642456, -1.228813886642456],
  [-0.6098991632461548, -1.3598991632461548, -1.6098991632461548]], "output_token_sampling_mask_length": 2,
 "completion_tokens": 2}""")


@pytest.mark.parametrize(("meta", "sizes"), [
    (TOP_K_3, [3, 3, 3, 3]), (TOP_K_2, [2, 2, 2, 2]), (GREEDY, [1, 1, 1, 1]), (WITH_MIN_P, [11, 14, 9, 1]),
    (ALONE, [5, 5, 5, 5]),
])
def test_what_a_server_gave_is_read_as_it_is(meta, sizes):
    masks, logprobs = read_mask(meta)
    assert [len(kept) for kept in masks] == sizes
    assert masks == meta["output_token_sampling_mask"]
    assert logprobs == meta["output_token_sampling_logprobs"]


def test_the_behaviour_is_what_is_left_of_the_distribution_after_the_cut():
    """Two tokens were kept: the full probability of the one that was drawn, over the mass of both, is the behaviour's."""
    _, logprobs = read_mask(TOP_K_2)
    assert logprobs is not None
    full = [entry[0] for entry in TOP_K_2["output_token_logprobs"]]
    kept_mass = [math.exp(f - b) for f, b in zip(full, logprobs, strict=True)]
    assert all(math.exp(f) < mass < 1 for f, mass in zip(full, kept_mass, strict=True))
    _, alone = read_mask(GREEDY)
    assert alone == [0.0] * 4  # greedy draws with certainty, whatever the distribution


def test_a_server_that_gives_no_logprobs_gives_the_mask_still():
    meta = {k: v for k, v in TOP_K_3.items() if k != "output_token_sampling_logprobs"}
    assert read_mask(meta) == (TOP_K_3["output_token_sampling_mask"], None)


def spoilt(path: list[Any], value: Any) -> dict[str, Any]:
    meta = copy.deepcopy(TOP_K_3)
    place = meta
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return meta


MASK, LOGPROBS = "output_token_sampling_mask", "output_token_sampling_logprobs"


@pytest.mark.parametrize(("path", "value", "said"), [
    ([MASK], None, "return_sampling_mask"), ([MASK], {}, "not a list"), ([MASK, 1], None, "step 1 is not a list"),
    ([MASK, 1], [], "step 1 is not a list"), ([MASK, 1], [376, "366"], "step 1 is not a list"), ([MASK, 1], [376, -1], "step 1 is not a list"),
    ([MASK, 1], [376, True], "step 1 is not a list"), ([MASK, 1], [376, 1.0], "step 1 is not a list"), ([MASK, 1], [376, 376], "twice"),
    ([MASK, 2], [28, 198], "sampled 30"), ([MASK], TOP_K_3[MASK][:3], "3 sampling masks"),
    (["output_token_sampling_mask_length"], 5, "length is 5"), (["completion_tokens"], 3, "completion_tokens is 3"),
    (["output_token_logprobs"], TOP_K_3["output_token_logprobs"][:3], "3 output tokens"),
    (["output_token_logprobs", 0], None, "logprob, id, text"), ([LOGPROBS], "abcd", "numbers"),
    ([LOGPROBS], [-1.0] * 3, "3 log-probabilities"), ([LOGPROBS, 0], None, "numbers"),
    ([LOGPROBS, 0], math.nan, "no log-probability"), ([LOGPROBS, 0], -math.inf, "no log-probability"),
    ([LOGPROBS, 0], 0.1, "no log-probability"),
])
def test_a_mask_that_contradicts_itself_is_refused(path, value, said):
    with pytest.raises(ValueError, match=said):
        read_mask(spoilt(path, value))


def test_the_distribution_over_the_whole_support_is_not_mistaken_for_the_sampled_tokens():
    with pytest.raises(ValueError, match="selected"):
        read_mask(OTHER_MODE)


def test_the_limits_are_those_of_the_server_refusals():
    assert (sampling_mask.GREEDY_TOP_K, sampling_mask.SMALLEST_TOP_K, sampling_mask.LARGEST_TOP_K) == (1, 2, 4096)
