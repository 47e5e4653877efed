"""Row-wise passes: merging the parts of the selected branch, mixing branches by gates, what backward needs of it."""

from __future__ import annotations

import triton
import triton.language as tl

from plumbline.kernels.nsa.triton_backend.common import load_rows, store_rows


@triton.jit(do_not_specialize=["first_row", "last_row"])
def merge_and_mix(
    cmp_ptr, cmp_lse_ptr, base_ptr, slc_ptr, win_ptr, slc_lse_ptr, pairs_ptr, pairs_lse_ptr, indices_ptr, gates_ptr,
    out_ptr, table_ptr, first_row, last_row, heads,
    GROUP: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    HAS_CMP: tl.constexpr, SLC: tl.constexpr, MIX: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows (t, head) in [first_row, last_row).

    SLC 1: slc holds the forced blocks, merged here with the pairs of the others; 2: pairs alone; 3: slc is whole.
    Merged output and lse replace slc's. MIX: out = the gated sum. base [Hkv, Dv] float32: what the compressed values,
    and so the outputs cmp, were stored without.
    """
    row = first_row + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < last_row
    if SLC == 3:
        slc = load_rows(slc_ptr, row * DV, ok, DV, BV).to(tl.float32)
    else:
        token, head = row // heads, row % heads
        kv_heads = heads // GROUP
        list_at = (token * kv_heads + head // GROUP) * COUNT
        pair_at = ((token - first_row // heads) * kv_heads + head // GROUP) * COUNT
        own = (token - tl.load(table_ptr + token * 3, mask=ok, other=0)).to(tl.int32) // S
        if SLC == 1:
            m = tl.load(slc_lse_ptr + row, mask=ok, other=float("-inf"))
            base = tl.where(m == float("-inf"), 0.0, m)
            denominator = tl.exp2(m - base)
            slc = load_rows(slc_ptr, row * DV, ok, DV, BV).to(tl.float32) * denominator[:, None]
        else:
            m = tl.full([ROWS], float("-inf"), tl.float32)
            denominator = tl.zeros([ROWS], tl.float32)
            slc = tl.zeros([ROWS, BV], tl.float32)
        for slot in range(COUNT):
            j = tl.load(indices_ptr + list_at + slot, mask=ok, other=-1)
            use = ok & (j >= 0) & (j <= own)
            if SLC == 1:
                use = use & (j >= INITIAL) & (j <= own - LOCAL)
            at = (pair_at + slot) * GROUP + head % GROUP
            lse = tl.load(pairs_lse_ptr + at, mask=use, other=float("-inf"))
            part = load_rows(pairs_ptr, at * DV, use, DV, BV).to(tl.float32)
            new = tl.maximum(m, lse)
            base = tl.where(new == float("-inf"), 0.0, new)
            old_weight, weight = tl.exp2(m - base), tl.exp2(lse - base)
            slc = slc * old_weight[:, None] + part * weight[:, None]
            denominator = denominator * old_weight + weight
            m = new
        slc = slc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
        store_rows(slc_ptr, row * DV, ok, slc, DV, BV)
        tl.store(slc_lse_ptr + row, m + tl.log2(denominator), mask=ok)
    if MIX:
        out = slc * tl.load(gates_ptr + row * 3 + 1, mask=ok, other=0.0).to(tl.float32)[:, None]
        win = load_rows(win_ptr, row * DV, ok, DV, BV).to(tl.float32)
        out += win * tl.load(gates_ptr + row * 3 + 2, mask=ok, other=0.0).to(tl.float32)[:, None]
        if HAS_CMP:
            cmp = load_rows(cmp_ptr, row * DV, ok, DV, BV).to(tl.float32)
            seen = tl.load(cmp_lse_ptr + row, mask=ok, other=float("-inf")) > float("-inf")
            cmp += load_rows(base_ptr, (row % heads).to(tl.int32) // GROUP * DV, seen, DV, BV)
            out += cmp * tl.load(gates_ptr + row * 3, mask=ok, other=0.0).to(tl.float32)[:, None]
        store_rows(out_ptr, row * DV, ok, out, DV, BV)


@triton.jit(do_not_specialize=["rows"])
def gate_gradients(
    do_ptr, cmp_ptr, base_ptr, slc_ptr, win_ptr, cmp_lse_ptr, slc_lse_ptr, win_lse_ptr, gates_ptr, d_gates_ptr,
    shift_ptr, dot_ptr, rows, stride, heads,
    GROUP: tl.constexpr, HAS_CMP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each branch b: dot[b] = do . o_b, which is the gate's gradient too, and shift[b] = lse_b - log2(gate_b).

    The compressed branch's output and values are without base [Hkv, Dv] (merge_and_mix), of which the gate's gradient
    alone has a part.

    With the gate in the exponent, exp2(s - shift) is gate p, so that the branches' kernels need no gates.
    dot, shift [3, stride], of which the first `rows` are written.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    do = load_rows(do_ptr, row * DV, ok, DV, BV).to(tl.float32)
    for b in tl.static_range(3):
        if b > 0 or HAS_CMP:
            o_ptr, lse_ptr = cmp_ptr, cmp_lse_ptr
            if b == 1:
                o_ptr, lse_ptr = slc_ptr, slc_lse_ptr
            if b == 2:
                o_ptr, lse_ptr = win_ptr, win_lse_ptr
            dot = tl.sum(do * load_rows(o_ptr, row * DV, ok, DV, BV).to(tl.float32), 1)
            lse = tl.load(lse_ptr + row, mask=ok, other=0.0)
            gate = tl.load(gates_ptr + row * 3 + b, mask=ok, other=1.0).to(tl.float32)
            shift = tl.where(lse == float("-inf"), float("inf"), lse - tl.log2(gate))
            tl.store(dot_ptr + b * stride + row, dot, mask=ok)
            if b == 0:
                seen = ok & (lse > float("-inf"))
                base = load_rows(base_ptr, (row % heads).to(tl.int32) // GROUP * DV, seen, DV, BV)
                dot += tl.sum(do * base, 1)
            tl.store(d_gates_ptr + row * 3 + b, dot.to(d_gates_ptr.dtype.element_ty), mask=ok)
            tl.store(shift_ptr + b * stride + row, shift, mask=ok)
        else:
            tl.store(d_gates_ptr + row * 3 + b, (row * 0).to(d_gates_ptr.dtype.element_ty), mask=ok)
