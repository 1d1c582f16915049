"""DeepSeek-V3's gate (arXiv:2412.19437, Sec. 2.1.2) read off the page: one token, floats and loops."""

import math


def gate_one_token(u, weight, bias, *, k, groups, topk_group, scale, normalize=True):
    """Gate values of one token by expert id, {i: g_i}, from lists of floats (Eq. 12 to 16)."""
    s = [1 / (1 + math.exp(-sum(w * x for w, x in zip(row, u, strict=True)))) for row in weight]
    biased = [a + b for a, b in zip(s, bias, strict=True)]
    size = len(s) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    scores = [sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in members]
    allowed = sorted(range(groups), key=lambda g: -scores[g])[:topk_group]
    candidates = [i for g in allowed for i in members[g]]
    chosen = sorted(candidates, key=lambda i: -biased[i])[:k]
    total = sum(s[i] for i in chosen) if normalize else 1.0
    return {i: scale * s[i] / total for i in chosen}


def balance_loss_one_sequence(affinities, k):
    """Eq. 17 to 20 without alpha, for one sequence: `affinities` is a list of tokens' lists of s."""
    t, e = len(affinities), len(affinities[0])
    loss = 0.0
    for i in range(e):
        hits = sum(i in sorted(range(e), key=lambda j: -s[j])[:k] for s in affinities)
        share = sum(s[i] / sum(s) for s in affinities) / t
        loss += e / (k * t) * hits * share
    return loss
