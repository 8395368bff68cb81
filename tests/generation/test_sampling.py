from __future__ import annotations

import math

import pytest
import torch

from manylora.errors import ConfigError
from manylora.generation.sampling import Sampling, draw, row_generators


def kept(sampling: Sampling, probabilities: list[float]) -> list[int]:
    scores = sampling.log_probabilities(torch.tensor([probabilities]).log())
    return scores.isfinite()[0].nonzero().squeeze(1).tolist()


def test_top_k_keeps_the_likeliest():
    assert kept(Sampling(1.0, top_k=2), [0.1, 0.4, 0.2, 0.3]) == [1, 3]
    assert kept(Sampling(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]) == [0, 1, 2, 3]


def test_top_p_keeps_the_fewest_that_reach_it_and_always_one():
    assert kept(Sampling(1.0, top_p=0.65), [0.1, 0.4, 0.2, 0.3]) == [1, 3]
    assert kept(Sampling(1.0, top_p=0.75), [0.1, 0.4, 0.2, 0.3]) == [1, 2, 3]
    assert kept(Sampling(1.0, top_p=1e-6), [0.1, 0.4, 0.2, 0.3]) == [1]


def test_top_p_counts_what_top_k_left():
    assert kept(Sampling(1.0, top_k=2, top_p=0.6), [0.1, 0.4, 0.2, 0.3]) == [1, 3]
    assert kept(Sampling(1.0, top_k=2, top_p=0.55), [0.1, 0.4, 0.2, 0.3]) == [1]


def test_temperature_zero_is_greedy_and_leaves_the_stream_alone():
    (generator,) = row_generators([3])
    before = generator.get_state()
    assert Sampling().choose(torch.tensor([[0.0, 2.0, 1.0]]), [generator]).tolist() == [1]
    assert torch.equal(generator.get_state(), before)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([[0.5, 0.0, 0.125, 0.375]])
    (generator,) = row_generators([0])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(probabilities.log(), [generator])] += 1
    assert counts[1] == 0
    assert torch.allclose(counts / 4000, probabilities[0], atol=0.03)


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([[0.0, math.log(4.0)]])
    assert Sampling(0.5).log_probabilities(logits).exp()[0, 1].item() == pytest.approx(16 / 17)
    assert Sampling(2.0).log_probabilities(logits).exp()[0, 1].item() == pytest.approx(2 / 3)


def test_half_precision_logits_are_sampled_in_float32():
    assert Sampling(0.7).log_probabilities(torch.zeros(1, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
