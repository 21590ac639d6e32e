from __future__ import annotations

import numpy as np
import pytest
import torch

from efficientclip.data.store import edges
from efficientclip.noise.answers import ROUNDING, TESTIMONY, answers, null_captions


def unit(random: np.random.Generator, rows: int, width: int = 8) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(random.standard_normal((rows, width))).float(), dim=1)


@pytest.mark.parametrize("most_witnesses", [3, 5, 1024])
def test_p_is_the_share_of_other_captions_that_fit_better(monkeypatch: pytest.MonkeyPatch, most_witnesses: int) -> None:
    monkeypatch.setattr("efficientclip.noise.answers.MOST_WITNESSES", most_witnesses)
    random = np.random.default_rng(0)
    text, image = unit(random, 30), unit(random, 12)
    text[7] = text[8]  # equal scores
    pairs = sorted({(int(random.integers(30)), int(random.integers(12))) for _ in range(90)})
    captions, images = np.array(pairs).T
    captions[:2], images[:2] = [7, 8], [3, 3]
    other_links = [(1, 3), (2, 5)]
    left, right = np.array([*zip(captions, images, strict=True), *other_links]).T
    null, ties = null_captions(captions, seed=0), (edges(right, left, 12), edges(left, right, 30))
    found = answers(text.numpy(), image.numpy(), captions, images, *ties, null)
    linked = list(zip(left.tolist(), right.tolist(), strict=True))

    def told(own: torch.Tensor, others: list[torch.Tensor], tied: int) -> torch.Tensor:
        weight = TESTIMONY / (len(others) + 1) if tied <= most_witnesses else 0.0
        together = own + weight * sum(others, torch.zeros(8))
        return together / together.norm()

    def meant(caption: int, without: int | None) -> torch.Tensor:
        every = sorted(picture for k, picture in linked if k == caption)
        rest = [image[picture] for picture in every if picture != (every[0] if without is None else without)]
        return told(text[caption], rest, len(every) - (without is None))

    for row, (caption, picture) in enumerate(zip(captions.tolist(), images.tolist(), strict=True)):
        every = [k for k, other in linked if other == picture]
        shown = told(image[picture], [text[k] for k in every if k != caption], len(every))
        rest = [k for k in captions.tolist() if (k, picture) not in linked]
        by_words = [float(text[k] @ shown) for k in rest], float(text[caption] @ shown)
        by_both = [float(meant(k, None) @ shown) for k in rest], float(meant(caption, picture) @ shown)
        alone = left.tolist().count(caption) == 1
        assert found.cosine[row] == pytest.approx(float(text[caption] @ image[picture]), abs=1e-6)
        for p, (scores, own) in ((found.p, by_words), (found.p_with_pictures, by_words if alone else by_both)):
            above = sum(np.clip(0.5 + (score - own) / (2 * ROUNDING), 0, 1) for score in scores)
            assert p[row] == pytest.approx((above + 0.5) / (len(scores) + 1), abs=1e-3)


def test_p_of_random_pairs_is_uniform_however_the_tower_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    text, image = unit(random, 400, 4), unit(random, 300, 4)
    # Captions of unequal frequency and a tower that likes some captions everywhere.
    text[:40] = torch.nn.functional.normalize(text[:40] * 0.3 + image.mean(0), dim=1)
    popularity = random.dirichlet(np.full(400, 0.3))
    for sampled in (False, True):
        monkeypatch.setattr("efficientclip.noise.answers.NULL_CAPTIONS", 150 if sampled else 4096)
        captions, images = random.choice(400, 6000, p=popularity), random.integers(0, 300, 6000)
        captions, images = np.unique([captions, images], axis=1)
        null, ties = null_captions(captions, seed=0), (edges(images, captions, 300), edges(captions, images, 400))
        found = answers(text.numpy(), image.numpy(), captions, images, *ties, null)
        for p in (found.p, found.p_with_pictures):
            shares = np.histogram(p, 10, (0, 1))[0] / len(p)
            assert p.mean() == pytest.approx(0.5, abs=0.02)
            assert np.abs(shares - 0.1).max() < 0.02


def test_a_captions_other_pictures_tell_what_its_words_do_not() -> None:
    """A tower that knows no caption, and pictures of 20 subjects: a caption's other pictures still tell a wrong one."""
    random = np.random.default_rng(2)
    subject = unit(random, 20, 16)
    images, pictures = np.repeat(np.arange(200), 2), np.arange(200) % 20
    image = torch.nn.functional.normalize(subject[pictures] + 0.1 * unit(random, 200, 16), dim=1)
    captions, wrong = np.stack([pictures, 20 + pictures], 1).ravel(), random.random(400) < 0.2
    captions[wrong] = random.integers(0, 40, wrong.sum())
    text, ties = unit(random, 40, 16), (edges(images, captions, 200), edges(captions, images, 40))
    found = answers(text.numpy(), image.numpy(), captions, images, *ties, null_captions(captions, seed=0))
    right = ~wrong
    assert found.p[right].mean() > 0.3 and found.p_with_pictures[right].mean() < 0.1
    assert found.p_with_pictures[wrong].mean() > 0.35
