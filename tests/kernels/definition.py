"""Native Sparse Attention written out from the formulas, one sequence and one head at a time, in float64.

Shares no code with the package. Loaded by the conftest of tests/kernels and of tests/gpu.
"""

from types import SimpleNamespace

import torch


def softmax_rows(logits, mask):
    """Softmax over visible entries; a row with none is zero."""
    logits = torch.where(mask, logits, torch.full_like(logits, -1e300))
    top = logits.max(-1, keepdim=True).values.detach() if logits.shape[-1] else logits.sum(-1, keepdim=True)
    e = torch.where(mask, (logits - top).clamp(min=-700).exp(), torch.zeros_like(logits))
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, torch.ones_like(total), total)


def phi(x, weight, position, block, stride, kind):
    """x [L, D] -> [N, D] for one head."""
    n = (x.shape[0] - block) // stride + 1 if x.shape[0] >= block else 0
    if n == 0:
        return x.new_zeros(0, x.shape[1])
    w = torch.stack([x[i * stride : i * stride + block] for i in range(n)]) + position
    if kind == "mean":
        return (w * weight[:, None]).sum(1)
    y = sum(w[:, s] @ weight[s] for s in range(block))
    return (0.5 * y * (1 + torch.erf(y / 2**0.5))) @ weight[block] if kind == "mlp" else y


def importance(p, c):
    """p [L, N] of one group -> [L, S]."""
    length, n = p.shape
    per, r = c.select_block // c.stride, c.block // c.stride
    s = torch.zeros(length, -(-length // c.select_block), dtype=p.dtype, device=p.device)
    for j in range(s.shape[1]):
        for m in range(per):
            for k in range(r):
                i = per * j + m - k
                if 0 <= i < n:
                    s[:, j] += p[:, i]
    return s


def choose(scores, c):
    """[L, S] -> list of sorted block lists."""
    chosen = []
    scores = scores.tolist()
    for t in range(len(scores)):
        own = t // c.select_block
        forced = {j for j in range(own + 1) if j < c.initial or j > own - c.local}
        rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[t][j], j))
        chosen.append(sorted(forced | set(rest[: c.count - len(forced)])))
    return chosen


def sparse_attention(q, kv_cmp, kv_slc, kv_win, gates, lengths, params, c, blocks=None):
    """Everything, packed. blocks: [T, Hkv, count] to attend to, None: chosen here.

    Returns out [T, Hq, Dv], the branches [3, T, Hq, Dv], the choice [T][Hkv] -> list, importance [T, Hkv] -> [S].
    """
    heads, kv_heads = q.shape[1], kv_cmp[0].shape[1]
    group = heads // kv_heads
    scale = c.scale or q.shape[-1] ** -0.5
    dv = kv_cmp[1].shape[2]
    out, choice, scores_all = [], [], []
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        start += n
        if n == 0:
            continue
        t = torch.arange(n, device=q.device)
        per_head = [[None] * heads for _ in range(3)]
        seq_choice = [[None] * kv_heads for _ in range(n)]
        seq_scores = [[None] * kv_heads for _ in range(n)]
        for h in range(kv_heads):
            kc = phi(kv_cmp[0][rows, h], params[0][h], params[1][h], c.block, c.stride, c.phi)
            vc = phi(kv_cmp[1][rows, h], params[2][h], params[3][h], c.block, c.stride, c.phi)
            ends = torch.arange(kc.shape[0], device=q.device) * c.stride + c.block - 1
            visible = ends[None] <= t[:, None]
            group_p = 0
            for g in range(h * group, (h + 1) * group):
                p = softmax_rows(q[rows, g] @ kc.T * scale, visible)
                per_head[0][g] = p @ vc
                group_p = group_p + p.detach()
            s = importance(group_p, c)
            lists = choose(s, c)
            if blocks is not None:
                lists = [[j for j in js if j >= 0] for js in blocks[rows, h].tolist()]
            picked = torch.zeros(n, n, dtype=torch.bool)
            for i, js in enumerate(lists):
                seq_choice[i][h], seq_scores[i][h] = js, s[i]
                for j in js:
                    picked[i, j * c.select_block : (j + 1) * c.select_block] = True
            picked, causal = picked.to(q.device), t[None] <= t[:, None]
            near = causal & (t[None] > t[:, None] - c.window)
            for g in range(h * group, (h + 1) * group):
                ps = softmax_rows(q[rows, g] @ kv_slc[0][rows, h].T * scale, picked & causal)
                per_head[1][g] = ps @ kv_slc[1][rows, h]
                pw = softmax_rows(q[rows, g] @ kv_win[0][rows, h].T * scale, near)
                per_head[2][g] = pw @ kv_win[1][rows, h]
        out.append(torch.stack([torch.stack(x, 1) for x in per_head]))
        choice += seq_choice
        scores_all += seq_scores
    branches = torch.cat(out, 1) if out else q.new_zeros(3, 0, heads, dv)
    mixed = sum(gates[..., b, None] * branches[b] for b in range(3))
    return SimpleNamespace(out=mixed, branches=branches, choice=choice, importance=scores_all)


