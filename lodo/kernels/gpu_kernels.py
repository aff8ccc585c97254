"""Triton kernels: the device code that gpu.py launches.

Layouts of the block-diagonal x permutation network (K = block size, W = number of blocks in a layer, D = K * W):

    theta, moments   (N, K_in, K_out, W), as in reference.py: a row B[i, o] of all blocks is contiguous.
    slots            vectors as a layer reads them, component i of block b at b * K + i; two vectors lie one after the
                     other. Written at o * W + b, the output of a layer is the input of the next under the perfect
                     shuffle, so that no data moves for it and there are no indices.
    pairs            random permutations gather from vectors in canonical order, (D, V) with the V vectors side by
                     side, so that one 32-byte sector serves both.

Every kernel walks over stages (layers, or pairs of layers) and, inside, over tiles of blocks. Launched with a program
per tile it takes one stage; launched as a single program it takes all of them, with barriers between, for networks so
small that launches would cost more than the work.

Pairs of layers. A vector costs as much traffic as a row of blocks, so layers under the shuffle run two at a time.
Nothing is computed twice and no two programs meet, whatever W is: output (b, o) of the lower layer feeds exactly one
input, place p = o * W + b, of the upper one. Going up, a program that owns blocks of the upper layer computes the K
columns below that feed them; coming down, one that owns blocks of the lower layer also owns the K rows above that they
feed.
"""

import triton
import triton.language as tl

# What changes between networks, but should not compile a kernel anew for every value.
SIZES = ("width", "size", "first", "begin", "end", "top", "slots", "shift", "tiles")


@triton.jit
def random_words(index, count):
    """`lodo.rounding.random_words`, uint32."""
    x = index ^ (count * 0x9E3779B1)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def to_bfloat16(x, bits):
    """`lodo.rounding.to_bfloat16`."""
    word = x.to(tl.float32).to(tl.uint32, bitcast=True)
    rounded = (word + (bits & 0xFFFF)) & 0xFFFF0000
    is_nan = (word & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, 0x7FC00000, rounded).to(tl.uint32).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def learn(values, h, theta, exp_avg, exp_avg_sq, first, offset, mask, rates, EPS: tl.constexpr, ADAM: tl.constexpr):
    """`lodo.inner_optimizer.update_` of the `values` at theta + first + offset: all is written once."""
    step_size, forget1, keep2, forget2, count, _ = rates
    theta = theta + first + offset
    if ADAM:
        exp_avg, exp_avg_sq = exp_avg + first + offset, exp_avg_sq + first + offset
        m_kept, v_kept = tl.load(exp_avg, mask, 0), tl.load(exp_avg_sq, mask, 0)
        m, v = m_kept.to(values.dtype), v_kept.to(values.dtype)
        m += forget1 * (h - m)
        v = keep2 * v + forget2 * (h * h)
        if m_kept.dtype == tl.bfloat16:
            words = random_words(tl.cast(first, tl.uint32) + offset.to(tl.uint32), count)
            tl.store(exp_avg, to_bfloat16(m, words), mask)
            tl.store(exp_avg_sq, to_bfloat16(v, words >> 16), mask)
        else:
            tl.store(exp_avg, m, mask)
            tl.store(exp_avg_sq, v, mask)
        tl.store(theta, values - step_size * (m / (tl.sqrt(v) + EPS)), mask)
    else:
        tl.store(theta, values - step_size * h, mask)


@triton.jit
def load_rates(numbers, like):
    """The numbers of an inner step, from where gpu.py has put them, in the dtype of what `like` points to."""
    dtype = like.dtype.element_ty
    return (
        tl.load(numbers).to(dtype),  # step_size
        tl.load(numbers + 1).to(dtype),  # forget1, zero where nothing is to be learned
        tl.load(numbers + 2).to(dtype),  # keep2
        tl.load(numbers + 3).to(dtype),  # forget2
        tl.load(numbers + 4).to(tl.uint32),  # count
        -tl.load(numbers + 5).to(dtype),  # -lr, the factor of every hypergradient
    )


