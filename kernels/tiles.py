"""What more than one kernel does with a tile: moving it, hiding parts of it, and one step of a softmax or its gradient.

The rows of a matrix are neighbouring query tokens with the G heads of one KV head: row r is head r % G of token r // G.
Exponentials and logarithms have base 2 here, base e in memory. Nothing is launched from this file.
"""

import triton
import triton.language as tl

from kernels.arguments import LOG2_E

LOWEST = tl.constexpr(-1e30)  # a running maximum before any key; finite, so that differences are never NaN
BINARY = tl.constexpr(LOG2_E)  # a natural logarithm times this has base 2
NATURAL = tl.constexpr(1 / LOG2_E)  # and back


@triton.jit
def load_keys(tiles, batch, key, head, KEYS: tl.constexpr, D: tl.constexpr):
    """[KEYS, D] from a descriptor of `arguments.key_tiles`."""
    return tl.reshape(tiles.load([batch, head, key, 0]), [KEYS, D])


@triton.jit
def store_keys(tiles, batch, key, head, x, KEYS: tl.constexpr, D: tl.constexpr):
    tiles.store([batch, head, key, 0], tl.reshape(x, [1, 1, KEYS, D]).to(tiles.dtype))


@triton.jit
def load_group(tiles, batch, token, head, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] from a descriptor of `arguments.group_tiles`; `head` is the first one of the group."""
    return tl.reshape(tiles.load([batch, token, head, 0]), [ROWS, D])


@triton.jit
def store_group(tiles, batch, token, head, x, TOKENS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    tiles.store([batch, token, head, 0], tl.reshape(x, [1, TOKENS, G, D]).to(tiles.dtype))


@triton.jit
def load_rows(X, token, head, inside, stride_s, stride_h, D: tl.constexpr, D_PADDED: tl.constexpr):
    """[rows, D_PADDED] of one sequence; zero outside. Unlike descriptors, several of these wait at the same time."""
    column = tl.arange(0, D_PADDED)
    mask = inside[:, None] if D == D_PADDED else inside[:, None] & (column < D)[None, :]
    rows = X + (token.to(tl.int64) * stride_s + head * stride_h)
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def first_visible(DocumentStart, batch, token, S, position, window):
    """The first key that each query sees through a window."""
    start = tl.load(DocumentStart + batch.to(tl.int64) * S + token, mask=token < S, other=0)
    return tl.maximum(start, position - window + 1)


@triton.jit
def visible_keys(key, first, position, KEYS: tl.constexpr):
    """[rows, KEYS]: which of the keys from `key` on a row sees, those from its `first` to its own `position`."""
    key += tl.arange(0, KEYS)
    return (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])


@triton.jit
def hide_unused(logits, v, present, KEYS: tl.constexpr):
    """Leaves the first `present` keys. A weight of 0 would not hide a NaN among the values of an unused slot."""
    used = tl.arange(0, KEYS) < present
    return tl.where(used[None, :], logits, float("-inf")), tl.where(used[:, None], v, 0)


@triton.jit
def start_softmax(Sink, head, rows: tl.constexpr):
    """Running maximum and total before the first key: those of the sink, if there is one."""
    if Sink is None:
        top, total = tl.full([rows], LOWEST, tl.float32), tl.zeros([rows], tl.float32)
    else:
        top, total = tl.load(Sink + head).to(tl.float32) * BINARY, tl.full([rows], 1.0, tl.float32)
    return top, total


@triton.jit
def softmax_step(logits, v, top, total, output, scale):
    """One tile of keys of an online softmax.

    logits [rows, keys] are not multiplied by `scale` yet, and -inf where invisible.
    """
    new_top = tl.maximum(top, tl.max(logits, 1) * scale)
    p = tl.math.exp2(logits * scale - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    output = tl.dot(p.to(v.dtype), v, output * shrink[:, None])
    return new_top, total, output


@triton.jit
def finish_softmax(top, total, output):
    """Output, zero where nothing was seen, and natural log-sum-exp, there +inf: its probabilities are zero."""
    seen = total > 0
    output = output / tl.where(seen, total, 1.0)[:, None]
    return output, tl.where(seen, (top + tl.math.log2(total)) * NATURAL, float("inf"))


@triton.jit
def query_gradient_step(dq, q, grad_output, k, v, lse, delta, visible, scale):
    """dq with what one tile of keys adds, but for the factor 1 / sqrt(D); `visible` [rows, keys], None for all.

    lse has base 2; a gate on the output is part of it, as minus its logarithm. `scale` is log2(e) / sqrt(D).
    """
    p = tl.math.exp2(tl.dot(q, k.T) * scale - lse[:, None])
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(grad_output, v.T) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def key_gradient_step(dk, dv, k, v, q, grad_output, Lse, Delta, visible, scale):
    """dk, but for 1 / sqrt(D), and dv with what one tile of rows adds; `visible` [keys, rows], None for all.

    The scores are transposed, so that P and dS stay in registers as left operands. Lse and Delta [rows] are pointers:
    loaded where they are used, the numbers take fewer registers. The base of Lse and the scale are as above.
    """
    p = tl.math.exp2(tl.dot(k, q.T) * scale - tl.load(Lse)[None, :])
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(q.dtype), grad_output, dv)
    ds = p * (tl.dot(v, grad_output.T) - tl.load(Delta)[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv
