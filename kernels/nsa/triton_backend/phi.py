"""New tokens into a cache, and the compression blocks that they complete, as matrix-vector products."""

from __future__ import annotations

import triton
import triton.language as tl

from plumbline.kernels.nsa.triton_backend.common import load_rows, placed


@triton.jit
def copy_row(x_ptr, x_at, store_ptr, at, D: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + x_at + c, mask=c < D)
    tl.store(store_ptr + at + c, x.to(store_ptr.dtype.element_ty), mask=c < D)


@triton.jit
def cell(table, at, size, stride_p, stride_h, head, ROW: tl.constexpr, PAGED: tl.constexpr, RING: tl.constexpr = 0):
    """Element offset of one row (or of rows that all exist) of a sequence; ROW elements from one to the next."""
    if PAGED:
        offset = tl.load(table + at // size).to(tl.int64) * stride_p + (at % size).to(tl.int64) * ROW
    else:
        offset = tl.load(table).to(tl.int64) * stride_p + placed(at, RING).to(tl.int64) * ROW
    return offset + head * stride_h


@triton.jit
def complete_tile(
    x_ptr, x_t, x_h, store_ptr, size, stride_p, stride_h, weight_ptr, position_ptr, blocks_ptr, to, hidden_ptr, table,
    t, before, first_row, head, n0,
    L: tl.constexpr, KIND: tl.constexpr, HAS_POSITION: tl.constexpr, DIM: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, PAGED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """TILE columns of phi of tokens (t - L, t]; tokens from `before` on are read from the input, not the cache."""
    n = n0 + tl.arange(0, TILE)
    d = tl.arange(0, BLOCK)
    kept = blocks_ptr.dtype.element_ty
    LAYERS: tl.constexpr = L + (KIND == 2)
    if KIND == 1:
        mean = tl.zeros([CHUNK, TILE], tl.float32)
    else:
        acc = tl.zeros([CHUNK, BLOCK, TILE], tl.float32)
    # Unrolled, so that the loads of several steps are under way at once.
    for s0 in tl.range(0, L, CHUNK, loop_unroll_factor=4):
        s = s0 + tl.arange(0, CHUNK)
        token = t - L + 1 + s
        old = (s < L) & (token < before)
        new = (s < L) & (token >= before)
        if PAGED:
            slot = tl.load(table + token // size, mask=old, other=0).to(tl.int64)
            at = slot * stride_p + head * stride_h + (token % size).to(tl.int64) * ROW
        else:
            at = tl.load(table).to(tl.int64) * stride_p + head * stride_h + placed(token, RING).to(tl.int64) * ROW
        x_at = (first_row + token - before).to(tl.int64) * x_t + head * x_h
        if KIND == 1:
            ok = (n < DIM)[None, :]
            x = tl.load(store_ptr + at[:, None] + n[None, :], mask=old[:, None] & ok, other=0.0).to(tl.float32)
            x += tl.load(x_ptr + x_at[:, None] + n[None, :], mask=new[:, None] & ok, other=0.0).to(tl.float32)
            if HAS_POSITION:
                where = position_ptr + ((head * L + s) * DIM)[:, None] + n[None, :]
                x += tl.load(where, mask=(s < L)[:, None] & ok, other=0.0).to(tl.float32)
            mean += x * tl.load(weight_ptr + head * L + s, mask=s < L, other=0.0).to(kept).to(tl.float32)[:, None]
        else:
            x = load_rows(store_ptr, at, old, DIM, BLOCK).to(tl.float32)
            x += load_rows(x_ptr, x_at, new, DIM, BLOCK).to(tl.float32)
            if HAS_POSITION:
                x += load_rows(position_ptr, (head * L + s) * DIM, s < L, DIM, BLOCK).to(tl.float32)
            row = ((head * LAYERS + s)[:, None] * DIM + d[None, :]).to(tl.int64) * DIM
            ok = (s < L)[:, None] & (d < DIM)[None, :]
            w = tl.load(
                weight_ptr + row[:, :, None] + n[None, None, :], mask=ok[:, :, None] & (n < DIM)[None, None, :],
                other=0.0,
            )  # fmt: skip
            acc += x[:, :, None] * w.to(kept).to(tl.float32)
    if KIND == 1:
        tl.store(blocks_ptr + to + n, tl.sum(mean, 0).to(kept), mask=n < DIM)
    else:
        y = tl.sum(tl.sum(acc, 0), 0)
        if KIND == 0:
            tl.store(blocks_ptr + to + n, y.to(kept), mask=n < DIM)
        else:
            tl.store(hidden_ptr + n, y.to(kept).to(tl.float32), mask=n < DIM)


@triton.jit
def append(
    kc_ptr, vc_ptr, ks_ptr, vs_ptr, kw_ptr, vw_ptr,
    kc_t, kc_h, vc_t, vc_h, ks_t, ks_h, vs_t, vs_h, kw_t, kw_h, vw_t, vw_h,
    kc_store, vc_store, ks_store, vs_store, kw_store, vw_store, size,
    kc_p, kc_sh, vc_p, vc_sh, ks_p, ks_sh, vs_p, vs_sh, kw_p, kw_sh, vw_p, vw_sh,
    k_weight_ptr, k_position_ptr, v_weight_ptr, v_position_ptr, kb_ptr, vb_ptr, hidden_ptr,
    cmp_ptr, slc_ptr, win_ptr, cmp_t, slc_t, win_t, table_ptr, position_ptr, table_t, size_b, kb_p, kb_h, vb_p, vb_h,
    KV_HEADS: tl.constexpr, L: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr, KR: tl.constexpr, VR: tl.constexpr,
    SHIFT: tl.constexpr, NEW: tl.constexpr, CMP_RING: tl.constexpr, WIN_RING: tl.constexpr,
    KIND: tl.constexpr, HAS_KEY_POSITION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, K_TILES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (row, head, 0) stores the new token; (., ., 1 ...) a tile of the block that it completes, if any.

    KIND: phi linear 0, mean 1, mlp 2 (its first layer, into hidden [2, R, Hkv, max(Dk, Dv)]). Tables: cmp, slc, win of
    the raw stores, table of the compressed one. Strides: _t, _h of the tokens that come in, _p, _sh of the stores.
    Rings are long enough that no new token takes the place of one that a block of this step is made of.
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = tl.load(position_ptr + row).to(tl.int32)
    table = table_ptr + row * table_t
    cmp = cmp_ptr + row * cmp_t
    far = row.to(tl.int64)
    if part == 0:
        slc = slc_ptr + row * slc_t
        win = win_ptr + row * win_t
        at = cell(cmp, t, size, kc_p, kc_sh, head, KR, PAGED, CMP_RING)
        copy_row(kc_ptr, far * kc_t + head * kc_h, kc_store, at, DK, BK)
        at = cell(slc, t, size, ks_p, ks_sh, head, KR, PAGED)
        copy_row(ks_ptr, far * ks_t + head * ks_h, ks_store, at, DK, BK)
        at = cell(win, t, size, kw_p, kw_sh, head, KR, PAGED, WIN_RING)
        copy_row(kw_ptr, far * kw_t + head * kw_h, kw_store, at, DK, BK)
        at = cell(cmp, t, size, vc_p, vc_sh, head, VR, PAGED, CMP_RING)
        copy_row(vc_ptr, far * vc_t + head * vc_h, vc_store, at, DV, BV)
        at = cell(slc, t, size, vs_p, vs_sh, head, VR, PAGED)
        copy_row(vs_ptr, far * vs_t + head * vs_h, vs_store, at, DV, BV)
        at = cell(win, t, size, vw_p, vw_sh, head, VR, PAGED, WIN_RING)
        copy_row(vw_ptr, far * vw_t + head * vw_h, vw_store, at, DV, BV)
    else:
        end = t + 1 - L
        if (end >= 0) & (end % D == 0):
            i = end // D + SHIFT
            before = t - row % NEW
            first_row = row - row % NEW
            widest: tl.constexpr = DK if DK > DV else DV
            hidden = hidden_ptr + (far * KV_HEADS + head) * widest
            if part <= K_TILES:
                to = cell(table, i, size_b, kb_p, kb_h, head, KR, PAGED)
                complete_tile(kc_ptr, kc_t, kc_h, kc_store, size, kc_p, kc_sh, k_weight_ptr, k_position_ptr, kb_ptr, to,
                              hidden, cmp, t, before, first_row, head, (part - 1) * TILE,
                              L, KIND, HAS_KEY_POSITION, DK, KR, BK, TILE, CHUNK, PAGED, CMP_RING)  # fmt: skip
            else:
                to = cell(table, i, size_b, vb_p, vb_h, head, VR, PAGED)
                hidden += tl.num_programs(0).to(tl.int64) * KV_HEADS * widest
                complete_tile(vc_ptr, vc_t, vc_h, vc_store, size, vc_p, vc_sh, v_weight_ptr, v_position_ptr, vb_ptr, to,
                              hidden, cmp, t, before, first_row, head, (part - 1 - K_TILES) * TILE,
                              L, KIND, True, DV, VR, BV, TILE, CHUNK, PAGED, CMP_RING)  # fmt: skip


@triton.jit
def gelu_tile(hidden_ptr, weight_ptr, blocks_ptr, to, n0, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """blocks = gelu(hidden) @ weight [DIM, DIM], TILE columns."""
    n = n0 + tl.arange(0, TILE)
    d = tl.arange(0, BLOCK)
    kept = blocks_ptr.dtype.element_ty
    x = tl.load(hidden_ptr + d, mask=d < DIM, other=0.0)
    x = (0.5 * x * (1 + tl.erf(x * 0.7071067811865476))).to(kept).to(tl.float32)
    ok = (d < DIM)[:, None] & (n < DIM)[None, :]
    w = tl.load(weight_ptr + d[:, None] * DIM + n[None, :], mask=ok, other=0.0).to(kept).to(tl.float32)
    tl.store(blocks_ptr + to + n, tl.sum(x[:, None] * w, 0).to(kept), mask=n < DIM)


@triton.jit
def second_layer(
    hidden_ptr, k_weight_ptr, v_weight_ptr, kb_ptr, vb_ptr, table_ptr, position_ptr, table_t, size_b, kb_p, kb_h,
    vb_p, vb_h,
    KV_HEADS: tl.constexpr, L: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr, KR: tl.constexpr, VR: tl.constexpr,
    SHIFT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DIM: tl.constexpr,
    K_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The second layer of an mlp phi, for blocks that append began."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = tl.load(position_ptr + row).to(tl.int32)
    end = t + 1 - L
    if (end >= 0) & (end % D == 0):
        table = table_ptr + row * table_t
        i = end // D + SHIFT
        hidden = hidden_ptr + (row.to(tl.int64) * KV_HEADS + head) * DIM
        far = head.to(tl.int64)
        if part < K_TILES:
            to = cell(table, i, size_b, kb_p, kb_h, head, KR, PAGED)
            weight = k_weight_ptr + (far * (L + 1) + L) * DK * DK
            gelu_tile(hidden, weight, kb_ptr, to, part * TILE, DK, BK, TILE)
        else:
            to = cell(table, i, size_b, vb_p, vb_h, head, VR, PAGED)
            weight = v_weight_ptr + (far * (L + 1) + L) * DV * DV
            hidden += tl.num_programs(0).to(tl.int64) * KV_HEADS * DIM
            gelu_tile(hidden, weight, vb_ptr, to, (part - K_TILES) * TILE, DV, BV, TILE)
