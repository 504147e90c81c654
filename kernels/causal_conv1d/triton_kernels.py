# pyright: reportGeneralTypeIssues=false
"""The causal convolution's kernels: one forward, one backward for tokens and weights, one for the halo's gradient.

    z_t = bias + sum_k w_k x_{t-k}      y_t = z_t or silu(z_t)      dz_t = dy_t or dy_t silu'(z_t)
    dx_t = sum_k w_k dz_{t+k}           dw_k = sum_t dz_t x_{t-k}   dbias = sum_t dz_t

w_k = weight[:, width - 1 - k], given as `taps` [width, D]. Where t - k lies before t's segment, the halo's token stands
in for x_{t-k}, if it counts; what does not is left out by a select, never multiplied by 0. A program has a block of
channels and a block of tokens (of any segments: each token knows its own), and sums in float32. All are bound by
memory: x is read width times, once from there and then from the caches.
"""

import triton
import triton.language as tl


@triton.jit
def _segments_of(segment_of, offsets, t, tokens):
    """The segments of tokens t and where they start."""
    if segment_of is None:
        segment = tl.zeros_like(t)
        start = tl.zeros_like(t)
    else:
        segment = tl.load(segment_of + t, mask=(t >= 0) & (t < tokens), other=0)
        start = tl.load(offsets + segment).to(tl.int32)
    return segment, start


@triton.jit
def _tap(x, stride, halo, counts, t, k, segment, start, alive, channel, channels, WIDTH: tl.constexpr):
    """x_{t-k} as float32 [tokens, channels], and where it counts, [tokens, 1]; x and halo point at their row."""
    known = channel < channels
    inside = alive & (t - k >= start)
    value = tl.load(
        x + (t - k).to(tl.int64)[:, None] * stride + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
    ).to(tl.float32)
    counted = inside
    if halo is not None:
        ago = start - t + k  # 1: the token just before the segment
        outside = alive & (ago > 0)
        if counts is not None:
            outside = outside & (ago <= tl.load(counts + segment, mask=alive, other=0))
        row = segment.to(tl.int64) * (WIDTH - 1) + (WIDTH - 1 - ago)
        before = tl.load(
            halo + row[:, None] * channels + channel[None, :], mask=outside[:, None] & known[None, :], other=0.0
        )
        value = tl.where(inside[:, None], value, before.to(tl.float32))
        counted = counted | outside
    return value, counted[:, None]


