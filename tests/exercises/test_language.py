"""A fifth embedded language with an exact floor."""
import math

import data

OLD = {"finance", "climate", "stories", "reviews"}


def test_there_is_one_more_language_and_its_floor_is_known():
    new = set(data.DOMAINS) - OLD
    assert new, "data.DOMAINS has no new language"
    for name in new:
        corpus = data.load(name, splits=("valid",))
        assert 5 < corpus.floor["valid"] < 30 and len(corpus.ids["valid"]) > 10_000
        words = [w for document, _ in data.embedded_documents(name, "valid")[:20] for w in document]
        assert all(math.isfinite(v) for v in data.language(name).nll(words))


def test_its_texts_are_its_own():
    for name in set(data.DOMAINS) - OLD:
        words = [w for document, _ in data.embedded_documents(name, "valid")[:100] for w in document]
        own = sum(data.language(name).nll(words)) / len(words)
        for other in OLD:
            assert sum(data.language(other).nll(words)) / len(words) > own + 0.3, other
    assert set(data.DOMAINS) - OLD
