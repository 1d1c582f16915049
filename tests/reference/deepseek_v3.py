"""DeepSeek-V3 (arXiv:2412.19437) read off the page: one token at a time, one head at a time, in float64.

Slow on purpose. `weights` are the public names (`model.layers.0.self_attn.q_proj.weight`, ..), whole matrices
that map a column vector; `c` is a dict with the fields of the public config.json.
"""

import math

import torch

from tests.reference.gate import gate_one_token


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def swiglu(x, w, prefix):
    gate = w[f"{prefix}.gate_proj.weight"] @ x
    return w[f"{prefix}.down_proj.weight"] @ (
        gate * torch.sigmoid(gate) * (w[f"{prefix}.up_proj.weight"] @ x)
    )


def frequencies(c):
    """Angle a position of each rotary pair, stretched by YaRN (arXiv:2309.00071, Sec. 3.2) where asked."""
    r, yarn = c["qk_rope_head_dim"], c.get("rope_scaling")
    out = []
    for i in range(r // 2):
        f = c["rope_theta"] ** (-2 * i / r)
        if yarn:
            # DeepSeek's ramp runs over the pair's number, between the pairs that turn beta_fast and
            # beta_slow times in the original context.
            def pair(turns):
                context = yarn["original_max_position_embeddings"]
                return r * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(c["rope_theta"]))

            low = max(math.floor(pair(yarn["beta_fast"])), 0)
            high = min(math.ceil(pair(yarn["beta_slow"])), r - 1)
            slow = min(max((i - low) / max(high - low, 1e-3), 0), 1)
            f = slow * f / yarn["factor"] + (1 - slow) * f
        out.append(f)
    return out


def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rotate(x, position, c):
    """RoPE of `x` (r); pairs are neighbours, or halves apart."""
    r, out = len(x), x.clone()
    yarn = c.get("rope_scaling")
    length = 1.0
    if yarn:
        length = mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"])
    for i, f in enumerate(frequencies(c)):
        a, b = (2 * i, 2 * i + 1) if c["rope_interleave"] else (i, i + r // 2)
        cos, sin = length * math.cos(position * f), length * math.sin(position * f)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


def attention(xs, w, p, c):
    """MLA (Eq. 1 to 11) over the states `xs` of one sequence."""
    heads, n, r, v = (
        c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    scale = (n + r) ** -0.5
    yarn = c.get("rope_scaling")
    if yarn and yarn["mscale_all_dim"]:
        scale *= mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    keys, values, outs = [], [], []
    for t, x in enumerate(xs):
        down = w[f"{p}.kv_a_proj_with_mqa.weight"] @ x
        latent = norm(down[: c["kv_lora_rank"]], w[f"{p}.kv_a_layernorm.weight"], 1e-6)  # Eq. 1
        shared = rotate(down[c["kv_lora_rank"] :], t, c)  # Eq. 3
        up = (w[f"{p}.kv_b_proj.weight"] @ latent).view(heads, n + v)  # Eq. 2, 5
        keys.append([torch.cat([up[h, :n], shared]) for h in range(heads)])  # Eq. 4
        values.append([up[h, n:] for h in range(heads)])
        if c["q_lora_rank"] is None:
            q = w[f"{p}.q_proj.weight"] @ x
        else:
            low = norm(w[f"{p}.q_a_proj.weight"] @ x, w[f"{p}.q_a_layernorm.weight"], 1e-6)  # Eq. 6
            q = w[f"{p}.q_b_proj.weight"] @ low  # Eq. 7, 8
        out = []
        for h, qh in enumerate(q.view(heads, n + r)):
            query = torch.cat([qh[:n], rotate(qh[n:], t, c)])  # Eq. 9
            scores = torch.stack([scale * (query @ keys[j][h]) for j in range(t + 1)])
            out.append(sum(a * values[j][h] for j, a in enumerate(scores.softmax(0))))  # Eq. 10
        outs.append(w[f"{p}.o_proj.weight"] @ torch.cat(out))  # Eq. 11
    return outs


def moe(x, w, p, c):
    """DeepSeekMoE (Eq. 12 to 16) for one token."""
    gates = gate_one_token(
        x.tolist(),
        w[f"{p}.gate.weight"].tolist(),
        w[f"{p}.gate.e_score_correction_bias"].tolist(),
        k=c["num_experts_per_tok"],
        groups=c["n_group"],
        topk_group=c["topk_group"],
        scale=c["routed_scaling_factor"],
        normalize=c["norm_topk_prob"],
    )
    routed = sum(g * swiglu(x, w, f"{p}.experts.{i}") for i, g in gates.items())
    return swiglu(x, w, f"{p}.shared_experts") + routed


def layer(xs, w, i, c):
    """One decoder layer over a sequence's states."""
    p, eps = f"model.layers.{i}", c["rms_norm_eps"]
    normed = [norm(x, w[f"{p}.input_layernorm.weight"], eps) for x in xs]
    xs = [x + a for x, a in zip(xs, attention(normed, w, f"{p}.self_attn", c), strict=True)]
    out = []
    for x in xs:
        u = norm(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        dense = i < c["first_k_dense_replace"]
        out.append(x + (swiglu(u, w, f"{p}.mlp") if dense else moe(u, w, f"{p}.mlp", c)))
    return out


def forward(tokens, w, c):
    """Logits (s vocab) of one sequence, and those of each MTP module (s - k, vocab), Eq. 21 to 23."""
    embedding, eps = w["model.embed_tokens.weight"], c["rms_norm_eps"]
    head = embedding if c["tie_word_embeddings"] else w["lm_head.weight"]
    xs = [embedding[t] for t in tokens]
    for i in range(c["num_hidden_layers"]):
        xs = layer(xs, w, i, c)
    xs = [norm(x, w["model.norm.weight"], eps) for x in xs]
    logits = torch.stack([head @ x for x in xs])
    ahead = []
    for k in range(1, c["num_nextn_predict_layers"] + 1):
        p = f"model.layers.{c['num_hidden_layers'] + k - 1}"
        states = []
        for i in range(len(tokens) - k):
            e = norm(embedding[tokens[i + k]], w[f"{p}.enorm.weight"], eps)
            h = norm(xs[i], w[f"{p}.hnorm.weight"], eps)
            states.append(w[f"{p}.eh_proj.weight"] @ torch.cat([e, h]))
        states = layer(states, w, c["num_hidden_layers"] + k - 1, c)
        xs = [norm(x, w[f"{p}.shared_head.norm.weight"], eps) for x in states]
        ahead.append(torch.stack([head @ x for x in xs]))
    return logits, ahead