@triton.jit
def _sums(
    x, stride, halo, counts, taps, bias, t, segment, start, alive, channel, channels,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """z of the tokens, [TOKENS, CHANNELS]."""
    z = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if bias is not None:
        z += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if WIDTH <= 4:
        for k in tl.static_range(WIDTH):
            w = tl.load(taps + k * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
            value, counted = _tap(x, stride, halo, counts, t, k, segment, start, alive, channel, channels, WIDTH)
            z += tl.where(counted, value * w[None, :], 0.0)
    else:  # written out, so many would not fit the registers
        for k in range(WIDTH):
            w = tl.load(taps + k * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
            value, counted = _tap(x, stride, halo, counts, t, k, segment, start, alive, channel, channels, WIDTH)
            z += tl.where(counted, value * w[None, :], 0.0)
    return z


@triton.jit
def _output_gradients(
    dout, dout_stride, x, stride, halo, counts, taps, bias, t, segment, start, alive, channel, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dz of the tokens, [TOKENS, CHANNELS], 0 where they are not alive."""
    mask = alive[:, None] & (channel < channels)[None, :]
    dz = tl.load(dout + t.to(tl.int64)[:, None] * dout_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = _sums(
            x, stride, halo, counts, taps, bias, t, segment, start, alive, channel, channels, WIDTH, TOKENS, CHANNELS
        )
        gate = 1 / (1 + tl.exp(-z))
        dz = tl.where(mask, dz * gate * (1 + z * (1 - gate)), 0.0)
    return dz


@triton.jit
def convolve(
    x, x_row, x_token, halo, halo_row, counts, taps, bias, segment_of, offsets, out, tokens, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y; x [B, T, D] with strides of rows and tokens, halo [B, N, WIDTH - 1, D] and out [B, T, D] contiguous.

    segment_of: int32 [T], None where each row is one segment; offsets: int64 [N + 1]; counts: int64 [N] or None.
    """
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64)
    if halo is not None:
        halo += row * halo_row
    alive = t < tokens
    segment, start = _segments_of(segment_of, offsets, t, tokens)
    y = _sums(
        x + row * x_row, x_token, halo, counts, taps, bias, t, segment, start, alive, channel, channels,
        WIDTH, TOKENS, CHANNELS,
    )  # fmt: skip
    if SILU:
        y = y / (1 + tl.exp(-y))
    at = out + row * tokens * channels + t.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=alive[:, None] & (channel < channels)[None, :])


@triton.jit
def convolve_backward(
    dout, dout_row, dout_token, x, x_row, x_token, halo, halo_row, counts, taps, bias, segment_of, offsets,
    dx, partial, tokens, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """dx [B, T, D], and each program's part of dw_0 ... dw_{WIDTH-1}, dbias: partial [B * programs, WIDTH + 1, D].

    A program takes BLOCKS blocks of TOKENS tokens; SUMS: a power of 2 above WIDTH.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.program_id(2).to(tl.int64)
    known = channel < channels
    dout += row * dout_row
    x += row * x_row
    if halo is not None:
        halo += row * halo_row
    which = tl.arange(0, SUMS)[:, None]
    sums = tl.zeros((SUMS, CHANNELS), tl.float32)
    for block in range(BLOCKS):
        t = (tl.program_id(0) * BLOCKS + block) * TOKENS + tl.arange(0, TOKENS)
        alive = t < tokens
        segment, start = _segments_of(segment_of, offsets, t, tokens)
        dz = _output_gradients(
            dout, dout_token, x, x_token, halo, counts, taps, bias, t, segment, start, alive, channel, channels,
            WIDTH, SILU, TOKENS, CHANNELS,
        )  # fmt: skip
        sums += tl.where(which == WIDTH, tl.sum(dz, 0)[None, :], 0.0)
        for k in range(WIDTH):
            value, counted = _tap(x, x_token, halo, counts, t, k, segment, start, alive, channel, channels, WIDTH)
            part = tl.sum(tl.where(counted, dz * value, 0.0), 0)
            sums += tl.where(which == k, part[None, :], 0.0)
        w = tl.load(taps + channel, mask=known, other=0.0).to(tl.float32)
        gradient = dz * w[None, :]
        for k in range(1, WIDTH):
            reader = t + k
            reads = reader < tokens
            if segment_of is not None:
                reads = reads & (tl.load(segment_of + reader, mask=reads, other=-1) == segment)
            dz = _output_gradients(
                dout, dout_token, x, x_token, halo, counts, taps, bias, reader, segment, start, reads,
                channel, channels, WIDTH, SILU, TOKENS, CHANNELS,
            )  # fmt: skip
            w = tl.load(taps + k * channels + channel, mask=known, other=0.0).to(tl.float32)
            gradient += tl.where(reads[:, None], dz * w[None, :], 0.0)
        at = dx + row * tokens * channels + t.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(at, gradient.to(dx.dtype.element_ty), mask=alive[:, None] & known[None, :])
    at = partial + (row * tl.num_programs(0) + tl.program_id(0)) * ((WIDTH + 1) * channels)
    tl.store(at + which * channels + channel[None, :], sums, mask=(which <= WIDTH) & known[None, :])


@triton.jit
def halo_backward(
    dout, dout_row, dout_token, x, x_row, x_token, halo, halo_row, counts, taps, bias, offsets, dhalo,
    segments, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dhalo [B, N, WIDTH - 1, D] of one segment of one row; TOKENS: a power of 2, at least WIDTH - 1.

    dhalo_r = sum_i w_{WIDTH - 1 + i - r} dz_i,  i <= r the position of a reading token in the segment
    """
    segment = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    halo += row * halo_row
    start = tl.load(offsets + segment).to(tl.int32)
    stop = tl.load(offsets + segment + 1).to(tl.int32)
    count = WIDTH - 1
    if counts is not None:
        count = tl.load(counts + segment).to(tl.int32)
    position = tl.arange(0, TOKENS)
    alive = (start + position < stop) & (position < WIDTH - 1)
    of_each = tl.zeros_like(position) + segment
    starts = tl.zeros_like(position) + start
    dz = _output_gradients(
        dout + row * dout_row, dout_token, x + row * x_row, x_token, halo, counts, taps, bias, start + position,
        of_each, starts, alive, channel, channels, WIDTH, SILU, TOKENS, CHANNELS,
    )  # fmt: skip
    at = dhalo + row * halo_row + segment.to(tl.int64) * ((WIDTH - 1) * channels)
    for r in range(WIDTH - 1):
        # The token is WIDTH - 1 - r before the segment.
        reads = alive & (position <= r) & (WIDTH - 1 - r <= count)
        tap = tl.where(reads, WIDTH - 1 - r + position, 0)
        w = tl.load(taps + tap[:, None] * channels + channel[None, :], mask=known[None, :], other=0.0).to(tl.float32)
        gradient = tl.sum(tl.where(reads[:, None], w * dz, 0.0), 0)
        tl.store(at + r * channels + channel, gradient.to(dhalo.dtype.element_ty), mask=known)