# ---- between the user's vectors and the network's -------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def enter(
    g, m, out, width, size,
    K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, V: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """E x for the one or two vectors (n,): as pairs, or shuffled into a slot."""
    j = tl.arange(0, KP)[:, None]
    r = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    x = r * K + j
    there = (j < K) & (r < width)
    for v in tl.static_range(V):
        values = tl.load((g if v == 0 else m) + x, there & (x < size), 0)
        tl.store(out + (x * V + v if RANDOM else v * K * width + j * width + r), values, there)


@triton.jit(do_not_specialize=SIZES)
def leave(
    x, inverse, out, width, size,
    K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """E^T P_1^T x, (n,), from what the lowest layer left."""
    j = tl.arange(0, KP)[:, None]
    r = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    place = r * K + j
    there = (j < K) & (r < width) & (place < size)
    source = tl.load(inverse + place, there, 0) if RANDOM else j * width + r
    tl.store(out + place, tl.load(x + source, there, 0), there)


# ---- one layer at a time --------------------------------------------------------------------------------------------
# A tile is B blocks: [KP, KP, B] numbers B[i, o] and [KP, B] components of a vector, with KP the next power of two.


@triton.jit
def components(tile, width, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr):
    """For the components of a tile's blocks: their places in a slot as input and as output, and whether they exist."""
    c, b = tl.arange(0, KP)[:, None], tile * B + tl.arange(0, B)[None, :]
    return b * K + c, c * width + b, (c < K) & (b < width)


@triton.jit
def matrices(tile, width, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr):
    """For the numbers of a tile's blocks: their places in the layer, and whether they exist."""
    i, o = tl.arange(0, KP)[:, None, None], tl.arange(0, KP)[None, :, None]
    b = (tile * B + tl.arange(0, B))[None, None, :]
    return (i * K + o) * width + b, (i < K) & (o < K) & (b < width)


@triton.jit(do_not_specialize=SIZES)
def up_layers(
    theta, x, y, permutations, numbers, width, begin, end, slots, shift, tiles,
    K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, V: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Layers begin .. end - 1 of U for V vectors.

    Shuffle: from slot l - shift of x to the next, modulo `slots`. Random: between the two pair buffers in y, from
    number l % 2 to the other, keeping the permuted input in slot l of x when learning.
    """
    if numbers is not None:
        if tl.load(numbers + 1) == 0:  # nothing is to be learned at this step
            return
    dim = tl.cast(width, tl.int64) * K
    for layer in range(begin, end):
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            place, is_block = matrices(tile, width, K, KP, B)
            inputs, outputs, there = components(tile, width, K, KP, B)
            blocks = tl.load(theta + layer * dim * K + place, is_block, 0)
            if RANDOM:
                source = tl.load(permutations + layer * dim + inputs, there, 0)
            for v in tl.static_range(V):
                if RANDOM:
                    a = tl.load(y + (layer % 2) * dim * V + source * V + v, there, 0)
                    if numbers is not None:
                        tl.store(x + (layer * V + v) * dim + inputs, a, there)
                    target = y + ((layer + 1) % 2) * dim * V + inputs * V + v
                else:
                    a = tl.load(x + ((layer - shift) % slots * V + v) * dim + inputs, there, 0)
                    target = x + ((layer - shift + 1) % slots * V + v) * dim + outputs
                tl.store(target, tl.sum(blocks * a[:, None, :], 0), there)
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def down_layers(
    theta, x, y, inverse, width, begin, end, top, shift, tiles,
    K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """Layers end - 1 .. begin of U^T for one vector.

    Shuffle: from slot l - shift + 1 of x to the one before, modulo 2. Random: from buffer (l + 1) % 2 of y to the
    other, by places of the layer's inputs; the topmost layer finds U's output there, in canonical order.
    """
    dim = tl.cast(width, tl.int64) * K
    for step in range(begin, end):
        layer = begin + end - 1 - step
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            place, is_block = matrices(tile, width, K, KP, B)
            inputs, outputs, there = components(tile, width, K, KP, B)
            blocks = tl.load(theta + layer * dim * K + place, is_block, 0)
            if RANDOM:
                source = from_above(inverse, layer, inputs, there, dim, top)
                d = tl.load(y + ((layer + 1) % 2) * dim + source, there, 0)
                target = y + (layer % 2) * dim + inputs
            else:
                d = tl.load(x + ((layer - shift + 1) % 2) * dim + outputs, there, 0)
                target = x + ((layer - shift) % 2) * dim + inputs
            tl.store(target, tl.sum(blocks * d[None, :, :], 1), there)
        tl.debug_barrier()


@triton.jit
def from_above(inverse, layer, outputs, there, dim, top):
    """Where the layer above took a layer's canonical outputs in; the outputs themselves under the topmost layer."""
    is_below = tl.full(outputs.shape, 0, tl.int32) + layer + 1 < top
    return tl.where(is_below, tl.load(inverse + (layer + 1) * dim + outputs, there & is_below, 0), outputs)


@triton.jit(do_not_specialize=SIZES)
def learn_layers(
    theta, exp_avg, exp_avg_sq, x, y, inverse, numbers, width, begin, end, top, shift, tiles,
    K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, RANDOM: tl.constexpr, EPS: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """Layers end - 1 .. begin of the backward pass, with their inner update.

    Slot l - shift of x holds the layer's inputs a, c; under the shuffle the back-propagated pair takes their place, and
    the slot above holds d, e (over layer top - 1 the output of U, which is to be swapped: d starts from U m, e from U
    g; their factor -lr goes into h). Random: d, e come from pair buffer (l + 1) % 2 of y, and go on to the other.
    """
    rates = load_rates(numbers, theta)
    factor = rates[5]
    if rates[1] == 0:  # nothing is to be learned at this step
        return
    dim = tl.cast(width, tl.int64) * K
    for step in range(begin, end):
        layer = begin + end - 1 - step
        swap = tl.where(layer == top - 1, 1, 0)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            place, is_block = matrices(tile, width, K, KP, B)
            inputs, outputs, there = components(tile, width, K, KP, B)
            slot = x + (layer - shift) * dim * 2
            a, c = tl.load(slot + inputs, there, 0), tl.load(slot + dim + inputs, there, 0)
            if RANDOM:
                above = y + ((layer + 1) % 2) * dim * 2 + from_above(inverse, layer, inputs, there, dim, top) * 2
                d, e = tl.load(above + swap, there, 0), tl.load(above + 1 - swap, there, 0)
            else:
                above = slot + dim * 2 + outputs
                d, e = tl.load(above + swap * dim, there, 0), tl.load(above + (1 - swap) * dim, there, 0)
            blocks = tl.load(theta + layer * dim * K + place, is_block, 0)
            if layer > 0:
                back_d, back_e = tl.sum(blocks * d[None, :, :], 1), tl.sum(blocks * e[None, :, :], 1)
                if RANDOM:
                    below = y + (layer % 2) * dim * 2 + inputs * 2
                    tl.store(below, back_d, there)
                    tl.store(below + 1, back_e, there)
                else:
                    tl.debug_barrier()  # other threads may have read a and c there
                    tl.store(slot + inputs, back_d, there)
                    tl.store(slot + dim + inputs, back_e, there)
            h = factor * (a[:, None, :] * d[None, :, :] + c[:, None, :] * e[None, :, :])
            learn(blocks, h, theta, exp_avg, exp_avg_sq, layer * dim * K, place, is_block, rates, EPS, ADAM)
        tl.debug_barrier()


# ---- two layers at a time, under the shuffle ------------------------------------------------------------------------
# For K a power of two. Slot s holds the inputs of layer 2 s. A row of layer 2 s + 1 is a place p of its input: row p %
# K of block p // K; output o of block b of layer 2 s leads to p = o * W + b.


@triton.jit(do_not_specialize=SIZES)
def up_pairs(theta, x, numbers, width, begin, end, slots, tiles, K: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """Stages begin .. end - 1 of U for V vectors: from slot s to slot s + 1, modulo `slots`.

    A tile is T blocks of the upper layer in each of K stretches of W / K, one for each output of the lower layer, so
    that the lower layer's inputs serve all its outputs while they are in the cache.
    """
    if numbers is not None:
        if tl.load(numbers + 1) == 0:  # nothing is to be learned at this step
            return
    dim, stretch = tl.cast(width, tl.int64) * K, tl.cdiv(width, K)
    i, o = tl.arange(0, K)[:, None, None], tl.arange(0, K)[None, :, None]
    for stage in range(begin, end):
        lower = theta + 2 * stage * dim * K
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            # The rows: K stretches of T blocks of K rows each.
            f = tl.arange(0, K * T * K)
            row = (f // (T * K) * stretch + tile * T) * K + f % (T * K)
            is_row = (tile * T * K + f % (T * K) < stretch * K) & (row < width * K)
            output = row // width
            block = row - output * width
            column = tl.arange(0, K)[:, None]
            below = tl.load(lower + (column * K + output[None, :]) * width + block[None, :], is_row[None, :], 0)
            # The blocks that the rows belong to.
            f = tl.arange(0, K * T)
            b = (f // T * stretch + tile * T + f % T)[None, None, :]
            is_block = (tile * T + f % T < stretch)[None, None, :] & (b < width)
            above = tl.load(lower + dim * K + ((i * K + o) * width + b), is_block, 0)
            target = tl.reshape(o * width + b, [K, K * T])
            for v in tl.static_range(V):
                source = x + (stage % slots * V + v) * dim
                a = tl.load(source + (block * K)[None, :] + column, is_row[None, :], 0)
                middle = tl.trans(tl.reshape(tl.sum(below * a, 0), [K * T, K]))
                result = tl.sum(above * middle[:, None, :], 0)
                out = x + ((stage + 1) % slots * V + v) * dim
                tl.store(out + target, result, tl.reshape(is_block, [1, K * T]))
        tl.debug_barrier()


@triton.jit
def rows_fed(tile, width, K: tl.constexpr, T: tl.constexpr):
    """The K * K * T rows above that a tile of K * T blocks feeds, as [K * K, T] in the order of `to_rows`: the row of
    its block, the block, and whether it exists."""
    f = tl.arange(0, K * K)[:, None]  # output o of the blocks with remainder s, at o * K + s
    t = tl.arange(0, T)[None, :]
    place = (f // K) * width + tile * T * K + f % K
    return place % K, place // K + t, (tile * T + t) * K + f % K < width


@triton.jit
def to_rows(v, K: tl.constexpr, T: tl.constexpr):
    """[K, T * K] (output, block) -> [K * K, T], so that a row of lanes reads consecutive blocks above."""
    return tl.reshape(tl.permute(tl.reshape(v, [K, T, K]), (0, 2, 1)), [K * K, T])


@triton.jit
def from_rows(v, K: tl.constexpr, T: tl.constexpr):
    return tl.reshape(tl.permute(tl.reshape(v, [K, K, T]), (0, 2, 1)), [K, T * K])


@triton.jit(do_not_specialize=SIZES)
def down_pairs(theta, x, width, begin, end, tiles, K: tl.constexpr, T: tl.constexpr):
    """Stages end - 1 .. begin of U^T for one vector: from slot s + 1 to slot s, modulo 2."""
    dim = tl.cast(width, tl.int64) * K
    k = tl.arange(0, K)[:, None, None]
    for step in range(begin, end):
        stage = begin + end - 1 - step
        lower = theta + 2 * stage * dim * K
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            row, b, is_row = rows_fed(tile, width, K, T)
            place = (row * K * width + b)[None, :, :] + k * width
            above = tl.load(lower + dim * K + place, is_row[None, :, :], 0)
            d = tl.load(x + (stage + 1) % 2 * dim + (k * width + b[None, :, :]), is_row[None, :, :], 0)
            d = from_rows(tl.sum(above * d, 0), K, T)
            place, is_block = matrices(tile, width, K, K, T * K)
            inputs, _, there = components(tile, width, K, K, T * K)
            below = tl.load(lower + place, is_block, 0)
            tl.store(x + stage % 2 * dim + inputs, tl.sum(below * d[None, :, :], 1), there)
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def learn_pairs(
    theta, exp_avg, exp_avg_sq, x, numbers, width, begin, end, top, tiles,
    K: tl.constexpr, T: tl.constexpr, EPS: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """Stages end - 1 .. begin of the backward pass, with the inner update of both layers.

    Slot s holds the inputs a, c of the lower layer, from which those of the upper layer come again; the pair that
    leaves the stage takes their place. Slot s + 1 holds the pair that enters it (over stage top - 1: see
    `learn_layers`).
    """
    rates = load_rates(numbers, theta)
    factor = rates[5]
    if rates[1] == 0:  # nothing is to be learned at this step
        return
    dim = tl.cast(width, tl.int64) * K
    k = tl.arange(0, K)[:, None, None]
    for step in range(begin, end):
        stage = begin + end - 1 - step
        swap = tl.where(stage == top - 1, 1, 0)
        first = 2 * stage * dim * K
        slot = x + stage * dim * 2
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            place, is_block = matrices(tile, width, K, K, T * K)
            inputs, _, there = components(tile, width, K, K, T * K)
            a, c = tl.load(slot + inputs, there, 0), tl.load(slot + dim + inputs, there, 0)
            below = tl.load(theta + first + place, is_block, 0)
            middle_a = to_rows(tl.sum(below * a[:, None, :], 0), K, T)
            middle_c = to_rows(tl.sum(below * c[:, None, :], 0), K, T)
            # The upper layer, by rows.
            row, b, is_row = rows_fed(tile, width, K, T)
            is_row = is_row[None, :, :]
            entering = slot + dim * 2 + (k * width + b[None, :, :])
            d, e = tl.load(entering + swap * dim, is_row, 0), tl.load(entering + (1 - swap) * dim, is_row, 0)
            up = (row * K * width + b)[None, :, :] + k * width
            above = tl.load(theta + first + dim * K + up, is_row, 0)
            h = factor * (middle_a[None, :, :] * d + middle_c[None, :, :] * e)
            learn(above, h, theta, exp_avg, exp_avg_sq, first + dim * K, up, is_row, rates, EPS, ADAM)
            d = from_rows(tl.sum(above * d, 0), K, T)
            e = from_rows(tl.sum(above * e, 0), K, T)
            # The lower layer, by blocks.
            if stage > 0:
                tl.debug_barrier()  # other threads may have read a and c there
                tl.store(slot + inputs, tl.sum(below * d[None, :, :], 1), there)
                tl.store(slot + dim + inputs, tl.sum(below * e[None, :, :], 1), there)
            h = factor * (a[:, None, :] * d[None, :, :] + c[:, None, :] * e[None, :, :])
            learn(below, h, theta, exp_avg, exp_avg_sq, first, place, is_block, rates, EPS, ADAM)
        tl.debug_barrier()


# ---- the preconditioners of the ablations ---------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def learn_diagonal(
    theta, exp_avg, exp_avg_sq, g, m, numbers, size,
    B: tl.constexpr, EPS: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """The inner update of diag(theta): h = -lr * g * m."""
    rates = load_rates(numbers, theta)
    factor = rates[5]
    if rates[1] == 0:
        return
    first = tl.cast(tl.program_id(0), tl.int64) * B
    offset = tl.arange(0, B)
    there = offset < size - first
    h = factor * tl.load(g + first + offset, there, 0) * tl.load(m + first + offset, there, 0)
    weight = tl.load(theta + first + offset, there, 0)
    learn(weight, h, theta, exp_avg, exp_avg_sq, first, offset, there, rates, EPS, ADAM)


@triton.jit(do_not_specialize=SIZES)
def up_residual(weight, permutation, x, out, numbers, size, B: tl.constexpr, V: tl.constexpr):
    """A x = x + w * x[perm] for V vectors, side by side."""
    if numbers is not None:
        if tl.load(numbers + 1) == 0:  # nothing is to be learned at this step
            return
    p = tl.program_id(0) * B + tl.arange(0, B)
    there = p < size
    source, w = tl.load(permutation + p, there, 0), tl.load(weight + p, there, 0)
    for v in tl.static_range(V):
        moved = tl.load(x + source * V + v, there, 0)
        tl.store(out + p * V + v, tl.load(x + p * V + v, there, 0) + w * moved, there)


@triton.jit(do_not_specialize=SIZES)
def down_residual(weight, permutation, x, out, size, B: tl.constexpr):
    """A^T x: place perm[p] gets x[perm[p]] + w[p] * x[p]. A permutation meets every place once."""
    p = tl.program_id(0) * B + tl.arange(0, B)
    there = p < size
    target, w = tl.load(permutation + p, there, 0), tl.load(weight + p, there, 0)
    tl.store(out + target, tl.load(x + target, there, 0) + w * tl.load(x + p, there, 0), there)


@triton.jit(do_not_specialize=SIZES)
def turn_residual(
    weight, exp_avg, exp_avg_sq, x, out, numbers, size, first,
    B: tl.constexpr, EPS: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """The diagonal D of LODO-Residuals: from the pair that comes up (x_g, x_m) to the one that goes down,
    -lr * D * (x_m, x_g), with the inner update of D. `first` is D's place in theta."""
    rates = load_rates(numbers, weight)
    factor = rates[5]
    if rates[1] == 0:
        return
    p = tl.program_id(0) * B + tl.arange(0, B)
    there = p < size
    w = tl.load(weight + first + p, there, 0)
    g, m = tl.load(x + p * 2, there, 0), tl.load(x + p * 2 + 1, there, 0)
    tl.store(out + p * 2, factor * w * m, there)
    tl.store(out + p * 2 + 1, factor * w * g, there)
    learn(w, factor * g * m, weight, exp_avg, exp_avg_sq, first, p, there, rates, EPS, ADAM)


@triton.jit(do_not_specialize=SIZES)
def learn_residual(
    weight, exp_avg, exp_avg_sq, permutation, x, back, out, numbers, size, first,
    B: tl.constexpr, EPS: tl.constexpr, ADAM: tl.constexpr,
):  # fmt: skip
    """One layer of the backward pass: from its input x and the pair `back` above it to the pair `out` below it, with
    the inner update of its w, which lies at place `first` of theta."""
    rates = load_rates(numbers, weight)
    if rates[1] == 0:
        return
    p = tl.program_id(0) * B + tl.arange(0, B)
    there = p < size
    place, w = tl.load(permutation + p, there, 0), tl.load(weight + first + p, there, 0)
    h = tl.zeros_like(w)
    for v in tl.static_range(2):
        d = tl.load(back + p * 2 + v, there, 0)
        h += d * tl.load(x + place * 2 + v, there, 0)
        tl.store(out + place * 2 + v, tl.load(back + place * 2 + v, there, 0) + w * d, there)
    learn(w, h, weight, exp_avg, exp_avg_sq, first, p, there, rates, EPS, ADAM)


# ---- what is kept in bfloat16 ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def round_vector(target, values, count, size, B: tl.constexpr):
    """A vector in bfloat16, by the random bits of minus the count."""
    p = tl.program_id(0) * B + tl.arange(0, B)
    there = p < size
    words = random_words(p.to(tl.uint32), (-tl.load(count).to(tl.int64)).to(tl.uint32))
    tl.store(target + p, to_bfloat16(tl.load(values + p, there, 0), words), there)