def make_inputs(lengths, heads, kv_heads, dk, dv, c, *, seed, dtype=torch.float32, device="cpu", spread=1.0):
    """Random leaves: q, three (k, v), gates, phi parameters; the last are scaled to keep blocks of unit size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def leaf(*shape, factor=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float32) * factor
        return x.to(device, dtype).requires_grad_()

    q = leaf(tokens, heads, dk, factor=spread)
    kv = [(leaf(tokens, kv_heads, dk), leaf(tokens, kv_heads, dv)) for _ in range(3)]
    gates = torch.rand(tokens, heads, 3, generator=generator).to(device, dtype).requires_grad_()

    def weight(d):
        if c.phi == "mean":
            return leaf(kv_heads, c.block, factor=c.block**-0.5)
        return leaf(kv_heads, c.block + (c.phi == "mlp"), d, d, factor=(c.block * d) ** -0.5)

    params = (weight(dk), leaf(kv_heads, c.block, dk), weight(dv), leaf(kv_heads, c.block, dv))
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return SimpleNamespace(q=q, kv=kv, gates=gates, params=params, cu_seqlens=ends, lengths=lengths)


def leaves(x):
    return [x.q, *(t for pair in x.kv for t in pair), x.gates, *x.params]


LEAF_NAMES = [
    "q",
    "k_cmp",
    "v_cmp",
    "k_slc",
    "v_slc",
    "k_win",
    "v_win",
    "gates",
    "k_weight",
    "k_position",
    "v_weight",
    "v_position",
]


def as_float64(x):
    """The same inputs, in float64, as new leaves."""
    copies = [t.detach().double().requires_grad_() for t in leaves(x)]
    q, *kv, gates = copies[:8]
    pairs = [(kv[0], kv[1]), (kv[2], kv[3]), (kv[4], kv[5])]
    return SimpleNamespace(
        q=q, kv=pairs, gates=gates, params=tuple(copies[8:]), cu_seqlens=x.cu_seqlens, lengths=x.lengths
    )


def error(a, b):
    """|a - b| / |b|, and |a| where b is zero; NaN stays NaN."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() if b.norm() > 0 else 1))


def gradient_errors(x, y):
    """Name -> relative error of x's gradients against y's.

    A constant added to every compressed key leaves the softmax as it is, so the gradient of k_position is zero but for
    rounding when phi is linear: it is measured against the gradient of k_cmp, which it is a sum of.
    """
    got = dict(zip(LEAF_NAMES, leaves(x), strict=True))
    wanted = dict(zip(LEAF_NAMES, leaves(y), strict=True))
    errors = {}
    for name in LEAF_NAMES:
        a, b = (torch.zeros_like(t) if t.grad is None else t.grad.double() for t in (got[name], wanted[name]))
        size = b.norm()
        if name == "k_position" and wanted["k_cmp"].grad is not None:
            size = torch.maximum(size, wanted["k_cmp"].grad.norm())
        errors[name] = float((a.double() - b).norm() / (size if size > 0 else 1))
    return errors
