"""On a GPU: python -m pytest tests/gpu. The kernel that chooses tokens is Sampling.distribution and a race."""

import pytest
import torch

from lit_swa.generate import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.7),
    "top-k": Sampling(1.3, top_k=20),
    "top-k of 1": Sampling(0.8, top_k=1),
    "top-k of all": Sampling(0.8, top_k=10**6),
    "min-p": Sampling(1.0, min_p=0.2),
    "all": Sampling(1.5, top_k=50, min_p=0.05, repetition_penalty=1.3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [97, 8192, 40000])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_are_those_of_the_distribution(name, vocab_size, dtype):
    """Catches: a number that is left out among equal ones, as 16 bits have many; a row's noise at another row; logits
    that lie apart in memory; signs."""
    sampling, n = SAMPLINGS[name], torch.Generator("cuda").manual_seed(0)
    for shift in (0.0, -30.0, 30.0):  # all signs
        logits = torch.randn(64, vocab_size + 7, device="cuda", generator=n).mul(3).add(shift).to(dtype)[:, :vocab_size]
        seen = torch.rand(64, vocab_size, device="cuda", generator=n) < 0.3
        noise = torch.empty(64, vocab_size, device="cuda").exponential_(1, generator=n)
        token = sampling.choose(logits, None if sampling.temperature == 0 else noise, seen)
        race = sampling.distribution(logits, seen) / noise.where(torch.tensor(sampling.temperature > 0).cuda(), 1)
        won = race.gather(1, token) / race.amax(dim=1, keepdim=True)
        assert won.min().item() > 1 - 1e-5  # of two that are as good as equal, rounding decides


def test_what_is_no_number_chooses_a_token_of_the_vocabulary():
    """Catches: an id beyond the embedding, which ends the process before anybody can say what is wrong."""
    logits = torch.full((2, 100), torch.nan, device="cuda")
    for sampling, noise in ((Sampling(), None), (Sampling(1.0, top_k=5), torch.ones(2, 100, device="cuda"))):
        assert 0 <= sampling.choose(logits, noise).min() and sampling.choose(logits, noise).max() < 100
